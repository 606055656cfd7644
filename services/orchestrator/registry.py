"""The answers of this process, and the way to those of the others: who may begin, read and stop an answer, and when it goes.

The registry owns the tasks that produce; a call only reads. So a disconnect is not a cancel, and every answer ends exactly once.
What another replica makes is read through a mirror and stopped by asking that replica.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog

from services.chassis.errors import (
    AnswerAbandoned,
    AnswerCancelled,
    AnswerInterrupted,
    AnswerLogGone,
    DomainError,
    IdempotencyConflict,
    Internal,
    NotFound,
    Overloaded,
    Unavailable,
)
from services.chassis.principal import Principal
from services.orchestrator.domain import BookedAnswer, Claim, Question, SharedAnswer
from services.orchestrator.log import EventLog, Reader
from services.orchestrator.mirrors import Mirrors, interrupted
from services.orchestrator.ports import SharedLogs
from services.orchestrator.publisher import Publisher
from services.orchestrator.retelling import retold

log = structlog.get_logger(__name__)

ENDED_EVENTS_MAX = 250_000
"""Events of all ended answers together, about 60 MB: a busy hour of long answers must not fill the memory."""
ENDED_BYTES_MAX = 64 * 1024 * 1024
"""Of their words and passages: twice what the answers that are kept usually have, or sixteen of the longest there can be."""
PICTURE_BYTES_MAX = 256 * 1024 * 1024
"""Of the questions of all running answers."""
BATCH_SHARE = 0.8
"""Of all answers, how many there may be for one more that nobody waits for."""
FOLLOWED_ELSEWHERE_S = 5.0
"""How often an answer without readers here is looked after that is read at another replica."""
RENEW_S = 2.0
"""How often this replica says that it is alive."""
RENEW_AGAIN_S = 0.2
YOUNG_S, YOUNG_PAUSE_S = 0.5, 0.02
"""How long an answer may be under way before every replica knows of it."""
LISTEN_AGAIN_S = 0.5
CANCEL_WAIT_S, CANCEL_PAUSE_S = 1.0, 0.02
"""How long a cancel waits until the answer has stopped. It is asked for anyway."""
STOP_TURNS = 4
"""Turns of the event loop before a stop: in them, what the provider has sent and bills is read, wakes its reader and is counted. A loop
that lags has tens of milliseconds of it in its sockets."""
Owner = tuple[str, str]
Produce = Callable[[Question, EventLog], Awaitable[None]]
Knows = Callable[[Principal, str], Awaitable[bool]]
Booked = Callable[[Principal, str], Awaitable[BookedAnswer | None]]
Followed = Callable[[str], Awaitable[bool]]


def owner_of(principal: Principal) -> Owner:
    return principal.tenant, principal.user


@dataclass(slots=True)
class Kept:
    """An answer of this process."""

    question: Question
    fingerprint: bytes
    events: EventLog
    task: "asyncio.Task[None]"
    alarm: asyncio.TimerHandle | None = None
    """While it runs: looks whether anybody reads it. Afterwards: forgets it."""
    counted: tuple[int, int] = (0, 0)
    """Events and bytes it was counted with when it ended: its last words may still come."""

    @property
    def owner(self) -> Owner:
        return owner_of(self.question.principal)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An answer of another replica, or one that only the store still has."""

    answer_id: str
    known: SharedAnswer


@dataclass(frozen=True, slots=True)
class Retold:
    """An answer whose events are gone, told again from the books, or what it failed of as long as they do not have it."""

    events: EventLog


Found = Kept | Elsewhere | Retold


@dataclass(frozen=True, slots=True)
class Bounds:
    """See the settings of the same names."""

    answers_max: int
    answers_per_user_max: int
    kept_max: int
    kept_s: float
    detach_grace_s: float
    ended_events_max: int = ENDED_EVENTS_MAX
    ended_bytes_max: int = ENDED_BYTES_MAX


