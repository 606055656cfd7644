"""A model that needs no key: it answers with the best sentences of the passages, word for word and cited, and writes nothing of its own.

A table's row is said with the names of its columns, a line of code with the block around it. It is honest rather than clever: what the
passages do not say, it says it did not find.
"""

import asyncio
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.orchestrator.domain import Candidate, Draft, Passage, Prompt
from services.orchestrator.quotes import quotable
from services.orchestrator.reading import content_words

SENTENCES_MAX = 4
COVERAGE_MIN = 0.34
"""Share of the question's weight that the best sentence, with its headings, must cover before anything is called an answer, where passages
were found by words alone."""
EVIDENCE_MIN = 0.6
"""Where they were found by meaning too: the best passage's similarity to the question and half of what the best sentence covers must come
to this. Measured with the default embedder; `make bench-checks` prints what it answers and what it declines."""
COVERAGE_SHARE = 0.5
RANK_SHARE, MEANING_SHARE, HEADINGS_SHARE, NUMBER_SHARE = 0.5, 0.5, 0.5, 0.15
"""What a sentence gains, besides the words of the question it has: as the best passage's rank and similarity, for words in its headings,
and for a figure where one is asked for."""
UNSEEN_WEIGHT = 0.6
"""What a word of the question weighs that no passage has, against the rarest that one has."""
RELATIVE_SCORE_MIN = 0.7
"""A further sentence must be this good, measured by the best one."""
OVERLAP_MAX = 0.6
"""Sentences that share more of their words than this say the same."""

ADDRESS_SHARE_MAX = 0.2
"""A sentence of which more are addresses is a reference. It may have the words of the question in its title and answers nothing."""
ADDRESS_WEIGHT = 0.3
CODE_WEIGHT, WANTED_CODE_WEIGHT = 0.85, 1.15
"""Code says a thing less plainly than a sentence, unless it is asked for."""

NOT_FOUND = {
    "en": "The documents I can search do not seem to answer this question.",
    "de": "In den durchsuchten Dokumenten finde ich darauf keine Antwort.",
    "fr": "Les documents consultés ne semblent pas répondre à cette question.",
    "es": "Los documentos consultados no parecen responder a esta pregunta.",
}

_DANGLING = re.compile(
    r"(?:it|this|that|these|those|they|he|she|but|so|however|besides|unlike|otherwise|therefore|on the other hand"
    r"|in (?:this|that) case|see|if you)\b",
    re.IGNORECASE,
)
"""Openings that lean on the sentence before, or lead elsewhere."""
_WANTS_NUMBER = re.compile(r"\s*(?:how (?:many|much|long|old|large|big|often|fast)|when|what (?:port|size|number|version|year))\b")


_WANTS_CODE = re.compile(
    r"\b(?:code|snippet|example|beispiel|exemple|ejemplo|command|syntax|config(?:uration)?|import|install"
    r"|how (?:do|can|would|to)|wie|comment|cómo)\b"
)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a passage, or what else can be quoted of it, cleaned for reading."""

    text: str
    passage: int
    """Index of the passage."""
    position: int
    """Place within the passage."""
    words: frozenset[str]
    """Of it alone, without `beside`."""
    beside: frozenset[str] = frozenset()
    """Words that it is said under: a table's header, what leads to code."""
    block: int = 0
    """The table or block of code that it is of, from 1; 0 = none."""
    is_code: bool = False

    @property
    def is_row(self) -> bool:
        return self.block > 0 and not self.is_code

    @property
    def said(self) -> frozenset[str]:
        """Words that it says."""
        return self.words | self.beside if self.is_row else self.words


