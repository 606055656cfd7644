"""Two rounds with tools by each provider through the real service: its own wire format carries calls, results and the answer."""

from pathlib import Path

import pytest

from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import until, world

providers = pytest.importorskip("services.orchestrator.providers", reason="one provider alone is there, and its adapter calls no tools")

QUESTION = "What is six times seven?"
SPOKEN: dict[str, dict[str, str]] = {
    "anthropic": {"ANTHROPIC_API_KEY": "k"},
    "openai_chat": {"OPENAI_API_KEY": "k"},
    "openai_responses": {"OPENAI_API_KEY": "k", "TAILRACE_ORCHESTRATOR_OPENAI_API": "responses"},
    "gemini": {"GEMINI_API_KEY": "k"},
}


@pytest.mark.parametrize("form", SPOKEN)
async def test_tools_are_used_through_each_providers_wire(form: str, tmp_path: Path, valkey: Valkey) -> None:
    """Ours twice at once, one of them called wrongly; then the client's, whose result goes on by the same provider."""
    from bench.script import Behaviour, ScriptedCall

    weather = pb.ToolDefinition(name="weather", description="of a town")
    weather.input_schema.update({"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]})
    async with world(tmp_path, valkey.url, with_key=False, **SPOKEN[form]) as running:
        sums = (ScriptedCall(name="calculator", arguments='{"expression": "6*7"}'), ScriptedCall(name="calculator", arguments="{}"))
        running.provider.default = Behaviour(text="Let me see.", calls=sums)
        client_calls = Behaviour(calls=(ScriptedCall(name="weather", arguments='{"town": "Oslo"}'),))
        running.provider.rules += [(b"is a required property", client_calls), (b"minus 3", Behaviour(text="42, and cold."))]
        first = await running.ask(QUESTION, server_tools=["calculator"], tools=[weather])
        call = [event.tool_call for event in first.events if event.HasField("tool_call")][-1]
        results = [pb.ToolResult(call_id=call.call_id, text="minus 3")]
        second = await running.ask("", continues=first.answer_id, tool_results=results)
        booked = await running.booked(first.answer_id)
        records = await running.records()
        await until(lambda: not running.ledger.open_holds)

    told = {event.tool_result.text: event.tool_result.failed for event in first.events if event.HasField("tool_result")}
    assert {"42": False, "the arguments are wrong: 'expression' is a required property": True} == told
    assert first.text == "Let me see." and first.done.finish_reason == "tool_use" and dict(call.input) == {"town": "Oslo"}
    assert second.text == "42, and cold." and second.done.finish_reason == "end_turn"
    assert len(records) == 3 and {form} == {record.format for record in records}
    assert [1, 2] == [attempt.attempt for attempt in booked.attempts] and all(attempt.usage.output_tokens for attempt in booked.attempts)
