"""A model that does as it is told, and an answer made with it alone: everything around is in memory and says yes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import orjson

from services.chassis.afterwork import AfterWork
from services.chassis.errors import DomainError
from services.chassis.money import Price
from services.chassis.principal import Principal
from services.orchestrator.answer import produce
from services.orchestrator.compose import CONTINUE_FILE, read_template
from services.orchestrator.domain import (
    Candidate,
    Draft,
    Edition,
    Event,
    History,
    Hold,
    KeptTurn,
    OperationRecord,
    Passage,
    Prompt,
    Question,
    RecallVerdict,
    StepChange,
    Suspended,
    TextDelta,
    ToolCall,
    ToolResult,
    ToolSpec,
)
from services.orchestrator.errands import Errands
from services.orchestrator.health import Health
from services.orchestrator.log import EventLog
from services.orchestrator.run import Limits, Toolkit
from services.orchestrator.shadow import Shadows
from services.orchestrator.tariff import Tariff
from services.orchestrator.templates import read_templates
from services.orchestrator.tools.confirmations import Confirmations
from services.orchestrator.tools.toolbox import Output, Tool, Toolbox, ToolLimits, Toolset

CANDIDATE = Candidate("scripted", "scripted", 200_000, 4_000, frozenset({"tools", "images"}))
ALICE = Principal("acme", "alice")
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


def call(name: str, call_id: str = "", /, **arguments: Any) -> ToolCall:
    """A call as a model writes it."""
    return ToolCall(call_id or f"id-{name}", name, orjson.dumps(arguments).decode())


@dataclass
class ScriptedModel:
    """Writes one draft of `script` after the other, and keeps the prompts it was given. A str is text that ends the turn."""

    script: list[str | ToolCall | Sequence[str | ToolCall]]
    prompts: list[Prompt] = field(default_factory=list)
    again: bool = False
    """Repeat the last draft for ever."""

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        self.prompts.append(prompt)
        parts = self.script[0] if self.again and len(self.script) == 1 else self.script.pop(0)
        draft.sent, draft.model = True, candidate.model
        for part in [parts] if isinstance(parts, str | ToolCall) else parts:
            if isinstance(part, str):
                draft.write(part)
            else:
                draft.call(part)
        draft.finish_reason = "tool_use" if draft.calls else "end_turn"
        draft.input_tokens, draft.output_tokens, draft.usage_is_final = 10, 5, True
        await asyncio.sleep(0)


@dataclass
class FakeTool:
    """A tool that returns what it is told to, and keeps the arguments it got."""

    name: str
    returns: str | Exception | Output = "done"
    properties: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    delay_s: float = 0.0
    output_schema: dict[str, Any] | None = None
    got: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    @property
    def spec(self) -> ToolSpec:
        return ToolSpec(
            self.name, f"the tool {self.name}", {"type": "object", "properties": self.properties, "required": list(self.required)}
        )

    async def call(self, arguments: Any, asked: Question) -> Output:
        self.got.append(dict(arguments))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.running -= 1
        if isinstance(self.returns, Exception):
            raise self.returns
        return self.returns if isinstance(self.returns, Output) else Output(self.returns)


class Words:
    """SharedWords in memory; several Confirmations that share one are several replicas."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, str], bool | None] = {}

    async def ask(self, answer_id: str, call_id: str, life_s: float) -> None:
        self.said[answer_id, call_id] = None

    async def say(self, answer_id: str, call_id: str, allowed: bool) -> bool:
        if self.said.get((answer_id, call_id), False) is not None:
            return False
        self.said[answer_id, call_id] = allowed
        return True

    async def hear(self, answer_id: str, call_id: str) -> bool | None:
        return self.said.get((answer_id, call_id))

    async def end(self, answer_id: str, call_id: str) -> bool | None:
        return self.said.pop((answer_id, call_id), None)


