"""What is known of one answer while it is made, and how that becomes its receipt and its record. It decides nothing."""

import asyncio
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import orjson
import structlog

from services.chassis import telemetry
from services.chassis.afterwork import AfterWork
from services.chassis.clock import Clock
from services.chassis.errors import AnswerAbandoned, AnswerCancelled, DomainError, OutputInvalid
from services.chassis.money import Usage
from services.chassis.telemetry import StepRecord, Trail
from services.orchestrator.citations import CitationReader
from services.orchestrator.compose import Template, shown
from services.orchestrator.domain import (
    Accepted,
    Attempt,
    CachedAnswer,
    CacheReceipt,
    Candidate,
    Choice,
    Done,
    Draft,
    Edition,
    Event,
    OperationRecord,
    Passage,
    PassagesFound,
    Prompt,
    Question,
    Reasoned,
    Route,
    SentPrompt,
    StepChange,
    TextDelta,
    ToolResult,
    Turn,
)
from services.orchestrator.errands import Errands
from services.orchestrator.health import Health
from services.orchestrator.json_watch import JsonWatch
from services.orchestrator.leaks import instructions
from services.orchestrator.log import EventLog
from services.orchestrator.ports import Books, Credit, ExactCache, LateTurns, Ledger, Memory, Model, PromptShelf, ShadowSample
from services.orchestrator.single_flight import Led, SingleFlight
from services.orchestrator.standalone import language
from services.orchestrator.templates import Templates, filled
from services.orchestrator.tools.toolbox import Toolset
from services.orchestrator.unfencing import Unfencing
from services.orchestrator.validate import danger, judge

log = structlog.get_logger(__name__)

FACTS_MAX = 16
PASSAGES_MAX = 32
"""As many as an event has room for by the contract."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one answer; see the settings of the same names."""

    deadline_s: float
    prompt_tokens_max: int
    passages_max: int
    history_turns_max: int
    history_bytes_max: int
    passages_bytes_max: int
    cache_per_user: bool
    output_tokens_min: int
    rewrites: Literal["model", "rule"]
    titles: Literal["model", "rule"]
    summaries: Literal["model", "rule", "off"]


@dataclass(frozen=True, slots=True)
class Toolkit:
    """What all answers of a process share."""

    memory: Memory
    ledger: Ledger
    exact: ExactCache
    books: Books
    models: Mapping[str, Model]
    """By provider."""
    after: AfterWork
    clock: Clock
    templates: Templates
    limits: Limits
    credit: Credit
    errands: Errands
    shelf: PromptShelf | None
    """Where prompts are kept to be seen; None = they are not."""
    health: Health
    continuation: Template
    shadows: ShadowSample
    tools: Toolset
    late_turns: LateTurns | None = None
    """None = turns wait in memory alone."""
    flights: SingleFlight | None = None
    """None = every question has an answer of its own."""
    turns_under_way: dict[tuple[str, str, str], set[asyncio.Future[None]]] = field(default_factory=dict)
    """By tenant, user and session: turns of ended answers that the ledger has not kept yet."""


