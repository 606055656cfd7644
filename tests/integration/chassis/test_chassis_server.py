"""Server and channel together: what a handler raises, the caller catches, and nothing else gets through."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import StreamReset
from h2.settings import SettingCodes
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from services.chassis import errors, telemetry
from services.chassis import server as chassis_server
from services.chassis.channel import Caller, open_channel
from services.chassis.deadline import Deadline, current_deadline
from services.chassis.passport import Passport
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Server, passport_identity
from services.chassis.status import from_rpc_error
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as rpc

ALICE = Principal("acme", "alice", frozenset({"user"}))
PASSPORT = Passport(b"a-key-of-enough-length")
NAME = "tailrace.retrieval.v1.RetrievalService"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Scripted(rpc.RetrievalServiceServicer):
    """Does what the query says."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.cleaned_up = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.seen: dict[str, Any] = {}

    async def Search(self, request: pb.SearchRequest, context: grpc.aio.ServicerContext) -> None:
        self.seen = {"principal": current_principal(), "deadline": current_deadline.get(), "trace": telemetry.current_trace_id()}
        await context.write(pb.SearchResponse())
        if request.query == "fail":
            raise errors.RateLimited("slow down", retry_after_ms=1200, limit=60)
        if request.query == "bug":
            raise ValueError("a secret detail")
        if request.query == "leak":
            inner = asyncio.ensure_future(asyncio.Event().wait())
            inner.cancel()
            await inner
        if request.query == "hang":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        if not request.texts:
            raise errors.RequestInvalid("1-256 texts are needed", field="texts", bound="1-256")
        return pb.EmbedResponse(tokens=len(request.texts))

    async def GetDocument(self, request: pb.GetDocumentRequest, context: grpc.aio.ServicerContext) -> pb.GetDocumentResponse:
        self.entered.release()
        await self.goes_on.wait()
        return pb.GetDocumentResponse()

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # type: ignore[override]
        yield pb.ListDocumentsResponse()
        self.entered.release()
        await self.goes_on.wait()

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: grpc.aio.ServicerContext) -> pb.DeleteDocumentResponse:
        self.entered.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.goes_on.wait()
            self.cleaned_up.set()
        raise AssertionError("unreachable")


@contextlib.asynccontextmanager
async def running(servicer: rpc.RetrievalServiceServicer) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """A server on a free port with a channel to it, stopped whatever happens."""
    server = Server(passport_identity(PASSPORT), reflect=False)
    server.add(rpc.add_RetrievalServiceServicer_to_server, servicer, NAME)
    port = await server.start("127.0.0.1", 0)
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            yield server, channel
    finally:
        await server.stop(0, 0)


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, Caller, rpc.RetrievalServiceStub, grpc.aio.Channel]]:
    servicer = Scripted()
    async with running(servicer) as (_, channel):
        yield servicer, Caller("retrieval", PASSPORT), rpc.RetrievalServiceStub(channel), channel


async def test_principal_deadline_and_trace_reach_the_handler(scripted: Any) -> None:
    """They travel in metadata and are there before the first line of the handler runs."""
    servicer, caller, stub, _ = scripted
    with telemetry.span("test"):
        trace = telemetry.current_trace_id()
        async with caller.stream(stub.Search, pb.SearchRequest(query="x"), timeout_s=5, principal=ALICE) as messages:
            assert len([message async for message in messages]) == 1

    assert servicer.seen["principal"] == ALICE
    assert 0 < servicer.seen["deadline"].remaining_s < 5.5  # gRPC rounds a timeout up
    assert servicer.seen["trace"] == trace


async def test_an_error_after_messages_arrives_as_the_same_class(scripted: Any) -> None:
    """ErrorInfo carries reason and metadata also after the stream has begun."""
    _, caller, stub, _ = scripted
    got = []

    with pytest.raises(errors.RateLimited) as caught:
        async with caller.stream(stub.Search, pb.SearchRequest(query="fail"), timeout_s=5, principal=ALICE) as messages:
            async for message in messages:
                got.append(message)

    assert len(got) == 1
    assert caught.value.retry_after_ms == 1200
    assert caught.value.metadata["limit"] == "60"


