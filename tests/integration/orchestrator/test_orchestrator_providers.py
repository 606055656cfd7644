"""One whole answer by each provider through the real service: what is shown, what is booked, and what the next provider does."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.script import Behaviour
from services.chassis.errors import AnswerCancelled
from services.chassis.wire import usage_value
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import PRICES, Reply, World, until, world

QUESTION = "Which port does the gateway listen on?"
TEXT = "The gateway listens on port 8080 [1]. Holds live for ten minutes [2]."
SPOKEN: dict[str, tuple[dict[str, str], str, str]] = {
    "anthropic": ({"ANTHROPIC_API_KEY": "k"}, "anthropic", "claude-haiku-5-5"),
    "openai_chat": ({"OPENAI_API_KEY": "k"}, "openai", "gpt-6-luna"),
    "openai_responses": ({"OPENAI_API_KEY": "k", "TAILRACE_ORCHESTRATOR_OPENAI_API": "responses"}, "openai", "gpt-6-luna"),
    "gemini": ({"GEMINI_API_KEY": "k"}, "gemini", "gemini-3.8-flash"),
}
"""Settings, provider and model, by the format that is spoken."""


@pytest.fixture(params=SPOKEN)
async def spoken(request: pytest.FixtureRequest, tmp_path: Path, valkey: Valkey) -> AsyncIterator[tuple[World, str]]:
    """An orchestrator with one provider, and the format it speaks to it."""
    async with world(tmp_path, valkey.url, with_key=False, **SPOKEN[request.param][0]) as running:
        yield running, request.param


async def test_an_answer_is_streamed_cited_and_booked_as_the_provider_bills_it(spoken: tuple[World, str]) -> None:
    """Usage by kind, cost by the model's own price, provider and model by name."""
    running, form = spoken
    _, provider, model = SPOKEN[form]
    running.behave(text=TEXT, cached_tokens=11)
    reply = await running.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    operation = await running.booked(reply.answer_id)
    record = (await running.records())[-1]
    usage = usage_value(operation.usage)

    assert (record.format, reply.text, reply.done.verdict) == (form, TEXT, "passed")
    assert [event.citation.number for event in reply.events if event.HasField("citation")] == [1, 2]
    assert (reply.done.provider, reply.done.model, reply.done.estimated) == (provider, model, False)
    assert (usage.prompt_tokens, usage.output_tokens, usage.cache_read_tokens) == (record.input_tokens, record.output_tokens, 11)
    assert operation.cost_nanousd == PRICES[model].cost_nanousd(usage) > 0
    assert not running.ledger.open_holds


async def test_thoughts_are_shown_to_those_who_ask_for_them(spoken: tuple[World, str]) -> None:
    """Before the text, as events of their own and no part of it; they are billed in either case."""
    running, _ = spoken
    running.behave(reasoning="Let me see. Ports have numbers.", text=TEXT)
    shown = await running.ask(QUESTION, cache=pb.CACHE_MODE_OFF, reasoning=True)
    quiet = await running.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    kinds = [event.WhichOneof("event") for event in shown.events]
    thoughts = "".join(event.reasoning.text for event in shown.events)

    assert thoughts == "Let me see. Ports have numbers."
    assert shown.text == quiet.text == TEXT
    assert kinds.index("reasoning") < kinds.index("delta")
    assert not any(event.HasField("reasoning") for event in quiet.events)


async def test_a_cancel_closes_the_providers_socket_and_books_what_came(spoken: tuple[World, str]) -> None:
    """Whichever vendor is at the other end."""
    running, _ = spoken
    running.behave(tokens=1000, tokens_per_s=100)
    reply = Reply()
    asking = asyncio.create_task(running.ask(QUESTION, into=reply, cache=pb.CACHE_MODE_OFF))
    await until(lambda: len(reply.text) > 100)
    await running.cancel(reply.answer_id)
    with pytest.raises(AnswerCancelled):
        await asking
    operation = await running.booked(reply.answer_id)
    record = (await running.records())[-1]

    assert record.state == "client_closed"
    assert 0 < usage_value(operation.usage).output_tokens <= record.output_tokens
    assert operation.estimated


async def test_the_next_provider_answers_when_one_does_not_take_our_key(tmp_path: Path, valkey: Valkey) -> None:
    """In the order of the tier; each call is an attempt with the provider that it went to."""
    keys = {"OPENAI_API_KEY": "bad", "GEMINI_API_KEY": "good"}
    async with world(tmp_path, valkey.url, with_key=False, **keys) as running:
        running.behave(text=TEXT)
        running.provider.rules.append((b"\nbad", Behaviour(fault="status", status=401)))
        reply = await running.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
        operation = await running.booked(reply.answer_id)

    assert reply.text == TEXT
    assert [(attempt.provider, attempt.error_reason) for attempt in operation.attempts] == [
        ("openai", "MODEL_MISCONFIGURED"),
        ("gemini", ""),
    ]
