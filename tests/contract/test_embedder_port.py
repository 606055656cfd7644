"""The Embedder port, on every adapter: MiniLM itself, fastembed on MiniLM's converted weights, remote ones against a service of our own."""

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.responses import JSONResponse

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelRefused, Overloaded, Unavailable
from services.retrieval import minilm_conversion
from services.retrieval.config import Settings
from services.retrieval.embedders import EmbedderUnknown, opened
from services.retrieval.late_interaction import CHARACTERS_PER_TOKEN, kept_of, nearness
from services.retrieval.minilm_embedder import MiniLmEmbedder
from services.retrieval.ports import Embedder
from services.retrieval.remote_embedding import QUESTION_RUNS_MAX, RemoteEmbedder
from tests.fakes.embedding_service import DIMENSION, EmbeddingService, embedding_service

KEY = "a key that only the tests know"
EATING, BREAD, STORM = "A man is eating food.", "A man is eating a piece of bread.", "The storm tore the roof off the old barn."
needs_fastembed = pytest.mark.skipif(importlib.util.find_spec("fastembed") is None, reason="the extra [fastembed] is not installed")
REMOTE = ["openai", "openai-base64", "voyage", "gemini"]
MINILM = ["minilm-int8", "minilm"]
KINDS = [*MINILM, pytest.param("fastembed", marks=needs_fastembed), *REMOTE]


def settings_for(folder: Path, **values: Any) -> Settings:
    return Settings(state_dir=folder, internal_key=KEY, **values)


def remote_settings(folder: Path, service: EmbeddingService, **values: Any) -> Settings:
    return settings_for(folder, **{"embedder_url": f"{service.url}/v1", "embedder_dimensions": DIMENSION, "embedder_key": KEY, **values})


@pytest.fixture
async def service() -> AsyncIterator[EmbeddingService]:
    """A service that wants our key."""
    async with embedding_service() as running:
        running.key = KEY
        yield running


@contextlib.asynccontextmanager
async def open_one(kind: str, folder: Path, service: EmbeddingService, **values: Any) -> AsyncIterator[Embedder]:
    """An embedder of this kind."""
    if kind in MINILM:
        settings, name = settings_for(folder), kind
    elif kind == "fastembed":
        # Its own model is MiniLM as published, in the form that fastembed reads: token embeddings in, one output.
        settings = settings_for(folder, embedder_folder=await asyncio.to_thread(fastembed_folder, folder), embedder_dimensions=384)
        name = "fastembed:local/minilm"
    elif kind == "gemini":
        settings, name = remote_settings(folder, service, **{"embedder_url": service.url, **values}), "gemini:embedding-x"
    else:
        encoding = "base64" if kind == "openai-base64" else "float"
        settings = remote_settings(folder, service, **{"embedder_encoding": encoding, **values})
        name = "voyage:voyage-x" if kind == "voyage" else "openai:model-x"
    async with opened(name, settings) as embedder:
        yield embedder


def fastembed_folder(folder: Path) -> Path:
    """A model folder for fastembed: our conversion wants int32 inputs, so the graph is wrapped in casts."""
    import onnx
    from onnx import TensorProto, helper

    made = folder / "fastembed-minilm"
    if (made / "model.onnx").is_file():
        return made
    MiniLmEmbedder.load(folder / "models", "fp32").close()
    (source,) = (folder / "models").glob("minilm-l6-v2-fp32-*")
    model = onnx.load(source / "model.onnx")
    graph = model.graph
    names = {one.name: f"{one.name}_32" for one in graph.input}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    shapes = list(names)
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in shapes)
    casts = [helper.make_node("Cast", [name], [narrow], to=TensorProto.INT32) for name, narrow in names.items()]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    made.mkdir(parents=True, exist_ok=True)
    onnx.save(model, made / "model.onnx")
    published = minilm_conversion.published()
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (made / name).write_bytes((published / name).read_bytes())
    return made


@pytest.fixture(params=KINDS)
async def embedder(request: pytest.FixtureRequest, state_dir: Path, service: EmbeddingService) -> AsyncIterator[Embedder]:
    """One of each."""
    async with open_one(request.param, state_dir, service) as made:
        yield made


