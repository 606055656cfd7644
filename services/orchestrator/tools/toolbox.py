"""Which tools there are, which of them one answer may use, and what is right or wrong with a call before it is made. It makes none."""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from services.chassis.errors import DomainError, RequestInvalid
from services.orchestrator.domain import Passage, Question, ToolCall, ToolSpec
from services.orchestrator.json_schema import Schema, SchemaRefused, ValueRefused, closed, parse_object
from services.orchestrator.ports import PendingCalls
from services.orchestrator.tools.confirmations import Confirmations

log = structlog.get_logger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DESCRIPTION_CHARACTERS_MAX = 4_096
TOOLS_MAX = 64
"""Tools of one answer together, ours and the client's."""
CALL_ID_CHARACTERS_MAX = 128


class ToolFailed(Exception):
    """A tool could not do what was asked. The text goes to the model and to the reader."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a tool returned."""

    text: str
    structured: Any = None
    """The same as JSON, where the tool promises a shape."""
    passages: tuple[Passage, ...] = ()
    """Places in documents that it is made of; their numbers mean nothing yet. `text` has the same for readers, not for the model."""


class Tool(Protocol):
    """A tool that runs on our side."""

    @property
    def spec(self) -> ToolSpec:
        """As the model sees it."""
        ...

    @property
    def output_schema(self) -> Mapping[str, Any] | None:
        """JSON Schema of `structured`, if the tool promises one."""
        ...

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        """Do it, for the principal of `asked`. `arguments` satisfy the schema. Raises ToolFailed or any DomainError.

        Cancellation: nothing is left running.
        """
        ...


class Source(Protocol):
    """Tools of another server. Their names begin with `name` and two underscores."""

    name: str

    def knows(self, tool: str) -> bool:
        """Whether a tool of this name, without the prefix, may be used at all."""
        ...

    async def tools(self) -> Mapping[str, Tool]:
        """The tools that it has now, by their whole names. Raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """Bounds of the tools of one answer; see the settings of the same names."""

    rounds_max: int = 8
    call_s: float = 20.0
    confirm_s: float = 60.0
    result_bytes_max: int = 16_384
    results_bytes_max: int = 131_072
    cost_nanousd_max: int = 0
    """0 = none."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """A call of our own tool that may be made."""

    call: ToolCall
    tool: Tool
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Handed:
    """A call that is the client's to make."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that nobody makes, and what the model is told of it."""

    call: ToolCall
    reason: str
    known: bool
    """Whether there is a tool of this name."""


Judged = Allowed | Handed | Refused


@dataclass(frozen=True, slots=True)
class Bench:
    """What may be called in one answer."""

    own: Mapping[str, Tool] = field(default_factory=dict)
    handed: Mapping[str, ToolSpec] = field(default_factory=dict)
    """The client's."""

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """As the model sees them; always in the same order, for the provider's cache."""
        ours = [self.own[name].spec for name in sorted(self.own)]
        return (*ours, *(self.handed[name] for name in sorted(self.handed)))

    def judge(self, call: ToolCall) -> Judged:
        """What becomes of a call: it is made, handed to the client, or refused with the reason. Never raises."""
        tool, spec = self.own.get(call.name), self.handed.get(call.name)
        if tool is None and spec is None:
            names = ", ".join(sorted((*self.own, *self.handed)))
            reason = f"there is no tool of this name; there are: {names}" if names else "no tool may be called here"
            return Refused(call, reason, known=False)
        schema = tool.spec.input_schema if tool is not None else spec.input_schema if spec is not None else {}
        try:
            arguments = parse_object(call.arguments)
            Schema(closed(schema)).check(arguments)
        except ValueRefused as error:
            return Refused(call, f"the arguments are wrong: {error}", known=True)
        except SchemaRefused:  # of a server that changed it meanwhile
            return Refused(call, "the tool cannot be used: its schema is not valid", known=True)
        return Allowed(call, tool, arguments) if tool is not None else Handed(call)


class Toolbox:
    """Every tool of this process. `confirmed`: names of those that a person must allow each time."""

    def __init__(self, built_in: Iterable[Tool] = (), sources: Iterable[Source] = (), confirmed: Iterable[str] = ()) -> None:
        self._built_in = {tool.spec.name: tool for tool in built_in}
        self._sources = {source.name: source for source in sources}
        self._confirmed = frozenset(confirmed)

    def needs_word(self, name: str) -> bool:
        """Whether a person must allow each call of the tool. `server__*` stands for all tools of a server."""
        return name in self._confirmed or f"{name.partition('__')[0]}__*" in self._confirmed

    def require(self, names: Sequence[str]) -> None:
        """Raise RequestInvalid for the first name that no tool has or may have. Asks no server."""
        for number, name in enumerate(names):
            server, joint, tool = name.partition("__")
            source = self._sources.get(server) if joint else None
            if name not in self._built_in and not (source is not None and NAME.fullmatch(name) and source.knows(tool)):
                there_are = ", ".join((*sorted(self._built_in), *(f"{server}__…" for server in sorted(self._sources))))
                raise RequestInvalid(
                    "there is no such tool", field=f"server_tools[{number}]", bound=f"one of: {there_are}" if there_are else "none"
                )

    async def take(self, names: Sequence[str]) -> tuple[dict[str, Tool], tuple[str, ...]]:
        """The tools of these names, and the names that are missing: their server is away, or has them no more."""
        servers = sorted({name.partition("__")[0] for name in names if name not in self._built_in})
        found = dict(self._built_in)
        for tools in await asyncio.gather(*(self._of(self._sources[server]) for server in servers if server in self._sources)):
            found |= tools
        return {name: found[name] for name in names if name in found}, tuple(name for name in names if name not in found)

    async def _of(self, source: Source) -> Mapping[str, Tool]:
        try:
            return await source.tools()
        except DomainError as error:
            log.warning("tools_not_listed", server=source.name, reason=error.reason)
            return {}


@dataclass(frozen=True, slots=True)
class Toolset:
    """What the tools of all answers of a process share."""

    box: Toolbox
    pending: PendingCalls
    confirmations: Confirmations
    limits: ToolLimits = ToolLimits()
