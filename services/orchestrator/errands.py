"""Small calls of a model that serve a conversation and are no answer: each is an operation of its own, with a hold before it and a true
account after it. What is asked, and what is done with the reply, is decided elsewhere.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from services.chassis import telemetry
from services.chassis.clock import Clock
from services.chassis.deadline import current_deadline
from services.chassis.errors import AnswerInterrupted, BudgetExhausted, DeadlineTooShort, DomainError, PriceUnknown, Unavailable
from services.chassis.money import Usage
from services.chassis.telemetry import Trail
from services.orchestrator import call_telemetry
from services.orchestrator.domain import Attempt, CacheReceipt, Candidate, Draft, Hold, OperationRecord, Prompt, Question, StepChange
from services.orchestrator.health import Health
from services.orchestrator.outcomes import tell
from services.orchestrator.ports import Books, Ledger, Model
from services.orchestrator.tariff import Tariff
from services.orchestrator.validate import WHOLE

Purpose = Literal["rewrite", "summary", "title"]
HOLD_MARGIN_S = 60.0
"""A hold outlives the call by this, so that the sweeper never books what is about to be recorded."""


@dataclass(frozen=True, slots=True)
class Written:
    """What came of an errand."""

    text: str = ""
    """Empty = nothing that can be used."""
    model: str = ""
    """Who wrote it."""


class Note(Protocol):
    """Hears what a call was made with, once it is over."""

    def __call__(self, prompt: Prompt, *, attempt: int, model: str, output_tokens_max: int, effort: str, operation_id: str) -> None: ...


class Errands:
    """Runs them, each with the cheapest of `candidates` that has room for it and is well; without any, everything is done by rule.

    `candidates` is asked for every errand, so that a models file that changes is followed. How a call ends is told to `health`. Being
    slower than an errand may be is no failure of a model, but for a while it is left alone with errands.
    """

    def __init__(
        self,
        ledger: Ledger,
        books: Books,
        models: Mapping[str, Model],
        candidates: Callable[[], Sequence[Candidate]],
        tariff: Tariff,
        health: Health,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self._ledger, self._books, self._models = ledger, books, models
        self._candidates, self._tariff, self._health, self._clock, self._new_id = candidates, tariff, health, clock, new_id
        self._speed = Health(health.clock, health.jitter)
        """Who is quick enough."""
        self.under_way: set[tuple[str, ...]] = set()
        """What is being done for whom, by those who must not begin it twice."""

    @property
    def possible(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self._candidates())

    def _chosen(self, prompt: Prompt, output_tokens_max: int) -> Candidate | None:
        """Who is asked; None = nobody, or nobody who is well has room for the prompt."""
        able = [
            c for c in self._candidates() if c.context_tokens_max - min(output_tokens_max, c.output_tokens_max) >= prompt.input_tokens_max
        ]
        while able:
            cheapest = self._tariff.cheapest(able, prompt.input_tokens_estimate, output_tokens_max)
            if self._speed.lets_through(cheapest) and self._health.lets_through(cheapest):
                return cheapest
            able.remove(cheapest)  # only now: whoever is out is probed by the calls that are let through
        return None

    async def run(
        self, asked: Question, purpose: Purpose, prompt: Prompt, output_tokens_max: int, within_s: float, note: Note | None = None
    ) -> Written:
        """Make one call for the user and the conversation of `asked`; return its text, nothing if that was cut or refused.

        It is never tried again.

        Raises what reserving and the model raise, DeadlineTooShort after `within_s`, Unavailable if no model can be asked or the books
        have no room. Cancellation: the provider's connection is closed and what was used is booked before CancelledError leaves.
        """
        candidate = self._chosen(prompt, output_tokens_max)
        if candidate is None:
            raise Unavailable("no model can be asked for this errand now", dependency="model")
        if not self._books.has_room:
            raise Unavailable("too many records wait for the ledger", dependency="ledger")
        current_deadline.set(None)  # bounded by `within_s` alone: what it serves may be over before it is
        text = await _Errand(self, asked, purpose, prompt, candidate, output_tokens_max, within_s, note).run()
        return Written(text, candidate.model)


class _Errand:
    """One call in the making."""

    def __init__(
        self,
        tools: Errands,
        asked: Question,
        purpose: Purpose,
        prompt: Prompt,
        candidate: Candidate,
        output_tokens_max: int,
        within_s: float,
        note: Note | None,
    ) -> None:
        self._note = note
        self._ledger, self._books, self._models = tools._ledger, tools._books, tools._models
        self._health, self._speed = tools._health, tools._speed
        self._purpose, self._prompt, self._candidate, self._within_s = purpose, prompt, candidate, within_s
        self._output_tokens_max = min(output_tokens_max, candidate.output_tokens_max)
        # No tier: it belongs to none, so nothing is said to have been saved by it, and its times are not those of answers.
        self._question = replace(
            asked,
            answer_id=tools._new_id(),
            text="",
            tier="",
            candidates=(candidate,),
            created_at=tools._clock.now(),
            images=(),
            tools=(),
            tool_results=(),
        )
        self._trail = Trail("errand")
        self._trace_id = telemetry.current_trace_id()
        self._draft = Draft(lambda _: None, on_progress=lambda: self._health.began_well(candidate))
        self._hold: Hold | None = None
        self._began_at = 0.0

    async def run(self) -> str:
        failure: BaseException | None = None
        attempted = True
        self._books.intend(self._record(AnswerInterrupted("", answer_id=self._question.answer_id), self._if_we_die()))
        try:
            with self._trail.step("hold"):
                self._hold = await self._reserved()
            with self._trail.step("generate") as step:
                step.note(provider=self._candidate.provider, model=self._candidate.model)
                await self._generated()
            return self._draft.text if self._draft.finish_reason in WHOLE else ""
        except (BudgetExhausted, PriceUnknown) as error:
            failure, attempted = error, False  # there is no hold, and there was no call
            raise
        except BaseException as error:
            failure = error
            raise
        finally:
            attempt = self._attempt(failure) if attempted else None
            if attempt is not None and self._began_at:
                call_telemetry.measured(self._candidate, attempt)
            await self._books.record(self._record(failure, attempt))

    async def _reserved(self) -> Hold:
        """The worst case of the call, set aside. A cancel waits for the reply: only that says which hold to give back."""
        ttl_ms = int((self._within_s + HOLD_MARGIN_S) * 1000)
        tokens = (self._prompt.input_tokens_max, self._output_tokens_max, 0, ttl_ms)
        reserving = asyncio.create_task(
            self._ledger.reserve(self._question.answer_id, 1, self._candidate, *tokens, patient=False), name="reserve"
        )
        try:
            return await asyncio.shield(reserving)
        except asyncio.CancelledError:
            with contextlib.suppress(DomainError):
                self._hold = await reserving
            raise

    async def _generated(self) -> None:
        self._began_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._within_s):
                model = self._models[self._candidate.provider]
                await model.generate(self._prompt, self._candidate, self._output_tokens_max, self._draft)
            self._speed.succeeded(self._candidate)
            tell(self._health, self._candidate, None)
        except DomainError as error:
            tell(self._health, self._candidate, error)
            raise
        except TimeoutError as error:
            self._speed.failed(self._candidate)
            raise DeadlineTooShort("the errand took too long", step=self._purpose, left_ms=0) from error
        finally:
            if self._note is not None:
                self._note(
                    self._prompt,
                    attempt=1,
                    model=self._candidate.model,
                    output_tokens_max=self._output_tokens_max,
                    effort=self._draft.effort,
                    operation_id=self._question.answer_id,
                )

    def _if_we_die(self) -> Attempt:
        """What to book if this process ends before the call does: nobody knows whether it was sent, so it was."""
        attempt = self._attempt(AnswerInterrupted("", answer_id=self._question.answer_id))
        return replace(attempt, usage=Usage(self._prompt.input_tokens_estimate), estimated=True, not_sent=False)

    def _attempt(self, failure: BaseException | None) -> Attempt:
        usage, estimated = self._draft.usage(self._prompt)
        price = self._hold.price if self._hold is not None else None
        return Attempt(
            attempt=1,
            hold_id=self._hold.hold_id if self._hold is not None else "",
            provider=self._candidate.provider,
            model=self._draft.model or self._candidate.model,
            provider_request_id=self._draft.request_id,
            usage=usage,
            cost_nanousd=price.cost_nanousd(usage) if price is not None else 0,
            finish_reason=self._draft.finish_reason if failure is None else "",
            error_reason="" if failure is None else getattr(failure, "reason", "") or "ANSWER_CANCELLED",
            first_token_ms=0.0,
            duration_ms=round((time.perf_counter() - self._began_at) * 1000, 3) if self._began_at else 0.0,
            estimated=estimated,
            price_version=price.version if price is not None else 0,
            not_sent=not self._draft.sent,
        )

    def _record(self, failure: BaseException | None, attempt: Attempt | None) -> OperationRecord:
        now_ms = self._trail.elapsed_ms
        told = [step.cut_short(now_ms) if step.status == "running" else step for step in self._trail.steps]
        steps = tuple(StepChange(step.name, step.status, step.started_ms, step.duration_ms, step.facts or {}) for step in told)
        attempts = () if attempt is None else (attempt,)
        status: Literal["done", "failed", "cancelled"] = "done"
        if failure is not None:
            status = "failed" if isinstance(failure, DomainError) else "cancelled"
        return OperationRecord(
            question=self._question,
            trace_id=self._trace_id,
            status=status,
            model=attempt.model if attempt is not None else self._candidate.model,
            provider=self._candidate.provider,
            finish_reason=attempt.finish_reason if attempt is not None else "",
            error_reason="" if failure is None else getattr(failure, "reason", "") or "ANSWER_CANCELLED",
            usage=sum((made.usage for made in attempts), Usage()),
            cost_nanousd=sum(made.cost_nanousd for made in attempts),
            cache=CacheReceipt("off", reason="errand"),
            estimated=any(made.estimated for made in attempts),
            first_token_ms=0.0,
            duration_ms=round(self._trail.elapsed_ms, 3),
            steps=steps,
            attempts=attempts,
            purpose=self._purpose,
        )
