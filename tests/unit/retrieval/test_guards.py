"""Which questions may share an answer."""

import pytest

from services.retrieval.guards import difference, normalised

SAME = [
    ("What is the default timeout?", "what's the default  timeout"),
    ("What is the default timeout?", "Tell me the default timeout."),
    ("What is the default timeout?", "Could you please tell me what the default timeout is?"),
    ("What is known about solar power?", "What do we know about solar power?"),
    ("How do I reset my password?", "What is the way to reset my password?"),
    ("How can I sort a list in Python?", "In Python, how do I sort a list?"),
    ("Can I get a refund within 30 days?", "Can I get a refund within thirty days?"),
    ("What is the maximum size?", "What's the max size?"),
    ("who founded apple", "Who founded Apple?"),
    ("Is 1,000 the limit?", "Is 1000 the limit?"),
    ("What is the difference between tea and coffee?", "What is the difference between coffee and tea?"),
]

DIFFERENT = [
    ("What is the limit in 2023?", "What is the limit in 2024?", "guard_numbers"),
    ("Is 5 of 10 enough?", "Is 10 of 5 enough?", "guard_order"),
    ("How far is 5 km?", "How far is 5 miles?", "guard_numbers"),
    ("What happens on Monday?", "What happens on Tuesday?", "guard_dates"),
    ("Is it safe to use?", "Is it not safe to use?", "guard_negation"),
    ("Can I pay with a card?", "Can't I pay with a card?", "guard_negation"),
    ("Is it possible with tools?", "Is it possible without tools?", "guard_negation"),
    ("Who founded Apple?", "Who founded Google?", "guard_names"),
    ("Are there holidays in the US?", "Are there holidays?", "guard_names"),
    ("What does `foo` return?", "What does `bar` return?", "guard_quoted"),
    ("What is set_timeout()?", "What is get_timeout()?", "guard_names"),
    ("When was it built?", "Where was it built?", "guard_question"),
    ("Why is it slow?", "Is it slow?", "guard_question"),
    ("Who are you?", "Who am I?", "guard_question"),
    ("Should I take it?", "Can I take it?", "guard_question"),
    ("How many users are there?", "How much users are there?", "guard_question"),
    ("Who is the president?", "Who was the president?", "guard_tense"),
    ("What is the best MP3 player?", "What is the best MP3 player? Why?", "guard_question"),
    ("How do I enable logging?", "How do I disable logging?", "guard_opposite"),
    ("What is the largest planet?", "What is the smallest planet?", "guard_opposite"),
    ("Does aspirin weaken ibuprofen?", "Does ibuprofen weaken aspirin?", "guard_order"),
    ("How do I convert celsius to fahrenheit?", "How do I convert fahrenheit to celsius?", "guard_order"),
    ("Can I cancel my order?", "Can I change my order?", "guard_words"),
    ("What is the refund policy for books?", "What is the refund policy?", "guard_words"),
    ("How does this circuit work?", "How do these circuits work?", "context_dependent"),
    ("Wie hoch ist der Zoll auf die Ware?", "What is the duty on the goods?", "guard_language"),
    ("Что такое кэш?", "What is a cache?", "guard_language"),
]


@pytest.mark.parametrize(("asked", "answered"), SAME)
def test_questions_that_ask_the_same_may_share_an_answer(asked: str, answered: str) -> None:
    """Politeness, contractions, word forms and a moved circumstance change nothing, whichever question came first."""
    assert (difference(asked, answered), difference(answered, asked)) == ("", "")


@pytest.mark.parametrize(("asked", "answered", "reason"), DIFFERENT)
def test_questions_with_different_answers_are_kept_apart(asked: str, answered: str, reason: str) -> None:
    """Every guard refuses its kind of difference, whichever question came first."""
    assert (reason, reason) == (difference(asked, answered), difference(answered, asked))


def test_normalising_leaves_only_what_makes_a_difference() -> None:
    """Case, width, spaces and closing punctuation go; everything else stays."""
    assert "what is ｆｏｏ-1".replace("ｆｏｏ", "foo") == normalised("  What  IS ｆｏｏ-1 ?! ")


@pytest.mark.parametrize("odd", ["?", "…", "1", "`", "''", "\u200f", "a" * 30_000])
def test_odd_questions_are_read_without_harm(odd: str) -> None:
    """A question without words equals itself and nothing else."""
    assert difference(odd, odd) == ""
    assert difference(odd, "What is the default timeout?")
