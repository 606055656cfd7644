"""No text can become an event: hostile strings in every text field of every event, read back by parsers that share nothing with ours.

The strings come from outside the project and are data.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from websockets.asyncio.client import connect

from services.chassis.errors import AnswerCancelled, AnswerInterrupted, ModelOverloaded
from services.gateway import problems, render, sse
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval
from tests.event_streams import Read, hostile_strings, read_by_the_standard
from tests.integration.gateway.backends import accepted, done
from tests.integration.gateway.conftest import Front

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = 200
PIECE_BYTES = 1009


def filled(message: Message, text: str) -> None:
    """Put `text` into every text field, at any depth; lists and maps get one entry. Structs get it as name and value."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            value = field.message_type.fields_by_name["value"]
            if value.type == FieldDescriptor.TYPE_STRING:
                entries[text] = text
        elif field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                getattr(message, field.name).append(text)
            else:
                setattr(message, field.name, text)
        elif field.message_type is not None and field.message_type.full_name == "google.protobuf.Struct":
            getattr(message, field.name).update({text: text})
        elif field.message_type is not None and field.message_type.full_name.startswith("tailrace."):
            inside = getattr(message, field.name)
            filled(inside.add() if field.is_repeated else inside, text)


def events_of(text: str) -> list[orchestrator.AnswerEvent]:
    """One event of every kind that the contract has, with `text` in all its text fields."""
    events = []
    for number, field in enumerate(orchestrator.AnswerEvent.DESCRIPTOR.oneofs_by_name["event"].fields, 1):
        event = orchestrator.AnswerEvent(answer_id=text, sequence=number)
        inside = getattr(event, field.name)
        inside.SetInParent()
        filled(inside, text)
        if field.name != "heartbeat":
            events.append(event)
    return events