async def test_vectors_have_the_promised_length_and_unit_length(embedder: Embedder) -> None:
    """In the order of the texts, whatever their lengths; tokens are counted."""
    texts = [STORM, EATING, "word " * 120, BREAD, "x"]
    embedded = await embedder.embed_texts(texts)

    assert (5, embedder.dimension) == embedded.vectors.shape
    assert np.float32 == embedded.vectors.dtype
    assert np.linalg.norm(embedded.vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-4)
    assert embedded.tokens > 0
    for place, text in enumerate(texts):
        alone = (await embedder.embed_texts([text])).vectors[0]
        assert float(alone @ embedded.vectors[place]) == pytest.approx(1, abs=1e-4), text


async def test_a_question_is_nearest_to_what_is_about_the_same(embedder: Embedder) -> None:
    """Questions and documents are in one space."""
    question = await embedder.embed_question("Who is eating bread, a man?")
    documents = (await embedder.embed_texts([STORM, BREAD])).vectors

    assert (1, embedder.dimension) == question.shape
    assert np.linalg.norm(question) == pytest.approx(1, abs=1e-4)
    assert float(question[0] @ documents[1]) > float(question[0] @ documents[0])


async def test_tokens_are_told_with_the_vector_they_make(embedder: Embedder) -> None:
    """Where they are told: a text's are the same in any company, and a text that answers is nearer by them than one that does not."""
    embedded = await embedder.embed_texts([STORM, "word " * 120, BREAD])
    if not isinstance(embedder, MiniLmEmbedder):
        assert embedded.sketches is None
        assert not hasattr(embedder, "sketch_form")
        return
    sketches = embedded.sketches or ()
    both = await asyncio.gather(*(embedder.read_question(text) for text in ("Who is eating bread, a man?", EATING)))
    (vector, tokens), (_, others) = both

    for text, sketch in zip((STORM, "word " * 120, BREAD), sketches, strict=True):
        (alone,) = (await embedder.embed_texts([text])).sketches or ()
        differ = sum(one != other for one, other in zip(alone, sketch, strict=True))
        assert differ <= len(sketch) / 100, text  # a number may lie on its bound
        assert CHARACTERS_PER_TOKEN * kept_of(embedder.count_tokens([text])[0] + 2) == len(sketch)
    assert vector == pytest.approx(await embedder.embed_question("Who is eating bread, a man?"), abs=1e-4)
    assert tokens is not None and others is not None
    assert embedder.count_tokens(["Who is eating bread, a man?"])[0] == len(tokens.weights)
    storm, _, bread = nearness(tokens, sketches)
    assert bread > storm + 0.2
    assert (None,) == tuple(tokens for _, tokens in [await embedder.read_question("")])


async def test_many_questions_at_once_each_get_their_own_vector(embedder: Embedder) -> None:
    """Questions that share a batch are not mixed up."""
    texts = [f"question number {number} about thing {number * 7}" for number in range(24)]
    together = await asyncio.gather(*(embedder.embed_question(text) for text in texts))

    for text, row in zip(texts, together, strict=True):
        assert float(row[0] @ (await embedder.embed_question(text))[0]) == pytest.approx(1, abs=1e-4), text


