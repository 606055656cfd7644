"""How a failure stands in the log: where it happened, and what was raised. Pure.

What an exception says may quote what somebody asked or was answered, so only words of our own, and of the operating system, are told.
"""

import sys
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

from services.chassis.errors import DomainError

CAUSES_MAX = 8
_TOLD = (DomainError, OSError)
"""Whose words name a place or a number, never a text."""


def without_words(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Write `exc_info` of a log line as its `exception`."""
    said = event.pop("exc_info", None)
    if said is True:
        said = sys.exc_info()[1]
    elif isinstance(said, tuple):
        said = said[1]
    if isinstance(said, BaseException):
        event["exception"] = told(said)
    return event


def told(error: BaseException) -> str:
    """The error and what it came of, oldest first, with the lines that led to each."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(chain) < CAUSES_MAX and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n\nled to\n\n".join(_one(link) for link in reversed(chain))


def _one(error: BaseException) -> str:
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    inner = [told(part) for part in error.exceptions[:CAUSES_MAX]] if isinstance(error, BaseExceptionGroup) else []
    words = f": {error}" if isinstance(error, _TOLD) else ""
    return "\n".join([*_lines(error.__traceback__), f"{kind}{words}", *inner])


def _lines(trace: TracebackType | None) -> list[str]:
    return [line.rstrip("\n") for line in traceback.format_tb(trace)]
