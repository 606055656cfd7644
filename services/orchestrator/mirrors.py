"""Copies of logs that other replicas make, kept while somebody here reads them. One copy serves all its readers; it is never written to.

Whoever follows a log also watches its maker: if the replica is gone, the log ends as interrupted, for everybody.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from services.chassis.errors import AnswerInterrupted, AnswerLogGone, DomainError, Overloaded, Unavailable
from services.orchestrator.domain import Recorded, SharedAnswer
from services.orchestrator.log import EventLog, Reader
from services.orchestrator.ports import SharedLogs

log = structlog.get_logger(__name__)

WAIT_S = 1.0
"""How long a read waits for news before the maker of the log is looked at."""
ABSENCES_MAX = 2
"""How often in a row the maker, or the log, must be missing: they may just have been lost with the store, and are told to it again."""
READ_TRIES_MAX = 5
BEGIN_TRIES_MAX = 2
"""The same for what nobody was told anything of yet: a store that is away is told soon, and one that was slow once is asked again."""


@dataclass(slots=True)
class Mirror:
    """A log of another replica, as far as it was read."""

    answer_id: str
    replica: str
    events: EventLog
    begun: asyncio.Event
    """Set once what was there at the beginning has been read."""
    users: int = 0
    task: "asyncio.Task[None] | None" = None


class Mirrors:
    """The copies of this process, at most `mirrors_max` of which can be followed at the same time."""

    def __init__(self, logs: SharedLogs, mirrors_max: int, *, wait_s: float = WAIT_S) -> None:
        self._logs, self._mirrors_max, self._wait_s = logs, mirrors_max, wait_s
        self._mirrors: dict[str, Mirror] = {}

    def __len__(self) -> int:
        return len(self._mirrors)

    @contextlib.asynccontextmanager
    async def reading(
        self, answer_id: str, known: SharedAnswer, after: int, *, is_follower: bool = False
    ) -> AsyncIterator[tuple[EventLog, Reader]]:
        """Read a copy, which holds by then all that was in the log. With its last reader it goes. Raises Overloaded, Unavailable."""
        mirror = self._mirrors.get(answer_id)
        if mirror is None:
            if len(self._mirrors) >= self._mirrors_max:
                raise Overloaded("too many answers of other replicas are read here", retry_after_ms=1000)
            mirror = self._mirrors[answer_id] = Mirror(answer_id, known.replica, EventLog(answer_id), asyncio.Event())
            mirror.task = asyncio.create_task(self._follow(mirror), name=f"mirror {answer_id}")
        mirror.users += 1
        try:
            await mirror.begun.wait()
            reader = mirror.events.reader(after, is_follower=is_follower)
            try:
                yield mirror.events, reader
            finally:
                mirror.events.leave(reader)
        finally:
            mirror.users -= 1
            if mirror.users == 0:
                del self._mirrors[answer_id]
                assert mirror.task is not None
                mirror.task.cancel()

    async def _follow(self, mirror: Mirror) -> None:
        """Copy until the log ends, its maker is gone, or it cannot be read any more."""
        try:
            await self._copy(mirror)
        except DomainError as error:
            mirror.events.end(error)
        except Exception as error:
            log.exception("mirror_failed", answer_id=mirror.answer_id, error=type(error).__name__)
            mirror.events.end(Unavailable("the answer's log cannot be read", dependency="redis"))
        finally:
            mirror.begun.set()

    async def _copy(self, mirror: Mirror) -> None:
        events, absences, failures = mirror.events, 0, 0
        while True:
            try:
                await self._logs.follow(mirror.answer_id)
                found = await self._logs.read(mirror.answer_id, len(events), self._wait_s if mirror.begun.is_set() else 0.001)
                failures = 0
            except Unavailable:
                failures += 1
                if failures >= (READ_TRIES_MAX if mirror.begun.is_set() else BEGIN_TRIES_MAX):
                    raise
                await asyncio.sleep(0.1 * 2**failures)
                continue
            for number, payload in found.events:
                if number != len(events) + 1:
                    raise AnswerInterrupted("the answer's log has a gap", answer_id=mirror.answer_id)
                events.append(Recorded(payload))
            if found.left_at is not None and events.left_at is None and len(events) >= found.left_at:
                events.leave_at(found.left_at)
            if found.ended:
                events.end(found.failure)
                return
            if found.events:
                absences = 0
                continue
            mirror.begun.set()
            known = await self._logs.look_up(mirror.answer_id)
            gone = known is None or known.events_gone
            alive = known is not None and not gone and (known.ended or await self._logs.is_alive(mirror.replica))
            absences = 0 if alive else absences + 1
            if absences >= ABSENCES_MAX and gone:
                raise AnswerLogGone("the events of this answer are no longer kept", answer_id=mirror.answer_id)
            if absences >= ABSENCES_MAX:
                await self._logs.interrupt(mirror.answer_id, mirror.replica, interrupted(mirror.answer_id))
                absences = 0


def interrupted(answer_id: str) -> AnswerInterrupted:
    """How an answer ends whose replica is gone."""
    return AnswerInterrupted("the replica that made this answer is gone; ask again", answer_id=answer_id)
