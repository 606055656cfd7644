"""What the four adapters that speak to a vendor keep to besides, each through the vendor's real package against the vendor's real format.

The simulator is the witness: what it billed, what it was sent, and when its sockets closed.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anthropic.types.message_create_params
import openai.types.chat.completion_create_params
import openai.types.responses.response_create_params
import pytest
from google.genai import types
from opentelemetry import trace
from pydantic import TypeAdapter

from bench.script import Behaviour, ScriptedCall
from bench.simulator import Provider
from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded, ModelRefused, ModelStalled
from services.orchestrator import model_stream
from services.orchestrator.domain import Draft, Image, Message, Prompt, ToolCall, ToolResult, ToolSpec
from tests.contract.model_subjects import FORMATS, SUBJECTS, Subject, subject_of
from tests.fakes.orchestrator_world import provider_server, spans_of_this_process, until

WEATHER = ToolSpec("weather", "What the sky does.", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOSED = {"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"], "additionalProperties": False}
PICTURE = Image("image/png", b"\x89PNG pretend")
LONG = '{"city": "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", "when": "to \\"morrow\\" – früh"}'
CALLS = (ScriptedCall(name="weather", arguments=LONG), ScriptedCall(name="clock", arguments='{"zone":"UTC"}'))


def prompt(question: str = "Which port?", **fields: Any) -> Prompt:
    messages = fields.pop("messages", None) or (Message("user", question, images=fields.pop("images", ())),)
    return Prompt("t", "Answer briefly.", messages, question, (), 500, **fields)


class Heard:
    """A draft, and what was heard of it."""

    def __init__(self, *, reasons: bool = True) -> None:
        self.order: list[tuple[str, str]] = []
        self.draft = Draft(lambda text: self.order.append(("text", text)))
        if reasons:
            self.draft.on_reasoning = lambda text: self.order.append(("thought", text))

    def joined(self, kind: str) -> str:
        return "".join(text for what, text in self.order if what == kind)


@pytest.fixture
async def provider() -> Provider:
    return Provider()


@pytest.fixture
async def url(provider: Provider) -> AsyncIterator[str]:
    async with provider_server(provider) as address:
        yield address


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Subject]:
    """Each adapter in turn."""
    async with subject_of(request.param, url) as made:
        yield made


async def asked(subject: Subject, heard: Heard | None = None, *, output_tokens_max: int = 1000, **fields: Any) -> Draft:
    """One call, to its end."""
    made = heard or Heard()
    await subject.model.generate(prompt(**fields), subject.candidate, output_tokens_max, made.draft)
    return made.draft


def sent(provider: Provider) -> dict[str, Any]:
    """The latest request, as the provider read it."""
    body: dict[str, Any] = json.loads(provider.prompts[-1])
    return body


async def test_each_speaks_its_own_format_and_is_billed_what_the_provider_says(subject: Subject, provider: Provider) -> None:
    """Every token of the provider's book is in the draft's, by kind."""
    provider.default = Behaviour(tokens=12, cached_tokens=7, cache_write_tokens=5)
    made = await asked(subject, question="Which port is it that the gateway listens on?")
    usage, estimated = made.usage(prompt())
    record = provider.records[-1]
    written = 0 if subject.name == "gemini" else 5  # which has no such count

    assert record.format == FORMATS[subject.name]
    assert (usage.prompt_tokens, usage.output_tokens, estimated) == (record.input_tokens, 12, False)
    assert (usage.cache_read_tokens, usage.cache_write_tokens) == (7, written)
    assert usage.input_tokens == record.input_tokens - 7 - written
    assert (made.finish_reason, made.model) == ("end_turn", subject.candidate.model)
    assert made.request_id


async def test_thoughts_are_heard_before_the_text_and_billed_with_it(subject: Subject, provider: Provider) -> None:
    """They are output, and never part of the answer."""
    provider.default = Behaviour(reasoning="Let me see. Ports have numbers.", text="It is 8080.")
    heard = Heard()
    made = await asked(subject, heard)
    usage, estimated = made.usage(prompt())

    assert heard.joined("thought") == "Let me see. Ports have numbers."
    assert made.text == heard.joined("text") == "It is 8080."
    assert [kind for kind, _ in heard.order] == sorted((kind for kind, _ in heard.order), reverse=True)
    assert (usage.output_tokens, estimated) == (9, False)


@pytest.mark.parametrize(("reasoning", "thoughts"), [("Let me see. Ports have numbers.", 6), ("", 0)])
async def test_thoughts_are_told_as_a_part_of_the_output(subject: Subject, provider: Provider, reasoning: str, thoughts: int) -> None:
    """By each vendor in another field; nothing is counted twice."""
    provider.default = Behaviour(reasoning=reasoning, text="It is 8080.")
    made = await asked(subject)
    usage, _ = made.usage(prompt())

    assert (made.reasoning_tokens, usage.output_tokens) == (thoughts, thoughts + 3)


async def test_who_was_asked_and_what_it_calls_its_answer_is_known(subject: Subject, provider: Provider) -> None:
    """For the trace: each vendor says it elsewhere."""
    made = await asked(subject)

    assert made.address == "127.0.0.1"
    assert made.response_id and provider.records[-1].request_id.removeprefix("req_") in made.response_id


async def test_nobody_is_asked_to_show_thoughts_that_nobody_hears(subject: Subject, provider: Provider) -> None:
    """Showing costs time, and with Claude the thinking itself is only begun for it."""
    await asked(subject, Heard(reasons=False))
    quiet = provider.prompts[-1]
    await asked(subject, Heard())
    shown = provider.prompts[-1]
    words = {
        "claude": b'"thinking"',
        "openai_chat": b"\x00",  # where it is shown or not as the server was started
        "openai_responses": b'"summary":"auto"',
        "gemini": b'"includeThoughts": true',
    }

    assert words[subject.name] not in quiet
    assert words[subject.name] in shown or subject.name == "openai_chat"


async def test_thoughts_are_kept_brief_where_they_would_leave_nothing_to_answer_with(subject: Subject, provider: Provider) -> None:
    """They are paid from the same bound as the answer."""
    await asked(subject, output_tokens_max=1000)
    small = provider.prompts[-1]
    await asked(subject, output_tokens_max=16_000)
    large = provider.prompts[-1]

    assert (b'"low"' in small) == (subject.name != "openai_chat")
    assert b'"low"' not in large


async def test_calls_side_by_side_come_whole_and_in_order(subject: Subject, provider: Provider) -> None:
    """However their arguments are cut on the way, beside text."""
    provider.default = Behaviour(text="I will look.", calls=CALLS)
    made = await asked(subject, tools=(WEATHER,))

    assert [(call.name, json.loads(call.arguments)) for call in made.calls] == [(c.name, json.loads(c.arguments)) for c in CALLS]
    assert len({call.call_id for call in made.calls} - {""}) == 2
    assert (made.text, made.finish_reason) == ("I will look.", "tool_use")
    assert made.usage(prompt())[0].output_tokens == provider.records[-1].output_tokens


async def test_a_call_without_text_or_arguments_is_a_call(subject: Subject, provider: Provider) -> None:
    """No arguments are an empty object."""
    provider.default = Behaviour(calls=(ScriptedCall(name="now", arguments="{}"),))
    made = await asked(subject, tools=(WEATHER,))

    assert [(call.name, call.arguments) for call in made.calls] == [("now", "{}")]
    assert (made.text, made.finish_reason) == ("", "tool_use")


async def test_arguments_that_are_no_json_are_passed_on_as_they_are(subject: Subject, provider: Provider) -> None:
    """Judging them is not the adapter's matter; Gemini itself cannot say them, and says so."""
    provider.default = Behaviour(calls=(ScriptedCall(name="weather", arguments='{"city": Paris'),))
    if subject.name == "gemini":
        with pytest.raises(ModelFailed) as failed:
            await asked(subject, tools=(WEATHER,))
        assert failed.value.metadata["cause"] == "malformed_call"
    else:
        made = await asked(subject, tools=(WEATHER,))
        assert [call.arguments for call in made.calls] == ['{"city": Paris']