class Registry:
    """Begins, finds, stops and forgets answers. Used from one event loop."""

    def __init__(
        self,
        produce: Produce,
        logs: SharedLogs,
        publisher: Publisher,
        mirrors: Mirrors,
        knows: Knows,
        booked: Booked,
        replica: str,
        bounds: Bounds,
        followed: Followed,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`followed` says of an answer of this process whether other answers are told what it is told."""
        self._now, self._followed = now, followed
        self._produce, self._logs, self._publisher, self._mirrors = produce, logs, publisher, mirrors
        self._knows, self._booked = knows, booked
        self._replica, self._bounds = replica, bounds
        self._running: dict[str, Kept] = {}
        self._ended: OrderedDict[str, Kept] = OrderedDict()
        self._admitted = 0
        """Answers that run, and those that are about to begin."""
        self._by_user: Counter[Owner] = Counter()
        """The same by their users."""
        self._beginnings: set[asyncio.Task[Found]] = set()
        """Answers whose key is being claimed."""
        self._draining = False
        self._ended_events = self._ended_bytes = 0
        self._picture_bytes = 0
        """Of their questions."""
        self._asides: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    async def begin(self, question: Question, fingerprint: bytes) -> Found:
        """Start to answer, or return the answer that the same idempotency key began, wherever.

        Raises IdempotencyConflict if that had another body, Overloaded if too many answers run or the process is about to stop,
        Unavailable if there is a key and nobody can say what it stands for.

        Cancellation: what the key stands for by then is begun all the same, and has the grace time to find its reader.
        """
        self._admit(question)
        if not question.idempotency_key:
            return self._start(question, fingerprint, registered=False)
        beginning = asyncio.create_task(self._begin_by_key(question, fingerprint), name=f"begin {question.answer_id}")
        self._beginnings.add(beginning)
        beginning.add_done_callback(self._beginnings.discard)
        return await asyncio.shield(beginning)

    async def begun_before(self, principal: Principal, key: str, fingerprint: bytes, *, is_json: bool, uses_tools: bool) -> Found | None:
        """What `key` stands for already; None if for nothing, or for something that another try may heal.

        For a request that is no good any more to begin an answer. Raises IdempotencyConflict, AnswerLogGone, Unavailable.
        """
        earlier = await self._logs.claimed(owner_of(principal), key)
        if earlier is None:
            return None
        if earlier.fingerprint != fingerprint:
            raise IdempotencyConflict("this idempotency key came with another body", key=key)
        try:
            found = await self._find_or_retell(principal, earlier.answer_id, is_json=is_json, uses_tools=uses_tools)
        except NotFound:
            return None
        return None if await self._may_run_again(found) else found

    async def _begin_by_key(self, question: Question, fingerprint: bytes) -> Found:
        try:
            # Known to all before the key stands for it: whoever finds the key finds the answer.
            await self._logs.register(question.answer_id, owner_of(question.principal), self._replica)
            if (found := await self._claim(question, fingerprint)) is not None:
                return found
            kept = self._start(question, fingerprint, registered=True)
            self._look_later(kept, self._bounds.detach_grace_s)  # who asked may have left by now
            return kept
        finally:
            if question.answer_id not in self._running:
                self._give_place_back(question)

    async def _claim(self, question: Question, fingerprint: bytes) -> Found | None:
        """What the key stands for; None if that is this question's own answer now."""
        owner, key, claim = owner_of(question.principal), question.idempotency_key, Claim(question.answer_id, fingerprint)
        with self._given_up_unless_told(question, fingerprint):
            earlier = await self._logs.claim(owner, key, claim)
        if earlier is None:
            return None
        if earlier.fingerprint != fingerprint:
            raise IdempotencyConflict("this idempotency key came with another body", key=key)
        try:
            asked = question
            found = await self._find_or_retell(
                asked.principal, earlier.answer_id, is_json=asked.output_schema is not None, uses_tools=asked.uses_tools
            )
            if not await self._may_run_again(found):
                return found
        except NotFound:  # its replica died between the claim and the first step: it never was, and nothing was booked
            log.warning("key_without_answer", answer_id=earlier.answer_id)
        with self._given_up_unless_told(question, fingerprint):
            if await self._logs.claim_again(owner, key, earlier, claim):
                return None
        raise Overloaded("the same request is just beginning again", retry_after_ms=500)

    async def _find_or_retell(self, principal: Principal, answer_id: str, *, is_json: bool, uses_tools: bool) -> Found:
        """As `find`; an answer whose log is gone is told again, as far as the books have it."""
        try:
            return await self.find(principal, answer_id)
        except AnswerLogGone:
            known = await self._logs.look_up(answer_id)
            if known is not None and known.left_at is not None:
                return _ended(answer_id, _cancelled(answer_id))
            booked = await self._booked(principal, answer_id)
            if booked is not None:  # a long text has many sentences to judge
                return Retold(await asyncio.to_thread(retold, booked, is_json=is_json, uses_tools=uses_tools))
            if known is None:
                raise
            if known.failure is None:
                raise Unavailable("the answer was done and is not in the books yet", dependency="ledger", retry_after_ms=1000) from None
            return _ended(answer_id, known.failure)

    @contextlib.contextmanager
    def _given_up_unless_told(self, question: Question, fingerprint: bytes) -> Iterator[None]:
        """A store that fails here does not say whether the key stands for the answer now. So that ends before its first step, for every
        replica, as one that may be begun again.
        """
        try:
            yield
        except Unavailable:
            kept = self._start(question, fingerprint, registered=False)
            kept.events.stopping = AnswerInterrupted("the answer could not be begun; ask again", answer_id=question.answer_id)
            kept.task.cancel()
            raise

    def _admit(self, question: Question) -> None:
        """Give an answer its place, which it has until it ends, or does not begin. Raises Overloaded if there is none."""
        pictures, owner = _picture_bytes(question), owner_of(question.principal)
        most = self._bounds.answers_max if question.priority == "interactive" else int(self._bounds.answers_max * BATCH_SHARE)
        if self._draining:
            raise Overloaded("this replica is stopping", retry_after_ms=1000, draining="true")
        if self._admitted >= most:
            raise Overloaded("too many answers are being made", retry_after_ms=1000)
        if self._by_user[owner] >= self._bounds.answers_per_user_max:
            raise Overloaded("too many answers are being made for this user", retry_after_ms=1000)
        if pictures and self._picture_bytes + pictures > PICTURE_BYTES_MAX:
            raise Overloaded("too many pictures are being looked at", retry_after_ms=1000)
        self._admitted += 1
        self._by_user[owner] += 1
        self._picture_bytes += pictures

    def _give_place_back(self, question: Question) -> None:
        owner = owner_of(question.principal)
        self._admitted -= 1
        self._by_user[owner] -= 1
        if self._by_user[owner] <= 0:
            del self._by_user[owner]
        self._picture_bytes -= _picture_bytes(question)

    def _start(self, question: Question, fingerprint: bytes, *, registered: bool) -> Kept:
        events = EventLog(question.answer_id)
        task = asyncio.create_task(self._run(question, events), name=f"answer {question.answer_id}")
        kept = self._running[question.answer_id] = Kept(question, fingerprint, events, task)

        def stop(fenced: bool) -> None:
            if fenced:
                _stop(kept, interrupted(question.answer_id))
            else:
                self._aside(self._stop_for_owner(kept))

        events.on_deserted = lambda: self._is_deserted(kept)
        self._publisher.publish(events, kept.owner, stop, registered=registered, keyed=bool(question.idempotency_key))
        task.add_done_callback(lambda _: self._has_ended(kept))
        return kept

    async def _may_run_again(self, found: Found) -> bool:
        """Whether an answer failed in a way that another try may heal, or its replica is gone. What was cancelled or refused stays so."""
        if (found.known.left_at if isinstance(found, Elsewhere) else found.events.left_at) is not None:
            return False
        if isinstance(found, Kept | Retold):
            failure = found.events.failure
        elif found.known.ended:
            failure = found.known.failure
        elif await self._logs.is_alive(found.known.replica):
            return False
        else:
            failure = interrupted(found.answer_id)
            await self._logs.interrupt(found.answer_id, found.known.replica, failure)
        return failure is not None and failure.retryable

    async def find(self, principal: Principal, answer_id: str) -> Kept | Elsewhere:
        """The principal's own answer, of whatever replica. Raises NotFound for a foreign or unknown one, AnswerLogGone if its log is gone.

        Foreign and unknown take the same way, so that they also take the same time.
        """
        owner = owner_of(principal)
        kept = self._running.get(answer_id) or self._ended.get(answer_id)
        if kept is not None and kept.owner == owner:
            return kept
        known = await self._logs.look_up(answer_id)
        while (known is None or known.owner != owner) and 0 <= self._now() - _begun_at(answer_id) < YOUNG_S:
            await asyncio.sleep(YOUNG_PAUSE_S)  # its replica may only just be making it known
            known = await self._logs.look_up(answer_id)
        if known is not None and known.owner == owner and not known.events_gone:
            return Elsewhere(answer_id, known)
        if (known is not None and known.owner == owner) or await self._knows(principal, answer_id):
            raise AnswerLogGone("the events of this answer are no longer kept", answer_id=answer_id)
        raise NotFound("there is no such answer", kind="answer")

    async def forget(self, tenant: str, user: str) -> int:
        """Forget the answers of a user who was erased: what replicas share of them, and what is kept here of those that have ended. Return
        how many were shared. The memory of other replicas has its own time.
        """
        for answer_id in [one for one, kept in self._ended.items() if kept.owner == (tenant, user)]:
            self._forget(answer_id)
        return await self._logs.forget((tenant, user))

    async def cancel(self, principal: Principal, answer_id: str) -> bool:
        """Stop an answer at once, wherever it is made; return whether it was still running. Raises as `find`."""
        found = await self.find(principal, answer_id)
        if isinstance(found, Kept):
            was_running = await self._stop_for_owner(found)
            if found.events.left_at is None:
                await asyncio.wait([found.task], timeout=CANCEL_WAIT_S)  # whoever is told that it was stopped gets no more of it
            return was_running
        if found.known.ended or found.known.left_at is not None:
            return False
        if not await self._logs.ask_to_cancel(answer_id, found.known.replica):
            await self._logs.interrupt(answer_id, found.known.replica, interrupted(answer_id))
            return False
        ends_at = time.monotonic() + CANCEL_WAIT_S
        while time.monotonic() < ends_at:
            await asyncio.sleep(CANCEL_PAUSE_S)
            known = await self._logs.look_up(answer_id)
            if known is None or known.ended or known.left_at is not None:
                break
        return True

    @contextlib.asynccontextmanager
    async def reading(self, found: Found, after: int) -> AsyncIterator[tuple[EventLog, Reader]]:
        """Read an answer's log. When its last reader has left, the answer has the grace time to live, or none if nobody could come back."""
        if isinstance(found, Elsewhere):
            async with self._mirrors.reading(found.answer_id, found.known, after) as mirrored:
                yield mirrored
            return
        if isinstance(found, Retold):
            yield found.events, found.events.reader(after)
            return
        kept, reader = found, found.events.reader(after)
        if kept.events.left_at is None and kept.question.answer_id in self._running and kept.alarm is not None:
            kept.alarm.cancel()
            kept.alarm = None
        try:
            yield kept.events, reader
        finally:
            kept.events.leave(reader)

    async def _stop_for_owner(self, kept: Kept) -> bool:
        """Stop an answer; one that others follow ends for its owner alone, and for them it goes on. Return whether it was running."""
        if kept.events.left_at is not None or kept.task.done() or kept.events.ended:
            return False
        if not await self._followed(kept.question.answer_id):
            return _stop(kept, None)
        if kept.task.done() or kept.events.ended:
            return False
        kept.events.leave_at(len(kept.events))
        return True

    def _is_deserted(self, kept: Kept) -> None:
        """Nobody reads the answer here any more."""
        if kept.task.done() or kept.alarm is not None:
            return
        on_disconnect = kept.question.cancel_on_disconnect and not kept.question.idempotency_key  # with a key one can come back
        if on_disconnect or kept.events.left_at is not None:
            self._look(kept)
        else:
            self._look_later(kept, self._bounds.detach_grace_s)

    def interrupt_all(self) -> None:
        """End every answer that still runs as interrupted. For a process that must go."""
        for kept in list(self._running.values()):
            _stop(kept, AnswerInterrupted("the replica that made this answer is stopping; ask again", answer_id=kept.question.answer_id))

    def refuse_new(self) -> None:
        self._draining = True

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, let what runs end within `timeout_s`, interrupt the rest and wait until they are booked; return how many.

        What was interrupted is told so and booked: nothing of it is lost but the rest of its text.
        """
        self.refuse_new()
        ends_at = time.monotonic() + timeout_s
        if self._beginnings:
            await asyncio.wait(set(self._beginnings), timeout=timeout_s)
        tasks = {kept.task for kept in self._running.values()}
        if not tasks:
            return 0
        _, late = await asyncio.wait(tasks, timeout=max(0.0, ends_at - time.monotonic()))
        self.interrupt_all()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)

    async def live_forever(self) -> None:
        """Say again and again that this replica is alive, and stop what its listener has not heard of, until cancelled.

        A line that is dead without a word tells no wish, and an answer that says nothing for a while hears none from its publisher.
        """
        while True:
            try:
                await self._logs.renew(self._replica)
                for answer_id in await self._logs.asked_to_cancel(tuple(self._running)):
                    self._stop_as_asked(answer_id)
                await asyncio.sleep(RENEW_S)
            except Unavailable:
                await asyncio.sleep(RENEW_AGAIN_S)

    async def listen_forever(self) -> None:
        """Stop what others ask us to stop, until cancelled. What is missed here, the publisher hears from the logs, or `live_forever`."""
        while True:
            try:
                async for answer_id in self._logs.cancels(self._replica):
                    self._stop_as_asked(answer_id)
            except Unavailable:
                pass
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _stop_as_asked(self, answer_id: str) -> None:
        if (kept := self._running.get(answer_id)) is not None:
            self._aside(self._stop_for_owner(kept))

    def _look_later(self, kept: Kept, after_s: float) -> None:
        kept.alarm = asyncio.get_running_loop().call_later(after_s, self._look, kept)

    def _look(self, kept: Kept) -> None:
        """Nobody has read the answer here for a while. Is it read anywhere?"""
        kept.alarm = None
        self._aside(self._stop_unless_followed(kept))

    def _aside(self, work: Coroutine[Any, Any, Any]) -> None:
        aside = asyncio.create_task(work)
        self._asides.add(aside)
        aside.add_done_callback(self._asides.discard)

    async def _stop_unless_followed(self, kept: Kept) -> None:
        try:
            followed = await self._logs.is_followed(kept.question.answer_id)
        except Unavailable:
            followed = False  # nobody can read it elsewhere either
        if kept.task.done() or kept.events.ended or kept.events.readers or kept.alarm is not None:
            return
        if followed:
            self._look_later(kept, FOLLOWED_ELSEWHERE_S)
        elif kept.question.idempotency_key:
            _stop(kept, AnswerAbandoned("nobody was reading the answer any more; ask again", answer_id=kept.question.answer_id))
        else:
            _stop(kept, None)

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
        with contextlib.suppress(asyncio.CancelledError):
            kept.task.exception()  # asked for, it leaves the task: it holds all frames of the answer, and they hold the task
        answer_id = kept.question.answer_id
        del self._running[answer_id]
        self._give_place_back(kept.question)
        if len(kept.events) == 0 and not kept.events.ended:  # stopped before its first step: nothing was used, nothing is booked
            kept.events.end(kept.events.stopping or _cancelled(answer_id))
        if kept.alarm is not None:
            kept.alarm.cancel()
        kept.events.on_deserted = None
        # Whoever reads it again needs its events; what it was made from may be a thousand times as large.
        kept.question = replace(kept.question, images=(), tools=(), tool_results=(), resumed=None)
        self._ended[answer_id] = kept
        kept.alarm = asyncio.get_running_loop().call_later(self._bounds.kept_s, self._forget, answer_id)
        kept.counted = len(kept.events), kept.events.bytes
        self._ended_events += kept.counted[0]
        self._ended_bytes += kept.counted[1]
        while len(self._ended) > self._bounds.kept_max or (self._is_full and len(self._ended) > 1):
            self._forget(next(iter(self._ended)))

    @property
    def _is_full(self) -> bool:
        return self._ended_events > self._bounds.ended_events_max or self._ended_bytes > self._bounds.ended_bytes_max

    def _forget(self, answer_id: str) -> None:
        kept = self._ended.pop(answer_id, None)
        if kept is None:
            return
        if kept.alarm is not None:
            kept.alarm.cancel()
        self._ended_events -= kept.counted[0]
        self._ended_bytes -= kept.counted[1]


def _cancelled(answer_id: str) -> AnswerCancelled:
    return AnswerCancelled("the answer was stopped", answer_id=answer_id)


def _ended(answer_id: str, failure: DomainError) -> Retold:
    events = EventLog(answer_id)
    events.end(failure)
    return Retold(events)


def _picture_bytes(question: Question) -> int:
    return sum(len(image.data) for image in question.images)


def _begun_at(answer_id: str) -> float:
    """When an answer of this id began, seconds since 1970, by the clock of its replica: see `rpc.new_answer_id`. 0 for any other id."""
    try:
        parsed = UUID(answer_id)
    except ValueError:
        return 0.0
    return (parsed.int >> 80) / 1000 if parsed.version == 7 else 0.0


def _stop(kept: Kept, failure: DomainError | None) -> bool:
    """Stop an answer, which then ends in `failure`, or as cancelled by its owner. Return whether it was still running."""
    if kept.task.done() or kept.events.ended:
        return False
    kept.events.stopping = kept.events.stopping or failure
    _cancel_soon(kept.task, STOP_TURNS)
    return True


def _cancel_soon(task: "asyncio.Task[None]", turns: int) -> None:
    """Cancel `task` so many turns of the event loop from now."""
    if turns > 0:
        asyncio.get_running_loop().call_soon(_cancel_soon, task, turns - 1)
    else:
        task.cancel()
