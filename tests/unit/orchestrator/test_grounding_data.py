"""The bars of `make bench-checks`, on a sample of real claims and citations."""

import random
from pathlib import Path

import pytest

from bench.grounding_pairs import Pair, right_and_wrong
from services.orchestrator.grounding import SUPPORT_MIN, Evidence, support

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SAMPLE = 400

pytestmark = pytest.mark.skipif(not (DATA / "grounding").is_dir(), reason="the grounding data is not at hand")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return right_and_wrong(DATA, random.Random("a fixed sample"))


def flagged(pairs: list[Pair], kinds: set[str], *, follows: bool) -> float:
    """Share of a sample that is flagged."""
    found = [pair for pair in pairs if pair.kind in kinds and pair.follows is follows]
    sample = random.Random("the same").sample(found, min(SAMPLE, len(found)))
    supports = [support(pair.sentence, Evidence((pair.passage,))) for pair in sample]
    assert len(sample) >= 150
    return sum(value is not None and value < SUPPORT_MIN for value in supports) / len(sample)


def test_swapped_citations_are_flagged(pairs: list[Pair]) -> None:
    """A sentence with another document's passage does not follow from it."""
    assert flagged(pairs, {"claim", "quote"}, follows=False) >= 0.9


def test_right_citations_are_spared(pairs: list[Pair]) -> None:
    """Quoted or in somebody's own words."""
    assert flagged(pairs, {"claim", "quote"}, follows=True) <= 0.1


def test_changed_figures_are_flagged(pairs: list[Pair]) -> None:
    """Word for word the passage, but for a number."""
    assert flagged(pairs, {"figure"}, follows=False) >= 0.9
