"""The sliding window: in no window of its length are more admitted than the limit, and Redis decides as the pure model does."""

import asyncio
import random

import redis.asyncio as redis
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.redis_window import RedisWindow
from services.gateway.window import Window
from services.local.stores import Valkey

WINDOW_US = 1000

ARRIVALS = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 5)), max_size=60)
"""Microseconds since the request before, and the limit in force."""


@given(ARRIVALS)
def test_no_window_holds_more_than_the_limit(arrivals: list[tuple[int, int]]) -> None:
    """Wherever it begins; and whoever is refused is told the truth about when to come back."""
    window, now, admitted = Window(WINDOW_US), 10_000, list[int]()
    for pause, limit in arrivals:
        now += pause
        decision = window.admit(now, limit)
        inside = [at for at in admitted if at > now - WINDOW_US]

        assert decision.allowed == (len(inside) < limit)
        if decision.allowed:
            admitted.append(now)
            assert decision.remaining == limit - len(inside) - 1
        else:
            comes_back = now + decision.retry_after_us
            assert sum(at > comes_back - WINDOW_US for at in admitted) < limit
            assert sum(at > comes_back - 1 - WINDOW_US for at in admitted) >= limit


def test_a_clock_that_goes_back_stands_still() -> None:
    """Nobody is let in because it is earlier than it was."""
    window = Window(WINDOW_US)
    assert window.admit(5_000, 1).allowed
    refused = window.admit(1_000, 1)

    assert not refused.allowed
    assert refused.retry_after_us == WINDOW_US
    assert window.admit(6_000, 1).allowed


CASES = 40
LENGTH = 25


async def test_redis_decides_as_the_model_does(valkey: Valkey) -> None:
    """Request by request, at the times that Redis itself gave, with limits and pauses drawn at random."""
    client = redis.Redis.from_url(valkey.url)
    draw = random.Random(20261123)
    try:
        for case in range(CASES):
            window_us = draw.choice([2_000, 5_000, 20_000])
            shared, model = RedisWindow(client, window_us), Window(window_us)
            for _ in range(LENGTH):
                limit = draw.randint(1, 6)
                decision, now_us = await shared.admit_at(f"window-{case}", limit)

                assert decision == model.admit(now_us, limit)
                await asyncio.sleep(draw.choice([0, 0, 0, 0.001, window_us / 1e6]))
    finally:
        await client.aclose()


async def test_many_at_once_share_one_limit(valkey: Valkey) -> None:
    """Two replicas, two hundred requests at the same time, exactly as many as the limit are admitted."""
    clients = [redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(valkey.url, max_connections=16)) for _ in range(2)]
    windows = [RedisWindow(client, 60_000_000) for client in clients]
    try:
        decisions = await asyncio.gather(*(windows[number % 2].admit("crowd", 100) for number in range(200)))
    finally:
        for client in clients:
            await client.aclose()

    assert sum(decision.allowed for decision in decisions) == 100


async def test_a_redis_that_forgot_the_script_learns_it_again(valkey: Valkey) -> None:
    """And a key does not outlive its window by much."""
    client = redis.Redis.from_url(valkey.url)
    try:
        await client.script_flush()
        decision = await RedisWindow(client, 1_000_000).admit("forgetful", 1)
        lives_ms = await client.pttl("forgetful")
    finally:
        await client.aclose()

    assert decision.allowed
    assert 0 < lives_ms <= 2_000
