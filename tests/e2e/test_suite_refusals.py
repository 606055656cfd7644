"""Bad input is the caller's problem, typed and with the bound named: never a 500, and nothing half-written."""

import json
from typing import Any

import httpx
import pytest

from tests.suite import Suite, events

JSON = {"content-type": "application/json"}
FINAL = ("indexed", "unchanged", "failed")
UNKNOWN_ID = "01890000-0000-7000-8000-000000000000"


def problem_of(response: httpx.Response, status: int) -> Any:
    """The problem document; fails unless it is one, with this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.headers["x-request-id"]) > 0
    problem = response.json()
    assert problem["status"] == status
    assert problem.keys() >= {"type", "title", "status", "detail", "reason", "retryable"}
    return problem


BAD_BODIES: list[tuple[str, Any, str]] = [
    ("/v1/answers", b"", "body"),
    ("/v1/answers", b"{", "body"),
    ("/v1/answers", b"\xff\xfe{}", "body"),
    ("/v1/answers", b"[]", "body"),
    ("/v1/answers", b"null", "body"),
    ("/v1/answers", {}, "question"),
    ("/v1/answers", {"question": ""}, "question"),
    ("/v1/answers", {"question": " \n\t"}, "question"),
    ("/v1/answers", {"question": 7}, "question"),
    ("/v1/answers", {"question": "a\0b"}, "question"),
    ("/v1/answers", {"question": "x" * 32_769}, "question"),
    ("/v1/answers", {"question": "ä" * 16_385}, "question"),
    ("/v1/answers", {"question": "?", "tenant": "globex"}, "tenant"),
    ("/v1/answers", {"question": "?", "max_output_tokens": 0}, "max_output_tokens"),
    ("/v1/answers", {"question": "?", "max_output_tokens": 10**30}, "max_output_tokens"),
    ("/v1/answers", {"question": "?", "max_output_tokens": 1.5}, "max_output_tokens"),
    ("/v1/answers", {"question": "?", "session_id": "../etc"}, "session_id"),
    ("/v1/answers", {"question": "?", "session_id": "s" * 65}, "session_id"),
    ("/v1/answers", {"question": "?", "collection": "a b"}, "collection"),
    ("/v1/answers", {"question": "?", "cache": "maybe"}, "cache"),
    ("/v1/answers", {"question": "?", "stream": "yes"}, "stream"),
    ("/v1/answers", {"question": "?", "tools": [{"name": "a", "input_schema": {"$ref": "https://x/"}}]}, "tools[0].input_schema"),
    ("/v1/answers", {"question": "?", "tools": [{"name": "a b"}]}, "tools[0].name"),
    ("/v1/answers", {"question": "?", "images": [{"media_type": "image/png", "data": "AAAA"}]}, "images[0].data"),
    ("/v1/answers", {"question": "?", "continues": "x"}, "tool_results"),
    ("/v1/answers", {"question": "?", "tool_results": [{"call_id": "a"}]}, "continues"),
    ("/v1/search", {"query": ""}, "query"),
    ("/v1/search", {"query": "?", "limit": 0}, "limit"),
    ("/v1/search", {"query": "?", "mode": "psychic"}, "mode"),
    ("/v1/documents", {"title": "", "text": "x"}, "title"),
    ("/v1/documents", {"title": "T", "text": ""}, "text"),
    ("/v1/documents", {"title": "T"}, "text"),
]


async def test_a_tool_that_the_plan_has_not_is_refused(client: httpx.AsyncClient) -> None:
    """By the ledger's own plan, before anything is done; an answer that nobody waits for is not there to go on with."""
    refused = problem_of(await client.post("/v1/answers", json={"question": "?", "server_tools": ["calculator", "fetch_url"]}), 403)
    gone = {"continues": UNKNOWN_ID, "tool_results": [{"call_id": "a"}]}

    assert (refused["reason"], refused["needs"]) == ("NOT_ALLOWED", "fetch_url")
    assert problem_of(await client.post("/v1/answers", json=gone), 404)["reason"] == "NOT_FOUND"
    word = await client.post(f"/v1/answers/{UNKNOWN_ID}/tool-calls/a", json={"allowed": True})
    assert problem_of(word, 404)["reason"] == "NOT_FOUND"


@pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES)
async def test_a_bad_body_is_a_problem_that_names_the_field(client: httpx.AsyncClient, path: str, body: Any, field: str) -> None:
    """400 with the field and its bound."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    problem = problem_of(await client.post(path, content=content, headers=JSON), 400)

    assert problem["reason"] == "REQUEST_INVALID"
    assert problem["field"] == field
    assert problem["retryable"] is False


async def test_a_surrogate_or_a_deep_nest_is_refused_too(client: httpx.AsyncClient) -> None:
    """JSON that is legal by its letters and poison by its meaning."""
    nested = b'{"question": "?", "output_schema": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001
    for content in (b'{"question": "\\ud800"}', b'{"question": ' + b"[" * 100_000, nested):
        problem_of(await client.post("/v1/answers", content=content, headers=JSON), 400)


async def test_a_model_or_tier_that_nobody_serves_is_named_unknown(client: httpx.AsyncClient) -> None:
    """Never a guess at another model."""
    for asked in ({"model": "gpt-0"}, {"tier": "no-such-tier"}):
        problem = problem_of(await client.post("/v1/answers", json={"question": "?", **asked}), 400)

        assert problem["reason"] == "MODEL_UNKNOWN"


async def test_what_is_too_large_is_refused_before_it_is_read(suite: Suite, client: httpx.AsyncClient) -> None:
    """413 with the bound in bytes; no document appears."""
    before = (await client.get("/v1/documents")).json()
    text = "a" * (20 * 1024 * 1024 + 1)

    problem_of(await client.post("/v1/answers", content=b" " * (2 * 1024 * 1024), headers=JSON), 413)
    problem_of(await client.post("/v1/documents", json={"title": "Large", "text": text}), 413)

    assert (await client.get("/v1/documents")).json() == before


@pytest.mark.parametrize("name", ["picture.md", "archive.txt", "page.html"])
async def test_a_binary_file_called_text_fails_alone_and_leaves_nothing(suite: Suite, client: httpx.AsyncClient, name: str) -> None:
    """The upload's progress says which file failed and why; the good file beside it is indexed."""
    binary = bytes(range(256)) * 40
    files = [("files", (name, b"\x89PNG\r\n\x1a\n" + binary, "text/plain")), ("files", (f"good-{name}", b"# Good\n\nA good file.", ""))]
    async with client.stream("POST", "/v1/documents", files=files) as response:
        assert response.status_code == 200
        final = {event.data["name"]: event.data async for event in events(response) if event.data.get("stage") in FINAL}
    listed = (await client.get("/v1/documents")).json()["documents"]

    assert (final[name]["stage"], final[name]["error_reason"]) == ("failed", "DOCUMENT_REJECTED")
    assert final[f"good-{name}"]["stage"] == "indexed"
    assert name not in {document["source_uri"] for document in listed}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/v1/answers/{UNKNOWN_ID}", 404),
        ("GET", f"/v1/answers/{UNKNOWN_ID}/events", 404),
        ("POST", f"/v1/answers/{UNKNOWN_ID}/cancel", 404),
        ("GET", f"/v1/documents/{UNKNOWN_ID}", 404),
        ("DELETE", f"/v1/documents/{UNKNOWN_ID}", 404),
        ("GET", f"/v1/jobs/{UNKNOWN_ID}", 404),
        ("GET", f"/v1/operations/{UNKNOWN_ID}", 404),
        ("GET", "/v1/sessions/unknown", 404),
        ("GET", "/v1/nothing", 404),
        ("PATCH", "/v1/answers", 405),
        ("GET", "/v1/usage?group_by=moon", 400),
        ("GET", "/v1/operations?page_size=0x10", 400),
        ("PUT", "/v1/admin/subscriptions/ada", 403),
    ],
)
async def test_what_is_not_there_or_not_allowed_is_said_by_type(client: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    """Unknown ids, paths, methods and fields, and routes of other roles."""
    problem_of(await client.request(method, path, json={"plan": "pro"} if method == "PUT" else None), status)


async def test_an_id_that_is_none_is_a_typed_problem(client: httpx.AsyncClient) -> None:
    """Whatever stands where an id belongs."""
    for odd in ("x", "%00", "%F0%9F%A6%86", "a" * 500, "..%2F..%2Fetc"):
        for path in (f"/v1/answers/{odd}", f"/v1/documents/{odd}", f"/v1/operations/{odd}"):
            response = await client.get(path)

            assert response.status_code in (400, 404), (path, response.text)
            assert response.headers["content-type"] == "application/problem+json"


async def test_only_a_good_token_opens_the_door(suite: Suite) -> None:
    """Missing, broken, expired, foreign and doubled credentials are all 401 with a challenge, and none says more than it must."""
    good = suite.token()
    head, body, signature = good.split(".")
    credentials = [
        None,
        "",
        "Bearer",
        "Bearer x.y.z",
        f"Basic {good}",
        f"Bearer {suite.token(lifetime_s=-3600)}",
        f"Bearer {head}.{body}.{signature[:-4]}AAAA",
        f"Bearer {head}.{body}.",
        "Bearer " + "a" * 10_000,
        "Bearer trk_unknown_key",
    ]
    async with httpx.AsyncClient(base_url=suite.url, trust_env=False) as http:
        for credential in credentials:
            headers = {} if credential is None else {"authorization": credential}
            problem = problem_of(await http.post("/v1/answers", json={"question": "?"}, headers=headers), 401)

            assert problem["reason"] == "NOT_AUTHENTICATED"


async def test_after_all_refusals_nothing_was_written(suite: Suite) -> None:
    """A refused question has no operation, no turn and no hold."""
    await suite.provider.reset()
    async with suite.client("nobody", "refused") as client:
        for path, body, _ in BAD_BODIES:
            await client.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode(), headers=JSON)
        assert (await client.get("/v1/documents")).json()["documents"] == []

    for table in ("operations", "turns", "holds"):
        assert await suite.rows(f"SELECT 1 FROM {table} WHERE tenant = 'refused'") == []
    assert await suite.provider.records() == []


