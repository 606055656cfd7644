"""The answers of this process: those that run, and the logs of those that ended a while ago. Who may read and stop them, and when they go.

The registry owns the tasks that produce; a call only reads. So a disconnect is not a cancel, and every answer ends exactly once.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import structlog

from services.chassis.errors import AnswerCancelled, AnswerLogGone, IdempotencyConflict, Internal, NotFound, Overloaded
from services.chassis.principal import Principal
from services.orchestrator.domain import Question
from services.orchestrator.log import EventLog, Reader

log = structlog.get_logger(__name__)

ENDED_EVENTS_MAX = 250_000
"""Events of all ended answers together, about 60 MB: a busy hour of long answers must not fill the memory."""
GONE_IDS_MAX = 10_000
"""Answers of which only the owner is remembered, to say "gone" instead of "not found"."""
Owner = tuple[str, str]
Produce = Callable[[Question, EventLog], Awaitable[None]]


def owner_of(principal: Principal) -> Owner:
    return principal.tenant, principal.user


@dataclass(slots=True)
class Kept:
    """An answer that can be read."""

    question: Question
    fingerprint: bytes
    events: EventLog
    task: "asyncio.Task[None]"
    alarm: asyncio.TimerHandle | None = None
    """While it runs: stops it when nobody reads. Afterwards: forgets it."""
    counted: int = 0
    """Events it was counted with when it ended."""

    @property
    def owner(self) -> Owner:
        return owner_of(self.question.principal)


class Registry:
    """Begins, finds, stops and forgets answers. Used from one event loop."""

    def __init__(
        self,
        produce: Produce,
        *,
        answers_max: int,
        kept_max: int,
        kept_s: float,
        detach_grace_s: float,
        ended_events_max: int = ENDED_EVENTS_MAX,
    ) -> None:
        self._produce = produce
        self._answers_max, self._kept_max, self._kept_s, self._detach_grace_s = answers_max, kept_max, kept_s, detach_grace_s
        self._running: dict[str, Kept] = {}
        self._ended: OrderedDict[str, Kept] = OrderedDict()
        self._gone: OrderedDict[str, Owner] = OrderedDict()
        self._by_key: dict[tuple[Owner, str], Kept] = {}
        self._draining = False
        self._ended_events, self._ended_events_max = 0, ended_events_max

    @property
    def running(self) -> int:
        return len(self._running)

    def begin(self, question: Question, fingerprint: bytes) -> Kept:
        """Start to answer, or return the answer that the same idempotency key began.

        Raises IdempotencyConflict if that had another body, Overloaded if too many answers run or the process is about to stop.
        """
        key = (owner_of(question.principal), question.idempotency_key)
        if question.idempotency_key and (known := self._by_key.get(key)) is not None:
            if known.fingerprint != fingerprint:
                raise IdempotencyConflict("this idempotency key came with another body", key=question.idempotency_key)
            return known
        if self._draining or len(self._running) >= self._answers_max:
            raise Overloaded("too many answers are being made", retry_after_ms=1000)
        events = EventLog(question.answer_id)
        task = asyncio.create_task(self._run(question, events), name=f"answer {question.answer_id}")
        kept = Kept(question, fingerprint, events, task)
        self._running[question.answer_id] = kept
        if question.idempotency_key:
            self._by_key[key] = kept
        task.add_done_callback(lambda _: self._has_ended(kept))
        return kept

    def find(self, principal: Principal, answer_id: str) -> Kept:
        """Return the principal's own answer. Raises NotFound for a foreign or unknown one, AnswerLogGone for a forgotten one."""
        kept = self._running.get(answer_id) or self._ended.get(answer_id)
        if kept is not None and kept.owner == owner_of(principal):
            return kept
        if kept is None and self._gone.get(answer_id) == owner_of(principal):
            raise AnswerLogGone("the events of this answer are no longer kept", answer_id=answer_id)
        raise NotFound("there is no such answer", kind="answer")

    def cancel(self, principal: Principal, answer_id: str) -> bool:
        """Stop an answer at once; return whether it was still running."""
        kept = self.find(principal, answer_id)
        if kept.task.done() or kept.events.ended:
            return False
        kept.task.cancel()
        return True

    @contextlib.asynccontextmanager
    async def reading(self, kept: Kept, after: int) -> AsyncIterator[Reader]:
        """Read an answer's log. When its last reader has left, the answer has the grace time to live, or none if nobody could come back."""
        reader = kept.events.reader(after)
        if kept.question.answer_id in self._running and kept.alarm is not None:
            kept.alarm.cancel()
            kept.alarm = None
        try:
            yield reader
        finally:
            kept.events.leave(reader)
            if kept.events.readers == 0 and not kept.task.done() and not kept.events.ended:
                if kept.question.cancel_on_disconnect:
                    kept.task.cancel()
                else:
                    kept.alarm = asyncio.get_running_loop().call_later(self._detach_grace_s, kept.task.cancel)

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, let what runs end within `timeout_s`, stop the rest; return how many had to be stopped."""
        self._draining = True
        tasks = {kept.task for kept in self._running.values()}
        if not tasks:
            return 0
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    async def _run(self, question: Question, events: EventLog) -> None:
        try:
            await self._produce(question, events)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # `produce` reports everything in the log; what comes out of it is a bug in itself
            log.exception("producer_failed", answer_id=question.answer_id, error=type(error).__name__)
            if not events.ended:
                events.end(Internal(""))

    def _has_ended(self, kept: Kept) -> None:
        answer_id = kept.question.answer_id
        del self._running[answer_id]
        if len(kept.events) == 0 and not kept.events.ended:  # stopped before its first step: nothing was used, nothing is booked
            kept.events.end(AnswerCancelled("the answer was stopped", answer_id=answer_id))
        if kept.alarm is not None:
            kept.alarm.cancel()
        self._ended[answer_id] = kept
        kept.alarm = asyncio.get_running_loop().call_later(self._kept_s, self._forget, answer_id)
        kept.counted = len(kept.events)
        self._ended_events += kept.counted
        while len(self._ended) > self._kept_max or (self._ended_events > self._ended_events_max and len(self._ended) > 1):
            self._forget(next(iter(self._ended)))

    def _forget(self, answer_id: str) -> None:
        kept = self._ended.pop(answer_id, None)
        if kept is None:
            return
        if kept.alarm is not None:
            kept.alarm.cancel()
        self._ended_events -= kept.counted
        self._by_key.pop((kept.owner, kept.question.idempotency_key), None)
        self._gone[answer_id] = kept.owner
        while len(self._gone) > GONE_IDS_MAX:
            self._gone.popitem(last=False)
