"""What a ranking or a run is worth, as numbers. Pure: no service, no files, no clock."""

import itertools
import math
from collections.abc import Iterable, Sequence

Span = tuple[int, int]
"""First character, and one past the last."""


def ndcg(ranked: Sequence[str], relevant: dict[str, int], depth: int = 10) -> float:
    """Discounted gain of the first `depth`, as a share of the best possible."""
    gained = sum(relevant.get(id_, 0) / math.log2(place + 2) for place, id_ in enumerate(ranked[:depth]))
    best = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(relevant.values(), reverse=True)[:depth]))
    return gained / best if best else 0.0


def recall(ranked: Sequence[str], relevant: dict[str, int], depth: int = 100) -> float:
    """Share of the relevant documents among the first `depth`."""
    wanted = {id_ for id_, gain in relevant.items() if gain > 0}
    return len(wanted & set(ranked[:depth])) / len(wanted) if wanted else 0.0


def covered(spans: Iterable[Span]) -> list[Span]:
    """The same characters as `spans`, each once, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[Span]) -> int:
    """How many different characters `spans` hold."""
    return sum(end - start for start, end in covered(spans))


def common(left: Iterable[Span], right: Iterable[Span]) -> int:
    """How many different characters lie in both."""
    others = covered(right)
    return sum(max(0, min(end, last) - max(start, first)) for start, end in covered(left) for first, last in others)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def backwards(stages: Sequence[str], order: Sequence[str]) -> int:
    """How often a stage is followed by one that comes before it."""
    places = [order.index(stage) for stage in stages]
    return sum(after < before for before, after in itertools.pairwise(places))
