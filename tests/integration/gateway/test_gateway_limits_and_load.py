"""Limits of answers, deadlines, priority and shedding, through both fronts of a whole gateway and a real Valkey."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from websockets.asyncio.client import connect

from services.chassis import telemetry
from services.chassis.errors import ModelFailed
from services.chassis.lifecycle import started
from services.chassis.principal import Principal
from services.chassis.status import from_rpc_error
from services.gateway.wiring import EdgeServer, build
from services.local.stores import Valkey
from tailrace.common.v1 import common_pb2 as common
from tailrace.gateway.v1.gateway_service_pb2_grpc import GatewayServiceStub
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tests.fakes.api_keys import key_named
from tests.integration.gateway.backends import ANSWER, accepted, delta, done, forever
from tests.integration.gateway.conftest import Front, problem_of, settings_for, unique_user, until

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@contextlib.asynccontextmanager
async def gateway(front: Front, folder: Path, redis_url: str, **environment: str) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """Another gateway before the same services, with a client of a user nobody has counted yet, and its gRPC address."""
    environment = {"TAILRACE_JWKS_FILE": str(front.jwks), "TAILRACE_GATEWAY_LOOP_LAG_MAX_S": "60", **environment}
    settings = settings_for(front.behind, folder, redis_url, **environment)
    async with build(settings) as service, started(service, "127.0.0.1") as grpc_port:
        assert isinstance(service.server, EdgeServer)
        headers = {"authorization": f"Bearer {front.token(unique_user())}"}
        base_url = f"http://127.0.0.1:{service.server.http.port}"
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base_url, headers=headers, trust_env=False, timeout=10, limits=limits) as client:
            yield client, f"127.0.0.1:{grpc_port}"
        await service.server.stop(0, 0.2)


async def test_tokens_are_reserved_then_corrected_by_the_receipt(front: Front) -> None:
    """An answer is charged for what its receipt says; one that is refused by the orchestrator for nothing."""
    front.behind.ledger.plan.tokens_per_minute = 12_000
    receipt = done(2)
    receipt.done.usage.input_tokens = 93
    async with front.client(unique_user()) as client:
        front.behind.orchestrator.script = [accepted(), receipt]
        first = await client.post("/v1/answers", json={"question": "Why?"})
        assert first.headers["x-ratelimit-limit-tokens"] == "12000"
        assert first.headers["x-ratelimit-remaining-tokens"] == str(12_000 - 4096 - 1024 - 2)
        front.behind.orchestrator.script = [ModelFailed("no")]
        problem_of(await client.post("/v1/answers", json={"question": "Why?"}), 502, "MODEL_FAILED")
        front.behind.orchestrator.script = [accepted(), receipt]

        async def settled() -> bool:
            response = await client.post("/v1/answers", json={"question": "Why?", "max_output_tokens": 1})
            return int(response.headers["x-ratelimit-remaining-tokens"]) > 12_000 - 2 * (4096 + 3)

        assert await until(settled)
        refused = await client.post("/v1/answers", json={"question": "Why?", "max_output_tokens": 64_000})

    problem = problem_of(refused, 429, "RATE_LIMITED")
    assert (problem["limit_kind"], problem["limit_scope"], problem["limit"]) == ("tokens", "user", "12000")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-reset-tokens"].endswith("ms")


async def test_answers_at_the_same_time_are_limited_over_both_fronts(front: Front) -> None:
    """One holds its place while it runs, whether or not who asked still reads, over HTTP as over gRPC; its end frees it.

    A resumed stream holds none of its own.
    """
    front.behind.ledger.plan.concurrent_answers = 1
    front.behind.orchestrator.script = [accepted(), forever]
    front.behind.orchestrator.resumed = [accepted(), forever]
    user = unique_user()
    metadata = (("authorization", f"Bearer {front.token(user)}"),)
    async with front.client(user) as client, grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        stub = GatewayServiceStub(channel)

        async def ask_by_grpc() -> Any:
            call = stub.Answer(orchestrator.AnswerRequest(question="Why?"), metadata=metadata)
            try:
                return await call.read()
            finally:
                call.cancel()

        async with client.stream("GET", "/v1/answers/a/events"), client.stream("POST", "/v1/answers", json={"question": "?"}) as first:
            assert first.status_code == 200
            refused = problem_of(await client.post("/v1/answers", json={"question": "?"}), 429, "RATE_LIMITED")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask_by_grpc()
        looked = front.behind.seen.count("GetOperation")

        async def looked_again() -> bool:
            return front.behind.seen.count("GetOperation") > looked

        await until(looked_again)
        left = problem_of(await client.post("/v1/answers", json={"question": "?"}), 429, "RATE_LIMITED")
        front.behind.ledger.booked.status = "cancelled"
        await client.post(f"/v1/answers/{ANSWER}/cancel")

        async def free() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool((await ask_by_grpc()).HasField("accepted"))
            return False

        assert await until(free)

    assert (refused["limit_kind"], refused["limit_scope"]) == ("concurrency", "user")
    assert left["limit_kind"] == "concurrency"
    error = from_rpc_error(caught.value, "gateway")
    assert (error.reason, error.metadata["limit_kind"], error.retry_after_ms) == ("RATE_LIMITED", "concurrency", 1000)


async def test_the_same_request_again_needs_no_place_and_no_tokens_over_any_front(front: Front, tmp_path: Path, valkey: Valkey) -> None:
    """While its answer runs and when it has ended, at this gateway and another, over HTTP, gRPC and a WebSocket. Another key, or another
    body, is another answer."""
    front.behind.ledger.plan.concurrent_answers, front.behind.ledger.plan.tokens_per_minute = 1, 11_000
    front.behind.orchestrator.script = [accepted(), forever]
    receipt = done(1)
    receipt.done.usage.Clear()
    receipt.done.usage.input_tokens = 5_000
    token, body, key = front.token(unique_user()), {"question": "Why?"}, {"idempotency-key": "k-1"}
    headers = {"authorization": f"Bearer {token}"}
    async with gateway(front, tmp_path, valkey.url) as (elsewhere, _), front.client() as here:
        for client in (here, elsewhere):
            client.headers.update(headers)

        async def begun(client: httpx.AsyncClient) -> httpx.Response:
            async with client.stream("POST", "/v1/answers", json=body, headers=key) as response:
                await anext(response.aiter_bytes())
                return response

        async with here.stream("POST", "/v1/answers", json=body, headers=key) as first:
            remaining = [
                response.headers["x-ratelimit-remaining-tokens"] for response in (first, await begun(here), await begun(elsewhere))
            ]
            metadata = (("authorization", f"Bearer {token}"),)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
                same, _ = front.behind.seen.last("Answer")
                call = GatewayServiceStub(channel).Answer(same, metadata=metadata)
                assert (await call.read()).HasField("accepted")
                call.cancel()
            async with connect(f"{front.url.replace('http', 'ws')}/v1/answers/ws", additional_headers=headers) as socket:
                await socket.send(json.dumps({"type": "ask", "idempotency_key": "k-1", **body}))
                assert json.loads(await socket.recv())["type"] == "accepted"
            others = ({"question": "Who?"}, key), (body, {"idempotency-key": "k-2"}), (body, {})
            for other, other_key in others:
                refused = problem_of(await elsewhere.post("/v1/answers", json=other, headers=other_key), 429, "RATE_LIMITED")
                assert refused["limit_kind"] == "concurrency"
            front.behind.orchestrator.script = [receipt]
            front.behind.ledger.booked.MergeFrom(ledger.Operation(status="done", usage=receipt.done.usage))
            ended = [await client.post("/v1/answers", json=body, headers=key) for client in (here, elsewhere)]

        async def free() -> bool:
            response = await elsewhere.post("/v1/answers", json={"question": "?", "max_output_tokens": 1})
            return "concurrency" not in response.text

        assert await until(free)
        full = problem_of(await here.post("/v1/answers", json={"question": "?", "max_output_tokens": 1_000}), 429, "RATE_LIMITED")

        async def told_again() -> bool:
            response = await here.post("/v1/answers", json=body, headers=key)
            return response.status_code == 200 and response.headers["x-ratelimit-remaining-tokens"] == "1000"  # of two answers

        assert await until(told_again)

    assert len(set(remaining)) == 1
    assert [response.status_code for response in ended] == [200, 200]
    assert full["limit_kind"] == "tokens"


async def test_tokens_of_an_answer_that_was_left_are_what_the_books_say(front: Front) -> None:
    """Leaving just before the receipt does not make it cheap: the difference is charged as soon as it is booked."""
    front.behind.ledger.plan.tokens_per_minute = 100_000
    front.behind.orchestrator.script = [accepted(), forever]
    receipt = done(1)
    receipt.done.usage.Clear()
    async with front.client(unique_user()) as client:
        async with client.stream("POST", "/v1/answers", json={"question": "Why?"}) as left:
            await anext(left.aiter_bytes())
        front.behind.ledger.booked.MergeFrom(ledger.Operation(status="done", usage=common.Usage(input_tokens=80_000, output_tokens=900)))
        front.behind.orchestrator.script = [receipt]

        async def charged() -> bool:
            response = await client.post("/v1/answers", json={"question": "Why?"})
            return int(response.headers["x-ratelimit-remaining-tokens"]) < 20_000

        assert await until(charged)


async def test_an_api_key_has_its_own_limit_and_the_tenant_its_own(front: Front) -> None:
    """The problem says whose it was."""
    tenant = unique_user()
    front.behind.ledger.plan.key_limits.requests_per_minute = 1
    front.behind.ledger.plan.tenant_limits.CopyFrom(ledger.Limits(requests_per_minute=3))
    front.behind.ledger.keys = {
        key_named(f"{tenant} {number}"): Principal(tenant, "robot", frozenset({"user"}), f"key-{number}") for number in range(4)
    }

    async with httpx.AsyncClient(base_url=front.url, trust_env=False) as client:

        async def search(number: int) -> httpx.Response:
            return await client.post("/v1/search", json={"query": "q"}, headers={"x-api-key": key_named(f"{tenant} {number}")})

        statuses = [(await search(number)).status_code for number in (0, 1)]
        of_key = problem_of(await search(0), 429, "RATE_LIMITED")
        statuses.append((await search(2)).status_code)
        of_tenant = problem_of(await search(3), 429, "RATE_LIMITED")

    assert statuses == [200, 200, 200]
    assert (of_key["limit_scope"], of_key["limit"], of_tenant["limit_scope"], of_tenant["limit"]) == ("key", "1", "tenant", "3")


async def test_a_body_that_cannot_be_read_counts_as_a_request(front: Front) -> None:
    """Else it would be a way to ask without end."""
    front.behind.ledger.requests_per_minute = 2
    async with front.client(unique_user()) as client:
        for _ in range(2):
            problem_of(await client.post("/v1/answers", json={}), 400, "REQUEST_INVALID")
        problem_of(await client.post("/v1/answers", json={}), 429, "RATE_LIMITED")


async def test_deadline_and_priority_are_passed_on(front: Front, client: httpx.AsyncClient) -> None:
    """The header before the plan; over gRPC the call's own deadline; nothing where nobody says."""
    front.behind.orchestrator.script = [accepted(), done(2)]

    async def passed_on(headers: dict[str, str], **body: Any) -> Any:
        response = await client.post("/v1/answers", json={"question": "?", **body}, headers=headers)
        assert response.status_code == 200
        return front.behind.seen.last("Answer")[0]

    silent = await passed_on({})
    headed = await passed_on({"request-timeout": "12.5"}, priority="batch")
    bad = problem_of(await client.post("/v1/answers", json={"question": "?"}, headers={"request-timeout": "0"}), 400, "REQUEST_INVALID")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        stub, metadata = GatewayServiceStub(channel), (("authorization", f"Bearer {front.token()}"),)
        await stub.Answer(orchestrator.AnswerRequest(question="?"), metadata=metadata, timeout=8).read()
        called = front.behind.seen.last("Answer")[0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Answer(orchestrator.AnswerRequest(question="?", deadline_ms=0), metadata=metadata).read()
    front.behind.ledger.plan.answer_deadline_ms = 7_000
    async with front.client(unique_user()) as other:
        await other.post("/v1/answers", json={"question": "?"})

    assert (silent.HasField("deadline_ms"), silent.priority) == (False, orchestrator.PRIORITY_INTERACTIVE)
    assert headed.priority == orchestrator.PRIORITY_BATCH
    assert 10_000 < headed.deadline_ms < 12_500
    assert bad["field"] == "Request-Timeout"
    assert 6_000 < called.deadline_ms < 8_000
    assert from_rpc_error(caught.value, "gateway").metadata["field"] == "deadline_ms"
    assert 5_000 < front.behind.seen.last("Answer")[0].deadline_ms < 7_000


async def test_what_admission_takes_is_taken_off_the_time_of_an_answer(front: Front) -> None:
    """The orchestrator gets what is left of it; if nothing is, it is not asked."""
    front.behind.orchestrator.script = [accepted(), done(2)]

    async def asked_with(timeout_ms: int, waits_s: float) -> httpx.Response:
        """An answer whose plan is told after so long."""
        user, seen = unique_user(), front.behind.seen.count("GetEntitlements")
        front.behind.ledger.tells_plans.clear()
        asking = asyncio.create_task(ask(user, timeout_ms))
        try:
            await until(lambda: came(seen))
            await asyncio.sleep(waits_s)
        finally:
            front.behind.ledger.tells_plans.set()
        return await asking

    async def came(seen: int) -> bool:
        return front.behind.seen.count("GetEntitlements") > seen

    async def ask(user: str, timeout_ms: int) -> httpx.Response:
        async with front.client(user) as http:
            return await http.post("/v1/answers", json={"question": "?"}, headers={"request-timeout": str(timeout_ms / 1000)})

    in_time = await asked_with(9_000, 0.4)
    left_ms = front.behind.seen.last("Answer")[0].deadline_ms
    asked = front.behind.seen.count("Answer")
    too_late = await asked_with(200, 0.4)

    assert in_time.status_code == 200
    problem_of(too_late, 504, "DEADLINE_TOO_SHORT")
    assert 4_000 < left_ms <= 8_600
    assert front.behind.seen.count("Answer") == asked


async def test_any_request_may_say_how_long_it_waits(front: Front, client: httpx.AsyncClient) -> None:
    """The time goes on with the call, and the next request on the same connection has its own."""
    front.behind.retrieval.hits = [forever]
    late = await client.post("/v1/search", json={"query": "q"}, headers={"request-timeout": "0.3"})
    bad = problem_of(await client.get("/v1/documents", headers={"request-timeout": "soon"}), 400, "REQUEST_INVALID")
    front.behind.retrieval.hits = []
    again = await client.post("/v1/search", json={"query": "q"})

    assert (late.status_code, again.status_code) == (504, 200), late.text
    assert bad["field"] == "Request-Timeout"


async def test_one_user_cannot_take_all_resumed_streams(front: Front) -> None:
    """As many as the plan lets answers run and at least 16, over all fronts together; others still have theirs."""
    front.behind.ledger.plan.concurrent_answers = 1
    front.behind.orchestrator.resumed = [accepted(), forever]
    user = unique_user()
    metadata = (("authorization", f"Bearer {front.token(user)}"),)
    path = f"/v1/answers/{ANSWER}/events"
    async with (
        front.client(user) as client,
        front.client(unique_user()) as other,
        contextlib.AsyncExitStack() as streams,
        grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel,
    ):
        stub = GatewayServiceStub(channel)
        resume = orchestrator.ResumeAnswerRequest(answer_id=ANSWER)
        opened = [await streams.enter_async_context(client.stream("GET", path)) for _ in range(15)]
        call = stub.ResumeAnswer(resume, metadata=metadata)
        assert (await call.read()).HasField("accepted")
        refused = problem_of(await client.get(path), 429, "RATE_LIMITED")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ResumeAnswer(resume, metadata=metadata).read()
        async with other.stream("GET", path) as of_other:
            assert of_other.status_code == 200
        call.cancel()

        async def free() -> bool:
            async with client.stream("GET", path) as again:
                return again.status_code == 200

        assert await until(free)

    assert {response.status_code for response in opened} == {200}
    assert (refused["limit_kind"], refused["limit_scope"], refused["limit"]) == ("resumes", "user", "16")
    assert from_rpc_error(caught.value, "gateway").metadata["limit_kind"] == "resumes"


async def test_one_user_cannot_take_all_watches(front: Front) -> None:
    """Of whatever is watched, together."""
    front.behind.ledger.watched = [forever]
    live = {"accept": "text/event-stream"}
    async with front.client(unique_user()) as client, front.client(unique_user()) as other, contextlib.AsyncExitStack() as streams:
        for _ in range(16):
            watched = await streams.enter_async_context(client.stream("GET", "/v1/infrastructure", headers=live))
            assert watched.status_code == 200
        for path in ("/v1/infrastructure", "/v1/operations:watch", "/v1/jobs/job-1"):
            refused = problem_of(await client.get(path, headers=live), 429, "RATE_LIMITED")
            assert (refused["limit_kind"], refused["limit"]) == ("watches", "16")
        async with other.stream("GET", "/v1/infrastructure", headers=live) as of_other:
            assert of_other.status_code == 200

    assert front.behind.seen.count("WatchOperations") == front.behind.seen.count("WatchIngestionJob") == 0


async def test_a_grpc_reader_that_takes_nothing_is_let_go(front: Front, tmp_path: Path, valkey: Valkey) -> None:
    """What it was sent is there if it reads on, then why it was let go; the call behind it ends at once."""
    front.behind.orchestrator.script = [accepted(), *(delta(number, "x" * 60_000) for number in range(2, 1000)), done(1000)]
    async with gateway(front, tmp_path, valkey.url, TAILRACE_WRITE_STALL_S="0.3") as (_, target):
        async with grpc.aio.insecure_channel(target) as channel:
            metadata = (("authorization", f"Bearer {front.token(unique_user())}"),)
            call = GatewayServiceStub(channel).Answer(orchestrator.AnswerRequest(question="?"), metadata=metadata)
            assert (await call.read()).HasField("accepted")
            async with asyncio.timeout(5):
                await front.behind.seen.cancelled.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass

    assert from_rpc_error(caught.value, "gateway").reason == "ANSWER_INTERRUPTED"


async def test_a_full_gateway_sheds_at_once_whoever_asks(
    front: Front, tmp_path: Path, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch first, then all, before anybody is asked who they are; five times what it carries, every refusal is quick and unrecorded."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    front.behind.orchestrator.script = [accepted(), forever]
    async with (
        gateway(front, tmp_path, valkey.url, TAILRACE_GATEWAY_STREAMS_MAX="10") as (client, target),
        contextlib.AsyncExitStack() as streams,
    ):
        for _ in range(8):
            await streams.enter_async_context(client.stream("POST", "/v1/answers", json={"question": "?"}))
        batch = await client.post("/v1/answers", json={"question": "?", "priority": "batch"})
        for _ in range(2):
            await streams.enter_async_context(client.stream("POST", "/v1/answers", json={"question": "?"}))
        asked = front.behind.seen.count("Answer")
        seconds: list[float] = []

        async def shed(number: int) -> bytes:
            await asyncio.sleep(number * 0.01)
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"POST /v1/answers HTTP/1.1\r\nhost: x\r\nauthorization: Bearer nobody\r\ncontent-length: 2\r\n\r\n{}")
            head = await reader.readuntil(b"\r\n\r\n")
            seconds.append(time.perf_counter() - began)
            writer.close()
            return head

        heads = await asyncio.gather(*(shed(number) for number in range(200)))
        async with grpc.aio.insecure_channel(target) as channel:
            metadata = (("authorization", f"Bearer {front.token()}"),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await GatewayServiceStub(channel).Answer(orchestrator.AnswerRequest(question="?"), metadata=metadata).read()
        shed_at_last = await client.post(
            "/v1/answers", json={"question": "?"}, headers={"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01", "x-request-id": "mine"}
        )
        recorded = [span.name for span in exporter.get_finished_spans()]
        others = await client.get("/v1/models")
        metrics = (await client.get("/metrics")).text

    problem_of(batch, 503, "OVERLOADED")
    told = problem_of(shed_at_last, 503, "OVERLOADED")
    assert (told["trace_id"], told["request_id"]) == (TRACE_ID, "mine")
    assert recorded.count("POST /v1/answers") == 1, "of what is turned away before anything is done there is no span"
    assert all(re.search(rb"\r\nx-trace-id: [0-9a-f]{32}\r\n", head) for head in heads)
    assert all(head.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 1\r\n" in head for head in heads)
    assert from_rpc_error(caught.value, "gateway").reason == "OVERLOADED"
    assert others.status_code == 200
    assert front.behind.seen.count("Answer") == asked == 10
    assert 'tailrace_gateway_shed_total{cause="streams"} 203.0' in metrics
    half, most = sorted(seconds)[100], sorted(seconds)[198]
    print(f"a refusal took {half * 1000:.1f} ms at p50 and {most * 1000:.1f} ms at p99")
    assert half < 0.05


async def test_when_redis_dies_limits_hold_by_process_and_are_shared_again_when_it_is_back(front: Front, tmp_path: Path) -> None:
    """Its share of the limit, counted and alarmed; requests are answered all the while."""
    front.behind.ledger.requests_per_minute = 6
    store = Valkey(tmp_path / "valkey")
    await store.start()
    try:
        async with gateway(front, tmp_path, store.url, TAILRACE_GATEWAY_REPLICAS="3") as (client, _):

            async def search() -> httpx.Response:
                return await client.post("/v1/search", json={"query": "q"})

            assert (await search()).headers["x-ratelimit-limit-requests"] == "6"
            await store.stop()
            began = time.perf_counter()
            alone = [await search() for _ in range(3)]
            assert time.perf_counter() - began < 5
            away = (await client.get("/metrics")).text
            await store.start()

            async def shared() -> httpx.Response | None:
                response = await search()
                return response if response.headers["x-ratelimit-limit-requests"] == "6" else None

            back = await until(shared)
            again = (await client.get("/metrics")).text
    finally:
        await store.stop()

    assert [response.status_code for response in alone] == [200, 200, 429]
    assert alone[0].headers["x-ratelimit-limit-requests"] == "2"
    assert "tailrace_gateway_limits_away 1.0" in away
    assert "tailrace_gateway_limits_local_total 3.0" in away
    assert back.status_code == 200
    assert "tailrace_gateway_limits_away 0.0" in again
