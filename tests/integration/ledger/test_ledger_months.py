"""Operations lie in months: the same id is there once whatever month it names, old months go whole, and what was there before moved in."""

import asyncio
import itertools
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest

from services.chassis.clock import Clock, SystemClock
from services.chassis.errors import BudgetExhausted, IdempotencyConflict, NotFound, Overloaded
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger import postgres_schema
from services.ledger.domain import Attempt, CacheFacts, Operation, Step
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_months import PostgresMonths
from services.ledger.postgres_operations import PostgresOperations
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.postgres_sums import PostgresSums
from services.ledger.postgres_usage import PostgresUsage
from services.ledger.prices import listed_prices
from services.ledger.roller import let_go, roll_all
from services.local.stores import Postgres
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, SetClock, attempt, audit, fresh_database, operation, running, until, value

MONTHS = 21
"""The number of the migration that brings months."""
EDGE = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
"""Between the former month and this one."""
BEFORE_EDGE = EDGE - timedelta(microseconds=1)
ANN, BOSS = Principal("acme", "ann"), Principal("acme", "boss", frozenset({"user", "admin"}))
LONG = timedelta(days=200)
"""Longer ago than any month that is made by itself."""


class _Former:
    """A connection of a replica of the version before, which knows no months."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        if "book_records" not in query:
            return await self._connection.fetchval(query, *arguments)
        operations, attempts, moves, calls = (orjson.loads(part) for part in arguments[:4])
        steps = [
            {"tenant": operations[place - 1]["tenant"], "operation_id": operations[place - 1]["operation_id"], "ordinal": ordinal}
            | {"name": name, "status": status, "started_ms": started_ms, "duration_ms": duration_ms, "facts": orjson.loads(facts)}
            for place, ordinal, name, status, started_ms, duration_ms, facts in zip(*arguments[4:], strict=True)
        ]
        # It had calls that nobody had told of set aside first, under ids of the database, and moved them as any other.
        await self._connection.execute("SELECT open_late($1, NULL)", orjson.dumps(calls).decode())
        for call in calls:
            kind = "settle" if call["state"] == "settled" else "void"
            own = "SELECT hold_id::text, amount_nanousd FROM holds WHERE (tenant, operation_id, attempt) = ($1, $2::text::uuid, $3)"
            hold_id, amount = await self._connection.fetchrow(own, call["tenant"], call["operation_id"], call["attempt"])
            attempts = [{**row, "hold_id": hold_id} if row["hold_id"] == call["hold_id"] else row for row in attempts]
            moves.append({**call, "hold_id": hold_id, "kind": kind, "held": -amount, "spent": call["cost_nanousd"]})
        undated = ([{name: told for name, told in row.items() if name != "created_at"} for row in part] for part in (attempts, steps))
        sent = [orjson.dumps(part).decode() for part in (operations, *undated, moves)]
        return len(await self._connection.fetchval("SELECT record_operations($1, $2, $3, $4)", *sent)) == len(operations)

    async def fetch(self, query: str, *arguments: Any) -> Any:
        named = "holds WHERE tenant = $1 AND (operation_id, user_id) IN (SELECT * FROM unnest($2::uuid[], $3::text[])) FOR UPDATE"
        return await self._connection.fetch(query.replace("holds_of($1, $2, $3)", named), *arguments)


class FormerReplica:
    """Its database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, tenant: str) -> "FormerReplica":
        assert tenant
        return self

    async def run(self, work: Any) -> Any:
        return await self._database.run(lambda connection: work(_Former(connection)))