class Pending:
    """PendingCalls in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Suspended] = {}

    async def keep(self, suspended: Suspended) -> None:
        self.kept[suspended.answer_id] = suspended

    async def find(self, owner: tuple[str, str], answer_id: str) -> Suspended | None:
        found = self.kept.get(answer_id)
        return found if found is not None and found.owner == owner else None


class _Recall:
    async def edition(self) -> Edition:
        return Edition(1)

    async def verdict(self) -> RecallVerdict:
        return RecallVerdict()

    async def passages(self) -> tuple[Passage, ...]:
        return (Passage(1, "d1", "d1-0", "Guide", "guide.md", "The gateway listens on port 8080.", 0, 33, 0.9),)


class _Yes:
    """Memory, ledger, caches, books and credit that keep what they are told to and refuse nothing."""

    def __init__(self) -> None:
        self.reserved: list[int] = []
        self.remembered: list[Any] = []
        self.exact_asked = 0
        self.records: list[OperationRecord] = []
        self.turns_kept: list[Any] = []
        self.broke_after = 10**9

    @contextlib.asynccontextmanager
    async def recall(self, *_: Any, **__: Any) -> AsyncIterator[_Recall]:
        yield _Recall()

    async def remember(self, *answer: Any) -> str:
        self.remembered.append(answer)
        return ""

    async def reserve(self, operation_id: str, attempt: int, *bounds: Any, **_: Any) -> Hold:
        from services.chassis.errors import BudgetExhausted

        if len(self.reserved) >= self.broke_after:
            raise BudgetExhausted("nothing is left", needed_nanousd=1, left_nanousd=0, scope="user")
        self.reserved.append(attempt)
        return Hold(f"hold-{attempt}", 1_000, Price("scripted", "scripted", 1, 1_000_000, 1_000_000), bounds[2])

    async def history(self, session_id: str, limit: int, until: str = "", *, patient: bool = False) -> History:
        return History()

    async def append_turn(self, session_id: str, turn: Any, principal: Principal, replaces: str = "", asked_after: str = "") -> KeptTurn:
        self.turns_kept.append(turn)
        return KeptTurn(len(self.turns_kept), 0)

    async def get(self, *_: Any) -> None:
        self.exact_asked += 1

    async def put(self, *_: Any) -> bool:
        self.remembered.append(_)
        return True

    def intend(self, record: Any) -> None: ...

    def mark(self, record: Any) -> None: ...

    async def record(self, record: OperationRecord) -> "asyncio.Future[None]":
        self.records.append(record)
        booked = asyncio.get_running_loop().create_future()
        booked.set_result(None)
        return booked

    def noted(self, *_: Any) -> None: ...

    def covers(self, *_: Any) -> bool:
        return False

    def recorded(self, *_: Any) -> None: ...

    def ended(self, *_: Any) -> None: ...

    async def surrender(self, *_: Any) -> bool:
        return False


class _Clock:
    def now(self) -> datetime:
        return NOW


@dataclass
class Told:
    """What became of an answer."""

    events: list[Event]
    failure: DomainError | None
    model: ScriptedModel
    world: _Yes
    pending: Pending

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.of(TextDelta))

    @property
    def results(self) -> list[ToolResult]:
        return self.of(ToolResult)

    def steps(self, name: str) -> list[StepChange]:
        """The steps of a name, as they ended."""
        return [step for step in self.of(StepChange) if step.name == name and step.status != "running"]


def question(text: str = "What is six times seven?", **fields: Any) -> Question:
    base = Question("answer-1", text, ALICE, "session-1", True, "fast", (CANDIDATE,), 1_000, "default", "use", NOW)
    return replace(base, **fields)


async def answered(
    model: ScriptedModel,
    tools: Iterable[Tool] = (),
    *,
    asked: Question | None = None,
    sources: Iterable[Any] = (),
    confirmed: Iterable[str] = (),
    confirmations: Confirmations | None = None,
    pending: Pending | None = None,
    limits: ToolLimits | None = None,
    events: EventLog | None = None,
    world: _Yes | None = None,
    health: Health | None = None,
    deadline_s: float = 60.0,
) -> Told:
    """Answer `asked`, or a question that may use all of `tools`, to its end."""
    health = health or Health(lambda: 0.0, lambda: 0.0)
    tools, yes, pending = list(tools), world or _Yes(), pending or Pending()
    asked = asked or question(server_tools=tuple(tool.spec.name for tool in tools))
    toolset = Toolset(Toolbox(tools, sources, confirmed), pending, confirmations or Confirmations(Words()), limits or ToolLimits())
    bounds = Limits(deadline_s, 65_536, 8, 6, 8_192, 32_768, False, 256, rewrites="rule", titles="rule", summaries="off")
    anything: Any = yes
    kit = Toolkit(
        *(anything, anything, anything, anything),
        {"scripted": model},
        *(AfterWork(), _Clock(), read_templates("answer.v1"), bounds, anything),
        *(Errands(anything, anything, {}, tuple, Tariff(anything), health, _Clock(), lambda: ""), None),
        *(health, read_template(CONTINUE_FILE), Shadows("", lambda: "", lambda: 1.0), toolset),
    )
    log = EventLog(asked.answer_id) if events is None else events  # an empty log is falsy
    await produce(asked, kit, log)
    return Told([entry.event for entry in log.read(0)], log.failure, model, yes, pending)
