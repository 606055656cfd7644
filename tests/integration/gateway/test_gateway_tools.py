"""Tools over HTTP: what reaches the orchestrator, what a plan keeps from it, and the word on a call that waits."""

import base64
import uuid
from typing import Any

import httpx
import pytest

from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tests.integration.gateway.backends import ANSWER, accepted, done
from tests.integration.gateway.conftest import Front, problem_of

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def call_event(sequence: int) -> orchestrator.AnswerEvent:
    call = orchestrator.ToolCall(call_id="c1", name="weather")
    call.input.update({"town": "Oslo", "days": 3})
    return orchestrator.AnswerEvent(answer_id=ANSWER, sequence=sequence, tool_call=call)


async def test_tools_pictures_and_results_reach_the_orchestrator(front: Front) -> None:
    """As they are, once."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    body: dict[str, Any] = {
        "question": "What is this?",
        "tools": [{"name": "weather", "description": "of a town", "input_schema": {"type": "object", "properties": {"town": {}}}}],
        "server_tools": ["calculator"],
        "images": [{"media_type": "image/png", "data": base64.b64encode(PNG).decode()}],
        "tool_results": [{"call_id": "c1", "text": "rain", "failed": True}],
        "continues": "answer-1",
    }
    front.behind.ledger.plan.tools[:] = ["calculator"]
    try:
        async with front.client(uuid.uuid4().hex) as client:
            response = await client.post("/v1/answers", json=body)
    finally:
        front.behind.ledger.plan.ClearField("tools")
    request, _ = front.behind.seen.last("Answer")

    assert response.status_code == 200, response.text
    assert [("image/png", PNG)] == [(image.media_type, image.data) for image in request.images]
    assert ["calculator"] == list(request.server_tools) and "answer-1" == request.continues
    assert [("c1", "rain", True)] == [(result.call_id, result.text, result.failed) for result in request.tool_results]


async def test_an_answer_that_goes_on_is_asked_with_the_tools_of_its_plan(front: Front) -> None:
    """Which ones it began with is known further in, and the plan may have lost them since. Other calls carry no such list."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    front.behind.ledger.plan.tools[:] = ["calculator", "github__*"]
    try:
        async with front.client(uuid.uuid4().hex) as client:
            await client.post("/v1/answers", json={"continues": "answer-1", "tool_results": [{"call_id": "c1"}]})
            _, going_on = front.behind.seen.last("Answer")
            await client.post("/v1/answers", json={"question": "x"})
            _, asking = front.behind.seen.last("Answer")
    finally:
        front.behind.ledger.plan.ClearField("tools")

    assert (going_on.tools, asking.tools) == (frozenset({"calculator", "github__*"}), None)


async def test_an_answer_that_goes_on_needs_no_question(front: Front, client: httpx.AsyncClient) -> None:
    """The results are what is said; any other body still needs one."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    body = {"continues": "answer-1", "tool_results": [{"call_id": "c1"}]}

    assert (await client.post("/v1/answers", json=body)).status_code == 200
    assert problem_of(await client.post("/v1/answers", json={}), 400, "REQUEST_INVALID")["field"] == "question"


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"images": [{"media_type": "image/png", "data": "no base64!"}]}, "images[0].data"),
        ({"images": [{"media_type": "image/png", "data": ""}]}, "images[0].data"),
        ({"images": [{"media_type": "image/tiff", "data": "AAAA"}]}, "images[0].media_type"),
        ({"images": [{"media_type": "image/png", "data": "AAAA"}] * 9}, "images"),
        ({"server_tools": ["a b"]}, "server_tools[0]"),
        ({"server_tools": ["a"] * 33}, "server_tools"),
        ({"tool_results": [{"text": "x"}]}, "tool_results[0].call_id"),
        ({"tool_results": [{"call_id": "c", "text": "ä" * 40_000}]}, "tool_results[0].text"),
    ],
)
async def test_mistakes_name_their_field(client: httpx.AsyncClient, part: dict[str, Any], field: str) -> None:
    """Before anything is asked of anybody."""
    problem = problem_of(await client.post("/v1/answers", json={"question": "x", **part}), 400, "REQUEST_INVALID")

    assert problem["field"] == field and problem["bound"]


async def test_pictures_may_be_larger_than_words(front: Front, client: httpx.AsyncClient) -> None:
    """A body of several MiB is taken for its pictures, up to their bound together."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    large = base64.b64encode(PNG + bytes(4 * 1024 * 1024)).decode()
    image = {"media_type": "image/png", "data": large}

    assert (await client.post("/v1/answers", json={"question": "x", "images": [image, image]})).status_code == 200
    assert len(front.behind.seen.last("Answer")[0].images[1].data) == len(PNG) + 4 * 1024 * 1024
    problem = problem_of(await client.post("/v1/answers", json={"question": "x", "images": [image] * 3}), 400, "REQUEST_INVALID")
    assert problem["field"] == "images"


