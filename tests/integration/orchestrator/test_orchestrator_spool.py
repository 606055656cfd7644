"""The spool: durable before it says so, sent at least once, nothing dropped, whoever is killed."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from services.chassis.errors import NotFound, Unavailable
from services.chassis.principal import Principal
from services.orchestrator import spool_gauges
from services.orchestrator.clients import RemoteLedger, SpooledTurns
from services.orchestrator.domain import KeptTurn, Turn
from services.orchestrator.spool import Ack, Link, Spool, dead_letters, opened, retry_dead_letters
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tests.fakes.orchestrator_world import until
from tests.fakes.scripted_model import question


class Books:
    """Where records go: books each once, and can be away, forgetful or picky."""

    def __init__(self) -> None:
        self.booked: dict[int, bytes] = {}
        self.received = 0
        self.opened = 0
        self.fail_after: int | None = None
        self.reject: set[bytes] = set()

    @contextlib.asynccontextmanager
    async def link(self) -> AsyncIterator[Link]:
        self.opened += 1
        yield _Line(self)


class _Line:
    def __init__(self, books: Books) -> None:
        self._books, self._sent = books, list[Sequence[tuple[int, bytes]]]()

    async def send(self, records: Sequence[tuple[int, bytes]]) -> None:
        self._sent.append(records)

    async def acks(self) -> Sequence[Ack]:
        return [self._ack(*record) for record in self._sent.pop(0)]

    def _ack(self, record_id: int, payload: bytes) -> Ack:
        self._books.received += 1
        if self._books.fail_after is not None and self._books.received > self._books.fail_after:
            self._books.fail_after = None
            raise Unavailable("the line was cut", dependency="ledger")
        if payload in self._books.reject:
            return Ack(record_id, "REQUEST_INVALID", "never")
        self._books.booked[record_id] = payload
        return Ack(record_id)


@contextlib.asynccontextmanager
async def draining(spool: Spool, books: Books) -> AsyncIterator[None]:
    task = asyncio.create_task(spool.drain_forever(books.link))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_record_is_booked_and_gone_from_disk(tmp_path: Path) -> None:
    """The future of a record is done once it was acknowledged."""
    books = Books()
    async with opened(tmp_path / "spool.db", 10) as spool, draining(spool, books):
        async with asyncio.timeout(5):
            await (await spool.append("o", b"one"))
        assert await spool.flush(5) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        assert database.execute("SELECT count(*) FROM outbox").fetchone() == (0,)

    assert list(books.booked.values()) == [b"one"]


async def test_many_at_once_are_all_booked_in_order(tmp_path: Path) -> None:
    """Five hundred records that end at once, none lost, none twice."""
    books = Books()
    async with opened(tmp_path / "spool.db", 1000) as spool, draining(spool, books):
        await asyncio.gather(*(spool.append(str(n), str(n).encode()) for n in range(500)))
        assert await spool.flush(20) == 0

    assert sorted(books.booked.values()) == sorted(str(n).encode() for n in range(500))
    assert list(books.booked) == sorted(books.booked)


async def test_line_that_breaks_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """What was not acknowledged is sent again on a new line."""
    books = Books()
    books.fail_after = 7
    async with opened(tmp_path / "spool.db", 1000) as spool, draining(spool, books):
        await asyncio.gather(*(spool.append(str(n), str(n).encode()) for n in range(50)))
        assert await spool.flush(20) == 0

    assert sorted(books.booked.values()) == sorted(str(n).encode() for n in range(50))
    assert books.opened == 2


async def test_record_that_can_never_be_booked_is_kept_aside(tmp_path: Path) -> None:
    """It blocks nobody and is not thrown away."""
    books = Books()
    books.reject.add(b"bad")
    async with opened(tmp_path / "spool.db", 10) as spool, draining(spool, books):
        for payload in (b"bad", b"good"):
            await spool.append("o", payload)
        assert await spool.flush(5) == 0
        assert spool.dead_letters == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "spool.db")) as database:
        assert database.execute("SELECT payload, reason, detail FROM dead_letter").fetchall() == [(b"bad", "REQUEST_INVALID", "never")]

    assert list(books.booked.values()) == [b"good"]


async def test_full_spool_admits_nothing_new_and_still_takes_what_has_begun(tmp_path: Path) -> None:
    """Work is refused at the door, never forgotten inside."""
    async with opened(tmp_path / "spool.db", 2) as spool:
        await spool.append("o", b"1")
        assert spool.has_room
        await spool.append("o", b"2")
        assert not spool.has_room
        await spool.append("o", b"3")

        assert spool.depth == 3


async def test_spool_belongs_to_one_process(tmp_path: Path) -> None:
    """A second one is told so instead of sending everything twice."""
    async with opened(tmp_path / "spool.db", 2) as spool:
        await spool.append("o", b"1")
        with pytest.raises(OSError, match=r"spool\.db"):
            async with opened(tmp_path / "spool.db", 2):
                pass


CHILD = """
import asyncio, sys
from pathlib import Path
from services.orchestrator.spool import opened

