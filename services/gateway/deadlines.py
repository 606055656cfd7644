"""How long a request may take: as the caller says; an answer else as the plan says, else as the orchestrator does. It calls nobody."""

import re

from services.chassis.deadline import Deadline
from services.chassis.errors import DeadlineTooShort, RequestInvalid

DEADLINE_MS_MAX = 3_000_000
DEADLINE_SLACK_S = 10.0
"""Longer than the orchestrator's own deadline, so that its typed error arrives before ours."""
_SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,3})?", re.ASCII)


def requested_ms(header: str) -> int | None:
    """A `Request-Timeout` header, seconds with up to three decimals, as milliseconds; None if it is empty. Raises RequestInvalid."""
    if not header:
        return None
    seconds, _, fraction = header.partition(".")
    milliseconds = int(seconds) * 1000 + int(fraction.ljust(3, "0")) if _SECONDS.fullmatch(header) else 0
    if not 1 <= milliseconds <= DEADLINE_MS_MAX:
        raise RequestInvalid("not a time a request may take", field="Request-Timeout", bound="0.001 to 3000 seconds, three decimals")
    return milliseconds


def requested(header: str, arrived_at_s: float) -> Deadline | None:
    """The deadline that a `Request-Timeout` header sets to what arrived then; None if it is empty. Raises RequestInvalid."""
    milliseconds = requested_ms(header)
    return None if milliseconds is None else Deadline(arrived_at_s + milliseconds / 1000)


def answer_ms(message_ms: int | None, asked_ms: int | None, plan_ms: int) -> int | None:
    """How long an answer may take: `asked_ms` else `plan_ms`, unless the message asks for less. None = the orchestrator's default.

    Raises RequestInvalid for a message that is out of bounds.
    """
    if message_ms is not None and not 1 <= message_ms <= DEADLINE_MS_MAX:
        raise RequestInvalid("not a time an answer may take", field="deadline_ms", bound=f"1-{DEADLINE_MS_MAX}")
    given_ms = asked_ms if asked_ms is not None else None if message_ms is not None else plan_ms or None
    known = [value for value in (message_ms, given_ms) if value is not None]
    return min(known, default=None)


def of_call_ms(deadline: Deadline | None) -> int | None:
    """What a call's deadline leaves, milliseconds; None without one that an answer could reach."""
    if deadline is None:
        return None
    milliseconds = max(1, int(deadline.remaining_s * 1000))
    return milliseconds if milliseconds <= DEADLINE_MS_MAX else None


def passed_on_ms(deadline: Deadline) -> int:
    """What `deadline` leaves for the next hop, milliseconds. Raises DeadlineTooShort if that is nothing."""
    milliseconds = int(deadline.shaved_s() * 1000)
    if milliseconds < 1:
        raise DeadlineTooShort("the time was over before the answer could begin", step="admit", left_ms=0)
    return milliseconds


def call_timeout_s(deadline_ms: int | None, default_s: float) -> float:
    """How long to wait for an answer, seconds."""
    return (default_s if deadline_ms is None else min(default_s, deadline_ms / 1000)) + DEADLINE_SLACK_S
