"""Two rankings made one: how scores of meaning and of words are put on one scale, and how much each counts. Pure; no store and no wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

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


def fused(dense: Sequence[Record], sparse: Sequence[Record], dense_weight: float, mode: str = "dbsf", rrf_k: int = 60) -> list[Fused]:
    """All candidates of both, best first. `dense_weight` is the share of meaning, 0-1; ties go by id."""
    by_meaning, by_words = ((_by_rank(ranking, rrf_k) if mode == "rrf" else _by_spread(ranking)) for ranking in (dense, sparse))
    meant = {record.id: (rank, record.score) for rank, record in enumerate(dense, 1)}
    said = {record.id: (rank, record.score) for rank, record in enumerate(sparse, 1)}
    candidates = [
        Fused(
            id_,
            dense_weight * by_meaning.get(id_, 0.0) + (1.0 - dense_weight) * by_words.get(id_, 0.0),
            *meant.get(id_, (None, None)),
            *said.get(id_, (None, None)),
        )
        for id_ in meant.keys() | said.keys()
    ]
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.id))


def _by_spread(ranking: Sequence[Record]) -> Mapping[str, float]:
    scores = [record.score for record in ranking]
    spread = 2 * SPREADS * stdev(scores) if len(scores) > 1 else 0.0
    if not spread:
        return {record.id: 0.5 for record in ranking}
    lowest = fmean(scores) - spread / 2
    return {record.id: (record.score - lowest) / spread for record in ranking}


def _by_rank(ranking: Sequence[Record], k: int) -> Mapping[str, float]:
    return {record.id: 1.0 / (k + rank) for rank, record in enumerate(ranking, 1)}
