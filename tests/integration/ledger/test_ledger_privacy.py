"""Erasing a user: nothing leads back to them, the money stays, and who comes afterwards is somebody else."""

import asyncio
import secrets
import uuid
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from services.chassis.errors import NotAllowed, NotFound, Overloaded
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger.postgres_database import opened
from services.ledger.postgres_sums import PostgresSums
from services.ledger.roller import roll_all
from services.ledger.rpc.privacy import PAGE
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import RECORDER, Ledger, attempt, operation, until

COST = 100 * 1000 + 10 * 5000


async def traces(url: str, *texts: str) -> dict[str, int]:
    """Tables with a row that has any of the texts in any column, and how many rows."""
    connection = await asyncpg.connect(url)
    try:
        names = [row["tablename"] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        query = "SELECT count(*) FROM {} t WHERE EXISTS (SELECT FROM unnest($1::text[]) x WHERE strpos(t::text, x) > 0)"
        found = {name: await connection.fetchval(query.format(name), list(texts)) for name in names}
    finally:
        await connection.close()
    return {name: count for name, count in found.items() if count}


async def rolled(ledger: Ledger) -> None:
    async with opened(ledger.url, connections_max=2, wait_s=5) as database:
        await roll_all(PostgresSums(database))


async def months(ledger: Ledger, boss: Principal) -> list[Any]:
    request = pb.PutBudgetRequest(scope="tenant", subject=boss.tenant, period="month", limit_nanousd=10**12)
    budget = (await ledger.ask("PutBudget", request, boss)).budget
    return [budget.spent_nanousd, budget.held_nanousd]


async def test_content_goes_and_money_stays_without_a_name(ledger: Ledger, boss: Principal, bob: Principal) -> None:
    """No table has the user's id, session, key or words any more; sums and books are what they were; again changes nothing."""
    name, session, words = (f"{kind}-{secrets.token_hex(8)}" for kind in ("user", "session", "words"))
    key = (await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name=words, user=name, roles=["user"]), boss)).key
    ann = Principal(boss.tenant, name, api_key_id=key.key_id)
    await ledger.ask("PutUser", pb.PutUserRequest(user=name, display_name=words), boss)
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user=name, plan="pro"), boss)
    for scope, subject in (("user", name), ("key", key.key_id)):
        await ledger.ask("PutBudget", pb.PutBudgetRequest(scope=scope, subject=subject, period="day", limit_nanousd=10**12), boss)
    turn = pb.Turn(answer_id=str(uuid.uuid4()), question=words, text=words, complete=True)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=session, turn=turn), ann)
    held_for = str(uuid.uuid4())
    await ledger.reserve(ann, held_for)
    mine = [operation(ann, session_id=session, api_key_id=key.key_id, attempts=[attempt()]) for _ in range(3)]
    await ledger.record(operation(ann, held_for, api_key_id=key.key_id, attempts=[attempt()]), *mine, operation(bob, attempts=[attempt()]))
    await rolled(ledger)
    await ledger.record(operation(ann, api_key_id=key.key_id, attempts=[attempt()]))  # not in the sums yet
    before = [await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=["day", "model"]), boss), await months(ledger, boss)]
    seen = await traces(ledger.url, name, session, words, key.key_id)
    erased = await ledger.ask("EraseUser", pb.EraseUserRequest(user=name), boss)
    await rolled(ledger)
    after = [await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=["day", "model"]), boss), await months(ledger, boss)]

    assert {"users", "turns", "sessions", "api_keys", "budgets", "spending", "holds", "operations", "usage_user_days"} <= set(seen)
    assert erased.erased
    assert await traces(ledger.url, name, session, words, key.key_id) == {}
    assert after == before
    assert before[1] == [6 * COST, 0]
    assert not (await ledger.ask("EraseUser", pb.EraseUserRequest(user=name), boss)).erased
    by_user = {row.group["user"]: row.operations for row in await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=["user"]), boss)}
    assert sorted(by_user.values()) == [1, 5]
    pseudonym = max(by_user, key=lambda user: by_user[user])
    assert pseudonym.startswith("erased-")

    again = Principal(boss.tenant, name)
    assert await ledger.rows("ListOperations", pb.ListOperationsRequest(), again) == []
    assert await ledger.rows("ListSessions", pb.ListSessionsRequest(), again) == []
    assert (await ledger.ask("GetEntitlements", pb.GetEntitlementsRequest(), again)).plan.name == "free"
    request = pb.PutBudgetRequest(scope="user", subject=name, period="month", limit_nanousd=1)
    assert (await ledger.ask("PutBudget", request, boss)).budget.spent_nanousd == 0


