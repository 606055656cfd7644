"""What a browser may do: the session cookie, forged requests, other origins, and the headers of every response."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from services.chassis.config import SettingsError
from services.chassis.errors import BudgetExhausted, ModelOverloaded, NotAllowed
from services.chassis.lifecycle import started
from services.gateway import websocket
from services.gateway.browser import ALLOWED_HEADERS, API_POLICY, COOKIE_TOKEN_BYTES_MAX, Browser
from services.gateway.wiring import EdgeServer, build
from services.local.stores import Valkey
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tests.integration.gateway.backends import ANSWER, accepted, delta, done
from tests.integration.gateway.conftest import Front, problem_of, settings_for, unique_user
from tests.integration.gateway.test_gateway_answers import blocks_of

OWN = {"x-tailrace-request": "page", "sec-fetch-site": "same-origin"}
APP = "https://app.example.com"


def bare(front: Front, **headers: str) -> httpx.AsyncClient:
    """A client without any credential that keeps no cookie of its own accord."""
    return httpx.AsyncClient(base_url=front.url, headers=headers, trust_env=False, timeout=10)


def cookie(front: Front, **of: Any) -> dict[str, str]:
    return {"cookie": f"tailrace={front.token(**of)}"}


async def test_signing_in_sets_a_cookie_that_no_script_reads_and_that_ends_with_the_token(front: Front) -> None:
    """Named in the body or in the header; who it is comes back, the token does not."""
    token = front.issuer.mint("ada", "acme", ["user"], 600)
    async with bare(front) as client:
        by_body = await client.post("/v1/session", json={"token": token})
    async with bare(front, authorization=f"Bearer {token}") as client:
        by_header = await client.post("/v1/session")

    for response in (by_body, by_header):
        assert response.status_code == 201
        value, *attributes = response.headers["set-cookie"].split("; ")
        assert value == f"tailrace={token}"
        lifetime_s = int(next(one for one in attributes if one.startswith("Max-Age=")).removeprefix("Max-Age="))
        assert 590 <= lifetime_s <= 600
        assert {"Path=/", "HttpOnly", "SameSite=Strict"} <= set(attributes)
        assert token not in response.text
        assert (response.json()["tenant"], response.json()["user"]) == ("acme", "ada")


async def test_what_is_no_good_token_sets_no_cookie(front: Front) -> None:
    """Each refusal by its type."""
    long = front.issuer.mint("a" * 250, "acme", ["user", *(f"{number:0200}" for number in range(15))])
    assert len(long) > COOKIE_TOKEN_BYTES_MAX
    async with bare(front) as client:
        refused = [
            (await client.post("/v1/session"), 401, "NOT_AUTHENTICATED"),
            (await client.post("/v1/session", json={"token": "x.y.z"}), 401, "NOT_AUTHENTICATED"),
            (await client.post("/v1/session", json={"token": front.issuer.mint("ada", "acme", ["user"], -60)}), 401, "NOT_AUTHENTICATED"),
            (await client.post("/v1/session", json={"token": "trk_0123"}), 400, "REQUEST_INVALID"),
            (await client.post("/v1/session", json={"token": long}), 400, "REQUEST_INVALID"),
            (await client.post("/v1/session", json={"token": "a\r\nset-cookie: x=y"}), 400, "REQUEST_INVALID"),
            (await client.post("/v1/session", json={"token": front.token()}, headers={"x-api-key": "trk_1"}), 401, "NOT_AUTHENTICATED"),
            (await client.post("/v1/session", content=b"token=x", headers={"content-type": "text/plain"}), 415, "MEDIA_TYPE_UNSUPPORTED"),
            (await client.post("/v1/session", json={"token": front.token()}, headers={"origin": APP}), 403, "NOT_ALLOWED"),
        ]

    for response, status, reason in refused:
        problem_of(response, status, reason)
        assert "set-cookie" not in response.headers


async def test_the_page_asks_and_follows_with_the_cookie_alone(front: Front) -> None:
    """A write with our header; an event stream as EventSource opens it, which can set none."""
    front.behind.orchestrator.script = [accepted(), delta(2, "x"), done(3)]
    front.behind.orchestrator.resumed = [delta(2, "x"), done(3)]
    async with bare(front, **cookie(front)) as client:
        who = await client.get("/v1/session")
        asked = await client.post("/v1/answers", json={"question": "Why?"}, headers=OWN)
        followed = await client.get(
            f"/v1/answers/{ANSWER}/events", headers={"accept": "text/event-stream", "sec-fetch-site": "same-origin"}
        )

    assert (who.status_code, asked.status_code, followed.status_code) == (200, 200, 200)
    assert [block["event"] for block in blocks_of(followed.text)] == ["delta", "done"]
    assert front.behind.seen.last("Answer")[1].user == "ada"


FORGED = {
    "no header of ours": {"sec-fetch-site": "same-origin"},
    "an empty header of ours": {"sec-fetch-site": "same-origin", "x-tailrace-request": ""},
    "says not where from": {"x-tailrace-request": "page"},
    "another site": {**OWN, "sec-fetch-site": "cross-site"},
    "a subdomain": {**OWN, "sec-fetch-site": "same-site"},
    "a foreign origin": {**OWN, "origin": "https://evil.example"},
    "the origin null": {**OWN, "origin": "null"},
    "an origin that ends like ours": {**OWN, "origin": "http://evil-127.0.0.1"},
    "an origin that begins like ours": {**OWN, "origin": "http://127.0.0.1.evil.example"},
    "another scheme": {**OWN, "origin": "file://127.0.0.1"},
    "typed by a person": {"x-tailrace-request": "page", "sec-fetch-site": "none"},
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/answers"), ("DELETE", "/v1/documents/d-1"), ("DELETE", "/v1/session")])
async def test_a_write_that_our_page_did_not_make_is_refused(front: Front, name: str, method: str, path: str) -> None:
    """Nothing behind hears of it, and the cookie stays."""
    async with bare(front, **cookie(front)) as client:
        response = await client.request(method, path, headers=FORGED[name])

    problem_of(response, 403, "NOT_ALLOWED")
    assert "set-cookie" not in response.headers
    assert front.behind.seen.calls == []


async def test_a_read_with_the_cookie_is_refused_to_another_site(front: Front) -> None:
    """Also to a subdomain, which SameSite would let through."""
    async with bare(front, **cookie(front)) as client:
        for headers in ({"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "null"}, {"origin": APP}):
            problem_of(await client.get("/v1/session", headers=headers), 403, "NOT_ALLOWED")
        own = await client.get("/v1/session", headers={"origin": front.url, "sec-fetch-site": "same-origin"})

    assert own.status_code == 200


async def test_an_explicit_credential_goes_before_the_cookie(front: Front) -> None:
    """A bad one is not saved by a good cookie; two cookies are nobody."""
    async with bare(front, **cookie(front)) as client:
        other = await client.get("/v1/session", headers={"authorization": f"Bearer {front.token('eve')}"})
        for bad in ({"authorization": "Bearer x.y.z"}, {"authorization": "Basic x"}, {"x-api-key": "trk_unknown"}, {"x-api-key": ""}):
            problem_of(await client.get("/v1/session", headers=bad), 401, "NOT_AUTHENTICATED")
        twice = f"tailrace={front.token()}; tailrace={front.token('eve')}"
        problem_of(await client.get("/v1/session", headers={"cookie": twice}), 401, "NOT_AUTHENTICATED")
        problem_of(await client.get("/v1/session", headers={"cookie": f"Tailrace={front.token()}; x=y"}), 401, "NOT_AUTHENTICATED")

    assert other.json()["user"] == "eve"


async def test_signing_out_takes_the_cookie_away_even_if_its_token_is_no_good(front: Front) -> None:
    """With the attributes it was set with, or the browser would keep it."""
    async with bare(front, cookie="tailrace=x.y.z") as client:
        gone = await client.delete("/v1/session", headers=OWN)

    assert gone.status_code == 204
    assert gone.headers["set-cookie"] == "tailrace=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict"


def test_over_https_the_cookie_is_bound_to_the_host() -> None:
    """The prefix, Secure, no Domain; and the plain name is not looked at."""
    browser = Browser(secure=True)
    _, value = browser.cookie("t", 5)

    assert value == b"__Host-tailrace=t; Path=/; Max-Age=5; HttpOnly; SameSite=Strict; Secure"
    assert browser.token_in([("cookie", "tailrace=evil; __Host-tailrace=t")]) == "t"
    assert browser.token_in([("cookie", "tailrace=evil")]) == ""
    assert any(name == b"strict-transport-security" for name, _ in browser.security_headers)


@pytest.mark.parametrize(
    ("secure", "origin", "allowed"),
    [
        (True, "https://tailrace.example", True),
        (True, "http://tailrace.example", False),
        (True, "http://localhost:8080", True),
        (True, "http://[::1]:8080", True),
        (True, "http://localhost.example", False),
        (False, "http://tailrace.example", True),
        (True, "https://[", False),
    ],
)
def test_over_https_a_page_that_came_over_plain_http_is_another_site(secure: bool, origin: str, allowed: bool) -> None:
    """Whoever stands between could have written it; nobody stands between a browser and its own machine."""
    host = origin.partition("://")[2]
    headers = [("host", host), ("origin", origin), ("x-tailrace-request", "page")]
    checks = (lambda browser: browser.check_own("POST", headers), lambda browser: browser.check_sign_in(headers))
    for check in checks:
        with contextlib.nullcontext() if allowed else pytest.raises(NotAllowed):
            check(Browser(secure=secure))


# --- other origins ---


@pytest.fixture(scope="module")
async def listed(shared_front: Front, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Address of a gateway that lets one other origin's scripts call."""
    settings = settings_for(
        shared_front.behind,
        tmp_path_factory.mktemp("listed"),
        valkey.url,
        TAILRACE_CORS_ORIGINS=f"{APP}, http://localhost:3000",
        TAILRACE_GATEWAY_LOOP_LAG_MAX_S="60",  # this loop stands still between two tests
        TAILRACE_JWKS_FILE=str(shared_front.jwks),
    )
    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        yield f"http://127.0.0.1:{service.server.http.port}"
        await service.server.stop(0, 0)


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


