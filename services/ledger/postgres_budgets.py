"""Budgets in PostgreSQL: limits, and what their running period has seen. They are enforced where money is set aside, in reserve_hold."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from services.chassis.clock import Clock
from services.chassis.errors import NotFound
from services.ledger.domain import Budget
from services.ledger.postgres_database import Connection, Database

_BUDGETS = (
    "SELECT b.scope, b.subject, b.period, b.limit_nanousd, coalesce(s.spent_nanousd, 0) AS spent_nanousd,"
    " coalesce(s.held_nanousd, 0) AS held_nanousd, (p.start + ('1 ' || b.period)::interval) AT TIME ZONE 'UTC' AS resets_at"
    " FROM budgets b CROSS JOIN LATERAL (SELECT date_trunc(b.period, $4::timestamptz AT TIME ZONE 'UTC')::date AS start) p"
    " LEFT JOIN spending s ON s.tenant = b.tenant AND s.scope = b.scope AND s.subject = b.subject AND s.period = b.period"
    " AND s.period_start = p.start"
    " WHERE b.tenant = $1 AND b.scope = $2 AND b.subject = $3 ORDER BY b.period"
)


class PostgresBudgets:
    """Limits of a tenant, its users and its keys."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def of(self, tenant: str, scope: str, subject: str) -> Sequence[Budget]:
        rows = await self._database.of(tenant).fetch(_BUDGETS, tenant, scope, subject, self._clock.now().astimezone(UTC))
        return [_budget_of(row) for row in rows]

    async def put(self, tenant: str, scope: str, subject: str, period: str, limit_nanousd: int) -> Budget:
        moment: datetime = self._clock.now()

        async def work(connection: Connection) -> Any:
            async with connection.transaction():
                if scope == "key" and not await connection.fetchval(
                    "SELECT true FROM api_keys WHERE tenant = $1 AND key_id = $2", tenant, subject
                ):
                    raise NotFound("no such key", kind="api_key")
                await connection.execute("INSERT INTO tenants (tenant) VALUES ($1) ON CONFLICT DO NOTHING", tenant)
                await connection.execute(
                    "INSERT INTO budgets (tenant, scope, subject, period, limit_nanousd) VALUES ($1, $2, $3, $4, $5)"
                    " ON CONFLICT (tenant, scope, subject, period) DO UPDATE SET limit_nanousd = $5, updated_at = now()",
                    *(tenant, scope, subject, period, limit_nanousd),
                )
                return await connection.fetch(_BUDGETS, tenant, scope, subject, moment)

        return next(_budget_of(row) for row in await self._database.of(tenant).run(work) if row["period"] == period)

    async def delete(self, tenant: str, scope: str, subject: str, period: str) -> None:
        deleted = await self._database.of(tenant).fetch(
            "DELETE FROM budgets WHERE tenant = $1 AND scope = $2 AND subject = $3 AND ($4 = '' OR period = $4) RETURNING period",
            *(tenant, scope, subject, period),
        )
        if not deleted:
            raise NotFound("no such budget", kind="budget")


def _budget_of(row: Any) -> Budget:
    return Budget(
        row["scope"],
        row["subject"],
        row["period"],
        row["limit_nanousd"],
        row["spent_nanousd"],
        row["held_nanousd"],
        row["resets_at"],
    )
