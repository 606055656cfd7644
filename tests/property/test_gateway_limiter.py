"""Limits: in no window of its length is more admitted than the limit, hardly less is, and Redis decides as the pure model does."""

import asyncio
import bisect
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio as redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.chassis.errors import Unavailable
from services.gateway.limiter import ENTRIES_PER_WINDOW, Charge, Correction, Kind, LocalLimiter, Outcome, Settlement, Window
from services.gateway.redis_limiter import RedisLimiter
from services.local.stores import Valkey

WINDOWS_US = st.sampled_from([6_000, 6_000_000])
"""One that charges soon leave, and one so long that calls one after the other share an entry."""
LEASE_US = 4_000

ARRIVALS = st.lists(
    st.tuples(st.one_of(st.integers(0, 60), st.integers(0, 30_000)), st.integers(1, 5), st.integers(1, 3)), min_size=5, max_size=60
)
"""Microseconds since the request before, the limit in force, and the amount."""


def most_in_a_window(admitted: list[tuple[int, int]], window_us: int) -> int:
    """The largest sum of amounts (times and amounts, by time) in any half-open window."""
    most = total = first = 0
    for at, amount in admitted:
        total += amount
        while admitted[first][0] <= at - window_us:
            total -= admitted[first][1]
            first += 1
        most = max(most, total)
    return most


@given(ARRIVALS)
def test_no_window_holds_more_than_the_limit(arrivals: list[tuple[int, int, int]]) -> None:
    """Wherever it begins; and whoever is refused is told the truth about when to come back."""
    window_us, grain_us = 60_000, 100
    window, now, admitted = Window(window_us), window_us, list[tuple[int, int]]()
    for pause, limit, amount in arrivals:
        now += pause
        amount = min(amount, limit)
        verdict = window.look(now, limit, amount)
        inside = sum(charged for at, charged in admitted if at > now - window_us)

        if verdict.allowed:
            assert inside + amount <= limit
            window.charge(now, amount)
            admitted.append((now, amount))
        else:
            # A charge leaves at most a 600th of the window late.
            assert sum(charged for at, charged in admitted if at > now - window_us - grain_us) + amount > limit
            assert not window.look(now + verdict.retry_after_us - 1, limit, amount).allowed
            assert window.look(now + verdict.retry_after_us, limit, amount).allowed
            now += verdict.retry_after_us


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_nearly_all_that_is_allowed_can_be_used_and_what_is_remembered_is_bounded(seed: int) -> None:
    """100 in 10 s, asked for by arrivals drawn at random but always more than fit: never over, and at least 99 % of what a log of every
    request would have let in."""
    draw, window_us, limit = random.Random(seed), 10_000_000, 100
    window, now, admitted, exact = Window(window_us), 1, list[tuple[int, int]](), list[int]()
    mean_us = draw.choice([2_000, 10_000, 50_000])
    while now < 10 * window_us:
        if window.look(now, limit, 1).allowed:
            window.charge(now, 1)
            admitted.append((now, 1))
        if len(exact) - bisect.bisect_right(exact, now - window_us) < limit:
            exact.append(now)
        assert len(window) <= ENTRIES_PER_WINDOW + 2
        now += 1 + int(draw.expovariate(1 / mean_us))

    assert most_in_a_window(admitted, window_us) == limit
    assert len(admitted) >= 0.99 * len(exact)


def test_a_large_limit_is_remembered_in_few_entries() -> None:
    """60,000 in a minute, all used."""
    window = Window(60_000_000)
    for now in range(1, 60_000_000, 1_000):
        assert window.look(now, 60_000, 1).allowed
        window.charge(now, 1)

    assert not window.look(60_000_000, 60_000, 1).allowed
    assert len(window) <= ENTRIES_PER_WINDOW + 2


