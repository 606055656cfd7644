"""What a provider keeps of prompts and reads again, through the real service: where a prompt is marked, and what the books make of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.script import Behaviour, ScriptedCall
from services.chassis.wire import usage_value
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import PRICES, World, world

PRICE = PRICES["claude-haiku-5-5"]
KEEPS = Behaviour(text="Sixty-six.", keeps_above_tokens=300)


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator whose provider keeps beginnings of 300 tokens and more, which the shipped instructions alone have not."""
    async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_REWRITES="rule", TAILRACE_ORCHESTRATOR_TITLES="rule") as running:
        running.provider.default = KEEPS
        yield running


async def test_every_round_of_tools_reads_what_the_one_before_it_wrote(claude: World) -> None:
    """However many calls a round has; the books price reads and writes as what they are."""
    rounds = 4
    for number in range(rounds):
        calls = tuple(ScriptedCall(name="calculator", arguments=f'{{"expression": "{n}{number}*11"}}') for n in range(1, 13))
        mark = b'"input":{"expression":"1%d*11"}' % (number - 1) if number else b"times"
        claude.provider.rules.append((mark, Behaviour(calls=calls, keeps_above_tokens=300)))
    claude.provider.rules.append((b'"input":{"expression":"1%d*11"}' % (rounds - 1), KEEPS))
    reply = await claude.ask("What is six times eleven?", server_tools=["calculator"], cache=pb.CACHE_MODE_OFF)
    operation = await claude.booked(reply.answer_id)
    usages = [usage_value(attempt.usage) for attempt in operation.attempts]

    assert len(usages) == rounds + 1
    assert usages[0].cache_read_tokens == 0 < usages[0].cache_write_tokens
    for before, usage, attempt in zip(usages, usages[1:], operation.attempts[1:], strict=False):
        assert usage.cache_read_tokens == before.cache_read_tokens + before.cache_write_tokens
        assert usage.input_tokens <= 3
        assert attempt.cost_nanousd == PRICE.cost_nanousd(usage)
    plain = sum(usage.prompt_tokens * PRICE.input + usage.output_tokens * PRICE.output for usage in usages) // 1_000_000
    assert operation.cost_nanousd < 0.6 * plain


async def test_a_question_without_tools_writes_nothing_that_nobody_will_read(claude: World) -> None:
    """Its passages come no second time."""
    reply = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_OFF)
    usage = usage_value((await claude.booked(reply.answer_id)).usage)

    assert (usage.cache_read_tokens, usage.cache_write_tokens) == (0, 0)


async def test_the_next_turn_reads_the_history_that_the_one_before_it_wrote(claude: World) -> None:
    """Instructions and earlier turns stand before everything that changes with the question."""
    claude.provider.default = Behaviour(text="It says so. " * 60, keeps_above_tokens=300)
    for question in ("Which port does the gateway listen on?", "And why does it?", "And how does it?"):
        reply = await claude.ask(question, session_id="s1", cache=pb.CACHE_MODE_OFF)
        usage = usage_value((await claude.booked(reply.answer_id)).usage)

    assert usage.cache_read_tokens > 300
    assert usage.cache_write_tokens > 0
