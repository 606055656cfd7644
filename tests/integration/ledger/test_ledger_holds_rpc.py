"""Reserve, settle and void through a channel, alone and many at once."""

import asyncio
import uuid

import asyncpg
import pytest

from services.chassis.errors import (
    BudgetExhausted,
    HoldAlreadySettled,
    HoldAlreadyVoided,
    IdempotencyConflict,
    NotFound,
    RequestInvalid,
)
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger

AMOUNT = 1000 * 2000 + 1000 * 5000
"""Worst case of `Ledger.reserve`: every prompt token written to the one-hour cache, the dearest way to send it."""
USED = common_pb2.Usage(input_tokens=400, output_tokens=50)
COST = 400 * 1000 + 50 * 5000


async def spent_and_held(ledger: Ledger, boss: Principal, scope: str, subject: str) -> list[tuple[int, int]]:
    budgets = (await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope=scope, subject=subject), boss)).budgets
    return [(budget.spent_nanousd, budget.held_nanousd) for budget in budgets]


async def set_budget(ledger: Ledger, boss: Principal, scope: str, subject: str, limit: int, period: str = "day") -> None:
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope=scope, subject=subject, period=period, limit_nanousd=limit), boss)


async def test_a_call_is_reserved_at_its_worst_case_and_settled_at_what_it_used(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Reserve sets the worst case aside, settle books what was used and gives the rest back."""
    await set_budget(ledger, boss, "user", "ann", 10 * AMOUNT)
    held = await ledger.reserve(ann)

    assert held.amount_nanousd == AMOUNT
    assert held.price.version == 1
    assert await spent_and_held(ledger, boss, "user", "ann") == [(0, AMOUNT)]

    settled = await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), ann)

    assert (settled.cost_nanousd, settled.overage_nanousd) == (COST, 0)
    assert await spent_and_held(ledger, boss, "user", "ann") == [(COST, 0)]


async def test_the_same_reserve_again_is_the_same_hold(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A retried reserve holds nothing twice; the same attempt of another call is refused."""
    await set_budget(ledger, boss, "user", "ann", 10 * AMOUNT)
    operation_id = str(uuid.uuid4())
    holds = await asyncio.gather(*(ledger.reserve(ann, operation_id) for _ in range(10)))

    assert len({hold.hold_id for hold in holds}) == 1
    assert await spent_and_held(ledger, boss, "user", "ann") == [(0, AMOUNT)]
    with pytest.raises(IdempotencyConflict):
        await ledger.reserve(ann, operation_id, output_tokens_max=999)


async def test_the_same_settle_again_gives_the_same_answer(ledger: Ledger, ann: Principal) -> None:
    """Settling twice books once; settling otherwise is refused by name, and so is a late void or reserve."""
    operation_id = str(uuid.uuid4())
    held = await ledger.reserve(ann, operation_id)
    request = pb.SettleRequest(hold_id=held.hold_id, usage=USED)
    answers = await asyncio.gather(*(ledger.ask("Settle", request, ann) for _ in range(5)))

    assert {answer.cost_nanousd for answer in answers} == {COST}
    for method, other in (
        ("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=common_pb2.Usage(input_tokens=401))),
        ("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED, estimated=True)),
        ("Void", pb.VoidRequest(hold_id=held.hold_id)),
    ):
        with pytest.raises(HoldAlreadySettled):
            await ledger.ask(method, other, ann)
    with pytest.raises(HoldAlreadySettled):
        await ledger.reserve(ann, operation_id)


async def test_a_voided_hold_gives_everything_back_and_cannot_be_settled(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Void releases the whole amount, once."""
    await set_budget(ledger, boss, "tenant", "", 10 * AMOUNT)
    held = await ledger.reserve(ann)
    released = await ledger.ask("Void", pb.VoidRequest(hold_id=held.hold_id), ann)

    assert released.released_nanousd == AMOUNT
    assert await spent_and_held(ledger, boss, "tenant", "") == [(0, 0)]
    for method, request in (("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED)), ("Void", pb.VoidRequest(hold_id=held.hold_id))):
        with pytest.raises(HoldAlreadyVoided):
            await ledger.ask(method, request, ann)


async def test_little_money_buys_fewer_tokens(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What a prompt and 300 of 1000 tokens may cost is left: 300 are granted, all that is left is held, and asked again it is the same."""
    left = 1000 * 2000 + 300 * 5000 + 4999
    await set_budget(ledger, boss, "user", "ann", left)
    operation_id = str(uuid.uuid4())
    lowered = [await ledger.reserve(ann, operation_id, output_tokens_min=300) for _ in range(2)]

    assert [(hold.output_tokens_max, hold.amount_nanousd) for hold in lowered] == [(300, left - 4999)] * 2
    assert lowered[0].hold_id == lowered[1].hold_id
    assert await spent_and_held(ledger, boss, "user", "ann") == [(0, left - 4999)]
    with pytest.raises(IdempotencyConflict):
        await ledger.reserve(ann, operation_id, output_tokens_max=300)
    usage = common_pb2.Usage(cache_write_tokens=1000, cache_write_1h_tokens=1000, output_tokens=300)
    settled = await ledger.ask("Settle", pb.SettleRequest(hold_id=lowered[0].hold_id, usage=usage), ann)
    assert (settled.cost_nanousd, settled.overage_nanousd) == (left - 4999, 0)


@pytest.mark.parametrize(
    ("left", "usd"), [(1000 * 2000 + 300 * 5000 - 1, "0.003499999"), (1000 * 2000, "0.002"), (1, "0.000000001"), (0, "0")]
)
async def test_too_little_money_for_the_least_is_refused_with_what_is_left(
    ledger: Ledger, ann: Principal, boss: Principal, left: int, usd: str
) -> None:
    """One nano-USD below the least output, the prompt alone, next to nothing and nothing: refused, and nothing is held."""
    await set_budget(ledger, boss, "user", "ann", left)
    with pytest.raises(BudgetExhausted) as refused:
        await ledger.reserve(ann, output_tokens_min=300)

    told = refused.value.metadata
    assert (told["left_nanousd"], told["needed_nanousd"]) == (str(left), str(1000 * 2000 + 300 * 5000))
    assert told["resets_at"].endswith("T00:00:00+00:00")
    until = f"{told['resets_at'][:10]} 00:00 UTC"
    assert refused.value.detail == f"the user's budget has {usd} USD left until {until}, and the call may cost 0.0035 USD"
    assert await spent_and_held(ledger, boss, "user", "ann") == [(0, 0)]


async def test_a_bound_is_lowered_by_the_tightest_of_all_budgets(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Day and month, user and tenant: each must be able to pay for what is granted."""
    prompt = 1000 * 2000
    for scope, subject, period, tokens in (("user", "ann", "day", 800), ("user", "ann", "month", 600), ("tenant", "", "month", 700)):
        await set_budget(ledger, boss, scope, subject, prompt + tokens * 5000, period)

    assert (await ledger.reserve(ann, output_tokens_min=1)).output_tokens_max == 600


async def test_enough_money_buys_all_tokens(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """With exactly the worst case left, nothing is lowered; with one nano-USD less, one token is."""
    await set_budget(ledger, boss, "user", "ann", 2 * AMOUNT - 1)
    granted = [(await ledger.reserve(ann, output_tokens_min=1)).output_tokens_max for _ in range(2)]

    assert granted == [1000, 999]


async def test_a_provider_that_breaks_its_bound_is_booked_in_full_and_marked(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """The money is gone: it is booked, the hold says how much of it was above what was held, and the budget is overdrawn by it."""
    await set_budget(ledger, boss, "user", "ann", AMOUNT)
    held = await ledger.reserve(ann)
    usage = common_pb2.Usage(input_tokens=1000, output_tokens=3000)
    settled = await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=usage), ann)
    connection = await asyncpg.connect(ledger.url)
    try:
        marked = await connection.fetchval("SELECT overage_nanousd FROM holds WHERE hold_id = $1", uuid.UUID(held.hold_id))
    finally:
        await connection.close()

    assert (settled.cost_nanousd, settled.overage_nanousd, marked) == (16_000_000, 9_000_000, 9_000_000)
    with pytest.raises(BudgetExhausted) as refused:
        await ledger.reserve(ann, output_tokens_min=1)
    assert refused.value.metadata["left_nanousd"] == str(-9_000_000)
    assert " has 0 USD left " in refused.value.detail


async def test_a_budget_of_nothing_refuses_every_paid_call_and_no_free_one(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A limit of 0 means nothing may be spent; the extractive model spends nothing."""
    await set_budget(ledger, boss, "tenant", "", 0, "month")
    with pytest.raises(BudgetExhausted):
        await ledger.reserve(ann)
    free = await ledger.reserve(ann, provider="extractive", model="extractive")

    assert free.amount_nanousd == 0


async def test_a_budget_set_late_knows_what_its_period_has_seen(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Spending is counted before there is a limit to count it against."""
    held = await ledger.reserve(ann)
    await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), ann)
    put = await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject="ann", period="month", limit_nanousd=AMOUNT), boss)

    assert put.budget.spent_nanousd == COST
    with pytest.raises(BudgetExhausted):
        await ledger.reserve(ann)
    await ledger.ask("DeleteBudget", pb.DeleteBudgetRequest(scope="user", subject="ann"), boss)
    await ledger.reserve(ann)


async def test_a_hold_is_its_users_own(ledger: Ledger, ann: Principal, bob: Principal, stranger: Principal) -> None:
    """A foreign hold and an unknown one look the same, and neither moves."""
    held = await ledger.reserve(ann)
    for caller in (bob, stranger):
        for hold_id in (held.hold_id, str(uuid.uuid4()), "not-an-id"):
            with pytest.raises(NotFound) as refused:
                await ledger.ask("Settle", pb.SettleRequest(hold_id=hold_id, usage=USED), caller)
            assert refused.value.metadata == {"kind": "hold"}
            with pytest.raises(NotFound):
                await ledger.ask("Void", pb.VoidRequest(hold_id=hold_id), caller)
    released = await ledger.ask("Void", pb.VoidRequest(hold_id=held.hold_id), ann)

    assert released.released_nanousd == AMOUNT


async def test_two_tenants_may_use_the_same_operation_id(ledger: Ledger, ann: Principal, bob: Principal, stranger: Principal) -> None:
    """Ids are the tenant's own; inside a tenant another user's attempt is refused without a word about it."""
    operation_id = str(uuid.uuid4())
    mine, theirs = await ledger.reserve(ann, operation_id), await ledger.reserve(stranger, operation_id)

    assert mine.hold_id != theirs.hold_id
    with pytest.raises(IdempotencyConflict):
        await ledger.reserve(bob, operation_id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("operation_id", "42"),
        ("attempt", 0),
        ("provider", ""),
        ("model", "m" * 129),
        ("model", "a\x00b"),
        ("input_tokens_max", 0),
        ("input_tokens_max", 10_000_001),
        ("output_tokens_max", 0),
        ("output_tokens_max", 2**62),
        ("output_tokens_min", -1),
        ("output_tokens_min", 1001),
        ("ttl_ms", 999),
    ],
)
async def test_a_reserve_out_of_bounds_names_the_field(ledger: Ledger, ann: Principal, field: str, value: object) -> None:
    """Nothing unbounded is ever held."""
    with pytest.raises(RequestInvalid) as refused:
        await ledger.reserve(
            ann, **({field: value} if field != "operation_id" else {}), operation_id=value if field == "operation_id" else ""
        )  # type: ignore[arg-type]

    assert refused.value.field == field


@pytest.mark.parametrize(
    ("usage", "field"),
    [
        (common_pb2.Usage(input_tokens=-1), "usage.input_tokens"),
        (common_pb2.Usage(output_tokens=2**62), "usage.output_tokens"),
        (common_pb2.Usage(cache_write_1h_tokens=1), "usage.cache_write_1h_tokens"),
    ],
)
async def test_impossible_counts_are_refused(ledger: Ledger, ann: Principal, usage: common_pb2.Usage, field: str) -> None:
    """Negative, overflowing and contradicting counts never reach the books."""
    held = await ledger.reserve(ann)
    with pytest.raises(RequestInvalid) as refused:
        await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=usage), ann)

    assert refused.value.field == field


async def test_the_books_refuse_to_be_changed(ledger: Ledger, ann: Principal) -> None:
    """Entries and prices can only be added, and a posting that does not balance cannot even be added."""
    held = await ledger.reserve(ann)
    connection = await asyncpg.connect(ledger.url)
    try:
        for statement in (
            "UPDATE entries SET amount_nanousd = 1",
            "DELETE FROM entries",
            "TRUNCATE entries",
            "UPDATE prices SET input_nanousd_per_mtok = 0",
            "DELETE FROM prices",
        ):
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(statement)
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(
                "INSERT INTO entries SELECT nextval('postings'), 'spent', tenant, hold_id, operation_id, 'settle', 5, now()"
                " FROM holds WHERE hold_id = $1",
                uuid.UUID(held.hold_id),
            )
    finally:
        await connection.close()
