"""The rough edges: limits over the wire, the same calls over gRPC, hostile input, and how the process stops."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from services.chassis.errors import ModelOverloaded
from services.chassis.lifecycle import started
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.chassis.status import from_rpc_error
from services.gateway.wiring import EdgeServer, build
from services.local.stores import Valkey
from tailrace.gateway.v1.gateway_service_pb2_grpc import GatewayServiceStub
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval
from tests.fakes.api_keys import key_named
from tests.integration.gateway.backends import ANSWER, KEY, accepted, delta, done, forever
from tests.integration.gateway.conftest import Front, problem_of, settings_for, unique_user, until
from tests.integration.gateway.test_gateway_answers import blocks_of

JSON = {"content-type": "application/json"}


async def test_the_plans_limit_holds_and_says_when_to_come_back(front: Front) -> None:
    """429 with Retry-After and the window's headers; other routes are not counted."""
    front.behind.ledger.requests_per_minute = 3
    front.behind.orchestrator.script = [accepted(), done(2)]
    async with front.client(unique_user()) as client:
        good = [await client.post("/v1/answers", json={"question": "Why?"}) for _ in range(3)]
        refused = await client.post("/v1/search", json={"query": "q"})
        free = await client.get("/v1/sessions")

    assert [response.headers["x-ratelimit-remaining-requests"] for response in good] == ["2", "1", "0"]
    problem = problem_of(refused, 429, "RATE_LIMITED")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert (refused.headers["x-ratelimit-limit-requests"], problem["limit"], problem["window_ms"]) == ("3", "3", "60000")
    assert free.status_code == 200


async def test_both_fronts_share_one_limit(front: Front) -> None:
    """What is asked over gRPC counts over HTTP."""
    front.behind.ledger.requests_per_minute = 1
    user = unique_user()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel, front.client(user) as client:
        metadata = (("authorization", f"Bearer {front.token(user)}"),)
        search = GatewayServiceStub(channel).Search
        assert [hit async for hit in search(retrieval.SearchRequest(query="q"), metadata=metadata)] == []
        problem_of(await client.post("/v1/search", json={"query": "q"}), 429, "RATE_LIMITED")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await search(retrieval.SearchRequest(query="q"), metadata=metadata).read()

    error = from_rpc_error(caught.value, "gateway")
    assert (error.reason, error.retry_after_ms is not None) == ("RATE_LIMITED", True)