async def main():
    async with opened(Path(sys.argv[1]), 100_000) as spool:
        async def writer(name):
            for n in range(100_000):
                await spool.append(f"{n}", f"{name}-{n}".encode())
                await spool.keep_turn(f"{name}-{n}", b"words")
                print(f"{name}-{n}", flush=True)
        await asyncio.gather(*(writer(name) for name in "abcd"))

asyncio.run(main())
"""


async def test_killed_process_has_kept_every_record_it_said_it_kept(tmp_path: Path) -> None:
    """kill -9 in the middle of writing: whatever `append` and `keep_turn` returned for is there at the next start, and is sent."""
    path = tmp_path / "spool.db"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(path), stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert child.stdout is not None
    said = [(await child.stdout.readline()).strip() for _ in range(200)]
    child.send_signal(signal.SIGKILL)
    said += (await child.stdout.read()).split()
    await child.wait()
    said = [line for line in said if b"-" in line and line[-1:].isdigit()]
    books = Books()
    async with opened(path, 100_000) as spool, draining(spool, books):
        assert await spool.flush(30) == 0
        await until(lambda: not spool.depth)
    with contextlib.closing(sqlite3.connect(path)) as database:
        turns = {answer_id.encode() for (answer_id,) in database.execute("SELECT answer_id FROM turns")}

    missing = set(said[:-1]) - (turns & set(books.booked.values()))
    assert not missing


async def test_an_intent_outlives_its_process_before_its_mark_is_written(tmp_path: Path) -> None:
    """kill -9 while the disk is busy with something else: the intent is a record all the same, and one that was marked is no second one."""
    books, path = Books(), tmp_path / "spool.db"
    script = f"""
import asyncio, os, pathlib, signal, time
from services.orchestrator.spool import opened

async def main():
    async with opened(pathlib.Path({str(path)!r}), 10) as spool:
        spool.intend("marked", "r1", b"marked")
        await spool.append("ended", b"whole")
        spool._jobs.put((lambda database: time.sleep(600), asyncio.get_running_loop().create_future()))
        spool.intend("unmarked", "r1", b"unmarked")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await child.wait() == -signal.SIGKILL
    async with opened(path, 10) as spool, draining(spool, books):
        assert sorted(spool.interrupted) == [("marked", "r1"), ("unmarked", "r1")]
        assert await spool.flush(5) == 0
    async with opened(path, 10) as spool:
        assert (spool.interrupted, spool.depth) == ([], 0)

    assert sorted(books.booked.values()) == [b"marked", b"unmarked", b"whole"]


async def test_an_intent_is_forgotten_once_its_mark_is_on_disk(tmp_path: Path) -> None:
    """Or what was booked long ago would be sent again at the next start; a file of intents that was torn is begun anew."""
    path = tmp_path / "spool.db"
    async with opened(path, 10) as spool:
        spool.intend("a", "r1", b"half")
        await spool.append("a", b"whole")
    async with opened(path, 10) as spool:
        assert (spool.interrupted, spool.depth) == ([], 1)
    (tmp_path / "spool.intents.db").write_bytes(b"torn" * 4096)
    async with opened(path, 10) as spool:
        assert (spool.interrupted, spool.depth) == ([], 1)


