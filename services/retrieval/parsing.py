"""Reading files in processes of their own: a hostile file costs one of them bounded memory and time, and the service nothing.

Only processes and pipes here. What is read how is in `parsers`, what a process may do in `parsers.confinement`.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

import services
from services.chassis.errors import DocumentRejected, Unavailable
from services.chassis.processes import end_of
from services.retrieval.domain import Extracted, Upload
from services.retrieval.parsers import landlock
from services.retrieval.parsers.frames import LENGTH, OUT_OF_MEMORY, OUTCOME, OUTCOME_BYTES_MAX, Outcome, Task, framed
from services.retrieval.parsers.rejection import rejected
from services.retrieval.ports import Ocr
from services.retrieval.scans import completed, read_off

T = TypeVar("T")
log = structlog.get_logger(__name__)

FILES_PER_WORKER_MAX = 200
"""Then a new one takes its place: libraries leak."""
PEAK_MIB_KEPT_MAX = 160
"""A worker that has grown beyond this is not kept waiting with its memory."""
START_TIMEOUT_S = 30
DYING_S = 2
"""How long a process may take to end after it has closed its pipe."""
RECEIVED_BYTES = 1024 * 1024
"""How much of an outcome waits in memory before the process has to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading may cost."""

    workers: int = 2
    timeout_s: float = 25.0
    """Wall clock, a file."""
    memory_mib: int = 448
    """Address space, a worker; what is resident stays below it."""
    idle_s: float = 30.0
    """How long a worker waits for its next file before it ends."""
    ocr_timeout_s: float = 300.0
    """Wall clock, for reading the pictures of a file where an OCR is set."""


class _WorkerDied(Exception):
    """The process ended, or said something that makes no sense."""


class _Worker:
    """One process, which reads one file at a time."""

    def __init__(self, process: "subprocess.Popen[bytes]", outcomes: asyncio.StreamReader, tasks: asyncio.StreamWriter) -> None:
        self.process = process
        self.files = 0
        self.idle: asyncio.TimerHandle | None = None
        self.ended = end_of(process)
        """Its exit code, once there is one."""
        self.ended.add_done_callback(lambda _: tasks.close())
        self._outcomes, self._tasks = outcomes, tasks

    @classmethod
    async def start(cls, limits: Limits) -> "_Worker":
        """Raises Unavailable if no process can be started: that is not the file's fault."""
        ours, theirs = socket.socketpair()
        with theirs:
            outcomes, tasks = await asyncio.open_connection(sock=ours, limit=RECEIVED_BYTES)
            try:
                worker = cls(_process(theirs, limits), outcomes, tasks)
            except OSError as error:
                tasks.close()
                log.error("parser_cannot_start", error=type(error).__name__)
                raise Unavailable("no parser can be started", dependency="parsers") from None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await worker._receive()
        except (_WorkerDied, TimeoutError) as error:
            worker.kill()
            log.error("parser_cannot_start", error=type(error).__name__, returncode=await worker.buried())
            raise Unavailable("no parser can be started", dependency="parsers") from None
        except BaseException:
            worker.kill()
            raise
        return worker

    async def read(self, task: Task) -> Outcome:
        """Raises _WorkerDied."""
        self.files += 1
        try:
            self._tasks.write(framed(task))
            await self._tasks.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise _WorkerDied from None
        body = await self._receive()
        try:
            # Large texts take a while to decode; other work goes on.
            return await asyncio.to_thread(OUTCOME.decode, body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise _WorkerDied from None

    def kill(self) -> None:
        if self.idle is not None:
            self.idle.cancel()
        self.process.kill()
        self._tasks.close()

    async def buried(self) -> int:
        """The exit code of a process that has closed its pipe; it is ended if it goes on without."""
        try:
            async with asyncio.timeout(DYING_S):
                return await asyncio.shield(self.ended)
        except TimeoutError:
            self.kill()
        return await asyncio.shield(self.ended)

    async def _receive(self) -> bytes:
        try:
            (length,) = LENGTH.unpack(await self._outcomes.readexactly(LENGTH.size))
            if length > OUTCOME_BYTES_MAX + LENGTH.size:
                raise _WorkerDied
            return await self._outcomes.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            raise _WorkerDied from None


class ParserPool:
    """Workers that are started when files come and end when none do."""

    def __init__(self, limits: Limits, ocr: Ocr | None = None) -> None:
        self._limits = limits
        self._ocr = ocr
        self._room = asyncio.Semaphore(limits.workers)
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["ParserPool"]:
        """On leaving, every process has ended, whatever it was at."""
        if not landlock.version():
            log.warning("parsers_without_landlock", open_to="files that this user may read, to native code that a hostile file takes over")
        try:
            yield self
        finally:
            alive = list(self._alive)
            for worker in alive:
                worker.kill()
            await asyncio.gather(*(worker.ended for worker in alive))
            self._alive.clear()
            self._idle.clear()

    async def parse(self, upload: Upload) -> Extracted:
        """Extract the text of a file. Raises DocumentRejected with its cause, Unavailable if no process can be started.

        Waits while all workers are busy; the file's own time begins after that. Where an OCR is set, it reads what is pictures: the file,
        or a file of those pages; what it raises besides DocumentRejected is raised here. Cancellation: ends the process that reads it.
        """
        try:
            extracted = await self._done(Task.of(upload), Outcome.extracted)
        except DocumentRejected as refusal:
            if self._ocr is None or refusal.metadata.get("cause") != "no_text":
                raise
            return await read_off(self._ocr, upload, self._limits.ocr_timeout_s)
        if self._ocr is None or not extracted.unread_pages:
            return extracted
        try:
            pictures, pages = await self._done(Task.of(upload, extracted.unread_pages), Outcome.excerpted)
        except DocumentRejected as refusal:
            log.warning("pictures_cannot_be_taken_out", cause=refusal.metadata.get("cause", ""), pages=len(extracted.unread_pages))
            return extracted
        return await completed(self._ocr, extracted, pages, replace(upload, content=pictures), self._limits.ocr_timeout_s)

    async def _done(self, task: Task, take: Callable[[Outcome], T]) -> T:
        """What `take` finds in the outcome of a task. Raises DocumentRejected, also if it makes no sense."""
        async with self._room:
            outcome, fresh = await self._attempt(task)
            if outcome is None and not fresh:
                # The file before may have hurt it, or the system ended it while it waited: this one gets a process of its own.
                outcome, _ = await self._attempt(task, anew=True)
        if outcome is None:
            raise rejected("the file made its parser fail", cause="crashed")
        try:
            return await asyncio.to_thread(take, outcome)
        except ValueError:
            raise rejected("the file made its parser fail", cause="crashed") from None

    async def _attempt(self, task: Task, *, anew: bool = False) -> tuple[Outcome | None, bool]:
        """What a worker made of it, None if it died of it, and whether the worker was a new one."""
        worker = self._idle.pop() if self._idle and not anew else None
        fresh = worker is None
        if worker is None:
            worker = await _Worker.start(self._limits)
            self._watch(worker)
        elif worker.idle is not None:
            worker.idle.cancel()
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                outcome = await worker.read(task)
        except TimeoutError:
            worker.kill()
            raise self._too_slow() from None
        except _WorkerDied:
            returncode = await worker.buried()
            if returncode == -signal.SIGXCPU:
                raise self._too_slow() from None
            if returncode == OUT_OF_MEMORY:
                raise rejected("reading the file takes more memory than a document may", cause="too_large") from None
            log.warning("parser_died", returncode=returncode, bytes=len(task.content))
            return None, fresh
        except BaseException:
            worker.kill()
            raise
        if error := outcome.facts.get("error"):
            log.warning("parser_failed", error=error, bytes=len(task.content))
        self._park(worker, outcome)
        return outcome, fresh

    def _too_slow(self) -> DocumentRejected:
        return rejected("reading the file takes longer than a document may", cause="timeout", seconds_max=round(self._limits.timeout_s))

    def _park(self, worker: _Worker, outcome: Outcome) -> None:
        """Keep the worker for the next file, for a while, unless it has become heavy or old."""
        if outcome.peak_mib > PEAK_MIB_KEPT_MAX or worker.files >= FILES_PER_WORKER_MAX:
            worker.kill()
            return
        self._idle.append(worker)
        worker.idle = asyncio.get_running_loop().call_later(self._limits.idle_s, self._end_idle, worker)

    def _end_idle(self, worker: _Worker) -> None:
        if worker in self._idle:
            self._idle.remove(worker)
            worker.kill()

    def _watch(self, worker: _Worker) -> None:
        """Know the process until it has ended."""
        self._alive.add(worker)

        def forget(_: asyncio.Future[int]) -> None:
            self._alive.discard(worker)
            if worker in self._idle:
                self._idle.remove(worker)

        worker.ended.add_done_callback(forget)


def _process(line: socket.socket, limits: Limits) -> "subprocess.Popen[bytes]":
    """A process that reads tasks from the line and writes outcomes to it.

    Not by the event loop's own means: uvloop forks, and what gRPC, OpenTelemetry and others do in a forked child can hang it before it
    becomes a program. This way nothing of theirs runs in it. The thread that starts a process must outlive it: see `confinement`.
    """
    command = (sys.executable, "-B", "-P", "-s", "-m", "services.retrieval.parsers.worker")
    arguments = (os.getpid(), limits.memory_mib, max(1, round(limits.timeout_s)))
    return subprocess.Popen(
        (*command, *map(str, arguments)), stdin=line.fileno(), stdout=line.fileno(), stderr=subprocess.DEVNULL, env=_environment()
    )


def _environment() -> dict[str, str]:
    """A worker sees nothing of the service's environment: it holds keys, and names proxies."""
    return {"PYTHONPATH": str(Path(services.__file__).parents[1]), "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
