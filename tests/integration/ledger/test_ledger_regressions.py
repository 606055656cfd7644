"""The money bugs of other gateways, each as a test with the name it is known by: none of them is ours."""

import asyncio
import contextlib
import os
import random
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.chassis.channel import Caller, open_channel
from services.chassis.errors import BudgetExhausted, DomainError, Overloaded, PriceUnknown, Unavailable
from services.chassis.money import Usage
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.ledger.prices import listed_prices
from services.local.stores import Postgres, free_port
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc
from tests.integration.ledger.ledger_kit import INTERNAL_KEY, Ledger, attempt, audit, fresh_database, operation, running, until, value

ROOT = Path(__file__).resolve().parents[3]
AMOUNT = 7_000_000
PARALLEL = 500


@contextlib.asynccontextmanager
async def ledger_process(url: str) -> AsyncIterator[Ledger]:
    """A ledger on `url`, as a process of its own, that answers."""
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": url,
        "TAILRACE_INTERNAL_KEY": INTERNAL_KEY,
        "TAILRACE_LEDGER_PORT": str(port),
        "TAILRACE_LEDGER_SWEEP_INTERVAL_MS": "600000",
    }
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.ledger"), cwd=ROOT, env=environment, stdout=quiet, stderr=quiet
    )
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        ledger = Ledger(
            url, ledger_service_pb2_grpc.LedgerServiceStub(channel), Caller("ledger", Passport(INTERNAL_KEY.encode())), process.terminate
        )

        async def answers() -> bool:
            try:
                await ledger.ask("GetEntitlements", pb.GetEntitlementsRequest(), Principal("nobody", "nobody"))
            except Unavailable:
                assert process.returncode is None
                return False
            return True

        await until(answers, 30)
        yield ledger
    finally:
        await channel.close()
        process.terminate()
        await process.wait()


@pytest.fixture(scope="module")
async def two_ledgers(postgres: Postgres) -> AsyncIterator[list[Ledger]]:
    """Two processes on one database."""
    url = await fresh_database(postgres)
    async with ledger_process(url) as one, ledger_process(url) as two:
        yield [one, two]


async def admitted(ledgers: list[Ledger], callers: list[Principal]) -> tuple[int, set[str]]:
    """How many of PARALLEL simultaneous calls, by turns through each ledger and of each caller, are admitted, and what refused the rest.

    A ledger that has too many of them in hand says so and is asked again, as the orchestrator does.
    """

    async def call(number: int) -> str:
        operation_id = str(uuid.uuid4())
        while True:
            try:
                await ledgers[number % len(ledgers)].reserve(callers[number % len(callers)], operation_id)
            except Overloaded:
                await asyncio.sleep(random.uniform(0.05, 0.5))
            except BudgetExhausted as refused:
                return str(refused.metadata["scope"])
            else:
                return ""

    outcomes = await asyncio.gather(*(call(number) for number in range(PARALLEL)))
    return outcomes.count(""), set(outcomes) - {""}


async def most_ever_used(url: str, tenant: str) -> int:
    """The most that the tenant had spent and held together after any commit, as the chain remembers it."""
    query = (
        "SELECT max(used)::bigint FROM (SELECT sum(-e.amount_nanousd) OVER (ORDER BY l.commit_number) AS used FROM chain_links l"
        " JOIN entries e USING (posting_id) WHERE l.tenant = $1 AND e.account = 'available') u"
    )
    return int(str(await value(url, query, tenant)))


async def deadlocks(url: str) -> int:
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    return int(str(await value(url, query)))


