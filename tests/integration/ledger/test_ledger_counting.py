"""What is counted how: an operation is the sum of its attempts, and each question of an operator has a view that answers it."""

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from services.chassis.principal import Principal
from services.local.stores import Postgres
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, attempt, audit, fresh_database, operation, running

COST = 100 * 1000 + 10 * 5000
ANN = Principal("acme", "ann")
TODAY = datetime.now(UTC).date
CALL_SUMS = "input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, cost_nanousd"


@pytest.fixture(scope="module")
async def books(postgres: Postgres) -> AsyncIterator[Any]:
    """A connection to a ledger in which one of everything happened."""
    url = await fresh_database(postgres)
    boss = Principal("acme", "boss", frozenset({"user", "admin"}))
    async with running(url) as ledger:
        failed = attempt(error_reason="MODEL_FAILED", estimated=True)
        unsent = attempt(2, 0, 0, not_sent=True, error_reason="MODEL_OVERLOADED")
        steps = [
            common_pb2.StepTiming(name="tool", status="done", started_ms=ordinal, duration_ms=5, facts={"tool": tool, "outcome": outcome})
            for ordinal, (tool, outcome) in enumerate((("calculator", "done"), ("calculator", "done"), ("fetch_url", "failed")))
        ]
        await ledger.record(
            operation(ANN, attempts=[failed, unsent, attempt(3)], steps=steps),
            operation(ANN, status="failed", attempts=[attempt(error_reason="MODEL_FAILED")]),
            operation(ANN, cache=common_pb2.CacheReceipt(verdict="exact", saved_nanousd=9)),
            operation(ANN, cache=common_pb2.CacheReceipt(verdict="coalesced", saved_nanousd=4)),
        )
        await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject="ann", period="day", limit_nanousd=COST), boss)
        await ledger.reserve(Principal("acme", "bob"))
    assert await audit(url) == {}
    connection = await asyncpg.connect(url, server_settings={"timezone": "UTC"})
    yield connection
    await connection.close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT sum(operations), sum(attempts), sum(cache_hits), sum(coalesced) FROM usage_by_day", [(4, 3, 1, 1)]),
        ("SELECT tenant, operations, cost_nanousd FROM tenant_costs WHERE day = current_date", [("acme", 4, 3 * COST)]),
        ("SELECT model, failed, operations, failed_percent FROM model_failures", [(HAIKU[1], 1, 4, 25)]),
        ("SELECT cache_hits, coalesced, cache_saved_nanousd, prompt_cache_saved_nanousd FROM savings", [(1, 1, 13, 0)]),
        ("SELECT scope, subject, period, spent_nanousd FROM over_budget", [("user", "ann", "day", 3 * COST)]),
        ("SELECT user_id, cost_nanousd FROM estimated_operations", [("ann", 2 * COST)]),
        (
            "SELECT error_reason, attempts, not_sent, cost_nanousd FROM failed_attempts ORDER BY error_reason",
            [("MODEL_FAILED", 2, 0, 2 * COST), ("MODEL_OVERLOADED", 1, 1, 0)],
        ),
        ("SELECT tool, outcome, calls, duration_ms FROM tool_calls", [("calculator", "done", 2, 10), ("fetch_url", "failed", 1, 5)]),
        ("SELECT spent_nanousd FROM spenders WHERE scope = 'user' AND subject = 'ann'", [(3 * COST,)]),
        ("SELECT user_id, attempt, amount_nanousd, expired FROM open_holds", [("bob", 1, 7_000_000, False)]),
    ],
    ids=lambda value: value.split(" FROM ")[1].split()[0] if isinstance(value, str) else "",
)
async def test_a_view_answers_its_question(books: Any, query: str, expected: list[tuple[Any, ...]]) -> None:
    """With what happened above."""
    assert [tuple(row) for row in await books.fetch(query)] == expected


async def test_every_view_runs(books: Any) -> None:
    """No view of the schema is broken by another migration."""
    for row in await books.fetch("SELECT viewname FROM pg_views WHERE schemaname = 'public'"):
        await books.fetch(f"SELECT * FROM {row['viewname']}")


@pytest.mark.parametrize("column", [name for name in CALL_SUMS.split(", ") if name != "cache_write_1h_tokens"])
async def test_an_operation_that_is_not_the_sum_of_its_attempts_cannot_be_committed(books: Any, column: str) -> None:
    """Whoever writes it; and an attempt cannot be added to one that is whole."""
    whole = await books.fetchrow("SELECT * FROM operations WHERE cost_nanousd = $1 AND status = 'failed'", COST)
    nothing = dict.fromkeys(CALL_SUMS.split(", "), 0)
    changed = dict(whole) | {"operation_id": uuid.uuid4()} | nothing | {column: 1}
    columns, places = ", ".join(changed), ", ".join(f"${place}" for place in range(1, len(changed) + 1))
    with pytest.raises(asyncpg.CheckViolationError, match="not the sum"):
        await books.execute(f"INSERT INTO operations ({columns}) VALUES ({places})", *changed.values())
    with pytest.raises(asyncpg.CheckViolationError, match="not the sum"):
        await books.execute(
            f"INSERT INTO attempts SELECT tenant, operation_id, 7, hold_id, provider, model, provider_request_id, price_version,"
            f" {CALL_SUMS}, finish_reason, error_reason, first_token_ms, duration_ms, estimated, not_sent, created_at FROM attempts"
            " WHERE operation_id = $1",
            whole["operation_id"],
        )