async def test_a_call_that_the_stream_cuts_is_no_call_but_is_billed(subject: Subject, provider: Provider) -> None:
    """What came of it was generated."""
    provider.default = Behaviour(calls=(ScriptedCall(name="weather", arguments=LONG),), fault="cut_after", fault_at=8)
    heard = Heard()
    with pytest.raises(ModelFailed):
        await asked(subject, heard, tools=(WEATHER,))
    usage, estimated = heard.draft.usage(prompt())

    assert (heard.draft.calls, estimated) == ([], True)
    assert usage.output_tokens > 0


async def test_a_call_that_is_cancelled_while_it_is_written_is_billed(subject: Subject, provider: Provider) -> None:
    """Also by a provider that sends a call only whole: then the time that it has written tells about how much."""
    provider.default = Behaviour(calls=(ScriptedCall(name="weather", arguments=LONG),), tokens_per_s=50, ttft_ms=1)
    heard = Heard()
    calling = asyncio.create_task(asked(subject, heard, tools=(WEATHER,)))
    await until(lambda: bool(provider.records) and provider.records[-1].output_tokens >= 3)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    usage, estimated = heard.draft.usage(prompt())

    assert (heard.draft.calls, estimated) == ([], True)
    assert usage.output_tokens > 0


async def test_a_conversation_with_calls_and_results_is_told_in_the_vendors_words(subject: Subject, provider: Provider) -> None:
    """Text, pictures, calls and what came of them, each where the format has it; nothing of ours that it would refuse."""
    provider.default = Behaviour(reasoning="Hm.", text="I will look.", calls=CALLS)
    first = await asked(subject, images=(PICTURE,), tools=(WEATHER,))
    provider.default = Behaviour(text="It rains.")
    results = tuple(ToolResult(call.call_id, call.name, f"result of {call.name}", call.name == "clock") for call in first.calls)
    history = (
        Message("user", "What is in the picture, and how is the weather?", images=(PICTURE,)),
        Message("assistant", first.text, calls=tuple(first.calls)),
        Message("tool", results=results),
    )
    second = await asked(subject, messages=history, tools=(WEATHER,))
    body = sent(provider)
    written = provider.prompts[-1].replace(b'": ', b'":').replace(b", ", b",").decode()

    assert second.text == "It rains."
    assert [record.images for record in provider.records] == [1, 1]
    assert base64.b64encode(PICTURE.data).decode() in written
    assert "result of weather" in written and "result of clock" in written
    assert _shape(subject.name, body) == SHAPES[subject.name]