@pytest.mark.slow
@pytest.mark.parametrize("tightest", ["tenant", "user", "key"])
async def test_parallel_budget_bypass(two_ledgers: list[Ledger], ann: Principal, boss: Principal, tightest: str) -> None:
    """Budgets on tenant, user and key at once, with room for exactly 37 in the tightest: of 500 simultaneous calls through two ledgers
    exactly 37 are admitted, the budget was never passed in between, and nobody stood in a circle."""
    made = await two_ledgers[0].ask("CreateApiKey", pb.CreateApiKeyRequest(name="k", user="ann"), boss)
    key_id, k = made.key.key_id, 37
    for scope, subject in (("tenant", ""), ("user", "ann"), ("key", key_id)):
        limit = (k if scope == tightest else 2 * k) * AMOUNT + AMOUNT - 1
        for period in ("day", "month"):
            request = pb.PutBudgetRequest(scope=scope, subject=subject, period=period, limit_nanousd=limit)
            await two_ledgers[0].ask("PutBudget", request, boss)
    before = await deadlocks(two_ledgers[0].url)
    count, refused_by = await admitted(two_ledgers, [Principal(ann.tenant, "ann", frozenset({"user"}), key_id)])

    assert (count, refused_by) == (k, {tightest})
    assert await most_ever_used(two_ledgers[0].url, ann.tenant) == k * AMOUNT
    assert await deadlocks(two_ledgers[0].url) == before
    assert await audit(two_ledgers[0].url) == {}


@pytest.mark.slow
@pytest.mark.parametrize("limited_by", ["plan", "tenant"])
async def test_unknown_user_first_requests(two_ledgers: list[Ledger], ann: Principal, boss: Principal, limited_by: str) -> None:
    """Nobody is known at first, and nobody is unlimited: the very first requests of a user, and of forty users of a new tenant at once, are
    bound by the free plan and the tenant's budget like any other."""
    k, url = 21, two_ledgers[0].url
    if limited_by == "plan":
        plan = pb.Plan(
            name="free", requests_per_minute=1, tokens_per_minute=1, concurrent_answers=1, monthly_budget_nanousd=k * AMOUNT, tiers=["fast"]
        )
        await two_ledgers[0].ask("PutPlan", pb.PutPlanRequest(plan=plan), boss)
        callers = [ann]
    else:
        request = pb.PutBudgetRequest(scope="tenant", subject="", period="month", limit_nanousd=k * AMOUNT)
        await two_ledgers[0].ask("PutBudget", request, boss)
        callers = [Principal(ann.tenant, f"new-{number}", frozenset({"user"}), f"key-{number % 7}") for number in range(40)]
    before = await deadlocks(url)
    count, refused_by = await admitted(two_ledgers, callers)

    assert (count, refused_by) == (k, {limited_by})
    assert await most_ever_used(url, ann.tenant) == k * AMOUNT
    assert await deadlocks(url) == before
    assert await audit(url) == {}


async def test_unknown_price_skips_reservation(ledger: Ledger, ann: Principal) -> None:
    """An unknown price is never 0."""
    with pytest.raises(PriceUnknown):
        await ledger.reserve(ann, model="claude-nobody-1")
    with pytest.raises(PriceUnknown):
        await ledger.reserve(ann, provider="openai")
    [ack] = await ledger.record(operation(ann, attempts=[attempt(model="claude-nobody-1")]))

    assert ack.rejected_reason == "PRICE_UNKNOWN"
    assert await value(ledger.url, "SELECT count(*) FROM holds WHERE tenant = $1", ann.tenant) == 0


