"""Records on their way to the ledger, on disk until it has booked them: SQLite, synced at every commit. It knows bytes alone.

Of what still runs it keeps the latest mark: the record to send if this process ends before the final one is written. Marks that a former
process left behind are records. A synced mark takes milliseconds, which a call's hold does not wait for; until it is there an intent
stands in for it, which the process may die over but not the machine: it is written, and not synced.

One thread owns the database and commits together what waits together, so that a hundred answers that end at once cost one sync.
No record is ever dropped: what the ledger can never book is put aside in a table of its own. Beside the records lie turns of conversations
that the ledger was too slow or too far away for. They are no money, and what becomes of them is decided elsewhere.

Two failures of the disk are told apart. A full one has written nothing: the write waits until there is room, and meanwhile no new work is
admitted. After any other failure nobody knows what is on disk, so nothing is tried again until a new process has looked.
"""

import asyncio
import contextlib
import itertools
import os
import queue
import random
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from services.chassis.errors import DomainError, Unavailable

log = structlog.get_logger(__name__)

BATCH_MAX = 64
"""Writes in one commit."""
SENT_MAX = 256
SENT_BYTES_MAX = 1024 * 1024
"""Records that go to the ledger in one message."""
MESSAGES_MAX = 2
"""Messages on their way at the same time: while the ledger books one, the next is read and sent."""
FULL_PAUSE_S = 0.5
"""How soon a full disk is tried again."""
FREE_BYTES_MIN = 16 * 1024 * 1024
"""With less free than this no new work is admitted, so that what has begun finds room for its records."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    record_id INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice, so an old acknowledgement cannot hit a new record
    payload BLOB NOT NULL,
    written_at REAL NOT NULL DEFAULT 0 -- seconds since 1970
);
CREATE TABLE IF NOT EXISTS running (
    operation_id TEXT PRIMARY KEY,
    replica TEXT NOT NULL, -- the process that makes it
    payload BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead_letter (
    record_id INTEGER PRIMARY KEY,
    payload BLOB NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    rejected_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
);
CREATE TABLE IF NOT EXISTS turns ( -- what conversations are to keep, and the ledger has not kept yet
    turn_id INTEGER PRIMARY KEY AUTOINCREMENT,
    answer_id TEXT NOT NULL UNIQUE,
    payload BLOB NOT NULL,
    written_at REAL NOT NULL -- seconds since 1970
);
CREATE TABLE IF NOT EXISTS room (room_id INTEGER PRIMARY KEY, filler BLOB NOT NULL); -- what a disk that was full is tried with
"""


_INTENTS = """
CREATE TABLE IF NOT EXISTS intents (
    operation_id TEXT PRIMARY KEY,
    replica TEXT NOT NULL,
    payload BLOB NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Ack:
    """The ledger's word on one record."""

    record_id: int
    rejected_reason: str = ""
    rejected_detail: str = ""


class Link(Protocol):
    """A connection to where records go. Acks come as the records went: those sent together together, in the same order."""

    async def send(self, records: Sequence[tuple[int, bytes]]) -> None: ...

    async def acks(self) -> Sequence[Ack]: ...


OpenLink = Callable[[], AbstractAsyncContextManager[Link]]
_Job = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any]"]


@dataclass(frozen=True, slots=True)
class Figures:
    """How the spool is doing."""

    depth: int
    """Records that wait."""
    oldest_s: float
    """How long the oldest of them has waited; 0 without any."""
    size_bytes: int
    """What its files take on disk."""
    dead_letters: int
    """Records put aside."""
    full: bool
    broken: bool


