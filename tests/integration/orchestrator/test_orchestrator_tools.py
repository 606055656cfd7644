"""Tools through the real service: two replicas, a real Valkey, real channels; only the model is scripted."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from services.chassis.errors import NotAllowed, NotFound, RequestInvalid
from services.local.stores import Valkey
from services.orchestrator.claude_model import ClaudeModel
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, BOB, MALLORY, Reply, World, replica, until, world
from tests.fakes.scripted_model import ScriptedModel, call

QUESTION = "What is six times seven?"
PNG = b"\x89PNG\r\n\x1a\n"


def weather() -> pb.ToolDefinition:
    tool = pb.ToolDefinition(name="weather", description="of a town")
    tool.input_schema.update({"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer", "maximum": 5}}})
    return tool


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    """What every replica's model says."""
    scripted = ScriptedModel([])

    async def generate(self: object, *arguments: Any) -> None:
        await scripted.generate(*arguments)

    monkeypatch.setattr(ClaudeModel, "generate", generate)
    return scripted


@pytest.fixture
async def pair(tmp_path: Path, valkey: Valkey, model: ScriptedModel) -> AsyncIterator[tuple[World, World]]:
    async with world(tmp_path / "one", valkey.url, TAILRACE_TOOLS_CONFIRMED="current_time", TAILRACE_TOOLS_CONFIRM_S="30") as one:
        async with replica(one, tmp_path / "two") as two:
            yield one, two
            await until(lambda: not one.ledger.open_holds)


async def test_our_tools_are_used_and_every_round_is_booked(pair: tuple[World, World], model: ScriptedModel) -> None:
    """Steps, spans, attempts and holds of two rounds; documents are searched as the asking user, in the answer's collection."""
    one, _ = pair
    model.script = [[call("calculator", expression="6*7"), call("search_documents", query="port", limit=1)], "42, on port 8080 [1]."]
    reply = await one.ask(QUESTION, server_tools=["calculator", "search_documents"], collection="manuals")
    booked = await one.booked(reply.answer_id)

    results = [event.tool_result for event in reply.events if event.HasField("tool_result")]
    assert {"42"} == {result.text for result in results if result.call_id == "id-calculator"} and not any(each.failed for each in results)
    assert [{"expression": "6*7"}] == [dict(e.tool_call.input) for e in reply.events if e.tool_call.name == "calculator"]
    request, principal = one.retrieval.searches[0]
    assert ("port", "manuals", 1, ALICE) == (request.query, request.collection, request.limit, principal)
    assert reply.text == "42, on port 8080 [1]." and reply.done.finish_reason == "end_turn" and reply.done.verdict == "passed"
    assert [1, 2] == [attempt.attempt for attempt in booked.attempts] and len(one.ledger.holds) == 2
    assert ["calculator", "search_documents"] == sorted(step.facts["tool"] for step in booked.steps if step.name == "tool")
    assert reply.done.cache.reason == "tools" and one.retrieval.remembered == []
    names = {span.name for span in one.spans.get_finished_spans()}
    assert {"execute_tool calculator", "execute_tool search_documents"} <= names


async def test_a_clients_tool_is_called_by_the_client_and_goes_on_at_another_replica(
    pair: tuple[World, World], model: ScriptedModel
) -> None:
    """The results come with the answer's id alone: session, tools and prompt are kept. It may be done again, as a lost reply may."""
    one, two = pair
    model.script = [["A moment.", call("weather", "w", town="Oslo", days=3)], "Cold.", "Colder."]
    first = await one.ask(QUESTION, tools=[weather()], session_id="talk")
    results = [pb.ToolResult(call_id="w", text="minus 3")]
    second = await two.ask("", continues=first.answer_id, tool_results=results)
    again = await one.ask("", continues=first.answer_id, tool_results=results, session_id="talk")

    assert first.done.finish_reason == "tool_use" and first.kinds[-1] == "done" and first.text == "A moment."
    assert [{"town": "Oslo", "days": 3.0}] == [dict(event.tool_call.input) for event in first.events if event.HasField("tool_call")]
    assert second.text == "Cold." and second.done.finish_reason == "end_turn" and second.events[0].accepted.session_id == "talk"
    assert again.text == "Colder." and second.steps()["resume"] == "done" and "recall" not in second.steps()
    assert model.prompts[1].messages[-1].results[0].name == "weather" and [spec.name for spec in model.prompts[1].tools] == ["weather"]
    schema = model.prompts[0].tools[0].input_schema["properties"]["days"]
    assert schema == {"type": "integer", "maximum": 5} and isinstance(schema["maximum"], int)


