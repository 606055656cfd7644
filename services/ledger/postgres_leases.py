"""Credit leases in PostgreSQL: lending and taking back are one SQL function each. Who draws on a lease is the recorder's to say.

What is lent is recalled where a reservation is refused for want of it: see `postgres_holds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from services.chassis.clock import Clock
from services.chassis.errors import BudgetExhausted, HoldAlreadyExpired, NotFound
from services.ledger.domain import Draw, Lease
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_prices import PostgresPrices


@dataclass(frozen=True, slots=True)
class Terms:
    """How much is lent and for how long; see the settings of the same names."""

    percent: int
    least_nanousd: int
    most_nanousd: int
    life_ms: int


class PostgresLeases:
    """Lends and takes back. `clock` as in PostgresHolds: with none, the database's own decides."""

    def __init__(self, database: Database, prices: PostgresPrices, terms: Terms, clock: Clock | None = None) -> None:
        self._database, self._prices, self._terms, self._clock = database, prices, terms, clock

    def _now(self) -> datetime | None:
        return self._clock.now() if self._clock else None

    async def lend(self, lease: Lease) -> int:
        terms = self._terms
        row = await self._database.of(lease.tenant).row(
            "SELECT * FROM lend_credit($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            *(lease.lease_id, lease.tenant, lease.user, lease.api_key, terms.percent, terms.least_nanousd, terms.most_nanousd),
            *(timedelta(milliseconds=terms.life_ms), self._now()),
        )
        if row["outcome"] == "empty":
            raise BudgetExhausted("too little is left to lend any of it", needed_nanousd=0, left_nanousd=0, scope="user")
        if row["outcome"] == "ended":
            raise HoldAlreadyExpired("the lease has ended", hold_id=str(lease.lease_id))
        return int(row["amount_nanousd"])

    async def take_back(self, lease_id: UUID, tenant: str, user: str, draws: Sequence[Draw]) -> int:

        async def work(connection: Connection) -> int | None:
            async with connection.transaction():
                calls = [await self._call(draw, lease_id, tenant, user, connection) for draw in draws]
                returned: int | None = await connection.fetchval(
                    "SELECT return_credit($1, $2, $3, $4, $5)", lease_id, tenant, user, orjson.dumps(calls).decode(), self._now()
                )
                return returned

        returned = await self._database.of(tenant).run(work)
        if returned is None:
            raise NotFound("no such lease", kind="lease")
        return returned

    async def recalled(self, held: Sequence[UUID]) -> Sequence[UUID]:

        async def work(connection: Connection) -> Sequence[UUID]:
            query = "SELECT lease_id FROM leases WHERE lease_id = ANY($1) AND recalled_at IS NOT NULL AND ended_at IS NULL"
            return [row["lease_id"] for row in await connection.fetch(query, held)]

        return await self._database.run(work)

    async def _call(self, draw: Draw, lease_id: UUID, tenant: str, user: str, connection: Connection) -> dict[str, Any]:
        """A draw as open_late_holds reads it."""
        now = self._now() or datetime.now(UTC)
        listed = await self._prices.told(tenant, draw.provider, draw.model, draw.price_version, now, connection)
        return {
            "tenant": tenant,
            "user_id": user,
            "api_key_id": "",
            "operation_id": draw.operation_id,
            "attempt": draw.attempt,
            "provider": draw.provider,
            "model": draw.model,
            "price_id": listed.price_id,
            "lease_id": lease_id,
            "input_tokens_max": draw.input_tokens_max,
            "output_tokens_max": draw.output_tokens_max,
            "amount_nanousd": draw.amount_nanousd,
            "created_at": now,
        }

    async def expire_one(self, grace_ms: int) -> str | None:

        async def work(connection: Connection) -> str | None:
            async with connection.transaction():
                row = await connection.fetchrow(
                    "SELECT l.lease_id, h.tenant, h.user_id FROM leases l JOIN holds h ON h.hold_id = l.lease_id"
                    " WHERE l.ended_at IS NULL AND l.expires_at <= coalesce($1, clock_timestamp()) - $2::interval"
                    " ORDER BY l.expires_at LIMIT 1 FOR UPDATE OF l SKIP LOCKED",
                    *(self._now(), timedelta(milliseconds=grace_ms)),
                )
                if row is None:
                    return None
                await connection.fetchval("SELECT return_credit($1, $2, $3, '[]', $4)", *row, self._now())
                return str(row["lease_id"])

        return await self._database.run(work)
