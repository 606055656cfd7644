"""Server-sent events: what is encoded is what a browser reads, and nothing can be smuggled in."""

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import render, sse
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

NASTY = st.text(st.one_of(st.sampled_from("\r\n\0:\ufeff\u2028\u2029\x85 \ti d"), st.characters(exclude_categories=["Cs"])), max_size=40)


def read(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream, by the algorithm of the HTML standard (9.2.6)."""
    events, data, event, last_id = [], [], "", ""
    text = stream.decode().removeprefix("\ufeff")
    for line in re.split("\r\n|\r|\n", text):
        if not line:
            if data:
                events.append({"event": event or "message", "data": "\n".join(data), "id": last_id})
            data, event = [], ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            event = value
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


@given(st.lists(NASTY.filter(bool), max_size=8))
def test_every_piece_of_text_arrives_as_it_was(texts: list[str]) -> None:
    """As many events as pieces, with their numbers, whatever the text tries."""
    messages = [orchestrator.AnswerEvent(sequence=number, delta=orchestrator.Delta(text=text)) for number, text in enumerate(texts, 1)]

    events = read(b"".join(map(render.answer_event, messages)))

    assert [json.loads(event["data"])["text"] for event in events] == texts
    assert [event["id"] for event in events] == [str(number) for number in range(1, len(texts) + 1)]


@given(NASTY, st.integers(0, 2**62))
def test_the_short_way_is_the_long_way(text: str, sequence: int) -> None:
    """The hand-made block of a delta is byte for byte what the checked encoder makes."""
    message = orchestrator.Delta(text=text)

    assert sse.delta(sequence, text) == sse.block(orjson.dumps(render.plain(message)), event=b"delta", event_id=sequence)


@given(NASTY, NASTY)
def test_other_events_are_one_event_each(name: str, fact: str) -> None:
    """Names and facts of a step are as hostile as text."""
    step = orchestrator.Step(name=name, status="done")
    step.facts[fact] = name

    events = read(render.answer_event(orchestrator.AnswerEvent(sequence=1, step=step)))

    assert len(events) == 1
    assert json.loads(events[0]["data"])["facts"] == {fact: name}


@pytest.mark.parametrize("data", [b"", b"a\nb", b"a\rb", b"a\0b"])
def test_a_block_that_clients_cannot_read_is_refused(data: bytes) -> None:
    """No block without data, no line break and no NUL inside a field."""
    with pytest.raises(ValueError, match=r"."):
        sse.block(data)
    with pytest.raises(ValueError, match=r"."):
        sse.block(b"x", event=data or b"\n")


def test_a_heartbeat_is_a_comment_and_no_event() -> None:
    """Clients read nothing from it."""
    beat = render.answer_event(orchestrator.AnswerEvent(sequence=3, heartbeat=orchestrator.Heartbeat()))

    assert read(beat + sse.delta(4, "x") + beat) == [{"event": "delta", "data": '{"text":"x"}', "id": "4"}]


def test_an_event_of_a_newer_kind_is_left_out() -> None:
    """An old gateway in front of a new orchestrator goes on."""
    assert render.answer_event(orchestrator.AnswerEvent(sequence=3)) == b""
