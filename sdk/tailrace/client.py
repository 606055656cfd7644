"""The client: `AsyncClient`, and `Client` for code without an event loop. Reading values and errors off the wire is not done here."""

import asyncio
import contextlib
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc
from google.protobuf import struct_pb2

from tailrace import values
from tailrace.errors import Interrupted, from_rpc_error
from tailrace.gateway.v1 import gateway_service_pb2_grpc
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

DEFAULT_TARGET = "localhost:50050"
CONTENT_BYTES_PER_MESSAGE = 256 * 1024
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    # What gRPC waits for an answer to a ping; the documented `keepalive_timeout_ms` is not heeded, and a minute is what it would be.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

Cache = Literal["use", "refresh", "off"]
Mode = Literal["hybrid", "dense", "sparse"]
_CACHE_MODES = {"use": orchestrator.CACHE_MODE_USE, "refresh": orchestrator.CACHE_MODE_REFRESH, "off": orchestrator.CACHE_MODE_OFF}
_SEARCH_MODES = {"hybrid": retrieval.SEARCH_MODE_HYBRID, "dense": retrieval.SEARCH_MODE_DENSE, "sparse": retrieval.SEARCH_MODE_SPARSE}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Upload:
    """A document under a name of its own: `name` is what it is known by in its collection."""

    name: str
    content: bytes | Path
    """A file is read when its turn comes."""
    title: str = ""
    media_type: str = ""
    metadata: Mapping[str, str | float | bool] = field(default_factory=dict)
    """At most 32 facts to show and to filter by."""
    access: values.Access | None = None
    """Who may read it. None = as the version before; everybody in the tenant if there was none."""


class Answer:
    """One answer, as it streams: iterate it once, over its events or its `text()`, or wait for the `final()` whole.

    The call begins with the first event asked for. Raises a TailraceError; Interrupted if the stream ends without its receipt.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._events = self._read()
        self.answer_id = ""
        """Id to resume, cancel and look it up with; known from the first event on."""
        self.last_sequence = 0
        """Number of the last event read: where to resume after."""

    def __aiter__(self) -> AsyncIterator[values.Event]:
        return self._events

    async def aclose(self) -> None:
        """Stop reading. The answer itself goes on for its grace time; `AsyncClient.cancel` stops it."""
        await self._events.aclose()

    async def text(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece."""
        async for event in self._events:
            if isinstance(event, values.Delta):
                yield event.text

    async def final(self) -> values.FinalAnswer:
        """The whole answer, read to its end. Raises RuntimeError if it was read to its end before."""
        events = [event async for event in self._events]
        if not events:
            raise RuntimeError("an answer is read once; resume(answer_id) reads it again")
        # Calls of tools have a name in common.
        steps = {(event.name, event.started_ms): event for event in events if isinstance(event, values.Step)}
        receipt = events[-1]
        assert isinstance(receipt, values.Receipt)
        return values.FinalAnswer(
            text="".join(event.text for event in events if isinstance(event, values.Delta)),
            passages=tuple(item for event in events if isinstance(event, values.Passages) for item in event.passages),
            citations=tuple(event for event in events if isinstance(event, values.Citation)),
            steps=tuple(steps.values()),
            session_id=next((event.session_id for event in events if isinstance(event, values.Accepted)), ""),
            receipt=receipt,
            reasoning="".join(event.text for event in events if isinstance(event, values.Reasoning)),
            tool_calls=tuple(event for event in events if isinstance(event, values.ToolCall)),
            tool_results=tuple(event for event in events if isinstance(event, values.ToolResult)),
        )

    async def _read(self) -> AsyncGenerator[values.Event, None]:
        async with _reading(self._begin()) as messages:
            async for message in messages:
                self.answer_id = message.answer_id or self.answer_id
                self.last_sequence = max(self.last_sequence, message.sequence)
                event = values.event(message)
                if event is None:
                    continue
                yield event
                if isinstance(event, values.Receipt):
                    return
        raise Interrupted("the stream ended before the answer did", metadata={"answer_id": self.answer_id})