async def test_a_bug_goes_out_without_its_text(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The caller learns INTERNAL and a trace id, nothing else."""
    _, caller, stub, _ = scripted

    with pytest.raises(errors.Internal) as caught:
        async with caller.stream(stub.Search, pb.SearchRequest(query="bug"), timeout_s=5, principal=ALICE) as messages:
            async for _message in messages:
                pass

    assert "secret" not in caught.value.detail


async def test_a_cancellation_nobody_asked_for_ends_the_call(scripted: Any) -> None:
    """A cancelled inner task must not leave the call open."""
    _, caller, stub, _ = scripted

    with pytest.raises(errors.Internal):
        async with caller.stream(stub.Search, pb.SearchRequest(query="leak"), timeout_s=5, principal=ALICE) as messages:
            async for _message in messages:
                pass


async def test_leaving_the_stream_cancels_the_handler(scripted: Any) -> None:
    """A caller that stops reading frees the callee."""
    servicer, caller, stub, _ = scripted

    async with caller.stream(stub.Search, pb.SearchRequest(query="hang"), timeout_s=30, principal=ALICE) as messages:
        await anext(aiter(messages))

    async with asyncio.timeout(5):
        await servicer.cancelled.wait()


async def test_a_call_that_its_caller_left_is_no_failure_in_the_trace(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has all it wants cancels the rest. What went wrong on our side still is one, also where it is a cancellation nobody asked for."""
    servicer, caller, stub, _ = scripted
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))

    async with caller.stream(stub.Search, pb.SearchRequest(query="hang"), timeout_s=30, principal=ALICE) as messages:
        await anext(aiter(messages))
    async with asyncio.timeout(5):
        await servicer.cancelled.wait()
    with pytest.raises(errors.Internal):
        async with caller.stream(stub.Search, pb.SearchRequest(query="leak"), timeout_s=5, principal=ALICE) as messages:
            async for _message in messages:
                pass
    left, leaked = exporter.get_finished_spans()

    assert (left.status.status_code, left.attributes["rpc.response.status_code"]) == (StatusCode.UNSET, "CANCELLED")
    assert "error.type" not in left.attributes
    assert (leaked.status.status_code, leaked.attributes["error.type"]) == (StatusCode.ERROR, "CancelledError")


async def test_who_says_nothing_is_asked_once_more_and_is_away(scripted: Any) -> None:
    """A call may go to another replica the next time. The request has time left, so that is not what is short."""
    servicer, caller, stub, _ = scripted
    current_deadline.set(Deadline.after(30))

    with pytest.raises(errors.Unavailable) as caught:
        await caller.unary(stub.GetDocument, pb.GetDocumentRequest(), principal=ALICE, timeout_s=0.3)

    assert caught.value.metadata["dependency"] == "retrieval"
    assert [await asyncio.wait_for(servicer.entered.acquire(), 5) for _ in range(2)] == [True, True]
    assert servicer.entered.locked(), "it was asked more than twice"


async def test_who_says_nothing_is_not_asked_again_for_what_must_happen_once(scripted: Any) -> None:
    servicer, caller, stub, _ = scripted

    with pytest.raises(errors.Unavailable):
        await caller.unary(stub.GetDocument, pb.GetDocumentRequest(), principal=ALICE, timeout_s=0.3, idempotent=False)

    await asyncio.wait_for(servicer.entered.acquire(), 5)
    assert servicer.entered.locked()


async def test_a_request_whose_time_is_over_asks_nobody_again(scripted: Any) -> None:
    servicer, caller, stub, _ = scripted
    current_deadline.set(Deadline.after(0.4))

    with pytest.raises(errors.DeadlineTooShort):
        await caller.unary(stub.GetDocument, pb.GetDocumentRequest(), principal=ALICE, timeout_s=5)

    await asyncio.wait_for(servicer.entered.acquire(), 5)
    assert servicer.entered.locked()


async def test_a_deadline_becomes_our_own_error(scripted: Any) -> None:
    """DEADLINE_EXCEEDED made by gRPC itself is DeadlineTooShort here."""
    _, caller, stub, _ = scripted

    with pytest.raises(errors.DeadlineTooShort):
        async with caller.stream(stub.Search, pb.SearchRequest(query="hang"), timeout_s=0.2, principal=ALICE) as messages:
            async for _message in messages:
                pass


async def test_a_refused_field_is_named(scripted: Any) -> None:
    """RequestInvalid keeps field and bound across the wire."""
    _, caller, stub, _ = scripted

    with pytest.raises(errors.RequestInvalid) as caught:
        await caller.unary(stub.Embed, pb.EmbedRequest(), principal=ALICE)

    assert (caught.value.field, caught.value.metadata["bound"]) == ("texts", "1-256")


async def test_calls_without_a_principal_are_refused(scripted: Any) -> None:
    """Metadata alone makes nobody."""
    *_, stub, _ = scripted

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Embed(pb.EmbedRequest(texts=["x"]), metadata=[("x-tenant", "acme")])

    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_server_that_is_away_is_named() -> None:
    """Unavailable says which dependency, after the retries."""
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(errors.Unavailable) as caught:
            await Caller("retrieval", PASSPORT).unary(
                rpc.RetrievalServiceStub(channel).Embed, pb.EmbedRequest(texts=["x"]), principal=ALICE
            )

    assert caught.value.metadata["dependency"] == "retrieval"


