"""How much time a request has left, carried through its tasks. Pure: it never sleeps and never cancels."""

import time
from contextvars import ContextVar
from dataclasses import dataclass

from services.chassis.errors import DeadlineTooShort

HOP_SHAVE_S = 0.02
"""Every hop keeps this much for itself, so that it can still say which step was slow (after Boulder)."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.monotonic() + seconds)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    def shaved_s(self) -> float:
        """What the next hop may use."""
        return max(0.0, self.remaining_s - HOP_SHAVE_S)

    def require(self, step: str, seconds: float) -> None:
        """Raise DeadlineTooShort if `step` cannot end within what is left."""
        left = self.remaining_s
        if left < seconds:
            raise DeadlineTooShort(f"{left * 1000:.0f} ms are left for {step}", step=step, left_ms=int(left * 1000))


current_deadline: ContextVar[Deadline | None] = ContextVar("current_deadline", default=None)
"""Deadline of the request this task works for, if it has one."""


def budget_s(default_s: float) -> float:
    """Seconds an outgoing call may take: `default_s`, or less if the request has less left."""
    deadline = current_deadline.get()
    return default_s if deadline is None else min(default_s, deadline.shaved_s())
