"""Answers over a WebSocket: the same events and refusals as over HTTP, several at once, and every way it can end."""

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from services.chassis.errors import AnswerCancelled, DomainError, ModelOverloaded, NotAllowed
from services.chassis.lifecycle import started
from services.chassis.principal import Principal
from services.gateway import bodies, http_listener
from services.gateway.exchange import Exchange
from services.gateway.websocket import CALLS_MAX, refuse_foreign_page
from services.gateway.wiring import EdgeServer, build
from services.local.stores import Valkey
from tests.fakes.api_keys import key_named
from tests.integration.gateway.backends import ANSWER, accepted, delta, done, forever
from tests.integration.gateway.conftest import Front, settings_for, unique_user, until
from tests.integration.gateway.test_gateway_answers import blocks_of

PATH = "/v1/answers/ws"


@contextlib.asynccontextmanager
async def opened(front: Front, *, port: int = 0, **headers: str) -> AsyncIterator[ClientConnection]:
    """A socket of the user ada, or with other headers."""
    sent = headers or {"authorization": f"Bearer {front.token()}"}
    async with connect(f"ws://127.0.0.1:{port or front.http_port}{PATH}", additional_headers=sent, proxy=None) as socket:
        yield socket


async def say(socket: ClientConnection, kind: str, **members: Any) -> None:
    await socket.send(json.dumps({"type": kind, **members}))


async def heard(socket: ClientConnection) -> dict[str, Any]:
    """The next text."""
    async with asyncio.timeout(5):
        text: dict[str, Any] = json.loads(await socket.recv(decode=True))
    return text


async def heard_until(socket: ClientConnection, *last: str) -> list[dict[str, Any]]:
    """All texts up to the first of one of these types."""
    texts = [await heard(socket)]
    while texts[-1]["type"] not in last:
        texts.append(await heard(socket))
    return texts


async def test_the_events_are_those_of_the_stream_over_http(front: Front, client: httpx.AsyncClient) -> None:
    """Same names, numbers and data; each says which answer and which ask it belongs to."""
    front.behind.orchestrator.script = [accepted(), delta(2, 'a "quoted"\nline'), done(3)]
    over_http = blocks_of((await client.post("/v1/answers", json={"question": "Why?"})).text)
    async with opened(front) as socket:
        await say(socket, "ask", question="Why?", request_id="r-1", idempotency_key="k-1")
        texts = await heard_until(socket, "done", "error")

    assert [(text["type"], text["id"], text["data"]) for text in texts] == [
        (block["event"], int(block["id"]), block["data"]) for block in over_http
    ]
    assert {(text["answer_id"], text["request_id"]) for text in texts} == {(ANSWER, "r-1")}
    request, principal = front.behind.seen.last("Answer")
    assert (request.idempotency_key, request.cancel_on_disconnect, principal.user) == ("k-1", False, "ada")


async def test_several_answers_share_a_socket_and_each_ends_once(front: Front) -> None:
    """Five asks, one of which fails in the middle of nothing; none waits for another."""
    front.behind.orchestrator.script = [accepted(), delta(2, "x"), done(3)]
    async with opened(front) as socket:
        for number in range(5):
            await say(socket, "ask", question="Why?", request_id=str(number))
        ends: list[str] = []
        while len(ends) < 5:
            text = await heard(socket)
            if text["type"] in ("done", "error"):
                ends.append(text["request_id"])
        await say(socket, "ping", request_id="p")
        assert await heard(socket) == {"type": "pong", "request_id": "p"}

    assert sorted(ends) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ModelOverloaded("busy", provider="p"), "error"), (AnswerCancelled("stopped"), "cancelled")],
    ids=["error", "cancelled"],
)
async def test_an_answer_that_fails_ends_with_its_problem(front: Front, error: DomainError, kind: str) -> None:
    """After events, and instead of any; the socket serves on."""
    async with opened(front) as socket:
        for script in ([accepted(), error], [error], [accepted()]):
            front.behind.orchestrator.script = script
            await say(socket, "ask", question="Why?", request_id="r")
            texts = await heard_until(socket, "done", "error", "cancelled")
            expected = kind if error in script else "error"
            assert (texts[-1]["type"], texts[-1]["request_id"], len(texts)) == (expected, "r", len(script) if error in script else 2)
            assert texts[-1]["data"]["reason"] == (error.reason if error in script else "ANSWER_INTERRUPTED")