def choose(question: str, passages: Sequence[Passage]) -> list[Sentence]:
    """The sentences that answer best, at most SENTENCES_MAX, in reading order; none if nothing answers."""
    asked = list(dict.fromkeys(content_words(question)))
    sentences = [
        Sentence(
            quote.text,
            index,
            position,
            frozenset(content_words(quote.own)),
            frozenset(content_words(quote.beside)),
            quote.block,
            quote.is_code,
        )
        for index, passage in enumerate(passages)
        for position, quote in enumerate(quotable(passage.text))
    ]
    if not asked or not sentences:
        return []
    headings = [frozenset(content_words(" ".join((passage.title, *passage.heading_path)))) for passage in passages]
    seen_in = Counter(word for sentence in sentences for word in sentence.said)
    weight = {word: math.log(1 + (len(sentences) - seen_in[word] + 0.5) / (seen_in[word] + 0.5)) for word in asked}
    for word in asked:
        if not seen_in[word]:  # perhaps what the question is about, perhaps only how it is put
            weight[word] *= UNSEEN_WEIGHT
    total = sum(weight.values()) or 1.0

    def covered(words: frozenset[str]) -> float:
        return sum(weight[word] for word in asked if word in words) / total

    best_score = max((passage.score for passage in passages), default=0.0)
    nearest = max((passage.similarity or 0.0 for passage in passages), default=0.0)
    wants_number = _WANTS_NUMBER.match(question.casefold())
    wants_code = _WANTS_CODE.search(question.casefold()) is not None
    best_of_block: dict[tuple[int, int], float] = {}
    for sentence in sentences:
        place = (sentence.passage, sentence.block)
        best_of_block[place] = max(best_of_block.get(place, 0.0), covered(sentence.words))

    def under(sentence: Sentence) -> frozenset[str]:
        return sentence.words | sentence.beside | headings[sentence.passage]

    def score(sentence: Sentence) -> float:
        own = covered(sentence.said)
        if own == 0.0:
            return 0.0
        if sentence.block and covered(sentence.words) < RELATIVE_SCORE_MIN * best_of_block[sentence.passage, sentence.block]:
            return 0.0  # another row, or line, is meant
        passage = passages[sentence.passage]
        context = covered(under(sentence)) - own
        rank = (passage.score / best_score) if best_score > 0 else 1.0 / (1 + sentence.passage)
        meaning = (passage.similarity or 0.0) / nearest if nearest > 0 else 0.0
        value = own + HEADINGS_SHARE * context + RANK_SHARE * max(0.0, rank) + MEANING_SHARE * max(0.0, meaning)
        if wants_number and any(letter.isdigit() for letter in sentence.text):
            value += NUMBER_SHARE
        if _DANGLING.match(sentence.text):
            value *= 0.85
        if _is_reference(sentence.text):
            value *= ADDRESS_WEIGHT
        if sentence.is_code:
            return value * (WANTED_CODE_WEIGHT if wants_code else CODE_WEIGHT)
        words = len(sentence.text.split())
        return value * (1.0 if words >= 5 else 0.8) / (1.0 + max(0, words - 45) / 60)

    ranked = sorted(((score(sentence), sentence) for sentence in sentences), key=lambda pair: (-pair[0], pair[1].passage, pair[1].position))
    top = ranked[0][0]
    coverage = max(covered(under(sentence)) for sentence in sentences)
    by_meaning = any(passage.similarity is not None for passage in passages)
    enough = nearest + COVERAGE_SHARE * coverage >= EVIDENCE_MIN if by_meaning else coverage >= COVERAGE_MIN
    if not enough or top == 0.0:
        return []
    chosen: list[Sentence] = []
    for value, sentence in ranked:
        if len(chosen) == SENTENCES_MAX or value < RELATIVE_SCORE_MIN * top:
            break
        if sentence.is_code and (any(other.is_code for other in chosen) if wants_code else chosen):
            continue  # one block is enough to read; one that nobody asked for must be the best there is
        if all(_overlap(sentence.words, other.words) <= OVERLAP_MAX for other in chosen):
            chosen.append(sentence)
    return sorted(chosen, key=lambda sentence: (sentence.passage, sentence.position))


def _is_reference(text: str) -> bool:
    """Whether much of `text` is an address, even one that a line's end has broken."""
    if "://" not in text:
        return False
    return sum(len(word) for word in text.split() if "/" in word) > ADDRESS_SHARE_MAX * len(text)


def _overlap(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / (min(len(left), len(right)) or 1)


def written(sentences: Sequence[Sentence], passages: Sequence[Passage]) -> list[str]:
    """The answer in pieces, one sentence each, with the number of its passage. Code stands in a paragraph of its own."""
    pieces = list[str]()
    after_code = False
    for sentence in sentences:
        number = f"[{passages[sentence.passage].number}]"
        gap = "" if not pieces else "\n\n" if sentence.is_code or after_code else " "
        if sentence.is_code:
            pieces.append(f"{gap}{sentence.text}\n{number}")
        else:
            text = sentence.text if sentence.text.endswith((".", "!", "。", "！")) else sentence.text.rstrip(";,") + "."
            pieces.append(f"{gap}{text} {number}")
        after_code = sentence.is_code
    return pieces


class ExtractiveModel:
    """Answers from the passages alone. Never fails, costs nothing."""

    def __init__(self, language: Callable[[str], str]) -> None:
        self._language = language

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent, draft.model = True, candidate.model
        draft.input_tokens = draft.output_tokens = 0
        draft.usage_is_final = True
        pieces = written(choose(prompt.question, prompt.passages), prompt.passages)
        pieces = pieces or [NOT_FOUND.get(self._language(prompt.question), NOT_FOUND["en"])]
        left = output_tokens_max
        for piece in pieces:
            left -= len(piece.split())
            if left < 0 and draft.pieces:
                draft.finish_reason = "max_tokens"
                return
            draft.write(piece)
            await asyncio.sleep(0)  # each piece may leave before the next is made
        draft.finish_reason = "end_turn"