async def test_marks_that_a_dead_process_left_are_records(tmp_path: Path) -> None:
    """The latest of each that had no final record, under the name of the process that made it; each is sent once."""
    books, path = Books(), tmp_path / "spool.db"
    async with opened(path, 10) as spool:
        spool.mark("done", "r1", b"half")
        spool.mark("cut", "r1", b"a little")
        spool.mark("cut", "r1", b"more")
        await spool.append("done", b"whole")
        assert spool.interrupted == []
    async with opened(path, 10) as spool, draining(spool, books):
        assert spool.interrupted == [("cut", "r1")]
        assert await spool.flush(5) == 0
    async with opened(path, 10) as spool:
        assert (spool.interrupted, spool.depth) == ([], 0)

    assert list(books.booked.values()) == [b"whole", b"more"]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of four mebibytes. Skips where we may not make one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a file system of its own size cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def test_full_disk_admits_nothing_drops_nothing_and_is_over_when_there_is_room(tmp_path: Path) -> None:
    """What has begun waits for room, whatever cannot wait is refused, and all of it is booked once something was deleted."""
    books = Books()
    with small_disk(tmp_path / "disk") as disk:
        async with opened(disk / "spool.db", 10_000, free_bytes_min=0) as spool:
            assert spool.has_room
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096) == 4096:
                    pass
            waiting = [asyncio.create_task(spool.append(str(n), bytes([n]) * 16_384)) for n in range(40)]
            await until(lambda: not spool.has_room)
            with pytest.raises(Unavailable):
                await spool.keep("new", "r1", b"intent")
            async with draining(spool, books):
                await asyncio.sleep(0)
                assert not all(task.done() for task in waiting)
                ballast.unlink()
                async with asyncio.timeout(20):
                    await asyncio.gather(*waiting)
                    await until(lambda: spool.has_room)
                assert await spool.flush(20) == 0

    assert sorted(books.booked.values()) == [bytes([n]) * 16_384 for n in range(40)]


async def test_little_room_left_admits_nothing_new(tmp_path: Path) -> None:
    """So that what has begun still finds some."""
    with small_disk(tmp_path / "disk") as disk:
        async with opened(disk / "spool.db", 10, free_bytes_min=8 * 1024 * 1024) as spool:
            assert not spool.has_room
            await spool.append("o", b"1")


async def test_disk_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    """Nobody knows what is on it: nothing is said to be written any more, and the process is not well."""
    async with opened(tmp_path / "spool.db", 10) as spool:
        await spool.probe()
        spool._failed(sqlite3_error(sqlite3.SQLITE_IOERR))
        assert not spool.has_room
        with pytest.raises(Unavailable):
            await spool.append("o", b"1")
        with pytest.raises(Unavailable):
            await spool.probe()


def sqlite3_error(code: int) -> sqlite3.Error:
    """An error as the library would raise it."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_IOERR_FSYNC"
    return error


async def test_figures_tell_how_much_waits_and_for_how_long(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool.db", 10) as spool:
        assert (await spool.figures()).oldest_s == 0
        await spool.append("o", b"1")
        await asyncio.sleep(0.05)
        await spool.append("p", b"2")
        figures = await spool.figures()

    assert (figures.depth, figures.dead_letters, figures.full, figures.broken) == (2, 0, False, False)
    assert figures.oldest_s >= 0.05
    assert figures.size_bytes > 4096


async def test_gauges_say_what_the_spool_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure under its own name, also of a spool whose disk has failed."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("test")
    names = ("RECORDS", "OLDEST", "SIZE", "DEAD_LETTERS", "FULL", "BROKEN")
    for name in names:
        monkeypatch.setattr(spool_gauges, name, meter.create_gauge(f"tailrace.spool.{name.lower()}"))
    books = Books()
    books.reject.add(b"bad")

    def told() -> dict[str, float]:
        data = reader.get_metrics_data()
        found = [metric for part in data.resource_metrics for scope in part.scope_metrics for metric in scope.metrics] if data else []
        return {metric.name.rpartition(".")[2]: metric.data.data_points[0].value for metric in found}

    async with opened(tmp_path / "spool.db", 10) as spool:
        async with draining(spool, books):
            await spool.append("o", b"bad")
            assert await spool.flush(5) == 0
        await spool.append("p", b"waits")
        telling = asyncio.create_task(spool_gauges.tell_forever(spool, 0.01))
        await until(lambda: told().get("oldest", 0) > 0)
        well = told()
        spool._failed(sqlite3_error(sqlite3.SQLITE_IOERR))
        await until(lambda: told()["broken"] == 1)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)

    assert set(well) == {name.lower() for name in names}
    assert {name: well[name] for name in ("records", "dead_letters", "full", "broken")} == {
        "records": 1,
        "dead_letters": 1,
        "full": 0,
        "broken": 0,
    }
    assert well["size"] > 4096
    assert told() | {"records": 1, "dead_letters": 1} == told()


async def test_dead_letters_are_shown_and_sent_again(tmp_path: Path) -> None:
    """What was put aside goes back into the outbox, and is booked at the next start."""
    books, path = Books(), tmp_path / "spool.db"
    books.reject.add(b"bad")
    async with opened(path, 10) as spool, draining(spool, books):
        await spool.append("o", b"bad")
        assert await spool.flush(5) == 0
    (letter,) = dead_letters(path)
    assert (letter.reason, letter.detail, letter.payload) == ("REQUEST_INVALID", "never", b"bad")
    assert retry_dead_letters(path) == 1
    assert dead_letters(path) == []
    books.reject.clear()
    async with opened(path, 10) as spool, draining(spool, books):
        assert await spool.flush(5) == 0

    assert list(books.booked.values()) == [b"bad"]


async def test_dead_letters_of_a_running_process_are_left_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool.db", 10):
        with pytest.raises(OSError, match="in use"):
            retry_dead_letters(tmp_path / "spool.db")


class Conversations:
    """A ledger that keeps turns, or is away, or refuses those of some answers."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, str]] = []
        self.away = False
        self.asked = 0
        self.refused: dict[str, Exception] = {}

    async def append(self, request: ledger_pb.AppendTurnRequest, principal: Principal) -> KeptTurn:
        self.asked += 1
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        if (refusal := self.refused.get(request.turn.answer_id)) is not None:
            raise refusal
        self.kept.append((principal.tenant, principal.user, request.turn.answer_id))
        return KeptTurn(len(self.kept), 0)


