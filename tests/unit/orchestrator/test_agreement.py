"""How much two answers say the same."""

from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.agreement import PART_CHARACTERS, PARTS_MAX, agreement, parts_of, similarity


def test_words_that_carry_meaning_decide() -> None:
    """Order, case, markers and little words do not count; a number that differs does."""
    assert agreement("The gateway listens on port 8080 [1].", "On port 8080 the Gateway listens.") == 1
    assert agreement("It costs 10 EUR.", "It costs 12 EUR.") < 1
    assert agreement("Water flows.", "Prices rise.") == 0


def test_nothing_agrees_with_nothing_alone() -> None:
    """An empty answer and a full one have nothing in common."""
    assert agreement("", " [1] ") == 1
    assert agreement("", "Water.") == 0


@given(st.text(max_size=200), st.text(max_size=200))
def test_agreement_is_a_share_and_goes_both_ways(one: str, other: str) -> None:
    """Neither text is the measure of the other."""
    assert 0 <= agreement(one, other) == agreement(other, one) <= 1
    assert agreement(one, one) == 1


def test_likeness_is_the_cosine_of_what_the_parts_mean_together() -> None:
    """However many parts an answer has; two that point nowhere, or one that is empty, cannot be compared."""
    assert similarity([[1.0, 0.0]], [[0.0, 1.0]]) == 0
    assert round(similarity([[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.6]]) or 0, 9) == 1
    assert similarity([[1.0, 0.0]], [[-1.0, 0.0]]) == -1
    assert similarity([], [[1.0]]) is None and similarity([[1.0], [-1.0]], [[1.0]]) is None


def test_parts_are_bounded_and_hold_no_markers() -> None:
    """Numbers of passages mean nothing, and differ between two answers that say the same."""
    assert parts_of(" Water flows [1], it says [2, 3]. ") == ["Water flows , it says ."]
    assert parts_of(" [1] ") == []
    assert [len(part) for part in parts_of("x" * 100_000)] == [PART_CHARACTERS] * PARTS_MAX
