"""The provider calls of one answer: each with a hold before it and a true account after it, tried again only while no text has left."""

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from services.chassis.deadline import current_deadline
from services.chassis.errors import (
    AnswerInterrupted,
    BudgetExhausted,
    DeadlineTooShort,
    DomainError,
    PriceUnknown,
    Unavailable,
)
from services.chassis.money import Usage
from services.chassis.telemetry import StepRecord, span
from services.orchestrator import call_telemetry
from services.orchestrator.compose import going_on
from services.orchestrator.domain import Attempt, Candidate, Draft, Hold, OperationRecord, Prompt, Route
from services.orchestrator.outcomes import is_the_models, tell
from services.orchestrator.router import EXTRACTIVE, first_choice, next_try
from services.orchestrator.run import Run

log = structlog.get_logger(__name__)

GENERATE_LEAST_S = 0.1
"""With less time than this left no provider answers, so none is asked."""
HEALABLE = frozenset({"empty", "repeated", "citation_unknown", "ungrounded", "prompt_leaked", "unsafe_markdown"})
"""Verdicts that another model could escape. A refusal is an answer, and what was cut at the bound would be cut again."""
MARK_TOKENS_MIN, MARK_TOKENS_MAX, MARK_S = 8, 64, 1.0
"""How much output of any kind, or time with it, may pass between two marks of what to book should we die: as much as there is, within these
bounds."""
RETURNED_WITHIN_S, RETURNED_PAUSE_S = 5.0, (0.1, 0.5)
"""How long a call that only lent money could pay waits for it, asking again after such a pause. Who holds a lease is asked every second."""
HOLD_MARGIN_S = 60.0
"""A hold outlives the deadline by this, so that the sweeper never books what is about to be recorded."""


@dataclass(slots=True)
class _Call:
    """One provider call in the making."""

    number: int
    candidate: Candidate
    prompt: Prompt
    output_tokens_max: int
    draft: Draft
    shortens: bool = True
    """Whether a shorter answer will do where the budget cannot pay the whole one."""
    hold: Hold | None = None
    began_at: float = 0.0
    first_output_at: float = 0.0
    marked_at: float = 0.0
    marked_tokens: int = 0


async def first_draft(run: Run, prompt: Prompt) -> Draft:
    """Ask the models of the question's route until one has written an answer.

    Where text is held back, the draft is judged before it is shown, and one that another model could do better is asked for once more
    where the route escalates. Raises the last failure when nothing is left to try, and the first one after text has left: what was shown
    cannot be unsaid.
    """
    route, is_held_already = run.route, run.holding
    run.holding = is_held_already or route.holds_back or (run.question.whole and route.escalation is not None)
    draft = await _draft_of(run, prompt, route)
    unseen = run.holding or not draft.has_content
    if unseen and route.escalation is not None and (verdict := await asyncio.to_thread(run.verdict_of, draft)) in HEALABLE:
        log.info("answer_escalated", answer_id=run.question.answer_id, verdict=verdict)
        try:
            better = await _draft_of(run, prompt, route.escalation)
            draft = better if better.has_content else draft
        except DomainError as failure:
            if not run.holding and run.pieces:
                raise
            # A doubtful answer is better than none.
            log.warning("escalation_failed", answer_id=run.question.answer_id, reason=failure.reason)
    if not is_held_already:  # else whoever holds it has more to check
        run.release(draft.text)
    run.model, run.provider = draft.model, draft.provider
    return draft


