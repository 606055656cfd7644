"""The other chain: received → parsed → chunked → embedded → indexed, for documents that workers claim, with progress told as it happens.

A document is written only when all of it is embedded, in one change of the registry; a caller who leaves, a document that fails, or a
service that dies leaves nothing half-written. Where jobs are kept is the store's affair.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import structlog

from services.chassis.afterwork import AfterWork
from services.chassis.ending import ended
from services.chassis.errors import DomainError, Internal, NotAllowed, NotFound, Overloaded, Unavailable
from services.chassis.injection import flags_of
from services.chassis.principal import Principal, set_current
from services.chassis.telemetry import span
from services.retrieval import facts
from services.retrieval.access import everything_of, readers_of
from services.retrieval.chunking import CUT, chunked, in_context
from services.retrieval.domain import Chunk, Document, Extracted, Progress, Stage, Upload, Viewer, document_id, page_list
from services.retrieval.jobs import Claim, JobState, JobStore, Owner, Taken, Told
from services.retrieval.ports import Embedder, Sparse, SparseEncoder, Vectors
from services.retrieval.registry import Registry

log = structlog.get_logger(__name__)

DOCUMENT_BYTES_MAX = 20 * 1024 * 1024
DOCUMENTS_PER_JOB_MAX = 10_000
CHUNKS_PER_STEP = 64
"""Chunks embedded between two progress messages: about two seconds of one core."""
TITLE_CHARACTERS_MAX = 512
ROOM_WAIT_S = 10.0
"""How long a received document waits for room in a full store before it is refused."""
STILL_WAIT_S = 120.0
"""How long it waits for the job's own documents to be worked off while no ingestion of anybody tells any progress."""
ROOM_RETRY_S = 0.05
ROOM_RETRY_S_MAX = 1.0
"""What the pause between two questions for room grows to."""
IDLE_S = 0.25
"""How soon a worker sees what another replica has received; what its own has received it sees at once."""
IDLE_MAX_S = 2.0
"""What it grows to while nothing comes. What this replica takes in wakes it; only what others leave behind has to be looked for."""
AWAY_RETRY_S = 0.5
TRIES_MAX = 3
"""How often a document is begun by one claim while what it needs is away for a moment; the pause doubles from AWAY_RETRY_S."""
RECORDS_PER_WRITE = 64
TOLD_TOGETHER_S = 0.1
"""How long news that nobody waits for may wait for others: a round trip for each costs as much as a tenth of a document's embedding."""
SWEEP_S = 30.0


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


def flagged(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks, each with what makes it look like an instruction."""
    return [replace(chunk, flags=flags_of(chunk.text)) for chunk in chunks]


def _readers(upload: Upload, old: Document | None) -> tuple[str, ...]:
    """Who may read the new version. Raises NotAllowed if there is a version that its uploader may not read."""
    if old is not None and upload.uploader is not None and not upload.uploader.sees(old):
        raise NotAllowed("a document of this name is limited to others", needs="access")
    if upload.access is None:
        return old.readers if old is not None else ()
    return readers_of(upload.access, upload.uploader or everything_of(""))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What an ingestion works with."""

    embedder: Embedder
    sparse: SparseEncoder
    registry: Registry
    parse: Callable[[Upload], Awaitable[Extracted]]


class Job:
    """One ingestion while its caller sends it: documents go in, progress comes out."""

    def __init__(self, job_id: str, *, detach: bool, ingestion: "Ingestion") -> None:
        self.job_id = job_id
        self.detach = detach
        self.closed = False
        """The caller has sent all, or can send no more."""
        self._ingestion = ingestion

    async def buffer(self, count: int) -> None:
        """Account for `count` received bytes in memory. Raises Overloaded."""
        await self._ingestion.buffer.take(count)

    async def release(self, count: int) -> None:
        """Give back `count` bytes."""
        await self._ingestion.buffer.give(count)

    async def add(self, upload: Upload, received: Progress, pieces: Sequence[bytes], *, staged: bool) -> bool:
        """Keep a document; durable on return. False = the job takes no more.

        While the job has its share of the store, the caller's stream waits. Raises Overloaded when others keep the store full, and when
        no ingestion at all moves on.
        """
        store, size = self._ingestion.store, sum(map(len, pieces))
        waited_s, pause_s, told = 0.0, ROOM_RETRY_S, -1
        while (room := await store.reserve(self.job_id, received.index, size)).taken in (Taken.WAIT, Taken.FULL):
            if room.taken is Taken.WAIT and room.told != told:
                waited_s, told = 0.0, room.told
            if waited_s > (ROOM_WAIT_S if room.taken is Taken.FULL else STILL_WAIT_S):
                raise Overloaded("too many documents wait to be indexed", retry_after_ms=5000)
            await asyncio.sleep(pause_s)
            waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, ROOM_RETRY_S_MAX)
        taken = room.taken is Taken.TAKEN and await store.add(self.job_id, upload, received, pieces, staged=staged)
        self._ingestion.wake()
        return taken

    async def refuse(self, received: Progress, refusal: DomainError) -> None:
        """Tell that a document was not taken, and why."""
        failed = replace(received, stage=Stage.FAILED, error_reason=refusal.reason, error_detail=refusal.detail)
        await self._ingestion.store.refuse(self.job_id, [received, failed])

    async def close(self, *, commit: bool) -> None:
        """Say that no more documents come; a staged one is taken in with `commit`, else dropped. Done even if cancelled here."""
        self.closed = True
        await self._ingestion.outliving(self._ingestion.store.close(self.job_id, commit=commit), "close ingestion")
        self._ingestion.wake()

    async def leave(self) -> None:
        """The caller has left before the end: unless detached, nothing more of it is taken in. Done even if cancelled here."""
        if not self.detach and not self._ingestion.stopping:
            await self._ingestion.outliving(self._ingestion.cancel_all(self.job_id), "cancel ingestion")

    def watch(self) -> AsyncIterator[Progress]:
        """Everything told so far, then live until the job has ended."""
        return self._ingestion.store.events(self.job_id)