async def test_resume_sends_the_rest_and_says_when_there_is_none(front: Front) -> None:
    """`end` is what 204 is over HTTP."""
    front.behind.orchestrator.resumed = [delta(8, "x"), done(9)]
    async with opened(front) as socket:
        await say(socket, "resume", answer_id=ANSWER, after=7)
        assert [text["id"] for text in await heard_until(socket, "done")] == [8, 9]
        front.behind.orchestrator.resumed = []
        await say(socket, "resume", answer_id=ANSWER, after=9)
        assert await heard(socket) == {"type": "end", "answer_id": ANSWER, "request_id": ""}

    assert front.behind.seen.last("ResumeAnswer")[0].after_sequence == 9


async def test_a_persons_word_on_a_tool_call_is_a_message_like_any_other(front: Front) -> None:
    """Allowed or not, the orchestrator hears exactly that; an answer of others is as unknown as over HTTP; a word without one is none."""
    async with opened(front) as socket:
        for allowed in (True, False):
            await say(socket, "confirm", answer_id=ANSWER, call_id="c1", allowed=allowed, request_id="w")
            said = {"call_id": "c1", "was_waiting": True}
            assert await heard(socket) == {"type": "confirm", "answer_id": ANSWER, "request_id": "w", "data": said}
            request, principal = front.behind.seen.last("ConfirmToolCall")
            assert (request.answer_id, request.call_id, request.allowed, principal.user) == (ANSWER, "c1", allowed, "ada")
        await say(socket, "confirm", answer_id="unknown", call_id="c1", allowed=True)
        assert (await heard(socket))["data"]["reason"] == "NOT_FOUND"
        await say(socket, "confirm", answer_id=ANSWER, call_id="c1")
        assert (await heard(socket))["data"]["field"] == "allowed"
    assert front.behind.seen.count("ConfirmToolCall") == 3


async def test_a_socket_that_is_full_of_answers_still_takes_a_word_about_them(front: Front) -> None:
    """Else what fills it could be ended by nobody."""
    front.behind.orchestrator.script = [accepted(), forever]
    async with opened(front) as socket:
        for _ in range(CALLS_MAX):
            await say(socket, "ask", question="Why?")
            assert (await heard(socket))["type"] == "accepted"
        await say(socket, "ask", question="Why?")
        assert (await heard(socket))["data"]["reason"] == "OVERLOADED"
        await say(socket, "confirm", answer_id=ANSWER, call_id="c1", allowed=False)
        assert (await heard(socket))["type"] == "confirm"
        await say(socket, "cancel", answer_id=ANSWER)
        assert (await heard(socket))["type"] == "cancel"


async def test_cancel_asks_the_orchestrator_and_leaving_does_not(front: Front) -> None:
    """Leaving ends our call alone; what becomes of the answer is for its owner."""
    front.behind.orchestrator.script = [accepted(), forever]
    async with opened(front) as socket:
        await say(socket, "ask", question="Why?")
        await heard(socket)
        await say(socket, "cancel", answer_id=ANSWER, request_id="c")
        assert await heard(socket) == {"type": "cancel", "answer_id": ANSWER, "request_id": "c", "data": {"was_running": True}}
        await say(socket, "cancel", answer_id="unknown")
        assert (await heard(socket))["data"]["status"] == 404
    await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)

    assert front.behind.seen.count("CancelAnswer") == 2