async def test_a_key_stands_for_what_went_on_longer_than_that_waited_for_its_client(
    pair: tuple[World, World], model: ScriptedModel, valkey: Valkey
) -> None:
    """Results that are sent again when the answer they were for waits no more get the same answer; without the key there is none."""
    one, two = pair
    model.script = [["A moment.", call("weather", "w", town="Oslo", days=3)], "Cold.", "Colder."]
    first = await one.ask(QUESTION, tools=[weather()])
    goes_on: dict[str, Any] = {"continues": first.answer_id, "tool_results": [pb.ToolResult(call_id="w", text="minus 3")]}
    second = await two.ask("", idempotency_key="went on", **goes_on)
    store = redis.Redis.from_url(valkey.url)
    assert await store.delete(f"tailrace:pending:{first.answer_id}") == 1
    await store.aclose()
    with pytest.raises(NotFound):
        await one.ask("", **goes_on)
    with pytest.raises(NotFound):
        await one.ask("", idempotency_key="another", **goes_on)
    again = [await where.ask("", idempotency_key="went on", **goes_on) for where in pair]

    assert second.text == "Cold."
    assert [reply.events for reply in again] == [second.events] * 2


@pytest.mark.parametrize("deleted", ["while it waits for its client", "while its turn is kept"])
async def test_what_went_on_with_a_clients_tool_does_not_bring_back_a_deleted_conversation(
    pair: tuple[World, World], model: ScriptedModel, deleted: str
) -> None:
    """It reads no history, and so names no turn that was there; it counts as asked when its question was."""
    one, two = pair
    model.script = [call("weather", "w", town="Oslo"), call("weather", "v", town="Rome"), "Cold."]
    first = await one.ask(QUESTION, tools=[weather()], session_id="talk")
    if deleted == "while it waits for its client":
        one.ledger.delete("talk")
    one.ledger.keeping.clear()
    second = await two.ask("", continues=first.answer_id, tool_results=[pb.ToolResult(call_id="w", text="minus 3")])
    third = await one.ask("", continues=second.answer_id, tool_results=[pb.ToolResult(call_id="v", text="30")])
    if deleted == "while its turn is kept":
        one.ledger.delete("talk")
    one.ledger.keeping.set()
    await until(lambda: one.ledger.turned_away)

    assert third.text == "Cold." and one.ledger.turns == {}


async def test_a_model_that_was_named_goes_on_itself(pair: tuple[World, World], model: ScriptedModel) -> None:
    """It knows what it thought and called; another one is asked only if the request with the results names it, or a tier."""
    one, two = pair
    model.script = [call("weather", "w", town="Oslo"), call("weather", "v", town="Rome"), "Cold.", "Colder.", "Coldest."]
    named = "claude-sonnet-5-5"
    first = await one.ask(QUESTION, tools=[weather()], model=named)
    second = await two.ask("", continues=first.answer_id, tool_results=[pb.ToolResult(call_id="w", text="minus 3")])
    results = [pb.ToolResult(call_id="v", text="30")]
    third = await one.ask("", continues=second.answer_id, tool_results=results)
    other = await one.ask("", continues=second.answer_id, tool_results=results, model="claude-haiku-5-5")
    tier = await one.ask("", continues=second.answer_id, tool_results=results, tier="fast")

    assert [named] * 3 == [reply.done.model for reply in (first, second, third)]
    assert ["claude-haiku-5-5"] * 2 == [reply.done.model for reply in (other, tier)]
    assert "asked" == third.done.choices[0].reason


async def test_an_answer_goes_on_with_what_its_plan_still_has(pair: tuple[World, World], model: ScriptedModel) -> None:
    """It was suspended with tools of ours; whoever has lost them since is told before anything is asked or paid."""
    one, two = pair
    model.script = [call("weather", "w", town="Oslo"), "Cold."]
    first = await one.ask(QUESTION, tools=[weather()], server_tools=["calculator"])
    goes_on: dict[str, Any] = {"continues": first.answer_id, "tool_results": [pb.ToolResult(call_id="w", text="minus 3")]}
    with pytest.raises(NotAllowed) as refused:
        await two.ask("", principal=replace(ALICE, tools=frozenset({"current_time"})), **goes_on)
    asked = len(model.prompts)
    reply = await two.ask("", principal=replace(ALICE, tools=frozenset({"calculator"})), **goes_on)

    assert (refused.value.metadata["needs"], asked, reply.text) == ("calculator", 1, "Cold.")


