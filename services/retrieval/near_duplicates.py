"""Passages that say the same: which of them a reader needs. Pure; texts in, places out.

In doubt two texts differ: a passage too many costs some tokens, one too few may have held the answer.
"""

import re
from collections.abc import Sequence

LIKENESS_MIN = 0.9
"""Share of their words that two texts must have in common. Copies of a page differ in a date, a menu or a greeting."""
_WORD = re.compile(r"\w+")
_NEGATIONS = frozenset(
    {"no", "not", "never", "none", "without", "nicht", "kein", "keine", "nie", "ohne", "ne", "pas", "sans", "nunca", "sin"}
)


def distinct(texts: Sequence[str], most: int) -> list[int]:
    """Places of the first `most` texts that repeat none before them, in order. Every text is looked at once; quick for some dozens."""
    kept = list[int]()
    words_of_kept = list[frozenset[str]]()
    seen = set[str]()
    for place, text in enumerate(texts):
        # Whole copies are the usual case, and need no look at their words.
        if text in seen:
            continue
        seen.add(text)
        words = frozenset(_WORD.findall(text.casefold()))
        if any(_same(words, other) for other in words_of_kept):
            continue
        kept.append(place)
        words_of_kept.append(words)
        if len(kept) == most:
            break
    return kept


def _same(left: frozenset[str], right: frozenset[str]) -> bool:
    small, large = sorted((len(left), len(right)))
    if small < LIKENESS_MIN * large:
        return False
    shared = len(left & right)
    if shared < LIKENESS_MIN * (len(left) + len(right) - shared):
        return False
    # Two versions of a table, a rule and its opposite: nearly all words in common, and not the same.
    return not any(word in _NEGATIONS or any(map(str.isdigit, word)) for word in left ^ right)
