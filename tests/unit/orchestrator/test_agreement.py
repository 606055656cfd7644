"""How much two answers say the same."""

from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.agreement import agreement


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
