"""Credit leases: lent within what is left, drawn on without asking, booked once whatever came first, and given back."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from services.chassis.errors import BudgetExhausted, HoldAlreadyExpired, NotAllowed, NotFound
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.ledger import postgres_schema
from services.ledger.domain import Attempt, CacheFacts, Draw, Lease, Operation
from services.ledger.postgres_budgets import PostgresBudgets
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_leases import PostgresLeases, Terms
from services.ledger.postgres_operations import PostgresOperations
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.sweeper import sweep_leases
from services.local.stores import Postgres
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, RECORDER, Ledger, SetClock, attempt, audit, fresh_database, operation, settings

USD = 1_000_000_000


def new_id() -> str:
    return str(uuid.uuid4())


async def lend(ledger: Ledger, owner: Principal, lease_id: str = "", **fields: Any) -> Any:
    request = pb.LendCreditRequest(lease_id=lease_id or new_id(), tenant=owner.tenant, user=owner.user, **fields)
    return await ledger.ask("LendCredit", request, RECORDER)


async def give_back(ledger: Ledger, owner: Principal, lease_id: str, *draws: pb.LeaseDraw) -> int:
    request = pb.ReturnCreditRequest(lease_id=lease_id, tenant=owner.tenant, user=owner.user, draws=draws)
    return int((await ledger.ask("ReturnCredit", request, RECORDER)).returned_nanousd)


def drawn(operation_id: str, amount: int = 7_000_000, **fields: Any) -> pb.LeaseDraw:
    given = {"operation_id": operation_id, "attempt": 1, "provider": HAIKU[0], "model": HAIKU[1], "price_version": 1}
    return pb.LeaseDraw(**{**given, "input_tokens_max": 1000, "output_tokens_max": 1000, "amount_nanousd": amount, **fields})


async def counters(ledger: Ledger, owner: Principal, boss: Principal) -> tuple[int, int]:
    """What the user has spent and held this month."""
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject=owner.user, period="month", limit_nanousd=100 * USD), boss)
    (budget,) = (await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope="user", subject=owner.user), boss)).budgets
    return budget.spent_nanousd, budget.held_nanousd


async def hold_of(ledger: Ledger, operation_id: str) -> Any:
    connection = await asyncpg.connect(ledger.url)
    try:
        return await connection.fetchrow("SELECT * FROM holds WHERE operation_id = $1", UUID(operation_id))
    finally:
        await connection.close()


async def test_a_lease_is_held_until_it_is_given_back(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """It counts as held; the same id again prolongs it and lends nothing more; what comes back is the whole."""
    lease_id = new_id()
    lent = await lend(ledger, ann, lease_id)
    assert (await lend(ledger, ann, lease_id)).amount_nanousd == lent.amount_nanousd > 0
    assert await counters(ledger, ann, boss) == (0, lent.amount_nanousd)
    assert await give_back(ledger, ann, lease_id) == lent.amount_nanousd
    assert await give_back(ledger, ann, lease_id) == 0
    assert await counters(ledger, ann, boss) == (0, 0)

    with pytest.raises(HoldAlreadyExpired):
        await lend(ledger, ann, lease_id)


async def test_prices_travel_with_the_lease(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What the tenant pays, its own price before the common one."""
    common = next(price for price in (await lend(ledger, ann)).prices if (price.provider, price.model) == HAIKU)
    own = type(common)()
    own.CopyFrom(common)
    own.output_nanousd_per_mtok += 1
    own.ClearField("valid_from")
    await ledger.ask("PutPrice", pb.PutPriceRequest(price=own), boss)

    told = next(price for price in (await lend(ledger, ann)).prices if (price.provider, price.model) == HAIKU)
    assert (told.version, told.output_nanousd_per_mtok) == (common.version + 1, common.output_nanousd_per_mtok + 1)


async def test_a_lease_takes_a_small_part_of_what_is_left_and_of_nearly_nothing_a_tenth(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal
) -> None:
    """One per cent within its bounds; the least of all budgets counts; of an empty one nothing is lent."""
    plan = pb.Plan(name="open", requests_per_minute=9, tokens_per_minute=9, concurrent_answers=9, tiers=["fast"])
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=plan), boss)
    for user in ("ann", "bob"):
        await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user=user, plan="open"), boss)

    async def lent_of(limit: int, owner: Principal = ann, scope: str = "user") -> int:
        subject = owner.user if scope == "user" else owner.tenant
        await ledger.ask("PutBudget", pb.PutBudgetRequest(scope=scope, subject=subject, period="day", limit_nanousd=limit), boss)
        lease_id = new_id()
        amount = int((await lend(ledger, owner, lease_id)).amount_nanousd)
        await give_back(ledger, owner, lease_id)
        return amount

    lease_id = new_id()
    assert (await lend(ledger, ann, lease_id)).amount_nanousd == 10 * USD
    await give_back(ledger, ann, lease_id)
    assert await lent_of(100 * USD) == 1 * USD
    assert await lent_of(10_000 * USD) == 10 * USD
    assert await lent_of(10 * USD) == USD // 4
    assert await lent_of(1 * USD) == USD // 10
    assert await lent_of(2 * USD, bob, "tenant") == USD // 5
    with pytest.raises(BudgetExhausted):
        await lent_of(9)


