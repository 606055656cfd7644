"""Which language a text is in, and words for scripts that write none apart. Pure; no word weights and no search live here."""

import functools
import itertools
import math
import re

from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

SAMPLE_CHARACTERS = 4000
"""So much of a document tells its language."""
QUERY_LANGUAGES_MAX = 3
PLAUSIBLE_WITHIN = math.log(1000)
"""A language a thousand times less likely than the best is none that a question is searched in."""

# Han, kana, Thai, Lao, Myanmar and Khmer are written without spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+"
)


class Languages:
    """Detection by a model that comes with its library: 0.1 ms a question, 130 MB of nothing to download."""

    def __init__(self) -> None:
        self._identifier = _identifier()

    def detected(self, text: str) -> str:
        """ISO 639-1 code of the language; empty if it cannot be told, as of two words or of numbers."""
        plausible = self.plausible(text)
        return plausible[0] if len(plausible) == 1 else ""

    def plausible(self, text: str) -> tuple[str, ...]:
        """The likeliest languages, best first: one for a clear text, a few for two or three words."""
        sample = text[:SAMPLE_CHARACTERS]
        if not any(map(str.isalpha, sample)):
            return ()
        ranked = self._identifier.rank(sample)[:QUERY_LANGUAGES_MAX]
        best = ranked[0][1]
        return tuple(code for code, likelihood in ranked if best - likelihood <= PLAUSIBLE_WITHIN)


@functools.cache
def _identifier() -> LanguageIdentifier:
    """Unpacked once a process, whoever needs it: that takes a third of a second, and nothing of it changes."""
    return LanguageIdentifier.from_modelpath(str(MODEL_DIR / MODEL_FILE))


def segmented(text: str) -> str:
    """`text` with every run of an unspaced script as its overlapping pairs of letters, which are found like words."""
    return _UNSPACED.sub(lambda run: f" {_pairs(run.group())} ", text)


def _pairs(run: str) -> str:
    # Vowel signs and tone marks would tear a pair apart again: the tokenizer takes them for punctuation.
    letters = [letter for letter in run if letter.isalnum()]
    return " ".join(map("".join, itertools.pairwise(letters))) if len(letters) > 1 else "".join(letters)
