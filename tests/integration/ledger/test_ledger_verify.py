"""The auditor: books that are whole pass, and whatever is done to a row behind the ledger's back is found, and the row named."""

import asyncio
import hashlib
import re
import secrets
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from typer.testing import CliRunner

from services.chassis.clock import SystemClock
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal
from services.ledger import postgres_schema
from services.ledger.domain import Attempt, CacheFacts, Operation, Reservation
from services.ledger.holds import Hold, HoldState, Move
from services.ledger.laws import LAWS
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_holds import PostgresHolds, resolve
from services.ledger.postgres_operations import PostgresOperations
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.postgres_sums import PostgresSums
from services.ledger.verify import FIRST_BROKEN, verify
from services.local.command import app
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import HAIKU, SetClock, fresh_database

LONG = ("anthropic", "claude-haiku-5-5")
ANN, BOB = Principal("acme", "ann", api_key_id="key-1"), Principal("acme", "bob")
EVE = Principal("globex, 4:acme", "eve")


async def fill(database: Database) -> None:
    """Books of two tenants with a hold in every state, a recorded operation of two attempts, and one that had no hold."""
    clock = SetClock(datetime(2026, 11, 30, 23, 59, tzinfo=UTC))
    prices = PostgresPrices(database, clock)
    holds = PostgresHolds(database, prices, clock)
    operations = PostgresOperations(database, holds, prices, clock)

    async def reserve(principal: Principal, operation_id: uuid.UUID | None = None, attempt: int = 1) -> uuid.UUID:
        held = await holds.reserve(principal, Reservation(operation_id or uuid.uuid4(), attempt, *HAIKU, 1000, 1000, 60_000))
        return uuid.UUID(held.hold_id)

    async def record(principal: Principal, operation_id: uuid.UUID, *attempts: Attempt) -> None:
        facts = {"tenant": principal.tenant, "user": principal.user, "api_key_id": principal.api_key_id}
        await operations.record(
            Operation(str(operation_id), status="done", created_at=clock.now(), cache=CacheFacts("miss"), attempts=attempts, **facts)
        )

    late = uuid.uuid4()
    for principal in (ANN, BOB, EVE):
        await reserve(principal, late if principal is ANN else None)
    clock.moment += timedelta(hours=1)
    while await holds.expire_one(0):
        pass
    await record(ANN, late, Attempt(1, "", *HAIKU, Usage(output_tokens=3)))
    for principal in (ANN, BOB, EVE):
        await reserve(principal)
        await holds.settle(principal, await reserve(principal), Usage(400, 50), estimated=False)
        await holds.void(principal, await reserve(principal))
        twice = uuid.uuid4()
        await reserve(principal, twice, 1)
        await reserve(principal, twice, 2)
        await record(principal, twice, Attempt(1, "", *HAIKU, Usage(), not_sent=True), Attempt(2, "", *HAIKU, Usage(10, 2000)))
        await record(principal, uuid.uuid4(), Attempt(1, "", HAIKU[0], f"{HAIKU[1]}-20251001", Usage(10, 10)))
    # One call of every kind of token and beyond the bound of long prompts, and one in a name that is the provider's own.
    await record(ANN, uuid.uuid4(), Attempt(1, "", *LONG, Usage(100_001, 777, 70_003, 40_009, 10_007)))
    named = uuid.uuid4()
    await reserve(ANN, named)
    await record(ANN, named, Attempt(1, "", HAIKU[0], "their-name-for-it", Usage(10, 10), estimated=True))
    await PostgresSums(database).roll(8)


@pytest.fixture(scope="module")
async def filled(postgres: Postgres) -> str:
    """The address of whole books that no test touches."""
    url = await fresh_database(postgres)
    async with opened(url, connections_max=2, wait_s=10) as database:
        await postgres_schema.prepare(database)
        await fill(database)
    return url


