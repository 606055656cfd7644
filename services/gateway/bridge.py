"""One gRPC stream to one stream of server-sent events: flush, heartbeat, back-pressure, disconnect. It knows no service and no format.

One task takes a message, renders it and writes it, then takes the next: nothing waits for a timer, nobody is woken in between, and nothing
is kept here. A write waits only while the client is too far behind to take it; then nothing is taken from the source either, and the
flow control of the stream behind it holds its sender. What came in one message leaves in one write.

Terminal law: what was started ends with exactly one terminal event of the source's own, or exactly one `event: error`, or, if its
owner stopped it, exactly one `event: cancelled`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import structlog

from services.chassis.errors import AnswerCancelled, AnswerInterrupted, DomainError, Unavailable
from services.chassis.status import unexpected
from services.gateway import problems, sse
from services.gateway.exchange import ClientLeft, Exchange

log = structlog.get_logger(__name__)

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
        at_hand: Callable[[], M | None] = lambda: None,
        lasting: bool = False,
    ) -> None:
        """`render` makes a block of a message (or nothing), `is_last` tells the terminal one. `at_hand` takes a message from the source
        that is there without waiting, of which it has few at a time. A `lasting` stream has no end of its own: it is ended when the
        process drains.
        """
        self._exchange = exchange
        self._render = render
        self._is_last = is_last
        self._at_hand = at_hand
        self._timing = timing
        self._draining = draining
        self._lasting = lasting
        self._started = False
        self._left = False
        self._stopped: DomainError | None = None
        """Why the stream is to end, if it is not by itself and not because the client left."""
        self._written_at = time.monotonic()
        self._writing_since = 0.0
        """When the write under way began; 0 while there is none."""
        self._beat: asyncio.Task[None] | None = None
        """A heartbeat that is being written, so that nothing else is meanwhile."""
        self._carrier: asyncio.Task[Any] | None = None
        """Who carries, while it may be interrupted."""
        self.end = "cancelled"
        """How it ended: `done`, `error`, `empty`, `left`, `cancelled`."""

    async def run(self, source: AsyncIterator[M]) -> bool:
        """Carry the stream to its end. Return False if the source ended well without a single message, in which case nothing was sent.

        Raises the source's error if nothing was sent yet, and ClientLeft when the client goes; the source's call is the caller's to close.
        """
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self._watch(), name="bridge-watch")]
        if self._lasting:
            tasks.append(asyncio.create_task(self._end_on_drain(), name="bridge-drain"))
        carrier = self._carrier = asyncio.current_task()
        assert carrier is not None
        self._tick_handle = asyncio.get_running_loop().call_later(self._tick_s, self._tick)
        try:
            return await self._carry(source)
        except asyncio.CancelledError:
            if (self._left or self._stopped is not None) and carrier.cancelling() == 1:
                carrier.uncancel()
                if self._left:
                    self._leave()
                return await self._finish(self._stopped)
            # But for that, only the process's own end cancels a request; its client is told to come back.
            if self._started and not self._left:
                with contextlib.suppress(Exception):
                    await self._exchange.write(self._error_block(AnswerInterrupted("the server is stopping; resume the stream")), last=True)
            raise
        finally:
            self._carrier = None
            self._tick_handle.cancel()
            if self._beat is not None:
                tasks.append(self._beat)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, source: AsyncIterator[M]) -> bool:
        messages = source.__aiter__()
        error: BaseException | None = None
        while self._stopped is None:
            try:
                message = await messages.__anext__()
            except StopAsyncIteration:
                break
            except Exception as failure:
                error = failure
                break
            body, last = self._render(message), self._is_last(message)
            while not last and (more := self._at_hand()) is not None:
                body, last = body + self._render(more), self._is_last(more)
            await self._write(body, last=last)
            if self._left:
                self._leave()
            if last:
                self.end = "done"
                return True
        return await self._finish(self._error_of(self._stopped or error))

    async def _finish(self, error: DomainError | None) -> bool:
        """End a stream that had no terminal message."""
        if not self._started:
            if error is None:
                self.end = "empty"
                return False
            self.end = "error"
            raise error
        self.end = "error"
        await self._write(self._error_block(error or AnswerInterrupted("the stream ended before it was done")), last=True)
        log.info("stream_failed", reason=(error or AnswerInterrupted()).reason, request_id=self._exchange.request_id)
        return True

    def _leave(self) -> NoReturn:
        self.end = "left"
        raise ClientLeft

    async def _write(self, body: bytes, *, last: bool) -> None:
        """Send `body`, if there is any."""
        if not body and not last:
            return
        if self._beat is not None:
            await self._beat
        await self._send(body, last=last)

    async def _send(self, body: bytes, *, last: bool) -> None:
        """`_tick` watches how long it takes."""
        self._writing_since = time.monotonic()
        if not self._started:
            self._started = True
            await self._exchange.start(200, STREAM_HEADERS)
        await self._exchange.write_watched(body, last=last)
        self._writing_since = 0.0
        self._written_at = time.monotonic()

    async def _send_beat(self) -> None:
        await self._send(sse.HEARTBEAT, last=False)
        self._beat = None

    async def _watch(self) -> None:
        await self._exchange.until_client_leaves()
        self._left = True
        self._interrupt()

    async def _end_on_drain(self) -> None:
        await self._draining.wait()
        self._stopped = Unavailable("the server is stopping; connect again", dependency="gateway")
        if not self._writing_since:  # a message that is being written is written to its end, and then the carrier sees
            self._interrupt()

    def _interrupt(self) -> None:
        """Wake the carrier from whatever it waits for."""
        if self._carrier is not None:
            self._carrier.cancel()

    @property
    def _tick_s(self) -> float:
        return min(self._timing.heartbeat_s, self._timing.write_stall_s)

    def _tick(self) -> None:
        """Send a heartbeat after too long a silence, end the stream when its client takes nothing. One timer, and none a message."""
        now = time.monotonic()
        pause_s = self._tick_s
        if self._writing_since:
            if now - self._writing_since >= self._timing.write_stall_s and not self._left:
                self._left = True
                self._interrupt()
                return
        elif now - self._written_at >= self._timing.heartbeat_s:
            if self._beat is None and not self._left:
                self._beat = asyncio.create_task(self._send_beat(), name="bridge-heartbeat")
        else:
            pause_s = min(pause_s, self._timing.heartbeat_s - (now - self._written_at))
        self._tick_handle = asyncio.get_running_loop().call_later(pause_s, self._tick)

    def _error_of(self, error: BaseException | None) -> DomainError | None:
        if error is None or isinstance(error, DomainError):
            return error
        log.error("stream_failed_unexpectedly", error=type(error).__name__, exc_info=error)
        return unexpected(self._exchange.trace_id)

    def _error_block(self, error: DomainError) -> bytes:
        body = problems.body_of(error, trace_id=self._exchange.trace_id, request_id=self._exchange.request_id)
        return sse.block(body, event=b"cancelled" if isinstance(error, AnswerCancelled) else b"error")