def test_a_clock_that_goes_back_stands_still() -> None:
    """Nobody is let in because it is earlier than it was."""
    limiter, charge = LocalLimiter(1_000), Charge("k", Kind.REQUESTS, "user", 1)

    assert limiter.admit(5_000, [charge]).allowed
    refused = limiter.admit(1_000, [charge])
    assert (refused.allowed, refused.now_us, refused.verdicts[0].retry_after_us) == (False, 5_000, 1_000)
    assert limiter.admit(6_000, [charge]).allowed


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[Any]:
    pool = redis.BlockingConnectionPool.from_url(valkey.url, max_connections=16)
    async with redis.Redis.from_pool(pool) as client:
        yield client


CHARGES = st.lists(
    st.tuples(st.sampled_from(list(Kind)), st.integers(0, 1), st.integers(1, 6), st.integers(1, 9)),
    min_size=1,
    max_size=4,
    unique_by=lambda drawn: drawn[:2],
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), CHARGES, st.integers(0, 2)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.integers(0, 18), st.booleans(), st.booleans()),
        st.tuples(st.just("renew"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.sampled_from([0.0005, 0.003, 0.008])),
    ),
    max_size=30,
)
"""Admissions by several limits at once, of which some come again; corrections up and down, leases ended, renewed and left to expire."""
_runs = 0


async def redis_time_us(client: Any) -> int:
    seconds, rest = await client.time()
    return int(seconds) * 1_000_000 + int(rest)


@given(WINDOWS_US, STEPS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_redis_decides_as_the_model_does(client: Any, window_us: int, steps: list[tuple[Any, ...]]) -> None:
    """Verdict by verdict, at the times that Redis itself gave."""
    global _runs
    _runs += 1
    shared, model = RedisLimiter(client, window_us, LEASE_US), LocalLimiter(window_us, LEASE_US)
    admitted: list[tuple[Outcome, list[Charge], str]] = []
    grants = ["", f"{{run{_runs}}}first", f"{{run{_runs}}}second"]
    for number, (what, *drawn) in enumerate(steps):
        if what == "admit":
            charges = [Charge(f"{{run{_runs}}}{kind}{who}", kind, "user", limit, amount) for kind, who, limit, amount in drawn[0]]
            charges = [Charge(c.key, c.kind, c.scope, c.limit, 1 if c.kind is Kind.CONCURRENCY else c.amount) for c in charges]
            lease, grant = f"lease{number}", grants[drawn[1]]
            outcome = await shared.admit(charges, lease, grant)
            assert outcome == model.admit(outcome.now_us, charges, lease, grant)
            if outcome.allowed:
                admitted.append((outcome, charges, grant))
        elif what == "wait":
            await asyncio.sleep(drawn[0])
        elif admitted:
            outcome, charges, grant = admitted[drawn[0] % len(admitted)]
            lease = outcome.lease
            lease_keys = [charge.key for charge in charges if charge.kind is Kind.CONCURRENCY]
            if what == "renew":
                # Between two clocks: the model is told the end that Redis gave, so that nothing depends on how long the call took.
                await shared.renew([(key, lease) for key in lease_keys])
                for key in lease_keys:
                    model.hold(int(await client.zscore(key, lease)) - LEASE_US, [(key, lease)])
            else:
                windows = zip(charges, outcome.verdicts, strict=True)
                corrections = [Correction(c.key, v.entry, v.charged, drawn[1]) for c, v in windows if c.kind is Kind.TOKENS and v.charged]
                settlement = Settlement(corrections, lease if drawn[3] else "", lease_keys, grant, lasts=drawn[2])
                model.settle(await shared.settle(settlement), settlement)


async def test_redis_stands_still_when_its_clock_goes_back(client: Any) -> None:
    """As after a failover to a server whose clock is behind."""
    shared, charge = RedisLimiter(client, 1_000_000), Charge("{still}k", Kind.REQUESTS, "user", 1)
    first = await shared.admit([charge])
    ahead = first.now_us + 5_000_000
    await client.hset(charge.key, mapping={"m": f"{first.now_us} {first.now_us + 1} 1 {ahead} {ahead}", str(first.now_us): f"{ahead} 1"})
    refused = await shared.admit([charge])

    assert (refused.allowed, refused.now_us, refused.verdicts[0].retry_after_us) == (False, ahead, 1_000_000)


async def test_two_gateways_never_admit_more_than_the_limit_and_use_nearly_all_of_it(valkey: Valkey) -> None:
    """100 in 10 s, 2 gateways with 200 tasks each, who ask at moments drawn at random, for two windows and a half; two such users."""
    seeds, window_us, limit = (1, 20261126), 10_000_000, 100
    print(f"seeds {seeds}")
    charges = {seed: Charge(f"{{bar{seed}}}requests", Kind.REQUESTS, "user", limit) for seed in seeds}
    clients = [redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(valkey.url, max_connections=32)) for _ in range(2)]
    admitted: dict[int, list[tuple[int, int]]] = {seed: [] for seed in seeds}
    try:
        gateways = [RedisLimiter(client, window_us, timeout_s=30) for client in clients]
        ends_us = await redis_time_us(clients[0]) + int(2.5 * window_us)

        async def asks(gateway: RedisLimiter, seed: int, pauses: random.Random) -> None:
            while True:
                await asyncio.sleep(pauses.expovariate(1.0))
                outcome = await gateway.admit([charges[seed]])
                if outcome.now_us >= ends_us:
                    return
                if outcome.allowed:
                    admitted[seed].append((outcome.now_us, 1))

        draws = {seed: random.Random(seed) for seed in seeds}
        async with asyncio.timeout(60):
            await asyncio.gather(
                *(asks(one, seed, random.Random(draw.random())) for seed, draw in draws.items() for one in gateways for _ in range(200))
            )
        remembered = [await clients[0].hlen(charge.key) for charge in charges.values()]
    finally:
        for client in clients:
            await client.aclose()

    for moments in admitted.values():
        assert most_in_a_window(sorted(moments), window_us) <= limit
        # Of the three windows that began, each could be used up.
        assert len(moments) >= 0.99 * 3 * limit
    assert max(remembered) <= ENTRIES_PER_WINDOW + 3


