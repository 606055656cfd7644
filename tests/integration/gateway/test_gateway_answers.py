"""Asking over HTTP: the bytes a browser sees, and what happens when either side leaves."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from services.chassis.errors import AnswerLogGone, ModelOverloaded, NotFound, Unavailable
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tests.integration.gateway.backends import ANSWER, accepted, delta, done, forever
from tests.integration.gateway.conftest import Front, problem_of, until


def blocks_of(body: str) -> list[dict[str, Any]]:
    """The events of a stream, read by the letter; comments are left out, and a block without data fails."""
    events = []
    assert body.endswith("\n\n")
    for block in body.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        if all(line.startswith(":") for line in lines):
            continue
        fields = dict(line.split(": ", 1) for line in lines)
        assert "data" in fields, block
        events.append({**fields, "data": json.loads(fields["data"])})
    return events


async def test_a_question_streams_events_with_ids_and_one_end(front: Front, client: httpx.AsyncClient) -> None:
    """The events arrive in order under their sequence numbers; int64 are strings; `done` is last."""
    front.behind.orchestrator.script = [accepted(), delta(2, "Hel"), delta(3, "lo\n\r\0 ü\u2028"), done(4)]

    response = await client.post("/v1/answers", json={"question": "Why?"})
    events = blocks_of(response.text)

    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert [event["event"] for event in events] == ["accepted", "delta", "delta", "done"]
    assert [event["id"] for event in events] == ["1", "2", "3", "4"]
    assert events[0]["retry"] == "1000"
    assert "".join(event["data"]["text"] for event in events[1:3]) == "Hello\n\r\0 ü\u2028"
    assert events[3]["data"]["cost_nanousd"] == "1500000000"
    assert events[3]["data"]["usage"]["input_tokens"] == str(2**60)


async def test_the_request_reaches_the_orchestrator_with_the_verified_principal(front: Front, client: httpx.AsyncClient) -> None:
    """Tenant and user come from the token; the idempotency key and every field are passed on."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    body = {
        "question": "Why?",
        "session_id": "s-1",
        "model": "m",
        "tier": "fast",
        "max_output_tokens": 10,
        "collection": "c",
        "cache": "off",
        "output_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
        "tools": [{"name": "t", "description": "d", "input_schema": {"type": "object"}}],
    }

    await client.post("/v1/answers", json=body, headers={"idempotency-key": "key-1"})
    request, principal = front.behind.seen.last("Answer")

    assert (principal.tenant, principal.user, principal.roles) == ("acme", "ada", frozenset({"user"}))
    assert (request.question, request.session_id, request.model, request.tier) == ("Why?", "s-1", "m", "fast")
    assert (request.max_output_tokens, request.collection, request.cache) == (10, "c", orchestrator.CACHE_MODE_OFF)
    assert (request.idempotency_key, request.cancel_on_disconnect) == ("key-1", False)
    assert request.output_schema["properties"]["a"]["type"] == "integer"
    assert request.tools[0].input_schema["type"] == "object"


async def test_the_first_event_leaves_before_the_second_exists(front: Front, client: httpx.AsyncClient) -> None:
    """Nothing on the way buffers: the first bytes are there while the orchestrator still waits."""
    gate = asyncio.Event()
    front.behind.orchestrator.script = [accepted(), gate.wait, delta(2, "x"), done(3)]

    async with client.stream("POST", "/v1/answers", json={"question": "Why?"}) as response:
        chunks = response.aiter_text()
        first = await anext(chunks)
        gate.set()
        rest = "".join([chunk async for chunk in chunks])

    assert "event: accepted" in first
    assert "event: delta" not in first
    assert rest.count("event: done") == 1


async def test_silence_is_filled_with_comments(front: Front, client: httpx.AsyncClient) -> None:
    """A heartbeat comment keeps the stream, and changes nothing in the events."""
    gate = asyncio.Event()
    front.behind.orchestrator.script = [accepted(), gate.wait, done(2)]

    body = ""
    async with client.stream("POST", "/v1/answers", json={"question": "Why?"}) as response:
        async for chunk in response.aiter_text():
            body += chunk
            if body.count(": heartbeat\n\n") >= 2:
                gate.set()

    assert [event["event"] for event in blocks_of(body)] == ["accepted", "done"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelOverloaded("busy", provider="anthropic", retry_after_ms=2500), 503), (NotFound("none", kind="session"), 404)],
)
async def test_an_error_before_the_first_event_is_a_problem_document(
    front: Front, client: httpx.AsyncClient, error: Any, status: int
) -> None:
    """Nothing was sent yet, so the status is still ours to say."""
    front.behind.orchestrator.script = [error]

    response = await client.post("/v1/answers", json={"question": "Why?"})

    problem_of(response, status, error.reason)
    assert response.headers.get("retry-after") == ("3" if status == 503 else None)


