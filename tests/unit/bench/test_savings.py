"""The stream of questions whose bill is measured: what comes again, and how often."""

import random

import pytest

from bench.savings import stream_of

CLUSTERS = {f"c{number}": [f"Wording {wording} of {number}?" for wording in range(4)] for number in range(500)}


@pytest.mark.parametrize("again", [0.0, 0.3, 0.7, 1.0])
def test_the_wanted_share_of_questions_comes_again(again: float) -> None:
    """Within what chance makes of 500; the first question can repeat nothing."""
    asked = stream_of(CLUSTERS, 500, again, random.Random(7))
    repeated = len(asked) - len({question.meaning for question in asked})

    assert len(asked) == 500
    assert repeated / 500 == pytest.approx(again, abs=0.06)


def test_questions_come_again_in_any_of_their_wordings() -> None:
    """A stream of mere copies would measure the exact tier alone."""
    asked = stream_of({"c": CLUSTERS["c0"]}, 200, 1.0, random.Random(7))

    assert {question.text for question in asked} == set(CLUSTERS["c0"])


def test_what_a_question_asks_is_known_by_its_wording() -> None:
    """Or an answer to something else could pass for the right one."""
    asked = stream_of(CLUSTERS, 300, 0.5, random.Random(7))

    assert all(question.text in CLUSTERS[question.meaning] for question in asked)


def test_the_same_seed_asks_the_same() -> None:
    """A run can be replayed."""
    assert stream_of(CLUSTERS, 100, 0.5, random.Random("a")) == stream_of(CLUSTERS, 100, 0.5, random.Random("a"))
    assert stream_of(CLUSTERS, 100, 0.5, random.Random("a")) != stream_of(CLUSTERS, 100, 0.5, random.Random("b"))
