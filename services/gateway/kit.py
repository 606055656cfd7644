"""What every endpoint works with, as one frozen value. It decides nothing."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from services.gateway.bridge import Bridge, Timing
from services.gateway.browser import Browser
from services.gateway.clients import Backends
from services.gateway.exchange import ClientLeft, Exchange
from services.gateway.identity import Identity
from services.gateway.limits import Limits
from services.gateway.metrics import Metrics
from services.gateway.revocations import Revocations

T = TypeVar("T")


@dataclass(frozen=True)
class Kit:
    """Backends, figures and timing of this process."""

    backends: Backends
    identity: Identity
    browser: Browser
    revocations: Revocations
    limits: Limits
    metrics: Metrics
    timing: Timing
    answer_timeout_s: float
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