async def _draft_of(run: Run, prompt: Prompt, route: Route) -> Draft:
    """Ask the candidates of one route, one call at a time. Raises the last failure."""
    health, asked, reason = run.kit.health, list[Candidate](), ""
    failed: DomainError | None = None
    so_far, tokens_so_far = list[str](), 0
    candidate, given = first_choice(route.candidates, health), prompt
    if candidate is not route.candidates[0]:
        reason = "fell_over"
    while True:
        if (deadline := current_deadline.get()) is not None:
            deadline.require("generate", GENERATE_LEAST_S)
        if candidate not in asked:
            run.chose(candidate, route, reason or route.reason)
            health.request(candidate)
        asked.append(candidate)
        tokens_max = min(
            run.question.output_tokens_max, candidate.output_tokens_max, route.output_tokens_max or candidate.output_tokens_max
        )
        cheaper = None if so_far else route.cheaper
        output_tokens_max = max(1, tokens_max - tokens_so_far)
        # A whole answer of a cheaper model is better than the beginning of a dear one.
        call = _Call(run.next_attempt(), candidate, given, output_tokens_max, Draft(run.write), shortens=cheaper is None)
        try:
            with run.step("hold") as step:
                await _hold(run, call, step)
            with run.step("generate") as step:
                step.note(tier=route.tier, choice=run.choices[-1].reason)
                await _generate(run, call, step)
        except BudgetExhausted:
            if cheaper is None:
                raise
            return await _draft_of(run, prompt, cheaper)
        except PriceUnknown as unpriced:
            log.error("model_without_price", provider=candidate.provider, model=candidate.model)
            left = [other for other in route.candidates if other not in asked and not (so_far and other.provider == EXTRACTIVE)]
            if not left:
                raise failed or unpriced from None
            candidate, reason = first_choice(left, health), "no_price"
            continue
        except DomainError as failure:
            failed = failure
            if call.hold is None:
                raise
            if call.draft.has_content and not run.holding:
                following = _going_on(run, route, asked, call, failure)
                if following is None:
                    raise
                so_far += call.draft.pieces
                tokens_so_far += call.draft.deltas
                candidate, reason, given = following, "continued", going_on(run.kit.continuation, prompt, "".join(so_far))
                continue
            retry = next_try(route.candidates, asked, failure, run.kit.health.jitter(), health)
            if retry is None or (deadline is not None and deadline.remaining_s < retry.delay_s + GENERATE_LEAST_S):
                raise
        else:
            call.draft.pieces[:0] = so_far
            return call.draft
        await asyncio.sleep(retry.delay_s)
        if retry.candidate is not candidate:
            candidate, reason = retry.candidate, "fell_over"


def _going_on(run: Run, route: Route, asked: list[Candidate], call: _Call, failure: DomainError) -> Candidate | None:
    """Who goes on with a text that broke off, if the tier wants that and there is anything left to say."""
    if not route.continues or call.draft.calls or not call.draft.pieces or not is_the_models(failure):
        return None
    following = route.candidates[route.candidates.index(asked[-1]) + 1 :]
    able = (candidate for candidate in following if candidate.provider != EXTRACTIVE and run.kit.health.lets_through(candidate))
    return next(able, None)


async def _hold(run: Run, call: _Call, step: StepRecord) -> None:
    """Set the worst case of the call aside. Without that no byte is sent."""
    deadline = current_deadline.get()
    ttl_ms = int(((deadline.remaining_s if deadline else run.kit.limits.deadline_s) + HOLD_MARGIN_S) * 1000)
    wanted = call.output_tokens_max
    run.kit.books.intend(_unfinished(run, call))  # or a crash in these milliseconds would leave a hold of which nobody knows
    reserving = asyncio.create_task(_reserve(run, call, ttl_ms), name="reserve")
    try:
        call.hold = await asyncio.shield(reserving)
    except asyncio.CancelledError as error:
        with contextlib.suppress(DomainError):
            call.hold = await reserving  # the money may be set aside already: only the reply says which hold to give back
        _close(run, call, error)
        raise
    except (BudgetExhausted, PriceUnknown):
        raise
    except DomainError as error:
        _close(run, call, error)  # nobody knows whether the hold exists: the record says that nothing was sent
        raise
    call.output_tokens_max = call.hold.output_tokens_max
    step.note(attempt=call.number, held_nanousd=call.hold.amount_nanousd, price_version=call.hold.price.version)
    if call.output_tokens_max < wanted:
        step.note(output_tokens_max=call.output_tokens_max, output_tokens_wanted=wanted)
    if call.hold.lease_id:
        step.note(leased=True)


