"""Erases one user in PostgreSQL. What stays, the schema's `erase_user` says."""

from services.chassis.errors import Overloaded
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_sums import LOCK_KEY

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

        outcome = await self._database.run(work)
        if outcome == "busy":
            raise Overloaded("answers of the user are under way", retry_after_ms=10_000)
        return outcome == "erased"
