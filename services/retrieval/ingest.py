"""The other chain: received → parsed → chunked → embedded → indexed, for one document after the other, with progress told as it happens.

A document is written only when all of it is embedded, in one change of the registry; a caller who leaves, or a document that fails,
leaves nothing half-written.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath

import numpy as np
import structlog

from services.chassis.afterwork import AfterWork
from services.chassis.clock import Clock
from services.chassis.errors import DomainError, Internal, NotFound, Overloaded
from services.chassis.telemetry import span
from services.retrieval.chunking import chunked, in_context
from services.retrieval.domain import Document, Extracted, Progress, Stage, Upload, document_id
from services.retrieval.parsers import read
from services.retrieval.ports import Embedder, SparseEncoder, Vectors
from services.retrieval.registry import Registry

log = structlog.get_logger(__name__)

DOCUMENT_BYTES_MAX = 20 * 1024 * 1024
DOCUMENTS_PER_JOB_MAX = 10_000
CHUNKS_PER_STEP = 64
"""Chunks embedded between two progress messages: about two seconds of one core."""
EVENTS_KEPT_MAX = 50_000
"""Progress messages of ended jobs that are kept, all jobs together; the oldest jobs go first."""
TITLE_CHARACTERS_MAX = 512


class Buffer:
    """Bytes received and not yet indexed, all ingestions together."""

    def __init__(self, bytes_max: int, wait_s: float = 10.0) -> None:
        self._free = bytes_max
        self._wait_s = wait_s
        self._given = asyncio.Condition()

    async def take(self, count: int) -> None:
        """Wait until `count` bytes are free.

        Raises Overloaded if that takes too long, so that half-received documents cannot block each other.
        """
        try:
            async with asyncio.timeout(self._wait_s), self._given:
                await self._given.wait_for(lambda: self._free >= count)
                self._free -= count
        except TimeoutError:
            raise Overloaded("too many documents are being received", retry_after_ms=5000) from None

    async def give(self, count: int) -> None:
        async with self._given:
            self._free += count
            self._given.notify_all()


@dataclass(frozen=True, slots=True)
class Submission:
    """A received document, or why it was refused."""

    index: int
    upload: Upload
    refusal: DomainError | None


class Job:
    """One ingestion: documents go in, progress comes out, also later and also again."""

    def __init__(self, job_id: str, tenant: str, created_at: datetime, *, detach: bool, buffer: Buffer) -> None:
        self.job_id = job_id
        self.tenant = tenant
        self.created_at = created_at
        self.detach = detach
        self.ended = False
        self.events: list[Progress] = []
        self.task: asyncio.Task[None] | None = None
        self._shared = buffer
        self._held = 0
        self._inbox: asyncio.Queue[Submission | None] = asyncio.Queue()
        # One document may wait while another is worked on; then the caller's stream waits.
        self._room = asyncio.Semaphore(1)
        self._news = asyncio.Event()

    async def buffer(self, count: int) -> None:
        """Account for `count` received bytes. Raises Overloaded."""
        await self._shared.take(count)
        self._held += count

    async def release(self, count: int) -> None:
        """Give back `count` bytes."""
        self._held -= count
        await self._shared.give(count)

    async def submit(self, submission: Submission) -> None:
        """Hand in a document. Waits while the one before has not begun."""
        await self._room.acquire()
        self._inbox.put_nowait(submission)

    def close(self) -> None:
        """Say that no more documents come."""
        self._inbox.put_nowait(None)

    def cancel(self) -> None:
        """Stop where it is; nothing half-written remains."""
        assert self.task is not None
        self.task.cancel()

    async def submissions(self) -> AsyncIterator[Submission]:
        """Documents as they are handed in; each is given back to the buffer when the next is asked for."""
        while (submission := await self._inbox.get()) is not None:
            self._room.release()
            yield submission
            await self.release(len(submission.upload.content))

    def tell(self, progress: Progress) -> None:
        self.events.append(progress)
        self._wake()

    async def end(self) -> None:
        self.ended = True
        self._wake()
        await self.release(self._held)

    def latest(self) -> list[Progress]:
        """Where each document stands, in the order they came."""
        by_index = {event.index: event for event in self.events}
        return [by_index[index] for index in sorted(by_index)]

    async def watch(self) -> AsyncIterator[Progress]:
        """Everything told so far, then live until the job has ended. Any number may watch."""
        place = 0
        while True:
            news = self._news
            while place < len(self.events):
                place += 1
                yield self.events[place - 1]
            if self.ended and place == len(self.events):
                return
            await news.wait()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


async def in_a_thread(upload: Upload) -> Extracted:
    """Parse in a thread of this process."""
    return await asyncio.to_thread(read, upload)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What an ingestion works with."""

    embedder: Embedder
    sparse: SparseEncoder
    registry: Registry
    parse: Callable[[Upload], Awaitable[Extracted]] = in_a_thread


