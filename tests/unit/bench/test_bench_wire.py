"""The benchmark's own client: what it stamps, and what it says of an answer that must not be counted."""

from typing import Any

import pytest

from bench.provider import Simulator
from bench.script import Behaviour
from bench.wire import VENDORS, BadAnswer, Line, ask_provider

SAID: list[Any] = [{"role": "user", "content": "Which port?"}]
BODIES: dict[str, dict[str, Any]] = {
    "anthropic": {"max_tokens": 10, "messages": SAID, "stream": True},
    "openai_responses": {"input": SAID, "stream": True},
    "openai_chat": {"messages": SAID, "stream": True},
    "gemini": {"contents": [{"role": "user", "parts": [{"text": "Which port?"}]}]},
}


@pytest.mark.parametrize("vendor", VENDORS)
async def test_the_first_token_is_not_the_head_of_the_answer(provider: Simulator, vendor: str) -> None:
    """What a format says before its first word comes at once, and would make a provider faster than it is."""
    await provider.behave(Behaviour(ttft_ms=100, tokens=3))
    way = VENDORS[vendor]
    body = {**BODIES[vendor], **({"model": way.model} if vendor != "gemini" else {})}
    line = await Line.open(int(provider.url.rpartition(":")[2]))
    try:
        timing = await line.stream(ask_provider(way, body))
    finally:
        await line.aclose()

    assert 100 <= timing.first_ms <= timing.done_ms


async def test_a_refusal_is_told_with_its_words(provider: Simulator) -> None:
    """They come behind the head, and only they say why."""
    await provider.behave(Behaviour(fault="status", status=529))
    way = VENDORS["anthropic"]
    line = await Line.open(int(provider.url.rpartition(":")[2]))
    try:
        with pytest.raises(BadAnswer) as refused:
            await line.stream(ask_provider(way, {**BODIES["anthropic"], "model": way.model}))
    finally:
        await line.aclose()

    assert "529" in str(refused.value)
    assert "overloaded_error" in str(refused.value)