async def test_a_listed_origin_may_call_with_a_token_and_never_with_the_cookie(front: Front, listed: str) -> None:
    """Preflight, call and refusal can all be read; credentials are never allowed."""
    async with httpx.AsyncClient(base_url=listed, trust_env=False) as client:
        asked = await client.options("/v1/answers", headers={"origin": APP, **PREFLIGHT})
        token = {"authorization": f"Bearer {front.token()}"}
        called = await client.get("/v1/session", headers={"origin": APP, "sec-fetch-site": "cross-site", **token})
        refused = await client.get("/v1/session", headers={"origin": APP})
        with_cookie = await client.get("/v1/session", headers={"origin": APP, **cookie(front)})

    assert (asked.status_code, called.status_code) == (204, 200)
    assert asked.headers["access-control-allow-methods"] == "POST"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    problem_of(refused, 401, "NOT_AUTHENTICATED")
    problem_of(with_cookie, 403, "NOT_ALLOWED")
    for response in (asked, called, refused, with_cookie):
        assert response.headers["access-control-allow-origin"] == APP
        assert response.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in response.headers


SAFELISTED = {"cache-control", "content-length", "content-type", "date"}
"""Fetch shows these anyway, but for `date`, which says nothing of ours."""
FOR_BROWSERS = {"connection", "set-cookie", "transfer-encoding", "vary", "x-accel-buffering"}
"""For what stands between us and the script."""