@pytest.mark.parametrize(
    ("plan", "names", "allowed"),
    [
        (["calculator"], ["calculator"], True),
        (["calculator"], ["calculator", "fetch_url"], False),
        (["github__*"], ["github__search"], True),
        (["github__*"], ["github2__search"], False),
        (["github__search"], ["github__delete"], False),
        (["*"], ["anything__at_all", "fetch_url"], True),
        ([], ["calculator"], False),
        ([], [], True),
    ],
)
async def test_a_plan_says_which_tools_may_be_used(front: Front, plan: list[str], names: list[str], allowed: bool) -> None:
    """What it has not does not reach the orchestrator. A user of its own for each case: plans are remembered for seconds."""
    front.behind.ledger.plan.tools[:] = plan
    front.behind.orchestrator.script = [accepted(), done(2)]
    before = front.behind.seen.count("Answer")
    try:
        async with front.client(uuid.uuid4().hex) as client:
            response = await client.post("/v1/answers", json={"question": "x", "server_tools": names})
    finally:
        front.behind.ledger.plan.ClearField("tools")
    if allowed:
        assert response.status_code == 200 and front.behind.seen.count("Answer") == before + 1
    else:
        assert problem_of(response, 403, "NOT_ALLOWED")["needs"] == names[-1]
        assert front.behind.seen.count("Answer") == before


async def test_the_word_on_a_call_is_passed_on(front: Front, client: httpx.AsyncClient) -> None:
    """With the principal's own answer and call; what is no word is refused."""
    response = await client.post(f"/v1/answers/{ANSWER}/tool-calls/c1", json={"allowed": True})
    request, principal = front.behind.seen.last("ConfirmToolCall")

    assert response.json() == {"answer_id": ANSWER, "call_id": "c1", "was_waiting": True}
    assert (ANSWER, "c1", True) == (request.answer_id, request.call_id, request.allowed) and principal.user
    problem_of(await client.post("/v1/answers/other/tool-calls/c1", json={"allowed": True}), 404, "NOT_FOUND")
    for wrong in ({}, {"allowed": "yes"}, {"allowed": True, "more": 1}):
        problem_of(await client.post(f"/v1/answers/{ANSWER}/tool-calls/c1", json=wrong), 400, "REQUEST_INVALID")


async def test_a_whole_answer_has_its_calls(front: Front, client: httpx.AsyncClient) -> None:
    """A client that waits for one document finds what it has to call, and every step of a name."""
    result = orchestrator.ToolResult(call_id="c0", text="42")
    steps = [
        orchestrator.AnswerEvent(answer_id=ANSWER, sequence=number, step=orchestrator.Step(name="tool", status="done", started_ms=number))
        for number in (4, 5)
    ]
    event = orchestrator.AnswerEvent(answer_id=ANSWER, sequence=3, tool_result=result)
    front.behind.orchestrator.script = [accepted(), call_event(2), event, *steps, done(6)]
    whole = (await client.post("/v1/answers", json={"question": "x", "stream": False})).json()

    assert whole["tool_calls"] == [{"call_id": "c1", "name": "weather", "input": {"town": "Oslo", "days": 3}}]
    assert whole["tool_results"] == [{"call_id": "c0", "text": "42", "failed": False, "flags": []}] and len(whole["steps"]) == 2


async def test_a_call_is_one_event(front: Front, client: httpx.AsyncClient) -> None:
    """With the arguments as JSON."""
    front.behind.orchestrator.script = [accepted(), call_event(2), done(3)]
    text = (await client.post("/v1/answers", json={"question": "x"})).text

    assert 'event: tool_call\ndata: {"call_id":"c1","input":{"days":3,"town":"Oslo"},"name":"weather"}' in text