class AsyncClient:
    """A connection to a Tailrace gateway, for one token. Use it as `async with`, or `close()` it.

    `target` is `host:port`; it and `token` default to TAILRACE_TARGET and TAILRACE_TOKEN. `timeout_s` bounds each call from its
    start to its last message. Pass `credentials` (such as `grpc.ssl_channel_credentials()`) to reach a gateway behind TLS.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 300.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target or os.environ.get("TAILRACE_TARGET") or DEFAULT_TARGET
        self._token = token if token is not None else os.environ.get("TAILRACE_TOKEN", "")
        self._timeout_s = timeout_s
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.target, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self.target, credentials, options=_CHANNEL_OPTIONS)
        self._stub: Any = gateway_service_pb2_grpc.GatewayServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._channel.close()

    def answer(
        self,
        question: str,
        *,
        session_id: str = "",
        model: str = "",
        tier: str = "",
        collection: str = "",
        cache: Cache = "use",
        max_output_tokens: int | None = None,
        output_schema: Mapping[str, Any] | None = None,
        idempotency_key: str = "",
        replaces: str = "",
        tools: Sequence[values.Tool] = (),
        server_tools: Sequence[str] = (),
        images: Sequence[values.Image] = (),
        continues: str = "",
        tool_results: Sequence[values.ToolResult] = (),
        reasoning: bool = False,
    ) -> Answer:
        """Ask. Nothing is sent until the answer is read.

        `replaces` is the answer whose turn this one takes the place of, regenerated or edited. `tools` are the client's own, `server_tools`
        names of the suite's. `continues` is an answer that ended with `tool_use`; the question may be empty then, and `tool_results` have
        one result for each of its open calls. `reasoning` shows what the model thinks, which is paid for as output.
        """
        request = orchestrator.AnswerRequest(
            question=question,
            session_id=session_id,
            model=model,
            tier=tier,
            collection=collection,
            cache=_CACHE_MODES[cache],
            max_output_tokens=max_output_tokens,
            idempotency_key=idempotency_key,
            replaces=replaces,
            tools=[values.tool_message(tool) for tool in tools],
            server_tools=server_tools,
            images=[orchestrator.Image(media_type=image.media_type, data=image.data) for image in images],
            continues=continues,
            tool_results=[orchestrator.ToolResult(call_id=made.call_id, text=made.text, failed=made.failed) for made in tool_results],
            reasoning=reasoning,
        )
        if output_schema is not None:
            schema = struct_pb2.Struct()
            schema.update(output_schema)
            request.output_schema.CopyFrom(schema)
        return Answer(lambda: self._call(self._stub.Answer, request))

    def resume(self, answer_id: str, *, after_sequence: int = 0) -> Answer:
        """Read an answer's events again from after `after_sequence`, then live."""
        request = orchestrator.ResumeAnswerRequest(answer_id=answer_id, after_sequence=after_sequence)
        return Answer(lambda: self._call(self._stub.ResumeAnswer, request))

    async def cancel(self, answer_id: str) -> bool:
        """Stop an answer at once; say whether it was still running."""
        response = await _unary(self._call(self._stub.CancelAnswer, orchestrator.CancelAnswerRequest(answer_id=answer_id)))
        return bool(response.was_running)

    async def confirm(self, answer_id: str, call_id: str, *, allowed: bool) -> bool:
        """Say whether a call that waits for a person's word may be made; say whether it was still waiting. The first word counts."""
        request = orchestrator.ConfirmToolCallRequest(answer_id=answer_id, call_id=call_id, allowed=allowed)
        return bool((await _unary(self._call(self._stub.ConfirmToolCall, request))).was_waiting)

    async def search(
        self,
        query: str,
        *,
        limit: int = 10,
        mode: Mode = "hybrid",
        collection: str = "",
        more_collections: Sequence[str] = (),
        document_ids: Sequence[str] = (),
        metadata: Sequence[values.Condition] = (),
        neighbours: int = 0,
        explain: bool = False,
    ) -> AsyncIterator[values.Hit]:
        """Search documents; best hit first.

        All conditions on `metadata` hold together. `more_collections` are searched as one with `collection`. `neighbours` are chunks to
        send along from before and after each hit.
        """
        request = retrieval.SearchRequest(
            query=query,
            limit=limit,
            mode=_SEARCH_MODES[mode],
            collection=collection,
            more_collections=more_collections,
            document_ids=document_ids,
            metadata=[values.condition_message(condition) for condition in metadata],
            neighbours=neighbours,
            explain=explain,
            batches=True,
        )
        async with _reading(self._call(self._stub.Search, request)) as messages:
            async for message in messages:
                for row in (message, *message.more):
                    yield values.hit(row)

    async def ingest(self, *documents: str | Path | Upload, collection: str = "") -> AsyncIterator[values.Progress]:
        """Take in files and uploads, and report every stage of each. One that fails does not stop the others.

        A path is known by the name it is given with; for another name pass an Upload. Raises OSError for a file that cannot be read.
        """

        unreadable: list[OSError] = []

        async def requests() -> AsyncIterator[retrieval.IngestDocumentsRequest]:
            for document in documents:
                upload = _upload(document)
                try:
                    content = upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes()
                except OSError as error:  # raised in here it would reach nobody: gRPC only cancels the call
                    unreadable.append(error)
                    return
                header = retrieval.DocumentHeader(
                    title=upload.title,
                    source_uri=upload.name,
                    collection=collection,
                    media_type=upload.media_type,
                    access=retrieval.Access(users=upload.access.users, groups=upload.access.groups) if upload.access else None,
                )
                for key, fact in upload.metadata.items():
                    header.metadata[key].CopyFrom(values.fact_message(fact))
                yield retrieval.IngestDocumentsRequest(header=header)
                for start in range(0, len(content), CONTENT_BYTES_PER_MESSAGE):
                    yield retrieval.IngestDocumentsRequest(content=content[start : start + CONTENT_BYTES_PER_MESSAGE])

        for document in documents:
            if isinstance(path := _upload(document).content, Path):
                path.stat()  # a missing file is the caller's mistake, said before anything is sent
        async with _reading(self._call(self._stub.IngestDocuments, requests())) as messages:
            async for message in messages:
                yield values.progress(message)
        if unreadable:
            raise unreadable[0]

    async def jobs(self) -> AsyncIterator[values.Job]:
        """Ingestions, newest first: one's own, or as admin all of the tenant's. Pages are fetched as they are read."""
        token = ""
        while True:
            request = retrieval.ListIngestionJobsRequest(page_token=token)
            token = ""
            async with _reading(self._call(self._stub.ListIngestionJobs, request)) as messages:
                async for message in messages:
                    token = message.next_page_token
                    yield values.job(message)
            if not token:
                return

    async def job(self, job_id: str) -> tuple[values.Job, tuple[values.Progress, ...]]:
        """An ingestion as it stands now, and the latest of each document."""
        rows: list[values.Progress] = []
        first = 0
        while True:
            request = retrieval.GetIngestionJobRequest(job_id=job_id, first_document=first)
            response = await _unary(self._call(self._stub.GetIngestionJob, request))
            rows += map(values.progress, response.documents)
            if (first := response.next_document) == 0:
                return values.job(response), tuple(rows)

    async def watch_job(self, job_id: str) -> AsyncIterator[values.Progress]:
        """An ingestion's progress from its beginning, then live until it has ended."""
        async with _reading(self._call(self._stub.WatchIngestionJob, retrieval.WatchIngestionJobRequest(job_id=job_id))) as messages:
            async for message in messages:
                yield values.progress(message)

    async def cancel_job(self, job_id: str, *, index: int | None = None) -> int:
        """Stop an ingestion, or one document of it; return how many documents will not be indexed."""
        request = retrieval.CancelIngestionJobRequest(job_id=job_id, index=index)
        return int((await _unary(self._call(self._stub.CancelIngestionJob, request))).cancelled)

    async def retry_job(self, job_id: str, *, index: int | None = None) -> int:
        """Take in again what failed or was cancelled; return how many documents are on their way again."""
        request = retrieval.RetryIngestionJobRequest(job_id=job_id, index=index)
        return int((await _unary(self._call(self._stub.RetryIngestionJob, request))).retried)

    async def list_documents(self, *, collection: str = "") -> AsyncIterator[values.Document]:
        """Every document, newest first; pages are fetched as they are read."""
        token = ""
        while True:
            request = retrieval.ListDocumentsRequest(collection=collection, page_token=token)
            token = ""
            async with _reading(self._call(self._stub.ListDocuments, request)) as messages:
                async for message in messages:
                    token = message.next_page_token
                    yield values.document(message.document)
            if not token:
                return

    async def collections(self) -> AsyncIterator[values.Collection]:
        """The tenant's collections, by name, and which embedder each is found by."""
        async with _reading(self._call(self._stub.ListCollections, retrieval.ListCollectionsRequest())) as messages:
            async for message in messages:
                yield values.collection(message)

    async def delete_document(self, document_id: str) -> int:
        """Remove a document; return how many chunks it had."""
        response = await _unary(self._call(self._stub.DeleteDocument, retrieval.DeleteDocumentRequest(document_id=document_id)))
        return int(response.chunks_deleted)

    async def operation(self, operation_id: str) -> values.Operation:
        """What is kept of one answer: its id is the operation's."""
        response = await _unary(self._call(self._stub.GetOperation, ledger.GetOperationRequest(operation_id=operation_id)))
        return values.operation(response.operation)

    async def operations(self, *, limit: int = 50, session_id: str = "") -> AsyncIterator[values.Operation]:
        """The latest operations, newest first. 1-1000."""
        request = ledger.ListOperationsRequest(page_size=limit, session_id=session_id)
        async with _reading(self._call(self._stub.ListOperations, request)) as messages:
            async for message in messages:
                yield values.operation(message.operation)

    async def usage(self, *group_by: str, since: datetime | None = None, until: datetime | None = None) -> AsyncIterator[values.UsageRow]:
        """Tokens, cost, savings and latency, grouped by any of day, hour, user, session, model, tier, step, cache, purpose."""
        request = ledger.QueryUsageRequest(group_by=group_by, to=values.moment_message(until), **{"from": values.moment_message(since)})
        async with _reading(self._call(self._stub.QueryUsage, request)) as messages:
            async for message in messages:
                yield values.usage_row(message)

    def _call(self, method: Any, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {self._token}"),) if self._token else ()
        return method(request, metadata=metadata, timeout=self._timeout_s)


def _upload(document: str | Path | Upload) -> Upload:
    return document if isinstance(document, Upload) else Upload(str(document), Path(document))


async def _unary(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


@contextlib.asynccontextmanager
async def _reading(call: Any) -> AsyncIterator[Any]:
    """The messages of a streaming call. Left early, it closes the call; errors come out as ours."""
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()  # nothing happens if it has ended


class BlockingAnswer:
    """An Answer for code without an event loop."""

    def __init__(self, answer: Answer, run: Callable[[Coroutine[Any, Any, Any]], Any], drain: Callable[[AsyncIterable[Any]], Any]) -> None:
        self._answer, self._run, self._drain = answer, run, drain

    @property
    def answer_id(self) -> str:
        return self._answer.answer_id

    @property
    def last_sequence(self) -> int:
        return self._answer.last_sequence

    def __iter__(self) -> Iterator[values.Event]:
        events: Iterator[values.Event] = self._drain(self._answer)
        return events

    def text(self) -> Iterator[str]:
        """The answer's text, piece by piece."""
        pieces: Iterator[str] = self._drain(self._answer.text())
        return pieces

    def final(self) -> values.FinalAnswer:
        """The whole answer, read to its end. Raises RuntimeError if it was read to its end before."""
        whole: values.FinalAnswer = self._run(self._answer.final())
        return whole


class Client:
    """AsyncClient for code without an event loop: the same methods, without `await`. Not for use from several threads at once."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 300.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> AsyncClient:
            return AsyncClient(target, token=token, timeout_s=timeout_s, credentials=credentials)

        self._client: AsyncClient = self._runner.run(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._client.close())
        self._runner.close()

    def answer(
        self,
        question: str,
        *,
        session_id: str = "",
        model: str = "",
        tier: str = "",
        collection: str = "",
        cache: Cache = "use",
        max_output_tokens: int | None = None,
        output_schema: Mapping[str, Any] | None = None,
        idempotency_key: str = "",
        replaces: str = "",
        tools: Sequence[values.Tool] = (),
        server_tools: Sequence[str] = (),
        images: Sequence[values.Image] = (),
        continues: str = "",
        tool_results: Sequence[values.ToolResult] = (),
        reasoning: bool = False,
    ) -> BlockingAnswer:
        """See AsyncClient.answer."""
        answer = self._client.answer(
            question,
            session_id=session_id,
            model=model,
            tier=tier,
            collection=collection,
            cache=cache,
            max_output_tokens=max_output_tokens,
            output_schema=output_schema,
            idempotency_key=idempotency_key,
            replaces=replaces,
            tools=tools,
            server_tools=server_tools,
            images=images,
            continues=continues,
            tool_results=tool_results,
            reasoning=reasoning,
        )
        return BlockingAnswer(answer, self._runner.run, self._drain)

    def resume(self, answer_id: str, *, after_sequence: int = 0) -> BlockingAnswer:
        """See AsyncClient.resume."""
        return BlockingAnswer(self._client.resume(answer_id, after_sequence=after_sequence), self._runner.run, self._drain)

    def cancel(self, answer_id: str) -> bool:
        """See AsyncClient.cancel."""
        return self._runner.run(self._client.cancel(answer_id))

    def confirm(self, answer_id: str, call_id: str, *, allowed: bool) -> bool:
        """See AsyncClient.confirm."""
        return self._runner.run(self._client.confirm(answer_id, call_id, allowed=allowed))

    def search(
        self,
        query: str,
        *,
        limit: int = 10,
        mode: Mode = "hybrid",
        collection: str = "",
        more_collections: Sequence[str] = (),
        document_ids: Sequence[str] = (),
        metadata: Sequence[values.Condition] = (),
        neighbours: int = 0,
        explain: bool = False,
    ) -> Iterator[values.Hit]:
        """See AsyncClient.search."""
        found = self._client.search(
            query,
            limit=limit,
            mode=mode,
            collection=collection,
            more_collections=more_collections,
            document_ids=document_ids,
            metadata=metadata,
            neighbours=neighbours,
            explain=explain,
        )
        return self._drain(found)

    def ingest(self, *documents: str | Path | Upload, collection: str = "") -> Iterator[values.Progress]:
        """See AsyncClient.ingest."""
        return self._drain(self._client.ingest(*documents, collection=collection))

    def list_documents(self, *, collection: str = "") -> Iterator[values.Document]:
        """See AsyncClient.list_documents."""
        return self._drain(self._client.list_documents(collection=collection))

    def collections(self) -> Iterator[values.Collection]:
        """See AsyncClient.collections."""
        return self._drain(self._client.collections())

    def delete_document(self, document_id: str) -> int:
        """See AsyncClient.delete_document."""
        return self._runner.run(self._client.delete_document(document_id))

    def operation(self, operation_id: str) -> values.Operation:
        """See AsyncClient.operation."""
        return self._runner.run(self._client.operation(operation_id))

    def operations(self, *, limit: int = 50, session_id: str = "") -> Iterator[values.Operation]:
        """See AsyncClient.operations."""
        return self._drain(self._client.operations(limit=limit, session_id=session_id))

    def usage(self, *group_by: str, since: datetime | None = None, until: datetime | None = None) -> Iterator[values.UsageRow]:
        """See AsyncClient.usage."""
        return self._drain(self._client.usage(*group_by, since=since, until=until))

    def _drain(self, items: AsyncIterable[T]) -> Iterator[T]:
        """Read an async iterable item by item; leaving early closes it."""
        return _blocking(items, self._runner)


def _blocking(items: AsyncIterable[T], runner: asyncio.Runner) -> Generator[T, None, None]:
    iterator = aiter(items)

    async def following() -> T:
        return await anext(iterator)

    try:
        while True:
            try:
                item = runner.run(following())
            except StopAsyncIteration:
                return
            yield item
    finally:
        if isinstance(iterator, AsyncGenerator):
            with contextlib.suppress(RuntimeError):  # the client was closed first, and the call with it
                runner.run(iterator.aclose())
