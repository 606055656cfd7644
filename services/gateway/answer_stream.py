"""The events of one answer as one stream, although the replica of the orchestrator they come from may go away. It renders nothing.

An answer's log can be read at any replica, so a lost connection is no lost answer: the stream goes on at another replica after the last
event that came. An answer whose own replica is gone ends there, as interrupted.
"""

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from services.chassis.deadline import Deadline
from services.chassis.errors import AnswerInterrupted, AnswerLogGone, DomainError, NotFound, Overloaded, Unavailable
from services.gateway import deadlines
from services.gateway.clients import Orchestrator
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

HEAL_S = 20.0
"""How long another replica is looked for. Longer than a replica's lease, after which its answers end as interrupted."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 1.0
BEGIN_TRIES_MAX = 3
"""How many replicas may refuse a new answer because they are stopping."""


class AnswerStream:
    """AnswerEvents of an Answer or ResumeAnswer call. Use as a context manager; leaving it cancels what is left of the call."""

    def __init__(self, peer: Orchestrator, request: Any, *, timeout_s: float, heal_s: float = HEAL_S) -> None:
        self._peer, self._request, self._ends_at, self._heal_s = peer, request, time.monotonic() + timeout_s, heal_s
        self._begins = isinstance(request, orchestrator.AnswerRequest)
        given = self._begins and request.HasField("deadline_ms")
        self._deadline = Deadline.after(request.deadline_ms / 1000) if given else None
        """Of an answer that is begun."""
        self._answer_id = "" if self._begins else request.answer_id
        self._last = 0 if self._begins else request.after_sequence
        self._came = False
        """Whether anything came on any call."""
        self._tries = 0
        self._lost_at: float | None = None
        self._call = AsyncExitStack()
        self._messages: Any = None
        self._more: deque[orchestrator.AnswerEvent] = deque()
        """Events that came together with an earlier one."""
        request.batches = True

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._call.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> orchestrator.AnswerEvent:
        """The next event. Raises what the answer ended in, and AnswerInterrupted if no replica knows of it any more."""
        if (event := self.at_hand()) is None:
            event = await self._message()
            if event.more:
                self._more.extend(event.more)
                event.ClearField("more")
            self._answer_id, self._last = event.answer_id, event.sequence
        return event

    def at_hand(self) -> orchestrator.AnswerEvent | None:
        """The next event if it came together with the one before it; None if it must be waited for."""
        if not self._more:
            return None
        event = self._more.popleft()
        self._last = event.sequence
        return event

    async def _message(self) -> orchestrator.AnswerEvent:
        while True:
            try:
                message = await self._messages.__anext__()
            except DomainError as error:
                await self._heal(error)
                continue
            self._came, self._lost_at = True, None
            return message  # type: ignore[no-any-return]

    async def _heal(self, error: DomainError) -> None:
        """Go on at another replica, or raise what stands for `error`."""
        if not self._came and self._begins:
            return await self._begin_elsewhere(error)
        if self._lost_at is not None and isinstance(error, NotFound | AnswerLogGone):
            raise AnswerInterrupted("the replica that made this answer is gone; ask again", answer_id=self._answer_id) from error
        if not self._is_lost(error):
            raise error
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at, self._tries = now, 0
        elif now - self._lost_at > self._heal_s or now > self._ends_at:
            raise AnswerInterrupted("no replica can be reached; resume the answer", answer_id=self._answer_id) from error
        await asyncio.sleep(min(PAUSE_MAX_S, PAUSE_MIN_S * 2**self._tries))
        self._tries += 1
        self._request = orchestrator.ResumeAnswerRequest(answer_id=self._answer_id, after_sequence=self._last, batches=True)
        self._begins = False
        await self._open()
        return None

    async def _begin_elsewhere(self, error: DomainError) -> None:
        """Ask again, if it is certain that this cannot begin a second answer: we were refused, or a key says that it is the same one."""
        refused = isinstance(error, Overloaded) and "draining" in error.metadata
        keyed = self._request.idempotency_key and self._is_lost(error)
        self._tries += 1
        if not (refused or keyed) or self._tries >= BEGIN_TRIES_MAX:
            if self._is_lost(error) and not isinstance(error, Unavailable):  # nobody has stopped this answer
                raise Unavailable("the replica ended before the answer had begun", dependency=self._peer.name) from error
            raise error
        if keyed:
            await asyncio.sleep(PAUSE_MIN_S * 2**self._tries)
        if self._deadline is not None:
            self._request.deadline_ms = deadlines.passed_on_ms(self._deadline)
        await self._open()

    def _is_lost(self, error: DomainError) -> bool:
        """Whether the call failed and not the answer. A server that ends cuts its calls as cancelled."""
        if isinstance(error, Unavailable):
            return error.metadata.get("dependency") == self._peer.name
        return not error.reason and error.code == "CANCELLED"

    async def _open(self) -> None:
        await self._call.aclose()
        method = self._peer.stub.Answer if self._begins else self._peer.stub.ResumeAnswer
        left_s = max(0.1, self._ends_at - time.monotonic())
        self._messages = await self._call.enter_async_context(self._peer.stream(method, self._request, timeout_s=left_s))