async def test_a_script_of_a_listed_origin_sees_every_header_that_a_response_carries(front: Front, listed: str) -> None:
    """What is hidden by mistake cannot be acted on; what is exposed is carried by something."""
    behind, token = front.behind, {"authorization": f"Bearer {front.token(unique_user(), roles=('user', 'admin'))}"}
    behind.ledger.plan.tokens_per_minute = 1_000_000
    behind.ledger.operations[0].next_page_token = "next"
    behind.ledger.exported = [ledger.ExportSessionsResponse(session=ledger.Session(session_id="s-1"))]
    receipt = done(2)
    receipt.done.usage.Clear()
    async with httpx.AsyncClient(base_url=listed, trust_env=False, headers={"origin": APP}) as client:
        anonymous = await client.get("/v1/models")
        client.headers.update(token)
        behind.orchestrator.script = [accepted(), receipt]
        responses = [
            anonymous,
            await client.post("/v1/answers", json={"question": "Why?"}),
            await client.post("/v1/answers", json={"question": "Why?", "stream": False}),
            await client.post("/v1/documents?wait=false", json={"title": "t", "text": "x"}),
            await client.get("/v1/operations?format=csv"),
            await client.get("/v1/sessions/s-1/export"),
            await client.put("/v1/answers"),
            await client.post("/v1/session"),
            await client.get("/readyz"),
        ]
        behind.orchestrator.script = [ModelOverloaded("busy", provider="p")]
        responses.append(await client.post("/v1/answers", json={"question": "Why?"}))
        behind.orchestrator.script = [BudgetExhausted("empty")]
        responses.append(await client.post("/v1/answers", json={"question": "Why?"}))
    behind.ledger.operations[0].next_page_token = ""

    exposed = set(anonymous.headers["access-control-expose-headers"].split(", "))
    own = {name.decode() for name, _ in (*Browser(secure=True).security_headers, API_POLICY)}
    carried = {name for response in responses for name in response.headers if not name.startswith("access-control-")}
    assert carried - own - SAFELISTED - FOR_BROWSERS == exposed