class Ingestion:
    """Runs jobs and remembers them. Its tasks outlive the calls that began them."""

    def __init__(
        self, pipeline: Pipeline, afterwork: AfterWork, clock: Clock, new_id: Callable[[], str], *, jobs_max: int, buffer: Buffer
    ) -> None:
        self._pipeline = pipeline
        self._afterwork = afterwork
        self._clock = clock
        self._new_id = new_id
        self._jobs_max = jobs_max
        self._buffer = buffer
        self._jobs: dict[str, Job] = {}

    def begin(self, tenant: str, *, detach: bool) -> Job:
        """Start a job that waits for documents. Raises Overloaded if too many run."""
        self._forget_old()
        if sum(not job.ended for job in self._jobs.values()) >= self._jobs_max:
            raise Overloaded("too many ingestions are running", retry_after_ms=5000)
        job = Job(self._new_id(), tenant, self._clock.now(), detach=detach, buffer=self._buffer)
        job.task = self._afterwork.spawn(self._run(job), f"ingestion {job.job_id}")
        self._jobs[job.job_id] = job
        return job

    def job(self, tenant: str, job_id: str) -> Job:
        """Raises NotFound if the tenant has no such job (any more)."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFound("there is no such ingestion", kind="job")
        return job

    async def delete(self, tenant: str, document_id: str) -> Document:
        """Remove a document and all that rests on it; once begun it is carried through. Raises NotFound."""
        await self._pipeline.registry.document(tenant, document_id)
        return await asyncio.shield(self._afterwork.spawn(self._pipeline.registry.delete(tenant, document_id), "delete document"))

    async def _run(self, job: Job) -> None:
        try:
            async for submission in job.submissions():
                await self._ingest(job, submission)
        finally:
            await job.end()

    async def _ingest(self, job: Job, submission: Submission) -> None:
        """Take in one document; its failure is told and stops nobody else."""
        upload = submission.upload
        last = Progress(submission.index, upload.name, Stage.RECEIVED, bytes=len(upload.content))

        def tell(progress: Progress) -> None:
            nonlocal last
            last = progress
            job.tell(progress)

        try:
            tell(last)
            if submission.refusal is not None:
                raise submission.refusal
            await self._take_in(job, upload, last, tell)
        except DomainError as error:
            job.tell(replace(last, stage=Stage.FAILED, error_reason=error.reason, error_detail=error.detail))
        except Exception as error:
            log.exception("ingestion_failed_unexpectedly", error=type(error).__name__)
            job.tell(replace(last, stage=Stage.FAILED, error_reason=Internal.reason, error_detail=Internal.title))

    async def _take_in(self, job: Job, upload: Upload, state: Progress, tell: Callable[[Progress], None]) -> None:
        pipeline = self._pipeline
        with span("retrieval.parse"):
            sha256 = await asyncio.to_thread(lambda: hashlib.sha256(upload.content).hexdigest())
            extracted = await pipeline.parse(upload)
        source_uri = upload.source_uri or upload.title or extracted.title or sha256
        title = (upload.title or extracted.title or PurePosixPath(source_uri).name)[:TITLE_CHARACTERS_MAX]
        id_ = document_id(job.tenant, upload.collection, source_uri)
        state = replace(state, stage=Stage.PARSED, document_id=id_, name=upload.name or source_uri)
        tell(state)
        if (same := await pipeline.registry.unchanged(job.tenant, id_, sha256)) is not None:
            tell(replace(state, stage=Stage.UNCHANGED, chunks_total=same.chunks, chunks_done=same.chunks, version=same.version))
            return
        with span("retrieval.chunk"):
            chunks = await asyncio.to_thread(chunked, extracted, pipeline.embedder.count_tokens)
        state = replace(state, stage=Stage.CHUNKED, chunks_total=len(chunks))
        tell(state)
        texts = [in_context(title, chunk) for chunk in chunks]
        with span("retrieval.embed_chunks"):
            dense = await self._embedded(texts, lambda done: tell(replace(state, chunks_done=done)))
        language = await asyncio.to_thread(pipeline.sparse.language, extracted.text)
        sparse = await asyncio.to_thread(lambda: [pipeline.sparse.document(text, language) for text in texts])
        state = replace(state, stage=Stage.EMBEDDED, chunks_done=len(chunks))
        tell(state)
        draft = Document(
            document_id=id_,
            tenant=job.tenant,
            collection=upload.collection,
            source_uri=source_uri,
            title=title,
            media_type=extracted.media_type,
            version=0,
            content_sha256=sha256,
            bytes=len(upload.content),
            characters=len(extracted.text),
            chunks=len(chunks),
            indexed_us=0,
            revision="",
            metadata=dict(upload.metadata),
            pages=len(extracted.page_starts),
            language=language,
        )
        with span("retrieval.index"):
            # From here on the change is made whole, whoever leaves.
            document = await asyncio.shield(
                self._afterwork.spawn(pipeline.registry.replace(draft, chunks, dense, sparse), "index document")
            )
        tell(replace(state, stage=Stage.INDEXED, version=document.version))

    async def _embedded(self, texts: list[str], done: Callable[[int], None]) -> Vectors:
        parts = []
        for begin in range(0, len(texts), CHUNKS_PER_STEP):
            parts.append((await self._pipeline.embedder.embed_texts(texts[begin : begin + CHUNKS_PER_STEP])).vectors)
            if begin + CHUNKS_PER_STEP < len(texts):
                done(begin + CHUNKS_PER_STEP)
        return np.concatenate(parts)

    def _forget_old(self) -> None:
        """Drop the oldest ended jobs while more progress is kept than is good."""
        ended = [job for job in self._jobs.values() if job.ended]
        kept = sum(len(job.events) + 1 for job in ended)
        for job in ended:
            if kept <= EVENTS_KEPT_MAX:
                return
            kept -= len(job.events) + 1
            del self._jobs[job.job_id]