async def test_a_tier_that_the_plan_has_not_is_refused_and_so_are_its_models(suite: Suite) -> None:
    """403 whichever way it is asked for; what the plan has is answered, and no budget is touched by a refusal."""
    plan = {
        "requests_per_minute": 100,
        "tokens_per_minute": 1_000_000,
        "concurrent_answers": 9,
        "monthly_budget_usd": "0",
        "tiers": ["fast"],
    }
    async with suite.client("boss", "plans", ("user", "admin")) as admin:
        (await admin.put("/v1/admin/plans/narrow", json=plan)).raise_for_status()
        (await admin.put("/v1/admin/subscriptions/ann", json={"plan": "narrow"})).raise_for_status()
    async with suite.client("ann", "plans") as http:
        asked = {"question": "What does the river bring?", "stream": False, "cache": "off"}
        by_tier = await http.post("/v1/answers", json={**asked, "tier": "smart"})
        by_model = await http.post("/v1/answers", json={**asked, "model": "claude-sonnet-5-5"})
        allowed = await http.post("/v1/answers", json={**asked, "tier": "fast"})
        chosen = await http.post(
            "/v1/answers", json={**asked, "tier": "auto", "question": "Compare both plans and explain why one is dearer."}
        )

    assert [problem_of(refused, 403)["reason"] for refused in (by_tier, by_model)] == ["NOT_ALLOWED"] * 2
    assert allowed.status_code == 200
    assert [(choice["tier"], choice["reason"]) for choice in chosen.json()["choices"]] == [("fast", "plan")]
