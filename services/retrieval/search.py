"""Finding passages: one query to the store, checked against the registry. How rankings are fused is a setting."""

from collections.abc import Sequence
from dataclasses import replace

from services.retrieval.access import Reach
from services.retrieval.domain import Document, Passage, SearchMode, StoredChunk
from services.retrieval.encoding_spaces import Encoding, Encodings
from services.retrieval.ports import Fusion, Query, VectorStore
from services.retrieval.registry import Registry

REFILL_FACTOR = 4


class Searcher:
    """Searches the chunks of one collection at a time."""

    def __init__(self, store: VectorStore, registry: Registry, encodings: Encodings, fusion: Fusion) -> None:
        self._store = store
        self._registry = registry
        self._encodings = encodings
        self._fusion = fusion

    async def passages(
        self,
        reach: Reach,
        text: str,
        dense: Sequence[float] | None,
        *,
        limit: int,
        mode: SearchMode,
        encoding: Encoding,
        document_ids: tuple[str, ...] = (),
    ) -> list[Passage]:
        """The best `limit` passages, best first, numbered from 1. `dense` is in `encoding`; without it, words alone are searched by."""
        where = reach.where()
        if document_ids:
            where = replace(where, any_of={"document_id": document_ids})
        query = Query(
            where,
            limit,
            dense=None if mode is SearchMode.SPARSE else dense,
            sparse=None if mode is SearchMode.DENSE else self._encodings.words(encoding).query(text),
            fusion=self._fusion,
        )
        if query.dense is None and query.sparse is not None and not query.sparse.indices:
            return []  # nothing but stop words: no word to search by
        hits = await self._store.search(encoding.chunks, query)
        kept = await self._registry.current(reach.viewer, hits)
        if len(kept) < len(hits):
            # A document is being replaced this very moment: chunks of two versions compete. Look further down once.
            hits = await self._store.search(encoding.chunks, replace(query, limit=limit * REFILL_FACTOR))
            kept = (await self._registry.current(reach.viewer, hits))[:limit]
        return [_passage(number, *row) for number, row in enumerate(kept, 1)]


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
