"""Answers that have to be JSON of a certain shape, through the real chain."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from bench.script import Behaviour
from services.chassis.errors import OutputInvalid, RequestInvalid
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import Reply, World, until, world

PORT = {"type": "object", "properties": {"port": {"type": "integer", "minimum": 1}}, "required": ["port"], "additionalProperties": False}
QUESTION = "Which port does the gateway listen on?"


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator that asks the simulated provider."""
    async with world(tmp_path, valkey.url) as made:
        yield made


def shaped(schema: dict[str, Any] | None = None) -> Struct:
    struct = Struct()
    struct.update(PORT if schema is None else schema)
    return struct


def when_asked_again(made: World, text: str) -> None:
    made.provider.rules.append((b"That does not satisfy", Behaviour(text=text)))


async def test_json_of_the_shape_is_streamed_and_cites_nothing(claude: World) -> None:
    """An array of numbers is no citation; the schema stands in the prompt for a model that is not bound to it."""
    schema = {"type": "array", "items": {"type": "integer"}}
    claude.behave(text="[1, 2]")
    reply = await claude.ask(QUESTION, output_schema=shaped(schema), cache=pb.CACHE_MODE_OFF)

    assert (reply.text, reply.done.verdict) == ("[1, 2]", "passed")
    assert not [event for event in reply.events if event.HasField("citation")]


async def test_wrong_json_that_nobody_has_read_is_repaired_once(claude: World) -> None:
    """Only the repaired text is shown; both calls are booked, each under its own number."""
    claude.behave(text='{"port": "8080"}')
    when_asked_again(claude, '```json\n{"port": 8080}\n```')
    reply = await claude.ask(QUESTION, output_schema=shaped(), whole=True)
    operation = await claude.booked(reply.answer_id)

    assert (reply.text, reply.done.verdict) == ('{"port": 8080}', "passed")
    assert [attempt.attempt for attempt in operation.attempts] == [1, 2]
    assert operation.cost_nanousd == reply.done.cost_nanousd == sum(attempt.cost_nanousd for attempt in operation.attempts)
    assert not claude.ledger.open_holds


async def test_json_that_stays_wrong_is_a_typed_error_and_nothing_is_shown(claude: World) -> None:
    """The place in the schema is named and nothing of the text; what was used is booked; nothing is remembered."""
    claude.behave(text='{"port": 0}')
    read = Reply()
    with pytest.raises(OutputInvalid) as failed:
        await claude.ask(QUESTION, output_schema=shaped(), whole=True, into=read)
    operation = await claude.booked(read.answer_id)

    assert failed.value.metadata["keyword"] == "/properties/port/minimum"
    assert read.text == ""
    assert (operation.status, operation.error_reason, len(operation.attempts)) == ("failed", "OUTPUT_INVALID", 2)
    assert operation.usage.output_tokens > 0
    assert not claude.ledger.open_holds
    assert not claude.retrieval.remembered


async def test_json_in_a_block_of_code_is_streamed_without_the_block(claude: World) -> None:
    """What is read, its digest and what is kept are the JSON alone; words after the block are words too many."""
    claude.behave(text='```json\n{ "port" : 8080 }\n```\n')
    reply = await claude.ask(QUESTION, output_schema=shaped())
    again = await claude.ask(QUESTION, output_schema=shaped())
    claude.behave(text='```json\n{ "port" : 8080 }\n```\nI hope that this helps.')
    with pytest.raises(OutputInvalid) as failed:
        await claude.ask(QUESTION, output_schema=shaped(), cache=pb.CACHE_MODE_OFF)

    assert (reply.text, reply.done.verdict) == ('{ "port" : 8080 }', "passed")
    assert reply.done.text_sha256 == hashlib.sha256(reply.text.encode()).hexdigest()
    assert (again.done.cache.verdict, again.text) == ("exact", reply.text)
    assert failed.value.metadata["keyword"] == "json"


