"""Sums of usage say what the operations say, at every moment: before, while and after they are rolled, and once rows are purged."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger import postgres_schema
from services.ledger.domain import UsageRow
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_sums import PostgresSums
from services.ledger.postgres_usage import GROUPINGS, PostgresUsage
from services.ledger.roller import months_kept_since, purge, roll_all
from services.ledger.spans import Span
from services.local.stores import Postgres
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger, attempt, audit, fresh_database, operation, running
from tests.unit.ledger.test_ledger_usage_parts import bucket_of

BEGIN = datetime(2026, 5, 3, 22, 30, tzinfo=UTC)
RANGE = (datetime(2026, 5, 3, 23, 15, tzinfo=UTC), datetime(2026, 5, 7, 9, 40, 30, tzinfo=UTC))
FACTS = st.fixed_dictionaries(
    {
        "minutes": st.integers(0, 6 * 24 * 60),
        "user_id": st.sampled_from(["ann", "bob"]),
        "api_key_id": st.sampled_from(["", "k1"]),
        "session_id": st.sampled_from(["s1", "s2"]),
        "model": st.sampled_from(["haiku", "opus"]),
        "tier": st.sampled_from(["fast", ""]),
        "cache_verdict": st.sampled_from(["miss", "exact", "coalesced"]),
        "status": st.sampled_from(["done", "failed", "cancelled"]),
        "estimated": st.booleans(),
        "input_tokens": st.integers(0, 10**6),
        "cost_nanousd": st.integers(0, 10**12),
        "prompt_cache_saved_nanousd": st.integers(-(10**9), 10**9),
        "first_token_ms": st.sampled_from([0.0, 12.0, 950.5]),
        "duration_ms": st.floats(0, 1e9),
        "steps": st.lists(st.tuples(st.sampled_from(["recall", "generate"]), st.floats(0, 1e6)), max_size=3),
    }
)


@pytest.fixture(scope="module")
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    """A prepared database that no ledger runs on, so that nothing is rolled but by the test."""
    async with opened(await fresh_database(postgres), connections_max=4, wait_s=10) as database:
        await postgres_schema.prepare(database)
        yield database


async def insert(database: Database, tenant: str, facts: dict[str, Any]) -> None:
    """One operation with its steps, as the recorder would write it, but without money in the books."""
    operation_id = uuid.uuid4()
    row: dict[str, Any] = {
        "tenant": tenant,
        "operation_id": operation_id,
        "created_at": BEGIN + timedelta(minutes=facts["minutes"]),
        "recorded_at": BEGIN,
        **{name: facts[name] for name in facts if name not in ("minutes", "steps")},
        **dict.fromkeys(("trace_id", "provider", "collection", "finish_reason", "error_reason", "cache_reason"), ""),
        **dict.fromkeys(("output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "cache_saved_nanousd"), 1),
        "calls_sent": 1,
    }
    columns, places = ", ".join(row), ", ".join(f"${place}" for place in range(1, len(row) + 1))

    async def work(connection: Any) -> None:
        async with connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")  # costs without attempts are wanted here
            await connection.execute("SELECT ensure_user($1, $2)", tenant, facts["user_id"])
            await connection.execute(f"INSERT INTO operations ({columns}) VALUES ({places})", *row.values())
            await connection.execute("INSERT INTO operation_ids VALUES ($1, $2, $3)", tenant, operation_id, row["created_at"])
            await connection.execute("INSERT INTO usage_unrolled VALUES ($1, $2, $3)", tenant, operation_id, row["created_at"])
            for ordinal, (name, duration_ms) in enumerate(facts["steps"], 1):
                await connection.execute(
                    "INSERT INTO steps VALUES ($1, $2, $3, $4, 'done', 0, $5, '{}', $6)",
                    *(tenant, operation_id, ordinal, name, duration_ms, row["created_at"]),
                )

    await database.run(work)


async def of_rows(database: Database, principal: Principal, group_by: list[str], monkeypatch: pytest.MonkeyPatch) -> list[UsageRow]:
    """What the single operations say, without any sums."""
    with monkeypatch.context() as patched:
        patched.setattr("services.ledger.postgres_usage.cut_for", lambda *_, by_user: [Span("row", *RANGE)])
        return await PostgresUsage(database).query(principal, group_by, *RANGE)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    first=st.lists(FACTS, max_size=12),
    late=st.lists(FACTS, max_size=6),
    waiting=st.lists(FACTS, max_size=4),
    batch=st.integers(1, 9),
    group_by=st.lists(st.sampled_from(sorted(GROUPINGS)), unique=True, max_size=4),
    admin=st.booleans(),
)
async def test_sums_and_rows_say_the_same_whatever_is_rolled(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    first: list[dict[str, Any]],
    late: list[dict[str, Any]],
    waiting: list[dict[str, Any]],
    batch: int,
    group_by: list[str],
    admin: bool,
) -> None:
    """Any operations, any grouping: rolled in batches of any size, with some added to hours rolled before and some not rolled yet."""
    caller = Principal(f"tenant-{secrets.token_hex(8)}", "ann", frozenset({"admin"}) if admin else frozenset({"user"}))
    sums = PostgresSums(database)
    for facts in (first, late):
        for fact in facts:
            await insert(database, caller.tenant, fact)
        while await sums.roll(batch):
            pass
    for fact in waiting:
        await insert(database, caller.tenant, fact)
    told = await PostgresUsage(database).query(caller, group_by, *RANGE)

    assert told == await of_rows(database, caller, group_by, monkeypatch)
    if "step" not in group_by:
        seen = [fact for fact in (*first, *late, *waiting) if RANGE[0] <= BEGIN + timedelta(minutes=fact["minutes"]) < RANGE[1]]
        mine = [fact for fact in seen if admin or fact["user_id"] == "ann"]
        assert sum(row.operations for row in told) == len(mine)
        assert sum(row.failed for row in told) == sum(fact["status"] == "failed" for fact in mine)
        assert sum(row.cost_nanousd for row in told) == sum(fact["cost_nanousd"] for fact in mine)
        assert sum(row.prompt_cache_saved_nanousd for row in told) == sum(fact["prompt_cache_saved_nanousd"] for fact in mine)
    while await sums.roll(100):
        pass


@pytest.mark.parametrize("ms", [0.0, 0.01, 0.010001, 0.5, 1.0, 99.9, 12_345.6, 1e9])
async def test_the_database_counts_times_in_the_stated_buckets(database: Database, ms: float) -> None:
    """The bounds that percentiles are read by."""
    assert await database.value("SELECT time_bucket($1)", ms) == bucket_of(ms)


async def test_rolling_cut_off_anywhere_adds_each_operation_once(database: Database) -> None:
    """Two replicas roll at once and one dies before its commit: nothing is added twice, nothing is left out."""
    caller = Principal(f"tenant-{secrets.token_hex(8)}", "ann", frozenset({"admin"}))
    for minute in range(60, 90):
        await insert(database, caller.tenant, PLAIN | {"minutes": minute})

    async def die(connection: Any) -> None:
        async with connection.transaction():
            died = PostgresSums(_Pinned(connection))  # type: ignore[arg-type]
            assert await died.roll(10) == 10
            raise RequestInvalid("gone", field="")

    with pytest.raises(RequestInvalid):
        await database.run(die)
    await asyncio.gather(*(roll_all(PostgresSums(database)) for _ in range(3)))
    await roll_all(PostgresSums(database))
    [row] = await PostgresUsage(database).query(caller, [], *RANGE)

    assert row.operations == 30
    kept = "SELECT sum(operations)::bigint FROM {} WHERE tenant = $1"
    for table in ("usage_hours", "usage_days", "usage_user_days"):
        assert await database.value(kept.format(table), caller.tenant) == 30, table
    assert await database.value("SELECT count(*) FROM usage_unrolled WHERE tenant = $1", caller.tenant) == 0


async def test_a_transaction_that_commits_late_is_not_passed_over(database: Database) -> None:
    """It began before others that were rolled, and is rolled once it is there."""
    caller = Principal(f"tenant-{secrets.token_hex(8)}", "ann", frozenset({"admin"}))
    await database.value("SELECT ensure_user($1, 'ann')", caller.tenant)  # else the two would wait for each other's new user
    written, rolled = asyncio.Event(), asyncio.Event()

    async def slow(connection: Any) -> None:
        async with connection.transaction():
            await insert(_Pinned(connection), caller.tenant, PLAIN | {"minutes": 60})  # type: ignore[arg-type]
            written.set()
            await rolled.wait()

    late = asyncio.create_task(database.run(slow))
    await written.wait()
    await insert(database, caller.tenant, PLAIN | {"minutes": 61})
    await roll_all(PostgresSums(database))
    [before] = await PostgresUsage(database).query(caller, [], *RANGE)
    rolled.set()
    await late
    [waiting] = await PostgresUsage(database).query(caller, [], *RANGE)
    await roll_all(PostgresSums(database))
    [after] = await PostgresUsage(database).query(caller, [], *RANGE)

    assert [row.operations for row in (before, waiting, after)] == [1, 2, 2]


async def test_too_many_groups_are_refused_not_cut(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that ends early would be believed."""
    monkeypatch.setattr("services.ledger.postgres_usage.ROWS_MAX", 2)
    caller = Principal(f"tenant-{secrets.token_hex(8)}", "ann", frozenset({"admin"}))
    for minute in (60, 2000, 4000):
        await insert(database, caller.tenant, PLAIN | {"minutes": minute})

    with pytest.raises(RequestInvalid) as refused:
        await PostgresUsage(database).query(caller, ["day"], *RANGE)

    assert refused.value.field == "group_by"


