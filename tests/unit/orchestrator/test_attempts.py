"""What is known of a provider call while it runs: marks of what to book, the word to the breaker, the time of the first output."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from services.orchestrator.claude_model import ClaudeReading
from services.orchestrator.domain import Candidate, Draft, OperationRecord, Prompt
from services.orchestrator.health import FAILURES_IN_A_ROW, Health
from tests.fakes.scripted_model import CANDIDATE, ScriptedModel, Told, _Yes, answered, question

THOUGHT = "The gateway's port is in the guide. "


class Marking(_Yes):
    """Keeps what was marked, as it would be booked."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[OperationRecord] = []

    def mark(self, record: OperationRecord) -> None:
        self.marks.append(record)

    @property
    def output_tokens(self) -> list[int]:
        return [record.usage.output_tokens for record in self.marks]


class Producing(ScriptedModel):
    """Produces something before its text, and looks at the world when it has."""

    def __init__(self, produce: Callable[[Draft], None], look: Callable[[], Any] = lambda: None) -> None:
        super().__init__(["Port 8080 [1]."])
        self._produce, self._look = produce, look
        self.seen: Any = None

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent = True
        self._produce(draft)
        self.seen = self._look()
        await super().generate(prompt, candidate, output_tokens_max, draft)


def thinks(draft: Draft) -> None:
    for _ in range(100):
        draft.reason(THOUGHT)


def calls(draft: Draft) -> None:
    """Long arguments that never come to an end."""
    reading = ClaudeReading("p", draft)
    begin = {"type": "content_block_start", "content_block": {"type": "tool_use", "id": "c1", "name": "write"}}
    more = {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": THOUGHT}}
    for event in (begin, *[more] * 100):
        reading.read(orjson.dumps(event))
        reading.flush()


async def told_of(model: ScriptedModel, world: _Yes, health: Health | None = None, **fields: Any) -> Told:
    return await answered(model, asked=question(**fields), world=world, health=health)


@pytest.mark.parametrize("listened", [True, False])
@pytest.mark.parametrize("produce", [thinks, calls])
async def test_what_is_no_text_is_marked_while_it_comes(produce: Callable[[Draft], None], listened: bool) -> None:
    """Reasoning and arguments are billed: whoever dies in the middle has them booked, at most a mark too few, as an estimate."""
    world = Marking()
    model = Producing(produce, lambda: (list(world.output_tokens), world.marks[-1].estimated))
    await told_of(model, world, reasoning=listened)
    marked, estimated = model.seen

    produced = 100 * len(THOUGHT) // 4
    assert estimated
    assert produced - 64 <= marked[-1] <= produced + 64
    assert marked == sorted(marked)
    assert len(marked) < 30


@pytest.mark.parametrize("produce", [lambda draft: draft.reason("Hm."), calls])
async def test_model_that_was_out_is_taken_back_at_its_first_output(produce: Callable[[Draft], None]) -> None:
    """A probe that thinks for a minute is proof at its first thought."""
    health = Health(lambda: 0.0, lambda: 0.0)
    for _ in range(FAILURES_IN_A_ROW):
        health.failed(CANDIDATE)
    model = Producing(produce, lambda: health.state(CANDIDATE))
    await told_of(model, Marking(), health)

    assert model.seen == "trial"
    assert health.state(CANDIDATE) == "closed"


async def test_call_that_only_calls_has_a_time_of_its_first_output() -> None:
    """It is no call that said nothing."""

    class Calling(ScriptedModel):
        async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
            await asyncio.sleep(0.001)
            calls(draft)
            draft.sent, draft.finish_reason = True, "refusal"

    world = Marking()
    await told_of(Calling([]), world)

    assert world.records[0].attempts[0].first_token_ms >= 1
