"""What single events of the vendors' streams come to, where they differ from what the simulator sends."""

import contextlib
from typing import Any

import orjson
import pytest
from google.genai.errors import APIError

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded, ModelRefused
from services.orchestrator.claude_model import ClaudeReading
from services.orchestrator.domain import ESTIMATE_BYTES_PER_TOKEN, Draft, Prompt, ToolCall
from services.orchestrator.gemini_model import GeminiReading, _refused
from services.orchestrator.model_stream import Reading, arguments_object, retry_after_ms, sealed, unsealed
from services.orchestrator.openai_chat_model import ChatReading
from services.orchestrator.openai_responses_model import ResponsesReading


def reading(kind: type[Reading], *events: Any) -> Reading:
    """A stream of these events, read and passed on."""
    made = kind("p", Draft(lambda text: None, model="m"))
    for event in events:
        made.read(event if isinstance(event, bytes) else orjson.dumps(event))
    made.flush()
    return made


def chat(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c1", "model": "m", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": reason}], **more}


def calls(*tool_calls: dict[str, Any]) -> dict[str, Any]:
    return chat({"tool_calls": list(tool_calls)})


def function(name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_chat_servers_that_put_whole_calls_under_one_index_are_understood() -> None:
    """Ollama does so, and ends with `stop`."""
    first = calls({"index": 0, "id": "a", "function": function("now", '{"x":1}')})
    second = calls({"index": 0, "id": "b", "function": function("sky", '{"y":2}')})
    made = reading(ChatReading, first, second, chat(reason="stop"), b"[DONE]").draft

    assert [(call.call_id, call.name, call.arguments) for call in made.calls] == [("a", "now", '{"x":1}'), ("b", "sky", '{"y":2}')]
    assert made.finish_reason == "tool_use"


def test_chat_servers_that_leave_out_index_and_id_are_understood() -> None:
    """Ids are made up, each another one."""
    both = calls({"function": function("now", "{}")}, {"function": function("sky", "{}")})
    made = reading(ChatReading, both, chat(reason="tool_calls")).draft

    assert [call.name for call in made.calls] == ["now", "sky"]
    assert len({call.call_id for call in made.calls}) == 2


def test_a_name_that_is_repeated_with_every_piece_begins_no_new_call() -> None:
    """Some servers repeat id and name."""
    pieces = [calls({"index": 0, "id": "a", "function": function("now", piece)}) for piece in ('{"x"', ":1}")]
    made = reading(ChatReading, *pieces, chat(reason="tool_calls")).draft

    assert [(call.name, call.arguments) for call in made.calls] == [("now", '{"x":1}')]


def test_a_call_cut_by_the_bound_is_no_call() -> None:
    """Half of its arguments would be another call."""
    cut = reading(ChatReading, calls({"index": 0, "id": "a", "function": function("now", '{"x"')}), chat(reason="length"), b"[DONE]")

    assert (cut.draft.calls, cut.draft.finish_reason) == ([], "max_tokens")
    assert cut.draft.called > 0


@pytest.mark.parametrize("told", [{}, {"promptTokenCount": 9}, {"promptTokenCount": 9, "totalTokenCount": 9}])
def test_a_call_that_comes_whole_is_counted_though_its_usage_was_cut_off(told: dict[str, int]) -> None:
    """Gemini sends calls in one piece, and what they took with the end of the stream: until then it is estimated by name and arguments."""
    call = {"functionCall": {"name": "search", "args": {"query": "x" * 400}}}
    made = reading(GeminiReading, {"candidates": [{"content": {"parts": [call]}}], "usageMetadata": told}).draft
    made.sent = True
    usage, estimated = made.usage(Prompt("t", "s", (), "?", (), 10))

    assert estimated
    assert usage.output_tokens >= 400 / ESTIMATE_BYTES_PER_TOKEN


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_of_servers_of_ones_own_are_thoughts(field: str) -> None:
    """vLLM, llama.cpp and Ollama name them differently."""
    heard: list[str] = []
    made = ChatReading("p", Draft(lambda text: None, on_reasoning=heard.append))
    made.read(orjson.dumps(chat({field: "Hm."})))
    made.flush()

    assert heard == ["Hm."]


def test_a_server_that_counts_along_has_the_last_word_at_the_end() -> None:
    """Counts in the middle are no final ones; without `[DONE]` the finish reason ends the answer."""
    usage = {"prompt_tokens": 9, "completion_tokens": 1}
    made = reading(ChatReading, chat({"content": "a"}, usage=usage))
    assert (made.draft.output_tokens, made.draft.usage_is_final) == (1, False)
    made.read(orjson.dumps(chat(reason="stop", usage={**usage, "completion_tokens": 2})))

    assert (made.draft.output_tokens, made.draft.usage_is_final, made.finished) == (2, True, True)


def test_a_refusal_of_openai_is_shown_and_told() -> None:
    """Its words are the answer."""
    refused = reading(ChatReading, chat({"refusal": "I can't."}), chat(reason="stop")).draft
    events = [{"type": "response.refusal.delta", "delta": "I can't."}, {"type": "response.completed", "response": {"model": "m"}}]
    responded = reading(ResponsesReading, *events).draft

    assert (refused.text, refused.finish_reason) == (responded.text, responded.finish_reason) == ("I can't.", "refusal")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ({"code": "rate_limit_exceeded"}, ModelOverloaded),
        ({"code": "insufficient_quota"}, ModelMisconfigured),
        ({"code": "server_error"}, ModelFailed),
        ({"code": "context_length_exceeded"}, ModelRefused),
        ({"code": "invalid_prompt"}, ModelRefused),
        ({"code": "unsupported_image_media_type"}, ModelRefused),
        ({"code": "bio_policy"}, ModelRefused),
        ({"code": 503}, ModelOverloaded),
        ({"code": 400, "type": "BadRequestError"}, ModelRefused),
        ({}, ModelFailed),
    ],
)
def test_an_error_in_a_good_stream_of_openai_is_read_by_its_code(error: dict[str, Any], failure: type[DomainError]) -> None:
    """Told in the one format or the other, by the vendor or by a server of one's own."""
    for kind, event in (
        (ChatReading, {"error": {"message": "secret prompt", **error}}),
        (ResponsesReading, {"type": "response.failed", "response": {"error": {"message": "secret prompt", **error}}}),
        (ResponsesReading, {"type": "error", "error": {"message": "secret prompt", **error}}),
        (ResponsesReading, {"type": "error", "message": "secret prompt", **({"code": error["code"]} if "code" in error else {})}),
    ):
        if "type" in error and "message" in event:
            continue  # where the type stands beside the code, the event's own is meant
        with pytest.raises(failure) as failed:
            reading(kind, event)
        assert "secret" not in str(failed.value.metadata) + failed.value.detail


