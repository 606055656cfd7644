"""What every endpoint works with, as one frozen value. It decides nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from services.chassis.principal import current_principal, set_current
from services.gateway import deadlines
from services.gateway.bridge import Bridge, Timing
from services.gateway.browser import Browser
from services.gateway.clients import Backends
from services.gateway.exchange import ClientLeft, Exchange
from services.gateway.identity import Identity
from services.gateway.limits import Admission, Limits, ReservedTokens
from services.gateway.metrics import Metrics
from services.gateway.revocations import Revocations
from services.gateway.shedding import Shedding
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

T = TypeVar("T")


@dataclass(frozen=True)
class Kit:
    """Backends, figures and timing of this process."""

    backends: Backends
    identity: Identity
    browser: Browser
    revocations: Revocations
    limits: Limits
    shedding: Shedding
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
    async def answering(self, request: orchestrator.AnswerRequest, asked_ms: int | None) -> AsyncIterator[tuple[Admission, float]]:
        """Admit an answer of the current principal and put its deadline into `request`; yield what was admitted and the call's timeout.

        `asked_ms` is how long the caller gives it. Raises LimitReached, NotAllowed, Overloaded, RequestInvalid.
        """
        if request.priority == orchestrator.PRIORITY_BATCH:
            self.shedding.require_room_for_batch()
        principal = current_principal()
        given_ms = request.deadline_ms if request.HasField("deadline_ms") else None
        given = await self.limits.entitlements(principal)
        # Goes with the call: the orchestrator chooses models and the cache's reach by it, and looks at the tools of an answer that goes on.
        entitled = replace(principal, plan=given.plan, tiers=given.tiers, cache_scope=given.cache_scope, tools=frozenset(given.tools))
        entitled.require_tools(request.server_tools)
        set_current(entitled if request.continues else replace(entitled, tools=None))
        deadline_ms = deadlines.answer_ms(given_ms, asked_ms, given.answer_deadline_ms)
        if deadline_ms is not None:
            request.deadline_ms = deadline_ms
        output_max = request.max_output_tokens if request.HasField("max_output_tokens") else None
        async with self.limits.answering(principal, self.reserved_tokens.of(request.question, output_max)) as admission:
            yield admission, deadlines.call_timeout_s(deadline_ms, self.answer_timeout_s)

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