async def test_stream_ends_where_the_text_goes_wrong(claude: World) -> None:
    """What was read cannot be unsaid, so there is no second call, and no token more is paid for than it takes to know."""
    claude.behave(text='{ "host" : "gateway", ' + " ".join('"more" : 1,' for _ in range(300)) + ' "port" : 1 }', tokens_per_s=200)
    read = Reply()
    with pytest.raises(OutputInvalid) as failed:
        await claude.ask(QUESTION, output_schema=shaped(), into=read)
    (record,) = await claude.records()
    operation = await claude.booked(read.answer_id)

    assert failed.value.metadata["keyword"] == "additionalProperties"
    assert read.text == "{"
    await until(lambda: bool(claude.ledger.turns))
    assert [turn.text for turns in claude.ledger.turns.values() for turn in turns] == ["{"]
    assert record.state == "client_closed"
    assert record.output_tokens < 300
    assert operation.attempts[0].error_reason == "OUTPUT_INVALID"


@pytest.mark.parametrize("tokens_per_s", [0, 50])
async def test_stream_of_which_nothing_was_read_is_repaired_once(claude: World, tokens_per_s: float) -> None:
    """Words before the JSON, as models like to write them, are ruled out by the first piece: the second try streams as if it were the
    first. Both calls are booked, and the first is closed where it went wrong."""
    claude.behave(text="Here is the JSON: " + '{"port": 8080} ' * 100, tokens_per_s=tokens_per_s)
    when_asked_again(claude, '{"port": 8080}')
    reply = await claude.ask(QUESTION, output_schema=shaped(), cache=pb.CACHE_MODE_OFF)
    operation = await claude.booked(reply.answer_id)

    assert (reply.text, reply.done.verdict) == ('{"port": 8080}', "passed")
    assert [attempt.error_reason for attempt in operation.attempts] == ["OUTPUT_INVALID", ""]
    assert b"words before the JSON" in claude.provider.prompts[-1]
    assert not claude.ledger.open_holds


async def test_stream_that_is_wrong_again_ends_in_the_error(claude: World) -> None:
    """There is no third try."""
    claude.behave(text="Here is the JSON: none.")
    read = Reply()
    with pytest.raises(OutputInvalid) as failed:
        await claude.ask(QUESTION, output_schema=shaped(), into=read)

    assert (failed.value.metadata["keyword"], read.text) == ("json", "")
    assert len(await claude.records()) == 2


async def test_stream_with_tools_that_goes_wrong_is_not_asked_again(claude: World) -> None:
    """What its tools have said would have to be told once more."""
    claude.behave(text="Here is the JSON: none.")
    with pytest.raises(OutputInvalid):
        await claude.ask(QUESTION, output_schema=shaped(), server_tools=["calculator"])

    assert len(await claude.records()) == 1


async def test_stream_whose_whole_is_wrong_ends_in_the_error(claude: World) -> None:
    """What only the whole text tells is told at its end."""
    claude.behave(text="{}")
    with pytest.raises(OutputInvalid) as failed:
        await claude.ask(QUESTION, output_schema=shaped())

    assert failed.value.metadata["keyword"] == "/required"
    assert len(await claude.records()) == 1


async def test_json_that_was_cut_is_told_as_cut(claude: World) -> None:
    """Another call would be cut as well."""
    claude.behave(text='{"port": ' + "8" * 50, fault="max_tokens")
    reply = await claude.ask(QUESTION, output_schema=shaped(), whole=True)

    assert (reply.done.finish_reason, reply.done.verdict) == ("max_tokens", "cut")


async def test_shape_is_part_of_what_a_cached_answer_is_for(claude: World) -> None:
    """The same words asked for another shape, or for none, are another question."""
    claude.behave(text='{"port": 8080}')
    await claude.ask(QUESTION, output_schema=shaped())
    same = await claude.ask(QUESTION, output_schema=shaped())
    other = await claude.ask(QUESTION, output_schema=shaped({"type": "object"}))

    assert (same.done.cache.verdict, same.text) == ("exact", '{"port": 8080}')
    assert other.done.cache.verdict == "miss"


async def test_hostile_schema_is_refused_before_anything_happens(claude: World) -> None:
    """No hold, no call, no record."""
    with pytest.raises(RequestInvalid) as refused:
        await claude.ask(QUESTION, output_schema=shaped({"$ref": "https://example.org/schema.json"}))

    assert refused.value.field == "output_schema"
    assert not await claude.records()
