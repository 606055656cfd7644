"""One answer, from the accepted question to the receipt. Read `answer` and you know the system; `produce` surrounds it.

Steps raise what went wrong; none knows a wire format, a provider's SDK or a store. Every event goes to the answer's log and nowhere else.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from typing import Any

import structlog

from services.chassis.deadline import Deadline, current_deadline
from services.chassis.errors import AnswerCancelled, DeadlineTooShort, DomainError, Internal, OutputInvalid, Overloaded
from services.chassis.telemetry import StepRecord
from services.orchestrator.attempts import first_draft
from services.orchestrator.compose import compose
from services.orchestrator.conversation import rewrite
from services.orchestrator.domain import CachedAnswer, CacheReceipt, Draft, HeldAnswer, Passage, Prompt, Question
from services.orchestrator.json_watch import JsonWatch
from services.orchestrator.log import EventLog
from services.orchestrator.output_schema import asked_again, begun_wrong, problems_of, tokens_max_of, told, unfenced
from services.orchestrator.packing import pack
from services.orchestrator.ports import Recalling
from services.orchestrator.reuse import follow, found, looking_ahead, serve_again
from services.orchestrator.run import Run, Toolkit
from services.orchestrator.standalone import depends_on_time
from services.orchestrator.tools.loop import draft_with_tools, require_no_calls, take_up, without_tools
from services.orchestrator.turns import keep_turn, read_history, spool_turn
from services.orchestrator.unfencing import Unfencing
from services.orchestrator.validate import WHOLE

log = structlog.get_logger(__name__)

QUERY_BYTES_MAX = 32_768
REMEMBER_WAIT_S = 0.1
"""How long `done` waits for the caches, so that the same question asked again at once is a hit. They go on without us."""
BOOKED_WAIT_S = 0.1
"""How long `done` waits for the ledger's word, so that the record can be looked up right after it. It is on disk anyway."""
ENDING_S, ENDING_SHARE = 0.05, 0.1
"""What the deadline leaves for closing the provider's connection, booking and telling, so that all of it ends about in time."""


async def answer(run: Run) -> None:
    """Answer `run.question`: each line one step, one span. Returns once the text has left and was checked; `conclude` does the rest."""
    if run.question.resumed is not None:
        with run.step("resume") as step:
            prompt = take_up(run, step)
        return await write(run, prompt)
    with run.step("history") as step:
        run.turns, run.summary = await read_history(run, step)
    if run.turns:
        with run.step("rewrite") as step:
            run.form = await rewrite(run, step)
    async with AsyncExitStack() as opened:
        with run.step("recall") as step:
            held = await find_exact(run)
            recalling = await opened.enter_async_context(begin_recall(run, held))
            cached = await look_up(run, recalling, held, step)
        if cached is not None:
            return serve_again(run, cached)
        ahead = await opened.enter_async_context(looking_ahead(run))
        with run.step("passages") as step:
            passages = await find_passages(recalling, step)
        if await follow(run, await ahead):
            return None
    with run.step("compose") as step:
        prompt = write_prompt(run, passages, step)
    return await write(run, prompt)


async def write(run: Run, prompt: Prompt) -> None:
    """The second half of `answer`, which is all that an answer has that goes on with the results of its client's tools."""
    draft = await fitting_draft(run, prompt)  # the steps `hold` and `generate`, once for each attempt, and `tool` for each call
    with run.step("validate") as step:
        await check(run, draft, step)
    run.kit.shadows.offer(run, prompt)
    with run.step("remember") as step:
        await remember(run, step)


async def produce(question: Question, kit: Toolkit, events: EventLog) -> None:
    """Answer within the deadline and conclude: by whatever door the answer ends, it is booked and its log gets its one end.

    Cancellation: the provider's connection is closed, what was used is booked, the log ends in AnswerCancelled.
    """
    run = Run(question, kit, events)
    failure: DomainError | None = None
    try:
        deadline_s = min(kit.limits.deadline_s, question.deadline_s or kit.limits.deadline_s)
        deadline_s -= min(ENDING_S, ENDING_SHARE * deadline_s)
        current_deadline.set(Deadline.after(deadline_s))
        async with asyncio.timeout(deadline_s):
            run.accept()
            await answer(run)
    except asyncio.CancelledError:
        failure = events.stopping or AnswerCancelled("the answer was stopped", answer_id=question.answer_id)
        raise
    except TimeoutError:
        failure = DeadlineTooShort("the answer took too long", step=run.trail.steps[-1].name if run.trail.steps else "", left_ms=0)
    except DomainError as error:
        failure = error
    except Exception as error:
        log.exception("answer_failed_unexpectedly", answer_id=question.answer_id, error=type(error).__name__)
        failure = Internal("", trace_id=run.trace_id)
    finally:
        current_deadline.set(None)  # what is left to do has bounds of its own
        await _outliving(kit, run, failure)


