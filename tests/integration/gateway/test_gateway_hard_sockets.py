"""Sockets that mean harm, and doors that are shut: slow bodies, too many connections, many parts, TLS, and what strangers may see."""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.config import SettingsError
from services.chassis.lifecycle import started
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.gateway import http_listener
from services.gateway.http_listener import HttpListener
from services.gateway.rpc import SERVICE
from services.gateway.wiring import EdgeServer, build
from services.local.processes import grpc_health
from services.local.stores import Valkey, free_port
from tailrace.gateway.v1.gateway_service_pb2_grpc import GatewayServiceStub
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tests.certificates import Authority
from tests.integration.gateway.backends import ANSWER, KEY, accepted, done
from tests.integration.gateway.conftest import Front, problem_of, settings_for, unique_user, until


@contextlib.asynccontextmanager
async def gateway(front: Front, valkey: Valkey, state_dir: Path, **environment: str) -> AsyncIterator[EdgeServer]:
    """A gateway of the test's own in front of the same services."""
    # The loop of the tests lags by itself; that is not what they are about.
    fixed = {"TAILRACE_JWKS_FILE": str(front.jwks), "TAILRACE_GATEWAY_LOOP_LAG_MAX_S": "60"}
    settings = settings_for(front.behind, state_dir, valkey.url, **{**fixed, **environment})
    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        try:
            yield service.server
        finally:
            await service.server.stop(0, 0.2)


