"""Titles by rule."""

import pytest

from services.ledger.titles import RULE_CHARACTERS_MAX, title_of


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("Which port does it use?", "Which port does it use?"),
        ("  Which\tport \n does it use?", "Which port"),
        ("# **Heading**\ntext", "Heading"),
        ("```\n***\nprint(1)\n```", "print(1)"),
        ("???", "???"),
        ("\n\n- first\n- second", "first"),
    ],
)
def test_title_is_the_first_line_that_says_something(question: str, title: str) -> None:
    """Without Markdown's marks and without line ends."""
    assert title_of(question) == title


def test_a_long_question_is_cut_between_words_and_says_so() -> None:
    """A script without spaces is cut where it is."""
    long, wide = title_of("What is " + "word " * 40), title_of("東" * 200)

    assert long.endswith("word…")
    assert len(long) <= RULE_CHARACTERS_MAX
    assert wide == "東" * (RULE_CHARACTERS_MAX - 1) + "…"
