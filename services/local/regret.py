"""What the choice of tier saved and what it cost in quality, from operations of shadow answers. Pure; the command reads and prints.

The intervals are of the sample alone: percentile bootstrap over its pairs.
"""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 1_000
LEVEL = 0.95
STEP = "compare"
"""Step of a shadow operation whose facts hold the comparison."""
GROUNDED = frozenset({"groundedness", "other_groundedness"})
PAIRS_LEAST = 30
"""With fewer pairs than this the intervals say little, and the table says so."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An answer and its shadow."""

    cost_nanousd: int
    other_cost_nanousd: int
    passed: bool
    other_passed: bool
    agreement: float
    grounded_lost: float | None = None
    """Groundedness of the other answer less that of this one; None if not both cite anything that was judged."""
    similarity: float | None = None
    """Cosine of both answers' meaning; None if it was not measured."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Regret:
    """A tier against the one its sample was answered by as well."""

    tier: str
    other_tier: str
    pairs: int
    saved: Estimate
    """Share of the other tier's cost that was not spent; below 0 = this tier was the dearer one."""
    lost: Estimate
    """Share of answers that passed the checks there and not here, less those the other way round."""
    agreement: Estimate
    """How much both say the same by their words, 0-1, in the mean."""
    grounded_lost: Estimate | None
    """What of groundedness was lost, in the mean over the pairs that have one on both sides; below 0 = this tier's was better."""
    similarity: Estimate | None
    """How near both are in meaning, by the embedder, in the mean over the pairs where it was measured."""


def pairs_of(operations: Iterable[Any]) -> Mapping[tuple[str, str], Sequence[Pair]]:
    """Pairs by tier and other tier. Operations that are no whole comparison are passed over."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for operation in operations:
        facts = next((step.facts for step in operation.steps if step.name == STEP), None)
        if operation.status != "done" or not facts:
            continue
        pair = Pair(
            int(facts["cost_nanousd"]),
            operation.cost_nanousd,
            facts["verdict"] == "passed",
            facts["other_verdict"] == "passed",
            float(facts["agreement"]),
            float(facts["other_groundedness"]) - float(facts["groundedness"]) if facts.keys() >= GROUNDED else None,
            float(facts["similarity"]) if "similarity" in facts else None,
        )
        found.setdefault((facts["tier"], facts["other_tier"]), []).append(pair)
    return found


def regret_of(tier: str, other_tier: str, pairs: Sequence[Pair], seed: int = 0) -> Regret:
    """Work out the figures of at least one pair. The same pairs and seed give the same intervals."""
    chance = random.Random(seed)  # noqa: S311 - a statistic, not a secret
    samples = [chance.choices(pairs, k=len(pairs)) for _ in range(RESAMPLES)]

    def interval(value: float, drawn: list[float]) -> Estimate:
        tail = int((1 - LEVEL) / 2 * len(drawn))
        return Estimate(value, drawn[tail], drawn[-1 - tail])

    def estimate(figure: Callable[[Sequence[Pair]], float]) -> Estimate:
        return interval(figure(pairs), sorted(map(figure, samples)))

    def mean_of(values: Sequence[float | None]) -> Estimate | None:
        there = [value for value in values if value is not None]
        if not there:
            return None
        return interval(statistics.fmean(there), sorted(statistics.fmean(chance.choices(there, k=len(there))) for _ in range(RESAMPLES)))

    return Regret(
        tier,
        other_tier,
        len(pairs),
        estimate(_saved),
        estimate(_lost),
        estimate(_agreement),
        mean_of([pair.grounded_lost for pair in pairs]),
        mean_of([pair.similarity for pair in pairs]),
    )


def table(regrets: Sequence[Regret]) -> str:
    """The figures as lines for people."""
    if not regrets:
        return "no shadow answers here: see `shadow` in docs/models.md, and ask with a token of the tenant they are booked on"
    lines = []
    for regret in regrets:
        few = f", fewer than {PAIRS_LEAST}: the intervals say little" if regret.pairs < PAIRS_LEAST else ""
        lines.append(f"{regret.tier} instead of {regret.other_tier} ({regret.pairs} pairs{few})")
        figures = {
            "cost saved": regret.saved,
            "passed checks lost": regret.lost,
            "groundedness lost": regret.grounded_lost,
            "agreement by words": regret.agreement,
            "likeness in meaning": regret.similarity,
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            lines.append(f"  {name:<20}{figure.value:>7.1%}   {LEVEL:.0%}: {figure.low:.1%} to {figure.high:.1%}")
    return "\n".join(lines)


def _saved(pairs: Sequence[Pair]) -> float:
    other = sum(pair.other_cost_nanousd for pair in pairs)
    return 1 - sum(pair.cost_nanousd for pair in pairs) / other if other else 0.0


def _lost(pairs: Sequence[Pair]) -> float:
    return sum(pair.other_passed - pair.passed for pair in pairs) / len(pairs)


def _agreement(pairs: Sequence[Pair]) -> float:
    return sum(pair.agreement for pair in pairs) / len(pairs)
