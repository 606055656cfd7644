"""The second lock between tenants: with the tenant filter gone from a query, what is foreign stays unseen and untouched."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest

from services.chassis.money import Price
from services.chassis.principal import Principal
from services.ledger import holds
from services.ledger.holds import Hold
from services.ledger.postgres_database import Connection, Database, opened
from services.ledger.postgres_holds import SETTLE_AND_RESERVE, encoded, resolve
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, RECORDER, Ledger, attempt, operation

TABLES = {
    *("tenants", "users", "plans", "subscriptions", "api_keys", "prices", "budgets", "spending", "holds", "entries"),
    *("chain_heads", "chain_links", "operations", "attempts", "steps", "sessions", "turns", "deleted_sessions"),
}
VIEWS = {"members", "postings_booked", "balances"}


async def live(ledger: Ledger, user: Principal) -> None:
    """Leave rows of this tenant in every table."""
    boss = Principal(user.tenant, "boss", frozenset({"user", "admin"}))
    plan = pb.Plan(name="gold", requests_per_minute=1, tokens_per_minute=1, concurrent_answers=1, tiers=["fast"])
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=plan), boss)
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user=user.user, plan="gold"), boss)
    await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="k", user=user.user), boss)
    price = common_pb2.Price(
        provider="acme", model=f"m-{user.tenant}", input_nanousd_per_mtok=1, output_nanousd_per_mtok=1, source="a test"
    )
    await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject=user.user, period="day", limit_nanousd=10**12), boss)
    turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a", complete=True)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s0", turn=turn), user)
    await ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id="s0"), user)
    turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a", complete=True)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s1", turn=turn), user)
    record = operation(user, attempts=[attempt()])
    await ledger.reserve(user, record.operation_id)
    await ledger.record(record)


@pytest.fixture
async def database(ledger: Ledger, ann: Principal, stranger: Principal) -> AsyncIterator[Database]:
    """The database of a ledger in which two tenants have lived, as the ledger uses it."""
    for user in (ann, stranger):
        await live(ledger, user)
    async with opened(ledger.url, connections_max=2, wait_s=10) as database:
        yield database


async def tenant_relations(database: Database) -> dict[str, str]:
    """Every table and view with a tenant, and its kind."""
    rows = await database.fetch(
        "SELECT c.relname, c.relkind::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant'"
        " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND NOT c.relispartition"
    )
    return {row["relname"]: row["relkind"] for row in rows}


async def test_without_a_filter_nothing_foreign_is_seen(database: Database, ann: Principal, stranger: Principal) -> None:
    """Every table and view with a tenant, whichever migration made it: own rows and common ones, and not one of another tenant."""
    relations = await tenant_relations(database)
    assert set(relations) >= TABLES | VIEWS
    for name in relations:
        everyone = {row["tenant"] for row in await database.fetch(f"SELECT tenant FROM {name}")}
        if name in TABLES | VIEWS:
            assert everyone >= {ann.tenant, stranger.tenant}, name
        for own in (ann.tenant, stranger.tenant):
            seen = {row["tenant"] for row in await database.of(own).fetch(f"SELECT * FROM {name}")}
            assert seen <= {own, ""}, name
            if name in TABLES | VIEWS:  # of the others some come and go by themselves
                assert own in seen, name


async def test_without_a_filter_nothing_foreign_is_touched(database: Database, ann: Principal, stranger: Principal) -> None:
    """Changes and deletions pass other tenants' rows and common ones by, and nothing can be written in another's name."""
    mine = database.of(ann.tenant)
    assert await mine.fetch("UPDATE budgets SET limit_nanousd = 0 RETURNING tenant") == [(ann.tenant,)]
    assert {row["tenant"] for row in await mine.fetch("DELETE FROM plans RETURNING tenant")} == {ann.tenant}
    assert await mine.fetch("DELETE FROM turns WHERE tenant = $1 RETURNING tenant", stranger.tenant) == []
    for statement in (
        "INSERT INTO tenants (tenant) VALUES ('someone-new')",
        "INSERT INTO budgets VALUES ($$" + stranger.tenant + "$$, 'tenant', 'x', 'day', 0, now())",
        "UPDATE budgets SET tenant = $$" + stranger.tenant + "$$",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await mine.run(lambda connection, statement=statement: connection.execute(statement))


async def test_foreign_holds_are_not_resolved(database: Database, ledger: Ledger, ann: Principal, stranger: Principal) -> None:
    """resolve_holds runs in the owner's name, and still moves a tenant's own holds only, as what moves many at once does in the tenant's;
    the chain cannot be touched at all."""
    held = await ledger.reserve(stranger)
    hold = Hold(held.hold_id, held.amount_nanousd, Price(*HAIKU))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await database.self_scoped().fetch(SETTLE_AND_RESERVE, ann.tenant, encoded([holds.void(hold)]), "[]", None)
    for tenant, refused in ((ann.tenant, True), (stranger.tenant, False)):
        work = database.of(tenant).run(lambda connection: resolve(connection, [holds.void(hold)], None))
        if refused:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await work
        else:
            await work
    for table in ("chain_links", "chain_heads"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await database.of(ann.tenant).fetch(f"INSERT INTO {table} SELECT * FROM {table}")


async def test_foreign_calls_are_not_booked_late(database: Database, ledger: Ledger, ann: Principal, stranger: Principal) -> None:
    """open_late_holds and book_late run in the owner's name, and still make a tenant's own holds only, on its own leases only."""
    price_id = await database.value("SELECT price_id FROM prices WHERE (provider, model) = ($1, $2)", *HAIKU)
    call = {
        "user_id": stranger.user,
        "api_key_id": "",
        "operation_id": str(uuid.uuid4()),
        "attempt": 1,
        "provider": HAIKU[0],
        "model": HAIKU[1],
    }
    bounds = {
        "price_id": price_id,
        "input_tokens_max": 1,
        "output_tokens_max": 1,
        "amount_nanousd": 1,
        "created_at": "2026-11-01T00:00:00Z",
    }
    lease = str(uuid.uuid4())
    await ledger.ask("LendCredit", pb.LendCreditRequest(lease_id=lease, tenant=stranger.tenant, user=stranger.user), RECORDER)

    async def opened(told: dict[str, Any]) -> list[asyncpg.Record]:
        query = "SELECT tenant, lease_id, amount_nanousd FROM open_late_holds($1, NULL)"
        return await database.of(ann.tenant).fetch(query, orjson.dumps([{**call, **bounds, **told}]).decode())

    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await opened({"tenant": stranger.tenant})
    made = await opened({"tenant": ann.tenant, "user_id": ann.user, "lease_id": lease})

    assert [tuple(row) for row in made] == [(ann.tenant, None, 0)]

    async def booked(told: dict[str, Any]) -> None:
        over = {"hold_id": str(uuid.uuid4()), "state": "settled", "cost_nanousd": 0, "estimated": False, "operation_id": str(uuid.uuid4())}
        tokens = dict.fromkeys(("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"), 0)
        row = {**call, **bounds, **over, **tokens, "tenant": ann.tenant, "user_id": ann.user, "lease_id": lease, **told}
        await database.of(ann.tenant).value("SELECT book_late($1)", orjson.dumps([row]).decode())
        seen = await database.row("SELECT lease_id, amount_nanousd FROM holds WHERE hold_id = $1", uuid.UUID(row["hold_id"]))
        assert tuple(seen) == (None, 0)

    await booked({})
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await booked({"tenant": stranger.tenant, "user_id": stranger.user})


async def test_a_connection_that_entered_no_tenant_sees_nothing(database: Database) -> None:
    """The lock is shut unless it was opened: a role without a tenant has none."""
    for name, kind in (await tenant_relations(database)).items():

        async def work(connection: Connection, name: str = name) -> list[asyncpg.Record]:
            async with connection.transaction():
                await connection.execute("SET LOCAL ROLE tailrace_tenant")
                return list(await connection.fetch(f"SELECT tenant FROM {name}"))

        assert {row["tenant"] for row in await database.run(work)} <= {""}, (name, kind)


async def test_the_role_is_bound_by_row_security_and_changes_hands_with_the_connection(
    database: Database, ann: Principal, stranger: Principal
) -> None:
    """It owns nothing, bypasses nothing, and a connection that worked for one tenant works for the next one as that one."""
    role = await database.row("SELECT rolsuper, rolbypassrls, rolcanlogin, rolcreaterole FROM pg_roles WHERE rolname = 'tailrace_tenant'")
    assert tuple(role) == (False, False, False, False)
    asked = "SELECT current_user::text || ' ' || current_setting('tailrace.tenant')"
    owner = await database.value("SELECT current_user::text")
    for _ in range(5):
        for tenant in (ann.tenant, stranger.tenant, ann.tenant):
            assert await database.of(tenant).value(asked) == f"tailrace_tenant {tenant}"
        assert await database.value(asked) == f"{owner} "


async def test_setting_money_aside_and_reading_turns_enter_their_tenant_by_themselves(
    database: Database, ann: Principal, stranger: Principal
) -> None:
    """On a connection that worked for somebody else, without a round trip of their own; and it works for that one again afterwards."""
    price_id = await database.value("SELECT price_id FROM prices WHERE (provider, model) = ($1, $2)", *HAIKU)
    held = "SELECT outcome FROM reserve_hold($1, 'ann', '', gen_random_uuid(), 1, $2, $3, $4, 1000000, 0, 1, 1, 0, '1 minute', now())"
    for call, arguments in (
        (held, (ann.tenant, *HAIKU, price_id)),
        ("SELECT question FROM latest_turns($1, 'ann', 's1', 5)", (ann.tenant,)),
    ):

        async def work(connection: Connection, call: str = call, arguments: tuple[object, ...] = arguments) -> tuple[str, str]:
            async with connection.transaction():
                assert await connection.fetchval(call, *arguments) in ("held", "q")
                inside = await connection.fetchval("SELECT current_user::text || ' ' || current_setting('tailrace.tenant')")
            return inside, await connection.fetchval("SELECT current_setting('tailrace.tenant')")

        assert await database.of(stranger.tenant).run(work) == (f"tailrace_tenant {ann.tenant}", stranger.tenant)


async def test_what_is_asked_for_a_tenant_is_asked_as_that_tenant(
    ledger: Ledger, ann: Principal, boss: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every RPC that reads or writes a tenant's rows does so behind the lock; across tenants go only the price book and nothing else."""
    scopes: list[tuple[str | None, str]] = []
    real = Database.run_for

    async def noted(self: Database, scope: str | None, work: object) -> object:
        scopes.append((scope, getattr(work, "__qualname__", "")))
        return await real(self, scope, work)

    monkeypatch.setattr(Database, "run_for", noted)
    await live(ledger, ann)
    recorded = [row.operation.operation_id for row in await ledger.rows("ListOperations", pb.ListOperationsRequest(), ann)]
    await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=recorded[0]), ann)
    await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=["day"]), ann)
    await ledger.rows("ListSessions", pb.ListSessionsRequest(), ann)
    await ledger.ask("GetSession", pb.GetSessionRequest(session_id="s1"), ann)
    await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s1", limit=5), ann)
    await ledger.rows("ListUsers", pb.ListUsersRequest(), boss)
    await ledger.rows("ListPlans", pb.ListPlansRequest(), ann)
    await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope="user", subject="ann"), boss)
    await ledger.ask("Void", pb.VoidRequest(hold_id=(await ledger.reserve(ann)).hold_id), ann)
    await ledger.ask("Settle", pb.SettleRequest(hold_id=(await ledger.reserve(ann)).hold_id), ann)
    made = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="k", user="ann"), boss)
    await ledger.ask("RevokeApiKey", pb.RevokeApiKeyRequest(key_id=made.key.key_id), boss)

    assert {scope for scope, _ in scopes} == {ann.tenant, None, ""}
    assert {work.split(".")[0] for scope, work in scopes if scope == ""} <= {"read_book", "PostgresPrices", "PostgresSums"}