def told(created_at: datetime, *, calls: int = 1, operation_id: str = "") -> Operation:
    """An operation of that moment with two steps."""
    used = tuple(Attempt(number, "", *HAIKU, Usage(100, 10), provider_request_id=f"r{number}") for number in range(1, calls + 1))
    return Operation(
        operation_id=operation_id or str(uuid.uuid4()),
        tenant="acme",
        user="ann",
        session_id="s1",
        api_key_id="",
        trace_id="",
        status="done",
        tier="fast",
        model=HAIKU[1],
        provider=HAIKU[0],
        collection="default",
        finish_reason="end_turn",
        error_reason="",
        usage=Usage(),
        cost_nanousd=0,
        estimated=False,
        cache=CacheFacts("miss"),
        created_at=created_at,
        first_token_ms=1.0,
        duration_ms=2.0,
        attempts=used,
        steps=(Step("recall", "done", 0.0, 1.0, {}), Step("generate", "done", 1.0, 1.0, {"found": "8"})),
    )


async def recorder(database: Any, clock: Clock | None = None, retention_days: int = 0) -> PostgresOperations:
    """Who records, with the prices the project comes with."""
    clock = clock or SystemClock()
    prices = PostgresPrices(database, clock)
    return PostgresOperations(database, PostgresHolds(database, prices), prices, clock, retention_days=retention_days)


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    """A database of its own, prepared."""
    async with opened(await fresh_database(postgres), connections_max=8, wait_s=5) as opened_database:
        await postgres_schema.prepare(opened_database)
        yield opened_database


async def places(database: Database, table: str) -> dict[str, int]:
    """How many rows each part of a table has."""
    rows = await database.fetch(f"SELECT tableoid::regclass::text AS part, count(*) AS n FROM {table} GROUP BY 1")
    return {row["part"]: row["n"] for row in rows}


async def test_what_was_there_before_moves_into_its_months(postgres: Postgres) -> None:
    """From the schema before, with attempts, steps, sums under way and rows of years ago: everything reads the same afterwards, the books
    balance, and a replica of the version before goes on recording."""
    url = await fresh_database(postgres)
    moments = [EDGE, BEFORE_EDGE, EDGE - LONG, EDGE - timedelta(days=11 * 366)]
    files = postgres_schema.migrations()
    async with opened(url, connections_max=4, wait_s=5) as database:

        async def former_schema(connection: Any) -> None:
            async with connection.transaction():
                await postgres_schema.apply(connection, [file for file in files if file.number < MONTHS])
                await postgres_schema.load_prices(connection, listed_prices())

        await database.run(former_schema)
        former = await recorder(FormerReplica(database))
        # There are no prices for the oldest.
        kept = [told(moment, calls=calls if moment > EDGE - LONG else 0) for moment, calls in itertools.product(moments, (0, 1, 2))]
        for record in kept:
            assert not (await former.record(record)).duplicate
        rows = "SELECT to_jsonb(r) - 'created_at' FROM {} r ORDER BY to_jsonb(r) ->> 'operation_id', r::text"
        tables = ("operations", "attempts", "steps", "usage_unrolled")
        before = [[row[0] for row in await database.fetch(rows.format(table))] for table in tables]

        await postgres_schema.prepare(database)
        after = [[row[0] for row in await database.fetch(rows.format(table))] for table in tables]
        parts = await places(database, "operations")
        now = await recorder(database)
        again = [await now.record(record) for record in kept]
        late = told(EDGE, calls=2)
        former = await recorder(FormerReplica(database))
        assert [(await former.record(late)).duplicate for _ in range(2)] == [False, True]
        shown = await now.get(ANN, uuid.UUID(late.operation_id))
        await postgres_schema.prepare(database)  # once is enough
        assert await roll_all(PostgresSums(database)) == len(kept) + 1

    assert [sorted(map(str, told_rows)) for told_rows in after] == [sorted(map(str, told_rows)) for told_rows in before]
    assert parts == {f"operations_{moment:%Y_%m}": 3 for moment in moments[:3]} | {"operations_other": 3}
    assert all(record.duplicate for record in again)
    assert (len(shown.attempts), len(shown.steps)) == (2, 2)
    assert await audit(url) == {}