async def test_every_call_works_over_grpc_for_the_tokens_principal(front: Front) -> None:
    """Messages pass as they are; a principal that the caller claims is ignored."""
    behind = front.behind
    behind.orchestrator.script = [accepted(), delta(2, "x"), done(3)]
    behind.orchestrator.resumed = [done(3)]
    forged = Passport(KEY).sign(Principal("globex", "eve", frozenset({"admin"})))
    metadata = (("authorization", f"Bearer {front.token()}"), *forged)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        stub = GatewayServiceStub(channel)
        events = [event async for event in stub.Answer(orchestrator.AnswerRequest(question="Why?"), metadata=metadata)]
        resumed = stub.ResumeAnswer(orchestrator.ResumeAnswerRequest(answer_id=ANSWER), metadata=metadata)
        assert [event.sequence async for event in resumed] == [3]
        parts = [
            retrieval.IngestDocumentsRequest(header=retrieval.DocumentHeader(title="T")),
            retrieval.IngestDocumentsRequest(content=b"x"),
        ]
        progress = [message.stage async for message in stub.IngestDocuments(iter(parts), metadata=metadata)]
        await stub.CancelAnswer(orchestrator.CancelAnswerRequest(answer_id=ANSWER), metadata=metadata)
        await stub.DeleteDocument(retrieval.DeleteDocumentRequest(document_id="d-1"), metadata=metadata)
        await stub.GetOperation(ledger.GetOperationRequest(operation_id=ANSWER), metadata=metadata)
        for rows in (
            stub.ListDocuments(retrieval.ListDocumentsRequest(), metadata=metadata),
            stub.ListCollections(retrieval.ListCollectionsRequest(), metadata=metadata),
            stub.ListOperations(ledger.ListOperationsRequest(), metadata=metadata),
            stub.QueryUsage(ledger.QueryUsageRequest(), metadata=metadata),
        ):
            assert len([row async for row in rows]) <= 1

    assert events == behind.orchestrator.script
    assert progress == ["received", "parsed", "indexed"]
    called = {name: principal for name, _, principal in behind.seen.calls if name != "GetEntitlements"}
    assert len(called) == 10
    assert {(principal.tenant, principal.user) for principal in called.values()} == {("acme", "ada")}


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Bearer x.y.z"),), (("x-api-key", "trk_unknown"),), (("x-api-key", key_named("unknown")),)]
)
async def test_without_a_good_credential_nothing_is_served_over_grpc(front: Front, metadata: Any) -> None:
    """Health is for everybody, answers are not."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GatewayServiceStub(channel).GetOperation(ledger.GetOperationRequest(operation_id=ANSWER), metadata=metadata)

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_leaving_a_grpc_stream_ends_the_call_behind(front: Front) -> None:
    """As over HTTP."""
    front.behind.orchestrator.script = [accepted(), forever]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        metadata = (("authorization", f"Bearer {front.token()}"),)
        call = GatewayServiceStub(channel).Answer(orchestrator.AnswerRequest(question="Why?"), metadata=metadata)
        await call.read()
        call.cancel()

        await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)


async def test_an_api_key_is_a_credential_of_its_owner(front: Front) -> None:
    """In either header; the ledger is asked by the gateway itself."""
    front.behind.ledger.keys[key_named("robot")] = Principal("acme", "robot", frozenset({"service"}), "k-1")
    for headers in ({"x-api-key": key_named("robot")}, {"authorization": f"Bearer {key_named('robot')}"}):
        async with httpx.AsyncClient(base_url=front.url, headers=headers, trust_env=False) as client:
            assert (await client.get("/v1/sessions")).status_code == 200
    _, principal = front.behind.seen.last("ListSessions")

    assert (principal.user, principal.api_key_id) == ("robot", "k-1")
    assert front.behind.seen.count("ResolveApiKey") == 1


BAD_BODIES: list[tuple[str, bytes, str]] = [
    ("/v1/answers", b"", "body"),
    ("/v1/answers", b"   ", "body"),
    ("/v1/answers", b"[]", "body"),
    ("/v1/answers", b"null", "body"),
    ("/v1/answers", b'{"question":', "body"),
    ("/v1/answers", b'{"question": "\xff"}', "body"),
    ("/v1/answers", b'{"question": "\\ud800"}', "body"),
    ("/v1/answers", b"\xef\xbb\xbf{}", "body"),
    ("/v1/answers", b'{"question": ' + b"[" * 100_000, "question"),
    ("/v1/answers", b'{"question": "?", "output_schema": ' + b'{"a":' * 25 + b"1" + b"}" * 26, "output_schema"),
    ("/v1/answers", b'{"question": "?", "output_schema": ' + b'{"a":' * 9000 + b"1" + b"}" * 9001, "body"),
    ("/v1/answers", b'{"question": "?", "output_schema": [1]}', "output_schema"),
    ("/v1/answers", b'{"question": "?", "tools": [{"name": "a b"}]}', "tools[0].name"),
    ("/v1/answers", b'{"question": "?", "tools": [{"name": "a", "run": "rm"}]}', "tools[0].run"),
    ("/v1/answers", b'{"question": "?", "session_id": "s\\n"}', "session_id"),
    ("/v1/answers", b'{"question": "?", "tier": "\\u0000"}', "tier"),
    ("/v1/answers", b'{"question": "?", "max_output_tokens": 64001}', "max_output_tokens"),
    ("/v1/answers", b'{"question": "?", "user": "eve"}', "user"),
    ("/v1/answers", b'{"QUESTION": "?"}', "QUESTION"),
    ("/v1/search", b'{"query": "?", "limit": 101}', "limit"),
    ("/v1/search", b'{"query": "?", "limit": true}', "limit"),
    ("/v1/search", b'{"query": "' + b"x" * 32_769 + b'"}', "query"),
    ("/v1/search", b'{"query": "?", "neighbours": 6}', "neighbours"),
    ("/v1/search", b'{"query": "?", "more_collections": ["a b"]}', "more_collections[0]"),
    ("/v1/search", b'{"query": "?", "more_collections": [' + b'"a",' * 15 + b'"a"]}', "more_collections"),
    ("/v1/search", b'{"query": "?", "metadata": {"a": 1}}', "metadata"),
    ("/v1/search", b'{"query": "?", "metadata": [' + b'{"key": "a"},' * 16 + b'{"key": "a"}]}', "metadata"),
    ("/v1/search", b'{"query": "?", "metadata": [{"key": ""}]}', "metadata[0].key"),
    ("/v1/search", b'{"query": "?", "metadata": [{"key": "a"}, {"key": "a", "any_of": [null]}]}', "metadata[1].any_of[0]"),
    ("/v1/search", b'{"query": "?", "metadata": [{"key": "a", "at_least": "1"}]}', "metadata[0].at_least"),
    ("/v1/search", b'{"query": "?", "metadata": [{"key": "a", "from": "soon"}]}', "metadata[0].from"),
    ("/v1/search", b'{"query": "?", "metadata": [{"key": "a", "since": "2026-01-01"}]}', "metadata[0].since"),
    ("/v1/documents", b'{"title": "T", "text": "x", "metadata": {"a": [1]}}', "metadata[...]"),
    ("/v1/documents", b'{"title": "' + b"T" * 513 + b'", "text": "x"}', "title"),
    ("/v1/documents", b'{"title": "T", "text": "   "}', "text"),
]


@pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES)
async def test_a_bad_body_names_its_field_and_bound(front: Front, client: httpx.AsyncClient, path: str, body: bytes, field: str) -> None:
    """400; and nothing behind the gateway hears of it."""
    problem = problem_of(await client.post(path, content=body, headers=JSON), 400, "REQUEST_INVALID")

    assert (problem["field"], len(problem["bound"]) > 0) == (field, True)
    assert {name for name, _, _ in front.behind.seen.calls} <= {"GetEntitlements", "IngestDocuments"}
    assert front.behind.retrieval.documents == []


async def test_a_body_above_its_bound_is_refused_by_its_length_alone(front: Front, client: httpx.AsyncClient) -> None:
    """413 whether the length was declared or not."""
    large = b'{"question": "' + b"x" * (1024 * 1024) + b'"}'

    async def pieces() -> Any:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, pieces()):
        problem = problem_of(await client.post("/v1/answers", content=content, headers=JSON), 413, "PAYLOAD_TOO_LARGE")

        assert problem["bound_bytes"] == str(1024 * 1024)


@pytest.mark.parametrize("key", ["k" * 257, "ä"])
async def test_an_idempotency_key_is_short_and_printable(front: Front, client: httpx.AsyncClient, key: str) -> None:
    """It goes into keys of stores."""
    response = await client.post("/v1/answers", json={"question": "?"}, headers={"idempotency-key": key.encode("latin-1")})

    assert problem_of(response, 400, "REQUEST_INVALID")["field"] == "Idempotency-Key"


async def test_naughty_strings_arrive_as_they_are_or_are_refused(front: Front, client: httpx.AsyncClient, data_dir: Path) -> None:
    """In a question, in an answer, in a path; never a 500, and the stream keeps its number of events."""
    strings = json.loads((data_dir / "hostile" / "naughty_strings.json").read_text())
    texts = [text for text in strings if isinstance(text, str)] if isinstance(strings, list) else [str(value) for value in strings.values()]
    front.behind.orchestrator.script = [accepted(), *(delta(number, text) for number, text in enumerate(texts, 2)), done(len(texts) + 2)]

    events = blocks_of((await client.post("/v1/answers", json={"question": "?"})).text)

    assert [event["data"]["text"] for event in events if event["event"] == "delta"] == texts
    front.behind.retrieval.hits = []
    for text in texts[::8]:
        response = await client.post("/v1/search", json={"query": text})
        assert response.status_code in (200, 400), (text, response.text)
        if response.status_code == 200:
            assert front.behind.seen.last("Search")[0].query == text


BROKEN_REQUESTS = [
    b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ncontent-length: 5, 5\r\n\r\nabcde",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd\r\n0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a\x01b: c\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-ab: c\x00d\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-ab : c\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
    b"GET /healthz\r\n\r\n",
    b"GET /healthz HTTP/1.1\nhost: x\n\n",
    b"GET /healthz HTTP/1.1\r\nhost: x\nx-a: b\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.0\r\nhost: x\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/answers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2;a\nb\r\nab\r\n0\r\n\r\n",
    b"get it\r\n\r\n",
]


@pytest.mark.parametrize("request_bytes", BROKEN_REQUESTS, ids=range(len(BROKEN_REQUESTS)))
async def test_broken_http_gets_no_more_than_a_refusal(front: Front, client: httpx.AsyncClient, request_bytes: bytes) -> None:
    """4xx and a closed connection, so that nothing after it can be taken for a request; and the next one is served."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.http_port)
    writer.write(request_bytes + b"GET /healthz HTTP/1.1\r\nhost: smuggled\r\n\r\n")
    try:
        async with asyncio.timeout(15):
            said = await reader.read()
    except ConnectionError:
        said = b""
    writer.close()

    assert said == b"" or said.split()[1].startswith(b"4")
    assert b" 200 " not in said
    assert (await client.get("/healthz")).status_code == 200


