"""The embedder gives the model's own vectors, in every precision, and keeps its lanes apart."""

import asyncio
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.chassis.errors import Overloaded
from services.retrieval import minilm_embedder
from services.retrieval.minilm_conversion import WEIGHTS_MAX, in_int8, smoothing
from services.retrieval.minilm_embedder import BATCH_TOKENS_MAX, TOKENS_MAX, MiniLmEmbedder

EATING, BREAD = "A man is eating food.", "A man is eating a piece of bread."
PUBLISHED_COSINE = 0.7553
"""Of these two sentences, by the model's publishers."""


@pytest.fixture(scope="module")
async def embedder(state_dir: Path) -> AsyncIterator[MiniLmEmbedder]:
    """fp32, from the folder the service tests use as well."""
    embedder = await asyncio.to_thread(MiniLmEmbedder.load, state_dir / "models", "fp32")
    yield embedder
    embedder.close()


async def test_vectors_are_those_of_the_published_model(embedder: MiniLmEmbedder) -> None:
    """The converted graph computes what the original does, alone and in a batch."""
    together = (await embedder.embed_texts([EATING, BREAD])).vectors
    alone = np.concatenate([await embedder.embed_question(text) for text in (EATING, BREAD)])

    assert PUBLISHED_COSINE == pytest.approx(float(together[0] @ together[1]), abs=1e-3)
    assert np.allclose(together, alone, atol=1e-5)


async def test_int8_is_near_and_a_vector_does_not_depend_on_its_company(embedder: MiniLmEmbedder, state_dir: Path) -> None:
    """Of one letter too, and with an id of its own; together or alone it is the same vector, so that questions may share a batch."""
    texts = [EATING, BREAD, "x", "How many people live in Berlin?", "Wie viele Menschen leben in Berlin?", "word " * 200, "a b c"]
    small = await asyncio.to_thread(MiniLmEmbedder.load, state_dir / "models", "int8")
    try:
        near = [float((await small.embed_question(text))[0] @ (await embedder.embed_question(text))[0]) for text in texts]
        together = small._read_texts(small._encoded(texts[:5]))[0]
        alone = np.concatenate([await small.embed_question(text) for text in texts[:5]])
    finally:
        small.close()

    assert min(near) > 0.995 and float(np.mean(near)) > 0.998
    assert np.allclose(together, alone, atol=1e-6)
    assert small.embedder_id != embedder.embedder_id


async def test_a_question_is_embedded_in_memory_that_is_there(state_dir: Path) -> None:
    """Memory asked of the kernel anew for every run comes page by page, thousands of them for a long question."""
    small = await asyncio.to_thread(MiniLmEmbedder.load, state_dir / "models", "int8")
    try:
        for _ in range(3):
            await small.embed_question("word " * 200)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            await small.embed_question("word " * 200)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    finally:
        small.close()

    assert faults / 10 < 200


def test_rounded_weights_are_what_they_were_made_of() -> None:
    """Each within half a step of its column, columns of nothing included."""
    weight = np.random.default_rng(7).normal(size=(64, 3)).astype(np.float32)
    weight[:, 1] = 0
    weight[5, 2] = -40.0  # a column's worst
    rounded, scales = in_int8(weight)

    assert ((64, 3), (3,), np.int8) == (rounded.shape, scales.shape, rounded.dtype)
    assert (np.abs(rounded * scales - weight) <= scales * 0.501).all()
    assert np.abs(rounded.astype(int)).max() == WEIGHTS_MAX


def test_smoothing_evens_out_what_is_large_and_changes_no_product() -> None:
    """One channel of activations a hundred times the others: afterwards far less, and the product stays."""
    chance = np.random.default_rng(7)
    weight, activations = chance.normal(size=(64, 8)).astype(np.float32), chance.normal(size=(16, 64)).astype(np.float32)
    activations[:, 9] *= 100
    share = smoothing(np.abs(activations).max(axis=0), weight, 0.8)
    evened = activations / share

    assert np.allclose(evened @ (weight * share[:, None]), activations @ weight, rtol=1e-3, atol=1e-2)
    before, after = (np.abs(values).max(axis=0) for values in (activations, evened))
    assert after.max() / np.median(after) < before.max() / np.median(before) / 10


async def test_texts_beyond_the_limit_are_read_to_the_limit(embedder: MiniLmEmbedder) -> None:
    """What lies beyond changes nothing, and no more tokens are counted than were read."""
    long = "word " * 400
    embedded = await embedder.embed_texts([long, long + "completely different ending"])

    assert np.allclose(embedded.vectors[0], embedded.vectors[1])
    assert 2 * TOKENS_MAX == embedded.tokens
    assert [400] == embedder.count_tokens([long])


async def test_too_many_waiting_questions_are_refused_and_left_ones_dropped(
    embedder: MiniLmEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is bounded; a cancelled question makes room and is not computed."""
    monkeypatch.setattr(minilm_embedder, "QUESTIONS_WAITING_MAX", 3)
    waiting = [asyncio.create_task(embedder.embed_question("word " * 200)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await embedder.embed_question(EATING)
    waiting[2].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    assert (1, 384) == (await embedder.embed_question(EATING)).shape


@pytest.mark.slow
async def test_documents_do_not_delay_questions(embedder: MiniLmEmbedder) -> None:
    """With the documents' lane full all the time, the slow questions take no more than a few times what they take alone."""
    question = "How is the retention of records configured for a tenant?"
    texts = ["the quick brown fox jumps over the lazy dog again and again " * 18] * 64

    async def slow_s() -> float:
        """The 95th percentile; of few measurements the very slowest is the machine's."""
        took = []
        for _ in range(60):
            begun = time.perf_counter()
            await embedder.embed_question(question)
            took.append(time.perf_counter() - begun)
        return sorted(took)[56]

    async def flood() -> None:
        while True:
            await embedder.embed_texts(texts)

    idle = await slow_s()
    floods = [asyncio.create_task(flood()) for _ in range(3)]
    try:
        await asyncio.sleep(0)
        loaded = await slow_s()
    finally:
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)

    # In one lane each question would wait for a batch of 256 tokens, or for all that wait: ten times as long, or hundreds.
    assert loaded < 8 * idle


async def test_questions_that_wait_together_go_together(embedder: MiniLmEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four, alike in length, oldest first; nobody waits for company and nobody is passed over."""
    batches: list[tuple[str, ...]] = []
    run = embedder._read_questions

    def noted(texts: tuple[str, ...]) -> Any:
        batches.append(texts)
        return run(texts)

    monkeypatch.setattr(embedder, "_read_questions", noted)
    short, long = [f"short question {number}" for number in range(6)], "a long one " * 60
    await asyncio.gather(*(embedder.embed_question(text) for text in (short[0], short[1], long, *short[2:])))

    assert [(*short[:2], *short[2:4]), (long,), tuple(short[4:])] == batches


def test_batches_hold_every_text_once_and_little_padding() -> None:
    """Whatever the lengths, no batch is larger than its bound unless one text alone is."""
    widths = [7, TOKENS_MAX, 9, 122, 122, 122, 252, 3, TOKENS_MAX, 62, 62]
    batches = minilm_embedder._batches(widths)

    assert list(range(len(widths))) == sorted(place for batch in batches for place in batch)
    for batch in batches:
        assert max(widths[place] for place in batch) * len(batch) <= BATCH_TOKENS_MAX