@pytest.fixture
async def books(postgres: Postgres, filled: str) -> AsyncIterator[str]:
    """A copy of them to tamper with."""
    name, original = f"ledger_{secrets.token_hex(6)}", filled.rsplit("/", 1)[1]
    connection = await asyncpg.connect(postgres.url)
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {original}")
        yield filled.rsplit("/", 1)[0] + f"/{name}"
        await connection.execute(f"DROP DATABASE {name}")
    finally:
        await connection.close()


async def tamper(url: str, *statements: str) -> str:
    """Change rows as nobody but the owner of the server can, with every trigger and reference off; return what the last one returns."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SET session_replication_role = replica")
        returned = None
        for statement in statements:
            returned = await connection.fetchval(statement)
        return str(returned)
    finally:
        await connection.close()


async def test_whole_books_pass_and_every_law_was_held_against_something(filled: str) -> None:
    """Nothing is found, and no law passed only because there was nothing to look at."""
    findings = await verify(filled)

    assert [(finding.law, finding.at, finding.wrong) for finding in findings if finding.broken] == []
    assert [finding.law for finding in findings] == [law.text for law in LAWS]
    assert min(finding.rows for finding in findings) > 0


async def test_no_law_looks_up_row_after_row(books: str) -> None:
    """The bad row that is asked for is mostly not there, so all rows are read: no way is taken that is good for the first one only."""
    async with opened(books, connections_max=2, wait_s=10) as database:
        prices = PostgresPrices(database, SystemClock())
        recorder = PostgresOperations(database, PostgresHolds(database, prices), prices, SystemClock())
        facts = {"tenant": "acme", "user": "ann", "status": "done", "cache": CacheFacts("miss")}
        for number in range(8):
            at = datetime(2026, 11, 1 + number, tzinfo=UTC)
            calls = (Attempt(1, "", *HAIKU, Usage(10, 10)),)
            await recorder.record_all([Operation(str(uuid.uuid4()), created_at=at, attempts=calls, **facts) for _ in range(250)])
    connection = await asyncpg.connect(books)
    looked_up: dict[str, int] = {}

    def look(node: dict[str, Any], law: str) -> None:
        if "Index" in node["Node Type"]:
            looked_up[law] = max(looked_up.get(law, 0), node["Actual Loops"])
        for below in node.get("Plans", ()):
            look(below, law)

    try:
        await connection.execute("VACUUM ANALYZE")
        for law in LAWS:
            plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {FIRST_BROKEN.format(law.broken)}")
            look(orjson.loads(plan)[0]["Plan"], law.text)
    finally:
        await connection.close()

    assert {law: times for law, times in looked_up.items() if times > 100} == {}


FIRST = "posting_id = (SELECT min(posting_id) FROM entries WHERE kind = 'settle' AND tenant = 'acme')"
A_LINK = "tenant = 'acme' AND commit_number = 5"
SETTLED = (
    f"(SELECT hold_id FROM holds WHERE state = 'settled' AND cost_nanousd > 0 AND model = '{HAIKU[1]}'"
    " ORDER BY created_at, hold_id LIMIT 1)"
)
TAMPERINGS = {
    "one amount": (
        f"UPDATE entries SET amount_nanousd = amount_nanousd + 1 WHERE {FIRST} AND account = 'spent' RETURNING posting_id",
        "entries posting_id={}: sums to 1",
    ),
    "a posting that still sums to zero": (
        f"UPDATE entries SET amount_nanousd = 2 * amount_nanousd WHERE {FIRST} RETURNING posting_id",
        "posting_id={}: the hash is not",
    ),
    "when it was booked": (
        f"UPDATE entries SET booked_at = booked_at + interval '1 microsecond' WHERE {FIRST} RETURNING posting_id",
        "posting_id={}: the hash is not",
    ),
    "what it was booked as": (
        f"UPDATE entries SET kind = 'void' WHERE {FIRST} RETURNING posting_id",
        "posting_id={}: the hash is not",
    ),
    "whose it is": (
        f"UPDATE entries SET tenant = 'globex' WHERE {FIRST} RETURNING posting_id",
        "entries posting_id={} account=available: is of tenant globex",
    ),
    "a posting taken out": (
        f"DELETE FROM entries WHERE {FIRST} RETURNING posting_id",
        "the entries of posting {} are gone",
    ),
    "a posting slipped in": (
        "INSERT INTO entries SELECT 999999, account, tenant, hold_id, operation_id, 'correct', amount_nanousd, booked_at FROM entries"
        f" WHERE {FIRST} RETURNING posting_id",
        "entries posting_id={}: is not in the chain",
    ),
    "a hash": (
        f"UPDATE chain_links SET hash = sha256(hash) WHERE {A_LINK} RETURNING commit_number",
        "chain_links tenant=acme commit_number={} posting_id=",
    ),
    "a commit number": (
        f"UPDATE chain_links SET commit_number = 999 WHERE {A_LINK} RETURNING 6",
        "chain_links tenant=acme commit_number={}: follows number 4",
    ),
    "the last posting with its link": (
        "WITH last AS (DELETE FROM chain_links WHERE posting_id = (SELECT max(posting_id) FROM entries WHERE tenant = 'acme') RETURNING *),"
        " gone AS (DELETE FROM entries WHERE posting_id IN (SELECT posting_id FROM last)) SELECT commit_number FROM last",
        "chain_heads tenant=acme: says that the last number is {}",
    ),
    "the head": (
        "UPDATE chain_heads SET hash = sha256(hash) WHERE tenant = 'acme' RETURNING tenant",
        "chain_heads tenant={}: the hash is not that of the last link",
    ),
    "the head taken away": ("DELETE FROM chain_heads WHERE tenant = 'acme' RETURNING tenant", "chain_heads tenant={}: says that the last"),
    "a hold's cost": (
        f"UPDATE holds SET cost_nanousd = 1 WHERE hold_id = {SETTLED} RETURNING hold_id",
        "holds hold_id={}: is settled at 1 of",
    ),
    "a hold's state": (f"UPDATE holds SET state = 'voided' WHERE hold_id = {SETTLED} RETURNING hold_id", "holds hold_id={}: is voided at"),
    "a hold opened again": (
        f"UPDATE holds SET state = 'reserved', resolved_at = NULL, cost_nanousd = 0 WHERE hold_id = {SETTLED} RETURNING hold_id",
        "holds hold_id={}: is reserved at 0",
    ),
    "a hold taken away": (
        f"DELETE FROM holds WHERE hold_id = {SETTLED} RETURNING operation_id",
        "operation {}, and its hold of tenant (gone)",
    ),
    "an attempt's cost": (
        "UPDATE attempts SET cost_nanousd = 1 WHERE (tenant, operation_id, attempt) = (SELECT tenant, operation_id, attempt FROM attempts"
        " WHERE attempt = 2 LIMIT 1) RETURNING operation_id",
        "operation_id={} attempt=2: costs 1, and hold",
    ),
    "an operation's cost": (
        "UPDATE operations SET cost_nanousd = 1 WHERE operation_id = (SELECT operation_id FROM attempts LIMIT 1) RETURNING operation_id",
        "operation_id={}: costs 1, and its attempts",
    ),
    "an operation's id": (
        "UPDATE operation_ids SET created_at = '2026-01-01' WHERE operation_id = (SELECT operation_id FROM attempts LIMIT 1)"
        " RETURNING operation_id",
        "operations tenant=",
    ),
    "an operation's id taken away": (
        "DELETE FROM operation_ids WHERE operation_id = (SELECT operation_id FROM attempts LIMIT 1) RETURNING operation_id",
        "operation_id={}: is of 2026-12-01 00:59:00+00, and its id says (gone)",
    ),
    "a counter": (
        "UPDATE spending SET spent_nanousd = spent_nanousd + 1 WHERE scope = 'user' AND subject = 'bob' AND period = 'month'"
        " AND period_start = '2026-11-01' RETURNING subject",
        "spending tenant=acme scope=user subject={} period=month period_start=2026-11-01: says",
    ),
    "a counter taken away": (
        "DELETE FROM spending WHERE scope = 'key' AND period = 'day' AND period_start = '2026-12-01' RETURNING subject",
        "spending tenant=acme scope=key subject={} period=day period_start=2026-12-01: says 0 spent and 0 held",
    ),
    "the user of a hold": (
        f"UPDATE holds SET user_id = 'bob' WHERE hold_id = {SETTLED} AND user_id <> 'bob' OR hold_id = (SELECT hold_id FROM holds WHERE"
        " user_id = 'ann' AND state = 'settled' LIMIT 1) RETURNING user_id",
        "spending tenant=acme scope=user subject=ann",
    ),
    "what a hold used": (
        f"UPDATE holds SET output_tokens = output_tokens + 1 WHERE hold_id = {SETTLED} RETURNING hold_id",
        "holds hold_id={}: is settled and cost",
    ),
    "one kind of tokens for another": (
        "UPDATE holds SET cache_write_1h_tokens = cache_write_1h_tokens - 1 WHERE cache_write_1h_tokens > 0 RETURNING hold_id",
        "holds hold_id={}: is settled and cost",
    ),
    "what a call that was given back used": (
        "UPDATE holds SET input_tokens = 1 WHERE hold_id = (SELECT hold_id FROM holds WHERE state = 'voided' LIMIT 1) RETURNING hold_id",
        "holds hold_id={}: is voided and cost 0",
    ),
    "the model of a hold": (
        f"UPDATE holds SET model = 'claude-haiku-5-5' WHERE hold_id = {SETTLED} RETURNING hold_id",
        "holds hold_id={}: is of claude-haiku-5-5 of anthropic, and its price of",
    ),
    "the price of a hold": (
        "UPDATE holds SET price_id = (SELECT price_id FROM prices WHERE model = 'claude-haiku-5-5')"
        f" WHERE hold_id = {SETTLED} RETURNING hold_id",
        "holds hold_id={}: is of claude-haiku-4-5 of anthropic, and its price of claude-haiku-5-5",
    ),
    "a price": (
        "UPDATE prices SET output_nanousd_per_mtok = output_nanousd_per_mtok + 1000000 WHERE model = 'claude-haiku-4-5' RETURNING ''",
        " and cost ",
    ),
    "a price for long prompts": (
        f"UPDATE prices SET long_input_nanousd_per_mtok = long_input_nanousd_per_mtok + 1000000 WHERE model = '{LONG[1]}'"
        f" RETURNING (SELECT hold_id FROM holds WHERE model = '{LONG[1]}')",
        "holds hold_id={}: is settled and cost",
    ),
    "a price taken away": (
        "DELETE FROM prices WHERE model = 'claude-haiku-4-5' RETURNING ''",
        "is of claude-haiku-4-5 of anthropic, and its price of",
    ),
    **{
        f"an attempt's {column}": (
            f"UPDATE attempts SET {column} = {changed} WHERE (tenant, operation_id, attempt) ="
            " (SELECT tenant, operation_id, attempt FROM attempts WHERE attempt = 2 LIMIT 1) RETURNING operation_id",
            "operation_id={} attempt=2: used",
        )
        for column, changed in {
            **{name: f"{name} + 1" for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")},
            "provider": "'openai'",
            "model": "'claude-haiku-5-5'",
            "price_version": "price_version + 1",
            "estimated": "NOT estimated",
        }.items()
    },
    **{
        f"an operation's {column}": (
            f"UPDATE operations SET {column} = {column} + 1 WHERE operation_id = (SELECT operation_id FROM attempts LIMIT 1)"
            " RETURNING operation_id",
            "operation_id={}: used",
        )
        for column in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")
    },
    "an operation's model": (
        "UPDATE operations o SET model = 'another' WHERE NOT EXISTS (SELECT FROM usage_unrolled u WHERE u.operation_id = o.operation_id)"
        " RETURNING ''",
        "usage_hours ",
    ),
    **{
        f"the sums in {table}": (
            f"UPDATE {table} SET output_tokens = output_tokens + 1 WHERE ctid = (SELECT max(ctid) FROM {table}) RETURNING tenant",
            f"{table} tenant={{}}",
        )
        for table in ("usage_hours", "usage_days", "usage_user_days")
    },
    "a call that was sent and now was not": (
        "UPDATE attempts SET not_sent = true WHERE attempt = 2 AND operation_id = (SELECT operation_id FROM attempts WHERE attempt = 2"
        " LIMIT 1) RETURNING operation_id",
        "operation_id={}: tells of 1 calls, and 0 of its attempts were sent",
    ),
    "a measured call that now is counted by us": (
        "WITH a AS (UPDATE attempts SET estimated = true WHERE attempt = 2 AND operation_id = (SELECT operation_id FROM attempts WHERE"
        " attempt = 2 LIMIT 1) RETURNING operation_id, hold_id), h AS (UPDATE holds SET estimated = true FROM a WHERE holds.hold_id ="
        " a.hold_id) SELECT operation_id FROM a",
        "operation_id={}: does not say that it is estimated, and an attempt is",
    ),
    "sums taken away": ("DELETE FROM usage_user_days RETURNING ''", ": says operations 0, not"),
    "an operation that is in the sums": (
        "INSERT INTO usage_unrolled SELECT tenant, operation_id, created_at FROM operations ON CONFLICT DO NOTHING RETURNING ''",
        "usage_hours tenant=",
    ),
}


@pytest.mark.parametrize("done", TAMPERINGS)
async def test_a_row_that_was_tampered_with_is_found_and_named(books: str, done: str) -> None:
    """One statement behind the ledger's back, whichever row it touches, is found, and the first finding says where."""
    statement, expected = TAMPERINGS[done]
    key = await tamper(books, statement)
    found = [f"{finding.at}: {finding.wrong}" for finding in await verify(books) if finding.broken]

    assert key != "None"
    assert expected.format(key) in found[0]


