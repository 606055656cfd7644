"""Which documents there are, in which version, and each collection's epoch. The only place that writes chunks and documents.

A document points at one revision of its chunks, and a chunk that no document points at is not there: searches ask `current` about every
hit. So the switch from an old version to a new one is the write of one point, and readers see the one or the other. Before anything is
written an intent says what is about to happen; `recover` finishes or undoes what a dead process left.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import structlog

from services.chassis.clock import Clock
from services.chassis.errors import NotFound, Unavailable
from services.retrieval.domain import Chunk, Document, StoredChunk, stable_id
from services.retrieval.ports import ANSWERS, CHUNKS, DOCUMENTS, SYSTEM_TENANT, Filter, Payload, Point, Record, Sparse, Vectors, VectorStore

log = structlog.get_logger(__name__)

INTENTS_PER_PASS_MAX = 1000
CHUNKS_PER_WRITE = 256
"""A few milliseconds of the event loop; between two writes questions have their turn."""
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


@dataclass(frozen=True, slots=True)
class _Intent:
    """What is being done to a document: `revision` is being written (empty = it is being deleted), `dropped` goes."""

    owner: str
    collection: str
    document_id: str
    revision: str
    dropped: str
    begun_us: int

    @property
    def id(self) -> str:
        return stable_id("intent", self.document_id, self.revision, self.dropped)


Turn = Callable[[str], AbstractAsyncContextManager[None]]
"""Entered with a document's id: be the only process that changes it until left."""


@contextlib.asynccontextmanager
async def _alone(document_id: str) -> AsyncIterator[None]:
    yield