async def test_new_tools_of_an_answer_that_goes_on_have_names_of_their_own(pair: tuple[World, World], model: ScriptedModel) -> None:
    """Those that it keeps are there too: no model is told of two tools by one name."""
    one, two = pair
    model.script = [call("weather", "w", town="Oslo"), call("weather", "w", town="Oslo")]
    ours = await one.ask(QUESTION, tools=[weather()], server_tools=["calculator"])
    theirs = await one.ask(QUESTION, tools=[weather(), pb.ToolDefinition(name="current_time")])
    results = [pb.ToolResult(call_id="w", text="minus 3")]
    for first, fields in (
        (ours, {"tools": [pb.ToolDefinition(name="calculator")]}),
        (theirs, {"server_tools": ["current_time"]}),
    ):
        with pytest.raises(RequestInvalid) as raised:
            await two.ask("", continues=first.answer_id, tool_results=results, **fields)
        assert raised.value.field.startswith("tools[") and "each name once" in raised.value.metadata["bound"]

    assert len(model.prompts) == 2


async def test_nobody_else_goes_on_with_an_answer(pair: tuple[World, World], model: ScriptedModel) -> None:
    """Foreign, unknown and finished look the same; wrong results are told before anything is asked or paid."""
    one, two = pair
    model.script = [call("weather", "w", town="Oslo"), "done"]
    first = await one.ask(QUESTION, tools=[weather()])
    other = await one.ask(QUESTION, tools=[weather()], cache=pb.CACHE_MODE_OFF)
    results = [pb.ToolResult(call_id="w", text="rain")]
    for principal, answer_id in ((BOB, first.answer_id), (MALLORY, first.answer_id), (ALICE, other.answer_id), (ALICE, "no-such")):
        with pytest.raises(NotFound, match="no answer of this id waits"):
            await two.ask("", principal=principal, continues=answer_id, tool_results=results)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tool_results": [pb.ToolResult(call_id="x", text="rain")]}, "tool_results[0].call_id"),
        ({"tool_results": results, "session_id": "another"}, "continues"),
    ]
    for fields, field in wrong:
        with pytest.raises(RequestInvalid) as raised:
            await two.ask("", continues=first.answer_id, **fields)
        assert field == raised.value.field
    for fields, field in (({"continues": first.answer_id}, "tool_results"), ({"tool_results": results}, "continues")):
        for question in ("more", ""):
            with pytest.raises(RequestInvalid) as raised:
                await two.ask(question, **fields)
            assert field == raised.value.field

    assert len(model.prompts) == 2


async def test_the_word_on_a_call_is_said_at_any_replica(pair: tuple[World, World], model: ScriptedModel) -> None:
    """Who waits is seen at the other replica; a stranger's word is not heard, the first word of the owner counts."""
    one, two = pair
    for speaker, allowed in ((one, True), (two, True), (two, False)):
        model.script = [call("current_time", "now"), "It is late."]
        reply, seen = Reply(), Reply()
        asking = asyncio.create_task(one.ask("What time is it?", server_tools=["current_time"], into=reply))
        await until(lambda reply=reply: "tool_confirmation" in reply.kinds)

        async def watch(answer_id: str = reply.answer_id, seen: Reply = seen) -> None:
            request = pb.ResumeAnswerRequest(answer_id=answer_id)
            async with two.caller.stream(two.stub.ResumeAnswer, request, timeout_s=60, principal=ALICE) as events:
                async for event in events:
                    seen.events.append(event)

        watching = asyncio.create_task(watch())
        await until(lambda seen=seen: "tool_confirmation" in seen.kinds)

        async def say(principal: Any = ALICE, call_id: str = "now", answer_id: str = reply.answer_id, at: World = speaker) -> bool:
            word = pb.ConfirmToolCallRequest(answer_id=answer_id, call_id=call_id, allowed=allowed)  # noqa: B023 - called in this round
            return bool((await at.caller.unary(at.stub.ConfirmToolCall, word, principal=principal)).was_waiting)

        for stranger in (BOB, MALLORY):
            with pytest.raises(NotFound):
                await say(stranger)
        with pytest.raises(RequestInvalid):
            await say(call_id="")
        assert not await say(call_id="another") and not asking.done()
        said = await asyncio.gather(say(), say())
        assert sorted(said) == [False, True]
        await asyncio.gather(asking, watching)
        result = next(event.tool_result for event in reply.events if event.HasField("tool_result"))

        assert result.failed is not allowed and ("UTC" in result.text) is allowed
        assert [event.SerializeToString(deterministic=True) for event in seen.events if not event.HasField("heartbeat")] == [
            event.SerializeToString(deterministic=True) for event in reply.events if not event.HasField("heartbeat")
        ]
        assert not await say()