async def _reserve(run: Run, call: _Call, ttl_ms: int) -> Hold:
    """Ask the ledger; while it is out of reach, and only then, draw on what it has lent, with the intent on disk before the call begins.

    A budget that is exhausted but for what is lent gets that back: our own lease at once, those of others within seconds.
    """
    credit, asked, began = run.kit.credit, run.question, time.monotonic()
    covered = credit.covers(asked.principal)
    bounds = (call.candidate, call.prompt.input_tokens_max, call.output_tokens_max)
    least = min(run.kit.limits.output_tokens_min, call.output_tokens_max) if call.shortens else 0
    try:
        try:
            # Nothing is shortened for want of money that we hold ourselves.
            hold = await run.kit.ledger.reserve(asked.answer_id, call.number, *bounds, 0 if covered else least, ttl_ms, patient=not covered)
        except BudgetExhausted as error:
            if not await credit.surrender(asked.principal, began) and not covered and not _only_lent(error):
                raise
            hold = await _once_returned(run, call, *bounds, least, ttl_ms)
    except DomainError as error:
        drawn = credit.draw(asked.principal, asked.answer_id, call.number, *bounds) if _out_of_reach(error) else None
        if drawn is None:
            raise
        call.hold = drawn
        try:
            await run.kit.books.keep(_unfinished(run, call))
        except DomainError:
            call.hold = None
            credit.ended(asked.answer_id, replace(_account(call, error), lease_id=drawn.lease_id))
            raise
        return drawn
    credit.noted(asked.principal)
    return hold


async def _once_returned(run: Run, call: _Call, *wanted: Any) -> Hold:
    """Ask again, and again while what is missing is only lent to somebody who was told to return it. Raises BudgetExhausted."""
    ends_at = time.monotonic() + RETURNED_WITHIN_S
    while True:
        try:
            return await run.kit.ledger.reserve(run.question.answer_id, call.number, *wanted)
        except BudgetExhausted as error:
            pause_s = random.uniform(*RETURNED_PAUSE_S)  # noqa: S311 - jitter, not a secret
            if not _only_lent(error) or time.monotonic() + pause_s > ends_at:
                raise
            await asyncio.sleep(pause_s)


def _only_lent(error: BudgetExhausted) -> bool:
    """Whether the budget could pay if all that is lent of it came back."""
    needed, left, lent = (int(error.metadata.get(f"{name}_nanousd", 0)) for name in ("needed", "left", "lent"))
    return lent > 0 and left + lent >= needed


def _out_of_reach(error: DomainError) -> bool:
    """Whether the ledger, or the store behind it, gave no answer. A refusal is an answer."""
    cut = not error.reason and error.code == "CANCELLED"  # what a server that ends does to its calls
    return isinstance(error, (Unavailable, DeadlineTooShort)) or cut


async def _generate(run: Run, call: _Call, step: StepRecord) -> None:
    """Call the provider; whatever happens, the attempt is accounted for."""
    candidate, draft = call.candidate, call.draft
    call.began_at = time.perf_counter()

    def progress() -> None:
        now, tokens = time.perf_counter(), draft.tokens_heard
        if not call.first_output_at:
            call.first_output_at = now
            run.kit.health.began_well(candidate)
        if tokens - call.marked_tokens >= _until_mark(call.marked_tokens) or now - call.marked_at >= MARK_S:
            call.marked_at, call.marked_tokens = now, tokens
            run.kit.books.mark(_unfinished(run, call))

    draft.on_progress = progress
    draft.on_text = _unheard if run.holding else run.write
    if run.question.reasoning and not run.holding:
        draft.on_reasoning = run.think
    draft.provider = run.provider = candidate.provider
    run.model = candidate.model
    attributes = call_telemetry.begun(candidate, call.output_tokens_max, run.question.session_id)
    failure: BaseException | None = None
    with span(f"chat {candidate.model}", kind=SpanKind.CLIENT, **attributes) as running:
        try:
            await run.kit.models[candidate.provider].generate(call.prompt, candidate, call.output_tokens_max, draft)
        except BaseException as error:
            failure = error
            raise
        finally:
            run.sent(call.prompt, attempt=call.number, model=candidate.model, output_tokens_max=call.output_tokens_max, effort=draft.effort)
            _fared(run, call, failure)
            attempt = _close(run, call, failure)
            run.model = attempt.model
            step.note(attempt=call.number, provider=candidate.provider, model=attempt.model)
            step.note(input_tokens=attempt.usage.prompt_tokens, output_tokens=attempt.usage.output_tokens)
            if attempt.reasoning_tokens:
                step.note(reasoning_tokens=attempt.reasoning_tokens)
            call_telemetry.ended(running, attempt, draft)
            call_telemetry.measured(candidate, attempt)


