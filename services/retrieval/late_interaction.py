"""How well the words of a question are met, each by the word of a text that is nearest to it: by vectors of single tokens, which a model
makes on its way to the vector of the whole. Those of a text are kept as a sketch, some 14 characters a token. Pure; no store and no model.

Source: Khattab and Zaharia, ColBERT (2020); Achlioptas, Database-friendly random projections (2003).
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]

FORM = "tokens1"
"""Names how sketches are made. Two forms are never compared."""
NUMBERS = 96
"""Of a token in a sketch, each -1, 0 or 1. Of the gain that whole vectors of 384 numbers bring, four fifths are left: what one token loses,
others make up for."""
NUMBERS_PER_CHARACTER = 4
CHARACTERS_PER_TOKEN = NUMBERS // NUMBERS_PER_CHARACTER
ZERO_BELOW = 0.6
"""In standard deviations of the token's own numbers. About half of them are 0 so, which tells more than their sign would."""
KEPT_SHARE = 0.6
"""Of a text's tokens: those with the longest vectors, which mean most. More of them find nothing more; with two fifths less is found."""
QUESTION_TOKENS_MAX = 16
"""The same of a question's."""
PRODUCT_MAX = 250_000
"""Multiplications in one product of matrices. A larger one numpy gives to threads of its own, which burn a core for a while after it."""
ALPHABET = "".join(chr(code) for code in range(35, 117) if chr(code) != "\\")
"""A character for each of the 81 that four numbers can be: neither quote nor backslash, so that JSON leaves it as it is."""


@dataclass(frozen=True, slots=True)
class AskedTokens:
    """A question's tokens: where each points (t, NUMBERS), rows of unit length, and how much it says (t,)."""

    directions: Numbers
    weights: Numbers


def sketched(vectors: Numbers, lengths: Sequence[int]) -> tuple[str, ...]:
    """The sketch of each text. `vectors` (t, d) are of all their tokens, one text after the other; `lengths` says how many each has."""
    extents = np.linalg.norm(vectors, axis=1)
    begins = np.cumsum([0, *lengths[:-1]])
    counts = [kept_of(length) for length in lengths]
    kept = [begin + _longest(extents[begin : begin + length], count) for begin, length, count in zip(begins, lengths, counts, strict=True)]
    shortened = _shortened(vectors[np.concatenate(kept)])
    bound = ZERO_BELOW * np.sqrt(np.einsum("ij,ij->i", shortened, shortened) / NUMBERS)[:, None]
    levels = (shortened > bound).astype(np.uint8) + (shortened >= -bound)
    fours = levels.reshape(-1, NUMBERS_PER_CHARACTER)
    codes = sum((fours[:, place] * np.uint8(3**place) for place in range(NUMBERS_PER_CHARACTER)), np.zeros(len(fours), np.uint8))
    written = _WRITTEN[codes].tobytes().decode("ascii")
    ends = np.cumsum(np.asarray(counts) * CHARACTERS_PER_TOKEN).tolist()
    return tuple(written[begin:end] for begin, end in zip([0, *ends], ends, strict=False))


def kept_of(tokens: int) -> int:
    """How many of a text's tokens a sketch has."""
    return math.ceil(KEPT_SHARE * tokens)


def asked(vectors: Numbers) -> AskedTokens | None:
    """(t, d) of a question's tokens, without those that only begin and end it. None = there is none."""
    if not len(vectors):
        return None
    lengths = np.linalg.norm(vectors, axis=1)
    longest = _longest(lengths, QUESTION_TOKENS_MAX)
    shortened = _shortened(vectors[longest])
    return AskedTokens(shortened / np.maximum(np.linalg.norm(shortened, axis=1, keepdims=True), np.float32(1e-9)), lengths[longest])


def nearness(question: AskedTokens, sketches: Sequence[str]) -> list[float]:
    """How well each of the sketched texts meets the question, -1 to 1, beside the others: a word that all of them meet tells nothing.

    At least one text; each has at least one token.
    """
    codes = np.frombuffer("".join(sketches).encode("ascii"), np.uint8)
    tokens = len(codes) // CHARACTERS_PER_TOKEN
    at_once = PRODUCT_MAX // (NUMBERS * len(question.weights))
    # In whole blocks, for which the last one is filled up with tokens of nothing.
    numbers = np.zeros((-(-tokens // at_once) * at_once, NUMBERS), np.float32)
    numbers[:tokens] = _READ.take(codes).view(np.int8).reshape(tokens, NUMBERS)
    products = np.matmul(numbers.reshape(-1, at_once, NUMBERS), question.directions.T).reshape(len(numbers), -1)[:tokens]
    lengths = np.sqrt(np.einsum("ij,ij->i", numbers, numbers)[:tokens])
    products /= np.maximum(lengths, 1)[:, None]
    begins = np.cumsum([0, *(len(sketch) // CHARACTERS_PER_TOKEN for sketch in sketches[:-1])])
    best = np.maximum.reduceat(products, begins, axis=0)
    telling = question.weights * (1 - best.mean(axis=0))
    met: list[float] = (best @ (telling / max(float(telling.sum()), 1e-9))).tolist()
    return met


def _longest(lengths: Numbers, count: int) -> npt.NDArray[np.intp]:
    """Places of the `count` greatest, in their order."""
    return np.sort(np.argsort(-lengths, kind="stable")[:count])


def _shortened(vectors: Numbers) -> Numbers:
    """(t, d) to (t, NUMBERS), with angles that are on average what they were."""
    tokens, dimension = vectors.shape
    at_once = max(1, PRODUCT_MAX // (dimension * NUMBERS))
    whole = np.zeros((-(-tokens // at_once) * at_once, dimension), np.float32)
    whole[:tokens] = vectors
    shortened: Numbers = np.matmul(whole.reshape(-1, at_once, dimension), _projection(dimension)).reshape(-1, NUMBERS)[:tokens]
    return shortened


@functools.cache
def _projection(dimension: int) -> Numbers:
    """(d, NUMBERS) of 1 and -1: by chance, and the same in every process."""
    chance = hashlib.shake_256(f"{FORM} {dimension}".encode()).digest(dimension * NUMBERS // 8)
    return np.unpackbits(np.frombuffer(chance, np.uint8)).reshape(dimension, NUMBERS).astype(np.float32) * 2 - 1


def _codes() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """From 0-80 to a character's code, and from that to its four numbers, which lie in one integer."""
    written = np.frombuffer(ALPHABET.encode("ascii"), np.uint8)
    fours = np.stack([np.arange(len(written)) // 3**place % 3 - 1 for place in range(NUMBERS_PER_CHARACTER)], axis=1)
    read = np.zeros(256, np.uint32)
    read[written] = np.ascontiguousarray(fours.astype(np.int8)).view(np.uint32).ravel()
    return written, read


_WRITTEN, _READ = _codes()
