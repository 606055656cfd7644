"""BM25 word weights by Qdrant Edge's encoder, used with either store. The rarity of words is the store's part (its IDF modifier)."""

import functools
import re
from typing import Any

import qdrant_edge as edge

from services.retrieval.languages import Languages, segmented
from services.retrieval.ports import Sparse, SparseEncoder

AVERAGE_WORDS = 110
"""Words in a usual chunk of ours; BM25 measures a text's length against it."""

STEMMED = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish", "fr": "french",
    "hu": "hungarian", "it": "italian", "nl": "dutch", "no": "norwegian", "nb": "norwegian", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish", "tr": "turkish",
}  # fmt: skip
"""Languages whose endings and stop words are known. Words of all others are taken as they stand."""


class EdgeBm25:
    """Stateless; the same text in the same language always gives the same weights. `language` is taken where none can be told."""

    def __init__(self, language: str) -> None:
        self.encoder_id = f"bm25-detected-{language}-k1.2-b0.75-{AVERAGE_WORDS}"
        self._language = language
        self._languages = Languages()

    @classmethod
    def like(cls, encoder_id: str, otherwise: "EdgeBm25") -> "SparseEncoder":
        """The encoder with that id, or `otherwise`: same tokens, if not always the same stems."""
        match = re.fullmatch(rf"bm25-(detected-)?([a-z]{{2,20}})-k1\.2-b0\.75-{AVERAGE_WORDS}", encoder_id)
        if match is None:
            return otherwise
        return cls(match[2]) if match[1] else OneLanguage(match[2])

    def language(self, text: str) -> str:
        """ISO 639-1 code of the language of a text; empty = it cannot be told."""
        return self._languages.detected(text)

    def document(self, text: str, language: str = "") -> Sparse:
        vector = _encoder(STEMMED.get(language, "") if language else self._language).embed_document(segmented(text))
        return Sparse(tuple(vector.indices), tuple(vector.values))

    def query(self, text: str) -> Sparse:
        """Stems in every language the few words of a question may be in: one of them is the documents'."""
        plausible = self._languages.plausible(text)
        names = {STEMMED.get(code, "") for code in plausible}
        if len(plausible) != 1:
            names.add(self._language)
        words = segmented(text)
        indices = {index for name in names for index in _encoder(name).embed_query(words).indices}
        return Sparse(tuple(sorted(indices)), (1.0,) * len(indices))


class OneLanguage:
    """Every text is taken to be in one language, as all were once; for collections that have not been encoded anew."""

    def __init__(self, language: str) -> None:
        self.encoder_id = f"bm25-{language}-k1.2-b0.75-{AVERAGE_WORDS}"
        self._bm25 = _encoder(language)

    def language(self, text: str) -> str:
        return ""

    def document(self, text: str, language: str = "") -> Sparse:
        vector = self._bm25.embed_document(text)
        return Sparse(tuple(vector.indices), tuple(vector.values))

    def query(self, text: str) -> Sparse:
        vector = self._bm25.embed_query(text)
        return Sparse(tuple(vector.indices), tuple(vector.values))


@functools.cache
def _encoder(language: str) -> Any:
    """One of the few that STEMMED names; without a name, words are left as they are."""
    if language:
        return edge.Bm25(edge.Bm25Config(k=1.2, b=0.75, avg_len=AVERAGE_WORDS, language=language, ascii_folding=True))
    plain, none = edge.DisabledStemmer(), edge.StopwordsSet()
    return edge.Bm25(edge.Bm25Config(k=1.2, b=0.75, avg_len=AVERAGE_WORDS, ascii_folding=True, stemmer=plain, stopwords=none))
