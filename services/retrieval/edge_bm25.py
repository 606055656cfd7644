"""BM25 word weights by Qdrant Edge's encoder, used with either store. The rarity of words is the store's part (its IDF modifier)."""

import re

import qdrant_edge as edge

from services.retrieval.ports import Sparse

AVERAGE_WORDS = 110
"""Words in a usual chunk of ours; BM25 measures a text's length against it."""


class EdgeBm25:
    """Stateless; the same text always gives the same weights."""

    def __init__(self, language: str) -> None:
        self.encoder_id = f"bm25-{language}-k1.2-b0.75-{AVERAGE_WORDS}"
        self._bm25 = edge.Bm25(edge.Bm25Config(k=1.2, b=0.75, avg_len=AVERAGE_WORDS, language=language, ascii_folding=True))

    @classmethod
    def like(cls, encoder_id: str, otherwise: "EdgeBm25") -> "EdgeBm25":
        """The encoder with that id, if it only differs in its language, or `otherwise`: same tokens, if not always the same stems."""
        match = re.match(r"bm25-([a-z]{2,20})-", encoder_id)
        made = cls(match[1]) if match else otherwise
        return made if made.encoder_id == encoder_id else otherwise

    def document(self, text: str) -> Sparse:
        vector = self._bm25.embed_document(text)
        return Sparse(tuple(vector.indices), tuple(vector.values))

    def query(self, text: str) -> Sparse:
        vector = self._bm25.embed_query(text)
        return Sparse(tuple(vector.indices), tuple(vector.values))
