"""One gRPC stream to one stream of server-sent events: flush, heartbeat, back-pressure, disconnect. It knows no service and no format.

A reader takes messages as they come; the writer renders everything that is there and sends it as one piece, so the first event leaves
alone and at once, and what arrives while a write is under way leaves together. Nothing waits for a timer. The reader stops when
the writer is too far behind, and the stream behind it with it.

Terminal law: what was started ends with exactly one terminal event of the source's own, or exactly one `event: error`, or, if its
owner stopped it, exactly one `event: cancelled`.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from services.chassis.errors import AnswerCancelled, AnswerInterrupted, DomainError, Unavailable
from services.chassis.status import unexpected
from services.gateway import problems, sse
from services.gateway.exchange import ClientLeft, Exchange

log = structlog.get_logger(__name__)

MESSAGES_MAX = 64
"""How far the reader may run ahead of the writer."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a stream is."""

    heartbeat_s: float
    write_stall_s: float


class _Inbox(Generic[M]):
    """Messages between reader and writer."""

    def __init__(self) -> None:
        self.messages: deque[M] = deque()
        self.ended = False
        self.error: BaseException | None = None
        self._wake: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def fill(self, source: AsyncIterator[M]) -> None:
        """Take messages until the source ends. Never raises but for cancellation: its error is the writer's to report."""
        try:
            async for message in source:
                self.messages.append(message)
                self.wake()
                if len(self.messages) >= MESSAGES_MAX:
                    self._room = self._loop.create_future()
                    await self._room
        except Exception as error:
            self.error = error
        finally:
            self.ended = True
            self.wake()

    def wake(self) -> None:
        """Let the writer look."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def wait(self) -> None:
        """Return when `wake` was called."""
        self._wake = self._loop.create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    def take(self) -> list[M]:
        """Everything that is there."""
        taken = list(self.messages)
        self.messages.clear()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return taken


class Bridge(Generic[M]):
    """Carries `source` to the client of `exchange`."""

    def __init__(
        self,
        exchange: Exchange,
        render: Callable[[M], bytes],
        is_last: Callable[[M], bool],
        timing: Timing,
        draining: asyncio.Event,
        *,
        lasting: bool = False,
    ) -> None:
        """`render` makes a block of a message (or nothing), `is_last` tells the terminal one. A `lasting` stream has no end of its own:
        it is ended when the process drains."""
        self._exchange = exchange
        self._render = render
        self._is_last = is_last
        self._timing = timing
        self._draining = draining
        self._lasting = lasting
        self._started = False
        self._left = False
        self._written_at = time.monotonic()
        self._writing_since = 0.0
        """When the write under way began; 0 while there is none."""
        self._writer: asyncio.Task[object] | None = None
        self.end = "cancelled"
        """How it ended: `done`, `error`, `empty`, `left`, `cancelled`."""

    async def run(self, source: AsyncIterator[M]) -> bool:
        """Carry the stream to its end. Return False if the source ended well without a single message, in which case nothing was sent.

        Raises the source's error if nothing was sent yet, and ClientLeft when the client goes; the source's call is the caller's to close.
        """
        inbox: _Inbox[M] = _Inbox()
        tasks = [
            asyncio.create_task(inbox.fill(source), name="bridge-reader"),
            asyncio.create_task(self._watch(inbox), name="bridge-watch"),
        ]
        if self._lasting:
            tasks.append(asyncio.create_task(self._end_on_drain(inbox), name="bridge-drain"))
        self._writer = asyncio.current_task()
        self._tick_handle = asyncio.get_running_loop().call_later(self._tick_s, self._tick, inbox)
        try:
            return await self._write_all(inbox)
        except asyncio.CancelledError:
            if self._left and self._writer is not None and self._writer.cancelling() == 1:
                self._writer.uncancel()
                self.end = "left"
                raise ClientLeft from None
            # But for that, only the process's own end cancels a request; its client is told to come back.
            if self._started and not self._left:
                with contextlib.suppress(Exception):
                    await self._exchange.write(self._error_block(AnswerInterrupted("the server is stopping; resume the stream")), last=True)
            raise
        finally:
            self._tick_handle.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write_all(self, inbox: _Inbox[M]) -> bool:
        exchange = self._exchange
        while True:
            if self._left:
                self.end = "left"
                raise ClientLeft
            batch = inbox.take()
            if batch:
                last = self._is_last(batch[-1])
                await self._write(b"".join([self._render(message) for message in batch]), last=last)
                if last:
                    self.end = "done"
                    return True
                continue
            if inbox.ended:
                break
            if time.monotonic() - self._written_at >= self._timing.heartbeat_s:
                await self._write(sse.HEARTBEAT, last=False)
            await inbox.wait()
        error = self._error_of(inbox.error)
        if not self._started:
            if error is None:
                self.end = "empty"
                return False
            self.end = "error"
            raise error
        self.end = "error"
        await self._write(self._error_block(error or AnswerInterrupted("the stream ended before it was done")), last=True)
        log.info("stream_failed", reason=(error or AnswerInterrupted()).reason, request_id=exchange.request_id)
        return True

    async def _write(self, body: bytes, *, last: bool) -> None:
        """Send `body`, if there is any. `_tick` watches how long that takes."""
        if not body and not last:
            return
        self._writing_since = time.monotonic()
        if not self._started:
            self._started = True
            await self._exchange.start(200, STREAM_HEADERS)
        await self._exchange.write(body, last=last)
        self._writing_since = 0.0
        self._written_at = time.monotonic()

    async def _watch(self, inbox: _Inbox[M]) -> None:
        await self._exchange.until_client_leaves()
        self._left = True
        inbox.wake()

    async def _end_on_drain(self, inbox: _Inbox[M]) -> None:
        await self._draining.wait()
        inbox.error = Unavailable("the server is stopping; connect again", dependency="gateway")
        inbox.ended = True
        inbox.wake()

    @property
    def _tick_s(self) -> float:
        return min(self._timing.heartbeat_s, self._timing.write_stall_s)

    def _tick(self, inbox: _Inbox[M]) -> None:
        """Wake the writer when it was silent for too long, end it when its client takes nothing. One timer, and none a message."""
        now = time.monotonic()
        pause_s = self._tick_s
        if self._writing_since:
            if now - self._writing_since >= self._timing.write_stall_s and self._writer is not None and not self._left:
                self._left = True
                self._writer.cancel()
                return
        elif now - self._written_at >= self._timing.heartbeat_s:
            inbox.wake()
        else:
            pause_s = min(pause_s, self._timing.heartbeat_s - (now - self._written_at))
        self._tick_handle = asyncio.get_running_loop().call_later(pause_s, self._tick, inbox)

    def _error_of(self, error: BaseException | None) -> DomainError | None:
        if error is None or isinstance(error, DomainError):
            return error
        log.error("stream_failed_unexpectedly", error=type(error).__name__, exc_info=error)
        return unexpected(self._exchange.trace_id)

    def _error_block(self, error: DomainError) -> bytes:
        body = problems.body_of(error, trace_id=self._exchange.trace_id, request_id=self._exchange.request_id)
        return sse.block(body, event=b"cancelled" if isinstance(error, AnswerCancelled) else b"error")


def render_any(event: str, value: bytes, event_id: int | None = None, *, first: bool = False) -> bytes:
    """A block of JSON; the first of a stream also says when to come back."""
    return sse.block(value, event=event.encode(), event_id=event_id, retry_ms=sse.RETRY_MS if first else None)


Source = AsyncIterator[Any]