SHAPES = {
    "claude": [
        ("user", ["image", "text"]),
        ("assistant", ["thinking", "text", "tool_use", "tool_use"]),
        ("user", ["tool_result", "tool_result"]),
    ],
    "openai_chat": [
        ("system", ["text"]),
        ("user", ["image_url", "text"]),
        ("assistant", ["text", "call", "call"]),
        *[("tool", ["text"])] * 2,
    ],
    "openai_responses": [
        ("developer", ["input_text"]),
        ("user", ["input_image", "input_text"]),
        ("", ["reasoning"]),
        ("assistant", ["text"]),
        *[("", ["function_call"])] * 2,
        *[("", ["function_call_output"])] * 2,
    ],
    "gemini": [
        ("user", ["inlineData", "text"]),
        ("model", ["text", "functionCall+thoughtSignature", "functionCall"]),
        ("user", ["functionResponse", "functionResponse"]),
    ],
}


def _shape(name: str, body: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Roles of the messages and kinds of their parts."""
    if name == "gemini":
        return [(content["role"], ["+".join(sorted(part)) for part in content["parts"]]) for content in body["contents"]]
    found = []
    for message in body["input" if name == "openai_responses" else "messages"]:
        content = message.get("content")
        kinds = [part["type"] for part in content] if isinstance(content, list) else ["text"] if isinstance(content, str) else []
        kinds += ["call" for _ in message.get("tool_calls", ())]
        found.append((message.get("role", ""), kinds or [message["type"]]))
    return found


async def test_what_another_vendor_sealed_is_not_shown_to_this_one(subject: Subject, provider: Provider) -> None:
    """A conversation may go on at another provider, which would refuse a foreign signature."""
    call = ToolCall("c1", "weather", '{"city":"Bonn"}', b"elsewhere:SEALED")
    history = (Message("user", "?"), Message("assistant", calls=(call,)), Message("tool", results=(ToolResult("c1", "weather", "sun"),)))
    await asked(subject, messages=history, tools=(WEATHER,))

    assert b"SEALED" not in provider.prompts[-1]


async def test_an_answer_is_bound_to_a_schema_where_the_vendor_can_be(subject: Subject, provider: Provider) -> None:
    """In the vendor's words; one that the vendor would refuse binds nothing, or loosely, instead of failing the answer."""
    await asked(subject, output_schema=CLOSED)
    bound = sent(provider)
    await asked(subject, output_schema={"type": "object", "properties": {"port": {"type": "integer"}}})
    loose = sent(provider)
    strict = {"name": "answer", "schema": CLOSED, "strict": True}

    if subject.name == "claude":
        assert bound["output_config"]["format"] == {"type": "json_schema", "schema": CLOSED}
        assert "format" not in loose.get("output_config", {})
    elif subject.name == "openai_chat":
        assert bound["response_format"] == {"type": "json_schema", "json_schema": strict}
        assert loose["response_format"]["json_schema"]["strict"] is False
    elif subject.name == "openai_responses":
        assert bound["text"]["format"] == {"type": "json_schema", **strict}
        assert loose["text"]["format"]["strict"] is False
    else:
        assert bound["generationConfig"]["responseJsonSchema"] == CLOSED
        assert bound["generationConfig"]["responseMimeType"] == "application/json"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (Behaviour(tokens=5), "end_turn"),
        (Behaviour(tokens=5, fault="max_tokens"), "max_tokens"),
        (Behaviour(tokens=5, fault="refusal"), "refusal"),
        (Behaviour(tokens=0), "end_turn"),
        (Behaviour(tokens=5, fault="slow_drip"), "end_turn"),
        (Behaviour(tokens=5, fault="doubled_usage"), "end_turn"),
        (Behaviour(tokens=5, fault="cut_at_end"), "end_turn"),
    ],
)
async def test_each_end_is_told_and_billed_once(subject: Subject, provider: Provider, behaviour: Behaviour, reason: str) -> None:
    """Also of an empty answer, of one that drips, of usage that is said twice, and of a connection that breaks when all was said."""
    provider.default = behaviour
    made = await asked(subject)
    usage, estimated = made.usage(prompt())
    record = provider.records[-1]

    assert made.finish_reason == reason
    assert (usage.prompt_tokens, usage.output_tokens, estimated) == (record.input_tokens, behaviour.tokens, False)