async def conclude(run: Run, failure: DomainError | None) -> None:
    """Step `record`, then the end of the log: `done`, which implies that the record is durable, or the failure."""
    try:
        with run.step("record") as step:
            await record(run, failure, step)
    except DomainError as error:
        failure = failure or error
    except Exception as error:
        log.exception("record_failed_unexpectedly", answer_id=run.question.answer_id, error=type(error).__name__)
        failure = failure or Internal("", trace_id=run.trace_id)
    if failure is None:
        run.events.append(run.receipt())
    run.events.end(failure)
    if run.led is not None and run.kit.flights is not None:
        await run.kit.flights.land(run.led, remembered=failure is None and run.is_remembered)


async def find_exact(run: Run) -> HeldAnswer | None:
    """The exact tier, unless no cached answer may be served at all."""
    asked = run.question
    if run.cache.reason == "" and (asked.uses_tools or asked.images):
        run.cache = replace(run.cache, reason="tools" if asked.uses_tools else "images")
    elif run.cache.reason == "" and run.turns:
        run.cache = replace(run.cache, reason="context_dependent")
    elif run.cache.reason == "" and depends_on_time(asked.text):
        run.cache = replace(run.cache, reason="time_dependent")
    run.may_share = not run.cache.reason
    return None if run.cache.reason else await run.kit.exact.get(asked, run.scope)


def begin_recall(run: Run, held: HeldAnswer | None) -> AbstractAsyncContextManager[Recalling]:
    """Ask the memory once for all: edition, cached answer, passages. If the answer we hold is still true, the edition is all it says."""
    return run.kit.memory.recall(
        run.form if len(run.form.encode()) <= QUERY_BYTES_MAX else run.question.text,
        run.question.collection,
        run.scope,
        want_cached=run.cache.reason == "",
        passages_max=run.kit.limits.passages_max,
        held=held.edition if held is not None else None,
    )


async def look_up(run: Run, recalling: Recalling, held: HeldAnswer | None, step: StepRecord) -> CachedAnswer | None:
    """The answer we hold if the edition is still its own, else what the semantic tier has."""
    run.edition = await recalling.edition()
    step.note(epoch=run.edition.epoch)
    if run.cache.reason:
        step.note(cache=run.cache.reason)
        return None
    if held is not None and held.edition == run.edition:
        return found(run, held.answer, None, step)
    verdict = await recalling.verdict()
    if verdict.answer is None:
        run.cache = CacheReceipt("miss", similarity=verdict.similarity, reason=verdict.reason or "no_candidate")
        step.note(cache=run.cache.reason)
        return None
    return found(run, verdict.answer, verdict.similarity, step)


async def find_passages(recalling: Recalling, step: StepRecord) -> tuple[Passage, ...]:
    passages = await recalling.passages()
    step.note(found=len(passages))
    return passages


def write_prompt(run: Run, passages: tuple[Passage, ...], step: StepRecord) -> Prompt:
    """The prompt, small enough for every candidate; and the passages that are in it, for the reader."""
    asked = run.question
    ways = [way for way in (run.route, run.route.escalation, run.route.cheaper) if way is not None]
    rooms = [c.context_tokens_max - min(asked.output_tokens_max, c.output_tokens_max) for way in ways for c in way.candidates]
    rooms += [way.prompt_tokens_max for way in ways if way.prompt_tokens_max is not None]
    room = min(*rooms, run.kit.limits.prompt_tokens_max) - tokens_max_of(asked.output_schema)
    packed = pack(passages, run.kit.limits.passages_bytes_max)
    prompt = compose(run.template, asked.text, packed, run.turns, room, summary=run.summary, form=run.form)
    if asked.output_schema is not None:
        prompt = told(prompt, asked.output_schema)
    run.show(prompt.passages)
    step.note(template=prompt.template, passages=len(prompt.passages), messages=len(prompt.messages), tokens_max=prompt.input_tokens_max)
    return prompt


async def fitting_draft(run: Run, prompt: Prompt) -> Draft:
    """A draft; where a schema is asked for, one that satisfies it, or one that its model did not end by itself.

    What nobody has read yet is repaired once by the model. What is read as it comes cannot be unsaid: it ends where it goes wrong, unless
    that is its very beginning. Raises OutputInvalid.
    """
    schema = run.question.output_schema
    if schema is None:
        return (await draft_with_tools(run, prompt))[0]
    run.holding = run.question.whole or run.route.holds_back
    if not run.holding:
        run.watch, run.unfencing = JsonWatch(schema), Unfencing()
    try:
        draft, answered = await draft_with_tools(run, prompt)
    except OutputInvalid as ruled_out:
        if run.pieces or run.question.uses_tools:
            raise
        run.watch, run.unfencing = JsonWatch(schema), Unfencing()
        answered = asked_again(prompt, run.ruled_out, [begun_wrong(ruled_out.metadata["keyword"])])
        draft = await first_draft(run, answered)
        require_no_calls(draft)
    problems = await _problems(run, draft, schema)
    if problems and run.holding:
        draft = await first_draft(run, asked_again(without_tools(answered), draft.text, problems))
        require_no_calls(draft)
        problems = await _problems(run, draft, schema)
    if problems:
        keyword = problems[0][0]
        raise OutputInvalid("what the model wrote does not satisfy the schema", keyword=keyword)
    run.release(unfenced(draft.text))
    return draft