async def test_purged_operations_stay_in_sums_and_books(postgres: Postgres) -> None:
    """Old rows go in batches, once they are summed; whole days are still told, single operations refused by name, and a record that
    comes again is known by its holds."""
    url = await fresh_database(postgres)
    ann, boss = Principal("acme", "ann"), Principal("acme", "boss", frozenset({"user", "admin"}))
    begin = months_kept_since(datetime.now(UTC), 40) - timedelta(days=15)
    async with running(url, TAILRACE_LEDGER_RETENTION_DAYS="40", TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000") as ledger:
        old = [operation(ann, created_at=timestamp(begin + timedelta(hours=n)), attempts=[attempt()]) for n in range(10)]
        hit = operation(ann, created_at=timestamp(begin), cache=common_pb2.CacheReceipt(verdict="exact"))
        await ledger.record(*old, operation(ann, attempts=[attempt()]))
        asked = pb.QueryUsageRequest(group_by=["user", "day"], **{"from": timestamp(begin)})
        before = await ledger.rows("QueryUsage", asked, boss)
        async with opened(url, connections_max=2, wait_s=5) as database:
            sums = PostgresSums(database)
            assert await purge(sums, begin + timedelta(days=10)) == 0  # nothing is summed yet, so nothing may go
            await roll_all(sums)
            assert await sums.purge(begin + timedelta(days=10), 4) == 4
            assert await purge(sums, begin + timedelta(days=10)) == 6
        again = await ledger.record(*old, hit)
        after = await ledger.rows("QueryUsage", asked, boss)
        with pytest.raises(RequestInvalid) as refused:
            by_step = pb.QueryUsageRequest(group_by=["step"], **{"from": timestamp(begin)}, to=timestamp(begin + timedelta(days=2)))
            await ledger.rows("QueryUsage", by_step, boss)

    assert {(ack.duplicate, ack.rejected_reason) for ack in again} == {(True, "")}
    assert {ack.cost_nanousd for ack in again[:10]} == {150_000}
    assert [row.operations for row in before] == [10, 1]
    assert after == before
    assert refused.value.field == "from"
    connection = await asyncpg.connect(url)
    try:
        left = [await connection.fetchval(f"SELECT count(*) FROM {table}") for table in ("operations", "attempts", "steps", "holds")]
    finally:
        await connection.close()
    assert left == [1, 1, 2, 11]
    assert set(await audit(url)) == set()


async def test_usage_over_the_wire_is_the_same_before_and_after_rolling(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What is counted apart is told apart."""
    coalesced, exact = (common_pb2.CacheReceipt(verdict=verdict, saved_nanousd=7) for verdict in ("coalesced", "exact"))
    read = common_pb2.Usage(input_tokens=10, cache_read_tokens=1_000_000)
    await ledger.record(
        operation(ann, attempts=[attempt(estimated=True), attempt(2, 0, 0, not_sent=True), attempt(3)]),
        operation(ann, cache=coalesced),
        operation(ann, cache=exact),
        operation(ann, status="cancelled", attempts=[attempt(usage=read)]),
    )
    [told] = await ledger.rows("QueryUsage", pb.QueryUsageRequest(), boss)
    async with opened(ledger.url, connections_max=2, wait_s=5) as database:
        await roll_all(PostgresSums(database))
    [rolled] = await ledger.rows("QueryUsage", pb.QueryUsageRequest(), boss)

    assert rolled == told
    assert (told.operations, told.attempts, told.cache_hits, told.coalesced, told.estimated, told.cancelled) == (4, 3, 1, 1, 1, 1)
    assert (told.saved_nanousd, told.prompt_cache_saved_nanousd) == (14, 900_000_000)
    assert told.tiering_saved_nanousd > 0


async def test_operations_of_before_the_sums_are_told_and_old_recorders_go_on(postgres: Postgres) -> None:
    """The schema comes to a database in use: what is there is summed, and a replica that knows no new column still records."""
    told = {
        "tenant": "acme",
        "user_id": "ann",
        "status": "done",
        "created_at": str(BEGIN + timedelta(hours=2)),
        **dict.fromkeys(("session_id", "api_key_id", "trace_id", "tier", "model", "provider", "collection", "finish_reason"), ""),
        **dict.fromkeys(("error_reason", "cache_verdict", "cache_reason"), ""),
        **dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"), 0),
        **dict.fromkeys(("cost_nanousd", "cache_saved_nanousd", "first_token_ms", "duration_ms"), 0),
        "estimated": False,
    }

    async def record(connection: Any) -> None:
        row = orjson.dumps({**told, "operation_id": str(uuid.uuid4())}).decode()
        assert await connection.fetchval("SELECT record_operation($1, '[]', '[]', '[]')", row)

    connection = await asyncpg.connect(await fresh_database(postgres), server_settings={"timezone": "UTC"})
    try:
        files = postgres_schema.migrations()
        await postgres_schema.apply(connection, [file for file in files if file.number < 7])
        for _ in range(3):
            await record(connection)
        await postgres_schema.apply(connection, files)
        await record(connection)
        pinned: Any = _Pinned(connection)
        assert await roll_all(PostgresSums(pinned)) == 4
        assert await connection.fetchrow("SELECT operations, attempts FROM usage_days") == (4, 0)
    finally:
        await connection.close()


class _Pinned:
    """A database of one connection that is in a transaction already."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def run(self, work: Any) -> Any:
        return await work(self._connection)


PLAIN: dict[str, Any] = {
    "user_id": "ann",
    "api_key_id": "",
    "session_id": "s1",
    "model": "haiku",
    "tier": "fast",
    "cache_verdict": "miss",
    "status": "done",
    "estimated": False,
    "input_tokens": 1,
    "cost_nanousd": 1,
    "prompt_cache_saved_nanousd": 0,
    "first_token_ms": 1.0,
    "duration_ms": 1.0,
    "steps": [],
}