def turn(answer_id: str) -> Turn:
    return Turn(answer_id, "q", "a", (), datetime(2026, 11, 1, tzinfo=UTC), True)


@contextlib.asynccontextmanager
async def sending(spool: Spool, ledger: Conversations) -> AsyncIterator[SpooledTurns]:
    turns = SpooledTurns(spool, cast(RemoteLedger, ledger))
    task = asyncio.create_task(turns.send_forever())
    try:
        yield turns
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_no_turn_waits(spool: Spool) -> None:
    async with asyncio.timeout(10):
        while await spool.oldest_turn() is not None:  # noqa: ASYNC110 - what is waited for is on disk
            await asyncio.sleep(0.01)


async def test_turns_wait_on_disk_until_the_ledger_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, as their users; also when the process ends meanwhile, and whatever a former version left there."""
    monkeypatch.setattr("services.orchestrator.clients.LATE_PAUSE_S", 0.01)
    ledger = Conversations()
    ledger.away = True
    async with opened(tmp_path / "spool.db", 10) as spool, sending(spool, ledger) as turns:
        await spool.keep_turn("unreadable", b"?")
        for number in range(3):
            await turns.keep(question(session_id=f"s{number}"), turn(f"a{number}"), "")
        await turns.keep(question(session_id="s0"), turn("a0"), "")  # once more, as somebody who was not sure
        await until(lambda: ledger.asked > 1)
    ledger.away, ledger.refused = False, {"a1": NotFound("it was deleted", kind="turn")}
    async with opened(tmp_path / "spool.db", 10) as spool, sending(spool, ledger):
        await until_no_turn_waits(spool)

    assert ledger.kept == [("acme", "alice", "a0"), ("acme", "alice", "a2")]


async def test_a_turn_that_was_kept_after_all_is_not_sent(tmp_path: Path) -> None:
    """Who had it in memory was sooner."""
    ledger = Conversations()
    async with opened(tmp_path / "spool.db", 10) as spool:
        turns = SpooledTurns(spool, cast(RemoteLedger, ledger))
        await turns.keep(question(), turn("a0"), "")
        await turns.forget("a0")

        assert await spool.oldest_turn() is None


async def test_a_turn_that_has_waited_too_long_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger would not know any more whether its conversation was deleted meanwhile."""
    monkeypatch.setattr("services.orchestrator.clients.LATE_PAUSE_S", 0.01)
    monkeypatch.setattr("services.orchestrator.clients.LATE_TURN_S_MAX", -1.0)
    ledger = Conversations()
    async with opened(tmp_path / "spool.db", 10) as spool, sending(spool, ledger) as turns:
        await turns.keep(question(), turn("a0"), "")
        await until_no_turn_waits(spool)

    assert ledger.asked == 0
