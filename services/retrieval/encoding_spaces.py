"""Which encoding each collection's vectors are from, and what turns a question into it. Moving to another is `reencoding`'s part.

An encoding is an embedder and a word encoder together, and the form of the sketches that are kept of each chunk, if any are. Its vectors
lie in spaces of their own, so that two are never mixed. A collection's standing says which one answers; it is read anew for every question,
since another replica may just have switched.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import structlog

from services.chassis.clock import Clock
from services.chassis.errors import DomainError, Unavailable
from services.retrieval.domain import stable_id
from services.retrieval.fingerprint import settle
from services.retrieval.ports import (
    ANSWERS,
    CHUNKS,
    DOCUMENTS,
    SYSTEM_TENANT,
    EmbeddedQuestion,
    Embedder,
    Filter,
    Payload,
    Point,
    Space,
    Sparse,
    SparseEncoder,
    TokenEmbedder,
    Unpayable,
    Vectors,
    VectorStore,
)

log = structlog.get_logger(__name__)

ENCODINGS_MAX = 100
"""Far more than a store sees in its life."""
OPEN_AGAIN_S = 60.0
"""An embedder that could not be opened is left alone for so long: a missing key does not come back by itself."""

OpenEmbedder = Callable[[str, int], contextlib.AbstractAsyncContextManager[Embedder]]
"""By its name and the length of its vectors."""
MakeSparse = Callable[[str], SparseEncoder]
"""The word encoder with an id, or the nearest there is: its words are the same, if not always their stems."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """One embedder with one word encoder, and where what they make is."""

    id: str
    embedder_name: str
    """What opens its embedder."""
    dimension: int
    chunks: Space
    answers: Space

    @property
    def embedder_id(self) -> str:
        return self.id.partition(" ")[0]

    @property
    def encoder_id(self) -> str:
        return self.id.partition(" ")[2].partition(" ")[0]

    @property
    def sketch_form(self) -> str:
        """What names the form of its chunks' sketches. Empty = they have none."""
        return self.id.partition(" ")[2].partition(" ")[2]


def encoding_id(embedder: Embedder, sparse: SparseEncoder, *, sketching: bool) -> str:
    """Names all that decides about what is kept of a chunk to find it by."""
    parts = (embedder.embedder_id, sparse.encoder_id, _sketch_form(embedder) if sketching else "")
    return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as they are found, in their order."""

    dense: Vectors | None
    """None = their embedder cannot be opened."""
    sparse: Sequence[Sparse]
    sketches: Sequence[str] | None = None
    """None = the encoding has none."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Ids of the encodings of one collection."""

    encoding: str
    """Answers questions."""
    next: str = ""
    """Is being written beside it. Empty = none."""
    leaving: str = ""
    """Answers no more and is being removed. Empty = none."""

    @property
    def written(self) -> frozenset[str]:
        """What every new document needs."""
        return frozenset({self.encoding, self.next} - {""})