async def test_what_is_lent_cannot_be_reserved_by_anybody_else(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """The lease was debited first: what is left for others is less by it, to the nano-USD."""
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="tenant", subject="", period="month", limit_nanousd=70_000_000), boss)
    lent = (await lend(ledger, ann)).amount_nanousd
    admitted = 0
    with pytest.raises(BudgetExhausted) as refused:
        for _ in range(20):
            await ledger.reserve(ann)
            admitted += 1

    assert lent == 7_000_000
    assert admitted == 9
    assert refused.value.metadata["left_nanousd"] == "0"


async def shared_budget(ledger: Ledger, boss: Principal, limit: int) -> None:
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="tenant", subject="", period="month", limit_nanousd=limit), boss)


async def recalled(ledger: Ledger, *lease_ids: str) -> set[str]:
    return set((await ledger.ask("ListRecalledCredit", pb.ListRecalledCreditRequest(lease_ids=lease_ids), RECORDER)).lease_ids)


async def test_however_many_share_a_budget_half_of_it_is_never_lent(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A lease is a tenth of what is left beyond all that is lent. It used to be a tenth of what is left, until nearly nothing was."""
    await shared_budget(ledger, boss, 1_000_000)
    amounts = [int((await lend(ledger, replace(ann, user=f"u{number}"))).amount_nanousd) for number in range(20)]

    assert amounts[:3] == [100_000, 80_000, 64_000]
    assert 480_000 < sum(amounts) < 500_000


async def test_what_is_lent_is_called_back_for_who_was_turned_away(ledger: Ledger, ann: Principal, bob: Principal, boss: Principal) -> None:
    """All leases of the budget that refused, of whichever user, and no others; they can be neither prolonged nor replaced for a while."""
    await shared_budget(ledger, boss, 70_000_000)
    lease_id, own = new_id(), new_id()
    lent = (await lend(ledger, bob, lease_id)).amount_nanousd + (await lend(ledger, ann, own)).amount_nanousd
    assert await recalled(ledger, lease_id, own, new_id()) == set()
    for _ in range(8):
        await ledger.reserve(ann)
    with pytest.raises(BudgetExhausted) as refused:
        await ledger.reserve(ann)
    assert refused.value.metadata["lent_nanousd"] == str(lent)
    assert await recalled(ledger, lease_id, own, new_id()) == {lease_id, own}
    with pytest.raises(HoldAlreadyExpired):
        await lend(ledger, bob, lease_id)
    await give_back(ledger, bob, lease_id)
    await give_back(ledger, ann, own)
    with pytest.raises(BudgetExhausted):
        await lend(ledger, bob)
    await ledger.reserve(ann)

    assert await recalled(ledger, lease_id, own) == set()
    assert await audit(ledger.url) == {}


async def test_a_users_exhausted_budget_calls_back_that_users_leases_only(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal
) -> None:
    """And those of another tenant least of all."""
    stranger = Principal("elsewhere", "ann")
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject="ann", period="month", limit_nanousd=7_000_000), boss)
    leases = {owner: new_id() for owner in (ann, bob, stranger)}
    for owner, lease_id in leases.items():
        await lend(ledger, owner, lease_id)
    with pytest.raises(BudgetExhausted) as refused:
        await ledger.reserve(ann)
    await give_back(ledger, ann, leases[ann])

    assert refused.value.metadata["lent_nanousd"] == "700000"
    assert await recalled(ledger, *leases.values()) == set()
    assert (await lend(ledger, bob, leases[bob])).amount_nanousd > 0
    assert (await ledger.reserve(ann)).amount_nanousd == 7_000_000


@pytest.mark.parametrize("declared", [False, True], ids=["recorded first", "declared first"])
async def test_a_drawn_call_is_booked_once_whatever_is_heard_of_it_first(
    ledger: Ledger, ann: Principal, boss: Principal, declared: bool
) -> None:
    """Its hold is what was drawn, its cost what it used; ending the lease gives back the rest."""
    lease_id, operation_id = new_id(), new_id()
    lent = (await lend(ledger, ann, lease_id)).amount_nanousd
    record = operation(ann, operation_id, attempts=[attempt(lease_id=lease_id, drawn_nanousd=7_000_000, price_version=1)])
    if declared:
        await give_back(ledger, ann, lease_id, drawn(operation_id))
        assert await counters(ledger, ann, boss) == (0, 7_000_000)
        (ack,) = await ledger.record(record)
    else:
        (ack,) = await ledger.record(record)
        assert await counters(ledger, ann, boss) == (150_000, lent)
        await give_back(ledger, ann, lease_id, drawn(operation_id))
    (again,) = await ledger.record(record)
    hold = await hold_of(ledger, operation_id)

    assert (ack.duplicate, ack.cost_nanousd, again.duplicate) == (False, 150_000, True)
    assert (hold["amount_nanousd"], hold["state"], str(hold["lease_id"])) == (7_000_000, "settled", lease_id)
    assert await counters(ledger, ann, boss) == (150_000, 0)


async def test_records_and_the_end_of_their_lease_at_the_same_time(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Thirty calls are recorded while the lease that paid for them is ended with all of them declared: each is charged once."""
    lease_id, ids = new_id(), [new_id() for _ in range(30)]
    await lend(ledger, ann, lease_id)
    records = [operation(ann, id, attempts=[attempt(lease_id=lease_id, drawn_nanousd=7_000_000, price_version=1)]) for id in ids]
    await asyncio.gather(
        ledger.record(*records), ledger.record(*reversed(records)), give_back(ledger, ann, lease_id, *(drawn(id) for id in ids))
    )

    assert await counters(ledger, ann, boss) == (30 * 150_000, 0)


async def test_a_call_that_was_never_sent_costs_nothing_of_its_lease(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    lease_id, operation_id = new_id(), new_id()
    await lend(ledger, ann, lease_id)
    unsent = attempt(input_tokens=0, output_tokens=0, lease_id=lease_id, drawn_nanousd=7_000_000, price_version=1, not_sent=True)
    await ledger.record(operation(ann, operation_id, attempts=[unsent], status="failed"))
    await give_back(ledger, ann, lease_id)

    assert (await hold_of(ledger, operation_id))["state"] == "voided"
    assert await counters(ledger, ann, boss) == (0, 0)


async def test_a_call_whose_lease_is_over_is_booked_in_full_and_shows_it(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """The money is gone; a hold of nothing with the lease's id says that nothing was set aside for it any more."""
    lease_id, operation_id = new_id(), new_id()
    await lend(ledger, ann, lease_id)
    await give_back(ledger, ann, lease_id)
    await ledger.record(operation(ann, operation_id, attempts=[attempt(lease_id=lease_id, drawn_nanousd=7_000_000)]))
    hold = await hold_of(ledger, operation_id)

    assert (hold["amount_nanousd"], hold["cost_nanousd"], str(hold["lease_id"])) == (0, 150_000, lease_id)
    assert await counters(ledger, ann, boss) == (150_000, 0)


async def test_a_lease_pays_for_nobody_else(ledger: Ledger, ann: Principal, bob: Principal, stranger: Principal, boss: Principal) -> None:
    """Another user's record, tenant or id draws nothing from it, and it is neither settled nor voided as if it were a call's hold."""
    lease_id, operation_id = new_id(), new_id()
    lent = (await lend(ledger, ann, lease_id)).amount_nanousd
    await ledger.record(operation(bob, operation_id, attempts=[attempt(lease_id=lease_id, drawn_nanousd=7_000_000)]))
    for other in (bob, stranger):
        with pytest.raises(NotFound):
            await give_back(ledger, other, lease_id)
        with pytest.raises(HoldAlreadyExpired):
            await lend(ledger, other, lease_id)
    for owner in (ann, boss):
        with pytest.raises(NotFound):
            await ledger.ask("Void", pb.VoidRequest(hold_id=lease_id), owner)
    with pytest.raises(NotAllowed):
        await ledger.ask("LendCredit", pb.LendCreditRequest(lease_id=new_id(), tenant=ann.tenant, user="ann"), boss)

    assert (await hold_of(ledger, operation_id))["amount_nanousd"] == 0
    assert await counters(ledger, ann, boss) == (0, lent)


class StillClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 11, 23, 23, 59, tzinfo=UTC)

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.moment.timestamp()


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    url = await fresh_database(postgres)
    async with opened(url, connections_max=4, wait_s=10) as database:
        await postgres_schema.prepare(database)
        yield database
    assert await audit(url) == {}


async def test_a_lease_that_nobody_prolongs_is_taken_back_after_its_grace(database: Database) -> None:
    """Not before; and what was drawn on it then is booked beyond it."""
    clock = StillClock()
    book = PostgresLeases(database, PostgresPrices(database, clock), Terms(1, USD, 10 * USD, 120_000), clock)
    budgets, tenant = PostgresBudgets(database, clock), f"tenant-{secrets.token_hex(4)}"
    lease = Lease(uuid.uuid4(), tenant, "ann", "")
    await budgets.put(tenant, "user", "ann", "month", 100 * USD)
    assert await book.lend(lease) == USD // 2  # a tenth of the plan's five
    clock.moment += timedelta(seconds=150)
    assert await book.expire_one(60_000) is None
    clock.moment += timedelta(seconds=31)
    assert await book.expire_one(60_000) == str(lease.lease_id)
    assert await book.expire_one(60_000) is None

    (budget,) = await budgets.of(tenant, "user", "ann")
    assert (budget.spent_nanousd, budget.held_nanousd) == (0, 0)


async def test_a_call_of_an_orchestrator_that_was_cut_off_is_paid_by_its_lease(database: Database) -> None:
    """It began at the lease's last moment, ran for the longest time an answer may take, and its record came within the grace after that."""
    clock = SetClock(datetime(2026, 11, 3, 12, tzinfo=UTC))
    prices = PostgresPrices(database, clock)
    book, budgets = PostgresLeases(database, prices, Terms(1, USD, 10 * USD, 120_000), clock), PostgresBudgets(database, clock)
    operations = PostgresOperations(database, PostgresHolds(database, prices, clock), prices, clock)
    given, tenant = settings("postgresql://unused", TAILRACE_LEDGER_SWEEP_GRACE_MS="60000"), f"tenant-{secrets.token_hex(4)}"
    lease = Lease(uuid.uuid4(), tenant, "ann", "")
    await budgets.put(tenant, "user", "ann", "month", 100 * USD)
    lent = await book.lend(lease)
    began = clock.moment + timedelta(seconds=119)
    clock.moment = began + timedelta(seconds=given.answer_deadline_s + 30)
    await sweep_leases(book, given.lease_grace_ms)
    call = Attempt(1, "", *HAIKU, Usage(1000, 1000), price_version=1, lease_id=str(lease.lease_id), drawn_nanousd=7_000_000)
    facts = {"status": "done", "created_at": began, "cache": CacheFacts("miss"), "attempts": (call,)}
    await operations.record(Operation(new_id(), tenant, "ann", **facts))  # type: ignore[arg-type]
    (before,) = await budgets.of(tenant, "user", "ann")
    clock.moment += timedelta(seconds=60)
    await sweep_leases(book, given.lease_grace_ms)
    (after,) = await budgets.of(tenant, "user", "ann")

    assert await database.value("SELECT amount_nanousd FROM holds WHERE tenant = $1 AND provider <> ''", tenant) == 7_000_000
    assert (before.spent_nanousd, before.held_nanousd) == (6_000_000, lent)
    assert (after.spent_nanousd, after.held_nanousd) == (6_000_000, 0)


async def test_a_lease_is_not_prolonged_into_another_day_and_pays_in_its_own(database: Database) -> None:
    """Its counters are those of the day it was lent on; a call drawn on it after midnight counts there, where the money was set aside."""
    clock = StillClock()
    book = PostgresLeases(database, PostgresPrices(database, clock), Terms(1, USD, 10 * USD, 120_000), clock)
    budgets, tenant = PostgresBudgets(database, clock), f"tenant-{secrets.token_hex(4)}"
    lease, call = Lease(uuid.uuid4(), tenant, "ann", ""), Draw(uuid.uuid4(), 1, *HAIKU, 1, 1000, 1000, 7_000_000)
    await budgets.put(tenant, "user", "ann", "day", 100 * USD)
    await book.lend(lease)
    clock.moment += timedelta(seconds=90)
    with pytest.raises(HoldAlreadyExpired):
        await book.lend(lease)
    await book.take_back(lease.lease_id, tenant, "ann", [call])

    (today,) = await budgets.of(tenant, "user", "ann")
    clock.moment -= timedelta(days=1)
    (yesterday,) = await budgets.of(tenant, "user", "ann")
    assert (today.held_nanousd, yesterday.held_nanousd) == (0, 7_000_000)
