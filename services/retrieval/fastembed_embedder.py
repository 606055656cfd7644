"""The Embedder port on fastembed's local models; its package is an extra. Models come from its hub cache or from a folder."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from services.retrieval.niceness import give_way
from services.retrieval.ports import Embedded, Vector, Vectors
from services.retrieval.question_lane import QuestionLane
from services.retrieval.remote_embedding import checked
from services.retrieval.word_pieces import WordPieces

BATCH_TEXTS_MAX = 16
"""Texts of a batch of documents; between two batches others in the lane have their turn."""
MODEL_FILE = "model.onnx"


class FastembedMissing(OSError):
    """The extra is not installed."""


class FastembedEmbedder:
    """Make it with `load`, close it with `close`."""

    def __init__(self, embedder_id: str, model: Any, dimension: int, pieces: WordPieces) -> None:
        self.embedder_id = embedder_id
        self.dimension = dimension
        self._model = model
        self._pieces = pieces
        self._question_thread = ThreadPoolExecutor(1, thread_name_prefix="embed-question")
        self._documents = ThreadPoolExecutor(1, thread_name_prefix="embed-document", initializer=give_way)
        # On a processor a batch takes as long as its texts one after the other, and keeps the first waiting for the last.
        self._questions: QuestionLane[Vector] = QuestionLane(self._question_batch, runs_max=1, batch_max=1)

    @classmethod
    def load(cls, model: str, folder: Path | None, dimension: int, pieces: WordPieces) -> "FastembedEmbedder":
        """Open `model` from fastembed's list, or, with `folder`, the ONNX model in it (mean pooling). Blocks, and may download.

        Raises FastembedMissing, or OSError for a model that cannot be opened.
        """
        try:
            from fastembed import TextEmbedding
            from fastembed.common.model_description import ModelSource, PoolingType
        except ImportError:
            raise FastembedMissing("this embedder needs the extra: pip install 'tailrace[fastembed]'") from None
        options: dict[str, Any] = {"threads": 1}
        if folder is not None:
            if not (folder / MODEL_FILE).is_file():
                raise OSError(f"{folder} holds no {MODEL_FILE}")
            if not dimension:
                raise OSError("a model from a folder needs TAILRACE_RETRIEVAL_EMBEDDER_DIMENSIONS")
            if model not in {known["model"] for known in TextEmbedding.list_supported_models()}:
                TextEmbedding.add_custom_model(
                    model=model,
                    pooling=PoolingType.MEAN,
                    normalization=True,
                    # Never asked: the folder is given.
                    sources=ModelSource(hf=model),
                    dim=dimension,
                    model_file=MODEL_FILE,
                )
            options["specific_model_path"] = str(folder)
        try:
            opened = TextEmbedding(model, **options)
        except Exception as error:
            # What is raised depends on the model and on the network; its text may hold a path, which the operator knows.
            raise OSError(f"fastembed cannot open {model!r}: {type(error).__name__}: {str(error)[:200]}") from error
        return cls(f"fastembed-{model}", opened, int(opened.embedding_size), pieces)

    async def close(self) -> None:
        """Drop what waits, end both lanes."""
        await self._questions.close()
        self._question_thread.shutdown(cancel_futures=True)
        self._documents.shutdown(cancel_futures=True)

    async def embed_question(self, text: str) -> Vectors:
        return (await self._questions.embed(text))[None]

    async def embed_texts(self, texts: Sequence[str]) -> Embedded:
        loop = asyncio.get_running_loop()
        lengths = await loop.run_in_executor(self._documents, self.count_tokens, texts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        places = sorted(range(len(texts)), key=lengths.__getitem__)
        for begin in range(0, len(places), BATCH_TEXTS_MAX):
            batch = places[begin : begin + BATCH_TEXTS_MAX]
            chosen = [texts[place] for place in batch]
            vectors[batch] = await loop.run_in_executor(self._documents, self._run, self._model.passage_embed, chosen)
        return Embedded(vectors, sum(lengths))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._pieces.count(texts)

    async def _question_batch(self, texts: tuple[str, ...]) -> list[Vector]:
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._question_thread, self._run, self._model.query_embed, list(texts)))

    def _run(self, embed: Callable[[list[str]], Any], texts: list[str]) -> Vectors:
        return checked(np.asarray(list(embed(texts)), np.float32), len(texts), self.dimension)
