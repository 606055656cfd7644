"""`make bench-usage`: fills a ledger with a month of operations and prints how long questions take, and whether live records notice.

It runs a PostgreSQL of its own in a temporary folder; nothing that runs or is stored is touched.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg

from bench.ground import Bar
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger.postgres_database import opened
from services.ledger.postgres_sums import PostgresSums
from services.local.stores import Postgres
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import RECORDER, Ledger, attempt, operation, running

DAYS, TENANTS, USERS = 30, 20, 200
MODELS = ("claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-4-5", "claude-opus-5", "extractive")
CHUNK = 250_000
ROLL_BATCH = 20_000
ASKED = 60
LIVE_S = 10.0
UNDER_WAY = 32
PAUSE_S = 1.0
"""Between two questions while live records are measured."""

# Written in the order of their time, as they would be; the biggest of the tenants has a share of sqrt(1 / TENANTS), 22 %. Triggers and
# references are off: what is written here is as they want it.
FILL = """
INSERT INTO operations (tenant, operation_id, user_id, session_id, api_key_id, trace_id, status, tier, model, provider, collection,
    finish_reason, error_reason, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, cost_nanousd,
    estimated, cache_verdict, cache_saved_nanousd, cache_reason, created_at, recorded_at, first_token_ms, duration_ms, calls_sent,
    prompt_cache_saved_nanousd, tiering_saved_nanousd)
SELECT 'tenant' || tenant, uuidv7(at - now()), 'user' || (random() * {users})::integer, 's' || (n / 5), '', '',
    CASE WHEN random() < 0.02 THEN 'failed' ELSE 'done' END, CASE WHEN model % 2 = 0 THEN 'fast' ELSE 'smart' END,
    ($4::text[])[model + 1], 'anthropic', 'default', 'end_turn', '', 1000, 200, 500, 0, 0, CASE WHEN hit THEN 0 ELSE 2000000 END, false,
    CASE WHEN hit THEN 'exact' ELSE 'miss' END, CASE WHEN hit THEN 2000000 ELSE 0 END, '', at, at,
    exp(5 + random() * 2), exp(7 + random() * 3), CASE WHEN hit THEN 0 ELSE 1 END, 450000, 1000000
FROM (
    SELECT n, $3::timestamptz + n * $5::interval AS at, floor({tenants} * power(random(), 2))::integer AS tenant,
        floor({models} * random())::integer AS model, random() < 0.2 AS hit
    FROM generate_series($1::bigint, $2::bigint - 1) n
) drawn
"""
PARTS = (
    "INSERT INTO operation_ids SELECT tenant, operation_id, created_at FROM operations WHERE created_at >= $1 AND created_at < $2",
    "INSERT INTO usage_unrolled SELECT tenant, operation_id, created_at FROM operations WHERE created_at >= $1 AND created_at < $2",
    "INSERT INTO attempts SELECT tenant, operation_id, 1, operation_id, provider, model, '', 1, input_tokens, output_tokens,"
    " cache_read_tokens, 0, 0, cost_nanousd, finish_reason, '', first_token_ms, duration_ms, false, false, created_at"
    " FROM operations WHERE created_at >= $1 AND created_at < $2 AND calls_sent > 0",
    "INSERT INTO steps SELECT tenant, operation_id, 1, 'generate', 'done', 0, duration_ms, '{}', created_at"
    " FROM operations WHERE created_at >= $1 AND created_at < $2",
)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def fill(url: str, n: int) -> None:
    """Write `n` operations with attempts and steps, and the list of those to sum."""
    connection = await asyncpg.connect(url, server_settings={"session_replication_role": "replica", "synchronous_commit": "off"})
    end = datetime.now(UTC)
    begin, gap = end - timedelta(days=DAYS), timedelta(days=DAYS) / n
    statement = FILL.format(users=USERS - 1, tenants=TENANTS, models=len(MODELS))
    try:
        await connection.execute(f"INSERT INTO tenants SELECT 'tenant' || n FROM generate_series(0, {TENANTS - 1}) n")
        await connection.execute(f"INSERT INTO users SELECT tenant, 'user' || n FROM tenants, generate_series(0, {USERS - 1}) n")
        for first in range(0, n, CHUNK):
            last = min(n, first + CHUNK)
            await connection.execute(statement, first, last, begin, list(MODELS), gap)
            for part in PARTS:
                await connection.execute(part, begin + first * gap, begin + last * gap)
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


async def roll(url: str) -> None:
    """Add everything to the sums."""
    async with opened(url, connections_max=2, wait_s=10) as database:
        while await PostgresSums(database).roll(ROLL_BATCH):
            pass
    connection = await asyncpg.connect(url)
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def timed(ask: Callable[[], Awaitable[object]], times: int = ASKED) -> tuple[float, float]:
    """p50 and p95 in milliseconds of asking `times` times, after one for warming up."""
    await ask()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await ask()
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    return took[len(took) // 2], took[int(len(took) * 0.95)]


async def live(ledger: Ledger, seconds: float) -> float:
    """Operations recorded in a second, over one stream with a few records under way."""
    writer = Principal("tenant1", "user1")
    ends_at = time.perf_counter() + seconds
    free = asyncio.Semaphore(UNDER_WAY)

    async def requests() -> AsyncIterator[pb.RecordOperationsRequest]:
        number = 0
        while time.perf_counter() < ends_at:
            number += 1
            await free.acquire()
            made = operation(writer, created_at=timestamp(datetime.now(UTC)), attempts=[attempt()])
            yield pb.RecordOperationsRequest(record_id=number, operation=made)

    began, acks = time.perf_counter(), 0
    async with ledger.caller.stream(ledger.stub.RecordOperations, requests(), timeout_s=seconds + 60, principal=RECORDER) as stream:
        async for ack in stream:
            assert not ack.rejected_reason
            acks += 1
            free.release()
    return acks / (time.perf_counter() - began)


async def live_while(ledger: Ledger, ask: Callable[[], Awaitable[object]], seconds: float) -> float:
    """The same while questions are asked."""

    async def keep_asking() -> None:
        while True:
            await ask()
            await asyncio.sleep(PAUSE_S)

    asking = asyncio.create_task(keep_asking())
    try:
        return await live(ledger, seconds)
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking


async def measure(n: int) -> bool:
    """Print every figure; return whether all bars are met."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder) / "postgres")
        await server.start()
        try:
            return await _measured(server.url, n)
        finally:
            await server.stop()