async def test_a_cancelled_question_leaves_the_others_alone(embedder: Embedder) -> None:
    """Whoever shares a batch with it is answered."""
    asked = [asyncio.create_task(embedder.embed_question(f"question {number}")) for number in range(12)]
    await asyncio.sleep(0)
    for task in asked[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
    assert all(isinstance(outcome, np.ndarray) for outcome in outcomes[1::2])


async def test_documents_are_cut_alike_under_every_embedder(embedder: Embedder) -> None:
    """A text has the same size whichever embedder is set, so a change of embedder needs no new chunks."""
    assert [400, 0, 7] == await asyncio.to_thread(embedder.count_tokens, ["word " * 400, "", "A man is eating food!!"])


async def test_ids_tell_apart_what_must_not_be_mixed(state_dir: Path, service: EmbeddingService) -> None:
    """Another precision, model, length or prefix is another embedder; another address is not."""
    ids = []
    for kind, values in (
        *((name, {}) for name in MINILM),
        ("openai", {}),
        ("voyage", {}),
        ("gemini", {}),
        ("openai", {"embedder_dimensions": 32}),
        ("openai", {"embedder_question_prefix": "query: "}),
        ("openai", {"embedder_document_prefix": "query: "}),
    ):
        async with open_one(kind, state_dir, service, **values) as embedder:
            ids.append(embedder.embedder_id)

    assert len(ids) == len(set(ids))
    assert not any(" " in id_ for id_ in ids)
    async with open_one("openai", state_dir, service, embedder_url="http://elsewhere.test/v1") as moved:
        assert ids[len(MINILM)] == moved.embedder_id


async def test_questions_and_documents_are_told_apart_where_the_model_wants_it(state_dir: Path, service: EmbeddingService) -> None:
    """By prefix, input type or task type."""
    async with open_one("openai", state_dir, service, embedder_question_prefix="q: ", embedder_document_prefix="d: ") as embedder:
        await embedder.embed_question("a")
        await embedder.embed_texts(["b"])
    async with open_one("voyage", state_dir, service) as embedder:
        await embedder.embed_question("a")
        await embedder.embed_texts(["b"])
    async with open_one("gemini", state_dir, service) as embedder:
        await embedder.embed_question("a")
        await embedder.embed_texts(["b"])

    assert [["q: a"], ["d: b"]] == [body["input"] for body in service.asked[:2]]
    assert ["query", "document"] == [body["input_type"] for body in service.asked[2:4]]
    assert ["RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"] == [body["requests"][0]["taskType"] for body in service.asked[4:]]


async def test_vectors_are_cut_by_the_model_if_that_is_set(state_dir: Path, service: EmbeddingService) -> None:
    """The field has the vendor's name, and is absent unless asked for."""
    for kind in ("openai", "voyage", "gemini"):
        for cut in (False, True):
            async with open_one(kind, state_dir, service, embedder_cut=cut) as embedder:
                await embedder.embed_texts(["a"])

    assert [False, True] == ["dimensions" in body for body in service.asked[:2]]
    assert [False, True] == ["output_dimension" in body for body in service.asked[2:4]]
    assert [False, True] == ["outputDimensionality" in body["requests"][0] for body in service.asked[4:]]


async def test_documents_go_in_batches_and_usage_is_reported(state_dir: Path, service: EmbeddingService) -> None:
    """No request is larger than set; tokens are what the service says, or counted where it says nothing."""
    async with open_one("openai", state_dir, service, embedder_batch=4) as embedder:
        embedded = await embedder.embed_texts([f"text {number}" for number in range(10)])
    assert [2, 4, 4] == sorted(len(body["input"]) for body in service.asked)
    assert 30 == embedded.tokens
    async with open_one("gemini", state_dir, service) as embedder:
        assert 2 == (await embedder.embed_texts(["hello world"])).tokens


@pytest.mark.parametrize("kind", REMOTE)
async def test_a_failure_that_may_pass_is_tried_once_more(kind: str, state_dir: Path, service: EmbeddingService) -> None:
    """One retry; the second failure is the caller's."""
    async with open_one(kind, state_dir, service) as embedder:
        service.failures = [JSONResponse({}, 503)]
        assert (1, DIMENSION) == (await embedder.embed_question(EATING)).shape
        assert 2 == len(service.asked)
        service.failures = [JSONResponse({}, 429), JSONResponse({}, 500)]
        with pytest.raises(Unavailable) as failed:
            await embedder.embed_texts([EATING])
    assert "embedder" == failed.value.metadata["dependency"]
    assert 4 == len(service.asked)


async def test_the_service_says_when_to_come_back(state_dir: Path, service: EmbeddingService) -> None:
    """retry-after is waited for, with jitter on top, and given up on when it is long."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with open_one("openai", state_dir, service) as made:
        assert isinstance(made, RemoteEmbedder)
        made._sleep, made._jitter = sleep, lambda: 0.5
        service.failures = [JSONResponse({}, 429, headers={"retry-after": "2"})]
        await made.embed_question(EATING)
        service.failures = [JSONResponse({}, 429, headers={"retry-after": "600"})]
        with pytest.raises(Unavailable):
            await made.embed_question(EATING)

    assert [2.125] == waits


async def test_the_next_key_is_used_when_one_is_refused(state_dir: Path, service: EmbeddingService) -> None:
    """A key that was withdrawn does not stop the service while another works."""
    async with open_one("openai", state_dir, service, embedder_key=f"old, {KEY}") as embedder:
        for _ in range(3):
            await embedder.embed_question(EATING)

    assert {"old", KEY} == set(service.keys)


NONSENSE: list[tuple[Any, type[DomainError]]] = [
    ({"data": [{"index": 0, "embedding": [1.0] * (DIMENSION - 1)}]}, ModelMisconfigured),
    ({"data": [{"index": 0, "embedding": [0.0] * DIMENSION}]}, ModelFailed),
    ({"data": [{"index": 0, "embedding": [None] * DIMENSION}]}, ModelFailed),
    ({"data": [{"index": 0, "embedding": [1e308] * DIMENSION}]}, ModelFailed),
    ({"data": [{"index": 0, "embedding": "AAAAAA=="}]}, ModelMisconfigured),
    ({"data": [{"index": 0, "embedding": "not base64!"}]}, ModelFailed),
    ({"data": []}, ModelFailed),
    ({"data": [{"index": place, "embedding": [1.0] * DIMENSION} for place in range(2)]}, ModelFailed),
    ({"error": "no"}, ModelFailed),
    ([], ModelFailed),
    ({"data": [{"index": 0, "embedding": [1.0] * DIMENSION}], "padding": "x" * 2_000_000}, ModelFailed),
]


@pytest.mark.parametrize(("reply", "error"), NONSENSE)
async def test_what_is_no_vector_is_refused(state_dir: Path, service: EmbeddingService, reply: Any, error: type[DomainError]) -> None:
    """Nothing of it reaches the store, and the error names what is wrong."""
    service.reply = reply
    async with open_one("openai", state_dir, service) as embedder:
        with pytest.raises(error):
            await embedder.embed_texts([EATING])


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, ModelMisconfigured), (403, ModelMisconfigured), (404, ModelMisconfigured), (400, ModelRefused), (413, ModelRefused)],
)
async def test_what_will_not_pass_is_not_tried_again(
    state_dir: Path, service: EmbeddingService, status: int, error: type[DomainError]
) -> None:
    """A wrong key or model says so, and neither the key nor the text is in the error."""
    service.failures = [JSONResponse({"error": {"message": f"{KEY} {EATING}"}}, status)]
    async with open_one("openai", state_dir, service) as embedder:
        with pytest.raises(error) as failed:
            await embedder.embed_question(EATING)

    assert 1 == len(service.asked)
    assert KEY not in str(failed.value) and EATING not in str(failed.value)


async def test_a_silent_service_costs_the_set_time(state_dir: Path, service: EmbeddingService) -> None:
    """The limit holds for the call with its retry, and nobody who is there names the address."""
    service.held = asyncio.Event()
    async with open_one("openai", state_dir, service, embedder_timeout_s=0.2) as embedder:
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable):
                await embedder.embed_question(EATING)
    service.held.set()


async def test_a_service_that_is_away_is_unavailable(state_dir: Path, service: EmbeddingService) -> None:
    """Refused connections, too, after one retry."""
    async with open_one("openai", state_dir, service, embedder_url="http://127.0.0.1:9/v1") as embedder:
        with pytest.raises(Unavailable):
            await embedder.embed_texts([EATING])


async def test_questions_pass_documents_and_wait_in_bounds(state_dir: Path, service: EmbeddingService) -> None:
    """With the documents' lane full, questions still go out; beyond the lane's bounds they share requests, then are refused."""
    service.held = asyncio.Event()
    async with open_one("openai", state_dir, service, embedder_batch=2) as embedder:
        documents = asyncio.create_task(embedder.embed_texts([f"text {number}" for number in range(40)]))
        await service.until_busy(4)
        questions = [asyncio.create_task(embedder.embed_question(f"question {number}")) for number in range(256)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await embedder.embed_question("one too many")
        await service.until_busy(4 + QUESTION_RUNS_MAX)
        service.held.set()
        await asyncio.gather(documents, *questions)

    assert service.busiest <= 4 + QUESTION_RUNS_MAX


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        ("word2vec", {}, "minilm-int8, minilm"),
        ("openai:", {}, "is no embedder"),
        ("openai:text-embedding-3-small", {}, "OPENAI_API_KEY"),
        ("openai:unheard-of", {"embedder_key": "k"}, "EMBEDDER_DIMENSIONS"),
    ],
)
async def test_a_name_that_opens_nothing_says_why(state_dir: Path, name: str, values: dict[str, Any], word: str) -> None:
    """At the start, before anything is stored."""
    with pytest.raises(EmbedderUnknown, match=word):
        async with opened(name, settings_for(state_dir, **values)):
            pytest.fail("it opened")


async def test_an_extra_that_is_not_installed_is_named(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "fastembed", None)
    with pytest.raises(OSError, match=r"tailrace\[fastembed\]"):
        async with opened("fastembed:some/model", settings_for(state_dir)):
            pytest.fail("it opened")