async def test_a_body_that_drips_is_cut_by_its_total_time(front: Front) -> None:
    """A byte every tenth of the stall time is never silent, and yet 408 comes soon after the stall time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    head = f"POST /v1/search HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.token()}\r\ncontent-length: 100000\r\n\r\n"
    writer.write(head.encode())

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)

    began = time.monotonic()
    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(5):
            status = await reader.readline()
    finally:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.close()

    assert status.split()[1] == b"408"
    assert 0.4 < time.monotonic() - began < 2  # the stall time of this gateway is 0.5 s


@pytest.mark.parametrize(
    ("declared", "sent", "more", "goes_on"),
    [
        pytest.param(2, b"{}", "", True, id="all of it came"),
        pytest.param(100_000, b"{}", "", False, id="some of it came"),
        pytest.param(200_000, b" " * 200_000, "", False, id="more came than is taken"),
        pytest.param(2, b"", "expect: 100-continue\r\n", False, id="the client waits to be told"),
    ],
)
async def test_a_refused_request_keeps_its_connection_if_its_body_had_come(
    front: Front, declared: int, sent: bytes, more: str, goes_on: bool
) -> None:
    """A body that is still to come is not waited for, and never asked for: the refusal comes at once, and closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    writer.write(f"POST /v1/answers HTTP/1.1\r\nhost: x\r\n{more}content-length: {declared}\r\n\r\n".encode() + sent)
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 ")
        assert (b"connection: close" not in head) == goes_on
        if goes_on:
            await reader.readuntil(b"}")
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_a_download_that_nobody_takes_is_cut(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """The call behind it ends after the stall time, and the connection is closed in the middle of the file."""
    session = ledger.Session(session_id="s-1", title="x" * 60_000)
    front.behind.ledger.exported = [ledger.ExportSessionsResponse(session=session)] * 2000
    async with gateway(front, valkey, tmp_path, TAILRACE_WRITE_STALL_S="0.3") as server:
        with contextlib.closing(socket.socket()) as plug:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plug.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(plug, ("127.0.0.1", server.http.port))
            head = f"GET /v1/sessions:export HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.token()}\r\n\r\n"
            await loop.sock_sendall(plug, head.encode())
            async with asyncio.timeout(5):
                await front.behind.seen.cancelled.wait()
                read = bytearray()
                with contextlib.suppress(ConnectionResetError):
                    while piece := await loop.sock_recv(plug, 1 << 16):
                        read += piece

    assert read.startswith(b"HTTP/1.1 200 ")
    assert b'"complete":true' not in read


async def test_connections_of_one_peer_are_bounded_and_given_back(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """The third is refused; once another has left there is room again, also when it had become a WebSocket."""
    async with gateway(front, valkey, tmp_path, TAILRACE_HTTP_CONNECTIONS_PER_PEER_MAX="2") as server:

        async def status() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.http.port)
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            said = await reader.read()
            writer.close()
            return said.split()[1]

        _, first = await asyncio.open_connection("127.0.0.1", server.http.port)
        reader, second = await asyncio.open_connection("127.0.0.1", server.http.port)
        handshake = "GET /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        key = f"sec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nauthorization: Bearer {front.token()}\r\n\r\n"
        second.write((handshake + key).encode())
        assert (await reader.readline()).split()[1] == b"101"
        assert await status() == b"429"
        second.close()
        async with asyncio.timeout(5):
            while (said := await status()) != b"200":  # each asks anew on a connection of its own
                pass
        first.close()

    assert said == b"200"


@pytest.mark.parametrize(
    ("sent", "connections_max", "status", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 10, 400, "REQUEST_INVALID"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 10, 400, "REQUEST_INVALID"),
        (b"GET /v1/answers/ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 10, 400, "REQUEST_INVALID"),
        (b"", 0, 503, "OVERLOADED"),
    ],
    ids=["not http", "long headers", "no handshake", "no room"],
)
async def test_what_is_refused_before_it_is_a_request_is_a_problem_with_ids(
    sent: bytes, connections_max: int, status: int, reason: str
) -> None:
    """Also what the HTTP server itself cannot read; then the connection ends."""

    async def nowhere(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nothing of this reaches the application")

    listener = HttpListener(nowhere, connections_max=connections_max)
    port = await listener.start("127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        async with asyncio.timeout(5):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    finally:
        await listener.stop(1)
    line, *fields = head.decode().split("\r\n")
    headers = [(name, value) for name, _, value in (field.partition(": ") for field in fields)]
    response = httpx.Response(int(line.split()[1]), headers=headers, content=body)

    problem = problem_of(response, status, reason)
    assert len(problem["request_id"]) == 32
    assert (response.headers["connection"], int(response.headers["content-length"])) == ("close", len(body))
    assert ("retry-after" in response.headers) is (status == 503)


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a listener with `app`."""
    listener = HttpListener(app)
    reader, writer = await asyncio.open_connection("127.0.0.1", await listener.start("127.0.0.1", 0))
    try:
        yield reader, writer
    finally:
        writer.close()
        await listener.stop(1)


async def test_grpc_connections_of_one_peer_are_bounded_too(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """The newest go; who was there before is served on."""
    async with gateway(front, valkey, tmp_path, TAILRACE_GATEWAY_CONNECTIONS_PER_PEER_MAX="4") as server:
        metadata = (("authorization", f"Bearer {front.token()}"),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = GatewayServiceStub(channel)
            await stub.GetOperation(ledger.GetOperationRequest(operation_id=ANSWER), metadata=metadata)
            peers = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(12)]
            try:

                async def cut() -> bool:
                    return sum(reader.at_eof() for reader, _ in peers) >= 9

                reading = [asyncio.create_task(reader.read()) for reader, _ in peers]
                await until(cut, 20)
                await stub.GetOperation(ledger.GetOperationRequest(operation_id=ANSWER), metadata=metadata)
            finally:
                for _, writer in peers:
                    writer.close()
                await asyncio.gather(*reading, return_exceptions=True)


async def test_a_trailer_is_no_header() -> None:
    """What comes after a body was seen by no proxy as a credential, an origin or a host, and is none."""
    names: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        names.extend(name for name, _ in scope["headers"])
        await empty(scope, receive, send)

    async with listening(app) as (reader, writer), asyncio.timeout(30):
        head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"2\r\nab\r\n0\r\nauthorization: Bearer late\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")

    assert names == [b"host", b"transfer-encoding"]


async def empty(scope: Any, receive: Any, send: Any) -> None:
    """Answers without a look at the body, and takes every socket."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        return
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(
    ("head", "late"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n", b"1"),
    ],
    ids=["an empty line", "a chunk", "a byte"],
)
async def test_what_trickles_in_after_a_response_is_no_reason_to_keep_the_connection(
    head: bytes, late: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request must follow in the time that headers have, or the connection would stay for ever without one."""
    monkeypatch.setattr(http_listener, "HEADERS_TIMEOUT_S", 0.3)
    async with listening(empty) as (reader, writer):
        writer.write(head)
        async with asyncio.timeout(30):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(late)

            assert await reader.read() == b""


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: "], ids=["nothing", "headers"])
async def test_headers_that_drip_or_never_come_are_cut(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a byte of them comes: their time is that of all of them together."""
    monkeypatch.setattr(http_listener, "HEADERS_TIMEOUT_S", 0.5)
    async with listening(empty) as (reader, writer):
        writer.write(begun)

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while begun:
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        try:
            async with asyncio.timeout(30):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)


async def test_a_socket_on_a_connection_that_had_a_request_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer of the request before cuts it."""
    monkeypatch.setattr(http_listener, "HEADERS_TIMEOUT_S", 0.3)
    handshake = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    async with listening(empty) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(30):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + handshake + b"\r\n")
            status = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 1.0)

    assert status == b"101"


async def test_ten_thousand_parts_are_too_many(client: httpx.AsyncClient) -> None:
    """413 or 400, never more work than the bound."""
    part = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await client.post("/v1/documents", content=part * 10_000 + b"--b--\r\n", headers=headers)
    # The stream has begun by then, so the refusal is its last event.
    assert response.status_code in (200, 400, 413)
    assert "PAYLOAD_TOO_LARGE" in response.text or "REQUEST_INVALID" in response.text


async def test_metrics_and_the_reasons_of_readiness_have_a_port_of_their_own(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """Strangers see whether it is ready and nothing else; and the operations port serves no API."""
    async with gateway(front, valkey, tmp_path, TAILRACE_GATEWAY_OPERATIONS_PORT=str(free_port())) as server:
        assert server.operations is not None
        async with httpx.AsyncClient(trust_env=False) as http:
            outside, inside = (f"http://127.0.0.1:{listener.port}" for listener in (server.http, server.operations))
            problem_of(await http.get(f"{outside}/metrics"), 404, "NOT_FOUND")
            assert (await http.get(f"{outside}/readyz")).json().keys() == {"ready"}
            assert "tailrace_gateway_requests_total" in (await http.get(f"{inside}/metrics")).text
            assert {"dependencies", "services"} <= (await http.get(f"{inside}/readyz")).json().keys()
            problem_of(await http.get(f"{inside}/v1/models"), 404, "NOT_FOUND")


async def test_in_production_metrics_are_not_served_to_strangers(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """Also when nobody named an operations port."""
    production = {"TAILRACE_ENV": "production", "TAILRACE_JWT_ISSUER": "https://issuer.example"}
    async with gateway(front, valkey, tmp_path, **production) as server, httpx.AsyncClient(trust_env=False) as http:
        base = f"http://127.0.0.1:{server.http.port}"
        problem_of(await http.get(f"{base}/metrics"), 404, "NOT_FOUND")
        assert (await http.get(f"{base}/readyz")).json().keys() == {"ready"}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(b"")
            health = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())

    assert set(health.statuses) == {"", SERVICE.full_name}
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_both_fronts_speak_tls_when_they_have_certificates(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """Outside callers need none of their own, plaintext is not answered; the signed principal they bring is still not looked at."""
    authority = Authority(tmp_path)
    files = authority.issue("edge")
    web = {"TAILRACE_HTTP_TLS_CERT_FILE": str(files.certificate), "TAILRACE_HTTP_TLS_KEY_FILE": str(files.key)}
    trusted = ssl.create_default_context(cafile=str(authority.file))
    async with gateway(front, valkey, tmp_path, **files.environment, **web) as server:
        async with httpx.AsyncClient(trust_env=False, verify=trusted) as http:
            assert (await http.get(f"https://127.0.0.1:{server.http.port}/healthz")).status_code == 200
            with pytest.raises(httpx.TransportError):
                await http.get(f"http://127.0.0.1:{server.http.port}/healthz")
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        forged = Passport(KEY).sign(Principal("globex", "eve", frozenset({"admin"})))
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials) as channel:
            call = GatewayServiceStub(channel).Answer(orchestrator.AnswerRequest(question="?"), metadata=forged)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert not await grpc_health(f"127.0.0.1:{server.port}")()

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["nothing", "half a ClientHello"])
async def test_a_tls_handshake_that_does_not_end_is_cut_when_headers_would_be(
    front: Front, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """Before it ends there is no request whose headers could be waited for."""
    monkeypatch.setattr(http_listener, "HEADERS_TIMEOUT_S", 1.0)
    authority = Authority(tmp_path)
    files = authority.issue("edge")
    web = {"TAILRACE_HTTP_TLS_CERT_FILE": str(files.certificate), "TAILRACE_HTTP_TLS_KEY_FILE": str(files.key)}
    trusted = ssl.create_default_context(cafile=str(authority.file))
    async with gateway(front, valkey, tmp_path, **web) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http.port)
        writer.write(said)
        async with asyncio.timeout(10), httpx.AsyncClient(trust_env=False, verify=trusted) as http:
            assert (await http.get(f"https://127.0.0.1:{server.http.port}/healthz")).status_code == 200
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()


async def test_a_call_goes_from_front_to_back_over_mutual_tls(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """The services behind take nobody else's calls, and the gateway takes nobody else for them."""
    authority, foreign = Authority(tmp_path), Authority(tmp_path, "foreign")
    gate, stranger = authority.issue("gate"), foreign.issue("stranger", believes=authority)
    behind = front.behind
    behind.orchestrator.script = [accepted(), done(2)]
    statuses = []
    try:
        for name in list(behind.servers):
            await behind.stop(name)
            await behind.start(name, authority.issue(name))
        for files in (gate.environment, stranger.environment, {}):
            async with gateway(front, valkey, tmp_path, **files) as server:
                headers = {"authorization": f"Bearer {front.token(unique_user())}"}
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", headers=headers, trust_env=False) as http:
                    statuses.append((await http.post("/v1/answers", json={"question": "?"})).status_code)
    finally:
        for name in list(behind.servers):
            await behind.stop(name)
            await behind.start(name)

        async with front.client() as client:  # the gateway that all tests share finds them again

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200 and (await client.get("/v1/models")).status_code == 200

            await until(ready)

    assert statuses == [200, 503, 503]


@pytest.mark.parametrize("name", ["TAILRACE_HTTP_TLS_CERT_FILE", "TAILRACE_HTTP_TLS_KEY_FILE"])
def test_half_a_certificate_of_the_http_port_says_what_is_missing(front: Front, tmp_path: Path, name: str) -> None:
    files = Authority(tmp_path).issue("edge")
    path = {"TAILRACE_HTTP_TLS_CERT_FILE": files.certificate, "TAILRACE_HTTP_TLS_KEY_FILE": files.key}
    missing = next(other for other in path if other != name)

    with pytest.raises(SettingsError, match=f"missing: {missing}"):
        settings_for(front.behind, tmp_path, "redis://127.0.0.1:1/0", **{name: str(path[name])})


async def slow_sockets(port: int, count: int) -> list[asyncio.StreamWriter]:
    """Connections that have begun a request and do not go on."""
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/answers HTTP/1.1\r\nhost: x\r\nx-slow: ")
        writers.append(writer)
    return writers


async def p99_ms(client: httpx.AsyncClient, count: int = 150) -> float:
    """The 99th percentile of `count` requests, one after the other."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        response = await client.get("/v1/models")
        assert response.status_code == 200, response.text
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times)[int(count * 0.99) - 1]


@pytest.mark.slow
async def test_slow_sockets_do_not_slow_the_others(front: Front, client: httpx.AsyncClient) -> None:
    """Hundreds of half requests cost nobody anything. (A tenth of the real attack; the bound has room for a busy machine.)"""
    await p99_ms(client, 50)
    alone = await p99_ms(client)
    writers = await slow_sockets(front.http_port, 200)
    beside = await p99_ms(client)
    for writer in writers:
        writer.close()

    assert beside < max(2 * alone, alone + 20)
