"""Which documents there are, in which version, and each collection's epoch. The only place that writes chunks and documents.

A document points at one revision of its chunks, and a chunk that no document points at is not there: searches ask `current` about every
hit. So the switch from an old version to a new one is the write of one point, and readers see the one or the other. Before anything is
written an intent says what is about to happen; `recover` finishes or undoes what a dead process left.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import structlog

from services.chassis.clock import Clock
from services.chassis.errors import NotFound, Unavailable
from services.retrieval.access import Reach, everything_of
from services.retrieval.chunking import in_context
from services.retrieval.domain import Chunk, Document, StoredChunk, Viewer, stable_id
from services.retrieval.encoding_spaces import Encoded, Encoding, Encodings
from services.retrieval.facts import payload as payload_of
from services.retrieval.ports import (
    ANSWERS,
    CHUNKS,
    DOCUMENTS,
    SYSTEM_TENANT,
    Filter,
    Payload,
    Point,
    Record,
    Space,
    Sparse,
    Vectors,
    VectorStore,
)

log = structlog.get_logger(__name__)

TRIES_MAX = 5
"""How often a change is made again that another process came between; each time it stood still, or had bad luck."""
INTENTS_PER_PASS_MAX = 1000
COLLECTIONS_MAX = 10_000
"""Of one tenant."""
DOCUMENTS_PER_PAGE = 256
CHUNKS_PER_REENCODING = 64
"""About two seconds of one core; after it others who embed documents have their turn."""
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


@dataclass(frozen=True, slots=True)
class Epoch:
    """How often a collection's documents changed, in a way: it only grows."""

    number: int
    limited: bool
    """Whether a document of it is, or was once, limited to some of the tenant's users."""


Renew = Callable[[], Awaitable[None]]
"""Raises Unavailable if the turn has passed to another; else it is ours for a while longer."""
Turn = Callable[[str], AbstractAsyncContextManager[Renew]]
"""Entered with a document's id: be the only process that changes it until left, or until a process that stood still has lost it."""


@contextlib.asynccontextmanager
async def alone(document_id: str) -> AsyncIterator[Renew]:
    """The turn of a process that has its store for itself."""

    async def renew() -> None:
        return None

    yield renew


