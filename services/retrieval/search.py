"""Finding passages: both rankings asked of the store, fused, and checked against the registry. How they are scaled lives in fusion.py."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from services.retrieval.access import Reach
from services.retrieval.domain import Document, Passage, SearchMode, StoredChunk
from services.retrieval.fusion import familiarity, fused
from services.retrieval.ports import CHUNKS, Embedder, Fusion, Query, Record, SparseEncoder, VectorStore
from services.retrieval.registry import Registry

REFILL_FACTOR = 4
FAMILIARITY_CHARACTERS = 500
"""So much of a question tells whether the embedder knows its language; counting its pieces takes a fraction of a millisecond."""


class Searcher:
    """Searches the chunks of one collection at a time."""

    def __init__(self, store: VectorStore, registry: Registry, sparse: SparseEncoder, embedder: Embedder, fusion: Fusion) -> None:
        self._store = store
        self._registry = registry
        self._sparse = sparse
        self._embedder = embedder
        self._fusion = fusion

    async def passages(
        self, reach: Reach, text: str, dense: Sequence[float] | None, *, limit: int, mode: SearchMode, document_ids: tuple[str, ...] = ()
    ) -> list[Passage]:
        """The best `limit` passages, best first, numbered from 1. `dense` may be left out when the mode is sparse."""
        where = reach.where()
        if document_ids:
            where = replace(where, any_of={"document_id": document_ids})
        sparse = None if mode is SearchMode.DENSE else self._sparse.query(text)
        if sparse is not None and not sparse.indices:
            sparse = None  # nothing but stop words: no word to search by
        query = Query(where, limit, dense=None if mode is SearchMode.SPARSE else dense, sparse=sparse)
        hits = await self._hits(query, text)
        kept = await self._registry.current(reach.tenant, hits)
        if len(kept) < len(hits):
            # A document is being replaced this very moment: chunks of two versions compete. Look further down once.
            hits = await self._hits(replace(query, limit=limit * REFILL_FACTOR), text)
            kept = (await self._registry.current(reach.tenant, hits))[:limit]
        return [_passage(number, *row) for number, row in enumerate(kept, 1)]

    async def _hits(self, query: Query, text: str) -> list[Record]:
        if query.dense is None and query.sparse is None:
            return []
        if query.dense is None or query.sparse is None:
            return await self._store.search(CHUNKS, query)
        brought = max(self._fusion.prefetch, query.limit)
        dense, sparse = await asyncio.gather(
            self._store.search(CHUNKS, replace(query, sparse=None, limit=brought)),
            self._store.search(CHUNKS, replace(query, dense=None, limit=brought)),
        )
        records = {record.id: record for record in (*dense, *sparse)}
        best = fused(dense, sparse, self._dense_weight(text), self._fusion.mode, self._fusion.rrf_k)[: query.limit]
        return [replace(records[candidate.id], score=candidate.score) for candidate in best]

    def _dense_weight(self, text: str) -> float:
        """Share of meaning, 0-1: as set, and less where the embedder's vocabulary does not know the question's language."""
        meaning, words = self._fusion.weights
        start = text[:FAMILIARITY_CHARACTERS]
        known = familiarity(sum(map(str.isalnum, start)), self._embedder.count_tokens([start])[0])
        return meaning * known / (meaning * known + words) if meaning * known + words else 0.0


def _passage(number: int, stored: StoredChunk, document: Document, score: float) -> Passage:
    chunk = stored.chunk
    return Passage(
        number=number,
        document_id=document.document_id,
        chunk_id=stored.chunk_id,
        title=document.title,
        source_uri=document.source_uri,
        text=chunk.text,
        start=chunk.start,
        end=chunk.end,
        score=score,
        heading_path=chunk.heading_path,
        document_version=document.version,
        page=chunk.page,
        flags=chunk.flags,
    )
