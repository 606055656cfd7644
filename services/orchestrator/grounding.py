"""How much of a sentence a passage bears out, told by words, numbers and negations. Pure; no model and no vectors.

It sees whether a sentence is about what the passage says with the passage's own figures. It cannot see a relation that is turned round
with the same words.
"""

from collections.abc import Iterable
from functools import cached_property

from services.orchestrator.domain import Passage
from services.orchestrator.reading import all_words, clean, content_words, negations, numbers, opposed, split_sentences
from services.orchestrator.standalone import language

SUPPORT_MIN = 0.2
"""A sentence with less than this does not follow from what it cites; `make bench-checks` prints what that finds and what it spares."""
GROUNDEDNESS_MIN = 0.5
"""An answer fewer of whose judged sentences are borne out is not grounded."""
ALIKE = 0.7
"""What a word counts whose beginning alone the passage has: `induction` for `inductive`."""
ALIKE_LETTERS_MIN, ALIKE_SHARE_MIN = 5, 0.6
CONTRADICTED = 0.15
"""What is left of a support whose figures the passage has not, or where the passage says the opposite in the same words."""
SAME_WORDS_MIN, NEARLY_SAME_WORDS_MIN = 0.4, 0.7
"""Share of its words that a sentence must have in common with one of the passage for an opposite, or a negation, to be told from chance."""
PASSAGE_CHARACTERS_MAX = 20_000
"""Beyond this a passage is not read; chunks are a tenth of it."""
LANGUAGE_CHARACTERS = 300
"""So much of a passage tells its language."""
_ONE = frozenset({"1"})
"""There are too many other words for it."""
_JAPANESE = {"hiragana": "cjk", "katakana": "cjk"}
"""Scripts that one sentence mixes."""


class Evidence:
    """A passage, or several as one, and what is known beside them; taken apart once it is asked for."""

    def __init__(self, passages: Iterable[Passage], beside: str = "") -> None:
        self._passages = tuple(passages)
        self._beside = beside

    @cached_property
    def headings(self) -> frozenset[str]:
        return frozenset(word for passage in self._passages for word in content_words(" ".join((passage.title, *passage.heading_path))))

    @cached_property
    def text(self) -> str:
        return "\n\n".join((*(passage.text[:PASSAGE_CHARACTERS_MAX] for passage in self._passages), self._beside))

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(content_words(self.text)) | self.headings

    @cached_property
    def sentences(self) -> tuple[tuple[frozenset[str], str], ...]:
        """Each sentence with its words."""
        return tuple((frozenset(content_words(sentence)), sentence) for sentence in split_sentences(self.text))

    @cached_property
    def numbers(self) -> frozenset[str]:
        return numbers(self.text) | numbers(" ".join(passage.title for passage in self._passages))

    @cached_property
    def beginnings(self) -> dict[str, list[str]]:
        """Words by their first letters."""
        found: dict[str, list[str]] = {}
        for word in self.words:
            if len(word) >= ALIKE_LETTERS_MIN:
                found.setdefault(word[:ALIKE_LETTERS_MIN], []).append(word)
        return found

    @cached_property
    def language(self) -> str:
        return language(self.text[:LANGUAGE_CHARACTERS])


def support(claim: str, evidence: Evidence) -> float | None:
    """Share of the words of `claim`, Markdown of at most a few thousand characters, that the evidence bears out, 0-1.

    Little is left of it where the evidence has other figures or says the opposite. None: the claim has no words to judge by, or is
    in another language than the evidence.
    """
    said = clean(claim)
    words = dict.fromkeys(content_words(said))
    if not words or _foreign(said, evidence):
        return None
    value = sum(_found(word, evidence) for word in words) / len(words)
    if value >= SUPPORT_MIN and (not numbers(said) - _ONE <= evidence.numbers or _turned(said, frozenset(words), evidence)):
        value *= CONTRADICTED
    return round(value, 4)


def _turned(said: str, words: frozenset[str], evidence: Evidence) -> bool:
    """Whether the sentence that is most alike says the opposite."""
    alike, theirs, nearest = max(
        ((len(words & theirs), theirs, sentence) for theirs, sentence in evidence.sentences),
        key=lambda found: found[0],
        default=(0, words, ""),
    )
    share = alike / len(words)
    if share < SAME_WORDS_MIN:
        return False
    if opposed(all_words(said), all_words(nearest)):
        return True
    # A claim may leave out the part of a sentence that is negated, but not add a negation of its own.
    mine, its = negations(said) > 0, negations(nearest) > 0
    return mine != its and min(share, 1.0 if mine else alike / len(theirs)) >= NEARLY_SAME_WORDS_MIN


def _foreign(said: str, evidence: Evidence) -> bool:
    """Whether the languages of the two are known, and are not the same."""
    mine, theirs = (_JAPANESE.get(code, code) for code in (language(said), evidence.language))
    return mine != theirs and not {mine, theirs} & {"latin", "none"}


def _found(word: str, evidence: Evidence) -> float:
    """1 if the evidence has the word, ALIKE if it has one that begins like it, else 0."""
    if word in evidence.words:
        return 1.0
    for other in evidence.beginnings.get(word[:ALIKE_LETTERS_MIN], ()):
        common = next(
            (place for place, (mine, its) in enumerate(zip(word, other, strict=False)) if mine != its), min(len(word), len(other))
        )
        if common >= ALIKE_SHARE_MIN * max(len(word), len(other)):
            return ALIKE
    return 0.0