async def _measured(url: str, n: int) -> bool:
    say(f"{n} operations, {DAYS} days, {TENANTS} tenants, {USERS} users each, {len(MODELS)} models; load {os.getloadavg()[0]:.1f}")
    async with running(url, TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000"):
        pass  # brings the schema
    began = time.perf_counter()
    await fill(url, n)
    filled = time.perf_counter()
    say(f"filled in {filled - began:.0f} s")
    await roll(url)
    rolled = time.perf_counter()
    say(f"summed in {rolled - filled:.0f} s, {n / (rolled - filled):.0f} operations/s")
    async with running(url) as ledger:
        bars = await _questions(ledger)
        bars.append(await _records(ledger))
    for bar in bars:
        sign = ">=" if bar.at_least else "<"
        say(f"{'ok  ' if bar.ok else 'MISS'} {bar.what}: {bar.figure:.2f} {bar.unit} (bar {sign} {bar.limit:g})")
    return all(bar.ok for bar in bars)


async def _questions(ledger: Ledger) -> list[Bar]:
    admin, user = Principal("tenant0", "user1", frozenset({"admin", "user"})), Principal("tenant0", "user1")
    month = datetime.now(UTC) - timedelta(days=DAYS)
    by_day = pb.QueryUsageRequest(group_by=["day", "model"], **{"from": timestamp(month)})
    by_user = pb.QueryUsageRequest(group_by=["user"], **{"from": timestamp(month)})
    listed = pb.ListOperationsRequest(page_size=50)
    [total] = await ledger.rows("QueryUsage", pb.QueryUsageRequest(**{"from": timestamp(month)}), admin)
    say(f"the biggest tenant has {total.operations} operations")
    bars = []
    for what, method, request, caller, limit in (
        ("usage by day and model, biggest tenant (admin)", "QueryUsage", by_day, admin, 300.0),
        ("usage by day and model, one user of it", "QueryUsage", by_day, user, 300.0),
        ("usage by user, biggest tenant (admin)", "QueryUsage", by_user, admin, 10_000.0),
        ("page of 50 operations, biggest tenant (admin)", "ListOperations", listed, admin, 300.0),
    ):
        p50, p95 = await timed(lambda m=method, r=request, c=caller: ledger.rows(m, r, c))  # type: ignore[misc]
        say(f"     {what}: p50 {p50:.1f} ms, p95 {p95:.1f} ms")
        bars.append(Bar(f"p95 of {what}", p95, limit, "ms"))
    return bars


async def _records(ledger: Ledger) -> Bar:
    admin = Principal("tenant0", "user1", frozenset({"admin", "user"}))
    by_day = pb.QueryUsageRequest(group_by=["day", "model"])
    alone, beside = [], []
    await live(ledger, LIVE_S / 4)
    for _ in range(3):  # in turns, because the machine is not the same all the time
        alone.append(await live(ledger, LIVE_S))
        beside.append(await live_while(ledger, lambda: ledger.rows("QueryUsage", by_day, admin), LIVE_S))
    say(f"     live records/s alone {[round(rate) for rate in alone]}, beside questions {[round(rate) for rate in beside]}")
    return Bar("live records beside questions, as a share of alone", sum(beside) / sum(alone), 0.9, at_least=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-usage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=5_000_000, metavar="N", help="operations to fill in (5000000)")
    options = parser.parse_args()
    sys.exit(0 if asyncio.run(measure(options.operations)) else 1)


if __name__ == "__main__":
    main()
