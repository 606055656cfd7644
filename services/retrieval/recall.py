"""The chain of one recall: embed once → semantic tier → verdict → passages. Each step is one line here and one span in the trace."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.chassis.telemetry import Trail
from services.retrieval.access import Reach
from services.retrieval.answer_cache import AnswerCache
from services.retrieval.domain import Passage, SearchMode, Verdict
from services.retrieval.encoding_spaces import Encodings
from services.retrieval.ports import Embedder
from services.retrieval.registry import Registry
from services.retrieval.search import Searcher


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


@dataclass(frozen=True, slots=True)
class Memory:
    """What a recall works with."""

    embedder: Embedder
    """The one that is set; what a collection answers with, `encodings` knows."""
    encodings: Encodings
    registry: Registry
    answers: AnswerCache
    searcher: Searcher


async def recall(question: Question, memory: Memory, emit: Callable[[Part], Awaitable[None]]) -> None:
    """Emit the epoch at once, then the verdict, then passages if wanted. Cancelled, it stops where it is and leaves nothing behind."""
    trail = Trail("retrieval")
    reach = question.reach
    state = await memory.registry.epoch(reach.tenant, reach.collection)
    epoch, audience = state.number, reach.viewer.audience(limited=state.limited)
    await emit(Started(epoch, audience))
    if epoch == question.held_epoch and audience == question.held_audience:
        return
    if not question.want_cached and not question.passages_max:
        await emit(Judged(Verdict(reason="requested"), 0.0, 0.0))
        return
    with trail.step("embed") as embedded:
        encoding = await memory.encodings.answering(reach.tenant, reach.collection)
        dense = await memory.encodings.question(encoding, question.text)
    with trail.step("cache_lookup") as looked:
        if question.want_cached and dense is None:
            verdict = Verdict(reason="embedder_unavailable")
        elif question.want_cached and dense is not None:
            verdict = await memory.answers.lookup(reach, (question.cache_scope, audience), epoch, question.text, dense, encoding.answers)
        else:
            verdict = Verdict(reason="requested")
            looked.skip("requested")
        looked.note(verdict="hit" if verdict.answer else verdict.reason)
    await emit(Judged(verdict, embedded.duration_ms, looked.duration_ms))
    if not question.passages_max:
        return
    with trail.step("search") as searched:
        passages = await memory.searcher.passages(
            reach, question.text, dense, limit=question.passages_max, mode=SearchMode.HYBRID, encoding=encoding
        )
        searched.note(passages=len(passages))
    await emit(Found(passages, searched.duration_ms))