class Reporter:
    """Progress of this replica's documents on its way to the store, in order, several in one round trip."""

    def __init__(self, store: JobStore, lost: Callable[[Claim], None]) -> None:
        self._store = store
        self._lost = lost
        self._waiting: list[tuple[Told, asyncio.Future[bool]]] = []
        self._news = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None

    def say(self, told: Told) -> asyncio.Future[bool]:
        """Whether it was recorded, once it is known; False = the claim is no longer ours. It goes at once, and what was said before it."""
        future = self._add(told)
        self._news.set()
        return future

    def mention(self, told: Told) -> None:
        """As `say`, for news that nobody waits for: they go with the next that somebody does, or soon."""
        self._add(told)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(TOLD_TOGETHER_S, self._news.set)

    def _add(self, told: Told) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((told, future))
        return future

    async def run(self) -> None:
        """Record what is said; while the store is away, keep it."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._due is not None:
                self._due.cancel()
                self._due = None
            while batch := self._waiting[:RECORDS_PER_WRITE]:
                try:
                    taken = await self._store.record([told for told, _ in batch])
                except Unavailable:
                    await asyncio.sleep(AWAY_RETRY_S)
                    continue
                del self._waiting[: len(batch)]
                for (told, future), ours in zip(batch, taken, strict=True):
                    if not ours:
                        self._lost(told.claim)
                    if not future.done():
                        future.set_result(ours)


class _Lost(Exception):
    """The claim went to somebody else, or the document was cancelled."""


@dataclass(frozen=True, slots=True)
class _Voice:
    """How the work on one document is told."""

    tell: Callable[[Progress], asyncio.Future[bool]]
    mention: Callable[[Progress], None]
    """For what nobody waits for."""


def _words(sparse: SparseEncoder, whole: str, texts: Sequence[str]) -> tuple[str, list[Sparse]]:
    """The language of a document, and the words of its chunks in it."""
    language = sparse.language(whole)
    return language, [sparse.document(text, language) for text in texts]


class Ingestion:
    """Receives, claims and works off. Its tasks outlive the calls that began them."""

    def __init__(
        self,
        pipeline: Pipeline,
        store: JobStore,
        afterwork: AfterWork,
        new_id: Callable[[], str],
        *,
        workers: int,
        lease_s: float,
        buffer: Buffer,
    ) -> None:
        self.store = store
        self.buffer = buffer
        self.stopping = False
        self._pipeline = pipeline
        self._afterwork = afterwork
        self._new_id = new_id
        self._workers = workers
        self._beat_s = min(1.0, lease_s / 3)
        self._idle_s_max = max(IDLE_S, min(IDLE_MAX_S, lease_s / 5))
        self._wake = asyncio.Event()
        self._held: dict[str, asyncio.Task[None]] = {}
        self._working: list[asyncio.Task[None]] = []
        self._reporter = Reporter(store, self._drop)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work until left; `drain` before that, so that what is begun is handed back in good order."""
        self._working = [asyncio.create_task(self._work(), name=f"ingest worker {number}") for number in range(self._workers)]
        keeping = [asyncio.create_task(work(), name=f"ingest {work.__name__}") for work in (self._reporter.run, self._beat, self._sweep)]
        try:
            yield
        finally:
            await ended(*self._working, *keeping)

    async def drain(self, timeout_s: float) -> int:
        """Claim no more, hand back what is not being written, finish what is; return how much was abandoned."""
        self.stop()
        await ended(*self._working)
        abandoned = await self._afterwork.drain(timeout_s)
        with contextlib.suppress(Unavailable):  # then the lease ends them
            await self.store.leave()
        return abandoned

    def stop(self) -> None:
        """A caller whose call ends from now on has not left: it is we who go."""
        self.stopping = True

    def wake(self) -> None:
        """There may be something to claim."""
        self._wake.set()

    async def outliving(self, work: "asyncio._CoroutineLike[None]", name: str) -> None:
        """Carry `work` through, whoever is cancelled."""
        await asyncio.shield(self._afterwork.spawn(work, name))  # type: ignore[arg-type]

    async def begin(self, owner: Owner, *, detach: bool) -> Job:
        """Start a job that waits for documents. Raises Overloaded if too many run."""
        job_id = self._new_id()
        if self.stopping or not await self.store.begin(job_id, owner):
            raise Overloaded("too many ingestions are running", retry_after_ms=5000)
        return Job(job_id, detach=detach, ingestion=self)

    async def job(self, reader: Owner, job_id: str) -> JobState:
        """Raises NotFound if there is no such job (any more) that `reader` may see. A reader without a user sees the whole tenant's."""
        state = await self.store.job(job_id) if 1 <= len(job_id) <= 128 else None
        if state is None or state.owner.tenant != reader.tenant or (reader.user and state.owner.user != reader.user):
            raise NotFound("there is no such ingestion", kind="job")
        return state

    async def cancel(self, reader: Owner, job_id: str, index: int | None) -> int:
        """Stop a job, or one document of it; return how many documents. Raises NotFound."""
        await self.job(reader, job_id)
        cancelled = await self.store.cancel(job_id, index)
        self._compare(await self.store.beat())
        return cancelled

    async def retry(self, reader: Owner, job_id: str, index: int | None) -> int:
        """Take in again what failed or was cancelled; return how many documents. Raises NotFound, and Overloaded if too many jobs run."""
        await self.job(reader, job_id)
        retried = await self.store.retry(job_id, index)
        if retried is None:
            raise Overloaded("too many ingestions are running", retry_after_ms=5000)
        self.wake()
        return retried

    async def cancel_all(self, job_id: str) -> None:
        """Stop a job whose caller has left."""
        await self.store.cancel(job_id, None)
        self._compare(await self.store.beat())

    async def delete(self, viewer: Viewer, document_id: str) -> Document:
        """Remove a document and all that rests on it; once begun it is carried through. Raises NotFound."""
        await self._pipeline.registry.document(viewer, document_id)
        return await asyncio.shield(self._afterwork.spawn(self._pipeline.registry.delete(viewer.tenant, document_id), "delete document"))

    async def _work(self) -> None:
        """Claim and ingest, one document after the other."""
        pause_s = IDLE_S
        while True:
            self._wake.clear()
            try:
                claim = await self.store.claim()
            except Unavailable:
                await asyncio.sleep(AWAY_RETRY_S)
                continue
            if claim is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()
                pause_s = IDLE_S if self._wake.is_set() else min(2 * pause_s, self._idle_s_max)
                continue
            pause_s = IDLE_S
            task = self._held[claim.key] = asyncio.create_task(self._ingest(claim), name=f"ingest {claim.job_id} {claim.index}")
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                del self._held[claim.key]

    async def _beat(self) -> None:
        """Stay alive for the others, and learn what was taken from us."""
        while True:
            with contextlib.suppress(Unavailable):
                held = set(self._held)
                self._compare(await self.store.beat() | (set(self._held) - held))
            await asyncio.sleep(self._beat_s)

    def _compare(self, ours: set[str]) -> None:
        for key in self._held.keys() - ours:
            self._held[key].cancel()

    async def _sweep(self) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await self.store.sweep()
            await asyncio.sleep(SWEEP_S)

    def _drop(self, claim: Claim) -> None:
        if task := self._held.get(claim.key):
            task.cancel()

    async def _ingest(self, claim: Claim) -> None:
        """Take in one document; its failure is told and stops nobody else."""
        owner = claim.owner
        set_current(Principal(owner.tenant, owner.user, api_key_id=owner.api_key_id))  # who pays for what it costs
        last = claim.latest

        def tell(progress: Progress) -> asyncio.Future[bool]:
            nonlocal last
            last = progress
            return self._reporter.say(Told(claim, progress, committing=progress.stage is Stage.EMBEDDED))

        def mention(progress: Progress) -> None:
            nonlocal last
            last = progress
            self._reporter.mention(Told(claim, progress))

        try:
            await self._patiently(claim, _Voice(tell, mention))
        except _Lost:
            return
        except DomainError as error:
            await self._failed(claim, last, error.reason, error.detail)
        except Exception as error:
            log.exception("ingestion_failed_unexpectedly", error=type(error).__name__)
            await self._failed(claim, last, Internal.reason, Internal.title)

    async def _patiently(self, claim: Claim, voice: _Voice) -> None:
        """Take in one document, and begin again after what may pass by itself: a document must not fail for one slow answer of a store."""
        for tries in range(1, TRIES_MAX + 1):
            try:
                content = await self._content(claim)
                await self._take_in(claim, replace(claim.upload, content=content), claim.latest, voice)
            except DomainError as error:
                if not error.retryable or tries == TRIES_MAX:
                    raise
                log.warning("ingestion_tried_again", reason=error.reason, tries=tries)
                await asyncio.sleep(AWAY_RETRY_S * 2 ** (tries - 1))
            else:
                return

    async def _failed(self, claim: Claim, last: Progress, reason: str, detail: str) -> None:
        await self._reporter.say(Told(claim, replace(last, stage=Stage.FAILED, error_reason=reason, error_detail=detail)))

    async def _content(self, claim: Claim) -> bytes:
        content = await self.store.content(claim)
        if content is None:
            raise NotFound("the document's content is no longer kept", kind="content")
        return content

    async def _take_in(self, claim: Claim, upload: Upload, state: Progress, voice: _Voice) -> None:
        pipeline, tenant = self._pipeline, claim.owner.tenant
        with span("retrieval.parse"):
            sha256 = await asyncio.to_thread(lambda: hashlib.sha256(upload.content).hexdigest())
            extracted = await pipeline.parse(upload)
        source_uri = upload.source_uri or upload.title or extracted.title or sha256
        title = (upload.title or extracted.title or PurePosixPath(source_uri).name)[:TITLE_CHARACTERS_MAX]
        id_ = document_id(tenant, upload.collection, source_uri)
        unread_pages = page_list(extracted.unread_pages)
        state = replace(state, stage=Stage.PARSED, document_id=id_, name=upload.name or source_uri, unread_pages=unread_pages)
        voice.mention(state)
        old = await pipeline.registry.prior(tenant, id_)
        readers = _readers(upload, old)
        unchanged = (
            old is not None
            and (old.content_sha256, old.readers, old.cut) == (sha256, readers, CUT)
            and facts.same(old.metadata, upload.metadata)
            and not (old.unread_pages and len(extracted.text) > old.characters)  # pages that were pictures are read by now
        )
        if old is not None and unchanged and await pipeline.registry.renew(old, claim.received):
            await voice.tell(replace(state, stage=Stage.UNCHANGED, chunks_total=old.chunks, chunks_done=old.chunks, version=old.version))
            return
        with span("retrieval.chunk"):
            chunks = await asyncio.to_thread(lambda: flagged(chunked(extracted, pipeline.embedder.count_tokens, title)))
        state = replace(state, stage=Stage.CHUNKED, chunks_total=len(chunks))
        voice.mention(state)
        texts = [in_context(title, chunk) for chunk in chunks]
        with span("retrieval.embed_chunks"):
            dense, sketches = await self._embedded(texts, lambda done: voice.mention(replace(state, chunks_done=done)))
        language, sparse = await asyncio.to_thread(_words, pipeline.sparse, extracted.text, texts)
        state = replace(state, stage=Stage.EMBEDDED, chunks_done=len(chunks))
        if not await voice.tell(state):
            raise _Lost
        draft = Document(
            document_id=id_,
            tenant=tenant,
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
            readers=readers,
            received=claim.received,
            language=language,
            cut=CUT,
            unread_pages=unread_pages,
        )

        async def write() -> None:
            document = await pipeline.registry.replace(draft, chunks, dense, sparse, sketches)
            # A version that was received later may have been quicker.
            stage = Stage.INDEXED if document.received == draft.received else Stage.UNCHANGED
            await voice.tell(replace(state, stage=stage, version=document.version))

        with span("retrieval.index"):
            # From here on the change is made whole and told, whoever leaves.
            await asyncio.shield(self._afterwork.spawn(write(), "index document"))

    async def _embedded(self, texts: list[str], done: Callable[[int], object]) -> tuple[Vectors, list[str] | None]:
        """The texts' vectors, and their sketches where the embedder tells them."""
        parts = []
        for begin in range(0, len(texts), CHUNKS_PER_STEP):
            parts.append(await self._pipeline.embedder.embed_texts(texts[begin : begin + CHUNKS_PER_STEP]))
            if begin + CHUNKS_PER_STEP < len(texts):
                done(begin + CHUNKS_PER_STEP)
        sketches = [sketch for part in parts for sketch in part.sketches or ()]
        return np.concatenate([part.vectors for part in parts]), sketches or None
