"""Conversations in PostgreSQL: sessions and their turns, each of one user. The only file that handles questions and answers."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from services.chassis.errors import IdempotencyConflict, NotFound
from services.chassis.principal import Principal
from services.ledger.domain import Citation, Session, Turn
from services.ledger.paging import Page
from services.ledger.postgres_database import Database

_SESSION = "session_id, title, created_at, updated_at, turns"
TURN = "answer_id, question, answer, citations, complete, created_at"


class PostgresConversations:
    """Keeps and shows conversations. A session's id is its user's own choice, so the user is always part of the key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, principal: Principal, session_id: str, turn: Turn) -> int:
        place, kept_in = await self._database.of(principal.tenant).row(
            "SELECT * FROM append_turn($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            *(principal.tenant, principal.user, session_id, UUID(turn.answer_id), turn.question, turn.text),
            *(orjson.dumps([asdict(citation) for citation in turn.citations]).decode(), turn.complete, turn.created_at),
        )
        if kept_in != session_id:
            raise IdempotencyConflict("the answer is kept in another conversation", key=turn.answer_id)
        return int(place)

    async def turns(self, principal: Principal, session_id: str, limit: int) -> Sequence[Turn]:
        return await self._turns(principal.tenant, principal.user, session_id, limit)

    async def _turns(self, tenant: str, user: str, session_id: str, limit: int) -> Sequence[Turn]:
        query = f"SELECT {TURN} FROM latest_turns($1, $2, $3, $4)"
        rows = await self._database.self_scoped().fetch(query, tenant, user, session_id, limit)
        return [turn_of(row) for row in reversed(rows)]

    async def turn(self, tenant: str, user: str, answer_id: UUID) -> Turn | None:
        row = await self._database.of(tenant).row(
            f"SELECT {TURN} FROM turns WHERE tenant = $1 AND user_id = $2 AND answer_id = $3", tenant, user, answer_id
        )
        return turn_of(row) if row else None

    async def session(self, principal: Principal, session_id: str, turns_max: int) -> tuple[Session, Sequence[Turn]]:
        row = await self._database.of(principal.tenant).row(
            f"SELECT user_id, {_SESSION} FROM sessions WHERE tenant = $1 AND session_id = $2 AND (user_id = $3 OR $4)"
            " ORDER BY user_id = $3 DESC, updated_at DESC LIMIT 1",
            *(principal.tenant, session_id, principal.user, "admin" in principal.roles),
        )
        if row is None:
            raise NotFound("no such conversation", kind="session")
        return _session_of(row), await self._turns(principal.tenant, row["user_id"], session_id, turns_max)

    async def page(self, principal: Principal, *, size: int, after: tuple[datetime, str] | None) -> Page[Session]:
        condition, arguments = "", [principal.tenant, principal.user, size + 1]
        if after is not None:
            condition = " AND (updated_at, session_id) < ($4, $5)"
            arguments += after
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT {_SESSION} FROM sessions WHERE tenant = $1 AND user_id = $2{condition}"
            " ORDER BY updated_at DESC, session_id DESC LIMIT $3",
            *arguments,
        )
        last = rows[size - 1] if len(rows) > size else None
        return Page([_session_of(row) for row in rows[:size]], (last["updated_at"], last["session_id"]) if last else None)


def _session_of(row: Any) -> Session:
    return Session(row["session_id"], row["title"], row["created_at"], row["updated_at"], row["turns"])


def turn_of(row: Any) -> Turn:
    """A row of TURN."""
    citations = tuple(
        Citation(**{**citation, "heading_path": tuple(citation["heading_path"])}) for citation in orjson.loads(row["citations"])
    )
    return Turn(str(row["answer_id"]), row["question"], row["answer"], citations, row["created_at"], row["complete"])
