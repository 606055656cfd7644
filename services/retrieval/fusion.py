"""Two rankings made one: how scores of meaning and of words are added, and how much each counts. Pure; no store and no wire."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Id = TypeVar("Id", int, str)
"""What names a candidate. Ties go by it."""

SPREADS = 3.0
"""A score counts from 0 to 1 between so many standard deviations below and above its ranking's mean."""
WORTH_OF_SPREAD = 3.3
"""What one standard deviation of the cosines of a ranking counts beside words, for embedders whose unit was not measured."""
CHARACTERS_PER_PIECE_FOREIGN = 1.2
CHARACTERS_PER_PIECE_KNOWN = 3.6
CHARACTERS_PER_PIECE_MAX = 8.0
"""No vocabulary has words this long on average: what was not known at all was read as one piece."""


@dataclass(frozen=True, slots=True)
class Fused(Generic[Id]):
    """One candidate, with how each ranking saw it. Ranks are from 1; None = not among what the ranking brought."""

    id: Id
    score: float
    dense_rank: int | None = None
    dense_score: float | None = None
    sparse_rank: int | None = None
    sparse_score: float | None = None
    total: float | None = None
    """Cosine and BM25 added as they are, in the unit of BM25, of which `score` is made; None = it was made otherwise."""
    late_score: float | None = None
    """`total` and what late interaction adds to it; None = it was not asked, or judged others alone."""


def familiarity(characters: int, pieces: int) -> float:
    """How well an embedder's vocabulary knows a text, 0-1, told by how many letters one of its pieces holds.

    English comes in words, other languages of its script in syllables, foreign scripts in letters or not at all. No list of languages
    is needed, so it holds for those nobody thought of.
    """
    per_piece = characters / pieces if pieces else 0.0
    if per_piece > CHARACTERS_PER_PIECE_MAX:
        return 0.0
    known = (per_piece - CHARACTERS_PER_PIECE_FOREIGN) / (CHARACTERS_PER_PIECE_KNOWN - CHARACTERS_PER_PIECE_FOREIGN)
    return min(1.0, max(0.0, known))


def fused(
    dense: Mapping[Id, float],
    sparse: Mapping[Id, float],
    dense_weight: float,
    mode: str = "linear",
    rrf_k: int = 60,
    *,
    brought: int = 0,
    worth: float | None = None,
    most: int | None = None,
) -> list[Fused[Id]]:
    """The `most` best candidates of both (None = all), best first. `dense_weight` is the share of meaning, 0-1; ties go by id.

    A ranking is scores by id, best first; one of fewer than `brought` holds all there is. `worth` is what a whole unit of cosine counts
    beside words, in their unit, where that was measured. Scores are 0-1 for nearly all, and 0.5 in the middle; those of `rrf` are its own.
    """
    totals: dict[Id, float] = {}
    if mode == "linear" and dense and sparse:
        totals = _added(dense, sparse, dense_weight, brought, worth)
        scores = _on_one_scale(totals)
    else:
        of = _by_rank if mode == "rrf" else _by_spread
        scores = {id_: dense_weight * score for id_, score in of(dense, rrf_k).items()}
        for id_, score in of(sparse, rrf_k).items():
            scores[id_] = scores.get(id_, 0.0) + (1.0 - dense_weight) * score
    # Of two hundred candidates a dozen is wanted: the others need no more than a number.
    best = sorted([(-score, id_) for id_, score in scores.items()])[:most]
    meant, said = dict(zip(dense, itertools.count(1), strict=False)), dict(zip(sparse, itertools.count(1), strict=False))
    return [Fused(id_, -negated, meant.get(id_), dense.get(id_), said.get(id_), sparse.get(id_), totals.get(id_)) for negated, id_ in best]


def _added(meant: Mapping[Id, float], said: Mapping[Id, float], dense_weight: float, brought: int, worth: float | None) -> dict[Id, float]:
    """Cosine and BM25 as they are, one unit of the first being worth so many of the second: a long question has more words to tell by, and
    a ranking whose candidates are all alike tells nothing. Both are lost where each ranking is stretched to the same width."""
    if worth is None:
        worth = WORTH_OF_SPREAD / (_spread(meant.values()) or 1.0)
    # Who is missing in a ranking that was cut has at most what its last one has; in a whole one, none of the words.
    least_meant, least_said = min(meant.values()), min(said.values()) if len(said) >= brought else 0.0
    by_meaning, by_words = dense_weight * worth, 1.0 - dense_weight
    return {id_: by_meaning * meant.get(id_, least_meant) + by_words * said.get(id_, least_said) for id_ in {**meant, **said}}


def _by_spread(ranking: Mapping[Id, float], _: int) -> dict[Id, float]:
    return _on_one_scale(ranking)


def _on_one_scale(scores: Mapping[Id, float]) -> dict[Id, float]:
    mean = math.fsum(scores.values()) / (len(scores) or 1)
    width = 2 * SPREADS * _spread(scores.values())
    if not width:
        return dict.fromkeys(scores, 0.5)
    return {id_: 0.5 + (score - mean) / width for id_, score in scores.items()}


def _spread(values: Iterable[float]) -> float:
    """Standard deviation; 0 where all are the same, or differ by less than a square can hold."""
    scores = list(values)
    if not scores or min(scores) == max(scores):
        return 0.0
    # By hand: `statistics` reckons in fractions, which takes a fifth of a whole recall and tells apart nothing that counts.
    mean = math.fsum(scores) / len(scores)
    return math.sqrt(math.fsum([(score - mean) ** 2 for score in scores]) / (len(scores) - 1))


def _by_rank(ranking: Mapping[Id, float], k: int) -> dict[Id, float]:
    return {id_: 1.0 / (k + rank) for rank, id_ in enumerate(ranking, 1)}
