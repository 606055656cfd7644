"""Conversations over HTTP: what is asked of the ledger, and the files that people take away."""

import json
from typing import Any

import httpx
import pytest

from services.chassis.errors import Unavailable
from tailrace.common.v1 import common_pb2 as common
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tests.integration.gateway.backends import ANSWER
from tests.integration.gateway.conftest import Front, problem_of


def a_turn(number: int, parent: int, question: str = "Why?", **fields: Any) -> ledger.ExportSessionsResponse:
    turn = ledger.Turn(
        answer_id=f"a{number}", parent_answer_id=f"a{parent}" if parent else "", question=question, text="So.", complete=True
    )
    turn.MergeFrom(ledger.Turn(**fields))
    return ledger.ExportSessionsResponse(turn=ledger.SessionTurn(session_id="s-1", turn=turn))


def records() -> list[Any]:
    """A conversation of three turns in two branches, with a summary."""
    source = common.CitedPassage(number=1, title="Guide [v2]", source_uri="guide.md", page=3)
    summary = ledger.SessionSummary(session_id="s-1", summary=ledger.Summary(through_answer_id="a1", text="short"))
    return [
        ledger.ExportSessionsResponse(session=ledger.Session(session_id="s-1", title="# Ports <b>", head_answer_id="a2")),
        a_turn(1, 0, citations=[source]),
        a_turn(2, 1, "Two\nlines?"),
        a_turn(3, 1, "Edited?"),
        ledger.ExportSessionsResponse(summary=summary),
    ]


async def test_conversations_are_listed_and_shown(front: Front, client: httpx.AsyncClient) -> None:
    """With the turns of the current branch, or of all."""
    assert (await client.get("/v1/sessions")).json()["sessions"][0]["session_id"] == "s-1"
    assert (await client.get("/v1/sessions/s-1")).json()["turns"][0]["question"] == "Why?"
    assert front.behind.seen.last("GetSession")[0].all_branches is False
    await client.get("/v1/sessions/s-1?branches=all")
    assert front.behind.seen.last("GetSession")[0].all_branches is True
    assert problem_of(await client.get("/v1/sessions/s-1?branches=mine"), 400, "REQUEST_INVALID")["field"] == "branches"


async def test_a_conversation_is_renamed_and_taken_up_elsewhere(front: Front, client: httpx.AsyncClient) -> None:
    """Either or both; nothing at all is a mistake."""
    reply = await client.patch("/v1/sessions/s-1", json={"title": "Ports"})
    await client.patch("/v1/sessions/s-1", json={"head_answer_id": ANSWER})
    request, principal = front.behind.seen.last("UpdateSession")

    assert (reply.status_code, reply.json()["title"]) == (200, "Ports")
    assert (request.session_id, request.HasField("title"), request.head_answer_id, request.suggested_by) == ("s-1", False, ANSWER, "")
    assert (principal.tenant, principal.user) == ("acme", "ada")


