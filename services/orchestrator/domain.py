"""The values one answer is made of: the question, what was recalled, what the model wrote, what is booked, and the events a reader sees.

Nothing here does anything that could fail or wait; no wire format and no vendor is known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self

from services.chassis.errors import DomainError
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal

CacheMode = Literal["use", "refresh", "off"]
Priority = Literal["interactive", "batch"]
CacheVerdict = Literal["miss", "exact", "semantic", "coalesced", "off"]
Capability = Literal["images", "reasoning", "schema", "tools"]

ESTIMATE_BYTES_PER_TOKEN = 4
"""Mean of English prose with current tokenizers. For estimates that are booked as such; never for bounds."""
TOKEN_BYTES_MAX = 8
"""Mean size of a piece up to which pieces are taken for single tokens: a long word with its space."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that can be asked, with its limits."""

    provider: str
    model: str
    context_tokens_max: int
    output_tokens_max: int
    capabilities: frozenset[Capability] = frozenset()


@dataclass(frozen=True, slots=True)
class Route:
    """The way a question takes through the models: whom to ask, why, and what may be done when that does not go well."""

    tier: str
    """Tier the candidates are of; another than the one asked for where the question, the plan or the budget chose."""
    candidates: tuple[Candidate, ...]
    """In the order they are asked. Never empty."""
    reason: str = "first"
    """Why the first of them is asked; see tailrace.orchestrator.v1.Choice."""
    asked: str = ""
    """Tier it was asked of; empty for a way beside another one."""
    difficulty: float | None = None
    prompt_tokens_max: int | None = None
    output_tokens_max: int | None = None
    continues: bool = False
    """Whether the next candidate goes on where one broke off in the middle of its text."""
    holds_back: bool = False
    """Whether nothing is shown before it was checked, also to those who read along."""
    escalation: "Route | None" = None
    """Where an answer is asked for that did not pass the checks, as long as nothing of it was shown."""
    cheaper: "Route | None" = None
    """Where an answer is asked for that the budget cannot pay here."""
    shadow: "Route | None" = None
    """Where a sample of the same prompts is answered as well, to know what the choice of tier costs and saves."""
    shadow_share: float = 0.0

    @property
    def named(self) -> str:
        """The model that the question named; empty = it was chosen of a tier."""
        return self.candidates[0].model if self.reason == "asked" else ""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture a question is about."""

    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model sees it."""

    name: str
    description: str
    input_schema: Mapping[str, Any]
    """JSON Schema of its arguments, an object."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as a model wrote it."""

    call_id: str
    name: str
    arguments: str
    """Meant to be JSON; a model may write anything."""
    signature: bytes = b""
    """What the provider wants to see again with this call, unread."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a call."""

    call_id: str
    name: str
    text: str
    failed: bool = False
    flags: tuple[str, ...] = ()
    """What makes the text look like instructions; see Passage."""


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request. Everything an answer depends on besides documents and conversation."""

    answer_id: str
    text: str
    principal: Principal
    session_id: str
    session_is_new: bool
    tier: str
    candidates: tuple[Candidate, ...]
    """Models to ask, in order. Never empty."""
    output_tokens_max: int
    collection: str
    cache: CacheMode
    created_at: datetime
    idempotency_key: str = ""
    cancel_on_disconnect: bool = False
    priority: Priority = "interactive"
    deadline_s: float | None = None
    """How long the answer may take, if that is less than the service's own bound."""
    images: tuple[Image, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    """Tools of the client: a call of one ends the answer."""
    server_tools: tuple[str, ...] = ()
    """Names of our own tools that may be used."""
    tool_results: tuple[ToolResult, ...] = ()
    continues: str = ""
    """The answer whose calls `tool_results` are for."""
    replaces: str = ""
    """The answer whose turn this one takes the place of."""
    output_schema: Mapping[str, Any] | None = None
    """JSON Schema the text must satisfy."""
    reasoning: bool = False
    """Whether the reader wants to see what the model thinks."""
    route: Route | None = None
    """How the models were chosen; None = `candidates` in their order, and nothing else may be tried."""
    whole: bool = False
    """Nobody reads along: text may be held back until it was checked."""
    resumed: "Suspended | None" = None
    """What goes on here; `tool_results` has one result for each of its calls then."""

    @property
    def asked_at(self) -> datetime:
        """When it was asked what is answered here, however often the answer went on since."""
        return (self.resumed and self.resumed.asked_at) or self.created_at

    @property
    def uses_tools(self) -> bool:
        """Whether tools may have a part in the answer, which is then true for nobody else and at no other time."""
        return bool(self.tools or self.server_tools or self.resumed)


@dataclass(frozen=True, slots=True)
class Passage:
    """A place in a document; see tailrace.common.v1.CitedPassage for each field."""

    number: int
    document_id: str
    chunk_id: str
    title: str
    source_uri: str
    text: str
    start: int
    end: int
    score: float
    heading_path: tuple[str, ...] = ()
    document_version: int = 1
    page: int = 0
    flags: tuple[str, ...] = ()
    similarity: float | None = None


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer that was given before and may be served again."""

    answer_id: str
    question: str
    user: str
    text: str
    passages: tuple[Passage, ...]
    model: str
    provider: str
    cost_nanousd: int
    created_at: datetime
    finish_reason: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Edition:
    """What an answer from a collection is true for: its documents as they are, for those who may read the same of them."""

    epoch: int
    audience: str = ""


@dataclass(frozen=True, slots=True)
class HeldAnswer:
    """A cached answer to the very same words. It may be served while the asker's edition of the collection is still its own."""

    answer: CachedAnswer
    edition: Edition


@dataclass(frozen=True, slots=True)
class Flight:
    """An answer on its way that other answers to the same question may follow."""

    answer_id: str
    replica: str
    ends_at: float
    """Seconds since 1970: its deadline. 0 = it is over, and the caches have it."""


@dataclass(frozen=True, slots=True)
class RecallVerdict:
    """What the semantic cache said."""

    answer: CachedAnswer | None = None
    similarity: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CacheReceipt:
    """What is told about the cache; see tailrace.common.v1.CacheReceipt for each field."""

    verdict: CacheVerdict
    similarity: float | None = None
    source_question: str | None = None
    source_answer_id: str | None = None
    age_s: int | None = None
    saved_nanousd: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, as a conversation keeps them."""

    answer_id: str
    question: str
    text: str
    passages: tuple[Passage, ...]
    created_at: datetime
    complete: bool


@dataclass(frozen=True, slots=True)
class KeptTurn:
    """What the ledger says of a turn it has kept: its position over all branches, and how many turns up to it no summary covers."""

    ordinal: int
    unsummarised: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversation said from its first turn up to that of the answer `through`."""

    through: str
    text: str


@dataclass(frozen=True, slots=True)
class History:
    """The latest turns of a branch, oldest first, and the newest summary of them and of those before them."""

    turns: tuple[Turn, ...] = ()
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class SentPrompt:
    """What was sent for one provider call, as an administrator may see it: messages as (role, text)."""

    attempt: int
    model: str
    template: str
    system: str
    messages: tuple[tuple[str, str], ...]
    tools: tuple[ToolSpec, ...] = ()
    output_schema: Mapping[str, Any] | None = None
    output_tokens_max: int = 0
    """0 = kept by a former version."""
    effort: str = ""
    purpose: str = ""
    """Of a small call for the conversation; empty = the answer's own."""
    operation_id: str = ""
    """What a small call is booked as; empty = the answer's own operation."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt. Only the user's has images and only the assistant's has calls; a tool's message is its results alone."""

    role: Literal["user", "assistant", "tool"]
    text: str = ""
    images: tuple[Image, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given. `system` and `messages` are the same thing, rendered, as `question` and `passages`.

    `question` is the self-contained form of what was asked, where that leans on the conversation.
    """

    template: str
    """Version and hash of the template, for the record and the cache's scope."""
    system: str
    messages: tuple[Message, ...]
    question: str
    passages: tuple[Passage, ...]
    input_tokens_max: int
    """No tokenizer can make more tokens of it than this."""
    tools: tuple[ToolSpec, ...] = ()
    output_schema: Mapping[str, Any] | None = None
    """JSON Schema the answer must satisfy, for providers that can be bound to one."""
    history_messages: int = 0
    """How many of the first messages are earlier turns. The conversation's next prompt begins with the same ones, as a rule."""

    @property
    def input_tokens_estimate(self) -> int:
        return -(-self.input_tokens_max // ESTIMATE_BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Suspended:
    """An answer that ended in calls of its client's tools, as it goes on once their results are here."""

    answer_id: str
    owner: tuple[str, str]
    """Tenant and user."""
    session_id: str
    collection: str
    tier: str
    question: str
    prompt: Prompt
    """With the message that calls as its last. Its pictures are left out: they come again with the results."""
    has_images: bool
    results: tuple[ToolResult, ...]
    """Of the calls that are not the client's, as the model is to see them."""
    tools: tuple[ToolSpec, ...]
    """The client's."""
    server_tools: tuple[str, ...]
    asked_at: datetime | None = None
    """When its question was asked; None = kept by a former version."""
    model: str = ""
    """The model that was named for it; empty = the tier's."""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """All calls that wait for a result or have one, in order."""
        return self.prompt.messages[-1].calls


@dataclass(frozen=True, slots=True)
class Hold:
    """Money set aside for one provider call, the price it will be settled with, and how many tokens may be generated for it."""

    hold_id: str
    """Empty if the money was drawn from a lease: the ledger makes the hold when it hears of the call."""
    amount_nanousd: int
    price: Price
    output_tokens_max: int
    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class Payer:
    """Whose budgets a call is paid from. `api_key_id` is empty for a token."""

    tenant: str
    user: str
    api_key_id: str

    @classmethod
    def of(cls, principal: Principal) -> Self:
        return cls(principal.tenant, principal.user, principal.api_key_id)


@dataclass(frozen=True, slots=True)
class LentCredit:
    """A slice of a payer's budgets, and what models cost them, by provider and model."""

    amount_nanousd: int
    life_s: float
    prices: Mapping[tuple[str, str], Price]


@dataclass(frozen=True, slots=True)
class Draw:
    """A provider call that was begun on a lease; see tailrace.ledger.v1.LeaseDraw for each field."""

    operation_id: str
    attempt: int
    provider: str
    model: str
    price_version: int
    input_tokens_max: int
    output_tokens_max: int
    amount_nanousd: int


@dataclass(slots=True)
class Draft:
    """What one provider call has produced so far. The adapter fills it in; it tells the truth at any moment, however the call ends."""

    on_text: Callable[[str], None]
    """Hears of every piece of text, at once."""
    on_reasoning: Callable[[str], None] | None = None
    """Hears of every piece of the model's visible reasoning, at once."""
    on_progress: Callable[[], None] = lambda: None
    """Called after anything has come, be it shown to somebody or not: text, reasoning, a call or more of its arguments."""
    pieces: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    """Whole calls, in the order the model began them."""
    reasoned: int = 0
    """Bytes of reasoning received: output that is billed and no text."""
    called: int = 0
    """Bytes of calls received, also of those that are not whole."""
    deltas: int = 0
    """Pieces as the provider cut them: at least one token each."""
    unseen: int = 0
    """Estimate of tokens that were generated and had not been sent when the call ended, by a provider that sends some output only whole."""
    model: str = ""
    """Model as the provider calls it."""
    provider: str = ""
    request_id: str = ""
    response_id: str = ""
    """What the provider calls the answer itself."""
    address: str = ""
    """Host that is asked; empty if none is."""
    effort: str = ""
    """How much reasoning was asked for, if that is said; empty = as the model is used to."""
    sent: bool = False
    """Whether a byte of the request may have reached the provider."""
    rejected: bool = False
    """Whether the provider refused before it did anything that it bills."""
    finish_reason: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int = 0
    """How many of the output tokens were reasoning, if the provider says so."""
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    usage_is_final: bool = False
    """Whether the provider has said the last word on `output_tokens`."""

    def write(self, text: str, deltas: int = 1) -> None:
        self.pieces.append(text)
        self.deltas += deltas
        self.on_text(text)
        self.on_progress()

    def reason(self, text: str) -> None:
        self.reasoned += len(text.encode())
        if self.on_reasoning is not None:
            self.on_reasoning(text)
        self.on_progress()

    def call(self, call: ToolCall, counted: int = 0) -> None:
        """A call is whole. `counted` is what `called` has of it already."""
        self.calls.append(call)
        self.called += len(call.name.encode()) + len(call.arguments.encode()) - counted
        self.on_progress()

    @property
    def tokens_heard(self) -> int:
        """About how many tokens came, known at any moment at no cost. For pacing alone; what is booked is `usage`."""
        return self.deltas + (self.reasoned + self.called) // ESTIMATE_BYTES_PER_TOKEN

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def has_content(self) -> bool:
        """Whether there is anything that a reader has seen: from then on no other model may begin anew."""
        return bool(self.pieces or self.calls or (self.reasoned and self.on_reasoning is not None))

    def _tokens_received(self) -> int:
        """Estimate of the tokens that came. A provider that cuts text token by token has counted for us; longer pieces say less."""
        size = sum(len(piece.encode()) for piece in self.pieces)
        of_text = self.deltas if size <= TOKEN_BYTES_MAX * self.deltas else -(-size // ESTIMATE_BYTES_PER_TOKEN)
        return of_text + -(-(self.reasoned + self.called) // ESTIMATE_BYTES_PER_TOKEN) + self.unseen

    def usage(self, prompt: Prompt) -> tuple[Usage, bool]:
        """What was used, and whether any count is an estimate. A reported 0 is a count; an absent one is estimated."""
        if not self.sent or self.rejected:
            return Usage(), False
        estimated = self.input_tokens is None or self.output_tokens is None or not self.usage_is_final
        output = self.output_tokens
        if output is None or not self.usage_is_final:
            output = max(output or 0, self._tokens_received())
        return (
            Usage(
                prompt.input_tokens_estimate if self.input_tokens is None else self.input_tokens,
                output,
                self.cache_read_tokens,
                self.cache_write_tokens,
                min(self.cache_write_1h_tokens, self.cache_write_tokens),
            ),
            estimated,
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One provider call, as it is booked; see tailrace.ledger.v1.Attempt for each field."""

    attempt: int
    hold_id: str
    provider: str
    model: str
    provider_request_id: str
    usage: Usage
    cost_nanousd: int
    finish_reason: str
    error_reason: str
    first_token_ms: float
    duration_ms: float
    estimated: bool
    price_version: int
    not_sent: bool
    lease_id: str = ""
    drawn_nanousd: int = 0
    reasoning_tokens: int = 0
    """How many of the output tokens were reasoning. Told, never booked or priced besides them."""


@dataclass(frozen=True, slots=True)
class StepChange:
    """A step began or ended. Times in milliseconds after the question was accepted."""

    name: str
    status: str
    started_ms: float
    duration_ms: float
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """Everything that is booked of one answer, without its text; see tailrace.ledger.v1.Operation."""

    question: Question
    trace_id: str
    status: Literal["done", "failed", "cancelled"]
    model: str
    provider: str
    finish_reason: str
    error_reason: str
    usage: Usage
    cost_nanousd: int
    cache: CacheReceipt
    estimated: bool
    first_token_ms: float
    duration_ms: float
    steps: tuple[StepChange, ...]
    attempts: tuple[Attempt, ...]
    purpose: Literal["", "rewrite", "shadow", "summary", "title"] = ""
    """Empty = an answer."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The question was taken on."""

    answer_id: str
    session_id: str
    trace_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class PassagesFound:
    """What the answer may cite."""

    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoned:
    """More of the model's visible reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolConfirmation:
    """A call waits for a person's word; see tailrace.orchestrator.v1.ToolConfirmation."""

    call_id: str
    name: str
    wait_ms: int


@dataclass(frozen=True, slots=True)
class Citation:
    """A `[n]` marker in the text that points at a real passage; see tailrace.orchestrator.v1.Citation. Offsets in code points."""

    number: int
    start: int
    end: int
    document_id: str
    chunk_id: str
    support: float | None = None
    sentence_start: int = 0
    sentence_end: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Why a model was asked; see tailrace.orchestrator.v1.Choice."""

    model: str
    provider: str
    tier: str
    reason: str
    difficulty: float | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The receipt; see tailrace.orchestrator.v1.Done for each field."""

    answer_id: str
    text_sha256: str
    usage: Usage
    cost_nanousd: int
    model: str
    provider: str
    tier: str
    finish_reason: str
    cache: CacheReceipt
    trace_id: str
    estimated: bool
    verdict: str
    first_token_ms: float
    duration_ms: float
    choices: tuple[Choice, ...] = ()
    groundedness: float | None = None
    sentences_judged: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BookedAnswer:
    """What the books say of an answer whose events may be gone."""

    status: Literal["done", "failed", "cancelled"]
    error_reason: str
    """Why, unless it was done."""
    session_id: str
    created_at: datetime
    receipt: Done
    """Without what must be read off the text, and without the choices that led to the model."""
    turn: Turn | None
    """None = its words are not kept, or no longer."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event that another replica made, as it went out there."""

    payload: bytes


Event = Accepted | StepChange | PassagesFound | TextDelta | Reasoned | ToolCall | ToolConfirmation | ToolResult | Citation | Done | Recorded


@dataclass(frozen=True, slots=True)
class Claim:
    """What an idempotency key stands for: the answer it began, and a digest of the body it came with."""

    answer_id: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class SharedAnswer:
    """What all replicas know of an answer."""

    owner: tuple[str, str]
    """Tenant and user."""
    replica: str
    """Who produces it."""
    ended: bool
    failure: DomainError | None = None
    """Why it ended, unless it ended well."""
    events_gone: bool = False
    """Whether it has ended and nothing but that is kept any more."""
    left_at: int | None = None
    """After how many events its owner stopped it, if it went on for others."""


@dataclass(frozen=True, slots=True)
class LogPart:
    """A piece of an answer's log on its way to the other replicas."""

    answer_id: str
    owner: tuple[str, str]
    first: int
    """Number of the first event in `payloads`; the rest follow without a gap."""
    payloads: tuple[bytes, ...]
    ended: bool = False
    failure: DomainError | None = None
    """Why it ended, unless it ended well. Means nothing while it has not."""
    brief: bool = False
    """Whether the log, once it has ended, is kept for a short time only, because there are too many."""
    keyed: bool = False
    """Whether an idempotency key stands for the answer: how it ended is kept as long as the key, when its events are gone too."""
    left_at: int | None = None
    """After how many events the owner stopped it, if it goes on for others. Known from then on, also if later parts do not say so."""


LogWord = Literal["taken", "unknown", "fenced"]
"""What becomes of a LogPart. `unknown`: the store has forgotten the log, begin again at its first event. `fenced`: another replica has
ended it; whoever still produces must stop."""


@dataclass(frozen=True, slots=True)
class LogReply:
    """The store's word on a LogPart."""

    word: LogWord
    cancel_asked: bool = False
    """Whether the owner has asked, at another replica, to stop the answer."""
    followed: bool = False
    """Whether somebody reads the log at another replica."""


@dataclass(frozen=True, slots=True)
class SharedEvents:
    """What a read of a shared log found."""

    events: tuple[tuple[int, bytes], ...]
    ended: bool
    failure: DomainError | None = None
    left_at: int | None = None
    """See SharedAnswer. Whoever finds an event that came after that finds this, too."""
