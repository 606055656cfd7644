"""Users, plans and subscriptions in PostgreSQL. Budgets and keys have files of their own."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from services.chassis.errors import NotFound, RequestInvalid
from services.ledger.domain import Limits, Member, Plan
from services.ledger.paging import Page
from services.ledger.postgres_database import Connection, Database

PLANS_OF_TENANT_MAX = 1_000
"""A tenant's own: the list of plans is not paged."""
PLAN_COLUMNS = (
    *("requests_per_minute", "tokens_per_minute", "concurrent_answers", "monthly_budget_nanousd", "tiers"),
    *("tenant_requests_per_minute", "tenant_tokens_per_minute", "tenant_concurrent_answers"),
    *("key_requests_per_minute", "key_tokens_per_minute", "key_concurrent_answers", "answer_deadline_ms", "tools"),
    "cache_scope",
)
_PLAN = ", ".join(PLAN_COLUMNS)
PUT_PLAN = (
    f"INSERT INTO plans (tenant, name, {_PLAN}) VALUES ({', '.join(f'${number}' for number in range(1, len(PLAN_COLUMNS) + 3))})"
    f" ON CONFLICT (tenant, name) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in PLAN_COLUMNS)}, updated_at = now()"
)
"""Takes what `plan_row` makes."""
_FREE_AGAIN = (
    "(SELECT max(s.ended_at) FROM subscriptions s WHERE s.tenant = members.tenant AND s.user_id = members.user_id AND s.ended_at <= now())"
)
_MEMBER = (
    f"user_id, display_name, created_at, coalesce(subscribed_at, {_FREE_AGAIN}) AS subscribed_at, next_plan, changes_at, plan, {_PLAN}"
)


class PostgresPeople:
    """Who there is and what they may do."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def member(self, tenant: str, user: str) -> Member:
        known = await self._member(tenant, user)
        if known is None:
            await self._database.of(tenant).value("SELECT ensure_user($1, $2)", tenant, user)
            known = await self._member(tenant, user)
        assert known is not None
        return known

    async def known_member(self, tenant: str, user: str) -> Member:
        known = await self._member(tenant, user)
        if known is None:
            raise NotFound("no such user", kind="user")
        return known

    async def _member(self, tenant: str, user: str) -> Member | None:
        row = await self._database.of(tenant).row(f"SELECT {_MEMBER} FROM members WHERE tenant = $1 AND user_id = $2", tenant, user)
        return _member_of(row) if row else None

    async def page(self, tenant: str, *, size: int, after: str) -> Page[Member]:
        rows = await self._database.of(tenant).fetch(
            f"SELECT {_MEMBER} FROM members WHERE tenant = $1 AND user_id > $2 ORDER BY user_id LIMIT $3", tenant, after, size + 1
        )
        last = (rows[size - 1]["user_id"],) if len(rows) > size else None
        return Page([_member_of(row) for row in rows[:size]], last)

    async def put(self, tenant: str, user: str, display_name: str) -> Member:

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute("SELECT ensure_user($1, $2)", tenant, user)
                await connection.execute(
                    "UPDATE users SET display_name = $3 WHERE tenant = $1 AND user_id = $2", tenant, user, display_name
                )

        await self._database.of(tenant).run(work)
        return await self.member(tenant, user)

    async def plans(self, tenant: str) -> Sequence[Plan]:
        rows = await self._database.of(tenant).fetch(
            f"SELECT DISTINCT ON (name) name AS plan, {_PLAN} FROM plans WHERE tenant IN ('', $1) ORDER BY name, tenant <> '' DESC", tenant
        )
        return [_plan_of(row) for row in rows]

    async def put_plan(self, tenant: str, plan: Plan) -> None:

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                others = await connection.fetchval("SELECT count(*) FROM plans WHERE tenant = $1 AND name <> $2", tenant, plan.name)
                if others >= PLANS_OF_TENANT_MAX:
                    raise RequestInvalid("the tenant has too many plans", field="plan.name", bound=f"{PLANS_OF_TENANT_MAX} plans")
                await connection.fetchval(PUT_PLAN, *plan_row(tenant, plan))

        await self._database.of(tenant).run(work)

    async def subscribe(self, tenant: str, user: str, plan: str, *, at_period_end: bool) -> Member:

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                if not await connection.fetchval("SELECT true FROM plans WHERE tenant IN ('', $1) AND name = $2 LIMIT 1", tenant, plan):
                    raise NotFound("no such plan", kind="plan")
                await connection.execute("SELECT ensure_user($1, $2)", tenant, user)
                await connection.execute("SELECT change_subscription($1, $2, $3, $4)", tenant, user, plan, at_period_end)

        await self._database.of(tenant).run(work)
        return await self.member(tenant, user)

    async def unsubscribe(self, tenant: str, user: str, *, at_period_end: bool) -> None:
        await self.known_member(tenant, user)
        await self._database.of(tenant).value("SELECT change_subscription($1, $2, NULL, $3)", tenant, user, at_period_end)


def plan_row(tenant: str, plan: Plan) -> tuple[Any, ...]:
    """The row of `plan`: tenant, name and PLAN_COLUMNS."""
    return (
        *(tenant, plan.name, plan.requests_per_minute, plan.tokens_per_minute, plan.concurrent_answers),
        *(plan.monthly_budget_nanousd, list(plan.tiers), *astuple(plan.tenant_limits), *astuple(plan.key_limits)),
        *(plan.answer_deadline_ms, list(plan.tools), plan.cache_scope),
    )


def _limits_of(row: Any, scope: str) -> Limits:
    return Limits(*(row[f"{scope}_{name}"] for name in ("requests_per_minute", "tokens_per_minute", "concurrent_answers")))


def _plan_of(row: Any) -> Plan:
    return Plan(
        row["plan"],
        row["requests_per_minute"],
        row["tokens_per_minute"],
        row["concurrent_answers"],
        row["monthly_budget_nanousd"],
        tuple(row["tiers"]),
        _limits_of(row, "tenant"),
        _limits_of(row, "key"),
        row["answer_deadline_ms"],
        tuple(row["tools"]),
        row["cache_scope"],
    )


def _member_of(row: Any) -> Member:
    return Member(
        row["user_id"],
        _plan_of(row),
        row["display_name"],
        row["created_at"],
        row["subscribed_at"],
        row["next_plan"] or "",
        row["changes_at"],
    )
