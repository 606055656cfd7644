"""The stores that replicas share for tools: one law for the real ones and for the stand-ins the unit tests use."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import redis.asyncio as redis

from services.chassis.errors import Overloaded, Unavailable
from services.local.stores import Valkey
from services.orchestrator.domain import Message, Passage, Prompt, Suspended, ToolCall, ToolResult, ToolSpec
from services.orchestrator.redis_tools import RedisPendingCalls, RedisWords
from tests.fakes.scripted_model import NOW, Pending, Words

OWNER = ("acme", "alice")


def suspended(answer_id: str) -> Suspended:
    spec = ToolSpec("weather", "of a town", {"type": "object", "properties": {"town": {"enum": ["Oslo", 3, None, 1.5, True]}}})
    passage = Passage(1, "d", "c", "Title", "uri", "text", 0, 4, 0.25, ("A", "B"), 2, 3, ("instructions",))
    calling = Message("assistant", "One moment.", calls=(ToolCall("w", "weather", '{"town": "Oslo"}', b"\x00\xffopaque"),))
    messages = (Message("user", "q"), calling)
    prompt = Prompt("template-1", "system", messages, "q", (passage,), 123, (spec,), {"type": "object"})
    results = (ToolResult("d", "double", "42", failed=True),)
    return Suspended(answer_id, OWNER, "session", "default", "fast", "q", prompt, True, results, (spec,), ("double",), NOW, "gpt-6-luna")


@pytest.fixture(params=["memory", "valkey"])
async def stores(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[tuple[Any, Any]]:
    if request.param == "memory":
        yield Pending(), Words()
        return
    async with redis.Redis.from_url(valkey.url) as client:
        yield RedisPendingCalls(client, kept_s=60, bytes_max=1_000_000, timeout_s=5), RedisWords(client, 5)


async def test_what_is_kept_comes_back_whole_for_its_owner_alone(stores: tuple[Any, Any]) -> None:
    """With bytes that are opaque to us, and values of every kind."""
    pending, _ = stores
    kept = suspended(secrets.token_hex(8))
    await pending.keep(kept)

    assert await pending.find(OWNER, kept.answer_id) == kept == await pending.find(OWNER, kept.answer_id)
    for stranger in (("acme", "bob"), ("other", "alice")):
        assert await pending.find(stranger, kept.answer_id) is None
    assert await pending.find(OWNER, secrets.token_hex(8)) is None


async def test_the_first_word_counts_and_only_who_waits_hears_one(stores: tuple[Any, Any]) -> None:
    """Before it waits and after it has ended, nobody is told that a word was heard."""
    _, words = stores
    answer = secrets.token_hex(8)

    assert await words.say(answer, "a", True) is False and await words.hear(answer, "a") is None
    await words.ask(answer, "a", 30)
    await words.ask(answer, "b", 30)
    assert await words.hear(answer, "a") is None
    assert [True, False] == [await words.say(answer, "a", False), await words.say(answer, "a", True)]
    assert await words.hear(answer, "a") is False and await words.hear(answer, "b") is None
    assert await words.end(answer, "a") is False and await words.end(answer, "b") is None
    assert await words.say(answer, "a", True) is False and await words.say(answer, "b", True) is False


async def test_what_waits_has_a_bound_that_opens_again_with_time(valkey: Valkey) -> None:
    """The room of one replica, whoever fills it."""
    now = 0.0
    async with redis.Redis.from_url(valkey.url) as client:
        pending = RedisPendingCalls(client, kept_s=60, bytes_max=4_000, timeout_s=5, now=lambda: now)
        kept = suspended(secrets.token_hex(8))
        large = replace(kept, question="x" * 3_000)
        await pending.keep(large)
        with pytest.raises(Overloaded):
            await pending.keep(large)
        with pytest.raises(Overloaded):
            await pending.keep(replace(kept, question="x" * 3_000_000))
        now = 61.0
        await pending.keep(large)


async def test_a_store_that_is_away_is_unavailable() -> None:
    """By its name."""
    async with redis.Redis.from_url("redis://127.0.0.1:9", socket_connect_timeout=1, retry=None) as client:
        pending, words = RedisPendingCalls(client, kept_s=60, bytes_max=1_000, timeout_s=2), RedisWords(client, 2)
        for doing in (
            pending.find(OWNER, "a"),
            words.ask("a", "b", 1),
            words.say("a", "b", True),
            words.hear("a", "b"),
            words.end("a", "b"),
        ):
            with pytest.raises(Unavailable) as raised:
                await doing
            assert raised.value.metadata["dependency"] == "redis"
