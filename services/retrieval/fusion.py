"""Two rankings made one: how scores of meaning and of words are put on one scale, and how much each counts. Pure; no store and no wire."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.retrieval.ports import Record

SPREADS = 3.0
"""A score counts from 0 to 1 between so many standard deviations below and above its ranking's mean."""
CHARACTERS_PER_PIECE_FOREIGN = 1.2
CHARACTERS_PER_PIECE_KNOWN = 3.6
CHARACTERS_PER_PIECE_MAX = 8.0
"""No vocabulary has words this long on average: what was not known at all was read as one piece."""


@dataclass(frozen=True, slots=True)
class Fused:
    """One candidate, with how each ranking saw it. Ranks are from 1; None = not among what the ranking brought."""

    id: str
    score: float
    dense_rank: int | None = None
    dense_score: float | None = None
    sparse_rank: int | None = None
    sparse_score: float | None = None


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
    dense: Sequence[Record], sparse: Sequence[Record], dense_weight: float, mode: str = "dbsf", rrf_k: int = 60, *, most: int | None = None
) -> list[Fused]:
    """The `most` best candidates of both (None = all), best first. `dense_weight` is the share of meaning, 0-1; ties go by id."""
    by_meaning, by_words = ((_by_rank(ranking, rrf_k) if mode == "rrf" else _by_spread(ranking)) for ranking in (dense, sparse))
    scores = {id_: dense_weight * score for id_, score in by_meaning.items()}
    for id_, score in by_words.items():
        scores[id_] = scores.get(id_, 0.0) + (1.0 - dense_weight) * score
    # Of two hundred candidates a dozen is wanted: the others need no more than a number.
    best = sorted([(-score, id_) for id_, score in scores.items()])[:most]
    meant, said = _places(dense), _places(sparse)
    return [Fused(id_, -negated, *meant.get(id_, (None, None)), *said.get(id_, (None, None))) for negated, id_ in best]


def _places(ranking: Sequence[Record]) -> dict[str, tuple[int, float]]:
    """Rank from 1 and score by id."""
    return {record.id: (rank, record.score) for rank, record in enumerate(ranking, 1)}


def _by_spread(ranking: Sequence[Record]) -> dict[str, float]:
    scores = [record.score for record in ranking]
    if not scores or min(scores) == max(scores):
        return {record.id: 0.5 for record in ranking}
    # By hand: `statistics` reckons in fractions, which takes a fifth of a whole recall and tells apart nothing that counts.
    mean = math.fsum(scores) / len(scores)
    spread = 2 * SPREADS * math.sqrt(math.fsum([(score - mean) ** 2 for score in scores]) / (len(scores) - 1))
    if not spread:
        return {record.id: 0.5 for record in ranking}  # they differ by less than a square can hold
    lowest = mean - spread / 2
    return {record.id: (record.score - lowest) / spread for record in ranking}


def _by_rank(ranking: Sequence[Record], k: int) -> dict[str, float]:
    return {record.id: 1.0 / (k + rank) for rank, record in enumerate(ranking, 1)}
