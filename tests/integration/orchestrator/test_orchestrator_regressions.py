"""Failures that others have had with streams and money, each as a test with the name of the failure: it does not happen here.

Those that were tests before are in tests/fault/test_orchestrator_faults.py (`upstream_not_closed`, `usage_lost_on_disconnect`,
`upstream_failure_mid_stream_not_logged`, `explicit_zero_becomes_guess`) and among the gateway's tests.
"""

import asyncio
import inspect
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from services.chassis.errors import AnswerCancelled, Internal, PriceUnknown
from services.chassis.money import Usage
from services.chassis.redis_pool import PatientPool
from services.local.stores import Valkey
from services.orchestrator import answer, attempts, reuse, turns
from services.orchestrator.domain import CachedAnswer, Candidate, Edition, HeldAnswer, Question
from services.orchestrator.redis_cache import RedisCache
from services.orchestrator.rpc import OrchestratorRpc
from services.orchestrator.run import Run
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, PRICES, Reply, World, until, world

QUESTION = "Which port does the gateway listen on?"


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator at the simulated provider. Whatever a test does, no hold is left open after it."""
    async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_DETACH_GRACE_S="0.2") as running:
        yield running
        await until(lambda: not running.ledger.open_holds)


async def test_unknown_price_skips_reservation(claude: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that has no price is refused before its provider hears of it, and nothing is booked as used."""
    monkeypatch.delitem(PRICES, "claude-haiku-5-5")
    reply = Reply()
    with pytest.raises(PriceUnknown):
        await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, into=reply)
    operation = await claude.booked(reply.answer_id)

    assert await claude.records() == []
    assert (operation.error_reason, len(operation.attempts)) == (PriceUnknown.reason, 0)


async def test_cancel_unwinds_generator_so_drain_reads_nothing(claude: World) -> None:
    """What was read before a cancel is not lost with the reader: it is booked, though the provider never said its usage."""
    claude.behave(tokens=1000, tokens_per_s=200)
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, into=reply))
    await until(lambda: len(reply.text.split()) >= 40)
    await claude.cancel(reply.answer_id)
    with pytest.raises(AnswerCancelled):
        await asking
    (attempt,) = (await claude.booked(reply.answer_id)).attempts

    assert attempt.usage.output_tokens >= len(reply.text.split()) >= 40
    assert attempt.estimated


async def test_usage_written_after_loop_instead_of_finally(claude: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours in the middle of the text ends the answer, and what was used until then is booked all the same."""
    write = Run.write

    def breaks(run: Run, text: str) -> None:
        write(run, text)
        if len(run.pieces) == 7:
            raise ZeroDivisionError

    monkeypatch.setattr(Run, "write", breaks)
    claude.behave(tokens=50, tokens_per_s=200)
    reply = Reply()
    with pytest.raises(Internal):
        await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, into=reply)
    (attempt,) = (await claude.booked(reply.answer_id)).attempts

    assert attempt.usage.output_tokens >= 7
    assert attempt.usage.input_tokens > 0
    assert attempt.estimated


async def test_generator_finalised_by_gc(claude: World) -> None:
    """No step of an answer is an async generator, and none of ours is left for the collector when readers go away."""
    for module in (answer, attempts, reuse, turns):
        assert not [name for name, work in vars(module).items() if inspect.isasyncgenfunction(work)]
    assert not [name for name, work in vars(OrchestratorRpc).items() if inspect.isasyncgenfunction(work)]
    left: list[str] = []
    hooks = sys.get_asyncgen_hooks()

    def finalised(generator: Any) -> None:
        left.append(generator.ag_code.co_filename)
        if hooks.finalizer is not None:
            hooks.finalizer(generator)

    sys.set_asyncgen_hooks(finalizer=finalised)
    try:
        claude.behave(tokens=1000, tokens_per_s=100)
        for _ in range(5):
            reply = Reply()
            asking = asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, cancel_on_disconnect=True, into=reply))
            await until(lambda: reply.text)  # noqa: B023 - waited for within the round
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await claude.booked(reply.answer_id)
    finally:
        sys.set_asyncgen_hooks(*hooks)

    assert [name for name in left if "/services/orchestrator/" in name] == []


async def test_cancelled_command_reply_to_next_user(valkey: Valkey) -> None:
    """A cache look-up that is cancelled in flight leaves no reply on the connection for whoever uses it next."""
    pool = PatientPool.from_url(valkey.url, max_connections=2, timeout=5, retry=None)
    async with redis.Redis.from_pool(pool) as client:
        cache, chance = RedisCache(client, ttl_s=60, timeout_s=5), random.Random(11)
        question = Question(
            "a", "q", ALICE, "s", True, "fast", (Candidate("p", "m", 10, 10),), 10, "default", "use", datetime(2026, 1, 1, tzinfo=UTC)
        )
        kept = CachedAnswer("", "", "alice", "", (), "m", "p", 0, datetime(2026, 1, 1, tzinfo=UTC), "end_turn", Usage())
        asked = [replace(question, text=f"question number {number}") for number in range(40)]
        for number, each in enumerate(asked):
            assert await cache.put(each, "scope", HeldAnswer(replace(kept, text=str(number)), Edition(1)))
        for _ in range(15):
            looking = {number: asyncio.create_task(cache.get(each, "scope")) for number, each in enumerate(asked)}
            for task in looking.values():
                if chance.random() < 0.5:
                    asyncio.get_running_loop().call_later(chance.random() / 200, task.cancel)
            await asyncio.wait(looking.values())
            for number, task in looking.items():
                if not task.cancelled():
                    held = task.result()
                    assert held is not None
                    assert held.answer.text == str(number)

        assert cache.failures == 0
