"""One answer is one trace: a single connected tree over all services, with a span for each step, and none of anybody's words."""

from typing import Any

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from bench.script import Behaviour
from tests.suite import Collector, Suite, ask, ingest, until

STEPS = ("recall", "passages", "compose", "hold", "generate", "validate")


async def tree_of(collector: Collector, trace_id: str, leaf: str = "") -> list[tuple[str, Any]]:
    """All spans of a trace, once its root and a span whose name ends with `leaf` are there: each service sends every half second."""

    async def probe() -> list[tuple[str, Any]]:
        spans = collector.trace(trace_id)
        known = {span.span_id for _, span in spans}
        whole = any(span.name.endswith("/v1/answers") for _, span in spans) and all(
            span.parent_span_id in known for _, span in spans if span.parent_span_id
        )
        whole = whole and any(span.name.endswith(leaf) for _, span in spans)
        return spans if whole and len({service for service, _ in spans}) == 4 else []

    return await until(probe)


async def test_an_answer_is_one_connected_tree_with_a_span_for_each_step(suite: Suite, client: httpx.AsyncClient) -> None:
    """Every span but one has its parent in the trace; the steps hang under the orchestrator's call, the calls under their steps."""
    assert suite.collector is not None
    answer = await ask(client, "Who opens the heron gate with the bronze wheel?", cache="off")
    spans = await tree_of(suite.collector, answer.done["trace_id"], "/Reserve")
    by_id = {span.span_id: (service, span) for service, span in spans}
    roots = [span.name for _, span in spans if not span.parent_span_id]
    parents = {span.name: by_id[span.parent_span_id][1].name for _, span in spans if span.parent_span_id}

    assert len(roots) == 1
    assert roots[0].endswith("/v1/answers")
    assert {service for service, _ in spans} == {"tailrace-gateway", "tailrace-orchestrator", "tailrace-retrieval", "tailrace-ledger"}
    for step in STEPS:
        assert f"orchestrator.{step}" in parents, sorted(parents)
    chat = next(name for name in parents if name.startswith("chat "))
    assert chat == "chat claude-haiku-5-5"
    assert parents[chat] == "orchestrator.generate"
    reserve = next(name for name in parents if name.endswith("/Reserve"))
    assert parents[reserve] == "orchestrator.hold"
    assert [span.name for _, span in spans if span.status.code == Status.STATUS_CODE_ERROR] == []


async def test_the_callers_own_trace_goes_on(suite: Suite, client: httpx.AsyncClient) -> None:
    """A traceparent header makes our root a child of the caller's span."""
    assert suite.collector is not None
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"question": "What drives the generator of the village?", "stream": False, "cache": "off"}
    response = await client.post("/v1/answers", json=body, headers={"traceparent": f"00-{trace_id}-{span_id}-01"})

    async def probe() -> list[Any]:
        assert suite.collector is not None
        return [span for _, span in suite.collector.trace(trace_id) if span.parent_span_id.hex() == span_id]

    assert response.headers["x-trace-id"] == trace_id
    assert len(await until(probe)) == 1


async def test_nobodys_words_are_in_spans_or_logs(suite: Suite) -> None:
    """Marks hidden in a document, a question, an answer, a session and a key come out in none of what operators read."""
    assert suite.collector is not None
    marks = {place: f"canary-{place}-6f1d" for place in ("document", "question", "answer", "failed")}
    await suite.provider.reset()
    await suite.provider.behave(Behaviour(text=f"The tale says {marks['answer']} [1]."))
    await suite.provider.behave(Behaviour(fault="malformed", fault_at=1), contains=marks["failed"])
    async with suite.client("mark", "marked") as client:
        await ingest(client, {"Tale": f"The tale of {marks['document']} is told at night."})
        answers = [
            await ask(client, f"What tale is told of {marks['question']}?"),
            await ask(client, f"What tale is told of {marks['question']}?"),
            await ask(client, f"Which tale is broken by {marks['failed']}?"),
        ]
        await client.post("/v1/answers", json={"question": f"{marks['question']} " * 3000})
        await client.post("/v1/search", json={"query": marks["question"], "limit": -1})
        token = client.headers["authorization"]
    for answer in answers:
        await tree_of(suite.collector, answer.data("accepted")[0]["trace_id"])

    assert marks["answer"] in answers[0].text
    said = {name: suite.log_of(name).read_text() for name in suite.processes}
    said["spans"] = "\n".join(str(span) for _, span in suite.collector.spans)
    hidden = [
        *marks.values(),
        token.removeprefix("Bearer "),
        suite.environment["TAILRACE_INTERNAL_KEY"],
        suite.environment["ANTHROPIC_API_KEY"],
    ]
    for place, text in said.items():
        assert [mark for mark in hidden if mark in text] == [], place
