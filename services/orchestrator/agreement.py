"""How much two answers to the same prompt say the same: by their words, and by vectors of their parts. Pure; it asks no embedder."""

import re
from collections import Counter
from collections.abc import Sequence

from services.orchestrator.words import LITTLE

_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")
_MARKER = re.compile(r"\[\d{1,3}(?:\s?,\s?\d{1,3})*\]")
WORDS_MAX = 20_000
"""Of each answer; what comes after them is not compared."""
PART_CHARACTERS, PARTS_MAX = 800, 16
"""Parts of an answer that are compared by meaning: short enough for an embedder to read whole, and few enough to be one small request."""


def agreement(one: str, other: str) -> float:
    """F1 of the words that carry meaning, numbers among them, from 0 to 1. Order and citation markers do not count."""
    words, others = _counted(one), _counted(other)
    if not words or not others:
        return float(not words and not others)
    common = sum((words & others).values())
    return 2 * common / (words.total() + others.total())


def parts_of(text: str) -> list[str]:
    """The text in parts to be embedded, at most PARTS_MAX, none of them empty; citation markers are left out."""
    plain = _MARKER.sub("", text).strip()[: PART_CHARACTERS * PARTS_MAX]
    cut = (plain[begin : begin + PART_CHARACTERS] for begin in range(0, len(plain), PART_CHARACTERS))
    return [part for part in cut if part.strip()]


def similarity(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float | None:
    """Cosine, -1 to 1, of the mean vectors of two answers' parts; None if there is nothing to compare."""
    if not one or not other:
        return None
    mine, theirs = ([sum(column) for column in zip(*vectors, strict=True)] for vectors in (one, other))
    size = (sum(value * value for value in mine) * sum(value * value for value in theirs)) ** 0.5
    return sum(a * b for a, b in zip(mine, theirs, strict=True)) / size if size else None


def _counted(text: str) -> Counter[str]:
    words = _WORD.findall(_MARKER.sub(" ", text).casefold())[:WORDS_MAX]
    return Counter(word for word in words if word not in LITTLE)
