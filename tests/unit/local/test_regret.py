"""What the choice of tier saved and lost, with intervals."""

import random
from dataclasses import dataclass, field
from typing import Any

from services.local.regret import PAIRS_LEAST, Pair, pairs_of, regret_of, table


@dataclass
class Step:
    name: str
    facts: dict[str, str]


@dataclass
class Operation:
    status: str = "done"
    cost_nanousd: int = 10
    steps: list[Any] = field(default_factory=list)


def compared(**changes: str) -> Step:
    facts = {"tier": "fast", "other_tier": "smart", "cost_nanousd": "2", "verdict": "cut", "other_verdict": "passed", "agreement": "0.5"}
    return Step("compare", facts | changes)


def test_only_whole_comparisons_count() -> None:
    """A shadow that failed, or another operation of the tenant, is no pair."""
    operations = [
        Operation(steps=[compared()]),
        Operation("failed", steps=[compared()]),
        Operation(steps=[Step("recall", {})]),
        Operation(),
    ]

    assert pairs_of(operations) == {("fast", "smart"): [Pair(2, 10, False, True, 0.5)]}


def test_figures_are_what_they_say() -> None:
    """Saved: of the other tier's cost. Lost: passed there and not here, less the other way round."""
    pairs = [Pair(1, 10, True, True, 1.0), Pair(3, 10, False, True, 0.5), Pair(2, 10, True, False, 0.0), Pair(2, 10, False, True, 0.5)]
    regret = regret_of("fast", "smart", pairs)

    assert regret.saved.value == 0.8
    assert regret.lost.value == 0.25
    assert regret.agreement.value == 0.5
    assert regret.saved.low <= 0.8 <= regret.saved.high
    assert f"fewer than {PAIRS_LEAST}" in table([regret])


def test_groundedness_and_meaning_are_compared_where_they_were_measured() -> None:
    """Older comparisons have neither, and answers without a judged citation no groundedness: such pairs do not count there."""
    operations = [
        Operation(steps=[compared()]),
        Operation(steps=[compared(groundedness="0.5", other_groundedness="1.0", similarity="0.9")]),
        Operation(steps=[compared(groundedness="1.0", other_groundedness="0.8", similarity="0.7")]),
        Operation(steps=[compared(other_groundedness="0.8", similarity="0.8")]),
    ]
    regret = regret_of("fast", "smart", pairs_of(operations)["fast", "smart"])

    assert regret.grounded_lost is not None and round(regret.grounded_lost.value, 6) == 0.15
    assert regret.similarity is not None and round(regret.similarity.value, 6) == 0.8
    assert regret.similarity.low <= 0.8 <= regret.similarity.high
    assert "groundedness lost" in table([regret]) and "likeness in meaning" in table([regret])
    assert "groundedness" not in table([regret_of("fast", "smart", [Pair(2, 10, False, True, 0.5)])])


def test_dearer_tier_saves_less_than_nothing_and_a_free_one_divides_by_nothing() -> None:
    """Signs are told as they are."""
    assert regret_of("smart", "fast", [Pair(20, 10, True, True, 1.0)]).saved.value == -1
    assert regret_of("fast", "extractive", [Pair(5, 0, True, True, 1.0)]).saved.value == 0


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """A known loss of a tenth, 60 samples of 80 pairs: a 95 % interval misses it rarely."""
    chance, missed = random.Random(5), 0
    for seed in range(60):
        pairs = [Pair(1, 10, chance.random() >= 0.1, True, 1.0) for _ in range(80)]
        lost = regret_of("fast", "smart", pairs, seed).lost
        missed += not lost.low <= 0.1 <= lost.high

    assert missed <= 9


def test_nothing_compared_is_said() -> None:
    """And where to read about it."""
    assert "docs/models.md" in table([])
