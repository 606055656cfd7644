"""Keeps the sums of usage in PostgreSQL, and removes operations that are older than they shall be kept. `postgres_usage` reads both.

An operation is added by the transaction that takes it off the list of those to add, so it is added once, whatever dies when.
"""

from datetime import datetime

from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_usage import MEASURES

LOCK_KEY = 0x7461696C2D73756D  # "tail-sum": one replica at a time, so that none waits for another's rows


def _add(table: str, grain: str, owner: str) -> str:
    """Add the facts of a batch to one table of sums. `owner` = columns of whom the sums are, besides the tenant."""
    key = f"tenant, {owner}starts_at, model, tier, cache_verdict"
    moment = f"date_trunc('{grain}', created_at, 'UTC')"
    summed = ", ".join(f"sum({name})::bigint" for name in MEASURES)
    added = ", ".join(f"{name} = sums.{name} + excluded.{name}" for name in MEASURES)
    return (
        f"INSERT INTO {table} AS sums ({key}, {', '.join(MEASURES)}, durations, first_tokens)"
        f" SELECT tenant, {owner}{moment}, model, tier, cache_verdict, {summed}, histogram(array_agg(duration_pair)),"
        " histogram(array_remove(array_agg(first_token_pair), NULL)) FROM facts"
        f" GROUP BY tenant, {owner}{moment}, model, tier, cache_verdict"
        f" ON CONFLICT ({key}) DO UPDATE SET {added}, durations = histogram(sums.durations || excluded.durations),"
        " first_tokens = histogram(sums.first_tokens || excluded.first_tokens)"
    )


_ROLL = (
    # By place, not by key: with a long list the planner would look for a batch's keys in all of it, batch after batch.
    "WITH taken AS (DELETE FROM usage_unrolled WHERE ctid = ANY (ARRAY(SELECT ctid FROM usage_unrolled LIMIT $1))"
    " RETURNING tenant, operation_id, created_at),"
    " facts AS MATERIALIZED (SELECT f.* FROM taken JOIN LATERAL (SELECT * FROM usage_facts"
    " WHERE tenant = taken.tenant AND operation_id = taken.operation_id AND created_at = taken.created_at OFFSET 0) f ON true),"
    f" hours AS ({_add('usage_hours', 'hour', '')}), days AS ({_add('usage_days', 'day', '')}),"
    f" user_days AS ({_add('usage_user_days', 'day', 'user_id, api_key_id, ')})"
    " SELECT count(*) FROM taken"
)


class PostgresSums:
    """Sums by hour and day."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def roll(self, limit: int) -> int:
        """Add at most `limit` operations to the sums; return how many. 0 also if another replica is at it."""

        async def work(connection: Connection) -> int:
            async with connection.transaction():
                if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", LOCK_KEY):
                    return 0
                return int(await connection.fetchval(_ROLL, limit))

        return await self._database.run(work)

    async def purge(self, before: datetime, limit: int) -> int:
        """Remove at most `limit` operations that were accepted before `before` and are in the sums, with attempts and steps.

        Holds and entries, which are the books, stay. Returns how many were removed.
        """

        async def work(connection: Connection) -> int:
            async with connection.transaction():
                if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", LOCK_KEY):
                    return 0
                await connection.execute("UPDATE usage_retention SET purged_before = $1 WHERE purged_before < $1", before)
                old = await connection.fetch(
                    "SELECT tenant, operation_id, created_at FROM operations o WHERE created_at < $1 AND NOT EXISTS ("
                    "SELECT FROM usage_unrolled u WHERE u.tenant = o.tenant AND u.operation_id = o.operation_id)"
                    " ORDER BY created_at LIMIT $2",
                    *(before, limit),
                )
                keys = [[row[name] for row in old] for name in ("tenant", "operation_id", "created_at")]
                for table in ("steps", "attempts", "operations"):
                    await connection.execute(
                        f"DELETE FROM {table} t USING unnest($1::text[], $2::uuid[], $3::timestamptz[]) AS old (tenant, operation_id, at)"
                        " WHERE t.tenant = old.tenant AND t.operation_id = old.operation_id AND t.created_at = old.at",
                        *keys,
                    )
                return len(old)

        return await self._database.run(work)