async def test_without_a_credential_the_handshake_is_refused_with_a_problem(front: Front) -> None:
    """401 as over HTTP; a path that is not offered is 404."""
    for path, headers, status in (
        (PATH, {}, 401),
        (PATH, {"authorization": "Bearer x.y.z"}, 401),
        (f"{PATH}?token=x", {"authorization": f"Bearer {front.token()}"}, 400),
        (PATH, {"authorization": f"Bearer {front.token(roles=())}"}, 403),
        ("/healthz", {}, 404),
        ("/", {}, 404),
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with connect(f"ws://127.0.0.1:{front.http_port}{path}", additional_headers=headers, proxy=None):
                pass
        response = caught.value.response
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
        assert json.loads(response.body)["status"] == status


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1.evil.example", "null", ""])
async def test_a_page_of_others_cannot_use_the_cookie(origin: str) -> None:
    """A credential that is not in a header is a cookie, and then the origin decides, before any message."""

    async def nothing(*_: Any) -> Any: ...

    def handshake(**headers: str) -> Exchange:
        pairs = [(name.encode(), value.encode()) for name, value in {"host": "127.0.0.1:8080", **headers}.items()]
        return Exchange({"method": "GET", "headers": pairs}, nothing, nothing, body_stall_s=1, write_stall_s=1)

    with pytest.raises(NotAllowed):
        refuse_foreign_page(handshake(cookie="session=x", origin=origin))
    refuse_foreign_page(handshake(cookie="session=x", origin="http://127.0.0.1:8080"))
    refuse_foreign_page(handshake(authorization="Bearer x", origin=origin))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("", "body"),
        ("{", "body"),
        ("[]", "body"),
        ('{"type": "run"}', "type"),
        ('{"question": "?"}', "type"),
        ('{"type": "ask"}', "question"),
        ('{"type": "ask", "question": "?", "user": "eve"}', "user"),
        ('{"type": "ask", "question": " "}', "question"),
        ('{"type": "ask", "question": "?", "stream": false}', "stream"),
        ('{"type": "ask", "question": "?", "idempotency_key": "\\n"}', "idempotency_key"),
        ('{"type": "resume", "answer_id": "a", "after": -1}', "after"),
        ('{"type": "ask", "question": ' + "[" * 60_000, "question"),
        (b"binary", "message"),
    ],
)
async def test_a_bad_message_is_an_error_that_names_its_field(front: Front, message: str | bytes, field: str) -> None:
    """And the socket serves on; nothing behind the gateway hears of it."""
    async with opened(front) as socket:
        await socket.send(message)
        text = await heard(socket)
        await say(socket, "ping")
        assert (await heard(socket))["type"] == "pong"

    assert (text["type"], text["data"]["reason"], text["data"]["field"]) == ("error", "REQUEST_INVALID", field)
    assert front.behind.seen.count("Answer") == 0


async def raw_socket(port: int, token: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open socket whose bytes are the test's own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"GET {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    writer.write(f"{head}sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer


def text_head(length: int) -> bytes:
    """What a masked text of so many bytes begins with; the mask is 0, so that the text itself is sent as it is."""
    return b"\x81\xff" + length.to_bytes(8, "big") + bytes(4)


async def test_a_message_above_the_bound_ends_the_socket(front: Front) -> None:
    """1009, from its length alone."""
    reader, writer = await raw_socket(front.http_port, front.token())
    writer.write(text_head(bodies.ANSWER_BYTES_MAX + 1))
    async with asyncio.timeout(5):
        closed = await reader.readexactly(4)
    writer.close()

    assert (closed[0], int.from_bytes(closed[2:], "big")) == (0x88, 1009)


PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(4_900_000)).decode()


async def test_an_ask_may_bring_what_it_may_over_http(front: Front) -> None:
    """Pictures and tools; what is large without pictures is refused as over HTTP, and the socket serves on."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    pictures = [{"media_type": "image/png", "data": PICTURE}] * 2
    tools = [{"name": f"t{number}", "description": "x" * 4000, "input_schema": {"type": "object"}} for number in range(60)]
    async with opened(front) as socket:
        await say(socket, "ask", request_id="p", question="?", images=pictures, tools=tools)
        ends = [(await heard_until(socket, "done", "error"))[-1]]
        asked = front.behind.seen.last("Answer")[0]
        await say(socket, "ask", request_id="q", question="x" * (1 << 20))
        ends += [(await heard_until(socket, "done", "error"))[-1]]
        await say(socket, "ask", question="?")
        ends += [(await heard_until(socket, "done", "error"))[-1]]

    assert [end["type"] for end in ends] == ["done", "error", "done"]
    assert (ends[1]["data"]["reason"], ends[1]["data"]["status"]) == ("PAYLOAD_TOO_LARGE", 413)
    assert ([len(image.data) for image in asked.images], len(asked.tools)) == ([4_900_008] * 2, 60)


async def test_what_is_under_way_on_a_socket_is_bounded_in_bytes(front: Front) -> None:
    """Two of the largest do not fit; small ones do beside one; its end makes room."""
    front.behind.orchestrator.script = [accepted(), forever]
    pictures = [{"media_type": "image/png", "data": PICTURE}] * 2
    async with opened(front) as socket:
        await say(socket, "ask", request_id="first", question="?", images=pictures)
        assert (await heard(socket))["type"] == "accepted"
        await say(socket, "ask", request_id="second", question="?", images=pictures)
        refused = await heard(socket)
        front.behind.orchestrator.script = [accepted(), done(2)]
        await say(socket, "ask", request_id="small", question="?")
        assert (await heard_until(socket, "done", "error"))[-1]["type"] == "done"

    assert (refused["type"], refused["request_id"], refused["data"]["reason"]) == ("error", "second", "OVERLOADED")


async def test_a_client_that_is_busy_with_a_long_message_need_not_answer_pings(
    front: Front, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot before its end. One that sends next to nothing is closed as one that is silent."""
    monkeypatch.setattr(http_listener, "SOCKET_PING_S", 0.2)
    front.behind.orchestrator.script = [accepted(), done(2)]
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks), TAILRACE_GATEWAY_LOOP_LAG_MAX_S="60")
    long = json.dumps({"type": "ask", "question": "?", "images": [{"media_type": "image/png", "data": PICTURE[: 1 << 20]}]}).encode()
    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        port = service.server.http.port
        reader, writer = await raw_socket(port, front.token())
        idle_reader, idle_writer = await raw_socket(port, front.token())
        idle_writer.write(text_head(len(long)) + b"{")
        writer.write(text_head(len(long)))
        for start in range(0, len(long), 1 << 16):
            writer.write(long[start : start + (1 << 16)])
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert b'"type":"accepted"' in await reader.readuntil(b'"data"')
            idle = await idle_reader.read()
        for one in (writer, idle_writer):
            one.close()
        await service.server.stop(0, 0.2)

    assert b"keepalive ping timeout" in idle


