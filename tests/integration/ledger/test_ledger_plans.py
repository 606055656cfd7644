"""How the ledger's statements are planned: rows are looked up by their key, however many there are and however few there were at first."""

import uuid

import asyncpg
import pytest

from services.chassis.principal import Principal
from services.local.stores import Postgres
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import attempt, fresh_database, operation, running, until, value

RECORDS = 150
LOOKED_AT_MAX = 40
"""Rows of a table that are looked at for one record: found, locked, referred to and moved, some of them several times."""


@pytest.mark.parametrize("held", [False, True], ids=["late calls", "calls with a hold"])
async def test_a_record_costs_the_same_however_many_there_are(postgres: Postgres, held: bool) -> None:
    """The plans are made, and kept, while PostgreSQL knows the tables to be empty."""
    url = await fresh_database(postgres)
    ann = Principal("mill", "ann")
    async with running(url, TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000") as ledger:
        await value(url, "VACUUM ANALYZE holds, operations, operation_ids, attempts, users, entries")
        for _ in range(RECORDS):
            record = operation(ann, attempts=[attempt()])
            if held:
                await ledger.reserve(ann, record.operation_id)
            [ack] = await ledger.record(record)
            assert not ack.rejected_reason
    # The connections are closed: what they counted is told.
    looked_at = await _looked_at(url, "holds", "operations", "operation_ids", "attempts", "users", "entries", "spending")
    assert {name: each for name, each in looked_at.items() if each > LOOKED_AT_MAX} == {}


async def test_a_turn_costs_the_same_however_many_there_are(postgres: Postgres) -> None:
    """Of other conversations of the same user."""
    url = await fresh_database(postgres)
    ann = Principal("mill", "ann")
    async with running(url, TAILRACE_LEDGER_ROLL_INTERVAL_MS="600000") as ledger:
        for number in range(RECORDS):
            turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a", complete=True)
            await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=f"s{number}", turn=turn), ann)
            assert len(await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id=f"s{number}", limit=10), ann)) == 1
    looked_at = await _looked_at(url, "turns", "sessions", "summaries", "users")
    assert {name: each for name, each in looked_at.items() if each > LOOKED_AT_MAX} == {}


async def _looked_at(url: str, *tables: str) -> dict[str, float]:
    """Rows looked at for each of what was written, by table and its parts."""
    connection = await asyncpg.connect(url)
    try:

        async def told() -> bool:
            written: int = await connection.fetchval("SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = $1", tables[0])
            return written >= RECORDS

        await until(told)
        rows = await connection.fetch(
            "SELECT relname, (seq_tup_read + coalesce(idx_tup_fetch, 0))::float / $1 AS each FROM pg_stat_user_tables"
            " WHERE regexp_replace(relname, '_(\\d{4}_\\d{2}|other)$', '') = ANY ($2)",
            RECORDS,
            list(tables),
        )
        return {row["relname"]: row["each"] for row in rows}
    finally:
        await connection.close()