async def test_a_negative_counter_is_found_even_if_it_adds_up(books: str) -> None:
    """The check on the column is one lock, the auditor the other."""
    await tamper(
        books,
        "ALTER TABLE spending DROP CONSTRAINT spending_held_nanousd_check",
        "INSERT INTO spending VALUES ('acme', 'user', 'zoe', 'day', '2026-12-01', 0, -1)",
    )
    found = [finding.at for finding in await verify(books) if finding.broken]

    assert found == ["spending tenant=acme scope=user subject=zoe period=day period_start=2026-12-01"]


async def test_the_chain_can_be_replayed_by_anybody(filled: str) -> None:
    """The hash is what the schema says it is, computed here from the rows without a line of the ledger's own."""
    connection = await asyncpg.connect(filled)
    try:
        entries = await connection.fetch("SELECT *, extract(epoch FROM booked_at) AS at FROM entries")
        links = await connection.fetch("SELECT tenant, commit_number, posting_id, hash FROM chain_links ORDER BY tenant, commit_number")
    finally:
        await connection.close()
    postings = defaultdict(list)
    for entry in entries:
        postings[entry["posting_id"]].append(entry)
    before: dict[str, bytes] = defaultdict(lambda: bytes(32))
    for link in links:
        rows = sorted(postings.pop(link["posting_id"]), key=lambda row: row["account"])
        one, tenant = rows[0], link["tenant"]
        micros = int(one["at"] * Decimal(10**6))
        line = f"{len(tenant.encode())}:{tenant} {link['commit_number']} {link['posting_id']} {one['hold_id']} {one['operation_id']}"
        line += f" {one['kind']} {micros} " + " ".join(f"{row['account']}={row['amount_nanousd']}" for row in rows)
        before[tenant] = hashlib.sha256(before[tenant] + line.encode()).digest()
        assert before[tenant] == link["hash"]

    assert postings == {}