async def test_many_at_once_share_one_limit_and_those_refused_leave_no_trace(client: Any) -> None:
    """All or nothing: where the tenant refuses, the user is charged nothing."""
    shared = RedisLimiter(client, 60_000_000)
    user, tenant = Charge("{crowd}user", Kind.TOKENS, "user", 10_000, 7), Charge("{crowd}tenant", Kind.REQUESTS, "tenant", 100)
    outcomes = await asyncio.gather(*(shared.admit([user, tenant]) for _ in range(200)))
    left = (await shared.admit([user])).verdicts[0].remaining

    assert sum(outcome.allowed for outcome in outcomes) == 100
    assert left == 10_000 - 101 * 7


async def test_a_redis_that_forgot_the_script_learns_it_again_and_keys_end(client: Any) -> None:
    """A key does not outlive its window, or its lease, by much."""
    await client.script_flush()
    charges = [Charge("{forgetful}w", Kind.REQUESTS, "user", 1), Charge("{forgetful}l", Kind.CONCURRENCY, "user", 1)]
    outcome = await RedisLimiter(client, 1_000_000, 500_000).admit(charges, "a")

    assert outcome.allowed
    assert 0 < await client.pttl("{forgetful}w") <= 2_000
    assert 0 < await client.pttl("{forgetful}l") <= 1_500


async def test_a_reply_that_never_comes_is_waited_for_no_longer_than_the_bound() -> None:
    """A server that takes everything and says nothing."""
    connected = asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, redis.Redis(port=port) as silent, asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await RedisLimiter(silent, timeout_s=0.1).admit([Charge("{k}", Kind.REQUESTS, "user", 1)])

    assert connected.is_set()