async def test_an_operation_is_there_once_across_the_edge_of_a_month(database: Database) -> None:
    """Sent from both sides at the same time, many times over: one is taken, its repetitions are known, the other moment is refused."""
    books = await recorder(database)
    for calls in (0, 1):
        here = told(BEFORE_EDGE, calls=calls)
        there = told(EDGE, calls=calls, operation_id=here.operation_id)
        sent = [here, there] * 6
        outcomes = await asyncio.gather(*(books.record_all([record]) for record in sent))
        taken = {record.created_at for record, [outcome] in zip(sent, outcomes, strict=True) if not isinstance(outcome, Exception)}

        assert len(taken) == 1
        assert sum(not isinstance(outcome, Exception) and not outcome.duplicate for [outcome] in outcomes) == 1
        assert sum(isinstance(outcome, Exception) for [outcome] in outcomes) == 6
        for table, n in (("operations", 1), ("attempts", calls), ("steps", 2), ("operation_ids", 1)):
            found = await database.value(f"SELECT count(*) FROM {table} WHERE operation_id = $1", uuid.UUID(here.operation_id))
            assert found == n, table
        shown = await books.get(ANN, uuid.UUID(here.operation_id))
        assert shown.created_at in taken


async def test_no_writer_can_put_an_id_into_two_months(database: Database) -> None:
    """Whatever statement it uses; and no attempt without its operation, or in another month."""
    books = await recorder(database)
    record = told(BEFORE_EDGE)
    await books.record(record)
    await roll_all(PostgresSums(database))  # what waits to be summed is there once by its own key
    copy = "INSERT INTO operations SELECT (json_populate_record(o, json_build_object('created_at', $1::timestamptz))).* FROM operations o"
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.run(lambda connection: connection.execute(copy, EDGE))
    for change in ({"created_at": EDGE.isoformat()}, {"operation_id": str(uuid.uuid4())}):
        astray = "INSERT INTO attempts SELECT (json_populate_record(a, $1)).* FROM attempts a"
        with pytest.raises(asyncpg.CheckViolationError, match="not the sum"):
            await database.run(lambda connection, told=change, query=astray: connection.execute(query, orjson.dumps(told).decode()))  # type: ignore[misc]


async def test_months_are_there_ahead_and_nothing_is_refused_for_its_age(database: Database) -> None:
    """This month, the one before and two to come have tables; the rest has one together. Making them again makes none."""
    books = await recorder(database)
    for moment, calls in ((EDGE, 1), (BEFORE_EDGE, 1), (EDGE - LONG, 0)):  # long ago there were no prices
        await books.record(told(moment, calls=calls))
    following = (EDGE + timedelta(days=32)).replace(day=1)
    names = [BEFORE_EDGE, EDGE, following, (following + timedelta(days=32)).replace(day=1)]
    made = await database.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'operations\\_%' ORDER BY 1")

    assert [row["relname"] for row in made] == [*(f"operations_{name:%Y_%m}" for name in names), "operations_other"]
    for table in ("operations", "attempts", "steps"):
        n = 2 if table == "steps" else 1
        other = {} if table == "attempts" else {f"{table}_other": n}
        assert await places(database, table) == {f"{table}_{EDGE:%Y_%m}": n, f"{table}_{BEFORE_EDGE:%Y_%m}": n} | other
    assert await PostgresMonths(database).make() == 0
    make = "SELECT make_months($1, $1)"
    assert await database.value(make, EDGE - LONG) == 0  # it has rows among the others, and they stay
    assert await database.value(make, EDGE - 2 * LONG) == 1
    granted = "SELECT bool_or(has_table_privilege('tailrace_tenant', inhrelid, 'SELECT')) FROM pg_inherits"
    assert await database.value(granted) is False