async def test_a_slow_reader_holds_up_nobody_and_little_memory(front: Front, client: httpx.AsyncClient) -> None:
    """It takes nothing; the stream behind it stands still while others are served."""
    written = 0

    async def count() -> None:
        nonlocal written
        written += 1

    piece = delta(2, "x" * 60_000)
    front.behind.orchestrator.script = [accepted(), *[piece, count] * 2000, done(3)]
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plug.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(plug, ("127.0.0.1", front.http_port))
    body = b'{"question": "?"}'
    head = f"POST /v1/answers HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.token()}\r\ncontent-length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(plug, head.encode() + body)

    before = -1
    while before != written or not written:
        before = written
        await asyncio.sleep(0.3)
    assert (await client.get("/healthz")).status_code == 200
    plug.close()

    assert 0 < written < 500
    await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)


async def test_a_taken_port_is_an_error_that_names_it(front: Front, tmp_path: Path, valkey: Valkey) -> None:
    """Both of them, by the setting's name where there is one."""
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_HTTP_PORT=str(front.http_port))
    async with build(settings) as service:
        with pytest.raises(OSError, match=rf"{front.http_port} \(TAILRACE_HTTP_PORT\)"):
            await service.server.start("127.0.0.1", 0)


async def test_stopping_ends_every_stream_with_a_word(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """A watch ends at once, an answer after the grace; both are told to come back."""
    front.behind.orchestrator.script = [accepted(), forever]
    front.behind.ledger.watched = [ledger.WatchOperationsResponse(operation=ledger.Operation(operation_id=ANSWER)), forever]
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks))

    async def read(response: httpx.Response) -> str:
        return "".join([chunk async for chunk in response.aiter_text()])

    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        headers = {"authorization": f"Bearer {front.token()}"}
        base = f"http://127.0.0.1:{service.server.http.port}"
        async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
            async with (
                client.stream("POST", "/v1/answers", json={"question": "?"}) as answer,
                client.stream("GET", "/v1/operations:watch") as watch,
            ):
                reading = [asyncio.create_task(read(answer)), asyncio.create_task(read(watch))]
                await asyncio.sleep(0.05)
                await asyncio.wait_for(service.server.stop(0, 0.3), 5)
                ends = [blocks_of(text)[-1] for text in await asyncio.gather(*reading)]

    assert [end["event"] for end in ends] == ["error", "error"]
    assert [end["data"]["reason"] for end in ends] == ["ANSWER_INTERRUPTED", "UNAVAILABLE"]


