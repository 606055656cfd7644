"""How much two answers to the same prompt say the same, by their words. Pure; it cannot see that two wordings mean one thing."""

import re
from collections import Counter

from services.orchestrator.words import LITTLE

_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")
_MARKER = re.compile(r"\[\d{1,3}(?:\s?,\s?\d{1,3})*\]")
WORDS_MAX = 20_000
"""Of each answer; what comes after them is not compared."""


def agreement(one: str, other: str) -> float:
    """F1 of the words that carry meaning, numbers among them, from 0 to 1. Order and citation markers do not count."""
    words, others = _counted(one), _counted(other)
    if not words or not others:
        return float(not words and not others)
    common = sum((words & others).values())
    return 2 * common / (words.total() + others.total())


def _counted(text: str) -> Counter[str]:
    words = _WORD.findall(_MARKER.sub(" ", text).casefold())[:WORDS_MAX]
    return Counter(word for word in words if word not in LITTLE)
