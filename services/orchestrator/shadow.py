"""A sample of prompts is answered by another tier as well, unseen, and both answers are compared: what the choice of tier costs and saves.

The answer it is drawn from has left already and is never touched. What is booked is an operation of its own, paid by a tenant of its own,
with counts and measures: no text is kept and nothing is remembered in a cache.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import structlog

from services.chassis.deadline import Deadline, current_deadline
from services.chassis.errors import AnswerCancelled, DeadlineTooShort, DomainError
from services.chassis.principal import Principal, set_current
from services.orchestrator.agreement import agreement, parts_of, similarity
from services.orchestrator.attempts import first_draft
from services.orchestrator.domain import Draft, Prompt, Route
from services.orchestrator.log import EventLog
from services.orchestrator.output_schema import problems_of, unfenced
from services.orchestrator.run import Run

log = structlog.get_logger(__name__)

RUNNING_MAX = 4
"""Shadow answers under way in a process. A sample that finds no room is not drawn: people come first."""
USER = "shadow"
COMPARED = "compare"
"""Step whose facts hold the comparison."""


class Shadows:
    """Draws the sample and answers it. Used from one event loop; `stop` it before what answers need is closed."""

    def __init__(self, tenant: str, new_id: Callable[[], str], random: Callable[[], float], running_max: int = RUNNING_MAX) -> None:
        """`random` gives uniform numbers in [0, 1); `new_id` an operation's id. `tenant` pays, within budgets of its own."""
        self._principal = Principal(tenant, USER)
        self._new_id, self._random, self._running_max = new_id, random, running_max
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, run: Run, prompt: Prompt) -> None:
        """Answer the prompt of `run`, whose text was checked, by the other tier as well, if its route's sample draws it. Waits for nothing.

        An answer that used tools, or looked at pictures, is not drawn: its prompt is not all that it came from.
        """
        route, asked = run.route.shadow, run.question
        if route is None or asked.tools or asked.server_tools or asked.tool_results or asked.images or run.finish_reason == "tool_use":
            return
        if self._random() >= run.route.shadow_share or len(self._running) >= self._running_max:
            return
        task = asyncio.create_task(self._answer(run, prompt, route), name="shadow")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def settled(self) -> None:
        """Wait until none is under way."""
        while self._running:
            await asyncio.wait(self._running)

    async def stop(self) -> None:
        """Give up what is under way; what was used of it is booked."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, run: Run, prompt: Prompt, route: Route) -> None:
        """One shadow answer, from its hold to its record."""
        set_current(self._principal)
        shadow = self._run(run, route)
        failure: DomainError | None = None
        try:
            deadline_s = run.kit.limits.deadline_s
            current_deadline.set(Deadline.after(deadline_s))
            async with asyncio.timeout(deadline_s):
                draft = await first_draft(shadow, prompt)
            shadow.finish_reason = draft.finish_reason
            shadow.verdict = await asyncio.to_thread(_verdict, shadow, draft)
            with shadow.step(COMPARED) as step:
                chosen = run.choices[-1]
                step.note(of=run.question.answer_id, tier=chosen.tier, model=run.model, cost_nanousd=run.cost_nanousd, verdict=run.verdict)
                step.note(other_tier=route.tier, other_verdict=shadow.verdict, agreement=f"{agreement(run.text, shadow.text):.3f}")
                for name, grounded in (("groundedness", run.citations.groundedness), ("other_groundedness", shadow.citations.groundedness)):
                    if grounded is not None:
                        step.note(**{name: f"{grounded:.3f}"})
                if (alike := await _similarity(run, shadow)) is not None:
                    step.note(similarity=f"{alike:.3f}")
                if chosen.difficulty is not None:
                    step.note(difficulty=chosen.difficulty)
        except asyncio.CancelledError:
            failure = AnswerCancelled("the process ends", answer_id=shadow.question.answer_id)
            raise
        except TimeoutError:
            failure = DeadlineTooShort("the answer took too long", step="shadow", left_ms=0)
        except DomainError as error:
            failure = error
        finally:
            current_deadline.set(None)
            await asyncio.shield(asyncio.ensure_future(_record(shadow, failure)))

    def _run(self, run: Run, route: Route) -> Run:
        """A run of its own: nobody reads it, and it leads nowhere else."""
        answer_id = self._new_id()
        question = replace(
            run.question,
            answer_id=answer_id,
            principal=self._principal,
            session_id=answer_id,
            session_is_new=True,
            tier=route.tier,
            candidates=route.candidates,
            cache="off",
            created_at=run.kit.clock.now(),
            idempotency_key="",
            priority="batch",
            route=route,
        )
        shadow = Run(question, run.kit, EventLog(answer_id))
        shadow.purpose = "shadow"
        shadow.show(run.passages)
        return shadow


def _verdict(shadow: Run, draft: Draft) -> str:
    """What the checks say; `output_invalid` where an answer to somebody would have ended in that error."""
    verdict, schema = shadow.verdict_of(draft), shadow.question.output_schema
    wrong = verdict == "passed" and schema is not None and problems_of(unfenced(draft.text), schema)
    return "output_invalid" if wrong else verdict


async def _similarity(run: Run, shadow: Run) -> float | None:
    """How near both answers are in meaning; None if that cannot be told, which is no reason to lose the rest of the comparison."""
    parts, others = parts_of(run.text), parts_of(shadow.text)
    if not parts or not others:
        return None
    try:
        vectors = await run.kit.memory.embed([*parts, *others])
    except DomainError as error:
        log.warning("shadow_not_embedded", reason=error.reason)
        return None
    return similarity(vectors[: len(parts)], vectors[len(parts) :])


async def _record(shadow: Run, failure: DomainError | None) -> None:
    try:
        booked = await shadow.kit.books.record(shadow.record(failure))
        shadow.kit.credit.recorded(shadow.question.answer_id, shadow.attempts, booked)
    except DomainError as error:
        log.warning("shadow_not_recorded", reason=error.reason)