def _unheard(text: str) -> None:
    """What is held back is in the draft, and there alone."""


def _fared(run: Run, call: _Call, failure: BaseException | None) -> None:
    """Tell what the call says about its model."""
    tell(run.kit.health, call.candidate, failure)
    if failure is None or isinstance(failure, DomainError) or call.first_output_at:
        return
    if (deadline := current_deadline.get()) is not None and deadline.remaining_s <= 0:
        run.kit.health.failed(call.candidate)  # it had all the time there was and said nothing


def _unfinished(run: Run, call: _Call) -> OperationRecord:
    """What to book if this process dies in the middle of the call."""
    died = AnswerInterrupted("", answer_id=run.question.answer_id)
    attempt = _account(call, died)
    if attempt.not_sent:  # it may be sent before the next mark; a crash must not make tokens free
        attempt = replace(attempt, usage=Usage(call.prompt.input_tokens_estimate), estimated=True, not_sent=False)
    elif attempt.estimated and call.first_output_at:  # we die halfway to the next mark, in the mean
        attempt = replace(attempt, usage=attempt.usage + Usage(output_tokens=_until_death(call)))
    return run.record(died, attempt)


def _until_mark(tokens: int) -> int:
    """How many tokens pass from a mark at `tokens` to the next, if they come fast."""
    return min(MARK_TOKENS_MAX, max(MARK_TOKENS_MIN, tokens))


def _until_death(call: _Call) -> int:
    """Tokens that are expected after this mark and before the next one, should it never come to that: half of what fits in between."""
    heard = call.draft.tokens_heard
    fast, elapsed_s = _until_mark(heard), time.perf_counter() - call.first_output_at
    paced = MARK_S * heard / elapsed_s if elapsed_s > 0 else fast
    left = max(0, call.output_tokens_max - heard)
    return min(int(min(fast, paced) / 2), left)


def _close(run: Run, call: _Call, failure: BaseException | None) -> Attempt:
    """Take the call into account, and let what was drawn for it and not used be drawn again."""
    attempt = _account(call, failure)
    run.attempts.append(attempt)
    if attempt.lease_id:
        run.kit.credit.ended(run.question.answer_id, attempt)
    return attempt


def _account(call: _Call, failure: BaseException | None) -> Attempt:
    usage, estimated = call.draft.usage(call.prompt)
    price = call.hold.price if call.hold is not None else None
    reason = "" if failure is None else getattr(failure, "reason", "") or "ANSWER_CANCELLED"
    return Attempt(
        attempt=call.number,
        hold_id=call.hold.hold_id if call.hold is not None else "",
        provider=call.candidate.provider,
        model=call.draft.model or call.candidate.model,
        provider_request_id=call.draft.request_id,
        usage=usage,
        cost_nanousd=price.cost_nanousd(usage) if price is not None else 0,
        finish_reason=call.draft.finish_reason if failure is None else "",
        error_reason=reason,
        first_token_ms=round((call.first_output_at - call.began_at) * 1000, 3) if call.first_output_at else 0.0,
        duration_ms=round((time.perf_counter() - call.began_at) * 1000, 3) if call.began_at else 0.0,
        estimated=estimated,
        price_version=price.version if price is not None else 0,
        not_sent=not call.draft.sent,
        lease_id=call.hold.lease_id if call.hold is not None else "",
        drawn_nanousd=call.hold.amount_nanousd if call.hold is not None and call.hold.lease_id else 0,
        reasoning_tokens=min(call.draft.reasoning_tokens, usage.output_tokens),
    )
