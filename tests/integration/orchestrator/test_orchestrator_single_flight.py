"""Many who ask the same at once: one provider call, told to all as it comes, and nobody suffers from what befalls another."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from services.chassis.errors import (
    AnswerCancelled,
    BudgetExhausted,
    DeadlineTooShort,
    DomainError,
    ModelFailed,
    ModelOverloaded,
    Unavailable,
)
from services.chassis.principal import Principal
from services.local.stores import Valkey
from services.orchestrator.domain import Flight, SharedEvents
from services.orchestrator.redis_flights import RedisFlights
from services.orchestrator.redis_logs import RedisLogs
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, BOB, MALLORY, Reply, World, replica, until, world

QUESTION = "Which port does the gateway listen on?"
CAROL = Principal("acme", "carol")


@pytest.fixture
async def pair(tmp_path: Path, valkey: Valkey) -> AsyncIterator[tuple[World, World]]:
    async with world(tmp_path / "one", valkey.url, TAILRACE_ORCHESTRATOR_ANSWERS_PER_USER_MAX="200") as one:
        async with replica(one, tmp_path / "two") as two:
            yield one, two
            await until(lambda: not one.ledger.open_holds)


def asking(where: World, into: Reply, principal: Principal = ALICE, question: str = QUESTION, **fields: Any) -> "asyncio.Task[Reply]":
    return asyncio.create_task(where.ask(question, principal=principal, into=into, **fields))


async def ahead(where: World, principal: Principal = ALICE, question: str = QUESTION, **fields: Any) -> "tuple[asyncio.Task[Reply], Reply]":
    """Somebody whose answer has begun."""
    reply = Reply()
    task = asking(where, reply, principal, question, **fields)
    await until(lambda: "delta" in reply.kinds)
    return task, reply


async def test_hundred_same_questions_at_once_are_one_call(pair: tuple[World, World]) -> None:
    """At two replicas, in other words only by their spelling: all are told all of it, with citations, and one pays."""
    one, two = pair
    one.behave(tokens=40, tokens_per_s=200)
    one.ledger.deciding.clear()
    spellings = (QUESTION, "which port does  the gateway listen on")
    replies = [Reply() for _ in range(100)]
    places = [(where, who, words) for _ in range(25) for where in (one, two) for who, words in zip((ALICE, BOB), spellings, strict=True)]
    tasks = [asking(where, reply, who, words) for (where, who, words), reply in zip(places, replies, strict=True)]
    await until(lambda: sum(reply.steps().get("follow") == "running" for reply in replies) == 99)
    one.ledger.deciding.set()
    await asyncio.gather(*tasks)

    assert len(await one.records()) == 1
    made = [reply for reply in replies if reply.done.cache.verdict == "miss"]
    followed = [reply for reply in replies if reply.done.cache.verdict == "coalesced"]
    assert (len(made), len(followed)) == (1, 99)
    assert {reply.text for reply in replies} == {made[0].text}
    assert {reply.done.text_sha256 for reply in replies} == {made[0].done.text_sha256}
    assert len({reply.answer_id for reply in replies}) == 100
    for reply in followed:
        assert reply.kinds.count("citation") == made[0].kinds.count("citation") > 0
        assert reply.kinds.count("passages") == 1
        assert reply.kinds.count("delta") > 1, "as it came, not at the end"
        assert reply.done.cost_nanousd == 0
        assert reply.done.cache.saved_nanousd == made[0].done.cost_nanousd > 0
        assert reply.done.cache.source_answer_id == made[0].answer_id
        assert (reply.done.model, reply.done.verdict) == (made[0].done.model, "passed")
        booked = await one.booked(reply.answer_id)
        assert (booked.status, booked.cost_nanousd, len(booked.attempts), booked.cache.verdict) == ("done", 0, 0, "coalesced")
        await until(lambda: booked.session_id in one.ledger.turns)  # noqa: B023 - awaited at once
        assert [turn.complete for turn in one.ledger.turns[booked.session_id]] == [True]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("through", [0, 1])
async def test_who_asked_first_may_leave(pair: tuple[World, World], where: int, through: int) -> None:
    """Stopped at its own replica or through the other, while somebody follows here or there: they get all of it, its owner no more,
    at neither replica."""
    one, _ = pair
    one.behave(tokens=250, tokens_per_s=100)
    first_task, first = await ahead(one)
    other_task, other = await ahead(pair[where], BOB)
    assert await pair[through].cancel(first.answer_id)
    with pytest.raises(AnswerCancelled):
        await first_task
    left_with = first.text
    assert (await other_task).done.cache.verdict == "coalesced"

    assert first.text == left_with != other.text
    assert other.text.startswith(left_with)
    (record,) = await one.records()
    assert record.state == "finished"
    assert not await one.cancel(first.answer_id)
    for at in pair:
        again = Reply()
        with pytest.raises(AnswerCancelled):
            async with at.caller.stream(
                at.stub.ResumeAnswer, pb.ResumeAnswerRequest(answer_id=first.answer_id), timeout_s=10, principal=ALICE
            ) as events:
                async for event in events:
                    again.events.append(event)
        assert again.text == left_with
        assert not await at.cancel(first.answer_id)


async def test_whose_disconnect_is_a_cancel_leaves_it_to_those_who_follow(pair: tuple[World, World]) -> None:
    """It is made on while somebody is told it, here or there, and ends with the last of them."""
    one, two = pair
    for where in (one, two):
        one.behave(tokens=100, tokens_per_s=100)
        question = f"{QUESTION} {'once' if where is one else 'twice'}"
        first_task, _ = await ahead(one, question=question, cancel_on_disconnect=True)
        other_task, _ = await ahead(where, BOB, question)
        first_task.cancel()
        assert (await other_task).done.cache.verdict == "coalesced"
        assert [record.state for record in await one.records()][-1] == "finished"

    one.behave(tokens=1000, tokens_per_s=50)
    tasks = [(await ahead(one, who, cancel_on_disconnect=True))[0] for who in (ALICE, BOB)]
    for task in tasks:
        task.cancel()
    assert [record.state for record in await one.records()][-1] == "client_closed"
    assert len(one.provider.records) == 3


async def test_call_ends_with_the_last_who_wants_it(pair: tuple[World, World]) -> None:
    """Whoever asked first has left, and then the one who followed."""
    one, _ = pair
    one.behave(tokens=1000, tokens_per_s=50)
    first_task, first = await ahead(one)
    other_task, other = await ahead(one, BOB)
    assert await one.cancel(first.answer_id)
    assert await one.cancel(other.answer_id, principal=BOB)
    for task in (first_task, other_task):
        with pytest.raises(AnswerCancelled):
            await task

    (record,) = await one.records()
    assert record.state == "client_closed"
    assert (await one.booked(first.answer_id)).status == "cancelled"
    assert (await one.booked(other.answer_id)).cost_nanousd == 0


async def test_answer_that_was_remembered_a_moment_ago_is_not_made_again(pair: tuple[World, World]) -> None:
    """Who looked into the cache just before it was there, and for an answer on its way just after, looks into the cache again."""
    one, _ = pair
    one.behave(ttft_ms=100, tokens=20)
    one.retrieval.verdicts.clear()
    late = [Reply(), Reply()]
    tasks = [asking(where, reply, BOB) for where, reply in zip(pair, late, strict=True)]
    await until(lambda: len(one.retrieval.recalls) == 2)
    recalls, one.retrieval.verdicts = one.retrieval.verdicts, asyncio.Event()
    one.retrieval.verdicts.set()
    made = await one.ask(QUESTION)
    recalls.set()
    await asyncio.gather(*tasks)

    assert [reply.done.cache.verdict for reply in late] == ["exact", "exact"]
    assert {reply.done.cache.source_answer_id for reply in late} == {made.answer_id}
    assert len(await one.records()) == 1


async def test_who_cannot_pay_stands_in_nobodys_way(pair: tuple[World, World]) -> None:
    """The first has no money: the next one makes the answer, the others follow that one."""
    one, two = pair
    one.ledger.poor.add("alice")
    one.behave(ttft_ms=200, tokens=30, tokens_per_s=200)
    one.ledger.deciding.clear()
    told = [Reply() for _ in range(5)]
    poor = asking(one, told[0])
    await until(lambda: told[0].steps().get("hold") == "running")
    places = [(where, who) for where in (one, two) for who in (BOB, CAROL)]
    others = [asking(where, reply, who) for (where, who), reply in zip(places, told[1:], strict=True)]
    await until(lambda: all(reply.steps().get("follow") == "running" for reply in told[1:]))
    one.ledger.deciding.set()
    with pytest.raises(BudgetExhausted):
        await poor
    replies = await asyncio.gather(*others)

    assert sorted(reply.done.cache.verdict for reply in replies) == ["coalesced"] * 3 + ["miss"]
    assert len(await one.records()) == 1


async def test_failure_of_the_provider_is_everybodys(pair: tuple[World, World]) -> None:
    """They fail together, of the same thing, and not one call after the other."""
    one, two = pair
    one.behave(ttft_ms=200, fault="status", status=529)
    ends = await asyncio.gather(
        *(where.ask(QUESTION, principal=who) for where in (one, two) for who in (ALICE, BOB)), return_exceptions=True
    )

    assert all(isinstance(end, ModelOverloaded | ModelFailed) for end in ends), ends
    assert len({end.reason for end in ends if isinstance(end, DomainError)}) == 1
    assert len(await one.records()) <= 3, "the tries of one answer"


async def test_slow_one_is_not_waited_for_to_the_end(pair: tuple[World, World]) -> None:
    """Half of the time is waited for the first word, then an own call is made. It ends in time."""
    one, _ = pair
    one.behave(ttft_ms=30_000)
    first = Reply()
    first_task = asking(one, first)
    await until(lambda: first.steps().get("generate") == "running")
    with pytest.raises(DeadlineTooShort):
        await one.ask(QUESTION, principal=BOB, deadline_ms=2_000)

    assert len(one.provider.records) == 2
    assert await one.cancel(first.answer_id)
    with pytest.raises(AnswerCancelled):
        await first_task


async def test_one_that_must_end_much_sooner_is_not_followed(pair: tuple[World, World]) -> None:
    """It would end in the middle of what it tells."""
    one, _ = pair
    one.behave(ttft_ms=300, tokens=10)
    first = Reply()
    first_task = asking(one, first, deadline_ms=5_000)
    await until(lambda: first.steps().get("generate") == "running")
    others = [await where.ask(QUESTION, principal=BOB) for where in pair]
    assert (await first_task).done.cache.verdict == "miss"
    assert others[0].done.cache.verdict == "miss"


@pytest.mark.parametrize(
    ("who", "fields"),
    [
        (MALLORY, {}),
        (BOB, {"collection": "other"}),
        (BOB, {"cache": pb.CACHE_MODE_OFF}),
        (BOB, {"cache": pb.CACHE_MODE_REFRESH}),
        (BOB, {"max_output_tokens": 77}),
        (BOB, {"server_tools": ["calculator"]}),
    ],
)
async def test_only_the_very_same_is_shared(pair: tuple[World, World], who: Principal, fields: dict[str, Any]) -> None:
    """Another tenant, collection, bound, with tools, or who wants no copy: an answer of its own."""
    one, _ = pair
    one.behave(tokens=60, tokens_per_s=100)
    first_task, first = await ahead(one)
    others = await asyncio.gather(*(where.ask(QUESTION, principal=who, **fields) for where in pair))
    await first_task
    sources = {reply.done.cache.source_answer_id for reply in others}
    assert first.answer_id not in sources


async def test_changed_documents_are_another_question(pair: tuple[World, World]) -> None:
    """Who asks after the change was acknowledged is not told what rests on the old version."""
    one, _ = pair
    one.behave(tokens=60, tokens_per_s=100)
    first_task, first = await ahead(one)
    one.retrieval.epoch += 1
    later = await asyncio.gather(*(where.ask(QUESTION, principal=BOB) for where in pair))
    await first_task

    assert first.answer_id not in {reply.done.cache.source_answer_id for reply in later}
    assert sorted(reply.done.cache.verdict for reply in later) == ["coalesced", "miss"], [reply.steps() for reply in later]
    assert len(await one.records()) == 2


async def test_store_that_is_slow_once_costs_no_second_call(pair: tuple[World, World], monkeypatch: pytest.MonkeyPatch) -> None:
    """That somebody follows could not be told, and the first look at what is followed took too long: it is read all the same."""

    async def too_slow(_flights: RedisFlights, _answer_id: str) -> None:
        raise Unavailable("the shared flights cannot be reached", dependency="redis")

    monkeypatch.setattr(RedisFlights, "follow", too_slow)
    late, read = [Unavailable("the shared logs cannot be reached", dependency="redis")], RedisLogs.read

    async def slow_once(logs: RedisLogs, answer_id: str, after: int, wait_s: float) -> SharedEvents:
        if late:
            raise late.pop()
        return await read(logs, answer_id, after, wait_s)

    monkeypatch.setattr(RedisLogs, "read", slow_once)
    one, two = pair
    one.behave(tokens=60, tokens_per_s=100)
    first_task, first = await ahead(one)
    other = await two.ask(QUESTION, principal=BOB)
    await first_task

    assert other.done.cache.verdict == "coalesced"
    assert other.text == first.text
    assert len(await one.records()) == 1
    assert late == []


async def test_answers_of_limited_documents_stay_with_their_readers(pair: tuple[World, World]) -> None:
    """Who may read other documents has another audience, and is told an answer of its own."""
    one, _ = pair
    one.behave(tokens=60, tokens_per_s=100)
    one.retrieval.audience = "those of alice"
    first_task, _ = await ahead(one)
    one.retrieval.audience = "those of bob"
    other = await one.ask(QUESTION, principal=BOB)
    await first_task

    assert other.done.cache.verdict == "miss"
    assert len(await one.records()) == 2


async def test_replica_that_loses_the_store_still_shares_its_own(tmp_path: Path) -> None:
    """No Redis at all: the same questions of one process are one call."""
    async with world(tmp_path, "redis://127.0.0.1:1/0") as alone:
        alone.behave(ttft_ms=300, tokens=20)
        replies = await asyncio.gather(*(alone.ask(QUESTION, principal=who) for who in (ALICE, BOB, CAROL)))
        assert sorted(reply.done.cache.verdict for reply in replies) == ["coalesced", "coalesced", "miss"]
        assert len(await alone.records()) == 1


async def test_flights_in_the_store(valkey: Valkey) -> None:
    """One stands for a question until it lets go or its time is over, and is replaced only by who says whose place it takes."""
    client = redis.Redis.from_url(valkey.url)
    flights = RedisFlights(client, timeout_s=2)
    loop = asyncio.get_running_loop()
    now = (await client.time())[0]
    first, second = Flight("a", "r1", now + 60.0), Flight("b", "r2", now + 60.0)
    key = f"key-{loop.time()}"
    assert await flights.claim(key, first) is None
    assert await flights.claim(key, first) is None
    assert await flights.claim(key, second) == first
    assert await flights.claim(key, second, changed(first, answer_id="x")) == first
    assert await flights.claim(key, second, first) is None
    await flights.release(key, first, 0)
    assert await flights.claim(key, first) == second
    await flights.release(key, second, 0.2)
    over = changed(second, ends_at=0.0)
    assert await flights.claim(key, first) == over, "it was remembered just now"
    async with asyncio.timeout(5):
        while await flights.claim(key, first) is not None:  # noqa: ASYNC110 - the store's clock decides
            await asyncio.sleep(0.02)

    assert not await flights.is_followed("a")
    await flights.follow("a")
    assert await flights.is_followed("a")
    await client.aclose()
    gone = RedisFlights(redis.Redis.from_url("redis://127.0.0.1:1/0"), timeout_s=0.5)
    with pytest.raises(Unavailable):
        await gone.claim(key, first)
