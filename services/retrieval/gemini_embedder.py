"""Gemini's batchEmbedContents, by its REST interface: the vendor's package would bring an SDK for one request. Pure translation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.retrieval.remote_embedding import Answered

BATCH_MAX = 100
"""Texts that Gemini takes in one request."""


@dataclass(frozen=True, slots=True)
class GeminiDialect:
    """`POST v1beta/models/{model}:batchEmbedContents`."""

    model: str
    dimensions: int = 0
    """Asked for. 0 = the model's own; what is cut comes without unit length, which the caller restores."""

    def path(self) -> str:
        return f"v1beta/models/{self.model}:batchEmbedContents"

    def headers(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key} if key else {}

    def body(self, texts: Sequence[str], *, question: bool) -> Mapping[str, Any]:
        common: dict[str, Any] = {"model": f"models/{self.model}", "taskType": "RETRIEVAL_QUERY" if question else "RETRIEVAL_DOCUMENT"}
        if self.dimensions:
            common["outputDimensionality"] = self.dimensions
        return {"requests": [{**common, "content": {"parts": [{"text": text}]}} for text in texts]}

    def read(self, reply: Any) -> Answered:
        # It does not say how many tokens it read.
        return Answered([row["values"] for row in reply["embeddings"]], None)
