"""Which answers are kept, for whom, and for how long."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from services.chassis.errors import AnswerCancelled, AnswerLogGone, IdempotencyConflict, NotFound, Overloaded
from services.chassis.principal import Principal
from services.orchestrator.domain import Candidate, Question, TextDelta
from services.orchestrator.log import EventLog
from services.orchestrator.registry import Registry

ALICE, BOB = Principal("acme", "alice"), Principal("acme", "bob")


def question(answer_id: str, principal: Principal = ALICE, key: str = "", on_disconnect: bool = False) -> Question:
    candidates = (Candidate("p", "m", 1, 1),)
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return Question(answer_id, "q", principal, "s", True, "fast", candidates, 10, "default", "use", created, key, on_disconnect)


class Producer:
    """Produces when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, asked: Question, events: EventLog) -> None:
        events.append(TextDelta("x"))
        try:
            await self.go.wait()
        finally:
            events.end(AnswerCancelled())


@pytest.fixture
async def producer() -> AsyncIterator[Producer]:
    made = Producer()
    yield made
    made.go.set()


def registry(producer: Producer, **bounds: float) -> Registry:
    values = {"answers_max": 10, "kept_max": 10, "kept_s": 60.0, "detach_grace_s": 60.0, **bounds}
    return Registry(producer, **values)  # type: ignore[arg-type]


async def test_foreign_and_unknown_answers_look_the_same(producer: Producer) -> None:
    """Also to a user of the same tenant."""
    answers = registry(producer)
    answers.begin(question("a"), b"1")
    for principal, answer_id in ((BOB, "a"), (ALICE, "b")):
        with pytest.raises(NotFound, match="there is no such answer"):
            answers.find(principal, answer_id)

    assert answers.find(ALICE, "a").question.answer_id == "a"


async def test_oldest_ended_answers_go_first_when_there_are_too_many(producer: Producer) -> None:
    """By number and by events; the owner is told that they were there, nobody else is."""
    producer.go.set()
    by_number, by_events = registry(producer, kept_max=2), registry(producer, ended_events_max=2)
    for answers in (by_number, by_events):
        for answer_id in ("a", "b", "c"):
            await asyncio.gather(answers.begin(question(answer_id), b"1").task)
            await asyncio.sleep(0)
        with pytest.raises(AnswerLogGone):
            answers.find(ALICE, "a")
        with pytest.raises(NotFound):
            answers.find(BOB, "a")

        assert answers.find(ALICE, "c")


async def test_key_gives_the_same_answer_until_it_is_forgotten(producer: Producer) -> None:
    """Then the same key is a new question."""
    producer.go.set()
    answers = registry(producer, kept_max=1)
    first = answers.begin(question("a", key="k"), b"1")
    assert answers.begin(question("b", key="k"), b"1") is first
    with pytest.raises(IdempotencyConflict):
        answers.begin(question("c", key="k"), b"2")
    await asyncio.gather(first.task)
    await asyncio.gather(answers.begin(question("d"), b"1").task)
    await asyncio.sleep(0)

    assert answers.begin(question("e", key="k"), b"2").question.answer_id == "e"


async def test_answer_stopped_before_its_first_step_still_has_an_end(producer: Producer) -> None:
    """A reader of it is told, and does not wait for ever."""
    answers = registry(producer)
    kept = answers.begin(question("a"), b"1")
    assert answers.cancel(ALICE, "a")
    await asyncio.gather(kept.task, return_exceptions=True)
    await asyncio.sleep(0)

    assert isinstance(kept.events.failure, AnswerCancelled)
    assert not answers.cancel(ALICE, "a")


async def test_drain_refuses_what_is_new_and_stops_what_does_not_end(producer: Producer) -> None:
    """It says how many had to be stopped."""
    answers = registry(producer)
    answers.begin(question("a"), b"1")
    await asyncio.sleep(0)
    stopped = await answers.drain(0.01)
    with pytest.raises(Overloaded):
        answers.begin(question("b"), b"1")

    assert stopped == 1
    assert answers.running == 0


async def test_last_reader_that_leaves_ends_what_nobody_can_come_back_to(producer: Producer) -> None:
    """The first of two may leave; with the second the answer goes, at once if so asked, else after the grace."""
    answers = registry(producer, detach_grace_s=0.01)
    for on_disconnect in (True, False):
        kept = answers.begin(question(f"a{on_disconnect}", on_disconnect=on_disconnect), b"1")
        async with answers.reading(kept, 0):
            async with answers.reading(kept, 0):
                await asyncio.sleep(0)
            assert not kept.task.cancelling()
        async with asyncio.timeout(5):
            await asyncio.gather(kept.task, return_exceptions=True)

        assert kept.task.cancelled()