def test_a_script_of_a_listed_origin_may_send_every_header_that_is_read() -> None:
    """Found where the edge asks for one by name. The rest are the browser's own, or those that only our page sends."""
    sources = Path(websocket.__file__).parent.glob("*.py")
    read = {name for source in sources for name in re.findall(r'[.]header\("([a-z-]+)"', source.read_text())}
    of_browsers = {"content-length", "host", "if-none-match", "origin"}

    assert read - of_browsers <= set(ALLOWED_HEADERS.decode().split(", "))
    assert {"request-timeout", "idempotency-key"} <= read


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        f"{APP}.evil.example",
        "https://evil-app.example.com",
        "https://sub.app.example.com",
        "https://example.com",
        "http://app.example.com",
        f"{APP}:444",
        f"{APP}/",
        APP.upper(),
        "*",
        f"{APP} https://evil.example",
        f"{APP},{APP}",
        "http://localhost:3001",
        "http://localhost",
    ],
)
async def test_no_other_origin_may(front: Front, listed: str, origin: str) -> None:
    """Its preflight is refused, and its responses name nobody."""
    async with httpx.AsyncClient(base_url=listed, trust_env=False) as client:
        asked = await client.options("/v1/answers", headers={"origin": origin, **PREFLIGHT})
        called = await client.get("/healthz", headers={"origin": origin})

    problem_of(asked, 403, "NOT_ALLOWED")
    for response in (asked, called):
        assert not [name for name in response.headers if name.startswith("access-control-")]


async def test_without_a_list_no_origin_may(front: Front) -> None:
    """That is how it comes."""
    async with bare(front) as client:
        problem_of(await client.options("/v1/answers", headers={"origin": APP, **PREFLIGHT}), 403, "NOT_ALLOWED")
        problem_of(await client.options("/v1/answers"), 405, "METHOD_NOT_ALLOWED")


@pytest.mark.parametrize(
    "wrong", ["*", "app.example.com", "https://app.example.com/", "https://*.example.com", "null", "https://a b", "ftp://x"]
)
def test_a_list_with_what_no_browser_sends_is_refused_at_the_start(front: Front, tmp_path: Path, wrong: str) -> None:
    """By the setting's name."""
    with pytest.raises(SettingsError, match="TAILRACE_CORS_ORIGINS"):
        settings_for(front.behind, tmp_path, "redis://127.0.0.1:1/0", TAILRACE_CORS_ORIGINS=f"{APP},{wrong}")


async def test_every_response_has_its_ids_and_its_guards(front: Front, listed: str) -> None:
    """Page, asset, API, stream, refusals, preflights."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())  # as every service does when it starts
    async with httpx.AsyncClient(base_url=listed, trust_env=False) as client:
        page = await client.get("/")
        script = next(part.split('"')[0] for part in page.text.split('src="')[1:])
        token = {"authorization": f"Bearer {front.token()}"}
        front.behind.orchestrator.script = [accepted(), done(2)]
        responses = {
            "page": page,
            "asset": await client.get(script),
            "asset again": await client.get(script, headers={"if-none-match": (await client.get(script)).headers["etag"]}),
            "health": await client.get("/healthz"),
            "api": await client.get("/v1/session", headers=token),
            "stream": await client.post("/v1/answers", json={"question": "Why?"}, headers=token),
            "401": await client.get("/v1/session"),
            "403": await client.get("/v1/admin/users", headers=token),
            "404": await client.get("/nowhere"),
            "405": await client.patch("/v1/answers"),
            "preflight": await client.options("/v1/answers", headers={"origin": APP, **PREFLIGHT}),
            "preflight refused": await client.options("/v1/answers", headers={"origin": "null", **PREFLIGHT}),
            "preflight of nothing": await client.options("/nowhere", headers={"origin": APP, **PREFLIGHT}),
        }

    assert [responses[name].status_code for name in ("asset again", "401", "403", "404", "405", "preflight")] == [
        304,
        401,
        403,
        404,
        405,
        204,
    ]
    for name, response in responses.items():
        headers = response.headers
        assert len(headers["x-request-id"]) == 32, name
        assert len(headers["x-trace-id"]) == 32, name
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY"), name
        policy = headers.get_list("content-security-policy")
        assert len(policy) == 1, name
        assert "default-src 'none'" in policy[0], name
        assert "frame-ancestors 'none'" in policy[0], name
        assert "unsafe" not in policy[0], name
    assert "script-src 'self'" in page.headers["content-security-policy"]


async def test_a_token_never_reaches_a_log(front: Front, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a good one nor a bad one, by whatever way it came; in an address it is no credential either."""
    token = front.token()
    async with bare(front) as client:
        in_address = await client.get("/v1/answers/x/events", params={"access_token": token, "token": token})
        await client.post("/v1/session", json={"token": token})
        await client.post("/v1/session", json={"token": token[:-4] + "AAAA"})
        await client.get("/v1/session", headers={"cookie": f"tailrace={token}"})
        await client.get("/v1/session", headers={"authorization": f"Bearer {token[:-4]}AAAA"})
    await asyncio.sleep(0)
    written = "".join(capfd.readouterr())

    assert in_address.status_code == 401
    assert token.split(".")[1] not in written + in_address.text
    assert token.split(".")[2][:-4] not in written
    assert json.dumps(token) not in written