def expected(event: orchestrator.AnswerEvent) -> tuple[str, Any, str]:
    kind = str(event.WhichOneof("event"))
    return kind, render.plain(getattr(event, kind)), str(event.sequence)


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a JSON value, names of members that are not the contract's included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inside in value.items():
            yield name
            yield from texts_in(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from texts_in(inside)


@pytest.fixture(scope="module")
def hostile(data_dir: Path) -> list[str]:
    return hostile_strings(data_dir)


@pytest.fixture(scope="module")
def stream(hostile: list[str]) -> tuple[bytes, list[tuple[str, Any, str]]]:
    """All of it as one stream, with what ingestions and operations are told by, and what it must be read as. What has no id of its own
    is read with the one before."""
    blocks, wanted = [], []
    for text in hostile:
        for event in events_of(text):
            blocks += [render.answer_event(event), sse.HEARTBEAT]
            wanted.append(expected(event))
        progress, operation = retrieval.IngestDocumentsResponse(), ledger.WatchOperationsResponse()
        filled(progress, text)
        filled(operation, text)
        blocks += [render.progress(progress), render.watched(operation)]
        last_id = wanted[-1][2]
        wanted += [("progress", render.plain(progress), last_id), ("operation", render.operation(operation.operation), last_id)]
        for error in (AnswerInterrupted(text, answer_id=text), ModelOverloaded(text, model=text)):
            body = problems.body_of(error, trace_id=text, request_id=text)
            blocks.append(sse.block(body, event=b"error"))
            wanted.append(("error", json.loads(body), wanted[-1][2]))
    return b"".join(blocks), wanted


def loaded(events: list[Read]) -> list[tuple[str, Any, str]]:
    return [(event.event, json.loads(event.data), event.id) for event in events]


def test_every_text_field_of_every_event_is_tried(hostile: list[str]) -> None:
    """What is filled in comes out of the contract, so a new field is tried too; and it is really there."""
    kinds = {event.WhichOneof("event") for event in events_of("x")}
    assert kinds >= {"accepted", "step", "passages", "delta", "citation", "tool_call", "tool_result", "done"}
    for event in events_of("a mark"):
        assert "a mark" in set(texts_in(expected(event)[1])), event


def test_a_parser_written_from_the_standard_reads_what_was_sent(stream: tuple[bytes, list[tuple[str, Any, str]]]) -> None:
    """As many events, the same data, and no id that is not ours."""
    sent, wanted = stream
    events = loaded(read_by_the_standard(sent))

    assert events == wanted
    assert all(event[2].isdecimal() for event in events)


def test_a_clients_parser_that_gets_it_in_pieces_reads_the_same(stream: tuple[bytes, list[tuple[str, Any, str]]]) -> None:
    """The one of httpx2, which nobody here wrote; pieces end anywhere, inside a character too."""
    sent, wanted = stream
    pieces = (sent[at : at + PIECE_BYTES] for at in range(0, len(sent), PIECE_BYTES))
    response = httpx2.Response(
        200, headers={"content-type": "text/event-stream"}, content=pieces, request=httpx2.Request("GET", "http://gateway.example")
    )

    assert loaded([Read(event.event, event.data, event.id) for event in httpx2.EventSource(response)]) == wanted


NODE_PARSER = """
const { createParser } = require('eventsource-parser');
const events = [];
let last = '';
const parser = createParser({ onEvent(event) {
  if (event.id !== undefined) last = event.id;
  events.push([event.event || 'message', event.data, last]);
}});
const chunks = [];
process.stdin.on('data', chunk => chunks.push(chunk)).on('end', () => {
  parser.feed(Buffer.concat(chunks).toString('utf8'));
  process.stdout.write(JSON.stringify(events));
});
"""


def test_the_parser_that_web_clients_use_reads_the_same(stream: tuple[bytes, list[tuple[str, Any, str]]]) -> None:
    """The npm package eventsource-parser, from web/node_modules or NODE_PATH."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here: the second parser needs it")
    modules = os.pathsep.join(filter(None, [str(ROOT / "web" / "node_modules"), os.environ.get("NODE_PATH", "")]))
    environment = {**os.environ, "NODE_PATH": modules}
    if subprocess.run([node, "-e", "require('eventsource-parser')"], env=environment, capture_output=True, timeout=30).returncode:
        pytest.skip("the npm package eventsource-parser is neither in web/node_modules nor in NODE_PATH")
    sent, wanted = stream
    ran = subprocess.run([node, "-e", NODE_PARSER], env=environment, input=sent, capture_output=True, timeout=60, check=True)

    assert loaded([Read(*event) for event in json.loads(ran.stdout)]) == wanted


def test_as_frames_of_a_websocket_each_event_is_one_json_text(hostile: list[str]) -> None:
    """The same data, and the members that say what it is are ours."""
    for text in hostile:
        tags = b'"answer_id":%s' % json.dumps(text).encode()
        for event in events_of(text):
            frame = render.answer_frame(event, tags)
            kind, data, number = expected(event)

            assert json.loads(frame, object_pairs_hook=_once) == {"type": kind, "id": int(number), "answer_id": text, "data": data}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    assert len(members) == len(pairs), "a member came twice"
    return members


def sample(hostile: list[str]) -> list[str]:
    return hostile[:SAMPLE]


async def test_through_the_gateway_nothing_is_added_and_nothing_lost(front: Front, client: httpx.AsyncClient, hostile: list[str]) -> None:
    """Real HTTP, one answer a string: its events, then a receipt, an error or a cancel whose detail is the string."""
    for number, text in enumerate(sample(hostile)):
        middle = [event for event in events_of(text) if event.WhichOneof("event") not in ("accepted", "done")]
        ending: list[Any] = [done(99)] if number % 3 == 0 else [AnswerInterrupted(text) if number % 3 == 1 else AnswerCancelled(text)]
        front.behind.orchestrator.script = [accepted(), *middle, *ending]
        response = await client.post("/v1/answers", json={"question": "Why?"})
        events = loaded(read_by_the_standard(response.content))

        assert response.status_code == 200
        assert events[0] == expected(accepted())
        assert events[1:-1] == [expected(event) for event in middle]
        name, data, _ = events[-1]
        assert name == ("done", "error", "cancelled")[number % 3]
        assert isinstance(data, dict)
        assert all(event[2].isdecimal() for event in events)


async def test_over_a_websocket_nothing_is_added_and_nothing_lost(front: Front, hostile: list[str]) -> None:
    """Real frames of one socket, many answers."""
    headers = {"authorization": f"Bearer {front.token()}"}
    url = f"ws://127.0.0.1:{front.http_port}/v1/answers/ws"
    async with connect(url, additional_headers=headers, proxy=None, max_size=None) as socket:
        for text in sample(hostile):
            middle = [event for event in events_of(text) if event.WhichOneof("event") not in ("accepted", "done")]
            front.behind.orchestrator.script = [accepted(), *middle, done(99)]
            await socket.send(json.dumps({"type": "ask", "request_id": "r", "question": "Why?"}))
            frames = [json.loads(await socket.recv(decode=True))]
            while frames[-1]["type"] != "done":
                frames.append(json.loads(await socket.recv(decode=True)))

            assert [(frame["type"], frame["data"], str(frame["id"])) for frame in frames[1:-1]] == [expected(event) for event in middle]


async def test_a_question_of_any_kind_comes_back_as_it_was_or_is_refused_by_field(
    front: Front, client: httpx.AsyncClient, hostile: list[str]
) -> None:
    """What a user types into the question and a session's name."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    for text in sample(hostile):
        response = await client.post("/v1/answers", json={"question": text})
        if response.status_code == 200:
            assert front.behind.seen.last("Answer")[0].question == text
            assert [event.event for event in read_by_the_standard(response.content)] == ["accepted", "done"]
        else:
            assert (response.status_code, response.json()["field"]) == (400, "question")