async def test_usage_that_is_missing_is_estimated_and_said_to_be(subject: Subject, provider: Provider) -> None:
    """Never 0 for what was received."""
    provider.default = Behaviour(tokens=20, fault="late_usage_missing")
    usage, estimated = (await asked(subject)).usage(prompt())

    assert estimated
    assert usage.output_tokens >= 20
    assert usage.input_tokens > 0


async def test_usage_of_zero_is_a_count(subject: Subject, provider: Provider) -> None:
    """What the provider says it bills is what is booked."""
    provider.default = Behaviour(tokens=20, fault="zero_usage")
    usage, estimated = (await asked(subject)).usage(prompt())

    assert usage.prompt_tokens == 0
    assert (usage.output_tokens, estimated) == (0, False)


FAULTS: dict[str, tuple[Behaviour, type[DomainError], bool]] = {
    "400": (Behaviour(fault="status", status=400), ModelRefused, True),
    "401": (Behaviour(fault="status", status=401), ModelMisconfigured, True),
    "403": (Behaviour(fault="status", status=403), ModelMisconfigured, True),
    "404": (Behaviour(fault="status", status=404), ModelMisconfigured, True),
    "408": (Behaviour(fault="status", status=408), ModelFailed, True),
    "429": (Behaviour(fault="status", status=429, retry_after_s=1.5), ModelOverloaded, True),
    "500": (Behaviour(fault="status", status=500), ModelFailed, True),
    "503": (Behaviour(fault="status", status=503), ModelFailed, True),
    "529": (Behaviour(fault="status", status=529), ModelOverloaded, True),
    "cut before the head": (Behaviour(fault="cut_before_first"), ModelFailed, False),
    "reset before the head": (Behaviour(fault="reset_before_first"), ModelFailed, False),
    "cut before the first token": (Behaviour(fault="cut_after", fault_at=0), ModelFailed, False),
    "cut": (Behaviour(fault="cut_after", fault_at=4), ModelFailed, False),
    "reset": (Behaviour(fault="reset_after", fault_at=4), ModelFailed, False),
    "ended early": (Behaviour(fault="end_after", fault_at=4), ModelFailed, False),
    "error in 200": (Behaviour(fault="error_in_200", fault_at=4), ModelOverloaded, False),
    "malformed chunk": (Behaviour(fault="malformed", fault_at=4), ModelFailed, False),
}
"""What goes wrong, the error of ours, and whether the provider bills nothing."""


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_fault_is_one_error_by_type_with_what_came_and_its_bill(subject: Subject, provider: Provider, fault: str) -> None:
    """The reader's text is the provider's, nothing of a refusal is billed, and no word of the provider's is passed on."""
    behaviour, failure, free = FAULTS[fault]
    if (fault, subject.name) == ("503", "gemini"):  # where it means an overload
        failure = ModelOverloaded
    provider.default = behaviour
    heard = Heard()
    with pytest.raises(failure) as failed:
        await asked(subject, heard)
    usage, estimated = heard.draft.usage(prompt())

    assert len(provider.records) == 1  # no package asks again by itself
    assert failed.value.metadata["provider"] == subject.name
    assert "scripted" not in failed.value.detail
    assert heard.draft.sent
    assert heard.draft.deltas == behaviour.fault_at
    if free:
        assert (usage.prompt_tokens, usage.output_tokens, estimated) == (0, 0, False)
    else:
        assert usage.prompt_tokens > 0
        assert usage.output_tokens >= behaviour.fault_at
    if fault == "429":
        assert failed.value.retry_after_ms == 1500


