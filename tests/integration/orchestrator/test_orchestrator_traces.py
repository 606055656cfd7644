"""The trace of an answer, and what is never in one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.local.stores import Valkey
from tests.fakes.orchestrator_world import World, world


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    async with world(tmp_path, valkey.url) as running:
        yield running


async def test_every_step_has_a_span_and_all_hang_on_the_call(claude: World) -> None:
    """One trace; the steps are children of the server span, the provider's call of `generate`, the other services' calls of their steps."""
    reply = await claude.ask("Which port does the gateway listen on?")
    trace_id = int(reply.done.trace_id, 16)
    spans = {span.name: span for span in claude.spans.get_finished_spans() if span.context.trace_id == trace_id}
    parents = {span.context.span_id: span.name for span in spans.values()}
    tree = {name: parents.get(span.parent.span_id, "") if span.parent else "" for name, span in spans.items()}
    answer = "tailrace.orchestrator.v1.OrchestratorService/Answer"

    for step in ("recall", "passages", "compose", "hold", "generate", "validate", "remember", "record"):
        assert tree[f"orchestrator.{step}"] == answer, step
    assert tree["chat claude-haiku-5-5"] == "orchestrator.generate"
    assert tree["tailrace.ledger.v1.LedgerService/Reserve"] == "orchestrator.hold"
    assert tree["tailrace.ledger.v1.LedgerService/AppendTurn"] == "orchestrator.record"
    assert tree["tailrace.retrieval.v1.RetrievalService/Recall"] == "orchestrator.recall"
    assert spans["chat claude-haiku-5-5"].attributes["gen_ai.usage.output_tokens"] == 20


async def test_no_text_is_in_spans_logs_or_the_spool(claude: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Canaries in question, passage and answer are found in none of them."""
    claude.behave(text="canary-answer says [1] so.")
    claude.retrieval.passages[0].text = "canary-passage"
    claude.ledger.recording = False
    await claude.ask("Which canary-question port does the gateway listen on?")
    spans = " ".join(span.to_json() for span in claude.spans.get_finished_spans())
    spool = b"".join(path.read_bytes() for path in claude.spool_path.parent.iterdir())
    logged = capsys.readouterr()

    assert "orchestrator.record" in spans
    assert b"claude-haiku-5-5" in spool
    for place in (spans, spool.decode("latin-1"), logged.out, logged.err):
        assert "canary" not in place
        assert "test-key" not in place
