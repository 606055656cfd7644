"""Reads and erases what is kept of one user in PostgreSQL. What stays after that, the schema's `erase_user` says."""

import asyncio
from collections.abc import Sequence
from datetime import datetime

from services.chassis.errors import Overloaded
from services.ledger.domain import Summary, Turn
from services.ledger.postgres_conversations import SUMMARY, TURN, summary_of, turn_of
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_sums import LOCK_KEY

RETURNED_POLLS_MAX, RETURNED_POLL_S = 50, 0.1
"""Orchestrators ask every second what they are to return."""
ERASE_TIMEOUT_S = 300.0
"""A user with a million operations takes a minute."""


class PostgresPrivacy:
    """What a person may ask to be done with what is kept of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def erase(self, tenant: str, user: str) -> bool:

        async def work(connection: Connection) -> str:
            async with connection.transaction():
                # Nothing is added to the sums meanwhile: a batch that has read the user's name would write it down again.
                await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY, timeout=ERASE_TIMEOUT_S)
                return str(await connection.fetchval("SELECT erase_user($1, $2)", tenant, user, timeout=ERASE_TIMEOUT_S))

        await self._until_returned(tenant, user)
        outcome = await self._database.run(work)
        if outcome == "busy":
            raise Overloaded("answers of the user are under way", retry_after_ms=10_000)
        return outcome == "erased"

    async def _until_returned(self, tenant: str, user: str) -> None:
        """Call back what is lent to the user, and wait a little until it is: it counts as money set aside, though no answer needs it."""
        lent = "SELECT recall_credit($1, $2, '', 'user', '0', NULL)"
        for _ in range(RETURNED_POLLS_MAX):
            if not await self._database.self_scoped().value(lent, tenant, user):
                return
            await asyncio.sleep(RETURNED_POLL_S)

    async def subscriptions(self, tenant: str, user: str) -> Sequence[tuple[str, datetime, datetime | None]]:
        rows = await self._database.of(tenant).fetch(
            "SELECT plan, started_at, ended_at FROM subscriptions WHERE tenant = $1 AND user_id = $2 ORDER BY subscription_id", tenant, user
        )
        return [(row["plan"], row["started_at"], row["ended_at"]) for row in rows]

    async def turns(self, tenant: str, user: str, after: tuple[str, int], size: int) -> Sequence[tuple[str, int, Turn]]:
        rows = await self._database.of(tenant).fetch(
            f"SELECT t.session_id, t.ordinal, {TURN} FROM turns t"
            " WHERE t.tenant = $1 AND t.user_id = $2 AND (t.session_id, t.ordinal) > ($3, $4) ORDER BY t.session_id, t.ordinal LIMIT $5",
            *(tenant, user, *after, size),
        )
        return [(row["session_id"], row["ordinal"], turn_of(row)) for row in rows]

    async def summaries(self, tenant: str, user: str, after: tuple[str, int], size: int) -> Sequence[tuple[str, int, Summary]]:
        rows = await self._database.of(tenant).fetch(
            f"SELECT m.session_id, m.through AS reached, {SUMMARY} FROM summaries m"
            " WHERE m.tenant = $1 AND m.user_id = $2 AND (m.session_id, m.through) > ($3, $4) ORDER BY m.session_id, m.through LIMIT $5",
            *(tenant, user, *after, size),
        )
        return [(row["session_id"], row["reached"], summary_of(row)) for row in rows]
