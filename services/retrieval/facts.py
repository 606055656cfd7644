"""A document's metadata as its chunks carry it, and conditions on it. What a store's filters look like is the stores' affair.

Keys and values of users only ever become values in the store, never names of its fields, so that none of them can address ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from services.retrieval.domain import Fact

FACTS = "facts"
"""Payload field: keywords, one for each key and one for each pair of key and value."""
NUMBERS = "numbers"
"""Payload field: an object of `NAME` and `VALUE` for each number."""
MOMENTS = "moments"
"""Payload field: an object of `NAME` and `VALUE` for each moment. Apart from the numbers, so that an index tells few from many."""
NAME = "name"
VALUE = "value"

_MOMENT = re.compile(r"\d{4}-\d{2}-\d{2}(?:T\d{2}:\d{2}:\d{2}(?:\.\d+)?(?:Z|[+-]\d{2}:\d{2})?)?", re.ASCII | re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Measure:
    """A range that a number or moment must lie in: `least` is in it, `below` is not."""

    field: str
    """`NUMBERS` or `MOMENTS`."""
    name: str
    least: float | None
    below: float | None


@dataclass(frozen=True, slots=True)
class Condition:
    """What one field of a document's metadata must be like. All parts hold together; without any, the field must be there."""

    key: str
    any_of: tuple[Fact, ...] = ()
    at_least: float | None = None
    below: float | None = None
    from_us: int | None = None
    """Microseconds since 1970, as of `until_us`."""
    until_us: int | None = None
    negated: bool = False
    """Turns the whole round: documents without the field match, too."""

    @property
    def keywords(self) -> tuple[str, ...]:
        """One of these must be among the facts."""
        # A range needs the field to be there, too: that leaves few to look at where few documents have it.
        return tuple(_pair(self.key, fact) for fact in self.any_of) or (_named(self.key),)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All of these must hold."""
        asked = ((NUMBERS, self.at_least, self.below), (MOMENTS, self.from_us, self.until_us))
        return tuple(
            Measure(field, self.key, None if least is None else float(least), None if below is None else float(below))
            for field, least, below in asked
            if least is not None or below is not None
        )


def payload(metadata: Mapping[str, Fact]) -> dict[str, Any]:
    """The payload fields that conditions look at."""
    numbers, moments = [], []
    for key, fact in metadata.items():
        if isinstance(fact, str):
            if (at_us := moment_us(fact)) is not None:
                moments.append({NAME: key, VALUE: float(at_us)})
        elif not isinstance(fact, bool):
            numbers.append({NAME: key, VALUE: float(fact)})
    keywords = [keyword for key, fact in metadata.items() for keyword in (_named(key), _pair(key, fact))]
    return {FACTS: keywords, NUMBERS: numbers, MOMENTS: moments}


def same(one: Mapping[str, Fact], other: Mapping[str, Fact]) -> bool:
    """Whether both say the same. To Python alone, True would be 1."""
    return set(payload(one)[FACTS]) == set(payload(other)[FACTS])


def moment_us(text: str) -> int | None:
    """Microseconds since 1970 of a date or moment as RFC 3339 writes it; without a zone it is UTC. None if it is neither."""
    if not _MOMENT.fullmatch(text):
        return None
    try:
        at = datetime.fromisoformat(text.upper())
    except ValueError:
        return None
    return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def _named(key: str) -> str:
    # The length goes first, so that no key and value run together like another key, or another pair.
    return f"{len(key)}:{key}"


def _pair(key: str, fact: Fact) -> str:
    if isinstance(fact, bool):
        value = f"b:{fact}"
    elif isinstance(fact, str):
        value = f"s:{fact}"
    else:
        value = f"n:{float(fact) + 0.0!r}"  # minus zero is zero
    return f"{_named(key)}={value}"
