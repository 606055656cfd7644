"""Children in order: started when what they need is ready, again when they die, stopped in reverse. What they do is not known here."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from services.local.child import Child, ChildFailed, NotReady, ending

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0
STABLE_AFTER_S = 30.0
"""A child that ran this long begins again with the shortest back-off."""
LOG_CHECK_S = 5.0
SWEEP_TIMEOUT_S = 15.0


class Supervisor:
    """Keeps `children` alive between `start` and `stop`."""

    def __init__(self, needs: Mapping[Child, Sequence[Child]], record: Path, say: Callable[[str], None]) -> None:
        """`needs`: every child with those that must be ready before it. `record`: where process ids are kept, for `sweep`."""
        self._needs = dict(needs)
        self._record = record
        self._say = say
        self._guards: list[asyncio.Task[None]] = []
        self._ready = {child: asyncio.Event() for child in self._needs}
        for child in self._needs:
            child.spawned = self._note

    async def start(self) -> None:
        """Start all, side by side where they may. Raises ChildFailed for the first that does not; call `stop` then too."""
        try:
            async with asyncio.TaskGroup() as group:
                for child in self._needs:
                    group.create_task(self._bring_up(child), name=f"start {child.name}")
        except* ChildFailed as failed:
            raise failed.exceptions[0] from None
        self._guards.append(asyncio.create_task(self._bound_logs(), name="bound logs"))

    async def _bring_up(self, child: Child) -> None:
        for needed in self._needs[child]:
            await self._ready[needed].wait()
        await child.start()
        self._ready[child].set()
        self._guards.append(asyncio.create_task(self._guard(child), name=f"guard {child.name}"))

    async def _guard(self, child: Child) -> None:
        """Start `child` again whenever it ends, ever more slowly if it keeps ending."""
        backoff_s = BACKOFF_FIRST_S
        clock = asyncio.get_running_loop()
        while True:
            assert child.process is not None
            began = clock.time()
            code = await child.process.wait()
            backoff_s = BACKOFF_FIRST_S if clock.time() - began >= STABLE_AFTER_S else backoff_s
            self._say(f"{child.name} {ending(code)}; starting it again")
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
                try:
                    await self._revive(child)
                except ChildFailed as failed:
                    await child.stop()
                    self._say(f"{failed}\n  next try in {backoff_s:.1f} s")
                    continue
                self._say(f"{child.name} is ready again")
                break

    async def _revive(self, child: Child) -> None:
        """Start `child` and wait until it answers, as long as one that it needs does not: another start would help neither."""
        try:
            await child.start()
        except NotReady:
            while absent := [needed.name for needed in self._needs[child] if not await needed.answers()]:
                self._say(f"{child.name} waits for {' and '.join(absent)}")
                with contextlib.suppress(NotReady):
                    return await child.until_ready()
            raise

    async def stop(self) -> None:
        """Stop all, in reverse: none before those that need it. Cancelled, it kills what is left."""
        for guard in self._guards:
            guard.cancel()
        await asyncio.gather(*self._guards, return_exceptions=True)
        self._guards.clear()
        left = list(self._needs)
        try:
            while left:
                free = [child for child in left if not any(child in self._needs[other] for other in left)]
                assert free, "children need each other in a circle"
                await asyncio.gather(*(child.stop() for child in free))
                left = [child for child in left if child not in free]
        except asyncio.CancelledError:
            self.kill()
            raise
        self._record.unlink(missing_ok=True)

    def kill(self) -> None:
        """End all at once."""
        for child in self._needs:
            child.kill()

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_S)
            for child in self._needs:
                await asyncio.to_thread(child.bound_log)

    def _note(self, _: Child) -> None:
        """Keep the ids of all that run, with their start times: an id alone can be anybody's later."""
        running = {}
        for child in self._needs:
            if child.process is not None and child.process.returncode is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    running[child.name] = [child.process.pid, psutil.Process(child.process.pid).create_time()]
        draft = self._record.with_suffix(".new")
        draft.write_text(json.dumps(running))
        draft.rename(self._record)


def sweep(record: Path, timeout_s: float = SWEEP_TIMEOUT_S) -> list[str]:
    """End what a killed launcher left running, politely and then by force; return the names.

    Only processes in `record` are touched, and only if they are still the ones that were noted.
    """
    try:
        noted = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):
        return []
    left: dict[psutil.Process, str] = {}
    for name, (pid, created) in noted.items():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                process.terminate()
                left[process] = name
    _, stubborn = psutil.wait_procs(list(left), timeout=timeout_s)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)
    record.unlink(missing_ok=True)
    return list(left.values())
