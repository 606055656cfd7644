"""Conversations in PostgreSQL: sessions, their turns and summaries, each of one user. The only file that handles questions and answers."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from services.chassis.errors import IdempotencyConflict, NotFound
from services.chassis.principal import Principal
from services.ledger.domain import Citation, Session, Summary, Turn
from services.ledger.paging import Page
from services.ledger.postgres_database import Connection, Database

_SESSION = (
    "s.user_id, s.session_id, s.title, s.created_at, s.updated_at, s.turns, s.title_by,"
    " (SELECT h.answer_id FROM turns h WHERE h.tenant = s.tenant AND h.user_id = s.user_id AND h.session_id = s.session_id"
    "  AND h.ordinal = coalesce(s.head, s.turns)) AS head"
)
TURN = (
    "t.answer_id, t.question, t.answer, t.citations, t.complete, t.created_at,"
    " (SELECT p.answer_id FROM turns p WHERE p.tenant = t.tenant AND p.user_id = t.user_id AND p.session_id = t.session_id"
    "  AND p.ordinal = coalesce(t.parent, t.ordinal - 1)) AS parent"
)
"""Columns of `turns t`, as `turn_of` reads them."""
SUMMARY = (
    "m.summary, m.made_by, m.created_at, (SELECT t.answer_id FROM turns t WHERE t.tenant = m.tenant AND t.user_id = m.user_id"
    " AND t.session_id = m.session_id AND t.ordinal = m.through) AS through"
)
"""Columns of `summaries m`, as `summary_of` reads them."""
_OWN = "tenant = $1 AND user_id = $2 AND session_id = $3"
TITLE_CHARACTERS_MAX = 120
DELETIONS_KEPT = timedelta(days=1)
"""Longer than any answer runs and its turn is tried; long enough for the records of a ledger that was away for hours."""
WAY_MAX = 200
"""How far back a summary is looked for: twice as far as turns are counted that have none."""


class PostgresConversations:
    """Keeps and shows conversations. A session's id is its user's own choice, so the user is always part of the key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(
        self, principal: Principal, session_id: str, turn: Turn, replaces: UUID | None = None, asked_after: UUID | None = None
    ) -> tuple[int, int]:
        own = (principal.tenant, principal.user, session_id)
        arguments = (
            *(*own, UUID(turn.answer_id), turn.question, turn.text),
            *(orjson.dumps([asdict(citation) for citation in turn.citations]).decode(), turn.complete, turn.created_at),
            *(turn.question[:TITLE_CHARACTERS_MAX], replaces),
        )

        async def work(connection: Connection) -> Any:
            async with connection.transaction():
                if asked_after is not None:
                    # The lock that deleting takes first, too: the conversation is there until the turn is, or it is gone.
                    await connection.execute("SELECT FROM users WHERE tenant = $1 AND user_id = $2 FOR NO KEY UPDATE", *own[:2])
                    there = await connection.fetchval(f"SELECT true FROM turns WHERE {_OWN} AND answer_id = $4", *own, asked_after)
                    if not there:
                        raise NotFound("the conversation has no such turn", kind="turn")
                kept = await connection.fetchrow("SELECT * FROM append_turn($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)", *arguments)
                if kept["place"] is None:
                    raise NotFound("the conversation was deleted, or has no such turn", kind="turn")
                return kept

        place, kept_in, unsummarised = await self._database.of(principal.tenant).run(work)
        if kept_in != session_id:
            raise IdempotencyConflict("the answer is kept in another conversation", key=turn.answer_id)
        return int(place), int(unsummarised)

    async def turns(self, principal: Principal, session_id: str, limit: int) -> Sequence[Turn]:
        return await self._turns(principal.tenant, principal.user, session_id, limit)

    async def _turns(self, tenant: str, user: str, session_id: str, limit: int) -> Sequence[Turn]:
        query = f"SELECT {TURN} FROM latest_turns($1, $2, $3, $4) t"
        rows = await self._database.self_scoped().fetch(query, tenant, user, session_id, limit)
        return [turn_of(row) for row in reversed(rows)]

    async def turns_until(self, principal: Principal, session_id: str, answer_id: UUID, limit: int) -> Sequence[Turn]:
        query = f"SELECT {TURN} FROM turns_until($1, $2, $3, $4, $5) t"
        rows = await self._database.self_scoped().fetch(query, principal.tenant, principal.user, session_id, answer_id, limit)
        if not rows:
            raise NotFound("the conversation has no such turn", kind="turn")
        return [turn_of(row) for row in reversed(rows)]

    async def summary(self, principal: Principal, session_id: str, until: UUID) -> Summary | None:
        row = await self._database.self_scoped().row(
            f"SELECT {SUMMARY} FROM latest_summary($1, $2, $3, $4, $5) m", *(principal.tenant, principal.user, session_id, until, WAY_MAX)
        )
        return summary_of(row) if row else None

    async def summarise(self, principal: Principal, session_id: str, summary: Summary) -> None:
        known = await self._database.of(principal.tenant).value(
            "SELECT put_summary($1, $2, $3, $4, $5, $6, $7)",
            *(principal.tenant, principal.user, session_id, UUID(summary.through), summary.text, summary.made_by, summary.created_at),
        )
        if not known:
            raise NotFound("the conversation has no such turn", kind="turn")

    async def turn(self, tenant: str, user: str, answer_id: UUID) -> Turn | None:
        row = await self._database.of(tenant).row(
            f"SELECT {TURN} FROM turns t WHERE t.tenant = $1 AND t.user_id = $2 AND t.answer_id = $3", tenant, user, answer_id
        )
        return turn_of(row) if row else None

    async def session(
        self, principal: Principal, session_id: str, turns_max: int, *, all_branches: bool = False
    ) -> tuple[Session, Sequence[Turn]]:
        row = await self._database.of(principal.tenant).row(
            f"SELECT {_SESSION} FROM sessions s WHERE s.tenant = $1 AND s.session_id = $2 AND (s.user_id = $3 OR $4)"
            " ORDER BY s.user_id = $3 DESC, s.updated_at DESC LIMIT 1",
            *(principal.tenant, session_id, principal.user, "admin" in principal.roles),
        )
        if row is None:
            raise NotFound("no such conversation", kind="session")
        if not all_branches:
            return _session_of(row), await self._turns(principal.tenant, row["user_id"], session_id, turns_max)
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT {TURN} FROM turns t WHERE {_OWN} ORDER BY t.ordinal DESC LIMIT $4",
            *(principal.tenant, row["user_id"], session_id, turns_max),
        )
        return _session_of(row), [turn_of(turn) for turn in reversed(rows)]

    async def own_session(self, principal: Principal, session_id: str) -> Session:
        row = await self._database.of(principal.tenant).row(
            f"SELECT {_SESSION} FROM sessions s WHERE {_OWN}", principal.tenant, principal.user, session_id
        )
        if row is None:
            raise NotFound("no such conversation", kind="session")
        return _session_of(row)

    async def update(self, principal: Principal, session_id: str, *, title: str | None, suggested: bool, head: UUID | None) -> Session:
        own = (principal.tenant, principal.user, session_id)
        place = None
        if head is not None:
            query = f"SELECT ordinal FROM turns WHERE {_OWN} AND answer_id = $4"
            if (place := await self._database.of(principal.tenant).value(query, *own, head)) is None:
                raise NotFound("the conversation has no such turn", kind="turn")
        await self._database.of(principal.tenant).row(
            "UPDATE sessions SET title = CASE WHEN $4::text IS NULL OR ($5 AND title_by <> 'rule') THEN title ELSE $4 END,"
            " title_by = CASE WHEN $4::text IS NULL OR ($5 AND title_by <> 'rule') THEN title_by WHEN $5 THEN 'model' ELSE 'user' END,"
            f" head = coalesce($6, head) WHERE {_OWN}",
            *(*own, title, suggested, place),
        )
        return await self.own_session(principal, session_id)

    async def delete(self, principal: Principal, session_id: str) -> None:
        known = await self._database.of(principal.tenant).value(
            "SELECT delete_session($1, $2, $3)", principal.tenant, principal.user, session_id
        )
        if not known:
            raise NotFound("no such conversation", kind="session")

    async def forget_deletions(self) -> int:
        query = "WITH gone AS (DELETE FROM deleted_sessions WHERE deleted_at < now() - $1::interval RETURNING 1) SELECT count(*) FROM gone"
        return int(await self._database.value(query, DELETIONS_KEPT))

    async def kept_turns(self, principal: Principal, session_id: str, after: int, size: int) -> Sequence[tuple[int, Turn]]:
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT t.ordinal, {TURN} FROM turns t WHERE {_OWN} AND t.ordinal > $4 ORDER BY t.ordinal LIMIT $5",
            *(principal.tenant, principal.user, session_id, after, size),
        )
        return [(row["ordinal"], turn_of(row)) for row in rows]

    async def kept_summaries(self, principal: Principal, session_id: str) -> Sequence[Summary]:
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT {SUMMARY} FROM summaries m WHERE {_OWN} ORDER BY m.through", principal.tenant, principal.user, session_id
        )
        return [summary_of(row) for row in rows]

    async def page(self, principal: Principal, *, size: int, after: tuple[datetime, str] | None) -> Page[Session]:
        condition, arguments = "", [principal.tenant, principal.user, size + 1]
        if after is not None:
            condition = " AND (s.updated_at, s.session_id) < ($4, $5)"
            arguments += after
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT {_SESSION} FROM sessions s WHERE s.tenant = $1 AND s.user_id = $2{condition}"
            " ORDER BY s.updated_at DESC, s.session_id DESC LIMIT $3",
            *arguments,
        )
        last = rows[size - 1] if len(rows) > size else None
        return Page([_session_of(row) for row in rows[:size]], (last["updated_at"], last["session_id"]) if last else None)


def _session_of(row: Any) -> Session:
    return Session(
        row["session_id"], row["title"], row["created_at"], row["updated_at"], row["turns"], str(row["head"] or ""), row["title_by"]
    )


def turn_of(row: Any) -> Turn:
    """A row of TURN."""
    citations = tuple(
        Citation(**{**citation, "heading_path": tuple(citation["heading_path"])}) for citation in orjson.loads(row["citations"])
    )
    return Turn(
        str(row["answer_id"]), row["question"], row["answer"], citations, row["created_at"], row["complete"], str(row["parent"] or "")
    )


def summary_of(row: Any) -> Summary:
    """A row of SUMMARY."""
    return Summary(str(row["through"]), row["summary"], row["made_by"], row["created_at"])