class Registry:
    """Documents and epochs in a VectorStore. Changes of one document happen one after the other."""

    def __init__(self, store: VectorStore, clock: Clock, turn: Turn = _alone) -> None:
        """`turn` keeps the processes apart that share the store; within this one nothing is needed."""
        self._store = store
        self._turn = turn
        self._clock = clock
        self._last_us = 0
        # A lock lives as long as somebody holds or awaits it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def epoch(self, tenant: str, collection: str) -> int:
        """The collection's epoch; 0 if nothing ever changed in it."""
        id_ = _epoch_id(tenant, collection)
        record = (await self._store.get(DOCUMENTS, tenant, [id_])).get(id_)
        return int(record.payload["epoch"]) if record else 0

    async def document(self, tenant: str, document_id: str) -> Document:
        """Raises NotFound if the tenant has no such document."""
        found = await self.documents(tenant, [document_id]) if _ID.match(document_id) else {}
        if document_id not in found:
            raise NotFound("there is no such document", kind="document")
        return found[document_id]

    async def documents(self, tenant: str, ids: Iterable[str]) -> dict[str, Document]:
        """The tenant's documents among `ids`."""
        records = await self._store.get(DOCUMENTS, tenant, sorted(set(ids)))
        return {id_: _document(record.payload) for id_, record in records.items() if record.payload["kind"] == "document"}

    async def page(self, tenant: str, collection: str, limit: int, before_us: int | None) -> list[Document]:
        """Newest first, those indexed before `before_us` if given. Empty `collection` = all of the tenant."""
        where = Filter(
            tenant,
            equal={"kind": "document", **({"collection": collection} if collection else {})},
            below={"indexed_us": before_us} if before_us is not None else {},
        )
        return [
            _document(record.payload)
            for record in await self._store.find(DOCUMENTS, where, limit=limit, order_by="indexed_us", descending=True)
        ]

    async def chunks(self, document: Document, first: int, limit: int) -> list[StoredChunk]:
        """Chunks of this version in reading order, from ordinal `first`."""
        where = Filter(
            document.tenant,
            equal={"collection": document.collection, "document_id": document.document_id, "revision": document.revision},
            at_least={"ordinal": first},
        )
        return [_stored_chunk(record) for record in await self._store.find(CHUNKS, where, limit=limit, order_by="ordinal")]

    async def current(self, tenant: str, hits: Sequence[Record]) -> list[tuple[StoredChunk, Document, float]]:
        """The hits that belong to the current version of a document, with it, in the order given."""
        documents = await self.documents(tenant, {hit.payload["document_id"] for hit in hits})
        kept = []
        for hit in hits:
            document = documents.get(hit.payload["document_id"])
            if document is not None and document.revision == hit.payload["revision"]:
                kept.append((_stored_chunk(hit), document, hit.score))
        return kept

    async def unchanged(self, tenant: str, document_id: str, content_sha256: str) -> Document | None:
        """The document, if it is stored with just this content."""
        document = (await self.documents(tenant, [document_id])).get(document_id)
        return document if document is not None and document.content_sha256 == content_sha256 else None

    async def replace(self, draft: Document, chunks: Sequence[Chunk], dense: Vectors, sparse: Sequence[Sparse]) -> Document:
        """Make `draft` the current version and bump the collection's epoch; return it with version and revision.

        A version that was received later stays, and is returned instead.

        Cancellation: shield it. Cut short, it leaves an intent that `recover` undoes or finishes.
        """
        async with self._lock(draft.document_id), self._turn(draft.document_id):
            old = (await self.documents(draft.tenant, [draft.document_id])).get(draft.document_id)
            if old is not None and old.received > draft.received:
                return old
            version, indexed_us = (old.version + 1 if old else 1), self._now_us()
            revision = stable_id("revision", draft.document_id, str(version), draft.content_sha256, str(indexed_us))
            new = replace(draft, version=version, indexed_us=indexed_us, revision=revision, chunks=len(chunks))
            intent = _Intent(new.tenant, new.collection, new.document_id, revision, old.revision if old else "", indexed_us)
            await self._begin(intent)
            for begin in range(0, len(chunks), CHUNKS_PER_WRITE):
                rows = slice(begin, begin + CHUNKS_PER_WRITE)
                points = [_chunk_point(new, *row) for row in zip(chunks[rows], dense[rows], sparse[rows], strict=True)]
                await self._store.upsert(CHUNKS, points)
                await asyncio.sleep(0)
            await self._store.upsert(DOCUMENTS, [Point(new.document_id, _document_payload(new))])
            await self._bump(new.tenant, new.collection)
            try:
                await self._tidy(intent, {intent.dropped})
            except Unavailable:
                # The switch is done and durable; what is left over is invisible and goes with the next recovery.
                log.warning("old_chunks_left_for_recovery")
            return new

    async def delete(self, tenant: str, document_id: str) -> Document:
        """Remove a document, its chunks and the collection's cached answers. Raises NotFound. Shield it like `replace`."""
        async with self._lock(document_id), self._turn(document_id):
            document = await self.document(tenant, document_id)
            intent = _Intent(tenant, document.collection, document_id, "", document.revision, self._now_us())
            await self._begin(intent)
            await self._store.remove(DOCUMENTS, tenant, [document_id])
            await self._bump(tenant, document.collection)
            await self._tidy(intent, {intent.dropped})
            return document

    async def recover(self, older_than_s: float) -> int:
        """Finish or undo changes begun at least so long ago by a process that has died; return how many."""
        where = Filter(SYSTEM_TENANT, equal={"kind": "intent"}, below={"indexed_us": self._now_us() - int(older_than_s * 1e6)})
        records = await self._store.find(DOCUMENTS, where, limit=INTENTS_PER_PASS_MAX)
        for record in records:
            intent = _intent(record.payload)
            async with self._lock(intent.document_id), self._turn(intent.document_id):
                await self._recover(intent)
        return len(records)

    async def _recover(self, intent: _Intent) -> None:
        if intent.id not in await self._store.get(DOCUMENTS, SYSTEM_TENANT, [intent.id]):
            return  # its own process has just ended it
        document = (await self.documents(intent.owner, [intent.document_id])).get(intent.document_id)
        # Whichever side of the switch it died on, the revision the document points at stays. One epoch more is harmless.
        await self._bump(intent.owner, intent.collection)
        await self._tidy(intent, {intent.revision, intent.dropped} - {document.revision if document else ""})

    async def _begin(self, intent: _Intent) -> None:
        payload = {**asdict(intent), "kind": "intent", "tenant": SYSTEM_TENANT, "indexed_us": intent.begun_us}
        await self._store.upsert(DOCUMENTS, [Point(intent.id, payload)])

    async def _bump(self, tenant: str, collection: str) -> None:
        """Give the collection an epoch it never had. The clock takes part, so that two processes at once do not choose the same."""
        epoch = max(await self.epoch(tenant, collection) + 1, self._now_us())
        payload = {"kind": "epoch", "tenant": tenant, "collection": collection, "epoch": epoch}
        await self._store.upsert(DOCUMENTS, [Point(_epoch_id(tenant, collection), payload)])

    async def _tidy(self, intent: _Intent, dead: set[str]) -> None:
        """Remove the chunks of `dead` revisions and the answers of older epochs, then the intent."""
        for revision in dead - {""}:
            equal = {"collection": intent.collection, "document_id": intent.document_id, "revision": revision}
            await self._store.delete(CHUNKS, Filter(intent.owner, equal=equal))
        epoch = await self.epoch(intent.owner, intent.collection)
        await self._store.delete(ANSWERS, Filter(intent.owner, equal={"collection": intent.collection}, below={"epoch": epoch}))
        await self._store.remove(DOCUMENTS, SYSTEM_TENANT, [intent.id])

    def _lock(self, document_id: str) -> asyncio.Lock:
        return self._locks.setdefault(document_id, asyncio.Lock())

    def _now_us(self) -> int:
        """Microseconds of the wall clock, never twice the same in this process."""
        self._last_us = max(int(self._clock.now().timestamp() * 1_000_000), self._last_us + 1)
        return self._last_us


def _epoch_id(tenant: str, collection: str) -> str:
    return stable_id("epoch", tenant, collection)


def _document_payload(document: Document) -> dict[str, Any]:
    return {**asdict(document), "kind": "document"}


def _document(payload: Payload) -> Document:
    # What an older release wrote lacks the younger fields; their defaults say what was true then.
    return Document(**{name: payload[name] for name in Document.__slots__ if name in payload})


def _intent(payload: Payload) -> _Intent:
    return _Intent(**{name: payload[name] for name in _Intent.__slots__})


def _chunk_point(document: Document, chunk: Chunk, dense: Sequence[float], sparse: Sparse) -> Point:
    payload = {
        "tenant": document.tenant,
        "collection": document.collection,
        "document_id": document.document_id,
        "revision": document.revision,
        "ordinal": chunk.ordinal,
        "text": chunk.text,
        "start": chunk.start,
        "end": chunk.end,
        "heading_path": list(chunk.heading_path),
        "page": chunk.page,
        "flags": list(chunk.flags),
    }
    return Point(stable_id("chunk", document.revision, str(chunk.ordinal)), payload, dense, sparse)


def _stored_chunk(record: Record) -> StoredChunk:
    payload = record.payload
    chunk = Chunk(
        int(payload["ordinal"]),
        payload["text"],
        int(payload["start"]),
        int(payload["end"]),
        tuple(payload["heading_path"]),
        int(payload.get("page", 0)),
        tuple(payload.get("flags", ())),
    )
    return StoredChunk(record.id, chunk)
