"""A TCP proxy between a client and a gateway that cuts, stalls, throttles and resets, by one rule for each connection.

It knows of HTTP only where a request's head ends, so that a rule can be chosen by it, and of events only that a blank line ends one.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

READ_BYTES = 65_536
EVENT_END = b"\n\n"
CONNECTIONS_MAX = 4_096
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Rule:
    """What happens to one connection. The default lets everything through."""

    cut_after_bytes: int | None = None
    """End the connection after so many bytes of the response, head included."""
    cut_after_events: int | None = None
    """Or after so many events, and `cut_extra_bytes` beyond: 0 is exactly the boundary, more is in the middle of what follows."""
    cut_extra_bytes: int = 0
    reset: bool = False
    """End by RST instead of FIN."""
    stall_s: float = 0.0
    """Stay silent for so long where the cut is, before it."""
    bytes_per_s: float = 0.0
    """Pace of the response. 0 = as fast as it comes."""
    headers: tuple[tuple[str, str], ...] = ()
    """Added to the request: what a browser's EventSource cannot send."""


PASS = Rule()
Chooser = Callable[[int, bytes], Rule]
"""Rule of a connection, by its number from 0 and the head of its first request."""


class FaultyProxy:
    """Listens on a free port of the loopback while the block is open. One connection carries one request, and says so to the gateway:
    a second one on it would be under the first one's rule."""

    def __init__(self, target_port: int, choose: Chooser) -> None:
        self._target_port = target_port
        self._choose = choose
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server
        self.port = 0
        self.connections = 0
        self.cuts = 0
        """Connections that a rule has ended."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._carry(reader, writer), name="proxied connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                await self._serve(reader, writer)
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        rule = self._choose(self.connections, head)
        self.connections += 1
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self._target_port)
        to_upstream.write(_changed(head, rule.headers))
        up = asyncio.create_task(_forward(reader, to_upstream.write, to_upstream.drain))
        down = asyncio.create_task(self._down(upstream, writer, rule))
        try:
            # Whichever side leaves first takes the other with it, as a broken network does.
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            to_upstream.transport.abort()

    async def _down(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, rule: Rule) -> None:
        cutter = Cutter(rule)
        while data := await upstream.read(READ_BYTES):
            kept = cutter.keep(data)
            await _paced(writer, data[:kept], rule.bytes_per_s)
            if cutter.struck:
                self.cuts += 1
                await asyncio.sleep(rule.stall_s)
                if rule.reset:
                    _reset_on_close(writer)
                return


class Cutter:
    """Finds where a response is to be cut, however its bytes are split over reads."""

    def __init__(self, rule: Rule) -> None:
        self._left = rule.cut_after_bytes
        self._events_left = rule.cut_after_events
        self._extra = rule.cut_extra_bytes
        self._last = b""
        self.struck = False

    def keep(self, data: bytes) -> int:
        """How much of `data` still goes through. Sets `struck` when the cut lies within or right behind it."""
        if self._left is None and self._events_left is not None:
            at = self._boundary(data)
            if at is None:
                return len(data)
            self._left = at + self._extra
        if self._left is None:
            return len(data)
        kept = min(self._left, len(data))
        self._left -= kept
        self.struck = self._left == 0
        return kept

    def _boundary(self, data: bytes) -> int | None:
        """Where in `data` the wanted event ends."""
        assert self._events_left is not None
        window, before = self._last + data, len(self._last)
        at = 0
        while self._events_left > 0:
            found = window.find(EVENT_END, at)
            if found < 0:
                # A line break that ended an event must not begin the next find.
                self._last = window[-1:] if window.endswith(b"\n") and at < len(window) else b""
                return None
            at = found + len(EVENT_END)
            self._events_left -= 1
        return max(0, at - before)


def _changed(head: bytes, headers: tuple[tuple[str, str], ...]) -> bytes:
    """The request's head with these headers, and for one request only."""
    request_line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    added = [f"{name}: {value}".encode() for name, value in (*headers, ("connection", "close"))]
    return b"\r\n".join([request_line, *added, *(line for line in lines if not line.lower().startswith(b"connection:")), b"", b""])


async def _forward(reader: asyncio.StreamReader, write: Callable[[bytes], None], drain: Callable[[], Awaitable[None]]) -> None:
    while data := await reader.read(READ_BYTES):
        write(data)
        await drain()


async def _paced(writer: asyncio.StreamWriter, data: bytes, bytes_per_s: float) -> None:
    if not bytes_per_s:
        writer.write(data)
        await writer.drain()
        return
    step = max(1, int(bytes_per_s / 10))
    for start in range(0, len(data), step):
        writer.write(data[start : start + step])
        await writer.drain()
        await asyncio.sleep(step / bytes_per_s)


def _reset_on_close(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
