"""`make bench-adapters`: what a paced token costs each adapter in CPU, beside Claude's in the same run. Only adapters run in this process.

The figures hold the reading of the socket, of the events and the filling of the draft; not gRPC, the log or the gateway.
"""

import asyncio
import statistics
import sys
import time
from typing import Any

import uvloop

from bench.provider import Simulator, simulator
from bench.script import Behaviour
from services.orchestrator.claude_model import ClaudeModel
from services.orchestrator.domain import Candidate, Draft, Message, Prompt
from services.orchestrator.gemini_model import GeminiModel
from services.orchestrator.openai_chat_model import OpenAiChatModel
from services.orchestrator.openai_responses_model import OpenAiResponsesModel

STREAMS, TOKENS, TOKENS_PER_S, ROUNDS = 20, 150, 100.0, 5
ADAPTERS: dict[str, tuple[type[Any], str]] = {
    "anthropic": (ClaudeModel, ""),
    "openai_responses": (OpenAiResponsesModel, "/v1"),
    "openai_chat": (OpenAiChatModel, "/v1"),
    "gemini": (GeminiModel, ""),
}
ASKED = Prompt("t", "Answer.", (Message("user", "Which port?"),), "Which port?", (), 500)


async def cpu_us_per_token(provider: Simulator, name: str) -> float:
    """One round of an adapter: microseconds of this process for each token."""
    made, path = ADAPTERS[name]
    adapter = made(("key",), provider.url + path, connect_s=5, first_token_s=30, stall_s=30)
    drafts = [Draft(lambda text: None) for _ in range(STREAMS)]
    try:
        await adapter.generate(ASKED, Candidate(name, "gpt-6-luna", 1, 1), 1, Draft(lambda text: None))
        began = time.process_time()
        await asyncio.gather(*(adapter.generate(ASKED, Candidate(name, "gpt-6-luna", 1, 1), TOKENS, draft) for draft in drafts))
        spent_s = time.process_time() - began
    finally:
        await adapter.aclose()
    return spent_s * 1e6 / sum(draft.deltas for draft in drafts)


async def measure() -> dict[str, list[float]]:
    """Every round of every adapter, in turns, so that the machine's moods hit all alike."""
    found: dict[str, list[float]] = {name: [] for name in ADAPTERS}
    async with simulator() as provider:
        await provider.behave(Behaviour(tokens=TOKENS, tokens_per_s=TOKENS_PER_S))
        for _ in range(ROUNDS):
            for name, rounds in found.items():
                rounds.append(await cpu_us_per_token(provider, name))
    return found


def main() -> None:
    found = uvloop.run(measure())
    claude = statistics.median(found["anthropic"])
    sys.stdout.write(f"{STREAMS} streams of {TOKENS} tokens at {TOKENS_PER_S:g}/s, median of {ROUNDS} rounds\n")
    for name, rounds in found.items():
        middle = statistics.median(rounds)
        sys.stdout.write(
            f"{name:18} {middle:6.1f} us a token   {middle / claude:5.2f} x Claude's   ({min(rounds):.1f}-{max(rounds):.1f})\n"
        )


if __name__ == "__main__":
    main()
