"""An answer from another one to the same question: one that is kept is told again, one that is on its way is followed.

Where kept answers are looked for is for `answer` to say, and who is ahead of whom for `single_flight`. No model is called here.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Literal

import structlog

from services.chassis.deadline import current_deadline
from services.chassis.ending import ended
from services.chassis.errors import (
    AnswerAbandoned,
    AnswerCancelled,
    AnswerInterrupted,
    AnswerLogGone,
    BudgetExhausted,
    DeadlineTooShort,
    Internal,
    NotAllowed,
    Overloaded,
    Unavailable,
)
from services.chassis.telemetry import StepRecord
from services.orchestrator.domain import CachedAnswer, CacheReceipt, Done, PassagesFound, Reasoned, TextDelta
from services.orchestrator.run import Run
from services.orchestrator.single_flight import Ahead, flight_key

log = structlog.get_logger(__name__)

FLIGHTS_MAX = 3
"""How many answers are followed before this one is made in any case."""
PATIENCE_SHARE = 0.5
"""Of the time that is left, how much is waited for the first word of the answer ahead."""
OF_THEIR_OWN = (
    AnswerAbandoned,
    AnswerCancelled,
    AnswerInterrupted,
    AnswerLogGone,
    BudgetExhausted,
    DeadlineTooShort,
    NotAllowed,
    Overloaded,
    Unavailable,
)
"""What an answer can end in that says nothing of another one to the same question."""


def found(run: Run, cached: CachedAnswer, similarity: float | None, step: StepRecord) -> CachedAnswer:
    """Note where `cached` comes from; without `similarity` it was asked for in these very words."""
    run.cache = CacheReceipt(
        "exact" if similarity is None else "semantic",
        similarity=similarity,
        source_question=cached.question if cached.user == run.question.principal.user else None,
        source_answer_id=cached.answer_id,
        age_s=max(0, int((run.kit.clock.now() - cached.created_at).total_seconds())),
        saved_nanousd=cached.cost_nanousd,
    )
    step.note(cache=run.cache.verdict)
    return cached


def serve_again(run: Run, cached: CachedAnswer) -> None:
    """A cached answer as if it were new: passages, text, citations. It was checked before it was kept."""
    run.show(cached.passages)
    run.write(cached.text)
    run.model, run.provider, run.finish_reason, run.verdict = cached.model, cached.provider, cached.finish_reason, "passed"


@asynccontextmanager
async def looking_ahead(run: Run) -> AsyncIterator[Awaitable[Ahead | None]]:
    """Look for an answer to the same question that is on its way, while the passages are; from now on others may follow this one."""
    looking = asyncio.create_task(look_ahead(run), name="look ahead")
    try:
        yield looking
    finally:
        await ended(looking)


async def look_ahead(run: Run, lost: Ahead | None = None) -> Ahead | None:
    """Whom to follow, if not `lost`. None: nobody, or nobody who has the time; then this answer is made."""
    flights, deadline = run.kit.flights, current_deadline.get()
    if flights is None or deadline is None or not run.may_share:
        return None
    now = run.kit.clock.now().timestamp()
    own = flights.flight(run.question.answer_id, now + deadline.remaining_s)
    key = flight_key(run.question, run.scope, run.edition)
    ahead: Ahead | None = flights.local(key, own, lost)
    if ahead is None:
        run.led = flights.lead(key, own, run.events)
        ahead = await flights.claim(run.led, lost)
    return ahead if ahead is not None and flights.waits_for(own, ahead, now) else None


async def follow(run: Run, ahead: Ahead | None) -> bool:
    """Tell what those ahead tell, as it comes. False if there is nobody, or they ended without a word: then this answer is made.

    Raises what the answer ahead failed of, unless that was a matter of its own asker or replica.
    """
    for _ in range(FLIGHTS_MAX):
        if ahead is None:
            return False
        if run.kit.flights is not None and run.kit.flights.has_landed(ahead):
            with run.step("recall") as step:
                held = await run.kit.exact.get(run.question, run.scope)
                if held is not None and held.edition == run.edition:
                    serve_again(run, found(run, held.answer, None, step))
                    return True
            ahead = await look_ahead(run, ahead)
            continue
        with run.step("follow") as step:
            outcome = await retell(run, ahead, step)
        if outcome == "too_slow":
            return False
        if outcome == "told":
            return True
        ahead = await look_ahead(run, ahead)
    return False


async def retell(run: Run, ahead: Ahead, step: StepRecord) -> Literal["told", "lost", "too_slow"]:
    """Whether `ahead` told its answer to the end. Once a word of it was passed on there is no way back."""
    flights, loop = run.kit.flights, asyncio.get_running_loop()
    deadline = current_deadline.get()
    assert flights is not None and deadline is not None
    run.kit.books.intend(run.record(AnswerInterrupted("", answer_id=run.question.answer_id)))
    patience_ends = loop.time() + PATIENCE_SHARE * deadline.remaining_s
    try:
        async with flights.following(ahead) as reader:
            while True:
                for entry in await reader.next(max(0.001, patience_ends - loop.time())):
                    match flights.heard(entry.event):
                        case PassagesFound(passages):
                            run.show(passages)
                        case TextDelta(text):
                            run.write(text)
                        case Reasoned(text) if run.question.reasoning:
                            run.think(text)
                        case Done() as done:
                            take_over(run, done)
                            step.note(answer_id=run.cache.source_answer_id or "")
                            return "told"
                if reader.ended:
                    raise reader.failure.bare() if reader.failure is not None else Internal("", trace_id=run.trace_id)
                if not run.pieces and loop.time() >= patience_ends:
                    step.note(lost="too_slow")
                    return "too_slow"
                if run.pieces:
                    patience_ends = loop.time() + deadline.remaining_s
    except OF_THEIR_OWN as failure:
        if run.pieces:
            raise AnswerInterrupted("the answer that this one followed broke off; ask again", answer_id=run.question.answer_id) from failure
        step.note(lost=failure.reason)
        log.info("answer_ahead_lost", answer_id=run.question.answer_id, reason=failure.reason)
        return "lost"


def take_over(run: Run, done: Done) -> None:
    """The end of the answer that was followed, as the end of this one."""
    if done.text_sha256 != hashlib.sha256(run.text.encode()).hexdigest():
        raise Internal("", trace_id=run.trace_id)
    theirs = done.cache if done.cache.verdict == "coalesced" else None  # they followed somebody themselves
    run.cache = CacheReceipt(
        "coalesced",
        source_answer_id=theirs.source_answer_id if theirs else done.answer_id,
        saved_nanousd=theirs.saved_nanousd if theirs else done.cost_nanousd,
    )
    run.model, run.provider, run.finish_reason, run.verdict = done.model, done.provider, done.finish_reason, done.verdict