async def test_a_taken_port_is_an_error() -> None:
    """Two servers never share a port silently."""
    first, second = (Server(passport_identity(PASSPORT), reflect=False) for _ in range(2))
    port = await first.start("127.0.0.1", 0)

    with pytest.raises(OSError, match=str(port)):
        await second.start("127.0.0.1", port)

    await first.stop(0, 0)


@pytest.mark.parametrize("shape", ["unary", "coroutine that writes", "generator"])
async def test_a_call_that_outlives_the_grace_is_told_to_ask_again(shape: str) -> None:
    """Whatever its handler waits in. gRPC itself would cut it, and its caller would hear CANCELLED and not why."""
    servicer = Scripted()
    async with running(servicer) as (server, channel):
        stub, metadata = rpc.RetrievalServiceStub(channel), Caller("retrieval", PASSPORT).metadata(ALICE)

        async def call() -> None:
            if shape == "unary":
                await stub.GetDocument(pb.GetDocumentRequest(), metadata=metadata)
                return
            searches = shape == "coroutine that writes"
            method, request = (stub.Search, pb.SearchRequest(query="hang")) if searches else (stub.ListDocuments, pb.ListDocumentsRequest())
            stream = method(request, metadata=metadata)
            await stream.read()
            begun.set()
            await stream.read()

        begun = asyncio.Event()
        calling = asyncio.create_task(call())
        async with asyncio.timeout(5):
            await (servicer.entered.acquire() if shape == "unary" else begun.wait())
            await server.stop(0, 0.3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calling

    told = from_rpc_error(caught.value, "somebody")
    assert (caught.value.code(), told.reason, told.retryable) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", True)
    assert (told.metadata["dependency"], told.retry_after_ms) == ("retrieval", 1000)
    assert "stopping" in told.detail


async def test_a_call_that_ends_within_the_grace_is_answered() -> None:
    """A stop waits for it, and for no longer than it takes."""
    servicer = Scripted()
    async with running(servicer) as (server, channel):
        calling = asyncio.create_task(
            Caller("retrieval", PASSPORT).unary(
                rpc.RetrievalServiceStub(channel).GetDocument, pb.GetDocumentRequest(), principal=ALICE, timeout_s=30
            )
        )
        async with asyncio.timeout(5):
            await servicer.entered.acquire()
            stopping = asyncio.create_task(server.stop(0, 30))
            await server.draining.wait()
            servicer.goes_on.set()
            answered = await calling
            await stopping

    assert answered == pb.GetDocumentResponse()


async def test_what_a_left_call_cleans_up_is_not_interrupted_by_a_stop() -> None:
    """Its caller is gone, so there is nobody to tell, and what it leaves must be whole."""
    servicer = Scripted()
    async with running(servicer) as (server, channel):
        stub, metadata = rpc.RetrievalServiceStub(channel), Caller("retrieval", PASSPORT).metadata(ALICE)
        call = stub.DeleteDocument(pb.DeleteDocumentRequest(), metadata=metadata)
        late = stub.GetDocument(pb.GetDocumentRequest(), metadata=metadata)
        async with asyncio.timeout(5):
            for _ in range(2):
                await servicer.entered.acquire()
            call.cancel()
            await servicer.cancelled.wait()
            await server.stop(0, 0.2)
            with pytest.raises(grpc.aio.AioRpcError):
                await late
            servicer.goes_on.set()
            await servicer.cleaned_up.wait()


async def test_health_names_the_dependency_that_is_away() -> None:
    """Readiness is one entry a dependency, and the whole is their conjunction."""
    async with running(Scripted()) as (server, channel):
        await server.ready({"qdrant": False, "disk": True})
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())

    states = {name: entry.status == health_pb2.HealthCheckResponse.SERVING for name, entry in listed.statuses.items()}
    assert states == {"dependency.qdrant": False, "dependency.disk": True, "": False, NAME: False}
    await server.stop(0, 0)


