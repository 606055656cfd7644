"""The embedder gives the model's own vectors, in every precision, and keeps its lanes apart."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.chassis.errors import Overloaded
from services.retrieval import minilm_embedder
from services.retrieval.minilm_conversion import Q8_BLOCK, in_blocks
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


@pytest.mark.slow
async def test_int8_is_near_and_has_its_own_id(embedder: MiniLmEmbedder, state_dir: Path) -> None:
    """Close enough to find by, different enough never to be mixed."""
    small = await asyncio.to_thread(MiniLmEmbedder.load, state_dir / "models", "int8")
    try:
        near = (await small.embed_question(EATING))[0] @ (await embedder.embed_question(EATING))[0]
    finally:
        small.close()

    assert near > 0.98
    assert small.embedder_id != embedder.embedder_id


async def test_q8_is_nearer_and_a_vector_does_not_depend_on_its_company(embedder: MiniLmEmbedder, state_dir: Path) -> None:
    """A tenth of int8's error, of one letter a third, and an id of its own; together or alone it is the same vector, so that questions
    may share a batch."""
    texts = [EATING, BREAD, "x", "How many people live in Berlin?", "Wie viele Menschen leben in Berlin?", "word " * 200, "a b c"]
    small = await asyncio.to_thread(MiniLmEmbedder.load, state_dir / "models", "q8")
    try:
        near = [float((await small.embed_question(text))[0] @ (await embedder.embed_question(text))[0]) for text in texts]
        together = small._embed(tuple(texts[:5]))
        alone = np.concatenate([await small.embed_question(text) for text in texts[:5]])
    finally:
        small.close()

    assert min(near) > 0.997 and float(np.mean(near)) > 0.9990
    assert np.allclose(together, alone, atol=1e-6)
    assert small.embedder_id != embedder.embedder_id


def test_blocks_of_weights_hold_what_they_were_made_of() -> None:
    """Each weight within half a step of its block's scale, blocks of nothing included; the layout is column by column."""
    chance = np.random.default_rng(7)
    weight = chance.normal(size=(2 * Q8_BLOCK, 3)).astype(np.float32)
    weight[:Q8_BLOCK, 1] = 0
    weight[5, 2] = -40.0  # a block's worst: its sign must not wrap round
    blocks, scales = in_blocks(weight)
    again = ((blocks.astype(np.float32) - 128) * scales[..., None]).reshape(3, -1).T

    assert ((3, 2, Q8_BLOCK), (3, 2), np.uint8) == (blocks.shape, scales.shape, blocks.dtype)
    assert (np.abs(again - weight) <= np.repeat(scales.T, Q8_BLOCK, axis=0) * 0.501).all()


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

    # In one lane each question would wait for a batch of 1024 tokens: 25 times as long.
    assert loaded < 8 * idle


async def test_questions_that_wait_together_go_together(embedder: MiniLmEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four, alike in length, oldest first; nobody waits for company and nobody is passed over."""
    batches: list[tuple[str, ...]] = []
    run = embedder._embed

    def noted(texts: tuple[str, ...]) -> Any:
        batches.append(texts)
        return run(texts)

    monkeypatch.setattr(embedder, "_embed", noted)
    short, long = [f"short question {number}" for number in range(6)], "a long one " * 60
    await asyncio.gather(*(embedder.embed_question(text) for text in (short[0], short[1], long, *short[2:])))

    assert [(*short[:2], *short[2:4]), (long,), tuple(short[4:])] == batches


def test_batches_hold_every_text_once_and_little_padding() -> None:
    """Whatever the lengths, no batch is larger than its bound unless one text alone is."""
    lengths = [5, 300, 7, 120, 120, 120, 250, 1, 254, 60, 60]
    batches = minilm_embedder._batches(lengths)

    assert list(range(len(lengths))) == sorted(place for batch in batches for place in batch)
    for batch in batches:
        width = min(max(lengths[place] for place in batch) + 2, TOKENS_MAX)
        assert width * len(batch) <= BATCH_TOKENS_MAX