async def test_an_error_in_200_before_anything_else_bills_nothing_unless_the_prompt_was_counted(
    subject: Subject, provider: Provider
) -> None:
    """Only Anthropic counts the prompt before it says the rest."""
    provider.default = Behaviour(fault="error_in_200", fault_at=0)
    heard = Heard()
    with pytest.raises(ModelOverloaded):
        await asked(subject, heard)

    assert heard.draft.rejected == (subject.name != "claude")


@pytest.mark.parametrize("fault", ["hang", "stall_after"])
async def test_silence_ends_in_a_stall_and_a_closed_socket(provider: Provider, url: str, fault: Any) -> None:
    """Before the head as between two tokens."""
    provider.default = Behaviour(fault=fault, fault_at=3)
    for name in SUBJECTS:
        async with subject_of(name, url, first_token_s=0.6, stall_s=0.3) as subject:
            heard = Heard()
            with pytest.raises(ModelStalled):
                await asked(subject, heard)
            assert heard.draft.deltas == (3 if fault == "stall_after" else 0)
            await until(lambda: provider.records[-1].state == "client_closed")


async def test_a_slow_drip_is_no_silence(provider: Provider, url: str) -> None:
    """Output renews the patience: the whole takes longer than either limit."""
    provider.default = Behaviour(tokens=60, tokens_per_s=20)

    async def dripped(name: str) -> int:
        async with subject_of(name, url, first_token_s=2, stall_s=2) as subject:
            return (await asked(subject)).deltas

    assert await asyncio.gather(*map(dripped, SUBJECTS)) == [60] * len(SUBJECTS)