async def test_where_strangers_ask_health_says_whether_and_not_why() -> None:
    """A dependency is as unknown as any other name."""
    server = Server(passport_identity(PASSPORT), reflect=False, tells_dependencies=False)
    server.add(rpc.add_RetrievalServiceServicer_to_server, Scripted(), NAME)
    async with open_channel(f"127.0.0.1:{await server.start('127.0.0.1', 0)}") as channel:
        await server.ready({"qdrant": False, "disk": True})
        stub = health_pb2_grpc.HealthStub(channel)
        listed = await stub.List(health_pb2.HealthListRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="dependency.qdrant"))
    await server.stop(0, 0)

    assert {name: entry.status for name, entry in listed.statuses.items()} == dict.fromkeys(("", NAME), NOT_SERVING)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watches_of_health_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is left makes room; a check needs none."""
    monkeypatch.setattr(chassis_server, "WATCHES_MAX", 2)
    async with running(Scripted()) as (server, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        first = [(await watch.read()).status for watch in watches]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        checked = await stub.Check(health_pb2.HealthCheckRequest())
        watches[0].cancel()
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    again = await stub.Watch(health_pb2.HealthCheckRequest()).read()
                    break
        await server.stop(0, 0)

    assert [*first, checked.status, again.status] == [NOT_SERVING] * 4
    assert errors.restore("OVERLOADED", "", {}, "").code == caught.value.code().name


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What an HTTP/2 client says first: the preface and empty settings."""


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def with_option(name: str, value: int) -> list[tuple[str, int]]:
    """The options of every server, one of them set to something that a test can wait for."""
    return [(one, value if one == name else usual) for one, usual in chassis_server.SERVER_OPTIONS]


@contextlib.asynccontextmanager
async def connections(
    options: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """What opens a connection to a server with `options`, as a client does that asks nothing then."""
    monkeypatch.setattr(chassis_server, "SERVER_OPTIONS", options)
    server = Server(passport_identity(PASSPORT), reflect=False)
    port = await server.start("127.0.0.1", 0)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, 0, 0)

        async def opened() -> Connection:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            writer.write(PREFACE)
            return reader, writer

        async with asyncio.timeout(30):
            yield opened


async def test_connections_are_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed without a word; when another has left there is room."""
    async with connections(with_option("grpc.max_allowed_incoming_connections", 2), monkeypatch) as opened:
        held = [await opened() for _ in range(2)]
        served = [await reader.read(1) for reader, _ in held]
        refused = await heard(*await opened())
        held[0][1].close()
        while not (again := await heard(*await opened())):  # it counts who left a moment longer
            pass

    assert (refused, [again, again]) == (b"", served)


async def heard(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> bytes:
    """The first byte; none where the connection is closed."""
    try:
        return await reader.read(1)
    except ConnectionError:
        return b""


async def test_a_connection_that_asks_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or strangers could take all there may be, and keep them."""
    async with connections(with_option("grpc.max_connection_idle_ms", 200), monkeypatch) as opened:
        reader, _ = await opened()
        said = await reader.read()

    assert b"connection idle" in said


@pytest.mark.parametrize("cls", errors.leaves().values(), ids=lambda cls: cls.__name__)
async def test_every_error_crosses_the_wire_as_itself(cls: type[errors.DomainError]) -> None:
    """One table, both ways: class, text, code and metadata survive a real call."""
    sent = cls.__new__(cls)
    errors.DomainError.__init__(sent, "why", bound="1-5", retry_after_ms=7)

    class Raises(rpc.RetrievalServiceServicer):
        async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
            raise sent

    async with running(Raises()) as (_, channel):
        with pytest.raises(cls) as caught:
            await Caller("retrieval", PASSPORT).unary(
                rpc.RetrievalServiceStub(channel).Embed, pb.EmbedRequest(texts=["x"]), principal=ALICE, idempotent=False
            )

    assert (caught.value.detail, caught.value.code, caught.value.metadata) == ("why", cls.code, sent.metadata)


GRPC_HEAD = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "x"),
    (":path", f"/{NAME}/Embed"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


async def test_streams_of_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a client that opens more than it was told it may: those it has are served, the one too many is refused."""
    async with connections(with_option("grpc.max_concurrent_streams", 2), monkeypatch) as opened:
        reader, writer = await opened()
        client = H2Connection(H2Configuration(client_side=True))
        client.initiate_connection()
        client.clear_outbound_data_buffer()  # the connection was opened with it
        while SettingCodes.MAX_CONCURRENT_STREAMS not in client.remote_settings:
            client.receive_data(await reader.readexactly(1))
        told = client.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS]
        client.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 3
        client.remote_settings.acknowledge()
        for stream in (1, 3, 5):
            client.send_headers(stream, GRPC_HEAD)
        writer.write(client.data_to_send())
        ended: dict[int | None, ErrorCodes | int | None] = {}
        while len(ended) < 3:
            events = client.receive_data(await reader.readexactly(1))
            ended |= {event.stream_id: event.error_code for event in events if isinstance(event, StreamReset)}

    assert told == 2
    assert ended == {1: ErrorCodes.NO_ERROR, 3: ErrorCodes.NO_ERROR, 5: ErrorCodes.REFUSED_STREAM}