class Spool:
    """The outbox. Open it with `opened`; `drain_forever` sends what is in it."""

    def __init__(self, path: Path, records_max: int, free_bytes_min: int = FREE_BYTES_MIN) -> None:
        self._path, self._records_max, self._free_bytes_min = path, records_max, free_bytes_min
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._booked: dict[int, asyncio.Future[None]] = {}
        self.depth = 0
        """Records that wait."""
        self.dead_letters = 0
        """Records put aside."""
        self._broken = False
        self._full = False
        self._trying: asyncio.Task[None] | None = None
        self._database = _open(path)
        self._intents = _open_intents(path.with_suffix(".intents.db"))
        self.interrupted = _take_over(self._database, self._intents)
        """What a former process was making when it ended, with the name of that process. It is in the outbox now."""
        self.depth = self._database.execute("SELECT count(*) FROM outbox").fetchone()[0]
        self.dead_letters = self._database.execute("SELECT count(*) FROM dead_letter").fetchone()[0]
        self.has_turns = asyncio.Event()
        """Set while a turn may wait."""
        if self._database.execute("SELECT EXISTS (SELECT 1 FROM turns)").fetchone()[0]:
            self.has_turns.set()
        if self.depth:
            self._news.set()
        else:
            self._empty.set()
        self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """False while too many records wait or the disk is full, and since it failed: then no new work may begin."""
        return not self._broken and not self._full and self.depth < self._records_max and self._free_bytes() >= self._free_bytes_min

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize

    async def figures(self) -> Figures:
        """Measured now. Raises Unavailable if the disk fails."""
        oldest = await self._written(lambda db: db.execute("SELECT written_at FROM outbox ORDER BY record_id LIMIT 1").fetchone())
        files = (self._path, self._path.with_name(self._path.name + "-wal"))
        size = sum(file.stat().st_size for file in files if file.exists())
        age_s = max(0.0, time.time() - oldest[0]) if oldest else 0.0
        return Figures(self.depth, age_s, size, self.dead_letters, self._full, self._broken)

    async def probe(self) -> None:
        """Raise Unavailable once the disk has failed: only a new process can tell what is on it."""
        if self._broken:
            raise Unavailable("the spool cannot be written", dependency="spool")

    def intend(self, operation_id: str, replica: str, payload: bytes) -> None:
        """As `mark`, and once it returns the end of this process cannot undo it. Blocks for a write to memory, some 50 us."""
        with contextlib.suppress(sqlite3.Error):
            self._intents.execute(
                "INSERT OR REPLACE INTO intents (operation_id, replica, payload) VALUES (?, ?, ?)", (operation_id, replica, payload)
            )
        self.mark(operation_id, replica, payload).add_done_callback(lambda written: self._forget(operation_id, written))

    def _forget(self, operation_id: str, written: "asyncio.Future[Any]") -> None:
        if not written.cancelled() and written.exception() is None:
            with contextlib.suppress(sqlite3.Error):
                self._intents.execute("DELETE FROM intents WHERE operation_id = ?", (operation_id,))

    def mark(self, operation_id: str, replica: str, payload: bytes) -> "asyncio.Future[Any]":
        """Keep `payload` as the record of what runs, in place of an earlier one; the future is done once it is on disk.

        Nothing need wait for it: `append` tells of a disk that fails.
        """
        written: asyncio.Future[Any] = self._loop.create_future()
        written.add_done_callback(_looked_at)
        statement = "INSERT OR REPLACE INTO running (operation_id, replica, payload) VALUES (?, ?, ?)"
        self._jobs.put((lambda db: db.execute(statement, (operation_id, replica, payload)), written))
        return written

    async def keep(self, operation_id: str, replica: str, payload: bytes) -> None:
        """As `mark`, and return once it is on disk. Raises Unavailable if the disk fails or is full."""
        statement = "INSERT OR REPLACE INTO running (operation_id, replica, payload) VALUES (?, ?, ?)"
        await self._written(lambda db: db.execute(statement, (operation_id, replica, payload)))

    async def append(self, operation_id: str, payload: bytes) -> asyncio.Future[None]:
        """Return once `payload` is on disk, in place of the marks; the future is done once it was acknowledged.

        Waits while the disk is full. Raises Unavailable if it fails. Cancellation: the record may be written all the same.
        """
        self.depth += 1
        self._empty.clear()
        record_id = await self._written_at_last(lambda db: _finish(db, operation_id, payload))
        booked = self._booked[record_id] = self._loop.create_future()
        self._news.set()
        return booked

    async def keep_turn(self, answer_id: str, payload: bytes) -> None:
        """Return once a turn is on disk. Raises Unavailable if the disk fails or is full."""
        statement = "INSERT OR IGNORE INTO turns (answer_id, payload, written_at) VALUES (?, ?, ?)"
        await self._written(lambda db: db.execute(statement, (answer_id, payload, time.time())))
        self.has_turns.set()

    async def oldest_turn(self) -> tuple[str, bytes, float] | None:
        """A turn that waits: its answer's id, what was kept, and for how many seconds. Raises Unavailable."""
        self.has_turns.clear()
        statement = "SELECT answer_id, payload, written_at FROM turns ORDER BY turn_id LIMIT 1"
        try:
            row = await self._written(lambda db: db.execute(statement).fetchone())
        except Unavailable:
            self.has_turns.set()
            raise
        if row is None:
            return None
        self.has_turns.set()
        return str(row[0]), bytes(row[1]), max(0.0, time.time() - row[2])

    async def forget_turn(self, answer_id: str) -> None:
        """A turn waits no more, if it did. Raises Unavailable."""
        await self._written(lambda db: db.execute("DELETE FROM turns WHERE answer_id = ?", (answer_id,)))

    async def _written_at_last(self, job: Callable[[sqlite3.Connection], Any]) -> Any:
        """As `_written`, but a full disk is waited for: what was begun must not be lost for want of room."""
        while True:
            try:
                return await self._written(job)
            except Unavailable:
                if self._broken:
                    raise
            await asyncio.sleep(FULL_PAUSE_S)

    async def _written(self, job: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run `job` in a commit and return what it gave. Raises Unavailable if nothing was written, or nobody knows what."""
        if self._broken:
            raise Unavailable("the spool cannot be written", dependency="spool")
        try:
            return await self._do(job)
        except sqlite3.Error as error:
            self._failed(error)
            raise Unavailable("the spool cannot be written", dependency="spool") from error

    def _failed(self, error: sqlite3.Error) -> None:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            if not self._full:
                log.error("spool_full", depth=self.depth)
            self._full = True
            if self._trying is None or self._trying.done():
                self._trying = self._loop.create_task(self._until_room(), name="spool has room")
            return
        # After a failed sync nobody knows what is on disk; trying again would only hide it (fsyncgate).
        self._broken = True
        log.error("spool_failed", error=error.sqlite_errorname)

    async def _until_room(self) -> None:
        """Admit new work again once something of the size of many records can be written."""
        while self._full and not self._broken:
            await asyncio.sleep(FULL_PAUSE_S)
            try:
                await self._do(lambda db: db.execute("INSERT OR REPLACE INTO room (room_id, filler) VALUES (1, zeroblob(65536))"))
            except sqlite3.Error as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    self._failed(error)
            else:
                self._full = False
                log.warning("spool_has_room", depth=self.depth)

    async def drain_forever(self, open_link: OpenLink) -> None:
        """Send what is in the outbox, at least once, oldest first, for ever. Whatever fails is tried again; the wait grows to 5 s."""
        failures = 0
        while True:
            try:
                async with open_link() as link:
                    while True:
                        await self._news.wait()
                        await self._send_all(link)
                        if not self.depth:
                            self._news.clear()
                        failures = 0
            except (DomainError, OSError, StopAsyncIteration) as error:
                ceiling_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(failures, 10))
                failures += 1
                if failures == 1 or failures % 10 == 0:
                    log.warning("spool_waits", error=type(error).__name__, depth=self.depth, failures=failures)
                await asyncio.sleep(random.uniform(BACKOFF_MIN_S / 2, ceiling_s))  # noqa: S311 - jitter, not a secret

    async def _send_all(self, link: Link) -> None:
        """Send what is in the outbox until nothing is there that was not acknowledged."""
        under_way: deque[dict[int, bytes]] = deque()
        last = 0
        while True:
            while len(under_way) < MESSAGES_MAX and (rows := await self._oldest(last)):
                await link.send(rows)
                under_way.append(dict(rows))
                last = rows[-1][0]
            if not under_way:
                return
            await self._heard(under_way.popleft(), await link.acks())

    async def _oldest(self, after: int) -> list[tuple[int, bytes]]:
        """The next records after that one, as many as fit into a message."""
        statement = "SELECT record_id, payload FROM outbox WHERE record_id > ? ORDER BY record_id LIMIT ?"
        rows = await self._written(lambda db: db.execute(statement, (after, SENT_MAX)).fetchall())
        size = itertools.accumulate(len(payload) for _, payload in rows)
        return [row for row, bytes_so_far in zip(rows, size, strict=True) if row is rows[0] or bytes_so_far <= SENT_BYTES_MAX]

    async def _heard(self, payloads: dict[int, bytes], acks: Sequence[Ack]) -> None:
        if [ack.record_id for ack in acks] != list(payloads):
            raise Unavailable("an acknowledgement names other records than were sent", dependency="ledger")
        for ack in acks:
            if (booked := self._booked.pop(ack.record_id, None)) is not None and not booked.done():
                booked.set_result(None)  # the ledger has it; what is left is only our own housekeeping
        await self._settle([(ack, payloads[ack.record_id]) for ack in acks])

    async def _settle(self, acked: list[tuple[Ack, bytes]]) -> None:
        rejected = [
            (ack.record_id, payload, ack.rejected_reason, ack.rejected_detail[:1000]) for ack, payload in acked if ack.rejected_reason
        ]

        def settle(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR REPLACE INTO dead_letter (record_id, payload, reason, detail) VALUES (?, ?, ?, ?)", rejected)
            db.executemany("DELETE FROM outbox WHERE record_id = ?", [(ack.record_id,) for ack, _ in acked])

        await self._written_at_last(settle)
        for record_id, _, reason, _ in rejected:
            self.dead_letters += 1
            log.error("record_rejected", record_id=record_id, reason=reason, dead_letters=self.dead_letters)
        self.depth -= len(acked)
        if self.depth == 0:
            self._empty.set()

    async def flush(self, timeout_s: float) -> int:
        """Wait until everything was acknowledged, at most `timeout_s`; return how many records stay on disk for the next start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        return self.depth

    async def close(self) -> None:
        """End the thread after what it was given, and close the database."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        self._database.close()
        self._intents.close()

    async def _do(self, job: Callable[[sqlite3.Connection], Any]) -> Any:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((job, future))
        return await future

    def _work(self) -> None:
        """The thread: take all jobs that wait, run them in one transaction, answer them after its commit."""
        ended = False
        while not ended:
            jobs, ended = self._take()
            results: list[tuple[asyncio.Future[Any], Any, Exception | None]] = []
            try:
                self._database.execute("BEGIN IMMEDIATE")
                results = [(future, job(self._database), None) for job, future in jobs]
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                results = [(future, None, error) for _, future in jobs]
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(_answer, results)

    def _take(self) -> tuple[list[_Job], bool]:
        jobs: list[_Job] = []
        item = self._jobs.get()
        while item is not None:
            jobs.append(item)
            if len(jobs) == BATCH_MAX:
                return jobs, False
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, False
        return jobs, True


def _looked_at(written: "asyncio.Future[Any]") -> None:
    """A mark that failed is no news: the disk is judged by the final record."""
    if not written.cancelled():
        written.exception()


def _finish(database: sqlite3.Connection, operation_id: str, payload: bytes) -> int:
    database.execute("DELETE FROM running WHERE operation_id = ?", (operation_id,))
    return int(database.execute("INSERT INTO outbox (payload, written_at) VALUES (?, ?)", (payload, time.time())).lastrowid or 0)


def _take_over(database: sqlite3.Connection, intents: sqlite3.Connection) -> list[tuple[str, str]]:
    """Make records of the marks and intents that a former process left behind; return whose they are."""
    intended = intents.execute("SELECT operation_id, replica, payload FROM intents").fetchall()
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT OR REPLACE INTO running (operation_id, replica, payload) VALUES (?, ?, ?)", intended)
    left = database.execute("SELECT operation_id, replica FROM running ORDER BY operation_id").fetchall()
    database.execute("INSERT INTO outbox (payload, written_at) SELECT payload, ? FROM running ORDER BY operation_id", (time.time(),))
    database.execute("DELETE FROM running")
    database.execute("COMMIT")
    intents.execute("DELETE FROM intents")
    return [(str(operation_id), str(replica)) for operation_id, replica in left]


def _answer(results: list[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
    for future, value, error in results:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)


def _open(path: Path, wait_s: float = 5) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=wait_s)
    # One process, one spool: a second one would send the same records and delete under the first one's feet.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA secure_delete = FAST")  # words that were deleted are not to lie about
    database.executescript(_SCHEMA)
    if "written_at" not in {row[1] for row in database.execute("PRAGMA table_info(outbox)")}:
        database.execute("ALTER TABLE outbox ADD COLUMN written_at REAL NOT NULL DEFAULT 0")
    return database


def _open_intents(path: Path) -> sqlite3.Connection:
    try:
        return _intents_at(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        # The machine ended in the middle of a write that was never synced. The holds of those calls will expire and be booked so.
        log.warning("intents_lost", error=type(error).__name__)
        for part in ("", "-wal", "-shm"):
            path.with_name(path.name + part).unlink(missing_ok=True)
        return _intents_at(path)


def _intents_at(path: Path) -> sqlite3.Connection:
    intents = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    intents.execute("PRAGMA locking_mode = EXCLUSIVE")
    intents.execute("PRAGMA journal_mode = WAL")
    intents.execute("PRAGMA synchronous = OFF")
    intents.executescript(_INTENTS)
    return intents


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that the ledger can never book as it is."""

    record_id: int
    reason: str
    detail: str
    rejected_at: str
    payload: bytes


def dead_letters(path: Path) -> list[DeadLetter]:
    """What was put aside, oldest first. Raises OSError while a process has the spool."""
    with _visited(path) as database:
        rows = database.execute("SELECT record_id, reason, detail, rejected_at, payload FROM dead_letter ORDER BY record_id")
        return [DeadLetter(*row) for row in rows]


def retry_dead_letters(path: Path) -> int:
    """Put everything that was put aside back into the outbox, for the next start; return how many. Raises OSError as `dead_letters`."""
    with _visited(path) as database:
        database.execute("BEGIN IMMEDIATE")
        moved = database.execute(
            "INSERT INTO outbox (payload, written_at) SELECT payload, ? FROM dead_letter ORDER BY record_id", (time.time(),)
        ).rowcount
        database.execute("DELETE FROM dead_letter")
        database.execute("COMMIT")
        return moved


@contextlib.contextmanager
def _visited(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.exists():
        raise OSError(f"there is no spool {path}")
    try:
        database = _open(path, wait_s=0)
    except sqlite3.OperationalError as error:
        raise OSError(f"the spool {path} is in use: stop the orchestrator first") from error
    try:
        yield database
    finally:
        database.close()


@contextlib.asynccontextmanager
async def opened(path: Path, records_max: int, free_bytes_min: int = FREE_BYTES_MIN) -> AsyncIterator[Spool]:
    """Open the spool at `path`, made if it is not there. Raises OSError if another process has it."""
    try:
        spool = Spool(path, records_max, free_bytes_min)
    except sqlite3.OperationalError as error:
        raise OSError(f"the spool {path} cannot be opened: {error}") from error
    try:
        yield spool
    finally:
        await spool.close()