@pytest.mark.parametrize("body", [{}, {"title": ""}, {"title": "  "}, {"title": "x" * 121}, {"title": "x", "user": "eve"}, {"title": 1}])
async def test_a_bad_change_is_refused_by_its_field(front: Front, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """And the ledger hears nothing of it."""
    problem_of(await client.patch("/v1/sessions/s-1", json=body), 400, "REQUEST_INVALID")

    assert front.behind.seen.count("UpdateSession") == 0


async def test_a_conversation_is_deleted_once(client: httpx.AsyncClient) -> None:
    """What is not there is not there."""
    assert (await client.delete("/v1/sessions/s-1")).status_code == 204
    problem_of(await client.delete("/v1/sessions/s-2"), 404, "NOT_FOUND")


async def test_a_conversation_is_exported_for_people(front: Front, client: httpx.AsyncClient) -> None:
    """Every branch says what it follows; a title does not become Markdown; sources are listed."""
    front.behind.ledger.exported = records()
    reply = await client.get("/v1/sessions/s-1/export")

    assert reply.headers["content-type"] == "text/markdown; charset=utf-8"
    assert reply.headers["content-disposition"] == 'attachment; filename="conversation.md"'
    assert reply.text.startswith("# \\# Ports \\<b\\>\n")
    assert "\n## 1\n\n> Why?\n\nSo.\n\n- \\[1\\] Guide \\[v2\\], page 3 (guide.md)\n" in reply.text
    assert "\n## 2\n\n> Two\n> lines?\n" in reply.text
    assert "\n## 3\n\n*Another branch: follows 1.*\n\n> Edited?\n" in reply.text
    assert reply.text.endswith("*The conversation goes on from 2.*\n")


async def test_a_conversation_is_exported_as_one_document(front: Front, client: httpx.AsyncClient) -> None:
    """By `format`, or by what the client accepts."""
    front.behind.ledger.exported = records()
    reply = await client.get("/v1/sessions/s-1/export?format=json")
    accepted = await client.get("/v1/sessions/s-1/export", headers={"accept": "application/json"})
    document = reply.json()

    assert accepted.json() == document
    assert (document["session_id"], document["head_answer_id"]) == ("s-1", "a2")
    assert [turn["answer_id"] for turn in document["turns"]] == ["a1", "a2", "a3"]
    assert [summary["text"] for summary in document["summaries"]] == ["short"]
    problem_of(await client.get("/v1/sessions/s-1/export?format=pdf"), 400, "REQUEST_INVALID")
    problem_of(await client.get("/v1/sessions/s-2/export"), 404, "NOT_FOUND")


async def test_all_conversations_are_exported_line_by_line(front: Front, client: httpx.AsyncClient) -> None:
    """The last line says that it is the last; without conversations it is the only one."""
    front.behind.ledger.exported = records()
    reply = await client.get("/v1/sessions:export")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    front.behind.ledger.exported = []
    nothing = await client.get("/v1/sessions:export")

    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [next(iter(line)) for line in lines] == ["session", "turn", "turn", "turn", "summary", "complete"]
    assert lines[-1] == {"complete": True, "records": 5}
    assert json.loads(nothing.text) == {"complete": True, "records": 0}


async def test_half_an_export_is_never_taken_for_a_whole_one(front: Front, client: httpx.AsyncClient) -> None:
    """The connection is cut; before the first record it is a plain refusal."""
    front.behind.ledger.exported = [*records()[:2], Unavailable("postgres is away", dependency="postgres")]
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/v1/sessions:export")
    front.behind.ledger.exported = [Unavailable("postgres is away", dependency="postgres")]
    problem_of(await client.get("/v1/sessions:export"), 503, "UNAVAILABLE")


async def test_a_question_may_take_the_place_of_another(front: Front, client: httpx.AsyncClient) -> None:
    """The field goes through as it is; what it means, the orchestrator decides."""
    await client.post("/v1/answers", json={"question": "Why?", "session_id": "s-1", "replaces": ANSWER})

    assert front.behind.seen.last("Answer")[0].replaces == ANSWER


async def test_prompts_are_shown_to_admins_and_go_with_the_user(front: Front, admin: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    """To nobody else; and who is erased is forgotten there too."""
    shown = (await admin.get(f"/v1/answers/{ANSWER}/prompts")).json()
    problem_of(await client.get(f"/v1/answers/{ANSWER}/prompts"), 403, "NOT_ALLOWED")
    front.behind.orchestrator.prompts = [orchestrator.ExportPromptsResponse(answer_id="a1", prompts=[orchestrator.SentPrompt(attempt=1)])]
    exported = [json.loads(line) for line in (await admin.get("/v1/admin/users/ada/export")).text.splitlines()]
    front.behind.orchestrator.prompts = []
    await admin.delete("/v1/admin/users/ada")

    assert front.behind.seen.last("ExportPrompts")[0].user == "ada"
    assert (exported[-2]["prompts"]["answer_id"], exported[-2]["prompts"]["prompts"][0]["attempt"]) == ("a1", 1)
    assert exported[-1] == {"complete": True, "records": len(exported) - 1}
    assert shown["answer_id"] == ANSWER
    assert shown["prompts"][0]["messages"] == [{"role": "user", "text": "Why?"}]
    assert front.behind.seen.last("ForgetPrompts")[0].user == "ada"
