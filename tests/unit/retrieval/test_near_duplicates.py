"""Which passages repeat another: copies do, versions with other numbers and opposites do not."""

from hypothesis import given
from hypothesis import strategies as st

from services.retrieval.near_duplicates import distinct

RULE = (
    "The heron gate is opened by the keeper at high water, after the bell has been rung twice and the barges have left the lower basin "
    "on the side of the mill, so that nobody stands below it."
)


def test_a_copy_with_another_layout_is_a_copy() -> None:
    """Case, punctuation, order of lines and one word more do not make another text."""
    copies = [RULE, RULE.upper(), f"{RULE} Hello!", "\n".join(reversed(RULE.split(", ")))]

    assert [0] == distinct(copies, 10)


def test_numbers_and_negations_make_another_text() -> None:
    """Two versions of a rule differ in what matters most."""
    texts = [RULE, RULE.replace("twice", "2 times"), f"{RULE} Never!", RULE.replace("keeper", "keeper of gate 7")]

    assert [0, 1, 2, 3] == distinct(texts, 10)


def test_no_more_than_are_wanted_and_the_best_of_each_kind() -> None:
    """The first of those that say the same stands for them."""
    assert [0, 2] == distinct([RULE, RULE, "Something else.", "And again another."], 2)
    assert [] == distinct([], 5)


@given(st.lists(st.text(max_size=40), max_size=12), st.integers(1, 12))
def test_what_is_kept_is_in_order_and_what_is_not_repeats_something_kept(texts: list[str], most: int) -> None:
    """Places rise; exact copies never stand twice."""
    kept = distinct(texts, most)

    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert len({texts[place] for place in kept}) == len(kept)
    assert distinct([texts[place] for place in kept], most) == list(range(len(kept)))