async def test_an_error_after_the_first_event_is_one_error_event(front: Front, client: httpx.AsyncClient) -> None:
    """The same problem document, as the data of the last event."""
    front.behind.orchestrator.script = [accepted(), delta(2, "x"), ModelOverloaded("busy", provider="anthropic")]

    response = await client.post("/v1/answers", json={"question": "Why?"})
    events = blocks_of(response.text)

    assert [event["event"] for event in events] == ["accepted", "delta", "error"]
    assert events[-1]["data"]["reason"] == "MODEL_OVERLOADED"
    assert events[-1]["data"]["provider"] == "anthropic"
    assert "id" not in events[-1]


async def test_a_stream_that_ends_without_done_is_an_interruption(front: Front, client: httpx.AsyncClient) -> None:
    """An OK status is no end; the client hears that something is missing."""
    front.behind.orchestrator.script = [accepted(), delta(2, "x")]

    events = blocks_of((await client.post("/v1/answers", json={"question": "Why?"})).text)

    assert [event["event"] for event in events] == ["accepted", "delta", "error"]
    assert events[-1]["data"]["reason"] == "ANSWER_INTERRUPTED"
    assert events[-1]["data"]["retryable"] is True


async def test_an_unforeseen_failure_says_nothing_but_where_to_look(front: Front, client: httpx.AsyncClient) -> None:
    """Our bugs have no text."""
    front.behind.orchestrator.script = [accepted(), ZeroDivisionError("a secret")]

    response = await client.post("/v1/answers", json={"question": "Why?"})

    assert blocks_of(response.text)[-1]["data"]["reason"] == "INTERNAL"
    assert "secret" not in response.text


async def test_a_client_that_leaves_ends_the_call_behind(front: Front, client: httpx.AsyncClient) -> None:
    """The upstream call is cancelled at once; whether the answer goes on is the orchestrator's decision."""
    front.behind.orchestrator.script = [accepted(), forever]

    async with client.stream("POST", "/v1/answers", json={"question": "Why?"}) as response:
        await anext(response.aiter_text())

    await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)


async def test_a_whole_answer_is_one_json_document(front: Front, client: httpx.AsyncClient) -> None:
    """`stream: false`: the joined text with the receipt, and a disconnect is a cancel."""
    step = orchestrator.Step(name="recall", status="done", duration_ms=1.5)
    citation = orchestrator.Citation(number=1, start=2, end=5, document_id="d", chunk_id="c")
    front.behind.orchestrator.script = [
        accepted(),
        orchestrator.AnswerEvent(sequence=2, step=orchestrator.Step(name="recall", status="running")),
        orchestrator.AnswerEvent(sequence=3, step=step),
        delta(4, "A "),
        delta(5, "[1]"),
        orchestrator.AnswerEvent(sequence=6, citation=citation),
        done(7),
    ]

    answer = (await client.post("/v1/answers", json={"question": "Why?", "stream": False})).json()
    request, _ = front.behind.seen.last("Answer")

    assert request.cancel_on_disconnect is True
    assert (answer["answer_id"], answer["session_id"], answer["text"]) == (ANSWER, "s-1", "A [1]")
    assert answer["citations"][0]["number"] == 1
    assert [(step["name"], step["status"]) for step in answer["steps"]] == [("recall", "done")]
    assert answer["cost_nanousd"] == "1500000000"


async def test_a_whole_answer_has_the_thoughts_that_were_asked_for(front: Front, client: httpx.AsyncClient) -> None:
    """They were paid for; who did not stream gets them too, apart from the text."""
    front.behind.orchestrator.script = [
        accepted(),
        orchestrator.AnswerEvent(sequence=2, reasoning=orchestrator.Reasoning(text="First this, ")),
        orchestrator.AnswerEvent(sequence=3, reasoning=orchestrator.Reasoning(text="then that.")),
        delta(4, "So."),
        done(5),
    ]

    answer = (await client.post("/v1/answers", json={"question": "Why?", "stream": False, "reasoning": True})).json()

    assert (answer["reasoning"], answer["text"]) == ("First this, then that.", "So.")


async def test_is_disconnected_never_true_on_non_streaming(front: Front, client: httpx.AsyncClient) -> None:
    """Who waits for one document and goes away wants nothing more."""
    front.behind.orchestrator.script = [accepted(), forever]

    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/answers", json={"question": "Why?", "stream": False}, timeout=0.3)

    await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [([AnswerLogGone("gone", answer_id=ANSWER)], 410, "ANSWER_LOG_GONE"), ([NotFound("none", kind="answer")], 404, "NOT_FOUND")],
)
async def test_a_log_that_is_gone_or_foreign_is_said_before_the_stream(
    front: Front, client: httpx.AsyncClient, script: list[Any], status: int, reason: str
) -> None:
    """410 and 404 stop a browser from coming back."""
    front.behind.orchestrator.resumed = script

    problem_of(await client.get(f"/v1/answers/{ANSWER}/events"), status, reason)