class Encodings:
    """`begin` it when the store can be reached. Raises Unavailable before that, and where the store is away."""

    def __init__(
        self, store: VectorStore, embedder: Embedder, embedder_name: str, sparse: SparseEncoder, open_embedder: OpenEmbedder,
        make_sparse: MakeSparse, clock: Clock, *, sketching: bool = True,
    ) -> None:  # fmt: skip
        self._store = store
        self._embedder = embedder
        self._embedder_name = embedder_name
        self._sparse = sparse
        self._open = open_embedder
        self._make_sparse = make_sparse
        self._clock = clock
        self.current_id = encoding_id(embedder, sparse, sketching=sketching)
        """The encoding that the settings name."""
        self._first = ""
        self._said = False
        self._known: dict[str, Encoding] = {}
        self._opened: dict[str, Embedder] = {embedder.embedder_id: embedder}
        self._failed: dict[str, float] = {}
        self._opening = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    async def close(self) -> None:
        """Close the embedders that were opened for collections that have not switched."""
        await self._stack.aclose()

    async def begin(self) -> None:
        """Write down the encoding that is set, and that collections are to move to it. The replica that began last counts."""
        self._first = await settle(self._store, self.current_id)
        record = {"embedder_name": self._embedder_name, "dimension": self._embedder.dimension}
        await self._write(_encoding_point(self.current_id), {"kind": "encoding", "encoding": self.current_id, **record})
        # Once in a process's life: who meets the store again after it was away must not take back what a younger replica has begun.
        if not self._said or await self._target() is None:
            await self._write(_TARGET, {"kind": "target", "encoding": self.current_id})
            self._said = True
        await self.encoding(self.current_id)

    async def is_target(self) -> bool:
        """Whether collections are to move to the encoding that is set here."""
        return await self._target() == self.current_id

    async def encoding(self, encoding_id: str) -> Encoding:
        """Its spaces are there afterwards."""
        known = self._known.get(encoding_id)
        if known is None:
            id_ = _encoding_point(encoding_id)
            record = (await self._store.get(DOCUMENTS, SYSTEM_TENANT, [id_])).get(id_)
            known = await self._learn(encoding_id, record.payload if record else _before_records(encoding_id))
        return known

    async def all(self) -> list[Encoding]:
        """Every encoding that may have vectors in the store, those of other replicas included."""
        where = Filter(SYSTEM_TENANT, equal={"kind": "encoding"})
        ids = {str(record.payload["encoding"]) for record in await self._store.find(DOCUMENTS, where, limit=ENCODINGS_MAX)}
        return [await self.encoding(id_) for id_ in sorted({*ids, self._began()})]

    async def standing(self, tenant: str, collection: str) -> Standing:
        """The collection's. One that has none yet is in the store's first encoding."""
        id_ = _standing_id(tenant, collection)
        record = (await self._store.get(DOCUMENTS, tenant, [id_])).get(id_)
        return _standing(record.payload) if record else Standing(self._began())

    async def settle_new(self, tenant: str, collection: str) -> None:
        """Let a collection that holds nothing yet begin in the encoding that is set."""
        if self._began() != self.current_id:
            await self._store.claim(DOCUMENTS, _standing_point(tenant, collection, Standing(self.current_id)))

    async def advance(self, tenant: str, collection: str, expected: Standing, then: Standing) -> bool:
        """Make the collection's standing `then` in one write, if it is still as `expected`; whether it was."""
        if await self.standing(tenant, collection) != expected:
            return False
        await self._store.claim(DOCUMENTS, _standing_point(tenant, collection, expected))  # it may have none of its own yet
        fields = {"encoding": expected.encoding, "next": expected.next, "leaving": expected.leaving}
        await self._store.exchange(DOCUMENTS, _standing_point(tenant, collection, then), fields)
        return await self.standing(tenant, collection) == then

    async def note_progress(self, tenant: str, collection: str, documents: int) -> None:
        """Say how many documents have vectors of the next encoding. Kept apart from the standing, which only a step changes."""
        payload = {"kind": "reencoded", "tenant": tenant, "collection": collection, "documents": documents}
        await self._store.upsert(DOCUMENTS, [Point(_progress_id(tenant, collection), payload)])

    async def progress(self, tenant: str, collection: str) -> int:
        """What was noted last."""
        id_ = _progress_id(tenant, collection)
        record = (await self._store.get(DOCUMENTS, tenant, [id_])).get(id_)
        return int(record.payload["documents"]) if record else 0

    async def answering(self, tenant: str, collection: str) -> Encoding:
        """The encoding that the collection answers with at this moment."""
        return await self.encoding((await self.standing(tenant, collection)).encoding)

    async def question(self, encoding: Encoding, text: str, *, needed: bool = False) -> EmbeddedQuestion | None:
        """`text` in `encoding`. None if its embedder cannot be opened here (any more), or cannot be paid while the ledger is away, and it
        is not `needed`: words are still found by.

        Raises Unavailable, Overloaded and what else an open embedder raises.
        """
        try:
            embedder = await self._embedder_of(encoding)
        except Unavailable:
            if needed:
                raise
            return None
        try:
            if encoding.sketch_form and encoding.sketch_form == _sketch_form(embedder):
                vectors, tokens = await cast(TokenEmbedder, embedder).read_question(text)
            else:
                vectors, tokens = await embedder.embed_question(text), None
        except Unpayable:
            if needed:
                raise
            return None
        return EmbeddedQuestion(vectors[0].tolist(), tokens)

    def words(self, encoding: Encoding) -> SparseEncoder:
        """What weighs words as they are weighed in `encoding`."""
        return self._sparse if encoding.encoder_id == self._sparse.encoder_id else self._make_sparse(encoding.encoder_id)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As the embedder that is set counts them. Blocks: a few short texts at most on the event loop."""
        return self._embedder.count_tokens(texts)

    async def encode(self, encoding: Encoding, texts: Sequence[str], language: str) -> Encoded:
        """`texts` of one document in `encoding`, in the documents' lane; its `language` is told by the texts if it is not known.

        Without dense vectors if the embedder cannot be opened here (any more).
        """
        words = self.words(encoding)
        spoken = language or await asyncio.to_thread(words.language, "\n".join(texts))
        sparse = await asyncio.to_thread(lambda: [words.document(text, spoken) for text in texts])
        try:
            embedder = await self._embedder_of(encoding)
        except Unavailable:
            return Encoded(None, sparse)
        embedded = await embedder.embed_texts(texts)
        told = encoding.sketch_form and encoding.sketch_form == _sketch_form(embedder)
        return Encoded(embedded.vectors, sparse, embedded.sketches if told else None)

    async def _target(self) -> str | None:
        record = (await self._store.get(DOCUMENTS, SYSTEM_TENANT, [_TARGET])).get(_TARGET)
        return str(record.payload["encoding"]) if record else None

    def _began(self) -> str:
        if not self._first:
            raise Unavailable("the vector store has not been reached yet", dependency="qdrant")
        return self._first

    async def _learn(self, encoding_id: str, record: Payload) -> Encoding:
        suffix = "" if encoding_id == self._began() else f"-{hashlib.sha256(encoding_id.encode()).hexdigest()[:12]}"
        dimension = int(record["dimension"])
        spaces = [replace(space, name=f"{space.name}{suffix}", dimension=dimension) for space in (CHUNKS, ANSWERS)]
        for space in spaces:
            await self._store.ensure(space)
        self._known[encoding_id] = Encoding(encoding_id, str(record["embedder_name"]), dimension, spaces[0], spaces[1])
        return self._known[encoding_id]

    async def _embedder_of(self, encoding: Encoding) -> Embedder:
        """Raises Unavailable, which names the embedder, if it cannot be opened with the settings there are."""
        async with self._opening:
            wanted = encoding.embedder_id
            if wanted in self._opened:
                return self._opened[wanted]
            if self._clock.monotonic() - self._failed.get(wanted, -OPEN_AGAIN_S) < OPEN_AGAIN_S:
                raise _gone(wanted)
            attempt = contextlib.AsyncExitStack()
            try:
                embedder = await attempt.enter_async_context(self._open(encoding.embedder_name, encoding.dimension))
                if embedder.embedder_id != wanted:
                    raise _gone(wanted)
            except (OSError, ValueError, DomainError) as error:
                await attempt.aclose()
                self._failed[wanted] = self._clock.monotonic()
                log.warning("embedder_of_a_collection_cannot_be_opened", embedder=wanted, error=type(error).__name__)
                raise _gone(wanted) from error
            self._stack.push_async_exit(attempt)
            self._opened[wanted] = embedder
            return embedder

    async def _write(self, id_: str, payload: dict[str, Any]) -> None:
        await self._store.upsert(DOCUMENTS, [Point(id_, {**payload, "tenant": SYSTEM_TENANT})])


_TARGET = stable_id("target encoding")


def _sketch_form(embedder: Embedder) -> str:
    """Empty = it is no TokenEmbedder."""
    return str(getattr(embedder, "sketch_form", ""))


def _gone(embedder_id: str) -> Unavailable:
    return Unavailable(
        f"the collection's vectors are from {embedder_id}, which cannot be opened with these settings; it is found by words alone until it "
        "has been embedded again",
        dependency="embedder",
    )


def _before_records(encoding_id: str) -> Payload:
    """What is true of an encoding from before encodings were written down: it was MiniLM."""
    return {"embedder_name": "minilm-int8" if "-int8-" in encoding_id else "minilm", "dimension": 384}


def _encoding_point(encoding_id: str) -> str:
    return stable_id("encoding", encoding_id)


def _standing_id(tenant: str, collection: str) -> str:
    return stable_id("standing", tenant, collection)


def _progress_id(tenant: str, collection: str) -> str:
    return stable_id("reencoded", tenant, collection)


def _standing_point(tenant: str, collection: str, standing: Standing) -> Point:
    payload = {
        "kind": "standing",
        "tenant": tenant,
        "collection": collection,
        "encoding": standing.encoding,
        "next": standing.next,
        "leaving": standing.leaving,
    }
    return Point(_standing_id(tenant, collection), payload)


def _standing(payload: Payload) -> Standing:
    return Standing(payload["encoding"], payload["next"], payload["leaving"])