def test_a_prompt_that_gemini_blocks_is_a_refusal_that_costs_its_prompt() -> None:
    """There is no candidate then."""
    made = reading(GeminiReading, {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 12}})

    assert (made.finished, made.draft.finish_reason) == (True, "refusal")
    assert (made.draft.input_tokens, made.draft.output_tokens, made.draft.usage_is_final) == (12, 0, True)


@pytest.mark.parametrize(
    ("reason", "ours"),
    [("SAFETY", "refusal"), ("RECITATION", "refusal"), ("PROHIBITED_CONTENT", "refusal"), ("OTHER", ""), ("SOMETHING_NEW", "")],
)
def test_other_ends_of_gemini_are_refusals_or_no_whole_answer(reason: str, ours: str) -> None:
    """What is not known is not taken for a good end."""
    assert reading(GeminiReading, {"candidates": [{"finishReason": reason}]}).draft.finish_reason == ours


@pytest.mark.parametrize(
    ("body", "failure", "wait_ms"),
    [
        ({"code": 400, "status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}, ModelMisconfigured, None),
        ({"code": 400, "status": "INVALID_ARGUMENT", "message": "The input token count (9) exceeds the maximum"}, ModelRefused, None),
        ({"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "3.5s"}]}, ModelOverloaded, 3500),
        ({"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "soon"}]}, ModelOverloaded, None),
        ({"code": 503, "status": "UNAVAILABLE", "details": "none"}, ModelOverloaded, None),
    ],
)
def test_geminis_details_say_what_its_status_does_not(body: dict[str, Any], failure: type[DomainError], wait_ms: int | None) -> None:
    """A key that is none is a 400 there, and the wait stands in the body."""
    found = _refused("gemini", APIError(body["code"], {"error": body}))

    assert (type(found), found.retry_after_ms) == (failure, wait_ms)
    if "token count" in body.get("message", ""):
        assert found.metadata["cause"] == "context_window"


def test_geminis_answer_is_whole_although_its_thoughts_were_all_of_it() -> None:
    """Thoughts are output."""
    usage = {"promptTokenCount": 5, "thoughtsTokenCount": 7, "cachedContentTokenCount": 2, "toolUsePromptTokenCount": 3}
    made = reading(GeminiReading, {"candidates": [{"finishReason": "MAX_TOKENS"}], "usageMetadata": usage}).draft

    assert (made.input_tokens, made.cache_read_tokens, made.output_tokens, made.usage_is_final) == (6, 2, 7, True)


def test_the_model_that_is_booked_is_the_one_that_was_asked_or_a_snapshot_of_it() -> None:
    """A server that answers with a file name would be booked as a model without a price."""
    for said, booked in (("m-2026-11-01", "m-2026-11-01"), ("/models/m.gguf", "m"), ("", "m")):
        assert reading(ChatReading, chat({"content": "a"}, model=said)).draft.model == booked
        assert reading(GeminiReading, {"modelVersion": said}).draft.model == booked


def test_claudes_thinking_goes_with_the_first_call_after_it() -> None:
    """Word for word, for Claude alone."""
    made = reading(
        ClaudeReading,
        {"type": "content_block_start", "index": 0, "content_block": {"type": "redacted_thinking", "data": "x"}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "thinking"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "signature_delta", "signature": "sig"}},
        *({"type": "content_block_start", "index": n, "content_block": {"type": "tool_use", "id": f"t{n}", "name": "now"}} for n in (2, 3)),
        *({"type": "content_block_stop", "index": n} for n in (2, 3)),
    ).draft

    assert orjson.loads(unsealed("p", made.calls[0].signature)) == [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "Hm", "signature": "sig"},
    ]
    assert (made.calls[1].signature, unsealed("q", made.calls[0].signature)) == (b"", b"")


def test_what_is_sealed_is_opened_by_the_same_provider_alone() -> None:
    """And nothing is nothing."""
    assert unsealed("a", sealed("a", b"x:y")) == b"x:y"
    assert unsealed("ab", sealed("a", b"x")) == unsealed("a", sealed("ab", b"x")) == sealed("a", b"") == b""


@pytest.mark.parametrize(("arguments", "found"), [('{"a":1}', {"a": 1}), ("[1]", {"unreadable": "[1]"}), ("{", {"unreadable": "{"})])
def test_arguments_that_are_no_object_stay_readable(arguments: str, found: dict[str, Any]) -> None:
    """For the formats that know objects only."""
    assert arguments_object(ToolCall("c", "n", arguments)) == found


@pytest.mark.parametrize(
    ("headers", "wait_ms"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2000),
        ({"retry-after": "0.5"}, 500),
        ({"retry-after-ms": "70", "retry-after": "9"}, 70),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "inf"}, None),
    ],
)
def test_the_wait_a_provider_asks_for_is_read_in_every_form(headers: dict[str, str], wait_ms: int | None) -> None:
    """What is none is no wait."""
    assert retry_after_ms(headers) == wait_ms


@pytest.mark.parametrize(
    ("total", "output", "final"), [({}, None, False), ({"totalTokenCount": 5}, 0, True), ({"totalTokenCount": 9}, 4, True)]
)
def test_a_count_that_gemini_leaves_out_is_what_its_sum_says(total: dict[str, int], output: int | None, final: bool) -> None:
    """Zeros are left out there; without a sum nobody has said that a text cost nothing."""
    said = {"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}
    made = reading(GeminiReading, {"candidates": [said], "usageMetadata": {"promptTokenCount": 5, **total}}).draft

    assert (made.output_tokens, made.usage_is_final) == (output, final)


@pytest.mark.parametrize(
    ("events", "waited_s", "bound", "output_tokens"),
    [
        ([], 0.0, 500, 1),
        ([], 2.0, 500, 200),
        ([], 20.0, 500, 500),
        ([{"candidates": [{"content": {"parts": [{"text": "Yes"}]}}]}], 0.0, 500, 1),
        ([{"candidates": [{"content": {"parts": [{"text": "Yes"}]}}]}], 1.0, 500, 101),
        ([{"candidates": [{"finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 7}}], 1.0, 500, 7),
        ([{"error": {"code": 503, "status": "UNAVAILABLE"}}], 1.0, 500, 0),
    ],
)
def test_what_gemini_had_written_of_a_call_is_told_by_the_time(events: list[Any], waited_s: float, bound: int, output_tokens: int) -> None:
    """From what came last, up to the bound; nothing where the answer was over, or was refused before it began."""
    now = 100.0
    draft = Draft(lambda text: None, sent=True)
    made = GeminiReading("gemini", draft, lambda: now)
    for event in events:
        with contextlib.suppress(ModelOverloaded):
            made.read(orjson.dumps(event))
    made.flush()
    now += waited_s
    made.left(bound)

    assert draft.usage(Prompt("t", "", (), "?", (), 10))[0].output_tokens == output_tokens