async def test_the_words_of_an_answer_that_was_under_way_do_not_come_back(ledger: Ledger, boss: Principal) -> None:
    """Its user was erased while it ran: its turn comes too late, and leaves no trace either, not even of who it was."""
    name, words = (f"{kind}-{secrets.token_hex(8)}" for kind in ("user", "words"))
    ann, asked_at = Principal(boss.tenant, name), datetime.now(UTC)

    async def append(created_at: datetime) -> None:
        turn = pb.Turn(answer_id=str(uuid.uuid4()), question=words, text=words, complete=True, created_at=timestamp(created_at))
        await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=words, turn=turn), ann)

    await append(asked_at)
    await ledger.ask("EraseUser", pb.EraseUserRequest(user=name), boss)
    with pytest.raises(NotFound):
        await append(asked_at)
    assert await traces(ledger.url, name, words) == {}

    await append(datetime.now(UTC))  # by somebody else of the same id
    assert set(await traces(ledger.url, name, words)) == {"users", "sessions", "turns"}


async def test_a_record_that_comes_after_the_erasure_is_booked_without_a_name(ledger: Ledger, boss: Principal, bob: Principal) -> None:
    """It was accepted before, and waited in a spool: its money is booked, beside that of others in its batch, and again changes nothing."""
    name, session = (f"{kind}-{secrets.token_hex(8)}" for kind in ("user", "session"))
    ann = Principal(boss.tenant, name)
    facts: dict[str, Any] = {"session_id": session, "api_key_id": f"key-of-{name}"}
    called, cached = operation(ann, attempts=[attempt()], **facts), operation(ann, **facts)
    await ledger.record(operation(ann))
    await ledger.ask("EraseUser", pb.EraseUserRequest(user=name), boss)
    acks = await ledger.record(called, cached, operation(bob, attempts=[attempt()]))
    again = await ledger.record(called, cached)
    await rolled(ledger)

    assert [ack.cost_nanousd for ack in acks] == [COST, 0, COST]
    assert [(ack.duplicate, ack.cost_nanousd) for ack in again] == [(True, COST), (True, 0)]
    assert await traces(ledger.url, name, session) == {}
    assert await months(ledger, boss) == [2 * COST, 0]

    await ledger.record(operation(ann))  # by somebody else of the same id
    assert len(await ledger.rows("ListOperations", pb.ListOperationsRequest(), ann)) == 1


@pytest.mark.parametrize("comes_again", [False, True])
async def test_a_summary_that_meets_the_erasure_does_not_stay(ledger: Ledger, boss: Principal, comes_again: bool) -> None:
    """It waits for the erasure and hears that there is no such turn, though another user of the same id has begun the conversation anew."""
    name, words = (f"{kind}-{secrets.token_hex(8)}" for kind in ("user", "words"))
    ann, answer_id = Principal(boss.tenant, name), str(uuid.uuid4())
    turn = pb.Turn(answer_id=answer_id, question=words, text=words, complete=True)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s", turn=turn), ann)
    message = pb.Summary(through_answer_id=answer_id, text=words, made_by="claude-haiku-4-5")
    connection = await asyncpg.connect(ledger.url)
    try:
        async with connection.transaction():
            assert await connection.fetchval("SELECT erase_user($1, $2)", boss.tenant, name) == "erased"
            if comes_again:
                turns = (boss.tenant, name, "s", uuid.uuid4(), "another question")
                await connection.execute("SELECT append_turn($1, $2, $3, $4, $5, '', '[]', true, clock_timestamp(), 'title', NULL)", *turns)
            putting = asyncio.create_task(ledger.ask("PutSummary", pb.PutSummaryRequest(session_id="s", summary=message), ann))

            async def waits() -> bool:
                query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                return bool(await connection.fetchval(query))

            await until(waits)
        with pytest.raises(NotFound):
            await putting
    finally:
        await connection.close()

    assert await traces(ledger.url, words) == {}


async def test_a_record_that_meets_the_erasure_is_erased_with_it_or_has_no_name(ledger: Ledger, boss: Principal) -> None:
    """Whichever comes first, many times over."""
    for _ in range(8):
        name = f"user-{secrets.token_hex(8)}"
        ann = Principal(boss.tenant, name)
        await ledger.record(operation(ann))
        late = [operation(ann, attempts=[attempt()]), operation(ann)]
        erased, *acks = await asyncio.gather(
            ledger.ask("EraseUser", pb.EraseUserRequest(user=name), boss), *(ledger.record(record) for record in late)
        )

        assert erased.erased
        assert [ack.cost_nanousd for (ack,) in acks] == [COST, 0]
        assert await traces(ledger.url, name) == {}


