"""One child process: started, watched until it answers, stopped; it never outlives the launcher. Order is not decided here."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

LOG_BYTES_MAX = 10 * 1024 * 1024
ASKED_FIRST_S, ASKED_MAX_S = 0.02, 0.2
"""Pauses between two questions whether a child is ready: each costs processor time that it would start with."""
_LEASH = str(Path(__file__).with_name("leash.py"))


class ChildFailed(Exception):
    """A child did not start; the text says which and why."""


class NotReady(ChildFailed):
    """A child lives, and does not answer in time."""


class User(NamedTuple):
    """Whom a program runs as. The default: whoever we are."""

    uid: int = -1
    gid: int = -1


OURSELVES = User()


def leashed(command: list[str], user: User = OURSELVES, number: int = 0, niceness: int = 0) -> list[str]:
    """`command` as `user`, sent signal `number` by the kernel when the calling process dies (on Linux; 0 = not).

    With a `niceness` (1 to 19) it yields the processor to others; its session must be its own then.
    """
    numbers = (int(number), os.getpid(), user.uid, user.gid, niceness)
    return [sys.executable, "-I", "-S", _LEASH, *map(str, numbers), *command]


class Child:
    """A process in a session of its own, so that Ctrl-C reaches only the launcher, which stops it in order.

    If the launcher dies without stopping it, the kernel sends it `stop_signal` (on Linux).
    """

    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_timeout_s: ClassVar[float] = 10.0
    ready_timeout_s: ClassVar[float] = 30.0
    niceness: int = 0
    """How far it stands back when the processor is wanted by many, 0 to 19."""

    def __init__(self, name: str, log: Path) -> None:
        self.name, self.log = name, log
        self.process: asyncio.subprocess.Process | None = None
        self.spawned: Callable[[Child], None] = lambda _: None
        """Told as soon as there is a process, before it is ready."""

    async def start(self) -> None:
        """Start and wait until it answers. Raises ChildFailed. Cancelled, it leaves a process that `stop` ends."""
        raise NotImplementedError

    async def answers(self) -> bool:
        """Whether it does its work now."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Stop in order, by force after `stop_timeout_s`. Does nothing if it does not run."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(self.stop_signal)
        try:
            async with asyncio.timeout(self.stop_timeout_s):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """End it and whatever it started, at once."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def bound_log(self, bytes_max: int = LOG_BYTES_MAX) -> None:
        """Keep the log within `bytes_max`, and one older part of the same size beside it.

        The process writes on while its log is copied and emptied: lines of that moment can be lost.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > bytes_max:
                shutil.copyfile(self.log, self.log.with_suffix(".1.log"))
                os.truncate(self.log, 0)

    async def _spawn(
        self, command: list[str], *, user: User = OURSELVES, cwd: str | Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        if self.process is not None:
            await self.process.wait()  # its files and its port are the new one's only when it is gone, which a kill does not wait for
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:  # appending, so that an emptied log is written from its start again
            self.process = await asyncio.create_subprocess_exec(
                *leashed(command, user, self.stop_signal, self.niceness),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                cwd=cwd,
                env=env,
            )
        self.spawned(self)

    async def until_ready(self) -> None:
        """Wait until it answers, at most `ready_timeout_s`. Raises ChildFailed, which is NotReady if it lives."""
        assert self.process is not None
        pause_s = ASKED_FIRST_S
        try:
            async with asyncio.timeout(self.ready_timeout_s):
                while not await self.answers():
                    if self.process.returncode is not None:
                        raise ChildFailed(f"{self.name} {ending(self.process.returncode)}:\n{self.last_lines()}")
                    await asyncio.sleep(pause_s)
                    pause_s = min(1.2 * pause_s, ASKED_MAX_S)
        except TimeoutError:
            raise NotReady(f"{self.name} was not ready within {self.ready_timeout_s:.0f} s; see {self.log}") from None

    def last_lines(self, count: int = 6) -> str:
        """The end of its log, indented."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 8192))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join(f"  {line}" for line in lines[-count:])


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
