"""An MCP server that is a program: its process, its life, and the one session with it over its standard streams (a message a line).

What it offers and what its answers mean is in `mcp_servers`. A process serves all calls for a while and is then replaced; one that dies is
started again with the next call, later each time it dies young.
"""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import anyio
import mcp_types
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.session import ClientSession
from mcp.shared.message import SessionMessage

from services.chassis.errors import Unavailable
from services.chassis.processes import end_of
from services.orchestrator.tools.mcp_session import CONNECTIONS_MAX, RESPONSE_BYTES_MAX, US, Session, first_of, greet

log = structlog.get_logger(__name__)

START_S = 20.0
"""How long a program may take until it has agreed on a revision: some install themselves first."""
GOODBYE_S = 2.0
"""How long it may take to end once its input is closed, and again once it is asked to by a signal."""
BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
"""Pause before a program that failed is started again; twice as long with each failure in a row."""
STEADY_S = 30.0
"""A program that has lived so long did not fail at its start: the next pause is the first one again."""
LAST_CALLS_S = 60.0
"""How long calls of a process that has been replaced may go on."""


class ServerProcess:
    """A program that is started when it is needed. `now` is a monotonic clock, in seconds.

    `environment` is all that it sees of ours. `life_s`: a process is replaced when it is that old, whatever it has kept or leaked.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], life_s: float, now: Callable[[], float]) -> None:
        self._name, self._command, self._environment, self._life_s, self._now = name, tuple(command), dict(environment), life_s, now
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)
        self._kept: _Kept | None = None
        self._alive: set[_Kept] = set()
        """Also those that have been replaced and have calls to finish."""
        self._failures = 0
        self._not_before = 0.0
        self._closed = False

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[ClientSession]:
        """The session, for one call or list. Raises Unavailable if no process can be started, or none is to be just now."""
        async with self._turns:
            kept = self._current()
            await asyncio.shield(kept.ready)  # who leaves meanwhile leaves it to whoever comes next
            kept.calls += 1
            try:
                yield kept.session
            finally:
                kept.calls -= 1
                kept.may_end()

    async def aclose(self) -> None:
        """End every process, and wait until it has ended; a call under way fails."""
        self._closed = True
        for kept in self._alive:
            kept.stop()
        while self._alive:
            await asyncio.wait({kept.keeping for kept in self._alive})

    def _current(self) -> "_Kept":
        """The process for new calls, which may be starting still."""
        kept = self._kept
        if kept is not None and not kept.over and self._now() - kept.began_at < self._life_s:
            return kept
        if kept is not None and not kept.over:
            kept.retire()
        if self._closed or self._now() < self._not_before:
            raise Unavailable("the tool server is not started again yet", dependency=self._name)
        self._kept = kept = _Kept(self._name, self._now(), self._failed)
        kept.keeping = asyncio.create_task(kept.keep(self._command, self._environment), name="tool server")
        self._alive.add(kept)
        kept.keeping.add_done_callback(functools.partial(self._ended, kept))
        return kept

    def _ended(self, kept: "_Kept", _: "asyncio.Task[None]") -> None:
        self._alive.discard(kept)

    def _failed(self, kept: "_Kept") -> None:
        """A process has gone by itself, or never came: the next one waits. At once, and not only when it is buried."""
        self._failures = self._failures + 1 if self._now() - kept.began_at < STEADY_S else 1
        pause_s = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (self._failures - 1))
        self._not_before = self._now() + pause_s
        log.warning("tool_server_ended", server=self._name, failures=self._failures, pause_s=pause_s)


class _Kept:
    """One process and the session with it, both kept by one task, as the package's scopes want it."""

    def __init__(self, name: str, began_at: float, failed: "Callable[[_Kept], None]") -> None:
        self.name, self.began_at, self._failed = name, began_at, failed
        self.calls = 0
        self.over = False
        """Whether nothing can be asked of it any more."""
        self.stopped = False
        """Whether it was us who ended it."""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # perhaps nobody waits any more
        self.session: ClientSession
        self.keeping: asyncio.Task[None]
        self._leave = asyncio.Event()
        self._retired = False

    def stop(self) -> None:
        """End it now."""
        self.over = self.stopped = True
        self._leave.set()
        if not self.ready.done():
            self.keeping.cancel()

    def retire(self) -> None:
        """End it when its last call is over, or has had its time."""
        if not self._retired:
            self._retired = self.stopped = True
            asyncio.get_running_loop().call_later(LAST_CALLS_S, self._leave.set)
            self.may_end()

    def may_end(self) -> None:
        if self._retired and not self.calls:
            self._leave.set()

    async def keep(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start, greet, and stay until the process or its time is over. Never raises but for cancellation."""
        failure: BaseException | None = None
        try:
            async with _started(self.name, command, environment, self._gone) as (read, write):
                async with Session(read, write, client_info=US) as session:
                    async with asyncio.timeout(START_S):
                        await greet(session)
                    self.session = session
                    self.ready.set_result(None)
                    await self._leave.wait()
        except asyncio.CancelledError:
            if not self.stopped:
                raise
        except Exception as error:  # whatever a program of somebody else does, or the package with it
            failure = first_of(error)
            log.warning("tool_server_failed", server=self.name, error=type(failure).__name__)
        finally:
            self._gone()
            if not self.ready.done():
                self.ready.set_exception(Unavailable("the tool server cannot be started", dependency=self.name))

    def _gone(self) -> None:
        if not self.over and not self.stopped:
            self._failed(self)
        self.over = True
        self._leave.set()


Streams = tuple[MemoryObjectReceiveStream[SessionMessage | Exception], MemoryObjectSendStream[SessionMessage]]


@contextlib.asynccontextmanager
async def _started(name: str, command: Sequence[str], environment: Mapping[str, str], gone: Callable[[], None]) -> AsyncIterator[Streams]:
    """A process for the block, and its messages. `gone` is called when it says no more. Raises Unavailable."""
    ours, theirs = socket.socketpair()
    with theirs:
        lines, told = await asyncio.open_connection(sock=ours, limit=RESPONSE_BYTES_MAX)
        try:
            process = _process(theirs, command, environment)
        except (OSError, ValueError) as error:
            told.close()
            log.error("tool_server_cannot_start", server=name, error=type(error).__name__)
            raise Unavailable("the tool server cannot be started", dependency=name) from None
    ended = end_of(process)
    to_session, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    write, from_session = anyio.create_memory_object_stream[SessionMessage](0)
    reading = asyncio.create_task(_read(lines, to_session, gone), name="tool server output")
    writing = asyncio.create_task(_write(from_session, told), name="tool server input")
    try:
        yield read, write
    finally:
        reading.cancel()
        writing.cancel()
        burying = asyncio.create_task(_end(process, ended, told), name="tool server end")
        while not burying.done():  # whoever cancels waits: bounded, and no process is left behind
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(burying)
        for stream in (to_session, read, write, from_session):
            stream.close()


async def _read(
    lines: asyncio.StreamReader, to_session: MemoryObjectSendStream[SessionMessage | Exception], gone: Callable[[], None]
) -> None:
    """Pass on what the process says, a message a line of at most RESPONSE_BYTES_MAX, until it says no more or too much at once."""
    try:
        async with to_session:
            while line := await lines.readline():
                if not line.strip():
                    continue
                try:
                    message = mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    continue  # a line that is no message, such as a greeting for people
                await to_session.send(SessionMessage(message))
    except (ValueError, OSError, anyio.ClosedResourceError, anyio.BrokenResourceError):
        pass  # too long a line, or a line that was cut: the session ends with its stream
    finally:
        gone()


async def _write(from_session: MemoryObjectReceiveStream[SessionMessage], told: asyncio.StreamWriter) -> None:
    async with from_session:
        with contextlib.suppress(OSError):  # it reads no more: what it says tells the rest
            async for message in from_session:
                told.write(message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await told.drain()


async def _end(process: "subprocess.Popen[bytes]", ended: asyncio.Future[int], told: asyncio.StreamWriter) -> None:
    """End the process as the protocol has it: close its input, then ask, then kill, it and whatever it started."""
    with contextlib.suppress(OSError):
        told.write_eof()
    for step in (signal.SIGTERM, signal.SIGKILL):
        await asyncio.wait({ended}, timeout=GOODBYE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, step)
    await asyncio.wait({ended}, timeout=GOODBYE_S)
    told.close()


def _process(line: socket.socket, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """A process that reads from the line and writes to it. Raises OSError, ValueError.

    Not by the event loop's own means: uvloop forks, and what gRPC does in a forked child can hang it before it becomes a program.
    """
    return subprocess.Popen(
        command,
        stdin=line.fileno(),
        stdout=line.fileno(),
        stderr=subprocess.DEVNULL,  # anybody's words
        env=environment,
        cwd="/",
        start_new_session=True,  # to end it with all that it starts
    )
