"""The embeddings format of OpenAI, as OpenAI, text-embeddings-inference, vLLM, Ollama, llama.cpp and Voyage speak it. Pure translation."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from services.retrieval.remote_embedding import Answered


@dataclass(frozen=True, slots=True)
class OpenAiDialect:
    """`POST embeddings`."""

    model: str
    dimensions: int = 0
    """Asked for, if the model can be cut to a length. 0 = not mentioned: many servers refuse the field."""
    encoding: Literal["float", "base64"] = "float"
    """base64 is a third of the bytes, where the server knows it."""
    question_prefix: str = ""
    document_prefix: str = ""
    voyage: bool = False
    """Voyage names the length otherwise and wants to know what a text is."""

    def path(self) -> str:
        return "embeddings"

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def body(self, texts: Sequence[str], *, question: bool) -> Mapping[str, Any]:
        prefix = self.question_prefix if question else self.document_prefix
        body: dict[str, Any] = {"model": self.model, "input": [prefix + text for text in texts]}
        if self.voyage:
            body["input_type"] = "query" if question else "document"
        if self.dimensions:
            body["output_dimension" if self.voyage else "dimensions"] = self.dimensions
        # Voyage knows base64 alone as a value; OpenAI's own client would ask for base64 unless told otherwise.
        if self.encoding == "base64" or not self.voyage:
            body["encoding_format"] = self.encoding
        return body

    def read(self, reply: Any) -> Answered:
        rows = [row["embedding"] for row in sorted(reply["data"], key=lambda row: int(row["index"]))]
        usage = reply.get("usage") or {}
        tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
        return Answered(np.stack([_row(row) for row in rows]), None if tokens is None else int(tokens))


def _row(row: Any) -> npt.NDArray[Any]:
    """A row of numbers, or its little-endian float32 bytes in base64."""
    if isinstance(row, str):
        return np.frombuffer(base64.b64decode(row, validate=True), "<f4")
    return np.asarray(row, np.float64)
