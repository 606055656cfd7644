"""Proves from the rows alone that the books are whole. Everything is asked of one snapshot of a database that may be in use.

PostgreSQL sorts and sums, on disk if need be, so memory here does not grow with the books. What must hold is in `laws`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from services.ledger.laws import LAWS, Law

CONNECT_TIMEOUT_S = 10.0
FIRST_BROKEN = "WITH broken AS MATERIALIZED ({}) SELECT * FROM broken LIMIT 1"
"""Planned as if all of them were wanted: mostly there is none, and then every row has been read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One law, how many rows it was held against, and the first row that breaks it, if one does."""

    law: str
    rows: int
    at: str = ""
    wrong: str = ""

    @property
    def broken(self) -> bool:
        return bool(self.at)


async def verify(url: str, laws: Sequence[Law] = LAWS) -> list[Finding]:
    """Hold the books in the database at `url` against `laws`, read-only, in one snapshot; one finding a law, in their order.

    Takes as long as reading everything takes. Raises OSError, TimeoutError or asyncpg's errors if the database cannot be asked.
    """
    settings = {"application_name": "tailrace-verify", "timezone": "UTC"}
    connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S, server_settings=settings)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return [await _held_against(law, connection) for law in laws]
    finally:
        await connection.close()


async def _held_against(law: Law, connection: Any) -> Finding:
    rows = await connection.fetchval(law.counted)
    first = await connection.fetchrow(FIRST_BROKEN.format(law.broken))
    return Finding(law.text, rows, first["at"], first["wrong"]) if first else Finding(law.text, rows)