async def test_a_cancel_closes_the_socket_wherever_it_comes(subject: Subject, provider: Provider) -> None:
    """Before the head, in the text, in a thought; the next call is answered from a whole connection."""
    provider.default = Behaviour(tokens=1000, tokens_per_s=100, ttft_ms=30, reasoning="hm " * 200)
    for pieces in (0, 1, 3):
        heard = Heard()
        before = len(provider.records)
        calling = asyncio.create_task(asked(subject, heard))
        await until(lambda heard=heard, pieces=pieces, before=before: len(provider.records) > before and len(heard.order) >= pieces)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    await until(lambda: all(record.state == "client_closed" and record.closed_s is not None for record in provider.records))
    provider.default = Behaviour(text="All well.")

    assert (await asked(subject)).text == "All well."


@pytest.mark.parametrize("traced", [False, True])
async def test_what_was_under_way_at_a_cancel_is_read_and_billed(subject: Subject, provider: Provider, traced: bool) -> None:
    """The provider hears at once that nobody listens; what it wrote until then it bills, so it must not be lost with the connection.

    The vendors' packages wrap their responses otherwise where calls are traced.
    """
    if traced:
        spans_of_this_process()
    provider.default = Behaviour(tokens=1000, tokens_per_s=50, under_way=3)
    heard = Heard()
    with trace.get_tracer("test").start_as_current_span("answer"):
        calling = asyncio.create_task(asked(subject, heard))
    await until(lambda: len(heard.order) >= 2)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await until(lambda: provider.records[-1].closed_s is not None)

    assert provider.records[-1].state == "client_closed"
    assert heard.draft.deltas == provider.records[-1].output_tokens


async def test_one_that_writes_on_after_a_cancel_is_left_soon(subject: Subject, provider: Provider) -> None:
    """It has a tenth of a second to close its side; then the connection is closed on it."""
    provider.default = Behaviour(tokens=100_000, tokens_per_s=100, under_way=-1)
    heard = Heard()
    calling = asyncio.create_task(asked(subject, heard))
    await until(lambda: len(heard.order) >= 2)
    known, began = heard.draft.deltas, time.monotonic()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    took_s = time.monotonic() - began
    await until(lambda: provider.records[-1].closed_s is not None)

    assert heard.draft.deltas > known
    assert took_s < 0.1 + 1.0, "a tenth of a second, on a machine that does other things"


