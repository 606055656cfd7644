"""What every endpoint works with, as one frozen value. It decides nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from services.chassis.deadline import Deadline
from services.chassis.errors import DomainError
from services.chassis.principal import current_principal, set_current
from services.gateway import deadlines
from services.gateway.answer_stream import AnswerStream
from services.gateway.bridge import Bridge, Timing
from services.gateway.browser import Browser
from services.gateway.clients import Backends
from services.gateway.exchange import ClientLeft, Exchange
from services.gateway.identity import Identity
from services.gateway.limits import Admission, Limits, ReservedTokens, grant_of
from services.gateway.metrics import Metrics
from services.gateway.places import Places
from services.gateway.revocations import Revocations
from services.gateway.shedding import Shedding
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

T = TypeVar("T")

RESUMES_LEAST = 16
"""So many streams a user may resume whatever the plan says: a page may be open in several windows."""


@dataclass(frozen=True)
class Kit:
    """Backends, figures and timing of this process."""

    backends: Backends
    identity: Identity
    browser: Browser
    revocations: Revocations
    limits: Limits
    shedding: Shedding
    resumes: Places
    watches: Places
    sockets: Places
    metrics: Metrics
    timing: Timing
    answer_timeout_s: float
    reserved_tokens: ReservedTokens
    body_stall_s: float
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process begins to stop."""
    readiness: dict[str, bool] = field(default_factory=dict)
    """State of every dependency at the latest probe."""

    @contextlib.contextmanager
    def counted(self, bridge: Bridge[Any], route: str) -> Iterator[None]:
        """Count a stream while it is open, and how it ended."""
        gauge = self.metrics.streams.labels(route)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()
            self.metrics.stream_ends.labels(route, bridge.end).inc()

    @contextlib.asynccontextmanager
    async def counting_unreadable(self) -> AsyncIterator[None]:
        """Count what the block refuses to read as a request of the current principal: else it would be a way to ask without end."""
        try:
            yield
        except DomainError:
            await self.limits.admit(current_principal())
            raise

    @contextlib.asynccontextmanager
    async def answering(
        self, request: orchestrator.AnswerRequest, asked_ms: int | None, arrived_at_s: float
    ) -> AsyncIterator[tuple[Admission, float]]:
        """Admit an answer of the current principal and put what is left of its time into `request`; yield what was admitted and the call's
        timeout.

        `asked_ms` is how long the caller gives it from `arrived_at_s` on, by the monotonic clock. Raises LimitReached, NotAllowed,
        Overloaded, RequestInvalid, DeadlineTooShort.
        """
        if request.priority == orchestrator.PRIORITY_BATCH:
            self.shedding.require_room_for_batch()
        principal = current_principal()
        grant = grant_of(principal, request)
        given_ms = request.deadline_ms if request.HasField("deadline_ms") else None
        given = await self.limits.entitlements(principal)
        # Goes with the call: the orchestrator chooses models and the cache's reach by it, and looks at the tools of an answer that goes on.
        entitled = replace(principal, plan=given.plan, tiers=given.tiers, cache_scope=given.cache_scope, tools=frozenset(given.tools))
        entitled.require_tools(request.server_tools)
        set_current(entitled if request.continues else replace(entitled, tools=None))
        deadline_ms = deadlines.answer_ms(given_ms, asked_ms, given.answer_deadline_ms)
        timeout_s = deadlines.call_timeout_s(deadline_ms, self.answer_timeout_s)
        tokens = self.reserved_tokens.of(request)
        goes_on = not request.cancel_on_disconnect or bool(request.idempotency_key)  # with a key one can come back
        async with self.limits.answering(principal, tokens, lasts_s=timeout_s, goes_on=goes_on, grant=grant) as admission:
            if deadline_ms is not None:
                request.deadline_ms = deadlines.passed_on_ms(Deadline(arrived_at_s + deadline_ms / 1000))
            yield admission, timeout_s

    @contextlib.asynccontextmanager
    async def resuming(self, request: orchestrator.ResumeAnswerRequest) -> AsyncIterator[AnswerStream]:
        """The events of an answer of the current principal that was begun before. Raises RateLimited.

        As many may be read at the same time as may be made.
        """
        timeout_s = deadlines.call_timeout_s(None, self.answer_timeout_s)
        principal = current_principal()
        may_run = (await self.limits.entitlements(principal)).user.answers
        with self.resumes.held(principal, max(may_run, RESUMES_LEAST) if may_run else None), self.shedding.carried():
            try:
                async with AnswerStream(self.backends.orchestrator, request, timeout_s=timeout_s) as events:
                    yield events
            finally:
                self.limits.look_at(request.answer_id)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hold a place of the current principal for a stream that has no end of its own, or none soon. Raises RateLimited."""
        with self.watches.held(current_principal()):
            yield

    async def cancel(self, request: orchestrator.CancelAnswerRequest) -> orchestrator.CancelAnswerResponse:
        """Stop an answer of the current principal."""
        reply = await self.backends.orchestrator.unary(self.backends.orchestrator.stub.CancelAnswer, request)
        self.limits.look_at(request.answer_id)
        return reply  # type: ignore[no-any-return]

    async def unless_client_leaves(self, exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`; give it up with ClientLeft when the client goes."""
        task = asyncio.create_task(work, name="work")
        watch = asyncio.create_task(exchange.until_client_leaves(), name="watch")
        try:
            await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientLeft
            return task.result()
        finally:
            for running in (task, watch):
                running.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
