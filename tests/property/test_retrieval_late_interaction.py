"""What is reckoned in blocks and from characters is what the definition says, however many tokens and texts there are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.retrieval.late_interaction import NUMBERS, QUESTION_TOKENS_MAX, ZERO_BELOW, asked, kept_of, nearness, sketched


def plainly(question: np.ndarray, texts: list[np.ndarray]) -> list[float]:
    """The definition, text by text and token by token. The projection is read off single coordinates."""
    projection = np.stack([_shortened(row) for row in np.eye(question.shape[1], dtype=np.float32)])
    long = np.argsort(-np.linalg.norm(question, axis=1), kind="stable")[:QUESTION_TOKENS_MAX]
    weights = np.linalg.norm(question[long], axis=1)
    directions = question[long] @ projection
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    best = []
    for text in texts:
        long_of_text = np.argsort(-np.linalg.norm(text, axis=1), kind="stable")[: kept_of(len(text))]
        short = text[long_of_text] @ projection
        spread = np.sqrt((short**2).mean(axis=1, keepdims=True))
        signs = np.where(np.abs(short) > ZERO_BELOW * spread, np.sign(short), 0.0)
        best.append((directions @ (signs / np.linalg.norm(signs, axis=1, keepdims=True)).T).max(axis=1))
    matched = np.stack(best, axis=1)
    telling = weights * (1 - matched.mean(axis=1))
    return [float(value) for value in telling @ matched / telling.sum()]


def _shortened(row: np.ndarray) -> np.ndarray:
    """Where one coordinate goes."""
    one = asked(row[None])
    assert one is not None
    return np.rint(one.directions[0] * np.sqrt(NUMBERS))


@settings(max_examples=40, deadline=None)
@given(
    asked_tokens=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 256), min_size=1, max_size=21),
    dimension=st.sampled_from([32, 384]),
    seed=st.integers(0, 2**32 - 1),
)
def test_nearness_is_as_defined(asked_tokens: int, lengths: list[int], dimension: int, seed: int) -> None:
    """Blocks, packing and the choice of the question's tokens leave no trace in the result."""
    chance = np.random.default_rng(seed)

    def vectors(count: int) -> np.ndarray:
        # In small whole numbers, whose sums are the same in every order: what lies at the bound of being 0 lies there for both.
        return chance.integers(-2, 3, (count, dimension)).astype(np.float32) + np.eye(1, dimension, dtype=np.float32)

    question, texts = vectors(asked_tokens), [vectors(length) for length in lengths]
    tokens = asked(question)

    assert tokens is not None
    assert plainly(question, texts) == pytest.approx(nearness(tokens, sketched(np.concatenate(texts), lengths)), abs=1e-4)
