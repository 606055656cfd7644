"""Money that is asked for at the same moment goes in one transaction: every call has its own verdict, and none suffers from another."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest

from services.chassis.errors import BudgetExhausted, HoldAlreadySettled, HoldAlreadyVoided, IdempotencyConflict
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger, until

AMOUNT = 1000 * 2000 + 1000 * 5000
USED = common_pb2.Usage(input_tokens=400, output_tokens=50)
COST = 400 * 1000 + 50 * 5000


@contextlib.asynccontextmanager
async def held_up(ledger: Ledger, tenant: str) -> AsyncIterator[asyncpg.Connection]:
    """Nobody moves money of the tenant meanwhile, so that what is asked for comes together. It goes on when the block is left."""
    connection = await asyncpg.connect(ledger.url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM spending WHERE tenant = $1 FOR UPDATE", tenant)
            yield connection
    finally:
        await connection.close()


async def waits(ledger: Ledger, tenant: str, work: "list[asyncio.Task[object]]") -> None:
    """Until the first of `work` waits in the database, and the others had the time to come."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    connection = await asyncpg.connect(ledger.url)
    try:

        async def one_waits() -> bool:
            return bool(await connection.fetchval(query))

        await until(one_waits)
        await asyncio.sleep(0.2)
    finally:
        await connection.close()
    assert not any(task.done() for task in work)


async def transactions(ledger: Ledger, tenant: str) -> int:
    """How many transactions have written postings of the tenant."""
    connection = await asyncpg.connect(ledger.url)
    try:
        return int(await connection.fetchval("SELECT count(DISTINCT xmin::text) FROM entries WHERE tenant = $1", tenant))
    finally:
        await connection.close()


async def test_each_of_many_calls_gets_its_own_verdict(ledger: Ledger, ann: Principal, bob: Principal, boss: Principal) -> None:
    """Holds, settlements, voids, a conflict, a repeat and a budget that is used up on the way, in a few transactions instead of many."""
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject="bob", period="day", limit_nanousd=4 * AMOUNT), boss)
    before = [await ledger.reserve(ann) for _ in range(4)]
    conflict = str(uuid.uuid4())
    await ledger.reserve(ann, conflict)
    await ledger.reserve(bob)
    known = str(uuid.uuid4())
    first = await ledger.reserve(ann, known)
    already = await transactions(ledger, ann.tenant)

    async with held_up(ledger, ann.tenant):
        work: list[asyncio.Task[object]] = [
            asyncio.create_task(one)
            for one in (
                ledger.reserve(ann),
                *(ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), ann) for held in before[:2]),
                *(ledger.ask("Void", pb.VoidRequest(hold_id=held.hold_id), ann) for held in before[2:]),
                ledger.reserve(ann, conflict, output_tokens_max=999),
                ledger.reserve(ann, known),
                *(ledger.reserve(bob) for _ in range(5)),
            )
        ]
        await waits(ledger, ann.tenant, work)
    outcomes = await asyncio.gather(*work, return_exceptions=True)

    new, settled, voided, wrong, again, *bobs = outcomes[0], outcomes[1:3], outcomes[3:5], outcomes[5], outcomes[6], *outcomes[7:]
    assert getattr(new, "amount_nanousd", 0) == AMOUNT, new
    assert [getattr(one, "cost_nanousd", one) for one in settled] == [COST, COST]
    assert [getattr(one, "released_nanousd", one) for one in voided] == [AMOUNT, AMOUNT]
    assert isinstance(wrong, IdempotencyConflict)
    assert getattr(again, "hold_id", again) == first.hold_id
    assert [isinstance(one, BudgetExhausted) for one in bobs] == [False] * 3 + [True] * 2
    assert await transactions(ledger, ann.tenant) - already <= 3, "the first, those that came meanwhile, and perhaps a late one"


async def test_calls_that_come_together_are_lowered_one_after_the_other(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal
) -> None:
    """The tenant's budget binds one, the user's another; each gets what those before it left, to the token, and the next one is refused."""
    for who in (ann, bob):
        await ledger.reserve(who)
    put = [
        pb.PutBudgetRequest(scope="tenant", subject=ann.tenant, period="month", limit_nanousd=5 * AMOUNT - 1),
        pb.PutBudgetRequest(scope="user", subject="bob", period="day", limit_nanousd=2 * AMOUNT + 1000 * 2000 + 10 * 5000),
    ]
    for request in put:
        await ledger.ask("PutBudget", request, boss)

    async with held_up(ledger, ann.tenant):
        asked = [(bob, 1), (bob, 10), (ann, 1), (bob, 10)]
        first = asyncio.create_task(ledger.reserve(ann, output_tokens_min=1))  # goes alone
        work: list[asyncio.Task[object]] = [first]
        await waits(ledger, ann.tenant, work)
        work += [asyncio.create_task(ledger.reserve(who, output_tokens_min=least)) for who, least in asked]
        await asyncio.sleep(0.2)
    outcomes = await asyncio.gather(*work, return_exceptions=True)

    # The tenant's budget has A - 1 for the last two, and bob's last one but one takes 10 output tokens' worth of it.
    anns = (AMOUNT - 1 - (1000 * 2000 + 10 * 5000) - 1000 * 2000) // 5000
    assert [getattr(one, "output_tokens_max", one) for one in outcomes[:4]] == [1000, 1000, 10, anns]
    assert isinstance(outcomes[4], BudgetExhausted)


