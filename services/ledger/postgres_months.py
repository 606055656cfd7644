"""The months that operations, attempts and steps lie in, in PostgreSQL: made ahead, and dropped whole. Their rows are others' business."""

from datetime import datetime

from services.chassis.clock import Clock
from services.ledger.postgres_database import Connection, Database

AHEAD = "2 months"
"""A ledger that is down for less finds its month made. Later, operations lie in a table for other months: booked, and asked more slowly."""
BEHIND = "1 month"
"""On an empty database: what a spool still has may be from the month before."""
MAKE_MONTHS = f"SELECT make_months(t - interval '{BEHIND}', t + interval '{AHEAD}') FROM coalesce($1::timestamptz, now()) t"


class PostgresMonths:
    """Makes and drops months. `clock` as in PostgresHolds: with none, the database's own decides what is now."""

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._database, self._clock = database, clock

    async def make(self) -> int:
        """Have the months around now; return how many are new. Raises Overloaded if others are in the way, and nothing was made."""

        now = self._clock.now() if self._clock else None

        async def work(connection: Connection) -> int:
            async with connection.transaction():
                return int(await connection.fetchval(MAKE_MONTHS, now))

        return await self._database.run(work)

    async def drop(self, before: datetime) -> str | None:
        """Drop the oldest month that ended by `before` and is in the sums; return its name, `2026_01`, or None if there is none.

        Raises Overloaded if it is in use: what asks would wait for this as long as this waits.
        """

        async def work(connection: Connection) -> str | None:
            async with connection.transaction():
                await connection.execute("UPDATE usage_retention SET purged_before = $1 WHERE purged_before < $1", before)
                name: str | None = await connection.fetchval("SELECT drop_month($1)", before)
                return name

        return await self._database.run(work)

    async def forget(self, before: datetime, limit: int) -> int:
        """Forget at most `limit` ids of operations of before `before` that are not there any more; return how many."""
        gone = (
            "DELETE FROM operation_ids WHERE (tenant, operation_id) IN (SELECT k.tenant, k.operation_id FROM operation_ids k"
            " WHERE k.created_at < $1 AND NOT EXISTS (SELECT FROM operations o WHERE o.tenant = k.tenant AND o.created_at = k.created_at"
            " AND o.operation_id = k.operation_id) ORDER BY k.created_at LIMIT $2)"
        )
        return int((await self._database.run(lambda connection: connection.execute(gone, before, limit))).split()[-1])