async def test_one_user_cannot_take_all_sockets(front: Front) -> None:
    """The handshake of one too many is refused with a problem; others still have theirs, and one that is closed makes room."""
    mine = {"authorization": f"Bearer {front.token(unique_user())}"}
    async with contextlib.AsyncExitStack() as sockets:
        held = [await sockets.enter_async_context(opened(front, **mine)) for _ in range(16)]
        with pytest.raises(InvalidStatus) as caught:
            async with opened(front, **mine):
                pass
        async with opened(front, authorization=f"Bearer {front.token(unique_user())}") as other:
            await say(other, "ping")
            assert (await heard(other))["type"] == "pong"
        await held[0].close()

        async def free() -> bool:
            with contextlib.suppress(InvalidStatus):
                async with opened(front, **mine):
                    return True
            return False

        assert await until(free)

    problem = json.loads(caught.value.response.body or b"")
    assert (problem["status"], problem["limit_kind"], problem["limit"]) == (429, "sockets", "16")


async def test_calls_on_one_socket_are_bounded(front: Front) -> None:
    """The one too many is refused, the others go on."""
    front.behind.orchestrator.script = [accepted(), forever]
    async with opened(front) as socket:
        for _ in range(CALLS_MAX + 1):
            await say(socket, "ask", question="Why?")
        texts = [await heard(socket) for _ in range(CALLS_MAX + 1)]

    assert sorted(text["type"] for text in texts) == ["accepted"] * CALLS_MAX + ["error"]
    assert [text["data"]["reason"] for text in texts if text["type"] == "error"] == ["OVERLOADED"]


async def test_every_ask_counts_in_the_plans_limit(front: Front) -> None:
    """As over HTTP, in the same window; the first text says how it stands. Resuming does not count."""
    front.behind.ledger.requests_per_minute = 2
    front.behind.orchestrator.script = front.behind.orchestrator.resumed = [accepted(), done(2)]
    user = unique_user()
    async with opened(front, authorization=f"Bearer {front.token(user)}") as socket, front.client(user) as client:
        assert (await client.post("/v1/answers", json={"question": "?"})).status_code == 200
        firsts, ends = [], []
        for kind in ("ask", "ask", "resume"):
            await say(socket, kind, **({"question": "?"} if kind == "ask" else {"answer_id": ANSWER}))
            texts = await heard_until(socket, "done", "error")
            firsts.append(texts[0])
            ends.append(texts[-1])

    assert [end["type"] for end in ends] == ["done", "error", "done"]
    assert [first.get("limits", {}).get("x-ratelimit-remaining-requests") for first in firsts] == ["0", "0", None]
    assert (ends[1]["data"]["reason"], ends[1]["data"]["status"]) == ("RATE_LIMITED", 429)


