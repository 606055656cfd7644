"""The routes of documents: upload, list, show, delete, search, and the jobs that ingest them. What a document means, retrieval decides."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson

from services.chassis.errors import AnswerInterrupted, DomainError, RequestInvalid
from services.gateway import bodies, render, sse, uploads
from services.gateway.bridge import Bridge
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit
from services.gateway.queries import number, page
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

INGEST_TIMEOUT_S = 3600.0
FINAL_STAGES = frozenset({"indexed", "unchanged", "failed", "cancelled"})

Progress = retrieval.IngestDocumentsResponse


async def upload(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/documents"""
    await _ingest(exchange, kit, uploads.parts_of(exchange))


async def upload_lines(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/documents:bulk"""
    await _ingest(exchange, kit, uploads.parts_of_lines(exchange))


async def listed(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/documents"""
    query = exchange.query({"collection", "page_size", "page_token"})
    size, token = page(query)
    request = retrieval.ListDocumentsRequest(collection=bodies.collection(query.get("collection", "")), page_size=size, page_token=token)
    rows = await kit.backends.retrieval.rows(kit.backends.retrieval.stub.ListDocuments, request)
    documents = [render.plain(row.document) for row in rows if row.HasField("document")]
    await exchange.respond_json({"documents": documents, "next_page_token": rows[-1].next_page_token if rows else ""})


async def collections(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/collections"""
    exchange.query(())
    rows = await kit.backends.retrieval.rows(kit.backends.retrieval.stub.ListCollections, retrieval.ListCollectionsRequest())
    await exchange.respond_json({"collections": [render.plain(row) for row in rows]})


async def show(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/documents/{id}"""
    query = exchange.query({"first_chunk", "chunks_max"})
    request = retrieval.GetDocumentRequest(
        document_id=exchange.params["id"],
        first_chunk=number(query, "first_chunk", 0, 10_000_000),
        chunks_max=number(query, "chunks_max", 1, 1000),
    )
    reply = await kit.backends.retrieval.unary(kit.backends.retrieval.stub.GetDocument, request)
    chunks = [render.chunk(chunk) for chunk in reply.chunks]
    await exchange.respond_json({**render.plain(reply.document), "chunks": chunks, "next_chunk": reply.next_chunk})


async def delete(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/documents/{id}"""
    exchange.query(())
    request = retrieval.DeleteDocumentRequest(document_id=exchange.params["id"])
    reply = await kit.backends.retrieval.unary(kit.backends.retrieval.stub.DeleteDocument, request, timeout_s=30.0, idempotent=False)
    await exchange.respond_json({"document_id": exchange.params["id"], "chunks_deleted": reply.chunks_deleted})


async def search(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/search"""
    exchange.query(())
    request = bodies.parse(await exchange.json(), bodies.SearchBody).message()
    request.batches = True
    messages = await kit.backends.retrieval.rows(kit.backends.retrieval.stub.Search, request)
    await exchange.respond_json({"hits": [render.found(row) for message in messages for row in (message, *message.more)]})


async def job(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/jobs/{id}"""
    first = number(exchange.query({"first_document"}), "first_document", 0, 10_000_000)
    job_id, stub = exchange.params["id"], kit.backends.retrieval.stub
    if not exchange.accepts("text/event-stream"):
        request = retrieval.GetIngestionJobRequest(job_id=job_id, first_document=first)
        await exchange.respond_json(render.plain(await kit.backends.retrieval.unary(stub.GetIngestionJob, request)))
        return
    watch = retrieval.WatchIngestionJobRequest(job_id=job_id)
    with kit.watching():
        async with kit.backends.retrieval.stream(stub.WatchIngestionJob, watch, timeout_s=INGEST_TIMEOUT_S) as messages:
            await _relay(exchange, kit, _summed({}, messages))


async def jobs(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/jobs"""
    size, token = page(exchange.query({"page_size", "page_token"}))
    request = retrieval.ListIngestionJobsRequest(page_size=size, page_token=token)
    rows = await kit.backends.retrieval.rows(kit.backends.retrieval.stub.ListIngestionJobs, request)
    shown = [render.plain(row) for row in rows]
    for row in shown:
        del row["next_page_token"]
    await exchange.respond_json({"jobs": shown, "next_page_token": rows[-1].next_page_token if rows else ""})


async def cancel_job(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/jobs/{id}/cancel"""
    request = retrieval.CancelIngestionJobRequest(job_id=exchange.params["id"], index=await _index(exchange))
    reply = await kit.backends.retrieval.unary(kit.backends.retrieval.stub.CancelIngestionJob, request, idempotent=False)
    await exchange.respond_json({"job_id": exchange.params["id"], "cancelled": reply.cancelled})


async def retry_job(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/jobs/{id}/retry"""
    request = retrieval.RetryIngestionJobRequest(job_id=exchange.params["id"], index=await _index(exchange))
    reply = await kit.backends.retrieval.unary(kit.backends.retrieval.stub.RetryIngestionJob, request, idempotent=False)
    await exchange.respond_json({"job_id": exchange.params["id"], "retried": reply.retried})


async def _index(exchange: Exchange) -> int | None:
    """Which document of the job, if the body names one; it may be left out altogether."""
    exchange.query(())
    body = await exchange.json()
    return bodies.parse(body, bodies.JobPartBody).index if body.strip() else None


async def _ingest(exchange: Exchange, kit: Kit, parts: AsyncIterator[uploads.Part]) -> None:
    wait = _wait(exchange)
    sent = _Sent(parts, detach=not wait)
    stub = kit.backends.retrieval.stub
    async with kit.backends.retrieval.stream(stub.IngestDocuments, sent.requests(), timeout_s=INGEST_TIMEOUT_S) as messages:
        reading = _Reading(messages)
        try:
            latest = await _while_sending(reading, sent)
            if wait:
                await _relay(exchange, kit, _summed(latest, reading))
            else:
                await _until_arrived(latest, reading, sent)
                job_id = next(iter(latest.values())).job_id
                documents = [render.plain(progress) for progress in latest.values()]
                location = [(b"location", f"/v1/jobs/{job_id}".encode())]
                await exchange.respond_json({"job_id": job_id, "status": "running", "documents": documents}, 202, location)
        finally:
            await reading.close()


def _wait(exchange: Exchange) -> bool:
    value = exchange.query({"wait"}).get("wait", "true")
    if value not in ("true", "false"):
        raise RequestInvalid("wait is neither true nor false", field="wait", bound="true, false")
    return value == "true"


class _Sent:
    """The documents on their way to retrieval. gRPC takes them in a task of its own, so a mistake in the body is kept for the handler."""

    def __init__(self, parts: AsyncIterator[uploads.Part], *, detach: bool) -> None:
        self._parts = parts
        self._detach = detach
        self.error: Exception | None = None
        self.ended = asyncio.Event()
        self.bytes: list[int] = []
        """Bytes sent of each document."""

    async def requests(self) -> AsyncIterator[uploads.Part]:
        try:
            async for part in self._parts:
                if part.HasField("header"):
                    part.header.detach = self._detach and not self.bytes
                    self.bytes.append(0)
                else:
                    self.bytes[-1] += len(part.content)
                yield part
        except Exception as error:
            # Ending here, or cancelling, could make retrieval take half a document for a whole one; an empty part is refused by
            # its contract, and with it the document it stands in.
            self.error = error
            yield uploads.Part()
        finally:
            self.ended.set()


class _Reading:
    """Progress messages, of which the next one may be waited for and left waiting."""

    def __init__(self, messages: AsyncIterator[Progress]) -> None:
        self._messages = messages
        self._next: asyncio.Task[Progress] | None = None

    def ask(self) -> "asyncio.Task[Progress]":
        """The next message, when it comes. The same task until it was taken."""
        if self._next is None:
            self._next = asyncio.create_task(self._one(), name="ingest-progress")
        return self._next

    def take(self) -> Progress:
        """The message of a finished task. Raises what the call ended with."""
        assert self._next is not None
        task, self._next = self._next, None
        return task.result()

    async def _one(self) -> Progress:
        return await self._messages.__anext__()

    def __aiter__(self) -> "_Reading":
        return self

    async def __anext__(self) -> Progress:
        await asyncio.wait([self.ask()])
        return self.take()

    async def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


async def _while_sending(reading: _Reading, sent: _Sent) -> dict[int, Progress]:
    """Latest progress of each document when the last byte was sent; HTTP clients read nothing earlier, so no more is kept."""
    latest: dict[int, Progress] = {}
    ended = asyncio.create_task(sent.ended.wait(), name="upload-ended")
    try:
        while not sent.ended.is_set():
            await asyncio.wait([reading.ask(), ended], return_when=asyncio.FIRST_COMPLETED)
            if reading.ask().done():
                try:
                    message = reading.take()
                except (StopAsyncIteration, asyncio.CancelledError):
                    break
                except DomainError as refusal:
                    # A mistake in the body is what retrieval's refusal of it comes from.
                    raise (sent.error or refusal) from None
                latest[message.index] = message
    finally:
        ended.cancel()
    if sent.error is not None:
        raise sent.error
    if not sent.ended.is_set():
        raise AnswerInterrupted("the upload was cut off")
    return latest


async def _until_arrived(latest: dict[int, Progress], reading: _Reading, sent: _Sent) -> None:
    """Read progress until retrieval has every byte, so that leaving takes nothing along."""

    def arrived(index: int, size: int) -> bool:
        progress = latest.get(index)
        return progress is not None and (progress.stage != "received" or progress.bytes >= size)

    while not all(arrived(index, size) for index, size in enumerate(sent.bytes)):
        try:
            message = await anext(reading)
        except StopAsyncIteration:
            break
        latest[message.index] = message
    if not latest:
        raise AnswerInterrupted("the ingestion ended before it began")


class _Summary:
    """The end of an ingestion."""

    def __init__(self, latest: dict[int, Progress]) -> None:
        self._latest = latest

    def block(self) -> bytes:
        stages = [progress.stage for progress in self._latest.values()]
        summary = {
            "job_id": next((progress.job_id for progress in self._latest.values()), ""),
            "documents": len(stages),
            "indexed": stages.count("indexed"),
            "unchanged": stages.count("unchanged"),
            "rejected": stages.count("failed"),
        }
        if cancelled := stages.count("cancelled"):
            summary["cancelled"] = cancelled
        return sse.block(orjson.dumps(summary), event=b"done")


async def _summed(latest: dict[int, Progress], messages: AsyncIterator[Progress]) -> AsyncIterator[Progress | _Summary]:
    """What is known already, what comes, and a summary if every document came to its end."""
    for known in list(latest.values()):
        yield known
    async for message in messages:
        latest[message.index] = message
        yield message
    if latest and all(progress.stage in FINAL_STAGES for progress in latest.values()):
        yield _Summary(latest)


async def _relay(exchange: Exchange, kit: Kit, messages: AsyncIterator[Any]) -> None:
    bridge: Bridge[Any] = Bridge(exchange, _block, lambda message: isinstance(message, _Summary), kit.timing, kit.draining)
    with kit.counted(bridge, "documents"):
        if not await bridge.run(messages):
            raise AnswerInterrupted("the ingestion ended without a word")


def _block(message: Progress | _Summary) -> bytes:
    return message.block() if isinstance(message, _Summary) else render.progress(message)
