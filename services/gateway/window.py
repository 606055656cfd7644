"""The sliding window of requests, pure and without a clock: what the Redis script must do, and what stands in while Redis is away.

A request is admitted if fewer than `limit` were admitted in the `window_us` before it. There are no buckets: in every window of that
length, wherever it begins, at most `limit` requests were admitted.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decision:
    """What a window said to one request. Times are microseconds from now."""

    allowed: bool
    limit: int
    remaining: int
    """How many more would be admitted now."""
    retry_after_us: int
    """When the next will be admitted; 0 if allowed."""
    reset_us: int
    """When the window is empty again, if nothing more is asked."""


class Window:
    """The admissions of one subject."""

    def __init__(self, window_us: int) -> None:
        self._window_us = window_us
        self._admitted: deque[int] = deque()

    def admit(self, now_us: int, limit: int) -> Decision:
        """Decide on a request at `now_us`, and remember it if it is admitted. A clock that goes back counts as standing still."""
        admitted = self._admitted
        if admitted:
            now_us = max(now_us, admitted[-1])
        while admitted and admitted[0] <= now_us - self._window_us:
            admitted.popleft()
        count = len(admitted)
        if count < limit:
            admitted.append(now_us)
            return Decision(True, limit, limit - count - 1, 0, self._window_us)
        # With a limit that was lowered meanwhile, several must leave before one may enter.
        leaves_us = admitted[count - limit] + self._window_us
        return Decision(False, limit, 0, leaves_us - now_us, admitted[-1] + self._window_us - now_us)
