"""One connection for every call of a process: whose reply is whose, whatever happens to the others or to the connection."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from services.gateway.redis_line import RedisLine
from services.local.stores import Valkey
from tests.integration.gateway.conftest import until

ECHO = "return ARGV[1]"
NAME = "line-under-test"


def line_to(valkey: Valkey, silence_max_s: float = 10.0) -> RedisLine:
    return RedisLine(redis.ConnectionPool.from_url(valkey.url, client_name=NAME, retry=Retry(NoBackoff(), 0)), silence_max_s=silence_max_s)


@pytest.fixture
async def line(valkey: Valkey) -> AsyncIterator[RedisLine]:
    opened = line_to(valkey)
    yield opened
    await opened.aclose()


async def connections(client: "redis.Redis") -> list[str]:
    """Ids of the connections under test: others use the same Valkey."""
    return [each["id"] for each in await client.client_list() if each["name"] == NAME]


async def test_calls_at_the_same_time_get_each_its_own_reply_over_one_connection(line: RedisLine, valkey: Valkey) -> None:
    """Also when some are given up on the way: their replies are thrown away and go to nobody else."""
    chance = random.Random(7)
    await line.ping()
    async with redis.Redis.from_url(valkey.url) as other:
        await other.client_pause(60_000, all=False)  # scripts wait, so that every call is sent before the first of them is given up
        calls = [asyncio.create_task(line.eval(ECHO, 0, f"call-{number}")) for number in range(400)]
        await asyncio.sleep(0)
        given_up = {number for number in range(400) if chance.random() < 0.3}
        for number in given_up:
            calls[number].cancel()
        await other.client_unpause()
        replies = await asyncio.gather(*calls, return_exceptions=True)

        assert len(await connections(other)) == 1
    assert {number for number, reply in enumerate(replies) if isinstance(reply, asyncio.CancelledError)} == given_up
    assert all(reply == b"call-%d" % number for number, reply in enumerate(replies) if number not in given_up)
    assert await line.eval(ECHO, 0, "after") == b"after"


async def test_a_refused_call_fails_alone(line: RedisLine) -> None:
    """An error is the reply of its own call."""
    calls = (line.eval(ECHO, 0, "good"), line.eval("return redis.error_reply('ERR no')", 0), line.evalsha("0" * 40, 0))
    good, wrong, unknown, last = await asyncio.gather(*calls, line.eval(ECHO, 0, "last"), return_exceptions=True)

    assert (good, last) == (b"good", b"last")
    assert isinstance(wrong, ResponseError)
    assert isinstance(unknown, NoScriptError)


async def test_a_lost_connection_fails_who_waits_and_is_made_again(line: RedisLine, valkey: Valkey) -> None:
    """What waits cannot know whether it was carried out, so it is told; what comes after is served."""
    await line.ping()
    async with redis.Redis.from_url(valkey.url) as other:
        await other.client_pause(60_000, all=False)  # what writes waits
        waiting = asyncio.create_task(line.eval("return redis.call('INCR', KEYS[1])", 1, "tailrace:test:line"))
        await asyncio.sleep(0)
        (number,) = await connections(other)
        await other.client_kill_filter(_id=number)
        with pytest.raises(RedisError):
            await waiting
        await other.client_unpause()

    assert await line.eval(ECHO, 0, "again") == b"again"


async def test_a_silence_fails_who_waits_and_the_next_call_begins_anew(valkey: Valkey) -> None:
    """A reply that comes too late goes to nobody: the connection it would come over is gone."""
    line = line_to(valkey, silence_max_s=0.1)
    async with redis.Redis.from_url(valkey.url) as other:
        await line.ping()
        await other.client_pause(60_000, all=False)
        first, second = await asyncio.gather(
            *(line.eval("return redis.call('INCR', KEYS[1])", 1, "tailrace:test:silence") for _ in range(2)), return_exceptions=True
        )
        await other.client_unpause()

        async def echoed() -> bool:
            try:
                return bool(await line.eval(ECHO, 0, "back") == b"back")
            except RedisError:  # a slow machine may be silent for so long
                return False

        assert isinstance(first, RedisError)
        assert isinstance(second, RedisError)
        assert await until(echoed)
    await line.aclose()


async def test_without_redis_a_call_fails_and_leaves_nothing_behind() -> None:
    """Refused connections are errors of the call, again and again."""
    line = RedisLine(redis.ConnectionPool.from_url("redis://127.0.0.1:1/0", retry=Retry(NoBackoff(), 0)))
    for _ in range(2):
        with pytest.raises((RedisError, OSError)):
            await line.ping()
    await line.aclose()
