"""The trace of an answer, and what is never in one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from services.local.stores import Valkey
from services.orchestrator import call_telemetry
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


async def test_the_span_of_a_providers_call_says_what_the_conventions_ask_for(claude: World) -> None:
    """Who was asked for what, where, what it calls its answer, and every kind of token."""
    claude.behave(reasoning="Ports have numbers.", text="It is 8080 [1].", cached_tokens=5, cache_write_tokens=3)
    reply = await claude.ask("Which port does the gateway listen on?")
    (record,) = await claude.records()
    trace_id = int(reply.done.trace_id, 16)
    (call,) = [
        span for span in claude.spans.get_finished_spans() if span.context.trace_id == trace_id and span.name == "chat claude-haiku-5-5"
    ]
    told = {
        name: call.attributes[name] for name in call.attributes if name != "gen_ai.response.time_to_first_chunk" and "tailrace" not in name
    }

    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "claude-haiku-5-5",
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.stream": True,
        "gen_ai.conversation.id": reply.events[0].accepted.session_id,
        "gen_ai.response.id": record.request_id.replace("req_", "msg_"),
        "gen_ai.response.model": "claude-haiku-5-5",
        "gen_ai.response.finish_reasons": ("end_turn",),
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 5,
        "gen_ai.usage.cache_creation.input_tokens": 3,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "server.address": "127.0.0.1",
    }
    assert call.attributes["gen_ai.response.time_to_first_chunk"] > 0


async def test_calls_are_counted_by_duration_and_tokens(claude: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed by its reason, one that answered with its tokens."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("test")
    monkeypatch.setattr(call_telemetry, "DURATION", meter.create_histogram("duration"))
    monkeypatch.setattr(call_telemetry, "TOKENS", meter.create_histogram("tokens"))
    claude.behave(fault="status", status=500, fail_first=1)
    await claude.ask("Which port does the gateway listen on?")
    failed, answered = await claude.records()
    data = reader.get_metrics_data()
    assert data is not None
    points = {
        metric.name: [(dict(point.attributes), point.count, point.sum) for point in metric.data.data_points]
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
    }
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "anthropic", "gen_ai.request.model": "claude-haiku-5-5"}

    assert [(named, count) for named, count, _ in points["duration"]] == [({**common, "error.type": "MODEL_FAILED"}, 1), (common, 1)]
    assert points["tokens"] == [
        ({**common, "gen_ai.token.type": "input"}, 2, answered.input_tokens),
        ({**common, "gen_ai.token.type": "output"}, 2, answered.output_tokens),
    ]
    assert failed.state == "refused"


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