async def test_the_same_call_twice_at_once_is_one_hold(ledger: Ledger, ann: Principal) -> None:
    """Both hear of it, those beside them of theirs, and with another body the later one is a conflict."""
    await ledger.reserve(ann)
    same, other = str(uuid.uuid4()), str(uuid.uuid4())
    async with held_up(ledger, ann.tenant):
        first = asyncio.create_task(ledger.reserve(ann))
        work: list[asyncio.Task[object]] = [first]
        await waits(ledger, ann.tenant, work)
        for operation_id, most in ((same, 1000), (same, 1000), (other, 1000), (other, 999)):
            work.append(asyncio.create_task(ledger.reserve(ann, operation_id, output_tokens_max=most)))
        await asyncio.sleep(0.2)
    _, one, again, kept, wrong = await asyncio.gather(*work, return_exceptions=True)

    assert getattr(one, "hold_id", one) == getattr(again, "hold_id", again)
    assert getattr(kept, "amount_nanousd", kept) == AMOUNT
    assert isinstance(wrong, IdempotencyConflict)


async def test_hold_that_was_moved_meanwhile_is_its_own_matter(ledger: Ledger, ann: Principal) -> None:
    """Another replica has voided it: that settlement hears so, and what came with it is done."""
    lost, *others = [await ledger.reserve(ann) for _ in range(3)]
    async with held_up(ledger, ann.tenant) as elsewhere:
        await elsewhere.execute(
            "SELECT resolve_holds_of($1, $2, NULL)",
            ann.tenant,
            f'[{{"hold_id": "{lost.hold_id}", "state": "voided", "kind": "void", "held": {-AMOUNT}, "spent": 0, "cost_nanousd": 0,'
            ' "estimated": false, "input_tokens": 0, "output_tokens": 0, "cache_read_tokens": 0, "cache_write_tokens": 0,'
            ' "cache_write_1h_tokens": 0}]',
        )
        work: list[asyncio.Task[object]] = [
            asyncio.create_task(one)
            for one in (
                ledger.reserve(ann),
                *(ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), ann) for held in (lost, *others)),
                ledger.reserve(ann),
            )
        ]
        await waits(ledger, ann.tenant, work)
    first, late, *rest = await asyncio.gather(*work, return_exceptions=True)

    assert isinstance(late, HoldAlreadyVoided)
    assert [type(one).__name__ for one in (first, *rest)] == ["ReserveResponse", "SettleResponse", "SettleResponse", "ReserveResponse"]


async def test_settled_twice_at_once_is_settled_once(ledger: Ledger, ann: Principal) -> None:
    """With the same usage both hear the cost, with another one the later hears who was first."""
    same, other = await ledger.reserve(ann), await ledger.reserve(ann)
    async with held_up(ledger, ann.tenant):
        work: list[asyncio.Task[object]] = [
            asyncio.create_task(ledger.ask("Settle", pb.SettleRequest(hold_id=hold_id, usage=usage), ann))
            for hold_id, usage in (
                (same.hold_id, USED),
                (same.hold_id, USED),
                (other.hold_id, USED),
                (other.hold_id, common_pb2.Usage(input_tokens=1)),
            )
        ]
        await waits(ledger, ann.tenant, work)
    outcomes = await asyncio.gather(*work, return_exceptions=True)

    assert [getattr(one, "cost_nanousd", one) for one in outcomes[:2]] == [COST, COST]
    assert sorted(type(one).__name__ for one in outcomes[2:]) == ["HoldAlreadySettled", "SettleResponse"]


async def test_keys_and_users_in_any_order_never_stand_in_each_others_way(ledger: Ledger, ann: Principal) -> None:
    """With keys of their own and without, reserved and settled at once: every call is done and no transaction was a deadlock's victim."""

    async def deadlocks() -> int:
        connection = await asyncpg.connect(ledger.url)
        try:
            return int(await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))
        finally:
            await connection.close()

    before = await deadlocks()
    payers = [Principal(ann.tenant, f"user{number % 5}", api_key_id=("", "key-a", "key-b")[number % 3]) for number in range(15)]

    async def pair(payer: Principal) -> int:
        held = await ledger.reserve(payer)
        return int((await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), payer)).cost_nanousd)

    for _ in range(4):
        assert await asyncio.gather(*(pair(payer) for payer in payers * 4)) == [COST] * 60
    assert await deadlocks() == before


@pytest.mark.parametrize("reason", [HoldAlreadySettled])
async def test_one_call_alone_waits_for_nobody(ledger: Ledger, ann: Principal, reason: type[Exception]) -> None:
    """Nothing is collected by a clock: one call after the other, each in its own transaction."""
    held = await ledger.reserve(ann)
    await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=USED), ann)
    with pytest.raises(reason):
        await ledger.ask("Void", pb.VoidRequest(hold_id=held.hold_id), ann)
    assert await transactions(ledger, ann.tenant) == 2
