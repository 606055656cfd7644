"""Two orchestrators, one Valkey: what one makes, the other serves, to the byte."""

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from services.chassis.errors import AnswerCancelled, AnswerLogGone, IdempotencyConflict, NotFound, Unavailable
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import BOB, MALLORY, Reply, World, replica, until, world

QUESTION = "Which port does the gateway listen on?"


@pytest.fixture
async def pair(tmp_path: Path, valkey: Valkey) -> AsyncIterator[tuple[World, World]]:
    async with world(tmp_path / "one", valkey.url, TAILRACE_ORCHESTRATOR_DETACH_GRACE_S="1") as one:
        async with replica(one, tmp_path / "two") as two:
            yield one, two
            await until(lambda: not one.ledger.open_holds)


def bytes_of(reply: Reply) -> list[bytes]:
    return [event.SerializeToString(deterministic=True) for event in reply.events if not event.HasField("heartbeat")]


async def test_every_place_of_an_answer_is_resumed_at_the_other_replica(pair: tuple[World, World]) -> None:
    """While it is made and afterwards: the same bytes under the same numbers, one provider call, one operation."""
    one, two = pair
    one.behave(tokens=40, tokens_per_s=200)
    reply = Reply()
    asking = asyncio.create_task(one.ask(QUESTION, into=reply, cache=pb.CACHE_MODE_OFF))
    await until(lambda: "delta" in reply.kinds)
    live = [asyncio.create_task(two.resume(reply.answer_id, after)) for after in (0, 1, len(reply.events))]
    whole = bytes_of(await asking)
    for after, resumed in zip((0, 1), await asyncio.gather(*live), strict=False):
        assert bytes_of(resumed) == whole[after:]
    assert whole[-len(bytes_of(live[2].result())) :] == bytes_of(live[2].result())
    for after in random.Random(7).sample(range(len(whole) + 1), 10):
        assert bytes_of(await two.resume(reply.answer_id, after)) == whole[after:]

    assert len(await one.records()) == 1
    assert len(one.ledger.operations) == 1


async def test_foreign_answers_are_not_found_at_the_other_replica(pair: tuple[World, World]) -> None:
    """Neither by a colleague nor by a namesake of another tenant."""
    one, two = pair
    reply = await one.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    for principal in (BOB, MALLORY):
        with pytest.raises(NotFound, match="there is no such answer"):
            await two.resume(reply.answer_id, principal=principal)
        with pytest.raises(NotFound, match="there is no such answer"):
            await two.cancel(reply.answer_id, principal=principal)


async def test_stop_at_the_other_replica_closes_the_provider(pair: tuple[World, World]) -> None:
    """At once, before the first token and in the middle; readers of both get the one end, and it is booked."""
    one, two = pair
    for behaviour in ({"ttft_ms": 30_000}, {"tokens": 1000, "tokens_per_s": 100}):
        one.behave(**behaviour)
        reply = Reply()
        asking = asyncio.create_task(one.ask(QUESTION, into=reply, cache=pb.CACHE_MODE_OFF))
        await until(lambda: reply.steps().get("generate") == "running" and ("delta" in reply.kinds or "tokens" not in behaviour))  # noqa: B023
        began = asyncio.get_running_loop().time()
        elsewhere = asyncio.create_task(two.resume(reply.answer_id))
        assert await two.cancel(reply.answer_id)
        for reading in (asking, elsewhere):
            with pytest.raises(AnswerCancelled):
                await reading
        assert asyncio.get_running_loop().time() - began < 5
        assert (await one.booked(reply.answer_id)).status == "cancelled"
        assert not await two.cancel(reply.answer_id)


async def test_same_key_at_both_replicas_is_one_answer(pair: tuple[World, World]) -> None:
    """Asked at the same moment and asked again later; another body is refused."""
    one, two = pair
    asked = [where.ask(QUESTION, idempotency_key="k-pair", cache=pb.CACHE_MODE_OFF) for where in (one, two, one, two)]
    first, *others = [bytes_of(reply) for reply in await asyncio.gather(*asked)]
    again = await two.ask(QUESTION, idempotency_key="k-pair", cache=pb.CACHE_MODE_OFF, deadline_ms=5000)

    assert others == [first] * 3
    assert bytes_of(again) == first
    assert len(await one.records()) == 1
    with pytest.raises(IdempotencyConflict):
        await two.ask("Another question?", idempotency_key="k-pair")


async def test_answer_read_elsewhere_outlives_the_grace(pair: tuple[World, World]) -> None:
    """Its asker is gone for longer than the grace; a reader at the other replica keeps it alive to its end."""
    one, two = pair
    one.behave(tokens=60, tokens_per_s=25)
    reply = Reply()
    asking = asyncio.create_task(one.ask(QUESTION, into=reply, cache=pb.CACHE_MODE_OFF))
    await until(lambda: "delta" in reply.kinds)
    reading = asyncio.create_task(two.resume(reply.answer_id))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    assert (await reading).done.usage.output_tokens == 60


async def test_store_that_dies_in_the_middle_costs_no_answer(tmp_path: Path) -> None:
    """The reader here notices nothing; when the store is back, empty, the whole log is there for everybody."""
    valkey = Valkey(tmp_path / "valkey")
    await valkey.start()
    try:
        async with world(tmp_path / "one", valkey.url) as one, replica(one, tmp_path / "two") as two:
            one.behave(tokens=60, tokens_per_s=30)
            reply = Reply()
            asking = asyncio.create_task(one.ask(QUESTION, into=reply, cache=pb.CACHE_MODE_OFF))
            await until(lambda: len(reply.text) > 30)
            await valkey.stop()
            shutil.rmtree(tmp_path / "valkey" / "appendonlydir")
            await valkey.start()
            whole = bytes_of(await asking)

            async def shared() -> Reply | None:
                with contextlib.suppress(NotFound, AnswerLogGone, Unavailable):
                    return await two.resume(reply.answer_id)
                return None

            assert bytes_of(await found(shared)) == whole
    finally:
        await valkey.stop()


async def found(probe: Callable[[], Awaitable[Reply | None]]) -> Reply:
    async with asyncio.timeout(20):
        while (reply := await probe()) is None:  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.05)
        return reply