@pytest.mark.parametrize(
    ("message", "request_id"),
    [
        ('{"type": "ask", "question": 1, "request_id": "r-1"}', "r-1"),
        ('{"type": "ask", "question": " ", "request_id": "r-2"}', "r-2"),
        ('{"type": "run", "request_id": "r-3"}', "r-3"),
        ('{"type": "ask", "request_id": 7}', ""),
        ('{"type": "ask", "request_id": "%s"}' % ("r" * 129), ""),
        ("[", ""),
        (b"binary", ""),
    ],
)
async def test_a_message_that_cannot_be_read_counts_as_a_request_and_keeps_its_id(
    front: Front, message: str | bytes, request_id: str
) -> None:
    """Else it would be a way to ask without end, and nobody would know which ask was meant."""
    front.behind.ledger.requests_per_minute = 1
    async with opened(front, authorization=f"Bearer {front.token(unique_user())}") as socket:
        await socket.send(message)
        first = await heard(socket)
        await socket.send(message)
        second = await heard(socket)

    assert [text["data"]["reason"] for text in (first, second)] == ["REQUEST_INVALID", "RATE_LIMITED"]
    assert [text["request_id"] for text in (first, second)] == [request_id] * 2


async def test_a_key_that_was_revoked_asks_nothing_more(front: Front) -> None:
    """An open socket is no way around the end of a credential."""
    front.behind.orchestrator.script = [accepted(), done(2)]
    front.behind.ledger.keys[key_named("ws")] = Principal("acme", "robot", frozenset({"service"}), "k-ws")
    async with opened(front, **{"x-api-key": key_named("ws")}) as socket:
        del front.behind.ledger.keys[key_named("ws")]

        async def refused() -> Any:
            await say(socket, "ask", question="?")
            return (await heard_until(socket, "done", "error"))[-1]["data"].get("reason")

        assert await until(refused, 10) == "NOT_AUTHENTICATED"


async def test_a_slow_reader_is_let_go_and_its_answer_goes_on(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """It takes nothing for the stall time; the stream behind ends as a disconnect."""
    piece = delta(2, "x" * 60_000)
    front.behind.orchestrator.script = [accepted(), *[piece] * 500, done(3)]
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks), TAILRACE_WRITE_STALL_S="0.3")
    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plug, ("127.0.0.1", service.server.http.port))
        async with connect(
            f"ws://127.0.0.1:{service.server.http.port}{PATH}",
            sock=plug,
            additional_headers={"authorization": f"Bearer {front.token()}"},
            proxy=None,
            max_queue=1,
            close_timeout=1,
        ) as slow:
            await say(slow, "ask", question="?")
            await asyncio.wait_for(front.behind.seen.cancelled.wait(), 10)
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    await slow.recv()
        await service.server.stop(0, 0)

    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1013
    assert front.behind.seen.count("CancelAnswer") == 0


async def test_draining_tells_the_client_to_resume_and_closes_with_1012(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """What can end within the grace ends with its receipt; what cannot ends with an error, once."""
    release = asyncio.Event()
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks))
    for script, grace_s, end in (([accepted(), release.wait, done(2)], 5, "done"), ([accepted(), forever], 0.2, "error")):
        front.behind.orchestrator.script = script
        async with build(settings) as service, started(service, "127.0.0.1"):
            assert isinstance(service.server, EdgeServer)
            async with opened(front, port=service.server.http.port) as idle, opened(front, port=service.server.http.port) as socket:
                await say(socket, "ask", question="?", request_id="r")
                await heard(socket)
                stopping = asyncio.create_task(service.server.stop(0, grace_s))
                assert (await heard(idle))["type"] == "draining"
                assert (await heard(socket))["type"] == "draining"
                await say(socket, "ask", question="?", request_id="late")
                late = await heard(socket)
                release.set()
                last = await heard(socket)
                codes = []
                for one in (idle, socket):
                    with pytest.raises(ConnectionClosed) as caught:
                        await heard(one)
                    codes.append(caught.value.rcvd.code if caught.value.rcvd else None)
                await asyncio.wait_for(stopping, 5)

        assert (late["request_id"], late["data"]["reason"]) == ("late", "UNAVAILABLE")
        assert (last["type"], last["request_id"]) == (end, "r")
        assert codes == [1012, 1012]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"GET /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"GET /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nx: " + b"a" * 9000 + b"\r\n\r\n",
    ],
    ids=["post", "no key", "many headers", "long header"],
)
async def test_a_broken_handshake_is_answered_and_closed(front: Front, request_bytes: bytes) -> None:
    """4xx at once: no connection is left open in silence."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    writer.write(request_bytes)
    async with asyncio.timeout(3):
        said = await reader.read()
    writer.close()

    assert said.split()[1][:1] == b"4"