async def test_everything_that_is_kept_is_exported_and_nothing_of_others(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal
) -> None:
    """More turns and operations than a page, former subscriptions, budgets of the user and of their keys, and no secret."""
    for plan in ("pro", "enterprise"):
        await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan=plan), boss)
    made = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="n", user="ann", roles=["user"]), boss)
    of_bob = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="n", user="bob", roles=["user"]), boss)
    limited = [("user", "ann"), ("key", made.key.key_id), ("user", "bob"), ("key", of_bob.key.key_id), ("tenant", ann.tenant)]
    for scope, subject in limited:
        for period in ("day", "month"):
            limit = pb.PutBudgetRequest(scope=scope, subject=subject, period=period, limit_nanousd=10**12)
            await ledger.ask("PutBudget", limit, boss)
    for number in range(PAGE + 5):
        turn = pb.Turn(answer_id=str(uuid.uuid4()), question=f"q{number}", text="a", complete=True)
        await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=f"s{number % 2}", turn=turn), ann)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s0", turn=pb.Turn(answer_id=str(uuid.uuid4()), question="bob's")), bob)
    await ledger.record(operation(bob), *(operation(ann) for _ in range(PAGE + 5)))
    records = await ledger.rows("ExportUser", pb.ExportUserRequest(user="ann"), boss)
    kinds = [record.WhichOneof("record") for record in records]

    assert list(dict.fromkeys(kinds)) == ["user", "subscription", "budget", "api_key", "session", "turn", "operation"]
    counts = {"user": 1, "subscription": 2, "budget": 4, "api_key": 1, "session": 2, "turn": PAGE + 5, "operation": PAGE + 5}
    assert Counter(kinds) == counts
    budgets = [(record.budget.scope, record.budget.subject) for record in records if record.HasField("budget")]
    assert budgets == [limited[0], limited[0], limited[1], limited[1]]
    assert {record.turn.turn.question for record in records if record.HasField("turn")} == {f"q{number}" for number in range(PAGE + 5)}
    assert {record.operation.user for record in records if record.HasField("operation")} == {"ann"}
    assert [record.subscription.HasField("ended_at") for record in records if record.HasField("subscription")] == [True, False]
    assert not any(made.secret in str(record) for record in records)
    with pytest.raises(NotFound):
        await ledger.rows("ExportUser", pb.ExportUserRequest(user="nobody"), boss)
    with pytest.raises(NotAllowed):
        await ledger.rows("ExportUser", pb.ExportUserRequest(user="ann"), ann)


async def test_nobody_is_erased_while_money_is_set_aside(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What the answer will have cost must find its user; nothing is changed meanwhile."""
    held = await ledger.reserve(ann)
    with pytest.raises(Overloaded):
        await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), boss)
    await ledger.ask("Void", pb.VoidRequest(hold_id=held.hold_id), ann)

    assert (await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), boss)).erased


async def test_what_is_only_lent_to_a_user_is_called_back_and_is_no_reason_not_to_erase(
    ledger: Ledger, ann: Principal, boss: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orchestrators hold credit for whoever asked within the last minutes; one that has gone with it is waited for no longer than that."""
    lease = str(uuid.uuid4())
    await ledger.ask("LendCredit", pb.LendCreditRequest(lease_id=lease, tenant=ann.tenant, user="ann"), RECORDER)
    monkeypatch.setattr("services.ledger.postgres_privacy.RETURNED_POLLS_MAX", 2)
    with pytest.raises(Overloaded):
        await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), boss)
    monkeypatch.undo()
    erasing = asyncio.create_task(ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), boss))
    wanted = await ledger.ask("ListRecalledCredit", pb.ListRecalledCreditRequest(lease_ids=[lease]), RECORDER)
    await ledger.ask("ReturnCredit", pb.ReturnCreditRequest(lease_id=lease, tenant=ann.tenant, user="ann"), RECORDER)

    assert list(wanted.lease_ids) == [lease]
    assert (await erasing).erased


async def test_only_an_admin_of_the_tenant_erases(ledger: Ledger, ann: Principal, stranger: Principal) -> None:
    """One's own account neither; and a user of the same id elsewhere is not touched."""
    await ledger.record(operation(ann))
    with pytest.raises(NotAllowed):
        await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), ann)

    assert not (await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), stranger)).erased
    assert len(await ledger.rows("ListOperations", pb.ListOperationsRequest(), ann)) == 1
