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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import structlog

from services.chassis.afterwork import AfterWork
from services.chassis.deadline import current_deadline
from services.chassis.errors import AnswerInterrupted, DomainError, Overloaded, RateLimited, Unavailable
from services.chassis.principal import Principal
from services.chassis.wire import asked
from services.gateway.limiter import LEASE_US, WINDOW_US, Before, Charge, Correction, Kind, LocalLimiter, Outcome, Settlement, Verdict
from services.gateway.memo import Memo

log = structlog.get_logger(__name__)

PLAN_AGE_MAX_S = 5.0
"""How long a changed plan may go unnoticed."""
READS_PER_REQUEST = 10
"""How many reads a plan gives for each of its requests: looking is cheaper than asking, and a page looks often."""
SUBJECTS_MAX = 10_000
BYTES_PER_TOKEN = 3
IMAGE_TOKENS = 1600
"""What a picture costs at most with providers that scale it down first, whatever it has in bytes."""
HARMLESS_TOOLS = ("calculator", "current_time", "search_documents")
"""Those that reach nothing but the user's own documents: of plans that do not say, and while nobody can be asked for the plan."""
PROBE_PAUSE_S = 1.0
"""How often Redis is tried while it is away."""
LOOK_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Between two looks at the books for an answer whose end was not seen here; the last one again and again."""
BOOKED_WITHIN_S = WINDOW_US / 1e6
"""How long a receipt is looked for after the end of an answer: later its reservation has left the window by itself."""
FOLLOWED_MAX = 10_000
"""Answers that are looked after at the same time. Of one more the lease ends by itself, and the reservation stays."""


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
    """What is reserved for an answer besides what it brings: what it will use is known only afterwards."""

    prompt: int
    """Instructions, passages and conversation."""
    output: int
    """Of a request that sets no bound."""

    def of(self, request: Any) -> int:
        """Tokens to reserve for an AnswerRequest. Three bytes a token is more tokens than any text has that people write in words."""
        output: int = max(0, request.max_output_tokens) if request.HasField("max_output_tokens") else self.output
        read: int = len(request.question.encode()) + request.output_schema.ByteSize()
        read += sum(part.ByteSize() for part in (*request.tools, *request.tool_results))
        pictures: int = IMAGE_TOKENS * len(request.images)
        return self.prompt + output + pictures + -(-read // BYTES_PER_TOKEN)


class Limiter(Protocol):
    """Where limits are kept for all replicas."""

    async def admit(self, charges: Sequence[Charge], lease: str = "", grant: str = "") -> Outcome:
        """Charge all of `charges`, or none; only requests if `grant` is kept. See LocalLimiter. Raises Unavailable."""
        ...

    async def settle(self, settlement: Settlement) -> int:
        """Correct windows, end a lease, and note in its grant whether its answer lasts. Raises Unavailable."""
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
    grant: str = ""
    """By what name the same request finds this again; empty if it has no key, or if its answer has ended and is only told again."""
    again: bool = False
    """Whether the same request came before: what was charged then is this answer's as well."""
    answer_id: str = ""
    """Of the answer it was for, once that is known."""
    ended: bool = False
    """Whether its end was seen, or is certain."""
    tokens_used: int | None = None
    """What the answer really used. None = not known here."""
    lasts: bool = False
    """Whether the same request would be told this answer again, and would not begin another."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """What a process does by itself while Redis is away."""

    replicas: int = 1
    """Among how many processes a limit is divided then. Each has at least 1."""
    on_request: Callable[[], None] = lambda: None
    """Called for every request that this process alone decided."""
    on_change: Callable[[bool], None] = lambda away: None
    """Called when Redis is found to be away, and when it is back."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended."""

    tokens_used: int
    lasts: bool = False
    """See Admission."""


Booked = Callable[[Principal, str], Awaitable[Ending | None]]
"""Asks the books how an answer of a principal ended, by its id; None while it has not. Raises DomainError."""


async def nothing_booked(principal: Principal, answer_id: str) -> Ending | None:
    """Of books that nobody keeps."""
    return None