class Registry:
    """Documents and epochs in a VectorStore. Changes of one document happen one after the other."""

    def __init__(self, store: VectorStore, clock: Clock, encodings: Encodings | None = None, turn: Turn = alone) -> None:
        """Without `encodings` there is one for all, and its vectors are handed in.

        `turn` keeps the processes apart that share the store; within this one nothing is needed.
        """
        self._store = store
        self._encodings = encodings
        self._turn = turn
        self._clock = clock
        self._last_us = 0
        # A lock lives as long as somebody holds or awaits it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def epoch(self, tenant: str, collection: str) -> Epoch:
        """The collection's epoch; 0 if nothing ever changed in it."""
        id_ = _epoch_id(tenant, collection)
        record = (await self._store.get(DOCUMENTS, tenant, [id_])).get(id_)
        return Epoch(int(record.payload["epoch"]), bool(record.payload.get("limited", False))) if record else Epoch(0, limited=False)

    async def document(self, viewer: Viewer, document_id: str) -> Document:
        """Raises NotFound if there is no such document for the viewer."""
        found = await self.documents(viewer, [document_id]) if _ID.match(document_id) else {}
        if document_id not in found:
            raise NotFound("there is no such document", kind="document")
        return found[document_id]

    async def documents(self, viewer: Viewer, ids: Iterable[str]) -> dict[str, Document]:
        """The documents among `ids` that the viewer sees."""
        records = await self._store.get(DOCUMENTS, viewer.tenant, sorted(set(ids)))
        documents = (_document(record.payload) for record in records.values() if record.payload["kind"] == "document")
        return {document.document_id: document for document in documents if viewer.sees(document)}

    async def page(self, viewer: Viewer, collection: str, limit: int, before_us: int | None) -> list[Document]:
        """What the viewer sees, newest first, those indexed before `before_us` if given. Empty `collection` = all of the tenant."""
        where = Filter(
            viewer.tenant,
            equal={"kind": "document", **({"collection": collection} if collection else {})},
            below={"indexed_us": before_us} if before_us is not None else {},
            readers=viewer.readers,
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
        space = CHUNKS
        if self._encodings is not None:
            space = (await self._encodings.answering(document.tenant, document.collection)).chunks
        return [_stored_chunk(record) for record in await self._store.find(space, where, limit=limit, order_by="ordinal")]

    async def collections(self, tenant: str) -> list[str]:
        """Names of the tenant's collections in which something was ever changed."""
        where = Filter(tenant, equal={"kind": "epoch"})
        return sorted(str(record.payload["collection"]) for record in await self._store.find(DOCUMENTS, where, limit=COLLECTIONS_MAX))

    async def count(self, reach: Reach) -> int:
        """Documents in reach."""
        return await self._store.count(DOCUMENTS, reach.where(kind="document"))

    async def every(self, tenant: str, collection: str) -> AsyncIterator[Document]:
        """The collection's documents, oldest first; also those that are indexed while this goes on."""
        seen: set[str] = set()
        after_us = 0
        while True:
            where = Filter(tenant, equal={"kind": "document", "collection": collection}, at_least={"indexed_us": after_us})
            # Two replicas may index at the same microsecond: the page begins with the last one's again.
            page = await self._store.find(DOCUMENTS, where, limit=DOCUMENTS_PER_PAGE, order_by="indexed_us")
            fresh = [document for document in map(_document, (record.payload for record in page)) if document.revision not in seen]
            if not fresh:
                return
            for document in fresh:
                yield document
            after_us = max(document.indexed_us for document in fresh)
            seen = {document.revision for document in fresh if document.indexed_us == after_us}

    async def reencode(self, document: Document, source: Encoding, target: Encoding) -> None:
        """Write the document's chunks into `target` from their texts in `source`, where they are missing.

        Cancellation: what is written is found again next time, or goes with the recovery if the document has changed.
        """
        assert self._encodings is not None
        revision = Filter(
            document.tenant,
            equal={"collection": document.collection, "document_id": document.document_id, "revision": document.revision},
        )
        while await self._reencode_some(self._encodings, document, revision, source, target):
            pass

    async def _reencode_some(self, encodings: Encodings, document: Document, revision: Filter, source: Encoding, target: Encoding) -> bool:
        """The next few chunks, so that who changes the document waits for no more; whether there may be others."""
        async with self._lock(document.document_id):
            # Chunks are written in their order, so that as many as there are is where to go on.
            written = await self._store.count(target.chunks, revision)
            if written >= document.chunks or not await self._is_current(document):
                return False
            records = await self._store.find(
                source.chunks, replace(revision, at_least={"ordinal": written}), limit=CHUNKS_PER_REENCODING, order_by="ordinal"
            )
            texts = [in_context(document.title, _stored_chunk(record).chunk) for record in records]
            if not texts:
                return False  # changed by another replica in the meantime
            encoded = await encodings.encode(target, texts, document.language)
            if encoded.dense is None:
                raise Unavailable("the embedder that is set cannot be opened", dependency="embedder")
            # Like a new version's: whatever happens, the revision that the document points at stays, and no other.
            intent = _Intent(document.tenant, document.collection, document.document_id, document.revision, "", self._now_us())
            await self._begin(intent)
            found_by = zip(encoded.dense, encoded.sparse, encoded.sketches or [""] * len(texts), strict=True)
            points = [Point(record.id, record.payload, *row) for record, row in zip(records, found_by, strict=True)]
            await self._store.upsert(target.chunks, points)
            if not await self._is_current(document):
                await self._store.delete(target.chunks, revision)
            await self._store.remove(DOCUMENTS, SYSTEM_TENANT, [intent.id])
            return written + len(records) < document.chunks

    async def _is_current(self, document: Document) -> bool:
        stored = (await self.documents(everything_of(document.tenant), [document.document_id])).get(document.document_id)
        return stored is not None and stored.revision == document.revision

    async def outdate(self, tenant: str, collection: str) -> None:
        """Make every answer that was cached until now unreachable."""
        await self._bump(tenant, collection)

    async def current(self, viewer: Viewer, hits: Sequence[Record]) -> list[tuple[StoredChunk, Document]]:
        """The hits that belong to the current version of a document that the viewer sees, with it, in the order given."""
        documents = await self.documents(viewer, {hit.payload["document_id"] for hit in hits})
        kept = []
        for hit in hits:
            document = documents.get(hit.payload["document_id"])
            if document is not None and document.revision == hit.payload["revision"]:
                kept.append((_stored_chunk(hit), document))
        return kept

    async def prior(self, tenant: str, document_id: str) -> Document | None:
        """The document as it stands, whoever may read it; for those who are about to change it."""
        return (await self.documents(everything_of(tenant), [document_id])).get(document_id)

    async def replace(
        self, draft: Document, chunks: Sequence[Chunk], dense: Vectors, sparse: Sequence[Sparse], sketches: Sequence[str] | None = None
    ) -> Document:
        """Make `draft` the current version and bump the collection's epoch; return it with version and revision.

        The chunks' vectors, words and sketches, where the embedder tells these, are in the encoding that is set.

        A version that was received later stays, and is returned instead.

        Raises Unavailable if another process has taken over while this one stood still: then nothing of this version is left.
        Cancellation: shield it. Cut short, it leaves an intent that `recover` undoes or finishes.
        """
        encoded = Encoded(dense, sparse, sketches)
        async with self._lock(draft.document_id):
            for _ in range(TRIES_MAX):
                async with self._turn(draft.document_id) as renew:
                    made = await self._replace(draft, chunks, encoded, renew)
                    try:
                        await renew()
                        return made
                    except Unavailable:
                        # Who had the turn may have taken the change for dead before the switch, and cleared its chunks away: once more.
                        log.warning("changed_after_the_turn_had_passed")
        raise Unavailable("the document is changed by others again and again", dependency="qdrant")

    async def _replace(self, draft: Document, chunks: Sequence[Chunk], encoded: Encoded, renew: Renew) -> Document:
        old = await self.prior(draft.tenant, draft.document_id)
        if old is not None and old.received > draft.received:
            return old
        version, indexed_us = (old.version + 1 if old else 1), self._now_us()
        revision = stable_id("revision", draft.document_id, str(version), draft.content_sha256, str(indexed_us))
        new = replace(draft, version=version, indexed_us=indexed_us, revision=revision, chunks=len(chunks))
        intent = _Intent(new.tenant, new.collection, new.document_id, revision, old.revision if old else "", indexed_us)
        await self._begin(intent)
        if self._encodings is not None and not (await self.epoch(new.tenant, new.collection)).number:
            await self._encodings.settle_new(new.tenant, new.collection)
        if new.readers:
            # Before anybody can rest an answer on it: from now on answers are shared among those who see the same documents only.
            await self._bump(new.tenant, new.collection, limited=True)
        # Writing may take any time: what others did in the meantime is not to be undone.
        still_ours = partial(self._renewed, renew, intent)
        if self._encodings is None:
            await self._write_chunks(CHUNKS, new, chunks, encoded)
            await still_ours()
        else:
            await self._write_encoded(self._encodings, new, chunks, encoded, still_ours)
        # Nothing may come between the last look at the collection's standing and this.
        if not await self._switched(old, new):
            await self._given_up(intent)
        await self._bump(new.tenant, new.collection)
        try:
            await self._tidy(intent, {intent.dropped})
        except Unavailable:
            # The switch is done and durable; what is left over is invisible and goes with the next recovery.
            log.warning("old_chunks_left_for_recovery")
        return new

    async def _switched(self, old: Document | None, new: Document) -> bool:
        """Let the document be `new` if it is still `old`; whether it is. A turn can pass to another between any look and any write."""
        point = Point(new.document_id, _document_payload(new))
        if old is None:
            await self._store.claim(DOCUMENTS, point)
        else:
            await self._store.exchange(DOCUMENTS, point, {"revision": old.revision})
        return await self._is_current(new)

    async def renew(self, document: Document, received: int) -> bool:
        """Let `document` count as received when its content came again, so that what was received before that cannot replace it.

        False = it is not as it was: another version has come, or it was deleted.
        """
        async with self._lock(document.document_id), self._turn(document.document_id) as renew:
            stored = await self.prior(document.tenant, document.document_id)
            if stored is None or stored.revision != document.revision:
                return False
            if stored.received < received:
                await renew()
                return await self._switched(stored, replace(stored, received=received))
            return True

    async def _write_encoded(
        self, encodings: Encodings, new: Document, chunks: Sequence[Chunk], encoded: Encoded, still_ours: Renew
    ) -> None:
        """Write the chunks in every encoding that the collection's documents must have; `encoded` is in the one that is set.

        Ends with a look at what that is, and before it with `still_ours`.
        """
        written: set[str] = set()
        while True:
            if written:
                await still_ours()
            missing = (await encodings.standing(new.tenant, new.collection)).written - written
            if not missing:
                return
            for id_ in sorted(missing):
                encoding = await encodings.encoding(id_)
                if id_ == encodings.current_id:
                    kept = encoded if encoding.sketch_form else replace(encoded, sketches=None)
                    await self._write_chunks(encoding.chunks, new, chunks, kept)
                    continue
                for begin in range(0, len(chunks), CHUNKS_PER_REENCODING):
                    some = chunks[begin : begin + CHUNKS_PER_REENCODING]
                    others = await encodings.encode(encoding, [in_context(new.title, chunk) for chunk in some], new.language)
                    await self._write_chunks(encoding.chunks, new, some, others)
            written |= missing

    async def _write_chunks(self, space: Space, new: Document, chunks: Sequence[Chunk], encoded: Encoded) -> None:
        vectors = [None] * len(chunks) if encoded.dense is None else encoded.dense
        sketches = encoded.sketches or [""] * len(chunks)
        for begin in range(0, len(chunks), CHUNKS_PER_WRITE):
            rows = slice(begin, begin + CHUNKS_PER_WRITE)
            of_rows = zip(chunks[rows], vectors[rows], encoded.sparse[rows], sketches[rows], strict=True)
            await self._store.upsert(space, [_chunk_point(new, *row) for row in of_rows])
            await asyncio.sleep(0)

    async def delete(self, tenant: str, document_id: str) -> Document:
        """Remove a document, its chunks and the collection's cached answers. Raises NotFound. Shield it like `replace`."""
        async with self._lock(document_id), self._turn(document_id) as renew:
            document = await self.document(everything_of(tenant), document_id)
            intent = _Intent(tenant, document.collection, document_id, "", document.revision, self._now_us())
            await self._begin(intent)
            await self._renewed(renew, intent)
            await self._store.remove(DOCUMENTS, tenant, [document_id], {"revision": document.revision})
            if await self.prior(tenant, document_id) is not None:
                await self._given_up(intent)
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
        document = await self.prior(intent.owner, intent.document_id)
        # Whichever side of the switch it died on, the revision the document points at stays. One epoch more is harmless.
        await self._bump(intent.owner, intent.collection)
        await self._tidy(intent, {intent.revision, intent.dropped} - {document.revision if document else ""})

    async def _begin(self, intent: _Intent) -> None:
        payload = {**asdict(intent), "kind": "intent", "tenant": SYSTEM_TENANT, "indexed_us": intent.begun_us}
        await self._store.upsert(DOCUMENTS, [Point(intent.id, payload)])

    async def _renewed(self, renew: Renew, intent: _Intent) -> None:
        """Make sure that the change is still ours to make. If not, undo what was begun: nobody else knows of its revision."""
        try:
            await renew()
        except Unavailable:
            await self._tidy(intent, {intent.revision})
            raise

    async def _given_up(self, intent: _Intent) -> NoReturn:
        """Undo what was begun of a change that another came before. Raises Unavailable."""
        await self._tidy(intent, {intent.revision})
        raise Unavailable("the document was changed by another while this replica stood still", dependency="qdrant")

    async def _bump(self, tenant: str, collection: str, *, limited: bool = False) -> None:
        """Give the collection an epoch it never had. The clock takes part, so that none comes again after the store has lost it.

        A collection that had a limited document once counts as limited for good: that costs hits, while the opposite could leak. So what
        others write at the same moment is never written over.
        """
        for _ in range(TRIES_MAX):
            old = await self.epoch(tenant, collection)
            epoch = max(old.number + 1, self._now_us())
            payload = {"kind": "epoch", "tenant": tenant, "collection": collection, "epoch": epoch, "limited": limited or old.limited}
            point = Point(_epoch_id(tenant, collection), payload)
            if old.number:
                await self._store.exchange(DOCUMENTS, point, {"epoch": old.number})
            else:
                await self._store.claim(DOCUMENTS, point)
            now = await self.epoch(tenant, collection)
            # Another's that came since the look is as good as ours, unless it lacks what ours would have said.
            if now.number != old.number and (now.limited or not limited):
                return
        raise Unavailable("the collection changes too often to be changed", dependency="qdrant")

    async def _tidy(self, intent: _Intent, dead: set[str]) -> None:
        """Remove the chunks of `dead` revisions and the answers of older epochs, then the intent."""
        chunks, answers = await self._spaces(intent.owner, intent.collection)
        for revision in dead - {""}:
            equal = {"collection": intent.collection, "document_id": intent.document_id, "revision": revision}
            for space in chunks:
                await self._store.delete(space, Filter(intent.owner, equal=equal))
        epoch = (await self.epoch(intent.owner, intent.collection)).number
        for space in answers:
            await self._store.delete(space, Filter(intent.owner, equal={"collection": intent.collection}, below={"epoch": epoch}))
        await self._store.remove(DOCUMENTS, SYSTEM_TENANT, [intent.id])

    async def _spaces(self, tenant: str, collection: str) -> tuple[list[Space], list[Space]]:
        """Where the collection may have chunks and answers."""
        if self._encodings is None:
            return [CHUNKS], [ANSWERS]
        standing = await self._encodings.standing(tenant, collection)
        ids = sorted(standing.written | ({standing.leaving} - {""}))
        encodings = [await self._encodings.encoding(id_) for id_ in ids]
        return [encoding.chunks for encoding in encodings], [encoding.answers for encoding in encodings]

    def _lock(self, document_id: str) -> asyncio.Lock:
        return self._locks.setdefault(document_id, asyncio.Lock())

    def _now_us(self) -> int:
        """Microseconds of the wall clock, never twice the same in this process."""
        self._last_us = max(int(self._clock.now().timestamp() * 1_000_000), self._last_us + 1)
        return self._last_us


def _epoch_id(tenant: str, collection: str) -> str:
    return stable_id("epoch", tenant, collection)


def _document_payload(document: Document) -> dict[str, Any]:
    return {**asdict(document), "kind": "document", "readers": list(document.readers)}


def _document(payload: Payload) -> Document:
    # What an older release wrote lacks the younger fields; their defaults say what was true then.
    known = {name: payload[name] for name in Document.__slots__ if name in payload}
    return Document(**{**known, "readers": tuple(known.get("readers", ()))})


def _intent(payload: Payload) -> _Intent:
    return _Intent(**{name: payload[name] for name in _Intent.__slots__})


def _chunk_point(document: Document, chunk: Chunk, dense: Sequence[float] | None, sparse: Sparse, sketch: str) -> Point:
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
        "lead": chunk.lead,
        "readers": list(document.readers),
        **payload_of(document.metadata),
    }
    return Point(stable_id("chunk", document.revision, str(chunk.ordinal)), payload, dense, sparse, sketch)


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
        payload.get("lead", ""),
    )
    return StoredChunk(record.id, chunk)
