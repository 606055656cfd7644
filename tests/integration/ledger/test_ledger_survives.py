"""What time, restarts, crashes and cancelled calls do to the ledger: nothing that anybody would find in the books."""

import asyncio
import os
import secrets
import signal
import sys
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from services.chassis.channel import errors_of
from services.chassis.errors import BudgetExhausted, HoldAlreadySettled, Unavailable
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.ledger import postgres_database, postgres_schema
from services.ledger.domain import Reservation
from services.ledger.postgres_budgets import PostgresBudgets
from services.ledger.postgres_database import opened
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_prices import PostgresPrices, read_book
from services.ledger.postgres_schema import Migration, MigrationChanged
from services.ledger.prices import listed_prices
from services.local.stores import Postgres, free_port
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, Ledger, SetClock, attempt, audit, fresh_database, operation, running, until, value

ROOT = Path(__file__).resolve().parents[3]
AMOUNT = 7_000_000
COST = 150_000


KEEPER = """
import asyncio, sys
from pathlib import Path
from services.local.stores import Postgres

async def keep():
    server = Postgres(Path(sys.argv[1]), int(sys.argv[2]))
    await server.start()
    print(server.process.pid, server.url, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()

asyncio.run(keep())
"""


class KeptPostgres:
    """A server that a process of its own starts and stops: forking is not safe in ours, where gRPC's threads run."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._keeper: asyncio.subprocess.Process | None = None
        self._pid = 0
        self.url = ""

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        arguments = ("-c", KEEPER, str(self._folder), str(self._port))
        self._keeper = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT, stdin=pipe, stdout=pipe)
        assert self._keeper.stdout is not None
        pid, self.url = (await self._keeper.stdout.readline()).decode().split()
        self._pid = int(pid)

    async def stop(self, *, kill: bool = False) -> None:
        if self._keeper is None:
            return
        if kill:
            os.kill(self._pid, signal.SIGKILL)
        await self._keeper.communicate(b"")  # closes its input, which tells it to stop
        self._keeper = None


async def expire(ledger: Ledger, operation_id: str) -> None:
    """Make the hold of an operation one that expired a second ago."""
    query = "UPDATE holds SET expires_at = now() - interval '1 second' WHERE operation_id = $1 RETURNING true"
    assert await value(ledger.url, query, uuid.UUID(operation_id))


async def test_replicas_that_start_together_on_an_empty_database_prepare_it_once(postgres: Postgres) -> None:
    """Migrations take turns; what was applied is not applied again; prices and plans are there once."""
    url = await fresh_database(postgres)
    async with opened(url, connections_max=6, wait_s=5) as database:
        await asyncio.gather(*(postgres_schema.prepare(database) for _ in range(4)))

        assert await database.value("SELECT count(*) FROM schema_migrations") == len(postgres_schema.migrations())
        assert await database.value("SELECT count(*) FROM prices") == len(listed_prices())


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(postgres: Postgres) -> None:
    """History is not rewritten; what is new is applied, and a failing one leaves nothing behind."""
    url = await fresh_database(postgres)
    first, second = Migration(1, "0001_a.sql", "CREATE TABLE a ()"), Migration(2, "0002_b.sql", "CREATE TABLE b ()")
    connection = await asyncpg.connect(url)
    try:
        assert await postgres_schema.apply(connection, [first]) == ["0001_a.sql"]
        assert await postgres_schema.apply(connection, [first, second]) == ["0002_b.sql"]
        with pytest.raises(MigrationChanged, match="0001_a"):
            await postgres_schema.apply(connection, [replace(first, text="CREATE TABLE a (x int)"), second])
        with pytest.raises(asyncpg.PostgresSyntaxError):
            async with connection.transaction():
                await postgres_schema.apply(connection, [first, second, Migration(3, "0003_c.sql", "CREATE TABLE c (); CREATE NONSENSE")])
        assert await connection.fetchval("SELECT to_regclass('c')") is None
    finally:
        await connection.close()


async def test_a_changed_figure_becomes_a_new_version(postgres: Postgres) -> None:
    """The file may change, the rows may not; loading the same file again adds nothing."""
    async with opened(await fresh_database(postgres), connections_max=2, wait_s=5) as database:
        await postgres_schema.prepare(database)
        wanted = listed_prices()
        wanted[1] = replace(wanted[1], price=replace(wanted[1].price, input=wanted[1].price.input + 1))
        for _ in range(2):
            await database.run(lambda connection: postgres_schema.load_prices(connection, wanted))
        book = await database.run(read_book)
        price = wanted[1].price

        assert len(list(book.versions())) == len(wanted) + 1
        in_force = book.in_force("t", price.provider, price.model, datetime.now(UTC)).price
        assert (in_force.version, in_force.input) == (2, price.input)


async def test_budgets_begin_anew_at_midnight_utc_and_a_hold_stays_in_its_day(postgres: Postgres) -> None:
    """What was reserved before midnight is booked to the day it was reserved on, also if it is settled after."""
    url = await fresh_database(postgres)
    async with opened(url, connections_max=4, wait_s=5) as database:
        await postgres_schema.prepare(database)
        clock = SetClock(datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
        prices = PostgresPrices(database, clock)
        holds, budgets = PostgresHolds(database, prices, clock), PostgresBudgets(database, clock)
        ann = Principal(f"t-{secrets.token_hex(4)}", "ann")
        for period in ("day", "month"):
            await budgets.put(ann.tenant, "user", "ann", period, AMOUNT)
        held = await holds.reserve(ann, Reservation(uuid.uuid4(), 1, *HAIKU, 1000, 1000, 60_000))
        with pytest.raises(BudgetExhausted) as refused:
            await holds.reserve(ann, Reservation(uuid.uuid4(), 1, *HAIKU, 1000, 1000, 60_000))
        assert refused.value.metadata["resets_at"] == "2026-12-01T00:00:00+00:00"
        clock.moment += timedelta(seconds=2)
        await holds.reserve(ann, Reservation(uuid.uuid4(), 1, *HAIKU, 1000, 1000, 60_000))
        await holds.settle(ann, uuid.UUID(held.hold_id), Usage(output_tokens=1), estimated=False)
        counted = await database.fetch(
            "SELECT period, period_start::text, spent_nanousd, held_nanousd FROM spending WHERE tenant = $1 AND scope = 'user'"
            " ORDER BY period, period_start",
            ann.tenant,
        )

        assert [tuple(row) for row in counted] == [
            ("day", "2026-11-30", 5000, 0),
            ("day", "2026-12-01", 0, AMOUNT),
            ("month", "2026-11-01", 5000, 0),
            ("month", "2026-12-01", 0, AMOUNT),
        ]
    assert await audit(url) == {}


async def test_an_expired_hold_is_booked_in_full_and_corrected_by_a_late_record(
    postgres: Postgres, ann: Principal, boss: Principal
) -> None:
    """Nothing is free because somebody crashed, and nothing is overcharged once the truth arrives, however often it does."""
    async with running(await fresh_database(postgres), TAILRACE_LEDGER_SWEEP_INTERVAL_MS="100") as ledger:
        ids = {name: str(uuid.uuid4()) for name in ("late", "unsent", "lost")}
        for operation_id in ids.values():
            await ledger.reserve(ann, operation_id)
        for operation_id in ids.values():
            await expire(ledger, operation_id)

        async def swept() -> object:
            return await value(ledger.url, "SELECT bool_and(state = 'expired' AND estimated) FROM holds")

        await until(swept)

        async def spent() -> int:
            request = pb.PutBudgetRequest(scope="user", subject="ann", period="day", limit_nanousd=10**9)
            return int((await ledger.ask("PutBudget", request, boss)).budget.spent_nanousd)

        assert await spent() == 3 * AMOUNT
        late = operation(ann, ids["late"], attempts=[attempt()])
        unsent = operation(ann, ids["unsent"], attempts=[attempt(1, 0, 0, not_sent=True)])
        acks = [ack for _ in range(2) for ack in await ledger.record(late, unsent)]

        assert [(ack.cost_nanousd, ack.duplicate) for ack in acks] == [(COST, False), (0, False), (COST, True), (0, True)]
        assert await spent() == AMOUNT + COST
        with pytest.raises(HoldAlreadySettled):
            await ledger.reserve(ann, ids["late"])
        assert await audit(ledger.url) == {}


async def test_a_hold_whose_answer_never_arrived_is_given_back_by_its_attempts_number(ledger: Ledger, ann: Principal) -> None:
    """A reserve that was cancelled on its way back may have held money under an id nobody knows; the record still finds it."""
    operation_id = str(uuid.uuid4())
    await ledger.reserve(ann, operation_id)
    [ack] = await ledger.record(operation(ann, operation_id, status="cancelled", attempts=[attempt(1, 0, 0, not_sent=True)]))

    assert (ack.cost_nanousd, ack.rejected_reason) == (0, "")
    assert await value(ledger.url, "SELECT state FROM holds WHERE operation_id = $1", uuid.UUID(operation_id)) == "voided"


async def test_the_database_may_go_and_come_back(state_dir: Path, ann: Principal) -> None:
    """Stopped or killed, it is missed by name and found again by itself; what was acknowledged is there, once."""
    server = KeptPostgres(state_dir / "ledger-restarts")
    await server.start()
    try:
        async with running(server.url) as ledger:
            kept: list[str] = []
            async with ledger.caller.stream(ledger.stub.WatchOperations, pb.WatchOperationsRequest(), timeout_s=60, principal=ann) as feed:
                await anext(feed)
                for kill in (False, True):
                    record = operation(ann, attempts=[attempt()])
                    assert [ack.cost_nanousd for ack in await ledger.record(record)] == [COST]
                    kept.append(record.operation_id)
                    assert (await anext(feed)).operation.operation_id == record.operation_id
                    await server.stop(kill=kill)
                    with pytest.raises(Unavailable) as missed:
                        with errors_of("ledger"):
                            request = pb.GetOperationRequest(operation_id=kept[0])
                            await ledger.stub.GetOperation(request, metadata=ledger.caller.metadata(ann), timeout=10)
                    assert missed.value.metadata["dependency"] == "postgres"
                    assert missed.value.retry_after_ms == 1000
                    await server.start()
                    for operation_id in kept:
                        shown = await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=operation_id), ann)
                        assert shown.operation.cost_nanousd == COST
                    assert [ack.duplicate for ack in await ledger.record(record)] == [True]
                    await ledger.reserve(ann)
            assert await audit(ledger.url) == {}
    finally:
        await server.stop()


async def test_a_stopping_ledger_lets_its_endless_calls_go(postgres: Postgres, ann: Principal) -> None:
    """Watchers and recorders end in order, with the acks of what was read, and do not use up the drain grace."""
    record = operation(ann, attempts=[attempt()])
    async with running(await fresh_database(postgres), TAILRACE_DRAIN_GRACE_MS="60000") as ledger:
        endless = asyncio.Event()

        async def requests():  # type: ignore[no-untyped-def]
            yield pb.RecordOperationsRequest(record_id=1, operation=record)
            await endless.wait()

        async def follow() -> int:
            async with ledger.caller.stream(ledger.stub.WatchOperations, pb.WatchOperationsRequest(), timeout_s=60, principal=ann) as feed:
                return len([message async for message in feed])

        watching = asyncio.create_task(follow())
        recorder = Principal("tailrace", "orchestrator", frozenset({"service"}))
        async with ledger.caller.stream(ledger.stub.RecordOperations, requests(), timeout_s=60, principal=recorder) as acks:
            assert (await anext(acks)).cost_nanousd == COST
            began = time.monotonic()
            ledger.stop()
            assert [ack async for ack in acks] == []
            assert await watching >= 1

    assert time.monotonic() - began < 5


async def test_a_replica_that_stands_still_in_a_transaction_keeps_its_locks_for_a_moment_only(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others get the rows; what it had not finished is undone, and when it wakes it is told, like one that lost its line."""
    url = await fresh_database(postgres)
    monkeypatch.setattr(postgres_database, "IDLE_IN_TRANSACTION_MAX_S", 1.0)
    locked, others_done = asyncio.Event(), asyncio.Event()
    tries = 0

    async def stands_still(connection: asyncpg.Connection) -> None:
        nonlocal tries
        tries += 1
        async with connection.transaction():
            await connection.execute("UPDATE counted SET n = n + 100")
            locked.set()
            await others_done.wait()
            await connection.execute("UPDATE counted SET n = n + 1000")

    async with opened(url, connections_max=1, wait_s=10) as still, opened(url, connections_max=1, wait_s=10) as other:
        await other.fetch("CREATE TABLE counted AS SELECT 0 AS n")
        standing = asyncio.create_task(still.run(stands_still))
        await locked.wait()
        await other.fetch("UPDATE counted SET n = n + 1")  # within the time that a command has
        others_done.set()
        await standing

        assert tries == 2
        assert await other.value("SELECT n FROM counted") == 1101