class Run:
    """The one mutable thing of an answer. Every change that a reader may see goes to the log at once."""

    def __init__(self, question: Question, kit: Toolkit, events: EventLog) -> None:
        self.question, self.kit, self.events = question, kit, events
        self.trail = Trail("orchestrator", lambda step: events.append(_change(step)))
        self.step = self.trail.step
        self.trace_id = telemetry.current_trace_id()
        self.turns: tuple[Turn, ...] = ()
        self.summary = ""
        """Of the turns before `turns`."""
        self.form = question.text
        """The question as it can be understood without the conversation."""
        self.prompts: list[SentPrompt] = []
        """What was sent, for the answer and for its conversation, if that is kept."""
        self.turn_is_spooled = False
        """Whether the turn waits on disk."""
        self.turn_is_settled = False
        """Whether the ledger has the turn, or never will."""
        self.are_prompts_kept = False
        """Whether those that are noted now have to be kept again: the answer's own are already."""
        self.passages: tuple[Passage, ...] = ()
        self.citations = CitationReader(())
        self.edition = Edition(0)
        self.cache = CacheReceipt("off" if question.cache == "off" else "miss", reason="" if question.cache == "use" else "requested")
        self.pieces: list[str] = []
        self._paragraph_due = False
        self.model = self.provider = self.finish_reason = self.verdict = ""
        self.purpose: Literal["", "shadow"] = ""
        """What it is booked as, if not as an answer to somebody."""
        self.first_token_ms = 0.0
        self.attempts: list[Attempt] = []
        self.route = question.route or Route(question.tier, question.candidates)
        self.choices: list[Choice] = []
        self.holding = False
        """Whether text is kept from readers until it was checked."""
        self.watch: JsonWatch | None = None
        """Set where text of a schema is shown as it comes: what cannot satisfy it any more is not shown."""
        self.ruled_out = ""
        """The piece that could not."""
        self.unfencing: Unfencing | None = None
        """Set beside it: a block of code around the JSON is not shown either."""
        self.led: Led | None = None
        """Set once others may follow this answer."""
        self.may_share = False
        """Whether another's answer to the same question would do, kept or on its way."""
        self.is_remembered = False
        """Whether it was offered to the caches."""
        self._attempts_begun = 0
        self._returned: list[str] = []
        """Texts of tools, which the answer may repeat as it may its passages."""

    def accept(self) -> None:
        """Say that the question was taken on: the first event."""
        asked = self.question
        self.events.append(Accepted(asked.answer_id, asked.session_id, self.trace_id, asked.created_at))

    def show(self, passages: tuple[Passage, ...]) -> None:
        """Say what `[n]` may point at from now on."""
        self.passages, self.citations = passages, CitationReader(passages)
        self.events.append(PassagesFound(passages))

    def chose(self, candidate: Candidate, route: Route, reason: str) -> None:
        """Keep why a model is asked. One that is asked again after tools were called was chosen before."""
        choice = Choice(candidate.model, candidate.provider, route.tier, reason, route.difficulty)
        if choice not in self.choices:
            self.choices.append(choice)

    def next_attempt(self) -> int:
        """Number of the next provider call, from 1; none is given twice."""
        self._attempts_begun += 1
        return self._attempts_begun

    def verdict_of(self, draft: Draft) -> str:
        """What the checks say of a draft, whether it has been shown or not. One that calls tools is no answer yet."""
        if draft.calls:
            return "passed"
        citations = self.citations
        if self.holding and self.question.output_schema is None:
            citations = CitationReader(self.passages)
            citations.read(draft.text)
        given = instructions(self.template.system)
        earlier = (part for turn in self.turns for part in (turn.question, turn.text))
        shown = (
            self.question.text,
            *(part for found in self.passages for part in (found.title, found.source_uri, found.text)),
            *self._returned,
            *earlier,
        )
        is_markdown = self.question.output_schema is None
        return danger(draft.text, given, shown, is_markdown=is_markdown) or judge(draft.text, draft.finish_reason, citations)

    def release(self, text: str) -> None:
        """Show what was held back, if anything was."""
        if self.holding:
            self.holding = False
            if text:
                self.write(text)

    def show_more(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        """Give passages that a tool found numbers to be cited by, and say so; one that is known already keeps its number.

        Returns those that have one: an answer has at most PASSAGES_MAX.
        """
        known = {passage.chunk_id: passage for passage in self.passages}
        fresh: list[Passage] = []
        last = max((passage.number for passage in self.passages), default=0)
        for passage in passages:
            if passage.chunk_id not in known and len(self.passages) + len(fresh) < PASSAGES_MAX:
                known[passage.chunk_id] = replace(passage, number=last + len(fresh) + 1)
                fresh.append(known[passage.chunk_id])
        if fresh:
            self.passages = (*self.passages, *fresh)
            self.citations.know(self.passages)
            self.events.append(PassagesFound(self.passages))
        return tuple(known[passage.chunk_id] for passage in passages if passage.chunk_id in known)

    def returned(self, result: ToolResult) -> None:
        """Show what a tool returned; what is written from now on may rest on it."""
        self.events.append(result)
        if not result.failed:
            self.citations.learn(result.text)
            self._returned.append(result.text)

    def begin_paragraph(self) -> None:
        """Say that what is written next, if anything, is not part of the sentence before: tools were called in between."""
        self._paragraph_due = bool(self.pieces)

    def sent(
        self,
        prompt: Prompt,
        *,
        attempt: int,
        model: str,
        output_tokens_max: int,
        effort: str,
        purpose: str = "",
        operation_id: str = "",
    ) -> None:
        """Note what a provider call was made with, if that is kept."""
        if self.kit.shelf is None:
            return
        self.prompts.append(
            SentPrompt(
                attempt,
                model,
                prompt.template,
                prompt.system,
                tuple((message.role, shown(message)) for message in prompt.messages),
                prompt.tools,
                prompt.output_schema,
                output_tokens_max,
                effort,
                purpose,
                operation_id,
            )
        )

    async def keep_prompts(self) -> None:
        """Put what was noted on the shelf, in the place of what is there of this answer."""
        self.are_prompts_kept = True
        if self.kit.shelf is None or not self.prompts:
            return
        try:
            await self.kit.shelf.keep(self.question.principal, self.question.answer_id, tuple(self.prompts))
        except DomainError as error:
            log.warning("prompts_not_kept", answer_id=self.question.answer_id, reason=error.reason)

    def think(self, text: str) -> None:
        """Show a piece of what the model thinks."""
        self.trail.tell()
        self.events.append(Reasoned(text))

    def write(self, text: str) -> None:
        """Pass on a piece of text, then the citations it completes. Raises OutputInvalid before a piece that rules out the schema."""
        if self._paragraph_due:
            self._paragraph_due = False
            text = "\n\n" + text
        if self.unfencing is not None and not (text := self.unfencing.feed(text)):
            return
        if self.watch is not None and (wrong := self.watch.feed(text)):
            self.ruled_out = text
            raise OutputInvalid("what the model writes cannot satisfy the schema any more", keyword=wrong)
        if not self.first_token_ms:
            self.first_token_ms = self.trail.elapsed_ms
        self.trail.tell()
        self.pieces.append(text)
        event: Event = TextDelta(text)
        self.events.append(event)
        if self.question.output_schema is not None:
            return  # `[1]` in JSON is an array
        for event in self.citations.read(text):
            self.events.append(event)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @functools.cached_property
    def template(self) -> Template:
        """The instructions for this answer. What may vary in them is part of the cache's key, by `scope` or beside it."""
        asked = self.question
        values = {"collection": asked.collection, "language": language(asked.text), "tier": asked.tier}
        return filled(self.kit.templates.answer(asked.tier), values)

    @functools.cached_property
    def scope(self) -> str:
        """Digest of everything besides tenant, documents and words that the answer depends on. Similarity never crosses it."""
        asked, limits = self.question, self.kit.limits
        parts = (
            asked.principal.user if limits.cache_per_user or asked.principal.cache_scope == "user" else "",
            asked.tier,
            *sorted(candidate.model for candidate in asked.candidates),
            self.template.name,
            language(asked.text),
            str(asked.output_tokens_max),
            str(limits.passages_max),
            "" if asked.output_schema is None else orjson.dumps(asked.output_schema, option=orjson.OPT_SORT_KEYS).decode(),
        )
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()

    @property
    def usage(self) -> Usage:
        return sum((attempt.usage for attempt in self.attempts), Usage())

    @property
    def cost_nanousd(self) -> int:
        return sum(attempt.cost_nanousd for attempt in self.attempts)

    @property
    def estimated(self) -> bool:
        return any(attempt.estimated for attempt in self.attempts)

    def receipt(self) -> Done:
        return Done(
            answer_id=self.question.answer_id,
            text_sha256=hashlib.sha256(self.text.encode()).hexdigest(),
            usage=self.usage,
            cost_nanousd=self.cost_nanousd,
            model=self.model,
            provider=self.provider,
            tier=self.question.tier,
            finish_reason=self.finish_reason,
            cache=self.cache,
            trace_id=self.trace_id,
            estimated=self.estimated,
            verdict=self.verdict,
            first_token_ms=round(self.first_token_ms, 3),
            duration_ms=round(self.trail.elapsed_ms, 3),
            choices=tuple(self.choices),
            groundedness=self.citations.groundedness,
            sentences_judged=self.citations.judged,
            reasoning_tokens=sum(attempt.reasoning_tokens for attempt in self.attempts),
        )

    def record(self, failure: DomainError | None, *running: Attempt) -> OperationRecord:
        """What is booked, with the attempts that are `running`. The step that books it is in it too, with the time it had taken so far;
        any other that runs is in it as cut short, for then this is booked only if nothing more is heard of the answer.
        """
        attempts = (*self.attempts, *running)
        status = "done" if failure is None else "cancelled" if isinstance(failure, AnswerAbandoned | AnswerCancelled) else "failed"
        now_ms = self.trail.elapsed_ms
        steps = [_change(step) for step in self.trail.steps if step.status != "running"]
        for step in self.trail.steps:
            if step.status == "running" and step.name == "record":
                steps.append(StepChange(step.name, "done", step.started_ms, round(now_ms - step.started_ms, 3), {}))
            elif step.status == "running":
                steps.append(_change(step.cut_short(now_ms)))
        return OperationRecord(
            question=self.question,
            trace_id=self.trace_id,
            status=status,  # type: ignore[arg-type]
            model=self.model,
            provider=self.provider,
            finish_reason=self.finish_reason if failure is None else "",
            error_reason=failure.reason if failure is not None else "",
            usage=sum((attempt.usage for attempt in attempts), Usage()),
            cost_nanousd=sum(attempt.cost_nanousd for attempt in attempts),
            cache=self.cache,
            estimated=any(attempt.estimated for attempt in attempts),
            first_token_ms=round(self.first_token_ms, 3),
            duration_ms=round(self.trail.elapsed_ms, 3),
            steps=tuple(steps),
            attempts=attempts,
            purpose=self.purpose,
        )

    def turn(self, *, complete: bool) -> Turn:
        """The turn the conversation keeps: with the passages that are cited, so that its markers can be opened later."""
        cited = tuple(passage for passage in self.passages if passage.number in self.citations.cited)
        asked = self.question
        return Turn(asked.answer_id, asked.text, self.text, cited, asked.asked_at, complete)

    @property
    def conversation(self) -> tuple[str, str, str]:
        asked = self.question
        return asked.principal.tenant, asked.principal.user, asked.session_id

    def cacheable(self) -> CachedAnswer:
        """This answer, as it may be served again."""
        asked = self.question
        return CachedAnswer(
            answer_id=asked.answer_id,
            question=asked.text,
            user=asked.principal.user,
            text=self.text,
            passages=self.passages,
            model=self.model,
            provider=self.provider,
            cost_nanousd=self.cost_nanousd,
            created_at=asked.created_at,
            finish_reason=self.finish_reason,
            usage=self.usage,
        )


def _change(step: StepRecord) -> StepChange:
    facts = dict(list((step.facts or {}).items())[:FACTS_MAX])
    return StepChange(step.name, step.status, step.started_ms, step.duration_ms, facts)
