"""Finding passages: both rankings asked of the store, fused, the best judged again, checked against the registry, and freed of what says
the same. How rankings are scaled lives in fusion.py, how words are met in late_interaction.py, what is the same in near_duplicates.py."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from services.chassis.clock import Clock
from services.chassis.ending import ended
from services.chassis.errors import DomainError, RequestInvalid
from services.chassis.telemetry import span
from services.retrieval.access import Reach
from services.retrieval.domain import Document, Passage, SearchMode, StoredChunk
from services.retrieval.encoding_spaces import Encoding, Encodings
from services.retrieval.facts import Condition
from services.retrieval.fusion import Fused, familiarity, fused
from services.retrieval.late_interaction import AskedTokens, nearness
from services.retrieval.near_duplicates import distinct
from services.retrieval.ports import EmbeddedQuestion, Filter, Fusion, Query, Ranked, Record, Reranker, Space, Sparse, VectorStore, written
from services.retrieval.registry import Registry

log = structlog.get_logger(__name__)

HEAD_START_S = 0.001
"""What a question's way into the embedder has before words are looked up. An embedded store searches on the event loop and holds the
interpreter meanwhile, which the embedder's thread needs until it is inside its model."""
REFILL_FACTOR = 4
BROUGHT_MAX = 500
"""Up to so many candidates each ranking brings several times what is wanted, as it does for a dozen: what only one of them has near its top
the other has further down."""
SPARE = 4
"""Candidates that are looked at beyond those that are wanted, to take the place of near duplicates."""
RERANKER_PAUSE_S = 10.0
"""How long a reranker that failed is left alone: each question that waits for it in vain waits its whole time limit."""
MINILM = "minilm"
"""How the ids begin of the one embedder that is known here: it learnt English alone. Others are trusted in every language."""
MINILM_WORTH = 60.0
"""What a whole unit of its cosine counts beside BM25: from 40 to 70 nothing changes much, on abstracts and claims, on paragraphs in three
languages, and on stretches of long texts."""
LATE_WORTH = 40.0
"""The same of how near MiniLM's tokens are. From 30 to 60 nothing changes much."""
KNOWN_SHARE = 0.8
"""Meaning must count for so much of what it may count for before its cosine is told: in a language that the embedder hardly knows all texts
are alike to it. Of questions asked of other documents in Spanish two fifths were answered by such cosines, and one in fourteen without."""
FAMILIARITY_CHARACTERS = 500
"""So much of a question tells whether the embedder knows its language; counting its pieces takes a fraction of a millisecond."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage, the chunk and document it is from, and how it came to its place."""

    passage: Passage
    stored: StoredChunk
    document: Document
    fused: Fused[int]
    dense_weight: float
    rerank_score: float | None = None


@dataclass(frozen=True, slots=True)
class ByWords:
    """The ranking by words of one question; it needs no vector, so it can be had while the question is embedded."""

    sparse: Sparse | None
    """None = no word to search by."""
    ranking: Ranked
    brought: int
    """How many the ranking was asked for."""