async def test_stopping_tells_those_who_have_heard_nothing_yet_to_come_back(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """Whole documents that take longer than the grace, streams before their first event, and bodies that are still on their way."""
    front.behind.orchestrator.script = [forever]
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks))

    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        headers = {"authorization": f"Bearer {front.token()}"}
        base = f"http://127.0.0.1:{service.server.http.port}"
        async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
            asking = [
                asyncio.create_task(client.post("/v1/answers", json={"question": "?", "stream": False})),
                asyncio.create_task(client.post("/v1/answers", json={"question": "?"})),
            ]
            reader, writer = await asyncio.open_connection("127.0.0.1", service.server.http.port)
            head = f"POST /v1/answers HTTP/1.1\r\nhost: x\r\nauthorization: {headers['authorization']}\r\ncontent-length: 100\r\n\r\n"
            writer.write(head.encode() + b'{"question": ')
            async with asyncio.timeout(5):
                while front.behind.seen.count("Answer") < 2:  # noqa: ASYNC110 - calls of another server make it true
                    await asyncio.sleep(0.01)
            began = asyncio.get_running_loop().time()
            await asyncio.wait_for(service.server.stop(0, 0.2), 5)
            took_s = asyncio.get_running_loop().time() - began
            responses = await asyncio.gather(*asking)
            unread = await asyncio.wait_for(reader.read(), 5)
            writer.close()

    assert took_s < 2
    assert unread.startswith(b"HTTP/1.1 503 ")
    assert b'"reason":"UNAVAILABLE"' in unread
    for response in responses:
        assert problem_of(response, 503, "UNAVAILABLE")["retryable"] is True
        assert response.headers["retry-after"] == "1"
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_stopping_ends_every_grpc_call_with_a_word(front: Front, valkey: Valkey, tmp_path: Path) -> None:
    """Before the grace is over and the connection with it: an answer is interrupted, anything else is to be asked again."""
    front.behind.orchestrator.script = [accepted(), forever]
    front.behind.retrieval.hits = [forever]
    front.behind.ledger.tells_operations.clear()
    settings = settings_for(front.behind, tmp_path, valkey.url, TAILRACE_JWKS_FILE=str(front.jwks))
    async with build(settings) as service, started(service, "127.0.0.1") as port:
        metadata = (("authorization", f"Bearer {front.token()}"),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = GatewayServiceStub(channel)
            answer = stub.Answer(orchestrator.AnswerRequest(question="?"), metadata=metadata)
            search = stub.Search(retrieval.SearchRequest(query="?"), metadata=metadata)
            looking = asyncio.ensure_future(stub.GetOperation(ledger.GetOperationRequest(operation_id=ANSWER), metadata=metadata))
            assert (await answer.read()).HasField("accepted")
            reading = [asyncio.create_task(call.read()) for call in (answer, search)]
            async with asyncio.timeout(5):
                while not all(map(front.behind.seen.count, ("Search", "GetOperation"))):  # noqa: ASYNC110 - calls of another server make it true
                    await asyncio.sleep(0.01)
            await asyncio.wait_for(service.server.stop(0, 0.5), 5)
            errors = await asyncio.gather(*reading, looking, return_exceptions=True)

    told = [from_rpc_error(error, "gateway") for error in errors if isinstance(error, grpc.aio.AioRpcError)]
    assert [error.reason for error in told] == ["ANSWER_INTERRUPTED", "UNAVAILABLE", "UNAVAILABLE"]
    assert {error.metadata.get("dependency", "gateway") for error in told} == {"gateway"}
    assert all("the server is stopping" in error.detail for error in told)


async def test_without_redis_requests_are_limited_by_the_process(front: Front, tmp_path: Path) -> None:
    """Not refused, not unlimited; readiness names what is missing."""
    front.behind.ledger.requests_per_minute = 2
    store = Valkey(tmp_path / "valkey")
    await store.start()
    settings = settings_for(front.behind, tmp_path, store.url, TAILRACE_JWKS_FILE=str(front.jwks))
    async with build(settings) as service, started(service, "127.0.0.1"):
        assert isinstance(service.server, EdgeServer)
        headers = {"authorization": f"Bearer {front.token(unique_user())}"}
        base = f"http://127.0.0.1:{service.server.http.port}"
        async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
            # It has read once which tokens are revoked; one that never could takes none.
            assert (await client.get("/v1/models")).status_code == 200
            await store.stop()
            statuses = [(await client.post("/v1/search", json={"query": "q"})).status_code for _ in range(3)]

            async def missing() -> Any:
                said = (await client.get("/readyz")).json()
                return said if said["dependencies"].get("ledger") and not said["dependencies"].get("redis") else None

            said = await until(missing)
            metrics = (await client.get("/metrics")).text
            await service.server.stop(0, 0)

    assert statuses == [200, 200, 429]
    assert (said["ready"], said["dependencies"]["redis"]) == (False, False)
    assert "tailrace_gateway_limits_local_total 3.0" in metrics


async def test_an_error_before_the_first_event_over_grpc_keeps_its_class(front: Front) -> None:
    """Reason and metadata survive both hops."""
    front.behind.orchestrator.script = [ModelOverloaded("busy", provider="anthropic", retry_after_ms=9)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        metadata = (("authorization", f"Bearer {front.token()}"),)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GatewayServiceStub(channel).Answer(orchestrator.AnswerRequest(question="?"), metadata=metadata).read()

    error = from_rpc_error(caught.value, "gateway")
    assert (type(error), error.metadata["provider"]) == (ModelOverloaded, "anthropic")
