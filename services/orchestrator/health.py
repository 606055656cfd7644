"""What is known of how each model fares: who is put aside, who is tried again, and how many retries there may be. Pure.

Time and chance come from outside. Nothing here calls, waits or knows why a call failed.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from services.orchestrator.domain import Candidate

FAILURES_IN_A_ROW = 5
"""Open after so many (after Envoy's outlier detection)."""
SHARE_WINDOW_S, SHARE_CALLS_MIN, SHARE_MAX = 10.0, 20, 0.5
"""Open when more than this share of at least so many calls of the window failed: a model that answers now and then is no model."""
OPEN_S, OPEN_MAX_S = 1.0, 4.0
"""First and longest pause before the next probe; it doubles in between. With the probe itself, recovery takes less than 5 s."""
OPEN_JITTER = 0.25
"""A pause is shorter by up to this share, so that the replicas do not all probe at once."""
RETRY_SHARE = 0.1
"""Retries there may be for each request (SRE: about a tenth per client)."""
RETRIES_SAVED_MAX = 6.0
RETRIES_PER_S = 0.1
"""What a quiet replica earns besides: a lone request after a minute finds its two retries."""
PAUSED_MAX_S = 30.0
"""A provider that asks to be left alone for longer is probed all the same."""

State = Literal["closed", "open", "trial"]


class RetryBudget:
    """A bucket of retries that requests fill. See the Finagle and gRPC retry throttles for the same idea."""

    def __init__(self, now: float) -> None:
        self._saved, self._at = RETRIES_SAVED_MAX, now

    def request(self, now: float) -> None:
        """A request begins."""
        self._earn(now, RETRY_SHARE)

    def take(self, now: float) -> bool:
        """Take one retry; return whether there was one."""
        self._earn(now, 0.0)
        if self._saved < 1:
            return False
        self._saved -= 1
        return True

    def _earn(self, now: float, more: float) -> None:
        self._saved = min(RETRIES_SAVED_MAX, self._saved + more + max(0.0, now - self._at) * RETRIES_PER_S)
        self._at = now


class Breaker:
    """Puts a model aside that fails, lets single calls through as probes, and takes it back at the first that answers.

    One probe a pause, not one at a time: a probe that hangs for a minute must not keep a model out that is well again.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.state: State = "closed"
        self._in_a_row = 0
        self._openings = 0
        self._probe_at = 0.0
        self._window: deque[tuple[int, list[int]]] = deque()
        """Seconds with their calls and failures; at most those of the window."""

    def lets_through(self, now: float) -> bool:
        """Whether a call may begin. An open breaker lets one through for each pause; that call is a probe."""
        if self.state != "open":
            return True
        if now < self._probe_at:
            return False
        self._openings += 1
        self._probe_at = now + self._pause_s()
        return True

    def began_well(self) -> None:
        """A call has its first content. That is proof enough to take the model back, on trial until a call ends well."""
        if self.state == "open":
            self.state, self._in_a_row = "trial", 0
            self._window.clear()

    def succeeded(self, now: float) -> None:
        """A call ended well."""
        self.state, self._in_a_row, self._openings = "closed", 0, 0
        self._count(now, failed=False)

    def failed(self, now: float) -> None:
        """A call failed."""
        self._in_a_row += 1
        calls, failures = self._count(now, failed=True)
        if self.state == "open":
            return
        of_many = calls >= SHARE_CALLS_MIN and failures > SHARE_MAX * calls
        if self._in_a_row >= FAILURES_IN_A_ROW or of_many or self.state == "trial":
            self.state = "open"
            self._openings += 1
            self._probe_at = now + self._pause_s()

    def _pause_s(self) -> float:
        return min(OPEN_MAX_S, OPEN_S * 2.0 ** min(self._openings - 1, 8)) * (1 - OPEN_JITTER * self._jitter())

    def _count(self, now: float, *, failed: bool) -> tuple[int, int]:
        second = int(now)
        if not self._window or self._window[-1][0] != second:
            self._window.append((second, [0, 0]))
        while self._window[0][0] <= second - SHARE_WINDOW_S:
            self._window.popleft()
        counts = self._window[-1][1]
        counts[0] += 1
        counts[1] += failed
        return sum(calls for _, (calls, _) in self._window), sum(failures for _, (_, failures) in self._window)


@dataclass(slots=True)
class _Fare:
    breaker: Breaker
    retries: RetryBudget
    paused_until: float = 0.0


@dataclass(slots=True)
class Health:
    """How the models of this replica fare, by provider and model. As many entries as models were ever configured."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    jitter: Callable[[], float]
    """Uniform in [0, 1)."""
    _fares: dict[tuple[str, str], _Fare] = field(default_factory=dict)

    def state(self, candidate: Candidate) -> State:
        """What its breaker says, for people and tests."""
        return self._of(candidate).breaker.state

    def lets_through(self, candidate: Candidate) -> bool:
        """Whether `candidate` may be asked now, as far as its own state goes."""
        fare, now = self._of(candidate), self.clock()
        return fare.paused_until <= now and fare.breaker.lets_through(now)

    def may_retry(self, candidate: Candidate) -> bool:
        """Whether `candidate` may be asked once more for the same request. Takes the retry from the budget."""
        fare = self._of(candidate)
        return fare.breaker.state != "open" and fare.retries.take(self.clock())

    def request(self, candidate: Candidate) -> None:
        """A request asks `candidate` for the first time."""
        self._of(candidate).retries.request(self.clock())

    def began_well(self, candidate: Candidate) -> None:
        """The first content of a call came."""
        self._of(candidate).breaker.began_well()

    def succeeded(self, candidate: Candidate) -> None:
        """A call ended as calls should, be it with a refusal."""
        self._of(candidate).breaker.succeeded(self.clock())

    def failed(self, candidate: Candidate) -> None:
        """A call failed in a way that says something about the model."""
        self._of(candidate).breaker.failed(self.clock())

    def pause(self, candidate: Candidate, seconds: float) -> None:
        """The provider asks to be left alone: others are asked meanwhile. That is pacing and no failure."""
        fare = self._of(candidate)
        fare.paused_until = max(fare.paused_until, self.clock() + min(seconds, PAUSED_MAX_S))

    def _of(self, candidate: Candidate) -> _Fare:
        key = candidate.provider, candidate.model
        fare = self._fares.get(key)
        if fare is None:
            fare = self._fares[key] = _Fare(Breaker(self.jitter), RetryBudget(self.clock()))
        return fare
