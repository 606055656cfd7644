"""The exact cache on a real Valkey: what is kept comes back whole, to nobody else, whatever is cancelled around it."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import redis.asyncio as redis

from services.chassis.errors import Unavailable
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.local.stores import Valkey
from services.orchestrator.domain import CachedAnswer, Candidate, Edition, HeldAnswer, Passage, Question
from services.orchestrator.redis_cache import VALUE_BYTES_MAX, RedisCache, cache_key

CREATED = datetime(2026, 1, 1, 12, 30, tzinfo=UTC)
ANSWER = CachedAnswer(
    "a1",
    "Which port?",
    "alice",
    "8080 [1] – schön",
    (Passage(1, "d", "c", "t", "u", "text", 3, 7, 0.5, ("h1", "h2"), 4),),
    "m",
    "p",
    123,
    CREATED,
    "end_turn",
    Usage(5, 6, 7, 8, 2),
)


def question(text: str = "Which port?", tenant: str = "exact-tests") -> Question:
    return Question("a", text, Principal(tenant, "alice"), "s", True, "fast", (Candidate("p", "m", 1, 1),), 10, "default", "use", CREATED)


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[redis.Redis]:
    pool = redis.BlockingConnectionPool.from_url(valkey.url, max_connections=8, timeout=2)
    async with redis.Redis.from_pool(pool) as opened:
        yield opened


async def test_answer_comes_back_as_it_was_kept(client: redis.Redis) -> None:
    """Every field, to the microsecond and the code point; and it goes by itself after its time."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)
    assert await cache.put(question(), "scope", HeldAnswer(ANSWER, Edition(1)))

    assert await cache.get(question(" which  port"), "scope") == HeldAnswer(ANSWER, Edition(1))
    assert 0 < await client.ttl(cache_key(question(), "scope")) <= 100


@pytest.mark.parametrize("other", [(question(tenant="exact-other"), "scope"), (question(), "scope2")])
async def test_answer_is_found_in_its_own_place_alone(client: redis.Redis, other: tuple[Question, str]) -> None:
    """Tenant, scope."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)
    await cache.put(question(), "scope", HeldAnswer(ANSWER, Edition(1)))

    assert await cache.get(*other) is None


async def test_value_of_another_tenant_under_our_key_is_refused(client: redis.Redis) -> None:
    """The mark in the value is a second lock."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)
    theirs = question("Whose?", "exact-theirs")
    await cache.put(theirs, "scope", HeldAnswer(ANSWER, Edition(1)))
    value = await client.get(cache_key(theirs, "scope"))
    await client.set(cache_key(question("Whose?"), "scope"), value)

    assert await cache.get(question("Whose?"), "scope") is None
    assert cache.failures == 1


async def test_answers_of_a_user_are_forgotten_and_nobody_elses(client: redis.Redis) -> None:
    """Under whatever scope. Others of the tenant, and a user of the same name elsewhere, keep theirs. Broken values are no hindrance."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)
    name = "erased-here"
    own = HeldAnswer(replace(ANSWER, user=name), Edition(1))
    many = [question(f"Which of {number}?") for number in range(150)]  # more than are looked at together
    for each in many:
        await cache.put(each, "tenant", own)
    await cache.put(question("Whose is it?"), "user", own)
    await cache.put(question("Of another?"), "tenant", HeldAnswer(ANSWER, Edition(1)))
    await cache.put(question("Elsewhere?", "exact-other"), "tenant", own)
    await client.set(cache_key(question("Broken?"), "tenant"), b"\xc1garbage", ex=100)

    assert await cache.forget("exact-tests", name) == len(many) + 1
    assert await cache.forget("exact-tests", name) == 0
    assert [each for each in many if await cache.get(each, "tenant")] == []
    assert await cache.get(question("Whose is it?"), "user") is None
    assert await cache.get(question("Of another?"), "tenant")
    assert await cache.get(question("Elsewhere?", "exact-other"), "tenant")


async def test_a_store_that_is_away_is_said_to_who_wants_answers_forgotten() -> None:
    """An erasure that was not made must not look like one."""
    nobody: redis.Redis = redis.Redis.from_url("redis://127.0.0.1:1", socket_connect_timeout=1)
    async with nobody:
        with pytest.raises(Unavailable):
            await RedisCache(nobody, ttl_s=100, timeout_s=1).forget("exact-tests", "erased-here")


async def test_value_that_is_broken_is_a_miss(client: redis.Redis) -> None:
    """Garbage is counted, not raised."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)
    await client.set(cache_key(question("Broken?"), "scope"), b"\xc1garbage")

    assert await cache.get(question("Broken?"), "scope") is None
    assert cache.failures == 1


async def test_answer_too_large_is_not_kept(client: redis.Redis) -> None:
    """The bound holds, and the answer is simply not cached."""
    cache = RedisCache(client, ttl_s=100, timeout_s=2)

    assert not await cache.put(question("Large?"), "scope", HeldAnswer(replace(ANSWER, text="x" * VALUE_BYTES_MAX), Edition(1)))


async def test_cache_that_is_away_costs_one_answer_a_moment_and_the_others_nothing() -> None:
    """After a failure it is left alone for a second."""
    async with redis.Redis(host="127.0.0.1", port=1) as away:
        cache = RedisCache(away, ttl_s=100, timeout_s=0.2)
        for _ in range(50):
            assert await cache.get(question(), "scope") is None

    assert cache.failures == 1


async def test_cancel_storm_never_gives_one_question_the_reply_of_another(client: redis.Redis) -> None:
    """Two thousand commands over eight connections, half of them cancelled wherever they are: every reply is its own."""
    cache = RedisCache(client, ttl_s=100, timeout_s=5)
    for number in range(40):
        await cache.put(question(f"Storm {number}?"), "scope", HeldAnswer(replace(ANSWER, text=f"answer {number}"), Edition(1)))
    dice = random.Random(7)
    wrong: list[tuple[int, str]] = []

    async def ask(number: int) -> None:
        found = await cache.get(question(f"Storm {number}?"), "scope")
        if found is not None and found.answer.text != f"answer {number}":
            wrong.append((number, found.answer.text))

    for _ in range(40):
        asking = [asyncio.create_task(ask(dice.randrange(40))) for _ in range(50)]
        for task in asking:
            if dice.random() < 0.5:
                asyncio.get_running_loop().call_later(dice.random() * 0.004, task.cancel)
        await asyncio.gather(*asking, return_exceptions=True)

    assert wrong == []
    assert cache.failures == 0


async def test_lines_that_died_with_the_store_cost_no_answer(valkey: Valkey) -> None:
    """Several idle connections are cut, as by a restart: the next command is done on a new one."""
    pool = redis.BlockingConnectionPool.from_url(valkey.url, max_connections=8, timeout=2, retry=None)
    async with redis.Redis.from_pool(pool) as client, redis.Redis.from_url(valkey.url) as other:
        cache = RedisCache(client, ttl_s=100, timeout_s=2)
        await asyncio.gather(*(cache.get(question(f"question {number}"), "scope") for number in range(6)))
        await other.client_kill_filter(_type="normal", skipme=True)

        assert await cache.put(question(), "scope", HeldAnswer(ANSWER, Edition(1)))
        assert await cache.get(question(), "scope") == HeldAnswer(ANSWER, Edition(1))
        assert cache.failures == 0