async def test_one_operation_is_looked_for_in_its_month_alone(database: Database) -> None:
    """However many there are."""
    books = await recorder(database)
    record = told(BEFORE_EDGE)
    await books.record(record)
    await database.value("SELECT make_months($1, $2)", EDGE - timedelta(days=900), EDGE)
    asked: list[str] = []

    class Explained(FormerReplica):
        async def row(self, query: str, *arguments: Any) -> Any:
            asked.extend(row[0] for row in await self._database.fetch(f"EXPLAIN ANALYZE {query}", *arguments))
            return None

    with pytest.raises(NotFound):
        await (await recorder(Explained(database))).get(ANN, uuid.UUID(record.operation_id))
    done = "\n".join(line for line in asked if "never executed" not in line)
    looked_in = set(re.findall(r" on ((?:operations|steps)_(?:\d{4}_\d\d|other)) \w", done))

    assert looked_in == {f"operations_{BEFORE_EDGE:%Y_%m}", f"steps_{BEFORE_EDGE:%Y_%m}"}


async def test_usage_by_purpose_reads_the_months_it_asks_for_alone(database: Database) -> None:
    """The purpose is read from the operations themselves, each in its own month."""
    await (await recorder(database)).record(told(BEFORE_EDGE))
    await database.value("SELECT make_months($1, $2)", EDGE - timedelta(days=900), EDGE)
    plan: list[str] = []

    class Explained(FormerReplica):
        async def fetch(self, query: str, *arguments: Any) -> Any:
            plan.extend(row[0] for row in await self._database.fetch(f"EXPLAIN ANALYZE {query}", *arguments))
            return []

        async def value(self, query: str, *arguments: Any) -> Any:
            return await self._database.value(query, *arguments)

    await PostgresUsage(Explained(database)).query(BOSS, ["purpose"], BEFORE_EDGE - timedelta(days=1), EDGE)  # type: ignore[arg-type]
    done = "\n".join(line for line in plan if "never executed" not in line)

    assert set(re.findall(r" on (operations_(?:\d{4}_\d\d|other))", done)) == {f"operations_{BEFORE_EDGE:%Y_%m}"}


async def test_what_is_older_than_retention_and_still_stored_is_held_against_what_comes_again(database: Database) -> None:
    """Rows go by the month: until it is over, another body is refused, and a record that comes late for the first time is kept."""
    clock = SetClock(EDGE + timedelta(days=20))
    books = await recorder(database, clock, retention_days=1)
    record = told(EDGE + timedelta(days=4))
    late = told(EDGE + timedelta(days=5), calls=0)
    assert not (await books.record(record)).duplicate
    assert (await books.record(record)).duplicate
    with pytest.raises(IdempotencyConflict):
        await books.record(replace(record, duration_ms=record.duration_ms + 1))

    assert not (await books.record(late)).duplicate
    assert (await books.get(ANN, uuid.UUID(late.operation_id))).operation_id == late.operation_id


