"""The Embedder port on MiniLM by onnxruntime: converted once, kept in the state directory, run in two lanes. It decides nothing.

One session serves both lanes; with one thread inside the engine a run stays on the thread that called it. The documents' threads
give way to everything else on the machine, and their batches are small, so that a question waits for nobody.
"""

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

from services.retrieval.late_interaction import FORM, AskedTokens, Numbers, asked, sketched
from services.retrieval.niceness import give_way
from services.retrieval.ports import Embedded, Vector, Vectors
from services.retrieval.question_lane import QuestionLane
from services.retrieval.word_pieces import PACKAGE, WordPieces

TOKENS_MAX = 256
BATCH_TOKENS_MAX = 256
"""Tokens a batch of documents, padding included: what one long text has. Larger batches leave the core's own cache and take a fifth longer
a text."""
DOCUMENT_THREADS = 2
"""That many batches at a time, for as many ingestions. More cores than that belong to questions."""
QUESTIONS_WAITING_MAX = 256
QUESTION_BATCH_MAX = 4
"""Four together cost what some 2.7 (fp32) or 3.3 (int8) cost one after the other; eight gain little more and keep the first longer."""
QUESTION_SPREAD_MAX = 1.5
"""Beyond that the padding of the shorter ones eats the gain."""
DIMENSION = 384
CONVERSION_VERSIONS = {"fp32": "1", "int8": "3"}
"""Changed whenever the graph that minilm_conversion writes gives other vectors."""


class MiniLmEmbedder:
    """The TokenEmbedder port. Make it with `load`, close it with `close`."""

    dimension = DIMENSION
    sketch_form = FORM

    def __init__(self, folder: Path, embedder_id: str) -> None:
        self.embedder_id = embedder_id
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # Idle threads would burn a core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The arena keeps what a run needed for the next one, which else asks the kernel for it anew, page by page: up to a third of its
        # time. Batches are bounded, so it holds 25 MB once documents, and 50 MB once four of the longest questions have come.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # The published file truncates and pads everything to 128.
        self._tokenizer.enable_truncation(TOKENS_MAX)
        self._tokenizer.no_padding()
        self._pieces = WordPieces(folder / "tokenizer.json")
        self._question_thread = ThreadPoolExecutor(1, thread_name_prefix="embed-question")
        self._questions: QuestionLane[tuple[Vector, AskedTokens | None]] = QuestionLane(
            self._question_batch, runs_max=1, batch_max=QUESTION_BATCH_MAX, spread_max=QUESTION_SPREAD_MAX
        )
        self._documents = ThreadPoolExecutor(DOCUMENT_THREADS, thread_name_prefix="embed-document", initializer=give_way)

    @classmethod
    def load(cls, models: Path, quant: str) -> "MiniLmEmbedder":
        """Open the converted model under `models`, converting it first if it is not there. Blocks for up to a few seconds.

        `quant` is one of minilm_conversion's: `fp32` or `int8`.
        """
        name = f"minilm-l6-v2-{quant}-{_weights_key(quant)}"
        folder = models / name
        if not (folder / "model.onnx").is_file():
            command = [sys.executable, "-m", "services.retrieval.minilm_conversion", str(folder), quant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(f"the embedding model could not be converted into {folder}: {done.stderr.strip()[-500:]}")
        return cls(folder, f"{name}-{TOKENS_MAX}")

    def close(self) -> None:
        """Drop what waits, end both lanes."""
        self._question_thread.shutdown(cancel_futures=True)
        self._documents.shutdown(cancel_futures=True)

    async def embed_question(self, text: str) -> Vectors:
        return (await self.read_question(text))[0]

    async def read_question(self, text: str) -> tuple[Vectors, AskedTokens | None]:
        vector, tokens = await self._questions.embed(text, QUESTIONS_WAITING_MAX)
        return vector[None], tokens

    async def embed_texts(self, texts: Sequence[str]) -> Embedded:
        loop = asyncio.get_running_loop()
        encodings = await loop.run_in_executor(self._documents, self._encoded, texts)
        # Texts of one length waste no padding; the caller gets its own order back.
        vectors = np.empty((len(texts), DIMENSION), np.float32)
        sketches = [""] * len(texts)
        batches = _batches([len(encoding) for encoding in encodings])
        made = await asyncio.gather(
            *(loop.run_in_executor(self._documents, self._read_texts, [encodings[place] for place in batch]) for batch in batches)
        )
        for batch, (of_batch, sketches_of_batch) in zip(batches, made, strict=True):
            vectors[batch] = of_batch
            for place, sketch in zip(batch, sketches_of_batch, strict=True):
                sketches[place] = sketch
        return Embedded(vectors, sum(map(len, encodings)), sketches=tuple(sketches))

    async def _question_batch(self, texts: tuple[str, ...]) -> list[tuple[Vector, AskedTokens | None]]:
        return await asyncio.get_running_loop().run_in_executor(self._question_thread, self._read_questions, texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._pieces.count(texts)

    def _encoded(self, texts: Sequence[str]) -> list[Encoding]:
        """The texts' pieces, with those that begin and end each, at most TOKENS_MAX of them."""
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(list(texts))
        return encodings

    def _read_texts(self, encodings: list[Encoding]) -> tuple[Vectors, tuple[str, ...]]:
        vectors, hidden = self._run(encodings)
        lengths = [len(encoding) for encoding in encodings]
        return vectors, sketched(np.concatenate([row[:length] for row, length in zip(hidden, lengths, strict=True)]), lengths)

    def _read_questions(self, texts: tuple[str, ...]) -> list[tuple[Vector, AskedTokens | None]]:
        encodings = self._encoded(texts)
        vectors, hidden = self._run(encodings)
        # Without the two tokens that every text begins and ends with.
        tokens = [asked(row[1 : len(encoding) - 1]) for row, encoding in zip(hidden, encodings, strict=True)]
        return list(zip(vectors, tokens, strict=True))

    def _run(self, encodings: list[Encoding]) -> tuple[Vectors, Numbers]:
        """The texts' vectors, and those of their tokens (n, t, d), which go on beyond a shorter text."""
        width = max(len(encoding) for encoding in encodings)
        ids = np.zeros((len(encodings), width), np.int32)
        mask = np.zeros((len(encodings), width), np.int32)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
        (hidden,) = self._session.run(["hidden"], {"input_ids": ids, "attention_mask": mask})
        summed = np.einsum("ntd,nt->nd", hidden, mask.astype(np.float32))
        vectors: Vectors = summed / np.linalg.norm(summed, axis=1, keepdims=True)
        return vectors, hidden


def _batches(widths: Sequence[int]) -> list[list[int]]:
    """Places of texts of so many tokens, shortest first, cut so that no batch holds more than BATCH_TOKENS_MAX with its padding."""
    batches: list[list[int]] = []
    for place in sorted(range(len(widths)), key=widths.__getitem__):
        if batches and (len(batches[-1]) + 1) * widths[place] <= BATCH_TOKENS_MAX:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _weights_key(quant: str) -> str:
    """Changes with the published weights and with our conversion.

    From the package's own record: reading 90 MB takes a second when they are cold.
    """
    recorded = sorted(f"{file}:{file.hash.value}" for file in distribution(PACKAGE).files or () if file.hash and "model/" in str(file))
    assert recorded, "the package's record lists no files"
    return hashlib.sha256("\n".join([CONVERSION_VERSIONS[quant], *recorded]).encode()).hexdigest()[:16]