class Limits:
    """Admits requests and answers. `ask` asks for a principal's plan, `booked` what an answer used whose end was not seen here."""

    def __init__(
        self,
        shared: Limiter,
        ask: Callable[[Principal], Awaitable[Entitlements]],
        default_per_minute: int,
        fallback: Fallback | None = None,
        *,
        booked: Booked = nothing_booked,
        detached_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`detached_s` is how long an answer goes on that nobody reads."""
        self._shared = shared
        self._local = LocalLimiter()
        self._ask = ask
        self._booked = booked
        self._detached_s = detached_s
        self._default = Entitlements(Allowance(requests=default_per_minute))
        self._fallback = fallback or Fallback()
        self._clock = clock
        self._plans: Memo[tuple[str, str], Entitlements] = Memo(SUBJECTS_MAX, PLAN_AGE_MAX_S)
        self._away = False
        self._probe_at = 0.0
        self._held: dict[str, list[str]] = {}
        """Keys of every lease under way, by its name."""
        self._holders: Counter[str] = Counter()
        """For how many requests each of those is held here: the same one may have come twice."""
        self._looked_after: set[str] = set()
        """Leases of the answers that are followed."""
        self._renewing = asyncio.Lock()
        self._settling = AfterWork()
        self._following = AfterWork(FOLLOWED_MAX)
        self._news: dict[str, asyncio.Event] = {}
        """By answer that is looked after: set when it may have ended."""

    async def admit(self, principal: Principal, kind: Kind = Kind.REQUESTS) -> Admission:
        """Admit one request, or one read. Raises LimitReached."""
        return await self._admit(_charges(principal, await self.entitlements(principal), kind))

    @contextlib.asynccontextmanager
    async def answering(
        self, principal: Principal, tokens: int, *, lasts_s: float = 60.0, goes_on: bool = True, grant: str = ""
    ) -> AsyncIterator[Admission]:
        """Admit one answer that may use `tokens`, and count it as under way inside the block. Raises LimitReached.

        With a `grant` the same request may come again: that is one more request, and no more tokens and no other place.
        After the block what it used corrects the reservation, in the background: nobody waits for that. An answer that was left before
        its end counts on until it has ended, at most `lasts_s`; if it had not said its id, only if it `goes_on` without a reader.
        """
        charges = _charges(principal, await self.entitlements(principal), Kind.REQUESTS, max(1, tokens))
        admission = await self._admit(charges, grant)
        if admission.lease_keys:
            self._held[admission.lease] = admission.lease_keys
            self._holders[admission.lease] += 1
        try:
            yield admission
        except AnswerInterrupted:
            raise  # by this gateway: of its orchestrator's, `Metered` has noted that the answer ended
        except DomainError:
            admission.ended = True
            raise
        finally:
            may_run = not admission.ended and (goes_on or bool(admission.answer_id))  # with its id it can be read elsewhere
            self._conclude(principal, admission, lasts_s if may_run else 0.0)

    def look_at(self, answer_id: str) -> None:
        """Look now whether an answer has ended that was left before its end, if it is one of those."""
        if (news := self._news.get(answer_id)) is not None:
            news.set()

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

    @property
    def followed(self) -> int:
        """Answers that are looked after because their end was not seen here."""
        return len(self._following)

    async def drain(self, timeout_s: float) -> int:
        """Wait for what is being settled; return how much was given up. Answers that were left are looked after no more: their leases
        end by themselves."""
        await self._following.drain(0)
        return await self._settling.drain(timeout_s)

    async def _admit(self, charges: list[Charge], grant: str = "") -> Admission:
        if not charges:
            return Admission([], [], "", [], local=False)
        lease = uuid.uuid4().hex
        outcome = await self._ask_shared(charges, lease, grant)
        local = outcome is None
        if outcome is None:
            self._fallback.on_request()
            charges = [replace(charge, limit=max(1, charge.limit // self._fallback.replicas)) for charge in charges]
            outcome = self._local.admit(self._now_us, charges, lease, grant)
        headers = _headers(charges, outcome)
        if not outcome.allowed:
            refused = [pair for pair in zip(charges, outcome.verdicts, strict=True) if not pair[1].allowed]
            raise LimitReached(*max(refused, key=lambda pair: pair[1].retry_after_us), headers)
        if outcome.before is Before.ENDED:
            return Admission(headers, [], "", [], local)
        lease_keys = [charge.key for charge in charges if charge.kind is Kind.CONCURRENCY]
        if not local:  # so that it counts when Redis goes away
            self._local.hold(self._now_us, [(key, outcome.lease) for key in lease_keys])
            if grant:
                self._local.keep(grant, outcome.lease)
        reserved = [
            (charge.key, verdict.entry, verdict.charged)
            for charge, verdict in zip(charges, outcome.verdicts, strict=True)
            if charge.kind is Kind.TOKENS and verdict.charged
        ]
        again = outcome.before is not Before.NEVER
        return Admission(headers, reserved, outcome.lease, lease_keys, local, grant, again)

    async def _ask_shared(self, charges: list[Charge], lease: str, grant: str) -> Outcome | None:
        """What Redis says; None if it is away. While it is, one request a second finds out whether it is back."""
        if self._away:
            if self._clock() < self._probe_at:
                return None
            self._probe_at = self._clock() + PROBE_PAUSE_S
        try:
            outcome = await self._shared.admit(charges, lease, grant)
        except Unavailable:
            self._probe_at = self._clock() + PROBE_PAUSE_S
            self._note(away=True)
            return None
        self._note(away=False)
        return outcome

    def _conclude(self, principal: Principal, admission: Admission, lasts_s: float) -> None:
        """Settle an admission now, and later again if more is known then. `lasts_s` is how long its answer may go on."""
        if admission.again and not admission.answer_id:  # it was told nothing of the answer, which is the first sending's to settle
            self._let_go(admission)
            return
        holds_on = bool(lasts_s and admission.lease_keys)
        if holds_on and admission.lease in self._looked_after:
            self._let_go(admission)
            return
        if holds_on or (admission.answer_id and admission.reserved and admission.tokens_used is None):
            try:  # with a copy: what is settled now must not see what is found out later
                self._following.spawn(self._follow(principal, replace(admission), lasts_s), "follow-answer")
                if holds_on:
                    self._looked_after.add(admission.lease)
            except Overloaded:
                if holds_on:
                    self._let_go(admission)  # then the lease ends by itself, and the reservation stays
        if not holds_on:
            if admission.ended:  # for whoever else asked for it here, too
                del self._holders[admission.lease]
                self.look_at(admission.answer_id)
            self._let_go(admission)
            with contextlib.suppress(Overloaded):  # then the lease ends by itself, and the reservation stays
                self._settling.spawn(self._settle(admission), "settle-limits")

    def _let_go(self, admission: Admission) -> None:
        """Renew a lease no more, unless another request for the same answer is under way here."""
        lease = admission.lease
        if self._holders[lease] > 1:
            self._holders[lease] -= 1
        else:
            del self._holders[lease]
            self._held.pop(lease, None)

    async def _follow(self, principal: Principal, admission: Admission, lasts_s: float) -> None:
        """Settle an admission once the books say what its answer used, or once it cannot run any more.

        Cancellation: nothing is settled, and the lease is renewed no more.
        """
        current_deadline.set(None)  # the call's own is over
        try:
            if admission.answer_id:
                ending = await self._ending(principal, admission.answer_id, lasts_s or BOOKED_WITHIN_S)
                if ending is not None:
                    admission.tokens_used, admission.lasts = ending.tokens_used, ending.lasts
            else:  # it cannot be asked for, and nobody else can read it on
                await asyncio.sleep(min(lasts_s, self._detached_s))
        finally:
            if lasts_s:
                self._looked_after.discard(admission.lease)
                self._let_go(admission)
        if admission.grant and not admission.answer_id:
            return  # whoever asked again may have it by now, at another gateway; if nobody has, the lease ends by itself
        await self._settle(admission if lasts_s else replace(admission, lease="", lease_keys=[]))

    async def _ending(self, principal: Principal, answer_id: str, timeout_s: float) -> Ending | None:
        """How an answer ended, once it has. None if that did not come out in time."""
        news = self._news.setdefault(answer_id, asyncio.Event())
        pauses = iter(LOOK_PAUSES_S)
        ends_at = self._clock() + timeout_s
        try:
            while self._clock() < ends_at:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(next(pauses, LOOK_PAUSES_S[-1])):
                        await news.wait()
                        news.clear()
                        pauses = iter(LOOK_PAUSES_S)
                with contextlib.suppress(DomainError):
                    if (ending := await self._booked(principal, answer_id)) is not None:
                        return ending
            return None
        finally:
            self._news.pop(answer_id, None)

    async def _settle(self, admission: Admission) -> None:
        used = admission.tokens_used
        corrections = [] if used is None else [Correction(key, at, charged, used) for key, at, charged in admission.reserved]
        settlement = Settlement(
            [correction for correction in corrections if admission.grant or correction.used != correction.charged],
            admission.lease,
            admission.lease_keys,
            admission.grant,
            admission.lasts,
        )
        ended_here = replace(settlement, corrections=())
        self._local.settle(self._now_us, settlement if admission.local else ended_here)
        if admission.local:
            settlement = ended_here
        if not (settlement.corrections or settlement.lease_keys or (settlement.grant and settlement.lease)):
            return
        async with self._renewing:
            pass  # a renewal under way may hold the lease; one that begins now does not know it any more
        with contextlib.suppress(Unavailable):  # the lease ends by itself, and the reservation stays
            await self._shared.settle(settlement)

    def _note(self, *, away: bool) -> None:
        if away != self._away:
            self._away = away
            self._fallback.on_change(away)
            log.warning("limits_are_local" if away else "limits_are_shared_again", replicas=self._fallback.replicas)

    @property
    def _now_us(self) -> int:
        return int(self._clock() * 1e6)


def _charges(principal: Principal, given: Entitlements, kind: Kind, tokens: int | None = None) -> list[Charge]:
    """Every limit that must admit a request or a read; `tokens` is None for what is not an answer."""
    subjects = [("user", given.user, principal.user), ("tenant", given.tenant, "")]
    if principal.api_key_id:
        subjects.append(("key", given.key, principal.api_key_id))
    charges = []
    for scope, allowance, name in subjects:
        asked = [(kind, allowance.requests * (READS_PER_REQUEST if kind is Kind.READS else 1), 1)]
        if tokens is not None:
            asked += [(Kind.TOKENS, allowance.tokens, tokens), (Kind.CONCURRENCY, allowance.answers, 1)]
        charges += [
            Charge(_key(principal.tenant, scope, name, each), each, scope, limit, amount) for each, limit, amount in asked if limit > 0
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
    for kind in (Kind.REQUESTS, Kind.READS, Kind.TOKENS):
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


def grant_of(principal: Principal, request: Any) -> str:
    """The name of what is charged for an AnswerRequest, the same whenever it is sent again; empty if it has no idempotency key.

    With another body it has another name: it is another request, even if the orchestrator refuses it.
    """
    if not request.idempotency_key:
        return ""
    digest = hashlib.blake2b(principal.user.encode() + b"\0" + asked(request), digest_size=16).hexdigest()
    return f"tailrace:limits:{{{_digest(principal.tenant)}}}:grant:{digest}"


class Metered:
    """The events of an answer as they pass; they say which answer it is, whether it ended here, and its receipt what it used.

    `on_prepared` is called once its model is asked, or its text comes without one.
    """

    def __init__(self, events: AsyncIterator[Any], admission: Admission, on_prepared: Callable[[], None]) -> None:
        self._events: Any = events
        self._admission = admission
        self._on_prepared = on_prepared
        self._prepared = False

    def __aiter__(self) -> "Metered":
        return self

    async def __anext__(self) -> Any:
        try:
            event = await self._events.__anext__()
        except DomainError as error:
            self._admission.ended = True
            if self._admission.answer_id:
                self._admission.lasts = not error.retryable
            else:
                self._admission.tokens_used = 0  # it never began
            raise
        self._note(event)
        return event

    def at_hand(self) -> Any:
        """See AnswerStream, whose events these must be."""
        if (event := self._events.at_hand()) is not None:
            self._note(event)
        return event

    def _note(self, event: Any) -> None:
        self._admission.answer_id = event.answer_id
        kind = event.WhichOneof("event")
        if not self._prepared and (kind in ("delta", "done") or (kind == "step" and event.step.name == "generate")):
            self._prepared = True
            self._on_prepared()
        if kind == "done":
            self._admission.ended = self._admission.lasts = True
            self._admission.tokens_used = tokens_in(event.done.usage)


def tokens_in(usage: Any) -> int:
    """What a Usage counts for a limit of tokens."""
    total: int = usage.input_tokens + usage.output_tokens + usage.cache_read_tokens + usage.cache_write_tokens
    return total