async def _problems(run: Run, draft: Draft, schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with a draft by the schema. A cut draft or a refusal is told as that. In a thread: large texts take their time."""
    if draft.calls or draft.finish_reason not in WHOLE:
        return []
    with run.step("validate") as step:
        problems = await asyncio.to_thread(problems_of, unfenced(draft.text), schema)
        step.note(problems=len(problems))
        return problems


async def check(run: Run, draft: Draft, step: StepRecord) -> None:
    """Judge the whole text. What fails is told in the receipt and not remembered; it has been read already."""
    run.finish_reason = draft.finish_reason
    if draft.finish_reason == "tool_use":  # it goes on when its client has called: there is nothing whole to judge yet
        run.verdict = "passed"
        return
    run.verdict = await asyncio.to_thread(run.verdict_of, draft)  # a hostile text takes its time, and other streams go on
    step.note(verdict=run.verdict, cited=len(run.citations.cited), sentences_judged=run.citations.judged)
    if run.citations.groundedness is not None:
        step.note(groundedness=round(run.citations.groundedness, 3))


async def remember(run: Run, step: StepRecord) -> None:
    """Offer a sound answer to both tiers of the cache. Neither can harm the answer any more."""
    may_be_kept = run.cache.verdict == "miss" and run.cache.reason not in ("context_dependent", "time_dependent")
    if not may_be_kept or run.turns or depends_on_time(run.question.text):
        return step.skip(run.cache.reason)
    if run.question.uses_tools or run.question.images:
        return step.skip("tools" if run.question.uses_tools else "images")
    if run.verdict != "passed":
        return step.skip(run.verdict)
    if any(passage.flags for passage in run.passages):
        return step.skip("flagged")  # the model may have done as it was told
    run.is_remembered = True
    kept, asked = run.cacheable(), run.question

    async def in_words() -> None:
        step.note(exact=await run.kit.exact.put(asked, run.scope, HeldAnswer(kept, run.edition)))

    async def in_meaning() -> None:
        try:
            step.note(semantic=await run.kit.memory.remember(kept, asked.collection, run.scope, run.edition) or "kept")
        except DomainError as error:
            log.warning("answer_not_remembered", answer_id=asked.answer_id, reason=error.reason)

    await _briefly(run.kit, REMEMBER_WAIT_S, in_words(), in_meaning())
    return None


async def record(run: Run, failure: DomainError | None, step: StepRecord) -> None:
    """Make the record durable; then give the ledger a moment to book it and to keep the turn. Raises Unavailable if the disk fails."""
    booked = await run.kit.books.record(run.record(failure))
    run.kit.credit.recorded(run.question.answer_id, run.attempts, booked)
    kept_whole = failure is None and run.verdict == "passed" and run.finish_reason != "tool_use"
    works = [keep_turn(run, complete=kept_whole)] if run.pieces else []
    if run.kit.shelf is not None:
        works.append(run.keep_prompts())
    # Whose time is up waits for nothing more.
    await _briefly(run.kit, 0.0 if isinstance(failure, DeadlineTooShort) else BOOKED_WAIT_S, *works, also=booked)
    if run.pieces:
        await spool_turn(run, complete=kept_whole)
    step.note(booked=booked.done(), cost_nanousd=run.cost_nanousd)


async def _briefly(kit: Toolkit, wait_s: float, *works: Coroutine[Any, Any, None], also: "asyncio.Future[None] | None" = None) -> None:
    """Start `works` as work that outlives us and wait for them, and `also`, a moment. Work that finds no room is given up."""
    waited: list[asyncio.Future[None]] = [] if also is None else [also]
    for work in works:
        try:
            waited.append(kit.after.spawn(work, "aftermath"))
        except Overloaded:
            log.error("afterwork_refused")
    if waited:
        await asyncio.wait(waited, timeout=wait_s)


async def _outliving(kit: Toolkit, run: Run, failure: DomainError | None) -> None:
    """Conclude in a task that no cancellation of ours reaches; wait for it if we may."""
    try:
        concluding = kit.after.spawn(conclude(run, failure), "conclude")
    except Overloaded:
        return await conclude(run, failure)
    return await asyncio.shield(concluding)
