"""The chain of one recall: embed once, and rank by words meanwhile → semantic tier → verdict → passages. Each step has its span here."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from services.chassis.ending import ended
from services.chassis.telemetry import Trail
from services.retrieval.access import Reach
from services.retrieval.answer_cache import AnswerCache
from services.retrieval.domain import Passage, SearchMode, Verdict
from services.retrieval.encoding_spaces import Encoding, Encodings
from services.retrieval.ports import Embedder
from services.retrieval.registry import Registry
from services.retrieval.search import ByWords, Searcher


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, where, and under which scope an answer may be shared."""

    text: str
    reach: Reach
    cache_scope: str
    want_cached: bool
    passages_max: int
    held_epoch: int | None = None
    """Epoch of an answer that the asker has already; while it and the audience are the asker's, there is nothing to recall."""
    held_audience: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """The epoch everything after it is true for."""

    epoch: int
    audience: str
    """Who may share an answer; see RecallStarted."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What the semantic tier said, and the milliseconds it took."""

    verdict: Verdict
    embed_ms: float
    lookup_ms: float


@dataclass(frozen=True, slots=True)
class Found:
    """The passages, and the milliseconds their search took."""

    passages: list[Passage]
    search_ms: float


Part = Started | Judged | Found
Emit = Callable[[Part], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a recall works with."""

    embedder: Embedder
    """The one that is set; what a collection answers with, `encodings` knows."""
    encodings: Encodings
    registry: Registry
    answers: AnswerCache
    searcher: Searcher


async def recall(question: Question, memory: Memory, emit: Emit) -> None:
    """Emit the epoch at once, then the verdict, then passages if wanted. Cancelled, it stops where it is and leaves nothing behind."""
    reach = question.reach
    state = await memory.registry.epoch(reach.tenant, reach.collection)
    started = Started(state.number, reach.viewer.audience(limited=state.limited))
    if started.epoch == question.held_epoch and started.audience == question.held_audience:
        await emit(started)
        return
    if not question.want_cached and not question.passages_max:
        await emit(started)
        await emit(Judged(Verdict(reason="requested"), 0.0, 0.0))
        return
    encoding = await memory.encodings.answering(reach.tenant, reach.collection)
    # Words need no vector: they are looked up while the question is embedded, in time that would be spent waiting.
    searching = asyncio.create_task(_by_words(question, memory, encoding), name="search by words")
    try:
        await _embedded(question, memory, encoding, started, searching, emit)
    except BaseException:
        await ended(searching)
        raise


async def _embedded(
    question: Question,
    memory: Memory,
    encoding: Encoding,
    started: Started,
    searching: "asyncio.Task[ByWords | None]",
    emit: Emit,
) -> None:
    """All that rests on the question's vector."""
    trail, reach = Trail("retrieval"), question.reach
    with trail.step("embed") as embedded:
        embedding = asyncio.create_task(memory.encodings.question(encoding, question.text), name="embed the question")
        try:
            await emit(started)
            meant = await embedding
        except BaseException:
            await ended(embedding)
            raise
    with trail.step("cache_lookup") as looked:
        if question.want_cached and meant is None:
            verdict = Verdict(reason="embedder_unavailable")
        elif question.want_cached and meant is not None:
            scope = (question.cache_scope, started.audience)
            verdict = await memory.answers.lookup(reach, scope, started.epoch, question.text, meant.vector, encoding.answers)
        else:
            verdict = Verdict(reason="requested")
            looked.skip("requested")
        looked.note(verdict="hit" if verdict.answer else verdict.reason)
    telling = asyncio.create_task(emit(Judged(verdict, embedded.duration_ms, looked.duration_ms)), name="tell the verdict")
    try:
        # A hit ends the recall: then it has to be on its way before anything else is begun. Else it is told beside the search.
        await (telling if verdict.answer else asyncio.sleep(0))
        by_words = await searching
        if by_words is None:
            await telling
            return
        with trail.step("search") as searched:
            passages = await memory.searcher.passages(
                reach, question.text, meant, limit=question.passages_max, mode=SearchMode.HYBRID, encoding=encoding, by_words=by_words
            )
            searched.note(passages=len(passages))
        await telling
    except BaseException:
        await ended(telling)
        raise
    await emit(Found(passages, searched.duration_ms))


async def _by_words(question: Question, memory: Memory, encoding: Encoding) -> ByWords | None:
    """None where no passages are wanted."""
    if not question.passages_max:
        return None
    return await memory.searcher.by_words(question.reach, question.text, limit=question.passages_max, encoding=encoding)
