"""Events that are ready at one moment leave in one message: in their order, within bounds, and only to who asked for it."""

import pytest

from services.orchestrator.domain import PassagesFound, TextDelta
from services.orchestrator.log import Entry
from services.orchestrator.rpc import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, event_message, in_batches
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb


def entries(count: int, text: str = "a") -> list[Entry]:
    return [Entry(number, TextDelta(text)) for number in range(1, count + 1)]


def unpacked(messages: list[pb.AnswerEvent]) -> list[pb.AnswerEvent]:
    """Every event by itself, as a reader takes them."""
    events = []
    for message in messages:
        more = list(message.more)
        message.ClearField("more")
        events += [message, *more]
    return events


@pytest.mark.parametrize("count", [0, 1, 2, BATCH_EVENTS_MAX, BATCH_EVENTS_MAX + 1, 1000])
@pytest.mark.parametrize("events_max", [1, BATCH_EVENTS_MAX])
def test_every_event_comes_once_in_order_and_as_if_it_came_alone(count: int, events_max: int) -> None:
    messages = list(in_batches("id", entries(count), events_max))
    assert len(messages) == -(-count // events_max)
    assert all(not inner.more for message in messages for inner in message.more)
    assert unpacked(messages) == [event_message("id", entry) for entry in entries(count)]


def test_a_message_grows_by_one_event_beyond_its_bytes_at_most() -> None:
    each = 10_000
    messages = list(in_batches("id", entries(100, "x" * each), BATCH_EVENTS_MAX))
    assert max(message.ByteSize() for message in messages) < BATCH_BYTES_MAX + 2 * each
    assert len(messages) < 20
    assert len(unpacked(messages)) == 100


def test_a_large_event_goes_alone() -> None:
    large = Entry(1, TextDelta("x" * (BATCH_BYTES_MAX + 1)))
    messages = list(in_batches("id", [large, Entry(2, PassagesFound(())), Entry(3, TextDelta("b"))], BATCH_EVENTS_MAX))
    assert [len(message.more) for message in messages] == [0, 1]
