"""The log of an answer: numbers, bounds, readers."""

import asyncio

import pytest

from services.chassis.errors import AnswerCancelled, ModelFailed, Overloaded
from services.orchestrator.domain import Reasoned, StepChange, TextDelta
from services.orchestrator.log import RESERVED_EVENTS, EventLog


async def test_reader_gets_what_is_there_at_once_and_what_comes_later() -> None:
    """Numbers grow by one from one, for a reader from the start and for one from the middle."""
    log = EventLog("a")
    log.append(TextDelta("one"))
    log.append(TextDelta("two"))
    first, second = log.reader(0), log.reader(1)
    here = await first.next(10)
    waiting = asyncio.create_task(second.next(10))
    there = await waiting
    later = asyncio.create_task(first.next(10))
    await asyncio.sleep(0)
    log.append(TextDelta("three"))

    assert [entry.sequence for entry in here] == [1, 2]
    assert [entry.sequence for entry in there] == [2]
    assert [entry.event for entry in await later] == [TextDelta("three")]


async def test_silence_and_the_end_both_return_nothing() -> None:
    """A reader asks the log which of the two it was."""
    log = EventLog("a")
    reader = log.reader(0)
    silence = await reader.next(0.001)
    ending = asyncio.create_task(reader.next(10))
    await asyncio.sleep(0)
    log.end(AnswerCancelled())

    assert (list(silence), list(await ending), log.ended) == ([], [], True)


async def test_cancelled_reader_leaves_the_log_as_it_was() -> None:
    """A reader that goes away in its wait misses nothing when it comes back."""
    log = EventLog("a")
    reader = log.reader(0)
    waiting = asyncio.create_task(reader.next(10))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    log.append(TextDelta("one"))

    assert [entry.sequence for entry in await reader.next(10)] == [1]


@pytest.mark.parametrize("piece", [TextDelta, Reasoned])
def test_words_beyond_the_bounds_are_refused_and_the_end_still_fits(piece: type[TextDelta | Reasoned]) -> None:
    """Text and thoughts alike. Nothing is dropped silently, and an answer that filled its log can say so."""
    small = EventLog("a", bytes_max=10)
    small.append(piece("12345"))
    with pytest.raises(ModelFailed):
        small.append(piece("ünfall"))
    few = EventLog("a", events_max=RESERVED_EVENTS + 1)
    few.append(piece("x"))
    with pytest.raises(ModelFailed):
        few.append(piece("x"))
    few.append(StepChange("generate", "failed", 0, 0, {}))
    few.end(ModelFailed())

    assert (len(small), small.bytes, len(few)) == (1, 5, 2)


@pytest.mark.parametrize("piece", [TextDelta, Reasoned])
def test_words_are_passed_on_from_the_first_on(piece: type[TextDelta | Reasoned]) -> None:
    """What was shown to somebody here must outlive this process, and be seen elsewhere."""
    log, told = EventLog("a"), list[int]()
    log.on_change = lambda events: told.append(len(events))
    log.append(StepChange("generate", "running", 0, 0, {}))
    log.append(piece("hm"))

    assert told == [2]


async def test_readers_are_bounded() -> None:
    """One reader too many is told to come back."""
    log = EventLog("a", readers_max=1)
    reader = log.reader(0)
    with pytest.raises(Overloaded):
        log.reader(0)
    log.leave(reader)

    assert log.reader(0).position == 0


def test_log_ends_once_and_well_only_with_done() -> None:
    """The terminal law is an invariant of the log itself."""
    log = EventLog("a")
    log.append(TextDelta("x"))
    with pytest.raises(AssertionError):
        log.end()
    log.end(AnswerCancelled())
    with pytest.raises(AssertionError):
        log.end(AnswerCancelled())
    with pytest.raises(AssertionError):
        log.append(TextDelta("y"))
