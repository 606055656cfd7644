"""May you: the limits of a plan, for its user, the tenant and the API key. How they count is in `limiter`, where in `redis_limiter`.

While Redis is away every replica counts for itself with its share of each limit, so that limits still hold and no request is lost to a
missing counter.
"""

import asyncio
import contextlib
import functools
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog

from services.chassis.afterwork import AfterWork
from services.chassis.errors import DomainError, Overloaded, RateLimited, Unavailable
from services.chassis.principal import Principal
from services.gateway.limiter import LEASE_US, WINDOW_US, Charge, Correction, Kind, LocalLimiter, Outcome, Verdict
from services.gateway.memo import Memo

log = structlog.get_logger(__name__)

PLAN_AGE_MAX_S = 5.0
"""How long a changed plan may go unnoticed."""
SUBJECTS_MAX = 10_000
QUESTION_BYTES_PER_TOKEN = 3
HARMLESS_TOOLS = ("calculator", "current_time", "search_documents")
"""Those that reach nothing but the user's own documents: of plans that do not say, and while nobody can be asked for the plan."""
PROBE_PAUSE_S = 1.0
"""How often Redis is tried while it is away."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a subject may use in any 60 s, and at the same time. 0 = no limit of that kind."""

    requests: int = 0
    tokens: int = 0
    answers: int = 0


@dataclass(frozen=True, slots=True)
class Entitlements:
    """What a plan gives its user, the user's tenant as a whole, and each API key."""

    user: Allowance
    tenant: Allowance = field(default_factory=Allowance)
    key: Allowance = field(default_factory=Allowance)
    answer_deadline_ms: int = 0
    """How long an answer may take if nobody says; 0 = as the orchestrator does."""
    plan: str = ""
    """Name of the plan; empty while it is not known."""
    tiers: frozenset[str] = frozenset()
    """Tiers it may use; empty while they are not known: money has its own guard."""
    tools: tuple[str, ...] = HARMLESS_TOOLS
    """Our own tools that answers may use: names, `server__*` for all of a server, `*` for all."""
    cache_scope: str = "user"
    """Whom cached answers are shared with; with nobody else while nobody can be asked for the plan. Empty = as the orchestrator is set."""


