"""How logs reach the other replicas: nothing before the first text, few round trips, all of it in the end, no more than fits."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.chassis.errors import AnswerCancelled
from services.orchestrator.domain import Recorded, TextDelta
from services.orchestrator.log import Entry, EventLog
from services.orchestrator.publisher import PART_EVENTS_MAX, Publisher
from tests.fakes.shared_logs import MemoryLogs

OWNER = ("acme", "alice")
Start = Callable[..., Publisher]


@pytest.fixture
async def logs() -> MemoryLogs:
    return MemoryLogs()


@pytest.fixture
async def start(logs: MemoryLogs) -> AsyncIterator[Start]:
    tasks = []

    def start(interval_s: float = 0.01, bytes_max: int = 2**20, unfollowed_s: float | None = None) -> Publisher:
        intervals_s = (interval_s, interval_s if unfollowed_s is None else unfollowed_s)
        publisher = Publisher(logs, "r1", lambda _, entry: payload(entry), kept_s=60, bytes_max=bytes_max, intervals_s=intervals_s)
        tasks.append(asyncio.create_task(publisher.run_forever()))
        return publisher

    yield start
    for task in tasks:
        task.cancel()


def payload(entry: Entry) -> bytes:
    assert isinstance(entry.event, TextDelta | Recorded)
    return entry.event.text.encode() if isinstance(entry.event, TextDelta) else entry.event.payload


def published(publisher: Publisher, answer_id: str = "a") -> tuple[EventLog, list[bool]]:
    events, stops = EventLog(answer_id), list[bool]()
    publisher.publish(events, OWNER, stops.append, registered=False)
    return events, stops


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the publisher's task makes it true
            await asyncio.sleep(0.001)


async def test_nothing_is_written_before_the_first_text(logs: MemoryLogs, start: Start) -> None:
    """That the answer exists is known at once; its events go with the first text, in order."""
    events, _ = published(start())
    events.append(Recorded(b"step"))
    await until(lambda: "a" in logs.answers)
    await asyncio.sleep(0.05)
    assert logs.answers["a"].events == []
    events.append(TextDelta("text"))
    await until(lambda: logs.answers["a"].events == [b"step", b"text"])


async def test_first_words_are_written_soon_and_the_next_may_wait(logs: MemoryLogs, start: Start) -> None:
    """Who is cut off from a replica that dies young finds what was told."""
    events, _ = published(start(unfollowed_s=60))
    events.append(TextDelta("one"))
    await until(lambda: "a" in logs.answers and logs.answers["a"].events == [b"one"])
    events.append(TextDelta("two"))
    await asyncio.sleep(0.05)
    assert logs.answers["a"].events == [b"one"]


async def test_what_comes_in_one_interval_of_many_answers_is_one_round_trip(logs: MemoryLogs, start: Start) -> None:
    """A hundred tokens of ten answers cost one flush."""
    publisher = start(interval_s=0.05)
    answers = [published(publisher, f"a{n}")[0] for n in range(10)]
    await until(lambda: len(logs.answers) == 10)
    before = logs.appends
    for _ in range(10):
        for events in answers:
            events.append(TextDelta("t"))
    await until(lambda: all(len(kept.events) == 10 for kept in logs.answers.values()))

    assert logs.appends == before + 1


async def test_long_log_goes_in_pieces_and_its_end_with_the_last(logs: MemoryLogs, start: Start) -> None:
    """No piece is larger than its bound, and whoever reads meanwhile never sees an end too early."""
    publisher = start(interval_s=0.001)
    events, _ = published(publisher)
    for n in range(3 * PART_EVENTS_MAX + 7):
        events.append(TextDelta(str(n)))
    events.end(AnswerCancelled())

    assert await publisher.flushed(5) == 0
    assert logs.answers["a"].events == [str(n).encode() for n in range(3 * PART_EVENTS_MAX + 7)]
    assert isinstance(logs.answers["a"].failure, AnswerCancelled)


async def test_store_that_was_away_or_has_forgotten_gets_everything(logs: MemoryLogs, start: Start) -> None:
    """In the middle of an answer, once by an outage and once by a loss of all data."""
    events, _ = published(start(interval_s=0.001))
    events.append(TextDelta("one"))
    await until(lambda: "a" in logs.answers and len(logs.answers["a"].events) == 1)
    logs.away = True
    events.append(TextDelta("two"))
    await asyncio.sleep(0.02)
    logs.away = False
    await until(lambda: len(logs.answers["a"].events) == 2)
    logs.answers.clear()
    events.append(TextDelta("three"))
    await until(lambda: "a" in logs.answers and logs.answers["a"].events == [b"one", b"two", b"three"])


async def test_producer_that_was_fenced_off_is_told_to_stop(logs: MemoryLogs, start: Start) -> None:
    """It hears the truth: not its owner but another replica ended the answer."""
    publisher = start(interval_s=0.001)
    events, stops = published(publisher)
    events.append(TextDelta("one"))
    await until(lambda: "a" in logs.answers and len(logs.answers["a"].events) == 1)
    await logs.interrupt("a", "r1", AnswerCancelled())
    events.append(TextDelta("two"))
    await until(lambda: stops == [True])

    assert await publisher.flushed(1) == 0


async def test_logs_that_find_no_room_are_kept_briefly(logs: MemoryLogs, start: Start) -> None:
    """The first fits; what ends after it is marked, until the first has had its time."""
    publisher = start(interval_s=0.001, bytes_max=300)
    for answer_id in ("a", "b"):
        events, _ = published(publisher, answer_id)
        events.append(TextDelta("x" * 200))
        events.end(AnswerCancelled())
        assert await publisher.flushed(5) == 0

    assert [logs.answers[answer_id].brief for answer_id in ("a", "b")] == [False, True]
