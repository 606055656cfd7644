"""`tailrace ledger reconcile` on real books: exit codes, both ways of matching, and nothing written."""

import asyncio
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from typer.testing import CliRunner

from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.local.command import app
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import attempt, fresh_database, operation, running

NOON = datetime(2026, 10, 8, 12, 30, tzinfo=UTC)
HEADER = (
    "usage_date_utc,model_version,usage_input_tokens_no_cache,usage_input_tokens_cache_write_5m,usage_input_tokens_cache_write_1h,"
    "usage_input_tokens_cache_read,usage_output_tokens,request_id\n"
)


async def result(url: str, file: Path, text: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """How the command ends on `text`. In a thread, because it runs a loop of its own."""
    file.write_text(text)
    monkeypatch.setenv("DATABASE_URL", url)
    return await asyncio.to_thread(CliRunner().invoke, app, ["ledger", "reconcile", str(file), *options])


async def written(url: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [
            await connection.fetchval(f"SELECT count(*) FROM {name}") for name in ("operations", "attempts", "holds", "entries", "prices")
        ]
    finally:
        await connection.close()


async def test_an_export_is_compared_with_the_books(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal: 0. Past the bound: 1. A request that nobody booked: 1. A model without cost and price: 1. A bad line: 2, named.

    A file with nothing in it: 2, and one that says that nothing was used: 1."""
    url, file = await fresh_database(postgres), tmp_path / "usage.csv"
    async with running(url) as ledger:
        calls = [attempt(1, provider_request_id="req_1"), attempt(2, provider_request_id="req_2"), attempt(3, 0, 0, not_sent=True)]
        await ledger.record(operation(Principal("acme", "ann"), created_at=timestamp(NOON), attempts=calls))
        await ledger.record(operation(Principal("globex", "eve"), created_at=timestamp(NOON), attempts=[attempt()]))
    before = await written(url)
    row = "2026-10-08,claude-haiku-4-5-20251001,{},0,0,0,{},{}\n"
    equal = await result(url, file, HEADER + row.format(300, 30, ""), monkeypatch)
    by_hour = await result(url, file, HEADER + row.replace("-08,", "-08T12:00:00Z,", 1).format(300, 30, ""), monkeypatch)
    drifted = await result(url, file, HEADER + row.format(310, 30, ""), monkeypatch)
    allowed = await result(url, file, HEADER + row.format(310, 30, ""), monkeypatch, "--max-drift", "5%")
    by_id = await result(url, file, HEADER + row.format(100, 10, "req_1") + row.format(100, 10, "req_2"), monkeypatch)
    unknown = await result(url, file, HEADER + row.format(100, 10, "req_1") + row.format(0, 0, "req_9"), monkeypatch)
    bad = await result(url, file, HEADER + row.format(300, "=1", ""), monkeypatch)
    unpriced = await result(url, file, HEADER + row.replace("claude-haiku-4-5-20251001", "nobody").format(1, 1, ""), monkeypatch)
    nothing = await result(url, file, HEADER, monkeypatch)
    bucket = {"starting_at": "2026-10-08T00:00:00Z", "ending_at": "2026-10-09T00:00:00Z", "results": []}
    silent = await result(url, file.with_suffix(".json"), json.dumps({"data": [bucket]}), monkeypatch)

    assert [done.exit_code for done in (equal, by_hour, drifted, allowed, by_id, unknown, bad, unpriced)] == [0, 0, 1, 0, 0, 1, 2, 1]
    assert [done.exit_code for done in (nothing, silent)] == [2, 1]
    assert "there is nothing to compare" in nothing.output
    assert "drift: tokens 100.000 %" in silent.output
    assert "2026-10-08 00:00  claude-haiku-4-5" in equal.output
    assert "2026-10-08 12:00  claude-haiku-4-5" in by_hour.output
    assert "drift: tokens 2.941 %" in drifted.output
    assert "alert: tokens or cost drift past the bound of 1%" in drifted.output
    assert not any("alert" in done.output for done in (equal, allowed, by_id))
    assert all("alert: " in done.output for done in (unknown, unpriced))
    assert "1 requests of the provider are not in the books" in unknown.output
    assert "line 2 has no count of tokens in usage_output_tokens" in bad.output
    assert "without a price, and without a cost in the export: nobody" in unpriced.output
    assert re.search(r"^2026-10-08 00:00  nobody .* 2 .* 0  .*\*$", unpriced.output, re.MULTILINE)
    assert await written(url) == before


async def test_what_a_request_id_has_matched_is_compared_once(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may name some requests and sum up the rest of their time. What is named twice was billed twice, and booked once."""
    url, file = await fresh_database(postgres), tmp_path / "usage.csv"
    async with running(url) as ledger:
        calls = [attempt(number, provider_request_id=f"req_{number}") for number in (1, 2)]
        await ledger.record(operation(Principal("acme", "ann"), created_at=timestamp(NOON), attempts=calls))
        await ledger.record(operation(Principal("globex", "eve"), created_at=timestamp(NOON), attempts=[attempt()]))
    row = "2026-10-08,claude-haiku-4-5-20251001,{},0,0,0,{},{}\n"
    named, others = row.format(100, 10, "req_1"), row.format(200, 20, "")
    mixed = await result(url, file, HEADER + named + others, monkeypatch)
    turned = await result(url, file, HEADER + others + named, monkeypatch)
    twice = await result(url, file, HEADER + named + named, monkeypatch)
    split = await result(url, file, HEADER + row.format(60, 10, "req_1") + row.format(40, 0, "req_1"), monkeypatch)

    assert [done.exit_code for done in (mixed, turned, twice, split)] == [0, 0, 1, 0], mixed.output
    assert "drift: tokens 50.000 %" in twice.output


async def test_a_time_whose_operations_are_not_kept_any_more_is_refused(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would all be missing, and nobody could say whether one ever was there; a day that is kept is compared."""
    url, file = await fresh_database(postgres), tmp_path / "usage.csv"
    async with running(url) as ledger:
        await ledger.record(
            operation(Principal("acme", "ann"), created_at=timestamp(NOON), attempts=[attempt(provider_request_id="req_1")])
        )
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("UPDATE usage_retention SET purged_before = '2026-10-08T00:00:00Z'")
    finally:
        await connection.close()
    row = "2026-10-{},claude-haiku-4-5-20251001,100,0,0,0,10,{}\n"
    kept = await result(url, file, HEADER + row.format("08", ""), monkeypatch)
    gone = [await result(url, file, HEADER + row.format("07", request_id), monkeypatch) for request_id in ("", "req_0")]

    assert [done.exit_code for done in (kept, *gone)] == [0, 2, 2]
    assert all("line 2 is of before 2026-10-08: operations of that time are not kept any more" in done.output for done in gone)
