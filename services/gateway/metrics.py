"""What the gateway counts, for Prometheus and for the live map. Labels are closed sets: routes and reasons, never users or ids."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

RECENT_S = 300.0
"""Live figures are of the last five minutes."""
RECENT_MAX = 512
SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
FIRST_EVENT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)


@dataclass
class Hop:
    """Live figures of one way between two components."""

    source: str
    target: str
    clock: Callable[[], float] = time.monotonic
    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))

    def observe(self, milliseconds: float, *, failed: bool) -> None:
        """Count one call that took so long."""
        self.requests += 1
        self.errors += failed
        self._recent.append((self.clock(), milliseconds))

    def percentiles(self) -> tuple[float | None, float | None]:
        """Median and 95th percentile of the recent calls, milliseconds; None without any."""
        oldest = self.clock() - RECENT_S
        recent = sorted(milliseconds for at, milliseconds in self._recent if at >= oldest)
        if not recent:
            return None, None
        return recent[math.ceil(len(recent) * 0.5) - 1], recent[math.ceil(len(recent) * 0.95) - 1]


class Metrics:
    """Everything counted in this process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._hops: dict[tuple[str, str], Hop] = {}
        self.requests = Counter(
            "tailrace_gateway_requests", "Requests by route and status.", ["method", "route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "tailrace_gateway_request_seconds",
            "Time from the request's headers to the end of its answer.",
            ["method", "route"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self.first_event_seconds = Histogram(
            "tailrace_gateway_first_event_seconds",
            "Time from the request's headers to the first event of a stream.",
            ["route"],
            buckets=FIRST_EVENT_BUCKETS,
            registry=self._registry,
        )
        self.streams = Gauge("tailrace_gateway_streams", "Streams open now.", ["route"], registry=self._registry)
        self.stream_ends = Counter("tailrace_gateway_stream_ends", "Streams by how they ended.", ["route", "end"], registry=self._registry)
        self.refusals = Counter("tailrace_gateway_refusals", "Requests refused, by reason.", ["reason"], registry=self._registry)
        self.limits_local = Counter(
            "tailrace_gateway_limits_local", "Requests counted by this process alone because Redis was away.", registry=self._registry
        )
        self.limits_away = Gauge(
            "tailrace_gateway_limits_away", "1 while Redis is away and this process counts alone.", registry=self._registry
        )
        self.shed = Counter(
            "tailrace_gateway_shed",
            "Answers turned away because this process carries enough, by cause.",
            ["cause"],
            registry=self._registry,
        )
        self.revocations_stale = Counter(
            "tailrace_gateway_revocations_stale", "Times the list of revoked tokens could not be read anew.", registry=self._registry
        )
        self.hop_seconds = Histogram(
            "tailrace_gateway_hop_seconds",
            "Time of a unary call, or to the first message of a stream, by component called.",
            ["target"],
            buckets=FIRST_EVENT_BUCKETS,
            registry=self._registry,
        )
        self.hop_errors = Counter(
            "tailrace_gateway_hop_errors", "Calls that failed, by component called.", ["target"], registry=self._registry
        )

    def hop(self, source: str, target: str) -> Hop:
        """The figures of the way from `source` to `target`; the same object every time."""
        hop = self._hops.get((source, target))
        if hop is None:
            hop = self._hops[source, target] = Hop(source, target)
        return hop

    def hops(self) -> list[Hop]:
        """Every way that was ever gone."""
        return list(self._hops.values())

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)
