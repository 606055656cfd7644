"""May you: the request limit of a principal's plan. How a window counts is in `window`, where it is kept in `redis_window`.

While Redis is away every replica counts for itself, so that a limit still holds and no request is lost to a missing counter.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from services.chassis.errors import DomainError, RateLimited, Unavailable
from services.chassis.principal import Principal
from services.gateway.memo import Memo
from services.gateway.window import Decision, Window

log = structlog.get_logger(__name__)

WINDOW_US = 60_000_000
PLAN_AGE_MAX_S = 5.0
"""How long a changed plan may go unnoticed."""
SUBJECTS_MAX = 10_000


class Windows(Protocol):
    """Where windows are kept."""

    async def admit(self, key: str, limit: int) -> Decision:
        """Decide on a request now. Raises Unavailable."""
        ...


class LocalWindows:
    """Windows of this process alone, of the latest subjects."""

    def __init__(self, window_us: int = WINDOW_US, clock_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000) -> None:
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._window_us = window_us
        self._clock_us = clock_us

    async def admit(self, key: str, limit: int) -> Decision:
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window(self._window_us)
            if len(self._windows) > SUBJECTS_MAX:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        return window.admit(self._clock_us(), limit)


class Limits:
    """Admits requests. `requests_per_minute` asks the ledger for the principal's plan."""

    def __init__(
        self,
        shared: Windows,
        requests_per_minute: Callable[[Principal], Awaitable[int]],
        default_per_minute: int,
        *,
        local: Windows | None = None,
        on_fallback: Callable[[], None] = lambda: None,
    ) -> None:
        self._shared = shared
        self._local = local or LocalWindows()
        self._ask = requests_per_minute
        self._default = default_per_minute
        self._on_fallback = on_fallback
        self._plans: Memo[tuple[str, str], int] = Memo(SUBJECTS_MAX, PLAN_AGE_MAX_S)
        self._degraded = False

    async def admit(self, principal: Principal) -> Decision:
        """Admit one request. Raises RateLimited."""
        limit = await self._limit_of(principal)
        key = _key(principal)
        try:
            decision = await self._shared.admit(key, limit)
            self._note(degraded=False)
        except Unavailable:
            self._note(degraded=True)
            self._on_fallback()
            decision = await self._local.admit(key, limit)
        if not decision.allowed:
            raise RateLimited(
                f"at most {limit} requests in any 60 s",
                limit=limit,
                window_ms=WINDOW_US // 1000,
                retry_after_ms=max(1, -(-decision.retry_after_us // 1000)),
                reset_ms=-(-decision.reset_us // 1000),
            )
        return decision

    def forget(self, principal: Principal | None = None) -> None:
        """Ask the ledger again at the next request, of one principal or of everybody."""
        if principal is None:
            self._plans.clear()
        else:
            self._plans.drop((principal.tenant, principal.user))

    async def _limit_of(self, principal: Principal) -> int:
        key = (principal.tenant, principal.user)
        try:
            return await self._plans.get(key, lambda: self._ask(principal))
        except DomainError as error:
            # The limiter must not be what turns a search away while the ledger restarts; money has its own guard.
            stale = self._plans.stale(key)
            limit = self._default if stale is None else stale
            log.warning("plan_unknown", reason=error.reason, limit=limit)
            return limit

    def _note(self, *, degraded: bool) -> None:
        if degraded != self._degraded:
            self._degraded = degraded
            log.warning("limits_are_local" if degraded else "limits_are_shared_again")


def _key(principal: Principal) -> str:
    """Names of tenants and users are arbitrary; a digest of both, with lengths, cannot be made to collide."""
    subject = f"{len(principal.tenant)}:{principal.tenant}:{principal.user}"
    return f"tailrace:requests:{hashlib.blake2s(subject.encode(), digest_size=16).hexdigest()}"


def headers_of(decision: Decision) -> list[tuple[bytes, bytes]]:
    """What a response says about the window."""
    return _headers(decision.limit, decision.remaining, -(-decision.reset_us // 1000))


def headers_of_refusal(error: RateLimited) -> list[tuple[bytes, bytes]]:
    """What a refusal says about the window; nothing if the limit was not ours."""
    if "limit" not in error.metadata or "reset_ms" not in error.metadata:
        return []
    return _headers(int(error.metadata["limit"]), 0, int(error.metadata["reset_ms"]))


def _headers(limit: int, remaining: int, reset_ms: int) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-requests", str(limit).encode()),
        (b"x-ratelimit-remaining-requests", str(remaining).encode()),
        (b"x-ratelimit-reset-requests", f"{reset_ms}ms".encode()),
    ]
