"""What is done for a conversation beside answering: the self-contained form of a question before, its title and summary afterwards.

Nothing here raises: where a model fails, is slow or cannot be paid, the rule does it, or nobody.
"""

import asyncio
import functools
import re
import time
from collections.abc import Coroutine
from typing import Any

import structlog

from services.chassis.errors import DomainError, Overloaded
from services.chassis.telemetry import StepRecord
from services.orchestrator.compose import compose_errand
from services.orchestrator.domain import KeptTurn, Prompt, Summary, Turn
from services.orchestrator.errands import Purpose, Written
from services.orchestrator.follow_up import self_contained
from services.orchestrator.router import EXTRACTIVE
from services.orchestrator.run import Run
from services.orchestrator.summaries import SUMMARY_CHARACTERS_MAX, by_rule
from services.orchestrator.words import LITTLE, POINTERS, STOP

log = structlog.get_logger(__name__)

REWRITE_WAIT_S = 1.5
"""The first token waits for this. A fast model needs a third of it."""
REWRITE_TOKENS_MAX = 256
REWRITE_CHARACTERS_MAX = 2_000
TITLE_TOKENS_MAX, TITLE_CHARACTERS_MAX = 32, 80
SUMMARY_TOKENS_MAX = 600
LATER_WAIT_S = 30.0
"""How long a title or a summary may take: nobody waits for it."""
SUMMARISED_TURNS_MAX = 100
"""Turns that go into one summary at most."""
STEM_CHARACTERS = 4
"""Words that begin alike are taken for forms of one."""
_QUOTES = "\"'“”„«»‘’`*#_ "
_SPACE = re.compile(r"\s+")


async def rewrite(run: Run, step: StepRecord) -> str:
    """The question as it can be understood without its conversation: what is searched for, and what the extractive model answers.

    By the fast model within REWRITE_WAIT_S, else by rule. A call that is too late goes on to its own end and is booked.
    """
    began, asked = time.perf_counter(), run.question
    by_our_rule = self_contained(asked.text, run.turns)
    form, by = by_our_rule, "rule"
    if run.kit.limits.rewrites == "model" and _may_ask(run):
        prompt = compose_errand(run.kit.templates.rewrite, run.turns, summary=run.summary, question=asked.text)
        errand = _text_or_nothing(run, "rewrite", prompt, REWRITE_TOKENS_MAX, REWRITE_WAIT_S)
        try:
            working = run.kit.after.spawn(errand, "rewrite")
            done, _ = await asyncio.wait({working}, timeout=REWRITE_WAIT_S)
            result = working.result() if done else Written()
            written = _SPACE.sub(" ", result.text).strip()
            if result.model:
                step.note(model=result.model)
        except Overloaded:
            written = ""
        if 0 < len(written) <= REWRITE_CHARACTERS_MAX and _is_about(asked.text, written):
            form, by = written, "model"
    step.note(by=by, ms=round((time.perf_counter() - began) * 1000))
    return form


def _may_ask(run: Run) -> bool:
    """Whether a model may be asked for the sake of this answer: who asks the model that costs nothing pays for none."""
    return run.kit.errands.possible and run.question.candidates[0].provider != EXTRACTIVE


def _is_about(question: str, form: str) -> bool:
    """Whether a rewritten question still says what was asked: half of its words at least, in any form. An answer to it would not."""
    words = [word for word in _words(question) if word not in STOP | LITTLE | POINTERS]
    beginnings = {word[:STEM_CHARACTERS] for word in _words(form)}
    return 2 * sum(word[:STEM_CHARACTERS] in beginnings for word in words) >= len(words)


def _words(text: str) -> list[str]:
    """Words of languages that write them apart with plain letters; what others say cannot be compared like that."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word.isascii()]


def look_after(run: Run, kept: KeptTurn) -> None:
    """Begin what a conversation needs once a turn of it is kept, as work that outlives us. Nothing waits for it."""
    limits = run.kit.limits
    if kept.ordinal == 1 and limits.titles == "model" and _may_ask(run):
        _begin(run, _suggest_title(run), "title")
    if limits.summaries != "off" and limits.history_turns_max and kept.unsummarised >= 2 * limits.history_turns_max:
        _begin(run, _summarise(run, kept.unsummarised), "summary")


def _begin(run: Run, work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        run.kit.after.spawn(work, name)
    except Overloaded:
        log.warning("errand_refused", errand=name, answer_id=run.question.answer_id)


async def _suggest_title(run: Run) -> None:
    """A title from question and answer, unless somebody gives one first."""
    asked, kit = run.question, run.kit
    prompt = compose_errand(kit.templates.title, [run.turn(complete=True)])
    written = await _text_or_nothing(run, "title", prompt, TITLE_TOKENS_MAX, LATER_WAIT_S)
    title = _SPACE.sub(" ", written.text).strip(_QUOTES).rstrip(".")[:TITLE_CHARACTERS_MAX].strip()
    if not title:
        return
    try:
        await kit.ledger.suggest_title(asked.session_id, title, written.model, asked.principal)
    except DomainError as error:
        log.warning("title_not_kept", answer_id=asked.answer_id, reason=error.reason)


async def _summarise(run: Run, unsummarised: int) -> None:
    """Put all turns of the branch but the latest into a summary, unless that is under way: until it is there, every turn says so."""
    asked, under_way = run.question, run.kit.errands.under_way
    conversation = ("summary", asked.principal.tenant, asked.principal.user, asked.session_id)
    if conversation in under_way:
        return
    under_way.add(conversation)
    try:
        await _put_summary(run, unsummarised)
    finally:
        under_way.discard(conversation)


async def _put_summary(run: Run, unsummarised: int) -> None:
    asked, kit = run.question, run.kit
    kept_whole = kit.limits.history_turns_max
    try:
        history = await kit.ledger.history(asked.session_id, min(unsummarised, SUMMARISED_TURNS_MAX), asked.answer_id)
        older = history.turns[:-kept_whole]
        if not older:
            return
        text, by = await _summary(run, history.summary.text if history.summary is not None else "", older)
        await kit.ledger.put_summary(asked.session_id, Summary(older[-1].answer_id, text), by, asked.principal)
    except DomainError as error:
        log.warning("summary_not_kept", answer_id=asked.answer_id, reason=error.reason)


async def _summary(run: Run, earlier: str, turns: tuple[Turn, ...]) -> tuple[str, str]:
    """The summary, and who made it."""
    kit = run.kit
    if kit.limits.summaries == "model" and _may_ask(run):
        prompt = compose_errand(kit.templates.summary, turns, summary=earlier)
        written = await _text_or_nothing(run, "summary", prompt, SUMMARY_TOKENS_MAX, LATER_WAIT_S)
        if text := written.text.strip():
            return text[:SUMMARY_CHARACTERS_MAX], written.model
    return by_rule(earlier, turns), "rule"


async def _text_or_nothing(run: Run, purpose: Purpose, prompt: Prompt, output_tokens_max: int, within_s: float) -> Written:
    note = functools.partial(run.sent, purpose=purpose)
    try:
        return await run.kit.errands.run(run.question, purpose, prompt, output_tokens_max, within_s, note)
    except DomainError as error:
        log.warning("errand_failed", reason=error.reason)
    except Exception as error:
        log.exception("errand_failed_unexpectedly", error=type(error).__name__)
    finally:
        if run.are_prompts_kept:
            await run.keep_prompts()
    return Written()
