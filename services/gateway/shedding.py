"""Not now: whether this process has room for one more answer, asked before anything else is done. It knows no plan and asks nobody.

An answer costs most before its model is asked: that is when it is authenticated, looked up, embedded and paid for. So those that are
being prepared have bounds of their own, as queues have in CoDel: a burst may be large, but one that stands is cut to what keeps the
machine busy, because whoever waits in it only gets older. A stream that flows costs little.
Interactive answers are turned away at the bounds, batch answers at 80 % of them, so that those that nobody waits for make room first.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.chassis.errors import Overloaded

BATCH_SHARE = 0.8
RETRY_AFTER_MS = 1000
TICK_S = 0.05
TICKS = 4
"""Lag must last for so many ticks: one long callback or collection is no overload."""

STANDS_AFTER_S = 2.0
"""A burst that was not worked off to half of the standing bound for so long is a queue that stands. Twenty people who ask at the same
moment keep two slow cores busy for one second: they are a burst."""


class LoopLag:
    """How late the event loop runs what is due, by a timer of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._recent: deque[float] = deque([0.0], maxlen=TICKS)
        self._expect()

    @property
    def seconds(self) -> float:
        """The least of the latest lags."""
        return min(self._recent)

    def stop(self) -> None:
        self._timer.cancel()

    def _expect(self) -> None:
        due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        self._recent.append(max(0.0, self._loop.time() - due))
        self._expect()


@dataclass
class Shedding:
    """What this process carries, and how much it may."""

    streams_max: int
    lag_max_s: float
    lag_s: Callable[[], float]
    on_shed: Callable[[str], None] = lambda cause: None
    """Called with `streams`, `preparing` or `lag` for every answer that was turned away."""
    preparing_max: int = 1_000_000
    """For a burst."""
    preparing_standing_max: int = 1_000_000
    """For a queue that stands."""
    clock: Callable[[], float] = time.monotonic
    streams: int = 0
    """Answers asked for and streams resumed that are under way."""
    preparing: int = 0
    """Answers whose model was not asked yet."""

    def __post_init__(self) -> None:
        self._calm_at = self.clock()

    @contextlib.contextmanager
    def carried(self) -> Iterator[None]:
        """Count a stream inside the block, whether or not there is room: one that is resumed makes no new work."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    @contextlib.contextmanager
    def entered(self) -> Iterator[Callable[[], None]]:
        """Count an answer inside the block, and as being prepared until what is yielded is called. Raises Overloaded without room."""
        if (error := self.full()) is not None:
            raise error
        self.preparing += 1
        prepares = True

        def prepared() -> None:
            nonlocal prepares
            if prepares:
                prepares = False
                self.preparing -= 1
                self._calm()

        with self.carried():
            try:
                yield prepared
            finally:
                prepared()

    def full(self) -> Overloaded | None:
        """What to tell one more answer; None if there is room for it."""
        return self._refusal(1, 1.0)

    def require_room_for_batch(self) -> None:
        """Called by an answer that has entered and that nobody waits for. Raises Overloaded if only interactive ones have room."""
        if (error := self._refusal(0, BATCH_SHARE)) is not None:
            raise error

    def _calm(self) -> None:
        if self.preparing * 2 <= self.preparing_standing_max:
            self._calm_at = self.clock()

    def _preparing_bound(self) -> int:
        self._calm()
        stands = self.clock() - self._calm_at > STANDS_AFTER_S
        return min(self.preparing_standing_max, self.preparing_max) if stands else self.preparing_max

    def _refusal(self, more: int, share: float) -> Overloaded | None:
        if self.streams + more > self.streams_max * share:
            cause = "streams"
        elif self.preparing + more > self._preparing_bound() * share:
            cause = "preparing"
        elif self.lag_s() > self.lag_max_s * share:
            cause = "lag"
        else:
            return None
        self.on_shed(cause)
        return Overloaded("the gateway carries as much as it can", dependency="gateway", cause=cause, retry_after_ms=RETRY_AFTER_MS)
