"""However a provider's bytes arrive, and whatever is wrong with them, the draft is the same or the failure one of ours."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import script
from bench.dialect import Counts, Dialect
from bench.dialect_anthropic import Anthropic
from bench.dialect_gemini import Gemini
from bench.dialect_openai import ChatCompletions, Responses
from bench.script import Behaviour, Record, ScriptedCall
from services.chassis.errors import DomainError
from services.orchestrator.claude_model import ClaudeReading
from services.orchestrator.domain import Draft
from services.orchestrator.gemini_model import GeminiReading
from services.orchestrator.model_stream import Incoming, Reading, bounded_silence, follow
from services.orchestrator.openai_chat_model import ChatReading
from services.orchestrator.openai_responses_model import ResponsesReading

ANSWER = Behaviour(
    reasoning="Was nun? Überlegen – 考える 🙂.",
    text='Er sagte: "Grüße\n\ndata: [DONE]\r\n" 🙂 [1].',
    calls=(ScriptedCall(name="find", arguments='{"words": "a\\nb 🙂 \\u00fc", "n": [1, 2]}'), ScriptedCall(name="now", arguments="{}")),
)
SPEAKERS: dict[str, tuple[Dialect, type[Reading]]] = {
    "anthropic": (Anthropic(), ClaudeReading),
    "openai_chat": (ChatCompletions(), ChatReading),
    "openai_responses": (Responses(), ResponsesReading),
    "gemini": (Gemini(), GeminiReading),
}


def body(dialect: Dialect) -> bytes:
    """The whole stream of `ANSWER`, without the coding that HTTP puts around it."""
    pieces = script.pieces_of(ANSWER, b"")
    record = Record(
        number=1,
        request_id="req_1",
        model="m",
        format=dialect.name,
        stream=True,
        max_tokens=1000,
        fault="none",
        mark="",
        received_at=0.0,
        input_tokens=50,
        call_block=2,
    )
    request = {"stream_options": {"include_usage": True}}
    coded = dialect.opening(record, Counts(50, 4, 3, 0, 0), request)
    coded += b"".join(dialect.piece(record, piece) for piece in pieces)
    coded += dialect.closing(record, "calls", pieces, Counts(50, 4, 3, len(pieces), 5), request)
    plain = b""
    while coded:
        size, _, rest = coded.partition(b"\r\n")
        plain, coded = plain + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return plain


def read(reading: type[Reading], chunks: list[bytes]) -> tuple[Draft, list[tuple[str, str]], DomainError | None]:
    """The draft, what was heard of it with neighbours joined, and how it failed."""
    heard: list[tuple[str, str]] = []

    def hear(kind: str, text: str) -> None:
        if heard and heard[-1][0] == kind:
            text = heard.pop()[1] + text
        heard.append((kind, text))

    draft = Draft(lambda text: hear("text", text), on_reasoning=lambda text: hear("thought", text), sent=True)

    async def arriving() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def run() -> DomainError | None:
        try:
            async with bounded_silence("p", 30, 30) as silence:
                await follow(Incoming(arriving(), None), reading("p", draft), silence)
        except DomainError as error:
            return error
        return None

    return draft, heard, asyncio.run(run())


def facts(draft: Draft) -> tuple[Any, ...]:
    """Everything that is told and booked of a draft, but for how its text was cut."""
    counts = (draft.input_tokens, draft.output_tokens, draft.cache_read_tokens, draft.cache_write_tokens, draft.usage_is_final)
    return (
        draft.text,
        draft.deltas,
        draft.calls,
        draft.reasoned,
        draft.called,
        draft.model,
        draft.request_id,
        draft.finish_reason,
        *counts,
    )


@pytest.mark.parametrize("name", SPEAKERS)
@given(cuts=st.lists(st.integers(0, 8000), max_size=40))
def test_any_cutting_of_the_bytes_gives_the_same_draft(name: str, cuts: list[int]) -> None:
    """Inside a character, a line, an event, a number."""
    dialect, reading = SPEAKERS[name]
    whole = body(dialect)
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    expected, heard, failure = read(reading, [whole])
    cut, heard_cut, failure_cut = read(reading, [whole[left:right] for left, right in itertools.pairwise(places)])

    assert failure is None and failure_cut is None
    assert expected.finish_reason == "tool_use" and len(expected.calls) == 2 and expected.text == ANSWER.text
    assert facts(cut) == facts(expected)
    assert heard_cut == heard


@pytest.mark.parametrize("name", SPEAKERS)
@given(at=st.integers(0, 8000), put=st.binary(max_size=3), take=st.integers(0, 200))
def test_damaged_bytes_are_a_failure_of_ours_or_none(name: str, at: int, put: bytes, take: int) -> None:
    """No damage gets past the adapter as an error of a parser, and what was heard stays what the draft says."""
    dialect, reading = SPEAKERS[name]
    whole = body(dialect)
    at = min(at, len(whole))
    draft, heard, _ = read(reading, [whole[:at] + put + whole[at + take :]])

    assert "".join(text for kind, text in heard if kind == "text") == draft.text


@pytest.mark.parametrize("name", SPEAKERS)
@pytest.mark.parametrize("data", [b'{"a":' + b"[" * 200_000, b"[]", b"7", b"\xff", b'{"candidates":3,"choices":3,"type":3}'])
def test_what_is_no_event_is_malformed(name: str, data: bytes) -> None:
    """Nested without end, of another form, no text at all."""
    _, _, failure = read(SPEAKERS[name][1], [b"data: " + data + b"\n\n"])

    assert failure is not None
    assert failure.metadata["cause"] == "malformed"