async def test_a_log_that_was_read_to_its_end_is_204(front: Front, client: httpx.AsyncClient) -> None:
    """Nothing more will come, and that is no error."""
    response = await client.get(f"/v1/answers/{ANSWER}/events", headers={"last-event-id": "9"})
    request, _ = front.behind.seen.last("ResumeAnswer")

    assert (response.status_code, response.content) == (204, b"")
    assert (request.answer_id, request.after_sequence) == (ANSWER, 9)


async def test_the_later_of_query_and_header_counts_and_both_are_checked(front: Front, client: httpx.AsyncClient) -> None:
    """A browser's EventSource comes back to the same address, query and all, with a header that says how far it came since. A number is
    digits and nothing else."""
    front.behind.orchestrator.resumed = [delta(10, "x"), done(11)]

    for query, header, after in (("?after=3", "9", 9), ("?after=9", "3", 9), ("?after=3", "", 3), ("", "9", 9), ("", "", 0)):
        await client.get(f"/v1/answers/{ANSWER}/events{query}", headers={"last-event-id": header} if header else {})
        request, _ = front.behind.seen.last("ResumeAnswer")

        assert request.after_sequence == after
    for odd in ("-1", "1.5", "x", "１", "9" * 30):
        problem = problem_of(await client.get(f"/v1/answers/{ANSWER}/events", params={"after": odd}), 400, "REQUEST_INVALID")
        assert problem["field"] == "after"
        header = {"last-event-id": odd.encode()}
        problem = problem_of(await client.get(f"/v1/answers/{ANSWER}/events?after=1", headers=header), 400, "REQUEST_INVALID")
        assert problem["field"] == "Last-Event-ID"


async def test_who_begins_to_read_in_the_middle_is_told_when_to_come_back(front: Front, client: httpx.AsyncClient) -> None:
    """Within its first block. Who comes back was told before, and joins the very bytes of an uncut stream."""
    front.behind.orchestrator.resumed = [delta(4, "x"), delta(5, "y"), done(6)]

    begun = await client.get(f"/v1/answers/{ANSWER}/events?after=3")
    back = await client.get(f"/v1/answers/{ANSWER}/events?after=3", headers={"last-event-id": "3"})

    assert [block.get("retry") for block in blocks_of(begun.text)] == ["1000", None, None]
    assert begun.text == f"retry: 1000\n{back.text}"


async def test_cancel_is_acknowledged(front: Front, client: httpx.AsyncClient) -> None:
    """202 with whether it still ran; another's answer is unknown."""
    response = await client.post(f"/v1/answers/{ANSWER}/cancel")

    assert (response.status_code, response.json()) == (202, {"answer_id": ANSWER, "was_running": True})
    problem_of(await client.post("/v1/answers/other/cancel"), 404, "NOT_FOUND")


async def test_the_record_holds_the_operation_and_its_text(front: Front, client: httpx.AsyncClient) -> None:
    """Looked up by the answer's id."""
    record = (await client.get(f"/v1/answers/{ANSWER}")).json()

    assert (record["answer_id"], record["question"], record["text"]) == (ANSWER, "Why?", "Because [1].")
    assert (record["cost_nanousd"], record["cost_usd"]) == ("7500000", "0.0075")


async def test_models_are_listed_as_openai_clients_expect(front: Front, client: httpx.AsyncClient) -> None:
    """`object: list` of `object: model`."""
    listing = (await client.get("/v1/models")).json()

    assert (listing["object"], listing["data"][0]["object"], listing["data"][0]["id"]) == ("list", "model", "m-1")


async def test_a_service_that_is_away_is_named_and_missed_until_it_returns(front: Front, client: httpx.AsyncClient) -> None:
    """503 with Retry-After and the dependency; afterwards everything works again by itself."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    await front.behind.stop("orchestrator")

    response = await client.post("/v1/answers", json={"question": "Why?"})
    problem = problem_of(response, 503, "UNAVAILABLE")
    await front.behind.start("orchestrator")

    async def answered() -> bool:
        return (await client.post("/v1/answers", json={"question": "Why?"})).status_code == 200

    assert (problem["dependency"], response.headers["retry-after"]) == ("orchestrator", "1")
    assert await until(answered)


async def test_an_unavailable_store_behind_a_service_keeps_its_name(front: Front, client: httpx.AsyncClient) -> None:
    """What the service said is what the client reads."""
    front.behind.orchestrator.script = [Unavailable("postgres is away", dependency="postgres", retry_after_ms=4000)]

    response = await client.post("/v1/answers", json={"question": "Why?"})

    assert problem_of(response, 503, "UNAVAILABLE")["dependency"] == "postgres"
    assert response.headers["retry-after"] == "4"