async def test_an_answer_without_end_is_cut_off(subject: Subject, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, thoughts and arguments are counted together; what came so far is kept and billed."""
    monkeypatch.setattr(model_stream, "OUTPUT_CHARACTERS_MAX", 2000)
    endless = ScriptedCall(name="weather", arguments=json.dumps({"city": "x" * 5000}))
    scripts = [Behaviour(tokens=5000, ignores_limit=True), Behaviour(reasoning="hm " * 2000, ignores_limit=True)]
    scripts += [Behaviour(calls=(endless,), ignores_limit=True)] if subject.name != "gemini" else []
    for behaviour in scripts:
        provider.default = behaviour
        heard = Heard()
        with pytest.raises(ModelFailed) as failed:
            await asked(subject, heard, output_tokens_max=50)
        assert failed.value.metadata["cause"] == "too_long"
        assert len(heard.draft.text) < 4000


async def test_a_refused_connection_was_sent_nothing(provider: Provider) -> None:
    """Its hold is given back."""
    for name in SUBJECTS:
        async with subject_of(name, "http://127.0.0.1:1") as subject:
            heard = Heard()
            with pytest.raises(ModelFailed) as failed:
                await asked(subject, heard)
            assert (failed.value.metadata["cause"], heard.draft.sent) == ("connect", False)


@pytest.mark.parametrize("status", [401, 403, 429])
async def test_another_key_is_used_once_one_is_refused_or_limited(provider: Provider, url: str, status: int) -> None:
    """The error says that another is there, the next call uses it and the calls after it too; when all are bad, the error says no more."""
    for name in SUBJECTS:
        provider.clear()
        provider.rules.append((b"key-bad", Behaviour(fault="status", status=status)))
        async with subject_of(name, url, keys=("key-bad-1", "key-good")) as subject:
            with pytest.raises(DomainError) as failed:
                await asked(subject)
            assert "other_key" in failed.value.metadata
            assert (await asked(subject)).finish_reason == (await asked(subject)).finish_reason == "end_turn"
        async with subject_of(name, url, keys=("key-bad-1", "key-bad-2")) as subject:
            marks = []
            for _ in range(3):
                with pytest.raises(ModelMisconfigured if status != 429 else ModelOverloaded) as failed:
                    await asked(subject)
                marks.append("other_key" in failed.value.metadata)
            assert marks == [True, False, False]


REQUESTS: dict[str, Any] = {
    "claude": anthropic.types.message_create_params.MessageCreateParamsStreaming,
    "openai_chat": openai.types.chat.completion_create_params.CompletionCreateParamsStreaming,
    "openai_responses": openai.types.responses.response_create_params.ResponseCreateParamsStreaming,
}
"""What each package says a request is."""


async def test_what_is_sent_is_what_the_vendors_package_knows(subject: Subject, provider: Provider) -> None:
    """Names, kinds and values, of a request that has everything in it: the simulator reads only what it needs."""
    provider.default = Behaviour(reasoning="Hm.", text="I will look.", calls=CALLS)
    first = await asked(subject, tools=(WEATHER,))
    results = tuple(ToolResult(call.call_id, call.name, "it rains", call.name == "clock") for call in first.calls)
    foreign = ToolCall("c1", "weather", "no json", b"elsewhere:x")
    history = (
        Message("user", "?", images=(PICTURE,)),
        Message("assistant", first.text, calls=tuple(first.calls)),
        Message("tool", results=results),
        Message("assistant", calls=(foreign,)),
        Message("tool", results=(ToolResult("c1", "weather", "no such city", failed=True),)),
    )
    await asked(subject, messages=history, tools=(WEATHER,), output_schema=CLOSED)
    body = sent(provider)

    if subject.name == "gemini":
        for content in [*body.pop("contents"), body.pop("systemInstruction")]:
            types.Content.model_validate(content)
        for tool in body.pop("tools"):
            types.Tool.model_validate(tool)
        types.GenerationConfig.model_validate(body.pop("generationConfig"))
        assert body == {}
    else:
        known = REQUESTS[subject.name]
        adapter = TypeAdapter(known)  # outlives what it has validated: that refers to it
        exhausted(adapter.validate_python(body))
        assert body.keys() <= known.__required_keys__ | known.__optional_keys__


def exhausted(value: Any) -> None:
    """Look at all of a validated value: what is declared as an iterable is only judged as it is read."""
    if isinstance(value, dict):
        for inner in value.values():
            exhausted(inner)
    elif not isinstance(value, str | bytes) and hasattr(value, "__iter__"):
        for inner in value:
            exhausted(inner)


async def test_a_connection_is_used_again_although_the_response_ends_after_the_answer(subject: Subject, provider: Provider) -> None:
    """Its end is another packet; who does not wait for it makes a new connection for every answer."""
    provider.default = Behaviour(tokens=5, end_after_ms=20)
    for _ in range(3):
        await asked(subject)

    assert [record.state for record in provider.records] == ["finished"] * 3
    assert [record.closed_s for record in provider.records] == [None] * 3


async def test_an_answer_is_not_kept_by_a_response_that_does_not_end(subject: Subject, provider: Provider) -> None:
    """It is whole, and the connection is closed."""
    provider.default = Behaviour(tokens=5, end_after_ms=60_000)
    async with asyncio.timeout(5):
        made = await asked(subject)
    await until(lambda: provider.records[-1].closed_s is not None)

    assert (made.finish_reason, made.deltas, made.usage(prompt())[1]) == ("end_turn", 5, False)


async def test_a_key_goes_nowhere_but_to_the_address_it_was_given_for(subject: Subject, provider: Provider) -> None:
    """A redirect is not followed."""
    visits: list[asyncio.StreamWriter] = []
    elsewhere = await asyncio.start_server(lambda _, writer: visits.append(writer), "127.0.0.1", 0)
    place = f"http://127.0.0.1:{elsewhere.sockets[0].getsockname()[1]}/v1/messages"
    async with elsewhere:
        for status in (302, 307, 308):
            provider.default = Behaviour(fault="status", status=status, location=place)
            with pytest.raises(ModelMisconfigured):
                await asked(subject)
        for writer in visits:
            writer.close()

    assert len(provider.records) == 3
    assert visits == []
