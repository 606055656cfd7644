"""Order, restart and stop of children, on commands that do nothing but live and die."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.local.child import Child, ChildFailed
from services.local.supervisor import Supervisor, sweep

WAIT_S = 10.0


class Sleeper(Child):
    """Ready once its file exists; it makes the file itself."""

    ready_timeout_s = 5.0

    def __init__(self, name: str, folder: Path, events: list[str], body: str = "time.sleep(600)", before: str = "pass") -> None:
        super().__init__(name, folder / f"{name}.log")
        self.events, self.starts, self._file = events, 0, folder / f"{name}.ready"
        self._before, self._body = before, body

    async def start(self) -> None:
        self.starts += 1
        self._file.unlink(missing_ok=True)
        self.events.append(f"{self.name} starts")
        code = f"import pathlib, signal, time; {self._before}; pathlib.Path({str(self._file)!r}).touch(); {self._body}"
        await self._spawn([sys.executable, "-S", "-c", code])
        await self.until_ready()
        self.events.append(f"{self.name} ready")

    async def answers(self) -> bool:
        return self._file.exists()

    async def stop(self) -> None:
        await super().stop()
        self.events.append(f"{self.name} stopped")


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds, at most ten seconds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.01)


async def test_children_start_after_what_they_need_and_stop_before_it(tmp_path: Path) -> None:
    """A child starts when the ones it needs are ready, and is gone before they are."""
    events: list[str] = []
    store, first, second = (Sleeper(name, tmp_path, events) for name in ("store", "first", "second"))
    supervisor = Supervisor({second: [first], first: [store], store: []}, tmp_path / "children.json", events.append)
    await supervisor.start()
    started = list(events)
    events.clear()
    await supervisor.stop()

    assert started == ["store starts", "store ready", "first starts", "first ready", "second starts", "second ready"]
    assert events == ["second stopped", "first stopped", "store stopped"]


async def test_a_child_that_was_killed_is_gone_before_the_next_one_is_there(tmp_path: Path) -> None:
    """A store finds its own lock taken otherwise, and does not start."""
    child = Sleeper("worker", tmp_path, [])
    await child.start()
    former, ends = child.process, list[int | None]()
    assert former is not None
    child.spawned = lambda _: ends.append(former.returncode)
    child.kill()
    await child.start()
    await child.stop()

    assert ends == [-signal.SIGKILL]


async def test_a_killed_child_is_started_again_and_the_event_is_said(tmp_path: Path) -> None:
    """kill -9 of a child leads to a new process and to words that name the child and the signal."""
    said: list[str] = []
    child = Sleeper("worker", tmp_path, [])
    supervisor = Supervisor({child: []}, tmp_path / "children.json", said.append)
    await supervisor.start()
    assert child.process is not None
    before = child.process.pid
    os.kill(before, signal.SIGKILL)
    await until(lambda: "worker is ready again" in said)
    after = child.process.pid
    await supervisor.stop()

    assert said == ["worker was ended by SIGKILL; starting it again", "worker is ready again"]
    assert after != before
    assert not psutil.pid_exists(after)


async def test_a_child_that_waits_for_another_is_left_alone(tmp_path: Path) -> None:
    """What is not ready because of what it needs would not be so after another start either, and has work that a start would break off."""
    said: list[str] = []
    store = Sleeper("store", tmp_path, [])
    needed = f"pathlib.Path({str(tmp_path / 'store.ready')!r}).exists()"
    child = Sleeper("worker", tmp_path, [], before=f"[time.sleep(0.01) for _ in iter(lambda: {needed}, True)]")
    child.ready_timeout_s = 0.3  # type: ignore[misc] # this one alone
    supervisor = Supervisor({store: [], child: [store]}, tmp_path / "children.json", said.append)
    child._file.touch()  # the first start is none of this test
    store._file.touch()
    await supervisor.start()
    store._file.unlink()
    assert child.process is not None
    child.kill()
    await until(lambda: "worker waits for store" in said)
    waiting = child.process.pid
    store._file.touch()
    await until(lambda: "worker is ready again" in said)
    after = child.process.pid
    await supervisor.stop()

    assert after == waiting
    assert said == ["worker was ended by SIGKILL; starting it again", "worker waits for store", "worker is ready again"]


async def test_a_child_that_is_slow_to_start_is_not_asked_all_the_time(tmp_path: Path) -> None:
    """Each question takes the time that the child would start with."""
    child = Sleeper("worker", tmp_path, [], before="time.sleep(600)")
    child.ready_timeout_s = 2.0  # type: ignore[misc] # this one alone
    asked: list[bool] = []

    async def answers() -> bool:
        asked.append(False)
        return False

    child.answers = answers  # type: ignore[method-assign]
    with pytest.raises(ChildFailed, match="not ready"):
        await child.start()
    await child.stop()

    assert 2 <= len(asked) <= 25


async def test_a_child_that_ends_during_its_start_fails_the_start_with_the_end_of_its_log(tmp_path: Path) -> None:
    """The launcher says what the child said, and leaves nothing behind."""
    events: list[str] = []
    good, bad = Sleeper("good", tmp_path, events), Sleeper("bad", tmp_path, events)
    bad._file = Path("/nonexistent/ready")  # its `touch` fails
    supervisor = Supervisor({good: [], bad: [good]}, tmp_path / "children.json", events.append)
    with pytest.raises(ChildFailed, match="bad ended with code 1") as failed:
        await supervisor.start()
    await supervisor.stop()

    assert "FileNotFoundError" in str(failed.value)
    assert good.process is not None
    assert not psutil.pid_exists(good.process.pid)


async def test_a_child_that_ignores_the_stop_signal_is_ended_by_force(tmp_path: Path) -> None:
    """Stopping takes no longer than the child's time for it."""
    child = Sleeper("stubborn", tmp_path, [], before="signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    child.stop_timeout_s = 0.3  # type: ignore[misc]
    await child.start()
    assert child.process is not None
    began = time.monotonic()
    await child.stop()

    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(child.process.pid)


async def test_a_log_is_kept_within_its_bound_and_written_on(tmp_path: Path) -> None:
    """A log above the bound becomes the older part; the process goes on at the start of an empty file."""
    line = "x" * 99
    child = Sleeper("talker", tmp_path, [], f"[(print({line!r}, flush=True), time.sleep(0.002)) for _ in range(100000)]")
    await child.start()
    await until(lambda: child.log.stat().st_size > 2000)
    child.bound_log(2000)
    await until(lambda: child.log.stat().st_size >= 100)
    text = child.log.read_text()
    await child.stop()

    assert (tmp_path / "talker.1.log").stat().st_size > 2000
    assert text.startswith(line)


def launcher_code(folder: Path) -> str:
    return f"""
import asyncio, pathlib, sys
sys.path[:0] = {sys.path!r}
from test_supervisor import Sleeper
from services.local.supervisor import Supervisor
async def main():
    child = Sleeper("worker", pathlib.Path({str(folder)!r}), [])
    await Supervisor({{child: []}}, pathlib.Path({str(folder / "children.json")!r}), print).start()
    print(child.process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_children_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """kill -9 of the launcher leaves no child behind."""
    with subprocess.Popen(
        [sys.executable, "-c", launcher_code(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    ) as launcher:
        assert launcher.stdout is not None
        child = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        launcher.wait()
    gone, alive = psutil.wait_procs([child], timeout=WAIT_S)

    assert [process.pid for process in alive] == []
    assert len(gone) == 1


def test_sweep_ends_what_was_left_and_spares_a_stranger_with_the_same_id(tmp_path: Path) -> None:
    """Only a process with the noted start time is ours."""
    code = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    record = tmp_path / "children.json"
    with subprocess.Popen(code) as ours, subprocess.Popen(code) as stranger:
        created = psutil.Process(ours.pid).create_time()
        record.write_text(f'{{"ours": [{ours.pid}, {created}], "stranger": [{stranger.pid}, {created - 1000}]}}')
        swept = sweep(record)
        alive = (psutil.pid_exists(ours.pid), stranger.poll() is None)
        stranger.kill()

    assert swept == ["ours"]
    assert alive == (False, True)
    assert not record.exists()


async def test_a_child_that_stands_back_does_so_to_the_scheduler(tmp_path: Path) -> None:
    """As a process, and as the group that Linux makes of its session."""
    child = Sleeper("modest", tmp_path, [])
    child.niceness = os.getpriority(os.PRIO_PROCESS, 0) + 7
    await child.start()
    assert child.process is not None
    said = psutil.Process(child.process.pid).nice()
    group = Path(f"/proc/{child.process.pid}/autogroup")
    grouped = group.read_text().split()[-1] if group.exists() else str(child.niceness)
    await child.stop()

    assert (said, grouped) == (child.niceness, str(child.niceness))
