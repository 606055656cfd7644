"""A caller's stream of headers and content as whole documents, handed to an ingestion while its progress flows back.

Memory for what is being received is one budget for all callers; above it, streams are made to wait. No wire types.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from services.chassis.errors import DomainError, Overloaded, PayloadTooLarge, RequestInvalid
from services.retrieval.domain import Progress, Stage, Upload
from services.retrieval.ingest import DOCUMENT_BYTES_MAX, DOCUMENTS_PER_JOB_MAX, Ingestion, Job
from services.retrieval.jobs import Owner


@dataclass(frozen=True, slots=True)
class Begin:
    """A document begins; its content follows."""

    upload: Upload
    detach: bool


Parts = AsyncIterator[Begin | bytes]
Emit = Callable[[Job, Progress], Awaitable[None]]


async def take_in(ingestion: Ingestion, owner: Owner, parts: Parts, emit: Emit) -> None:
    """Run one ingestion to its end, emitting its progress.

    `emit` must fail once the caller has gone: that is how the end of a stream is told from a caller that died.
    Raises RequestInvalid for a stream that makes no sense; documents that were whole by then are still taken in.
    Cancellation: ends the ingestion with the document it is at, unless it is detached or the service is stopping.
    """
    first = await anext(parts, None)
    if not isinstance(first, Begin):
        raise RequestInvalid("the stream must begin with a document's header", field="header")
    job = await ingestion.begin(owner, detach=first.detach)
    confirmed: list[Progress] = []

    async def confirm(received: Progress) -> None:
        await emit(job, received)
        confirmed.append(received)

    receiving = asyncio.create_task(_receive(job, first, parts, confirm), name="receive documents")
    ended = False
    try:
        async for event in job.watch():
            if event not in confirmed:
                await emit(job, event)
        ended = True
        # Whoever cancels a job ends it while its caller may still be sending; then there is nothing to wait for.
        if job.closed:
            await receiving
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        if not ended:
            await job.leave()


async def _receive(job: Job, first: Begin, parts: Parts, confirm: Callable[[Progress], Awaitable[None]]) -> None:
    """Hand each document to the job as soon as it is whole. A document that is too large is refused and its content skipped."""
    document = _Receiving(job, 0, first.upload)
    whole = False
    try:
        async for part in parts:
            if isinstance(part, bytes):
                await document.add(part)
                continue
            if not await document.hand_in(staged=False):
                return
            if document.index + 1 >= DOCUMENTS_PER_JOB_MAX:
                raise RequestInvalid("too many documents in one ingestion", field="header", bound=f"at most {DOCUMENTS_PER_JOB_MAX}")
            document = _Receiving(job, document.index + 1, part.upload)
        # The parts end for a caller that has finished and for one that died in the middle. Only the first can be told something;
        # and nobody is told before it is durable.
        if await document.hand_in(staged=True):
            await confirm(document.received)
            whole = True
    finally:
        await document.release()
        await job.close(commit=whole)


class _Receiving:
    """One document while it comes in."""

    def __init__(self, job: Job, index: int, upload: Upload) -> None:
        self.index = index
        self._job = job
        self._upload = upload
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._refusal: DomainError | None = None

    @property
    def received(self) -> Progress:
        return Progress(self.index, self._upload.name, Stage.RECEIVED, bytes=0 if self._refusal else self._bytes)

    async def add(self, piece: bytes) -> None:
        if self._refusal is not None:
            return
        if self._bytes + len(piece) > DOCUMENT_BYTES_MAX:
            await self._refuse(PayloadTooLarge("the document is too large", field="content", bytes_max=DOCUMENT_BYTES_MAX))
            return
        try:
            await self._job.buffer(len(piece))
        except Overloaded as error:
            await self._refuse(error)
            return
        self._pieces.append(piece)
        self._bytes += len(piece)

    async def hand_in(self, *, staged: bool) -> bool:
        """Make it durable, or tell why it was refused. False = the job takes no more."""
        taken = True
        if self._refusal is None:
            try:
                taken = await self._job.add(self._upload, self.received, self._pieces, staged=staged)
            except Overloaded as error:
                self._refusal = error
        if self._refusal is not None:
            await self._job.refuse(self.received, self._refusal)
        await self.release()
        return taken

    async def release(self) -> None:
        """Give its memory back."""
        held = sum(map(len, self._pieces))
        self._pieces.clear()
        await self._job.release(held)

    async def _refuse(self, refusal: DomainError) -> None:
        self._refusal = refusal
        await self.release()