async def test_long_context_tier_priced_low(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A prompt above the bound is held and booked at the long price, one token below it at the short one; a prompt that may get there is
    held at the dearer of both."""
    price = common_pb2.Price(
        provider="acme",
        model="long-1",
        input_nanousd_per_mtok=10**9,
        output_nanousd_per_mtok=2 * 10**9,
        long_context_above_tokens=200_000,
        long_input_nanousd_per_mtok=2 * 10**9,
        long_output_nanousd_per_mtok=3 * 10**9,
        source="a test",
    )
    await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)
    for prompt, held_nanousd, cost in ((200_000, 200_200_000, 200_200_000), (200_001, 400_302_000, 400_302_000)):
        held = await ledger.reserve(ann, provider="acme", model="long-1", input_tokens_max=prompt, output_tokens_max=100)
        usage = common_pb2.Usage(input_tokens=prompt, output_tokens=100)
        settled = await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=usage), ann)

        assert (held.amount_nanousd, settled.cost_nanousd, settled.overage_nanousd) == (held_nanousd, cost, 0)


async def test_explicit_zero_becomes_guess(ledger: Ledger, ann: Principal) -> None:
    """Zero tokens cost zero, not the estimate."""
    held = await ledger.reserve(ann)
    settled = await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id, usage=common_pb2.Usage()), ann)
    recorded = operation(ann, attempts=[attempt(1, 0, 0)])
    await ledger.reserve(ann, recorded.operation_id)
    [ack] = await ledger.record(recorded)

    assert (settled.cost_nanousd, ack.cost_nanousd) == (0, 0)
    shown = await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=recorded.operation_id), ann)
    assert not shown.operation.estimated


async def test_streamed_priced_zero(ledger: Ledger, ann: Principal) -> None:
    """Of every model in the book but our own free one, a call is held at more than nothing and one token of each kind costs something."""
    by_age = sorted(listed_prices(), key=lambda listed: listed.valid_from)
    in_force = {(listed.price.provider, listed.price.model): listed.price for listed in by_age if listed.valid_from <= datetime.now(UTC)}
    paid = [price for price in in_force.values() if price.provider != "extractive"]
    assert {price.provider for price in paid} >= {"anthropic", "openai", "gemini"}
    for price in paid:
        recorded = operation(ann, provider=price.provider, model=price.model)
        held = await ledger.reserve(ann, recorded.operation_id, provider=price.provider, model=price.model)
        recorded.attempts.append(attempt(1, 1, 1, provider=price.provider, model=price.model))
        [ack] = await ledger.record(recorded)

        assert held.amount_nanousd > 0
        assert ack.cost_nanousd == price.cost_nanousd(Usage(1, 1)) > 0


async def test_second_endpoint_skips_budget(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Whatever way the money goes, another model, a further attempt, or a call that is only told of afterwards, it is the same budget."""
    await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="user", subject="ann", period="day", limit_nanousd=AMOUNT), boss)
    [ack] = await ledger.record(operation(ann, attempts=[attempt(1, 100, 10)]))
    assert ack.cost_nanousd == 150_000
    operation_id = str(uuid.uuid4())
    for fields in ({}, {"model": "claude-opus-5"}, {"operation_id": operation_id, "attempt": 2}):
        with pytest.raises(BudgetExhausted) as refused:
            await ledger.reserve(ann, **fields)
        assert refused.value.metadata["left_nanousd"] == str(AMOUNT - 150_000)

    await ledger.reserve(ann, operation_id, output_tokens_max=970)
    with pytest.raises(BudgetExhausted):
        await ledger.reserve(ann, operation_id, attempt=2, output_tokens_max=1, input_tokens_max=1)


async def test_pool_drained_by_cancel(postgres: Postgres, ann: Principal) -> None:
    """With two connections, a hundred calls that are dropped at any moment leave both to those who come after."""
    chance = random.Random(11)
    async with running(await fresh_database(postgres), TAILRACE_LEDGER_CONNECTIONS_MAX="2") as ledger:
        for _ in range(10):
            calls = [asyncio.create_task(ledger.reserve(ann)) for _ in range(10)]
            await asyncio.wait(calls, timeout=chance.uniform(0, 0.03))
            for task in calls:
                task.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [outcome for outcome in outcomes if isinstance(outcome, DomainError)] == []

        async with asyncio.timeout(10):
            await asyncio.gather(*(ledger.reserve(ann) for _ in range(20)))
        assert await audit(ledger.url) == {}


async def test_pooled_connection_with_open_transaction(ledger: Ledger, ann: Principal, bob: Principal) -> None:
    """Hundreds of calls cancelled at any moment: nobody gets another's answer, and no transaction stays open."""
    chance = random.Random(7)

    async def call(principal: Principal) -> None:
        held = await ledger.reserve(principal)
        await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id), principal)
        seen = await ledger.ask("GetSubscription", pb.GetSubscriptionRequest(), principal)
        assert seen.subscription.user == principal.user

    async def maybe_cut(principal: Principal) -> bool:
        task = asyncio.create_task(call(principal))
        if chance.random() < 0.5:
            await asyncio.wait([task], timeout=chance.uniform(0, 0.05))
            task.cancel()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
        return outcome is None

    finished = await asyncio.gather(*(maybe_cut(chance.choice((ann, bob))) for _ in range(200)))
    assert 0 < sum(finished) < 200

    async def idle() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
        return await value(ledger.url, query) == 0

    await until(idle)
    await call(ann)