async def test_what_was_booked_before_there_was_a_chain_is_chained_when_it_comes(postgres: Postgres) -> None:
    """A database of the former version, with holds and entries in it, is whole after the migrations, and goes on."""
    url = await fresh_database(postgres)
    steps = postgres_schema.migrations()
    connection = await asyncpg.connect(url)
    try:
        await postgres_schema.apply(connection, steps[:6])
        await connection.execute(  # as that version wrote it: the plans of today have columns that came later
            "INSERT INTO plans (tenant, name, requests_per_minute, tokens_per_minute, concurrent_answers, monthly_budget_nanousd, tiers)"
            " VALUES ('', 'free', 600, 4000000, 40, 5000000000, '{fast}')"
        )
        await postgres_schema.load_prices(connection, postgres_schema.listed_prices())
        price_id = await connection.fetchval("SELECT price_id FROM prices WHERE (provider, model) = ($1, $2)", *HAIKU)
        for user in ("ann", "bob"):
            for tokens in range(3):
                held = await connection.fetchval(
                    "SELECT hold_id FROM reserve_hold('acme', $1, '', gen_random_uuid(), 1, $2, $3, $4, 7000, 1, 1, '1 minute', now())",
                    *(user, *HAIKU, price_id),
                )
                after = Hold(str(held), 7000, Price(*HAIKU), HoldState.SETTLED, Usage(tokens), tokens * 1000)
                await resolve(connection, [Move(after, "settle", held_nanousd=-7000, spent_nanousd=tokens * 1000)], None)
        await postgres_schema.apply(connection, steps)
        assert await connection.fetchval("SELECT commit_number FROM chain_heads WHERE tenant = 'acme'") == 12
    finally:
        await connection.close()
    async with opened(url, connections_max=2, wait_s=10) as database:
        await postgres_schema.prepare(database)
        await fill(database)

    assert [finding for finding in await verify(url) if finding.broken] == []