async def test_an_old_month_goes_whole_and_the_books_stay(postgres: Postgres) -> None:
    """Not before it is in the sums; then rows, ids and tables are gone, sums and books say what they said, and a record that comes again is
    known by its holds."""
    url = await fresh_database(postgres)
    async with running(url, TAILRACE_LEDGER_RETENTION_DAYS="0", TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000") as ledger:
        old = [operation(ANN, created_at=timestamp(BEFORE_EDGE - timedelta(hours=n)), attempts=[attempt()]) for n in range(5)]
        older = operation(ANN, created_at=timestamp(EDGE - LONG))
        new = operation(ANN, created_at=timestamp(EDGE), attempts=[attempt()])
        await ledger.record(*old, older, new)
        asked = pb.QueryUsageRequest(group_by=["day"], **{"from": timestamp(EDGE - LONG - timedelta(days=1))})
        before = await ledger.rows("QueryUsage", asked, BOSS)
        async with opened(url, connections_max=3, wait_s=5) as database:
            sums, months = PostgresSums(database), PostgresMonths(database)
            assert await months.drop(EDGE) is None  # nothing is summed yet
            await roll_all(sums)
            async with reading(url), asyncio.timeout(10):
                with pytest.raises(Overloaded):  # somebody reads; it waits neither long nor for ever
                    await months.drop(EDGE)
            assert await months.drop(EDGE - timedelta(microseconds=1)) is None
            await let_go(sums, months, EDGE)
            tables = ("operations", "attempts", "steps", "operation_ids", "holds")
            left = [await database.value(f"SELECT count(*) FROM {table}") for table in tables]
            assert await database.value("SELECT to_regclass($1)", f"attempts_{BEFORE_EDGE:%Y_%m}") is None
        after = await ledger.rows("QueryUsage", asked, BOSS)
        with pytest.raises(NotFound):
            await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=old[0].operation_id), BOSS)
    async with running(url, TAILRACE_LEDGER_RETENTION_DAYS="1", TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000") as ledger:
        again = await ledger.record(*old, older)

    assert left == [1, 1, 2, 1, 6]
    assert after == before
    assert [(ack.duplicate, ack.rejected_reason, ack.cost_nanousd) for ack in again] == [(True, "", 150_000)] * 5 + [(True, "", 0)]
    assert await value(url, "SELECT purged_before FROM usage_retention") == EDGE
    assert await audit(url) == {}


class reading:
    """Somebody who reads operations for as long as the block lasts."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> None:
        self._connection = await asyncpg.connect(self._url)
        await self._connection.execute("BEGIN; SELECT count(*) FROM operations")

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()


async def test_a_month_turns_under_a_running_ledger(postgres: Postgres) -> None:
    """A hold that is open over the edge stays in the month it was set aside in, the new month has its whole budget, and the next tables are
    made."""
    edge = (EDGE + timedelta(days=32)).replace(day=1)
    clock = SetClock(edge - timedelta(seconds=1))
    url = await fresh_database(postgres)
    budget = pb.PutBudgetRequest(scope="user", subject=ANN.user, period="month", limit_nanousd=7_000_000)
    counted = (
        "SELECT array_agg(period_start || ' ' || spent_nanousd || ' ' || held_nanousd ORDER BY period_start) FROM spending"
        " WHERE scope = 'user' AND period = 'month'"
    )
    async with running(url, clock, TAILRACE_LEDGER_ROLL_INTERVAL_MS="100") as ledger:
        await ledger.ask("PutBudget", budget, BOSS)
        before, after = str(uuid.uuid4()), str(uuid.uuid4())
        settled = await ledger.reserve(ANN, before)
        with pytest.raises(BudgetExhausted) as refused:
            await ledger.reserve(ANN)
        assert refused.value.metadata["resets_at"] == edge.isoformat()

        clock.moment = edge
        held = await ledger.reserve(ANN, after)
        assert [held.amount_nanousd, settled.amount_nanousd] == [7_000_000, 7_000_000]
        with pytest.raises(BudgetExhausted):
            await ledger.reserve(ANN)
        calls = {before: timestamp(edge - timedelta(seconds=1)), after: timestamp(edge)}
        await ledger.record(*(operation(ANN, name, attempts=[attempt()], created_at=moment) for name, moment in calls.items()))
        (month,) = (await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope="user", subject=ANN.user), BOSS)).budgets
        newest = edge
        for _ in range(2):
            newest = (newest + timedelta(days=32)).replace(day=1)
        made = f"SELECT to_regclass('operations_{newest:%Y_%m}') IS NOT NULL"
        await until(lambda: value(url, made))

        assert [month.spent_nanousd, month.held_nanousd] == [150_000, 0]
        assert month.resets_at.ToDatetime(tzinfo=UTC) == (edge + timedelta(days=32)).replace(day=1)
        assert await value(url, counted) == [f"{start:%Y-%m-%d} 150000 0" for start in (EDGE, edge)]
        for moment in (EDGE, edge):
            assert await value(url, f"SELECT count(*) FROM operations_{moment:%Y_%m}") == 1
    assert await audit(url) == {}
