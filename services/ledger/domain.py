"""The ledger's values: what is kept of people, conversations and operations. No wire, no SQL; holds have a file of their own."""

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from services.chassis.money import Usage
from services.ledger.prices import ListedPrice

NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Reservation:
    """A provider call that money is asked for. `output_tokens_min`: how far the bound may be lowered if money is short; 0 = not at all."""

    operation_id: UUID
    attempt: int
    provider: str
    model: str
    input_tokens_max: int
    output_tokens_max: int
    ttl_ms: int
    output_tokens_min: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """What was set aside, the price it was counted with, and how many tokens it pays for."""

    hold_id: str
    amount_nanousd: int
    price: ListedPrice
    expires_at: datetime
    output_tokens_max: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A slice of the budgets, set aside for calls that begin while we cannot be reached. `api_key` is empty for a token."""

    lease_id: UUID
    tenant: str
    user: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Draw:
    """A provider call that was begun on a lease."""

    operation_id: UUID
    attempt: int
    provider: str
    model: str
    price_version: int
    input_tokens_max: int
    output_tokens_max: int
    amount_nanousd: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a record."""

    cost_nanousd: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a subject may use in any 60 s, and at the same time. 0 = no limit of that kind."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_answers: int = 0


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a user may do. `monthly_budget_nanousd` 0 = none of its own; `answer_deadline_ms` 0 = the orchestrator's default."""

    name: str
    requests_per_minute: int
    tokens_per_minute: int
    concurrent_answers: int
    monthly_budget_nanousd: int
    tiers: tuple[str, ...]
    tenant_limits: Limits = NO_LIMITS
    key_limits: Limits = NO_LIMITS
    answer_deadline_ms: int = 0
    tools: tuple[str, ...] = ()
    """Our own tools that answers may use: names, `server__*` for all of a server, `*` for all."""
    cache_scope: str = ""
    """Whom answers share the answer cache with: `tenant`, `user` or `off`; empty = as the orchestrator is set."""


@dataclass(frozen=True, slots=True)
class Member:
    """A user of a tenant with the plan in force. `subscribed_at` is None on the free plan that everybody starts with.

    `next_plan` follows at `changes_at`; empty and None if nothing changes.
    """

    user: str
    plan: Plan
    display_name: str
    created_at: datetime
    subscribed_at: datetime | None
    next_plan: str = ""
    changes_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit with what its running period has seen."""

    scope: str
    subject: str
    period: str
    limit_nanousd: int
    spent_nanousd: int
    held_nanousd: int
    resets_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    key_id: str
    tenant: str
    user: str
    name: str
    roles: tuple[str, ...]
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked: bool


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer points at."""

    number: int
    document_id: str
    chunk_id: str
    title: str
    source_uri: str
    text: str
    start: int
    end: int
    score: float
    heading_path: tuple[str, ...]
    document_version: int
    page: int = 0
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. `answer_id` is a UUID."""

    answer_id: str
    question: str
    text: str
    citations: tuple[Citation, ...]
    created_at: datetime
    complete: bool
    parent: str = ""
    """The answer of the turn that it follows; empty if it is the first of its branch."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversation said from its first turn up to that of `through`, an answer's id."""

    through: str
    text: str
    made_by: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation of one user. `turns` counts all branches; `head` is the answer that it goes on from."""

    session_id: str
    title: str
    created_at: datetime
    updated_at: datetime
    turns: int
    head: str
    title_by: str


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What the answer cache said, without any text."""

    verdict: str
    similarity: float | None = None
    source_answer_id: str | None = None
    age_s: int | None = None
    saved_nanousd: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A timed part of an operation. Times in milliseconds after it was accepted."""

    name: str
    status: str
    started_ms: float
    duration_ms: float
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One provider call. Cost, savings and price version are the ledger's own and 0 until it has booked the call."""

    attempt: int
    hold_id: str
    provider: str
    model: str
    usage: Usage
    provider_request_id: str = ""
    cost_nanousd: int = 0
    finish_reason: str = ""
    error_reason: str = ""
    first_token_ms: float = 0.0
    duration_ms: float = 0.0
    estimated: bool = False
    price_version: int = 0
    not_sent: bool = False
    lease_id: str = ""
    drawn_nanousd: int = 0
    prompt_cache_saved_nanousd: int = 0
    tiering_saved_nanousd: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """Everything that is kept of one request, without its text. Usage and cost are the sums over its attempts."""

    operation_id: str
    tenant: str
    user: str
    status: str
    created_at: datetime
    cache: CacheFacts
    session_id: str = ""
    api_key_id: str = ""
    trace_id: str = ""
    tier: str = ""
    model: str = ""
    provider: str = ""
    collection: str = ""
    finish_reason: str = ""
    error_reason: str = ""
    usage: Usage = NO_USAGE
    cost_nanousd: int = 0
    estimated: bool = False
    first_token_ms: float = 0.0
    duration_ms: float = 0.0
    steps: tuple[Step, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    purpose: str = ""
    """Empty = an answer."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One group of a usage query. Times in milliseconds, 0 if there was none."""

    group: dict[str, str]
    operations: int
    failed: int
    cancelled: int
    estimated: int
    cache_hits: int
    coalesced: int
    attempts: int
    usage: Usage
    cost_nanousd: int
    cache_saved_nanousd: int
    prompt_cache_saved_nanousd: int
    tiering_saved_nanousd: int
    duration_ms_p50: float
    duration_ms_p90: float
    duration_ms_p99: float
    first_token_ms_p50: float
    first_token_ms_p90: float
    first_token_ms_p99: float
