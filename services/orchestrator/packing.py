"""Which passages go into a prompt: the best ones that fit a budget, each thing said once, numbered in the order they are shown. Pure."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from services.orchestrator.domain import Passage
from services.orchestrator.words import GRAMMAR

SHINGLE_WORDS = 4
SHINGLE_CHARACTERS = 8
"""For scripts that put no spaces between words."""
ALIKE_MIN = 0.8
"""Share of the shorter text's shingles that the other has, from which on they say the same: overlapping chunks and copies with another
heading are above it, two entries of a list that follow one pattern below."""
_NEGATIONS = GRAMMAR["negations"]
PASSAGE_OVERHEAD_BYTES = 96
"""Its fence, without title and headings."""
Shingle = tuple[str, ...] | str
_WORD = re.compile(r"[^\W_]+(?:[-'’.,][^\W_]+)*")
_DIGIT = re.compile(r"\d")


def pack(passages: Sequence[Passage], bytes_max: int) -> tuple[Passage, ...]:
    """The passages in the order they came, best first, numbered from 1.

    One that nearly repeats a better one is left out, unless they differ in a number or in a negation: then neither is the other's copy.
    One that is too large for what is left of `bytes_max` is left out too, and smaller ones after it still have their chance; the best
    one always stays.
    """
    kept: list[Passage] = []
    seen: list[_Print] = []
    left = bytes_max
    for passage in passages:
        print_ = _Print(passage.text)
        if any(print_.marks == other.marks and _alike(print_.shingles, other.shingles) >= ALIKE_MIN for other in seen):
            continue
        size = PASSAGE_OVERHEAD_BYTES + sum(len(part.encode()) for part in (passage.text, passage.title, *passage.heading_path))
        if size > left and kept:
            continue
        left -= size
        seen.append(print_)
        kept.append(replace(passage, number=len(kept) + 1))
    return tuple(kept)


class _Print:
    """What a text is compared by."""

    def __init__(self, text: str) -> None:
        self._words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        self.marks = sorted(word for word in self._words if word in _NEGATIONS or (not word.isalpha() and _DIGIT.search(word)))
        """Numbers and negations, which two texts must share to mean the same. Most differ in them, and then nothing else is looked at."""

    @functools.cached_property
    def shingles(self) -> frozenset[Shingle]:
        words = self._words
        if len(words) >= SHINGLE_WORDS:
            return frozenset(zip(*(words[place:] for place in range(SHINGLE_WORDS)), strict=False))
        run = "".join(words)
        return frozenset(run[place : place + SHINGLE_CHARACTERS] for place in range(max(1, len(run) - SHINGLE_CHARACTERS + 1)))


def _alike(left: frozenset[Shingle], right: frozenset[Shingle]) -> float:
    return len(left & right) / (min(len(left), len(right)) or 1)