async def test_large_pictures_reach_the_model(pair: tuple[World, World], model: ScriptedModel) -> None:
    """Ten MiB together, over the wire between services; what is no picture is refused by its first bytes."""
    one, _ = pair
    model.script = ["A cat."]
    images = [pb.Image(media_type="image/png", data=PNG + bytes(5 * 1024 * 1024 - 8))] * 2
    reply = await one.ask("What is this?", images=images)
    with pytest.raises(RequestInvalid) as raised:
        await one.ask("What is this?", images=[pb.Image(media_type="image/jpeg", data=PNG)])

    assert reply.text == "A cat." and [len(image.data) for image in model.prompts[0].messages[-1].images] == [5 * 1024 * 1024] * 2
    assert raised.value.field == "images[0].data"


async def test_tools_that_nobody_has_are_refused(pair: tuple[World, World]) -> None:
    """With what there is."""
    one, _ = pair
    with pytest.raises(RequestInvalid) as raised:
        await one.ask(QUESTION, server_tools=["calculator", "fetch_url"])

    assert raised.value.field == "server_tools[1]"
    assert raised.value.metadata["bound"] == "one of: calculator, current_time, search_documents"


async def test_a_model_that_cannot_call_is_not_asked_to(tmp_path: Path, valkey: Valkey) -> None:
    """Without a key there is the extractive model alone: the field is named, and nothing is booked."""
    async with world(tmp_path, valkey.url, with_key=False) as alone:
        for fields, field in (({"tools": [weather()]}, "tools"), ({"server_tools": ["calculator"]}, "server_tools")):
            with pytest.raises(RequestInvalid) as raised:
                await alone.ask(QUESTION, **fields)
            assert field == raised.value.field
        with pytest.raises(RequestInvalid) as raised:
            await alone.ask(QUESTION, images=[pb.Image(media_type="image/png", data=PNG)])
        assert raised.value.field == "images" and alone.ledger.operations == {}


async def test_answers_that_wait_for_their_clients_have_a_bound(tmp_path: Path, valkey: Valkey, model: ScriptedModel) -> None:
    """Beyond it an answer ends in an error instead of a call nobody could answer; what waits too long is gone."""
    from services.chassis.errors import Overloaded

    small = {"TAILRACE_TOOLS_PENDING_BYTES_MAX": "3000", "TAILRACE_TOOLS_PENDING_S": "1"}
    async with world(tmp_path, valkey.url, **small) as one:
        model.script = [call("weather", "w", town="Oslo"), call("weather", "w", town="x" * 5_000), "never"]
        first = await one.ask(QUESTION, tools=[weather()])
        with pytest.raises(Overloaded):
            await one.ask(QUESTION, tools=[weather()])
        await asyncio.sleep(1.2)  # the store's own clock
        with pytest.raises(NotFound):
            await one.ask("", continues=first.answer_id, tool_results=[pb.ToolResult(call_id="w", text="rain")])


async def test_a_tool_that_cannot_be_is_not_marked_for_a_word(tmp_path: Path, valkey: Valkey) -> None:
    """A slip of the pen would leave the right one unguarded, so the process does not start."""
    with pytest.raises(ValueError, match="TAILRACE_TOOLS_CONFIRMED names tools that cannot be: current_tim, github__"):
        async with world(tmp_path, valkey.url, TAILRACE_TOOLS_CONFIRMED="current_tim,github__*,fetch_url"):
            pass
