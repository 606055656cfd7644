"""The semantic tier: answers found again by what was asked. It decides nothing about what is worth keeping.

Scope first, similarity second: tenant, collection, scope and epoch are conditions of the query; similarity only proposes, and the
guards decide.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from services.chassis.clock import Clock
from services.chassis.money import Usage
from services.retrieval.access import Reach
from services.retrieval.domain import CachedAnswer, Passage, Verdict, stable_id
from services.retrieval.encoding_spaces import Encodings
from services.retrieval.guards import difference, normalised
from services.retrieval.ports import Filter, Payload, Point, Query, Space, VectorStore, written

CANDIDATES = 5

Scope = tuple[str, str]
"""What the caller says an answer depends on, and the audience that may share it."""


class AnswerCache:
    """Answers in a VectorStore, one for each question, scope and epoch."""

    def __init__(self, store: VectorStore, encodings: Encodings, clock: Clock, *, similarity_min: float, ttl_s: float) -> None:
        self._store = store
        self._encodings = encodings
        self._clock = clock
        self._similarity_min = similarity_min
        self._ttl = timedelta(seconds=ttl_s)

    async def lookup(self, reach: Reach, scope: Scope, epoch: int, question: str, dense: Sequence[float], space: Space) -> Verdict:
        """The nearest answer in `space` that may be served for `question`, or why there is none."""
        where = reach.where(cache_scope=_joined(scope), epoch=epoch)
        # An answer brings all its passages: only what is near enough to be served is worth reading.
        ranked = await self._store.rank(space, Query(where, CANDIDATES, dense))
        near = {written(number): score for number, score in ranked.items() if score >= self._similarity_min}
        if not near:
            best = next(iter(ranked.values()), None)
            return Verdict(reason="no_candidate") if best is None else Verdict(similarity=min(best, 1.0), reason="below_threshold")
        kept = await self._store.get(space, reach.tenant, list(near))
        reasons = []
        for id_, score in near.items():
            if id_ not in kept:
                continue  # removed since the ranking, as if it had never been there
            # An id says scope, epoch and question, so that what was written over it in the meantime may be served as well.
            payload = kept[id_].payload
            reason = self._refusal(question, payload)
            if not reason:
                return Verdict(_answer(payload), min(score, 1.0))
            reasons.append((score, reason))
        if not reasons:
            return Verdict(reason="no_candidate")
        return Verdict(similarity=min(reasons[0][0], 1.0), reason=reasons[0][1])

    def _refusal(self, question: str, payload: Payload) -> str:
        if self._clock.now() - _moment(payload["created_us"]) > self._ttl:
            return "expired"
        return difference(question, payload["question"])

    async def remember(self, reach: Reach, scope: Scope, epoch: int, answer: CachedAnswer) -> bool:
        """Keep `answer`; the same question again takes its place. Nothing is kept while the collection's embedder cannot be opened."""
        encoding = await self._encodings.answering(reach.tenant, reach.collection)
        embedded = await self._encodings.question(encoding, answer.question)
        if embedded is None:
            return False
        cache_scope = _joined(scope)
        payload = {**_payload(answer), "tenant": reach.tenant, "collection": reach.collection, "cache_scope": cache_scope, "epoch": epoch}
        id_ = stable_id("answer", reach.tenant, reach.collection, cache_scope, str(epoch), normalised(answer.question))
        await self._store.upsert(encoding.answers, [Point(id_, payload, embedded.vector)])
        return True

    async def forget(self, tenant: str, *, collection: str = "", answer_id: str = "", user: str = "") -> int:
        """Drop the tenant's answers that match all that is given; return how many."""
        given = {"collection": collection, "answer_id": answer_id, "user": user}
        where = Filter(tenant, equal={key: value for key, value in given.items() if value})
        count = 0
        for encoding in await self._encodings.all():
            count += await self._store.count(encoding.answers, where)
            await self._store.delete(encoding.answers, where)
        return count

    async def expire(self) -> None:
        """Drop what is too old to be served, of all tenants."""
        oldest = int((self._clock.now() - self._ttl).timestamp() * 1_000_000)
        for encoding in await self._encodings.all():
            await self._store.expire(encoding.answers, "created_us", oldest)


def _joined(scope: Scope) -> str:
    cache_scope, audience = scope
    return f"{cache_scope}/{audience}" if audience else cache_scope


def _payload(answer: CachedAnswer) -> dict[str, Any]:
    row = asdict(answer)
    row["created_us"] = int(row.pop("created_at").timestamp() * 1_000_000)
    row["passages"] = [
        {**passage, "heading_path": list(passage["heading_path"]), "flags": list(passage["flags"])} for passage in row["passages"]
    ]
    return row


def _answer(payload: Payload) -> CachedAnswer:
    passages = tuple(
        replace(Passage(**passage), heading_path=tuple(passage["heading_path"]), flags=tuple(passage.get("flags", ())))
        for passage in payload["passages"]
    )
    return CachedAnswer(
        answer_id=payload["answer_id"],
        question=payload["question"],
        user=payload["user"],
        text=payload["text"],
        passages=passages,
        model=payload["model"],
        provider=payload["provider"],
        cost_nanousd=int(payload["cost_nanousd"]),
        created_at=_moment(payload["created_us"]),
        finish_reason=payload["finish_reason"],
        usage=Usage(**{kind: int(count) for kind, count in payload["usage"].items()}),
    )


def _moment(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1_000_000, UTC)