@dataclass(frozen=True, slots=True)
class Sought:
    """A question in a store's terms: where, and by meaning, by words, or by both."""

    where: Filter
    dense: Sequence[float] | None
    sparse: Sparse | None
    tokens: AskedTokens | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a question found, best first."""

    candidates: list[Fused[int]]
    is_cut: bool
    """Whether the rankings it is from may have more than they brought."""
    read: Mapping[str, Record] = field(default_factory=dict)
    """Those of the candidates that were read already, by id."""


@dataclass(frozen=True, slots=True)
class Reranking:
    """A reranker, and how many candidates it is shown."""

    reranker: Reranker
    candidates: int


class Searcher:
    """Searches the chunks of one collection, or of several with the same encoding."""

    def __init__(
        self,
        store: VectorStore,
        registry: Registry,
        encodings: Encodings,
        fusion: Fusion,
        clock: Clock,
        reranking: Reranking | None = None,
        *,
        late_candidates: int = 0,
    ) -> None:
        """`late_candidates` is how many late interaction judges. With a reranker it has none: that reads more than single words."""
        self._store = store
        self._registry = registry
        self._encodings = encodings
        self._fusion = fusion
        self._clock = clock
        self._reranking = reranking
        self._late_candidates = 0 if reranking else late_candidates
        self._reranker_rests_until = 0.0

    async def encoding(self, reach: Reach) -> Encoding:
        """What the collections in reach answer with. Raises RequestInvalid if they do not answer with the same."""
        answering = {name: await self._encodings.answering(reach.tenant, name) for name in reach.collections}
        if len({encoding.id for encoding in answering.values()}) > 1:
            # One in which nothing ever was could answer with any.
            filled = {name: one for name, one in answering.items() if (await self._registry.epoch(reach.tenant, name)).number}
            if len({encoding.id for encoding in filled.values()}) > 1:
                raise RequestInvalid(
                    "the collections are filled by different embedders and cannot be searched together",
                    field="more_collections",
                    bound="collections of the same embedder",
                )
            answering = filled or answering
        return next(iter(answering.values()))

    async def passages(
        self,
        reach: Reach,
        text: str,
        meant: EmbeddedQuestion | None,
        *,
        limit: int,
        mode: SearchMode,
        encoding: Encoding,
        by_words: ByWords | None = None,
    ) -> list[Passage]:
        """The best `limit` passages, best first, numbered from 1. `meant` is in `encoding`; without it, words alone are searched by.

        `by_words` is what the method of that name found for the same question and bounds.
        """
        hits = await self.hits(reach, text, meant, limit=limit, mode=mode, encoding=encoding, by_words=by_words)
        return [hit.passage for hit in hits]

    async def by_words(
        self,
        reach: Reach,
        text: str,
        *,
        limit: int,
        encoding: Encoding,
        document_ids: tuple[str, ...] = (),
        facts: tuple[Condition, ...] = (),
    ) -> ByWords:
        """The half of a hybrid search that needs no vector: for the time in which the question is embedded, just begun."""
        await asyncio.sleep(HEAD_START_S)
        sparse = self._sparse(text, encoding)
        brought = self._brought(self._looked_at(limit))
        where = reach.where(document_ids=document_ids, facts=facts)
        return ByWords(sparse, await self._leg(encoding.chunks, where, brought, sparse), brought)

    async def asked(
        self,
        reach: Reach,
        text: str,
        *,
        limit: int,
        mode: SearchMode,
        encoding: Encoding,
        document_ids: tuple[str, ...] = (),
        facts: tuple[Condition, ...] = (),
    ) -> list[Hit]:
        """As `hits`, the question embedded here; words are looked up meanwhile."""
        embedding: asyncio.Task[EmbeddedQuestion | None] | None = None
        by_words = None
        if mode is not SearchMode.SPARSE:
            question = self._encodings.question(encoding, text, needed=mode is SearchMode.DENSE)
            embedding = asyncio.create_task(question, name="embed the question")
        try:
            if mode is SearchMode.HYBRID:
                by_words = await self.by_words(reach, text, limit=limit, encoding=encoding, document_ids=document_ids, facts=facts)
            meant = await embedding if embedding else None
        except BaseException:
            if embedding:
                await ended(embedding)
            raise
        return await self.hits(
            reach, text, meant, limit=limit, mode=mode, encoding=encoding, document_ids=document_ids, facts=facts, by_words=by_words
        )

    async def neighbours(self, hit: Hit, count: int) -> tuple[list[StoredChunk], list[StoredChunk]]:
        """Up to `count` chunks before and after a hit, in reading order, of the version the hit is from."""
        place = hit.stored.chunk.ordinal
        around = await self._registry.chunks(hit.document, max(0, place - count), min(place, count) + 1 + count)
        return [stored for stored in around if stored.chunk.ordinal < place], [stored for stored in around if stored.chunk.ordinal > place]

    async def hits(
        self,
        reach: Reach,
        text: str,
        meant: EmbeddedQuestion | None,
        *,
        limit: int,
        mode: SearchMode,
        encoding: Encoding,
        document_ids: tuple[str, ...] = (),
        facts: tuple[Condition, ...] = (),
        by_words: ByWords | None = None,
    ) -> list[Hit]:
        """As `passages`, with what each came from; of these documents (empty = of all) and of such metadata alone."""
        where = reach.where(document_ids=document_ids, facts=facts)
        sparse = by_words.sparse if by_words else None if mode is SearchMode.DENSE else self._sparse(text, encoding)
        sought = Sought(where, None, sparse)
        if meant is not None and mode is not SearchMode.SPARSE:
            sought = Sought(where, meant.vector, sparse, meant.tokens)
        is_hybrid = sought.dense is not None and sought.sparse is not None
        weight = self._dense_weight(encoding, text) if is_hybrid else float(sought.dense is not None)
        looked_at = self._looked_at(limit)
        ranking = await self._ranked(encoding, sought, looked_at, weight, by_words)
        hits, stale = await self._found(reach, encoding.chunks, ranking, 0, looked_at, weight)
        hits = await self._reranked(text, hits)
        kept = distinct([hit.passage.text for hit in hits], limit)
        deep = looked_at * REFILL_FACTOR
        if len(kept) < limit and not stale and looked_at < len(ranking.candidates):
            # Much says the same: look further down.
            further, stale = await self._found(reach, encoding.chunks, ranking, looked_at, deep, weight)
            hits = [hits[place] for place in kept] + further
            kept = distinct([hit.passage.text for hit in hits], limit)
        if len(kept) < limit and (stale or (ranking.is_cut and len(ranking.candidates) < deep)):
            # A document is being replaced this very moment, so that chunks of two versions compete, or more has to be brought: rank once
            # again.
            ranking = await self._ranked(encoding, sought, deep, weight, None)
            hits, _ = await self._found(reach, encoding.chunks, ranking, 0, len(ranking.candidates), weight)
            hits = await self._reranked(text, hits)
            kept = distinct([hit.passage.text for hit in hits], limit)
        return [replace(hits[place], passage=replace(hits[place].passage, number=number)) for number, place in enumerate(kept, 1)]

    def _sparse(self, text: str, encoding: Encoding) -> Sparse | None:
        """Nothing but stop words leaves no word to search by: None."""
        sparse = self._encodings.words(encoding).query(text)
        return sparse if sparse.indices else None

    def _looked_at(self, limit: int) -> int:
        """Candidates that are looked at for `limit` hits."""
        return limit + SPARE if self._reranking is None else max(limit + SPARE, self._reranking.candidates)

    def _brought(self, limit: int) -> int:
        """Candidates that each of two rankings brings for `limit` that are looked at."""
        return max(self._fusion.prefetch, limit, min(limit * REFILL_FACTOR, BROUGHT_MAX))

    async def _found(self, reach: Reach, space: Space, ranking: Ranking, begin: int, end: int, weight: float) -> tuple[list[Hit], bool]:
        """What these candidates are, in their order, and whether some of them are no longer there, or no longer current."""
        by_id = {written(candidate.id): candidate for candidate in ranking.candidates[begin:end]}
        # What was removed since the ranking is missing here, as if it had been replaced.
        unread = [id_ for id_ in by_id if id_ not in ranking.read]
        records = {**ranking.read, **await self._store.get(space, reach.viewer.tenant, unread)}
        current = await self._registry.current(reach.viewer, [records[id_] for id_ in by_id if id_ in records])
        meaning, words = self._fusion.weights
        is_known = weight >= KNOWN_SHARE * meaning / ((meaning + words) or 1.0)
        hits = [
            Hit(
                _passage(stored, document, by_id[stored.chunk_id], is_known=is_known),
                stored,
                document,
                by_id[stored.chunk_id],
                weight,
                by_id[stored.chunk_id].late_score,
            )
            for stored, document in current
        ]
        return hits, len(hits) < len(by_id)

    async def _reranked(self, question: str, hits: list[Hit]) -> list[Hit]:
        """The first of `hits` as the reranker orders them, the others after them; all as they were where there is none or it fails."""
        if self._reranking is None or len(hits) < 2 or self._clock.monotonic() < self._reranker_rests_until:
            return hits
        judged, others = hits[: self._reranking.candidates], hits[self._reranking.candidates :]
        try:
            with span("retrieval.rerank"):
                scores = await self._reranking.reranker.scores(question, [hit.passage.text for hit in judged])
        except DomainError as error:
            self._reranker_rests_until = self._clock.monotonic() + RERANKER_PAUSE_S
            log.warning("reranker_failed", model=self._reranking.reranker.model, reason=error.reason, pause_s=RERANKER_PAUSE_S)
            return hits
        ranked = sorted(zip(judged, scores, strict=True), key=lambda pair: -pair[1])
        return [replace(hit, rerank_score=score) for hit, score in ranked] + others

    async def _ranked(self, encoding: Encoding, sought: Sought, limit: int, dense_weight: float, by_words: ByWords | None) -> Ranking:
        """The best candidates, several times the `limit`. Of a ranking asked alone they keep their own scores."""
        most = limit * REFILL_FACTOR
        alone = sought.dense is None or sought.sparse is None
        brought = most if alone else self._brought(limit)
        if by_words is not None and not alone and by_words.brought == brought:
            dense, sparse = await self._leg(encoding.chunks, sought.where, brought, sought.dense), by_words.ranking
        else:
            dense, sparse = await asyncio.gather(
                self._leg(encoding.chunks, sought.where, brought, sought.dense),
                self._leg(encoding.chunks, sought.where, brought, sought.sparse),
            )
        best = fused(dense, sparse, dense_weight, self._fusion.mode, self._fusion.rrf_k, brought=brought, worth=_worth(encoding), most=most)
        if alone:
            own = {**dense, **sparse}
            best = [replace(candidate, score=own[candidate.id]) for candidate in best]
        ranking = Ranking(best, max(len(dense), len(sparse)) >= brought)
        if sought.tokens is None or alone or not dense_weight:
            return ranking
        return await self._late(encoding.chunks, sought.where.tenant, sought.tokens, ranking, dense_weight)

    async def _late(self, space: Space, tenant: str, tokens: AskedTokens, ranking: Ranking, weight: float) -> Ranking:
        """The first of the candidates by how near the question's words are to theirs as well, the others after them. All as they were where
        one of the first has no sketch, or is gone: who was judged and who was not have no common scale."""
        first, others = ranking.candidates[: self._late_candidates], ranking.candidates[self._late_candidates :]
        if len(first) < 2 or first[0].total is None:
            return ranking
        ids = [written(candidate.id) for candidate in first]
        read = await self._store.get(space, tenant, ids, sketches=True)
        sketches = [read[id_].sketch for id_ in ids if id_ in read]
        if len(sketches) < len(first) or not all(sketches):
            return replace(ranking, read=read)
        near = nearness(tokens, sketches)
        judged = [
            replace(candidate, late_score=(candidate.total or 0.0) + weight * LATE_WORTH * value)
            for candidate, value in zip(first, near, strict=True)
        ]
        return replace(ranking, candidates=sorted(judged, key=lambda candidate: -(candidate.late_score or 0.0)) + others, read=read)

    async def _leg(self, space: Space, where: Filter, limit: int, near: Sequence[float] | Sparse | None) -> Ranked:
        return {} if near is None else await self._store.rank(space, Query(where, limit, near))

    def _dense_weight(self, encoding: Encoding, text: str) -> float:
        """Share of meaning, 0-1: as set, and less where the embedder's vocabulary does not know the question's language."""
        meaning, words = self._fusion.weights
        known = 1.0
        if encoding.embedder_id.startswith(MINILM):
            start = text[:FAMILIARITY_CHARACTERS]
            known = familiarity(sum(map(str.isalnum, start)), self._encodings.count_tokens([start])[0])
        return meaning * known / (meaning * known + words) if meaning * known + words else 0.0


def _worth(encoding: Encoding) -> float | None:
    return MINILM_WORTH if encoding.embedder_id.startswith(MINILM) else None


def _passage(stored: StoredChunk, document: Document, candidate: Fused[int], *, is_known: bool) -> Passage:
    """Without its number, which those that are chosen get."""
    chunk = stored.chunk
    return Passage(
        number=0,
        document_id=document.document_id,
        chunk_id=stored.chunk_id,
        title=document.title,
        source_uri=document.source_uri,
        text=chunk.text,
        start=chunk.start,
        end=chunk.end,
        score=candidate.score,
        heading_path=chunk.heading_path,
        document_version=document.version,
        page=chunk.page,
        flags=chunk.flags,
        similarity=candidate.dense_score if is_known else None,
    )
