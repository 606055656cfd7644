"""How single words of a question are met by single words of texts."""

import json

import numpy as np
import pytest

from services.retrieval.late_interaction import CHARACTERS_PER_TOKEN, NUMBERS, QUESTION_TOKENS_MAX, Numbers, asked, nearness, sketched

DIMENSION = 384
PINNED = "'qI*%K)k<Z_BD03-B[SE0@R?"


def tokens(*seeds: int) -> Numbers:
    """A direction for each seed, always the same; two of them are hardly alike. The first is the longest."""
    rows = np.stack([np.random.default_rng(seed).standard_normal(DIMENSION).astype(np.float32) for seed in seeds])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.linspace(1.5, 1, len(seeds), dtype=np.float32)[:, None]


def text(*seeds: int) -> str:
    return sketched(tokens(*seeds), [len(seeds)])[0]


def near(question: Numbers, *texts: str) -> list[float]:
    question_tokens = asked(question)
    assert question_tokens is not None
    return nearness(question_tokens, texts)


def test_who_has_the_words_is_nearest() -> None:
    """In any order and among others; what has half of them is half as near."""
    both, one, none = near(tokens(1, 2), text(9, 2, 1, 8, 7), text(9, 2, 8, 6, 7), text(9, 3, 8, 6, 7))

    assert both > 0.75
    assert both > one + 0.2 > none + 0.4


def test_a_word_that_all_texts_have_tells_nothing() -> None:
    """So that the rare one decides, also where the question says the common one with more weight."""
    question = tokens(1, 2)
    question[0] *= 3
    common, rare = near(question, text(1, 8), text(1, 2))

    assert rare > common + 0.3


def test_a_text_is_sketched_alike_alone_and_in_company() -> None:
    """Each text takes so many characters a token that is kept, and JSON makes no more of them."""
    alone = (text(1, 2, 3, 4, 5), text(6), text(7, 8))
    together = np.concatenate([tokens(1, 2, 3, 4, 5), tokens(6), tokens(7, 8)])

    assert alone == sketched(together, [5, 1, 2])
    assert [3 * CHARACTERS_PER_TOKEN, CHARACTERS_PER_TOKEN, 2 * CHARACTERS_PER_TOKEN] == [len(sketch) for sketch in alone]
    assert len(json.dumps(alone[0])) == len(alone[0]) + 2


def test_of_a_text_the_longest_vectors_are_kept() -> None:
    """In whichever place; without those of the words that mean little it is the same text."""
    vectors = tokens(1, 2, 3, 4, 5)[[3, 0, 4, 1, 2]]

    assert "".join(text(one) for one in (1, 2, 3)) == sketched(vectors, [5])[0]


def test_sketches_stay_what_they_are() -> None:
    """They are kept: with another projection or alphabet, what is stored would mean nothing, so that the form needs another name."""
    vector = np.arange(DIMENSION, dtype=np.float32)[None] % 7 - 3

    assert PINNED == sketched(vector, [1])[0]


def test_a_question_of_no_word_asks_for_nothing() -> None:
    assert asked(np.zeros((0, DIMENSION), np.float32)) is None


def test_the_longest_vectors_of_a_long_question_count() -> None:
    """A question as long as the embedder reads costs no more than one of a sentence."""
    question = tokens(*range(254))
    question[100:104] *= 5
    kept = asked(question)

    assert kept is not None
    assert (QUESTION_TOKENS_MAX, NUMBERS) == kept.directions.shape
    assert {100, 101, 102, 103} == {int(np.argmax(tokens(*range(254)) @ question[place])) for place in range(100, 104)}
    assert sorted(np.linalg.norm(question, axis=1))[-4:] == pytest.approx(sorted(kept.weights)[-4:])


def test_vectors_of_nothing_are_near_nothing() -> None:
    """No division by zero: a model may give one."""
    nothing = np.zeros((2, DIMENSION), np.float32)

    assert [0.0, 0.0] == near(nothing, text(1), sketched(nothing, [2])[0])
    assert near(tokens(1), sketched(nothing, [2])[0], text(1))[1] > 0.5