async def test_every_way_to_write_entries_is_checked(books: str) -> None:
    """An entry of another tenant than its hold's is refused, and so is a second statement for the same posting."""
    connection = await asyncpg.connect(books)
    copied = "SELECT {}, account, {}, hold_id, operation_id, 'correct', amount_nanousd, booked_at FROM entries WHERE posting_id = $1"
    try:
        posting = await connection.fetchval(f"SELECT posting_id FROM entries WHERE {FIRST}")
        with pytest.raises(asyncpg.CheckViolationError, match="not of its hold's tenant"):
            await connection.execute(f"INSERT INTO entries {copied.format(999999, repr('globex'))}", posting)
        with pytest.raises(asyncpg.UniqueViolationError):
            await connection.execute(f"INSERT INTO entries {copied.format('posting_id', 'tenant')}", posting)
        for statement in ("UPDATE chain_links SET commit_number = 1", "DELETE FROM chain_links", "TRUNCATE chain_links"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(statement)
    finally:
        await connection.close()


def verified(url: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ledger", "verify"], env={"DATABASE_URL": url})
    return result.exit_code, result.output


async def test_the_command_says_what_it_checked_and_names_the_bad_row(books: str) -> None:
    """Exit code 0 and a count for each law; after a tampering, exit code 1 and the row."""
    code, said = await asyncio.to_thread(verified, books)
    assert (code, len(re.findall(r"^ok +[1-9]\d* ", said, re.MULTILINE))) == (0, len(LAWS))

    key = await tamper(books, TAMPERINGS["a hold's cost"][0])
    code, said = await asyncio.to_thread(verified, books)
    assert code == 1
    assert f"holds hold_id={key}: is settled at 1 of" in said


def test_a_database_that_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    """Nobody listens there, and no state directory names another."""
    result = CliRunner().invoke(app, ["ledger", "verify"], env={"DATABASE_URL": "postgresql://a:b@127.0.0.1:1/none"})
    assert (result.exit_code, str(result.exception or result.output).count("\n")) == (1, 0)
    result = CliRunner().invoke(app, ["ledger", "verify"], env={"DATABASE_URL": "", "TAILRACE_STATE_DIR": str(tmp_path)})
    assert result.exit_code == 1