@dataclass(frozen=True, slots=True)
class ReservedTokens:
    """What is reserved for an answer besides its question: what it will use is known only afterwards."""

    prompt: int
    """Instructions, passages and conversation."""
    output: int
    """Of a request that sets no bound."""

    def of(self, question: str, output_tokens_max: int | None) -> int:
        """Tokens to reserve. Three bytes a token is more tokens than any text has that people write in words."""
        output = self.output if output_tokens_max is None else max(0, output_tokens_max)
        return self.prompt + output + -(-len(question.encode()) // QUESTION_BYTES_PER_TOKEN)


class Limiter(Protocol):
    """Where limits are kept for all replicas."""

    async def admit(self, charges: Sequence[Charge], lease: str = "") -> Outcome:
        """Charge all of `charges`, or none. Raises Unavailable."""
        ...

    async def settle(self, corrections: Sequence[Correction], lease: str, lease_keys: Sequence[str]) -> int:
        """Correct windows and end `lease`. Raises Unavailable."""
        ...

    async def renew(self, leases: Sequence[tuple[str, str]]) -> None:
        """Hold leases for another lifetime. Raises Unavailable."""
        ...


class LimitReached(RateLimited):
    """A limit of ours refused. Metadata: `limit_kind`, `limit_scope`, `limit`, `window_ms` of a window, `retry_after_ms`."""

    def __init__(self, charge: Charge, verdict: Verdict, headers: list[tuple[bytes, bytes]]) -> None:
        if charge.kind is Kind.CONCURRENCY:
            detail, window = f"at most {charge.limit} answers at the same time", {}
        else:
            detail, window = f"at most {charge.limit} {charge.kind} in any {WINDOW_US // 1_000_000} s", {"window_ms": WINDOW_US // 1000}
        super().__init__(
            f"{detail} for this {charge.scope}",
            limit_kind=charge.kind,
            limit_scope=charge.scope,
            limit=charge.limit,
            retry_after_ms=max(1, -(-verdict.retry_after_us // 1000)),
            **window,
        )
        self.headers = headers


@dataclass
class Admission:
    """What was charged for a request that was let in."""

    headers: list[tuple[bytes, bytes]]
    reserved: list[tuple[str, int, int]]
    """Windows of tokens: key, entry and what was reserved there."""
    lease: str
    lease_keys: list[str]
    local: bool
    """Whether this process alone decided, so that Redis knows nothing of the reservation."""
    tokens_used: int | None = None
    """What the answer really used. None = unknown, then the reservation stays."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """What a process does by itself while Redis is away."""

    replicas: int = 1
    """Among how many processes a limit is divided then. Each has at least 1."""
    on_request: Callable[[], None] = lambda: None
    """Called for every request that this process alone decided."""
    on_change: Callable[[bool], None] = lambda away: None
    """Called when Redis is found to be away, and when it is back."""


class Limits:
    """Admits requests and answers. `ask` asks the ledger for a principal's plan."""

    def __init__(
        self,
        shared: Limiter,
        ask: Callable[[Principal], Awaitable[Entitlements]],
        default_per_minute: int,
        fallback: Fallback | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = shared
        self._local = LocalLimiter()
        self._ask = ask
        self._default = Entitlements(Allowance(requests=default_per_minute))
        self._fallback = fallback or Fallback()
        self._clock = clock
        self._plans: Memo[tuple[str, str], Entitlements] = Memo(SUBJECTS_MAX, PLAN_AGE_MAX_S)
        self._away = False
        self._probe_at = 0.0
        self._held: dict[str, list[str]] = {}
        """Keys of every lease under way, by its name."""
        self._renewing = asyncio.Lock()
        self._settling = AfterWork()

    async def admit(self, principal: Principal) -> Admission:
        """Admit one request. Raises LimitReached."""
        return await self._admit(_charges(principal, await self.entitlements(principal), None))

    @contextlib.asynccontextmanager
    async def answering(self, principal: Principal, tokens: int) -> AsyncIterator[Admission]:
        """Admit one answer that may use `tokens`, and count it as under way inside the block. Raises LimitReached.

        After the block `Admission.tokens_used` corrects the reservation, in the background: nobody waits for that.
        """
        admission = await self._admit(_charges(principal, await self.entitlements(principal), max(1, tokens)))
        if admission.lease_keys:
            self._held[admission.lease] = admission.lease_keys
        try:
            yield admission
        finally:
            self._held.pop(admission.lease, None)
            with contextlib.suppress(Overloaded):  # then the lease ends by itself, and the reservation stays
                self._settling.spawn(self._settle(admission), "settle-limits")

    async def entitlements(self, principal: Principal) -> Entitlements:
        """What the plan of `principal` gives; while the ledger is away what it last gave, or the default."""
        key = (principal.tenant, principal.user)
        try:
            return await self._plans.get(key, lambda: self._ask(principal))
        except DomainError as error:
            # The limiter must not be what turns a search away while the ledger restarts; money has its own guard.
            stale = self._plans.stale(key)
            log.warning("plan_unknown", reason=error.reason, known_before=stale is not None)
            return stale or self._default

    def forget(self, principal: Principal | None = None) -> None:
        """Ask the ledger again at the next request, of one principal or of everybody."""
        if principal is None:
            self._plans.clear()
        else:
            self._plans.drop((principal.tenant, principal.user))

    async def renew_forever(self) -> None:
        """Keep the leases of what is under way, until cancelled."""
        while True:
            await asyncio.sleep(LEASE_US / 3e6)
            await self.renew()

    async def renew(self) -> None:
        """Keep the leases of what is under way for another lifetime, here and in Redis if it is there."""
        async with self._renewing:
            leases = [(key, lease) for lease, keys in self._held.items() for key in keys]
            self._local.hold(self._now_us, leases)
            if leases:
                with contextlib.suppress(Unavailable):
                    await self._shared.renew(leases)

    async def drain(self, timeout_s: float) -> int:
        """Wait for what is being settled; return how much was given up."""
        return await self._settling.drain(timeout_s)

    async def _admit(self, charges: list[Charge]) -> Admission:
        if not charges:
            return Admission([], [], "", [], local=False)
        lease = uuid.uuid4().hex
        lease_keys = [charge.key for charge in charges if charge.kind is Kind.CONCURRENCY]
        outcome = await self._ask_shared(charges, lease)
        local = outcome is None
        if outcome is None:
            self._fallback.on_request()
            charges = [replace(charge, limit=max(1, charge.limit // self._fallback.replicas)) for charge in charges]
            outcome = self._local.admit(self._now_us, charges, lease)
        elif outcome.allowed:
            self._local.hold(self._now_us, [(key, lease) for key in lease_keys])  # so that it counts when Redis goes away
        headers = _headers(charges, outcome)
        if not outcome.allowed:
            refused = [pair for pair in zip(charges, outcome.verdicts, strict=True) if not pair[1].allowed]
            raise LimitReached(*max(refused, key=lambda pair: pair[1].retry_after_us), headers)
        reserved = [
            (charge.key, verdict.entry, charge.charged)
            for charge, verdict in zip(charges, outcome.verdicts, strict=True)
            if charge.kind is Kind.TOKENS
        ]
        return Admission(headers, reserved, lease, lease_keys, local)

    async def _ask_shared(self, charges: list[Charge], lease: str) -> Outcome | None:
        """What Redis says; None if it is away. While it is, one request a second finds out whether it is back."""
        if self._away:
            if self._clock() < self._probe_at:
                return None
            self._probe_at = self._clock() + PROBE_PAUSE_S
        try:
            outcome = await self._shared.admit(charges, lease)
        except Unavailable:
            self._probe_at = self._clock() + PROBE_PAUSE_S
            self._note(away=True)
            return None
        self._note(away=False)
        return outcome

    async def _settle(self, admission: Admission) -> None:
        used = admission.tokens_used
        corrections = [] if used is None else [Correction(key, at, used - charged) for key, at, charged in admission.reserved]
        corrections = [correction for correction in corrections if correction.delta]
        self._local.release([(key, admission.lease) for key in admission.lease_keys])
        if admission.local:
            self._local.correct(self._now_us, corrections)
            corrections = []
        if not (corrections or admission.lease_keys):
            return
        async with self._renewing:
            pass  # a renewal under way may hold the lease; one that begins now does not know it any more
        with contextlib.suppress(Unavailable):  # the lease ends by itself, and the reservation stays
            await self._shared.settle(corrections, admission.lease, admission.lease_keys)

    def _note(self, *, away: bool) -> None:
        if away != self._away:
            self._away = away
            self._fallback.on_change(away)
            log.warning("limits_are_local" if away else "limits_are_shared_again", replicas=self._fallback.replicas)

    @property
    def _now_us(self) -> int:
        return int(self._clock() * 1e6)


def _charges(principal: Principal, given: Entitlements, tokens: int | None) -> list[Charge]:
    """Every limit that must admit; `tokens` is None for what is not an answer."""
    subjects = [("user", given.user, principal.user), ("tenant", given.tenant, "")]
    if principal.api_key_id:
        subjects.append(("key", given.key, principal.api_key_id))
    charges = []
    for scope, allowance, name in subjects:
        asked = [(Kind.REQUESTS, allowance.requests, 1)]
        if tokens is not None:
            asked += [(Kind.TOKENS, allowance.tokens, tokens), (Kind.CONCURRENCY, allowance.answers, 1)]
        charges += [
            Charge(_key(principal.tenant, scope, name, kind), kind, scope, limit, amount) for kind, limit, amount in asked if limit > 0
        ]
    return charges


@functools.lru_cache(maxsize=SUBJECTS_MAX)
def _key(tenant: str, scope: str, name: str, kind: Kind) -> str:
    """Names are arbitrary, so digests of them; the braces put all that is asked about together, one tenant, into one slot."""
    return f"tailrace:limits:{{{_digest(tenant)}}}:{kind}:{scope}:{_digest(name)}"


def _digest(name: str) -> str:
    return hashlib.blake2s(name.encode(), digest_size=16).hexdigest()


def _headers(charges: list[Charge], outcome: Outcome) -> list[tuple[bytes, bytes]]:
    """What a response says about the windows: of each kind the one that would refuse first."""
    headers = []
    for kind in (Kind.REQUESTS, Kind.TOKENS):
        of_kind = [(charge, verdict) for charge, verdict in zip(charges, outcome.verdicts, strict=True) if charge.kind is kind]
        if of_kind:
            charge, verdict = min(of_kind, key=lambda pair: (pair[1].allowed, pair[1].remaining))
            for name, value in (
                ("limit", f"{charge.limit}"),
                ("remaining", f"{verdict.remaining}"),
                ("reset", f"{-(-verdict.reset_us // 1000)}ms"),
            ):
                headers.append((f"x-ratelimit-{name}-{kind}".encode(), value.encode()))
    return headers


class Metered:
    """The events of an answer as they pass; its receipt, or an error before anything came, says what it used.

    `on_prepared` is called once its model is asked, or its text comes without one.
    """

    def __init__(self, events: AsyncIterator[Any], admission: Admission, on_prepared: Callable[[], None]) -> None:
        self._events: Any = events
        self._admission = admission
        self._on_prepared = on_prepared
        self._prepared = False
        self._began = False

    def __aiter__(self) -> "Metered":
        return self

    async def __anext__(self) -> Any:
        try:
            event = await self._events.__anext__()
        except DomainError:
            if not self._began:
                self._admission.tokens_used = 0
            raise
        self._note(event)
        return event

    def at_hand(self) -> Any:
        """See AnswerStream, whose events these must be."""
        if (event := self._events.at_hand()) is not None:
            self._note(event)
        return event

    def _note(self, event: Any) -> None:
        self._began = True
        kind = event.WhichOneof("event")
        if not self._prepared and (kind in ("delta", "done") or (kind == "step" and event.step.name == "generate")):
            self._prepared = True
            self._on_prepared()
        if kind == "done":
            usage = event.done.usage
            used = usage.input_tokens + usage.output_tokens + usage.cache_read_tokens + usage.cache_write_tokens
            self._admission.tokens_used = used
