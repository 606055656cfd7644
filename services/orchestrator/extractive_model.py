"""A model that needs no key: it answers with the best sentences of the passages, word for word and cited, and writes nothing of its own.

It is honest rather than clever: what the passages do not say, it says it did not find.
"""

import asyncio
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.orchestrator.domain import Candidate, Draft, Passage, Prompt
from services.orchestrator.words import STOP

SENTENCES_MAX = 4
SENTENCE_CHARACTERS_MAX = 420
SENTENCE_WORDS_MIN = 4
COVERAGE_MIN = 0.34
"""Share of the question's weight that the best sentence, with its headings, must cover before anything is called an answer."""
UNSEEN_WEIGHT = 0.6
"""What a word of the question weighs that no passage has, against the rarest that one has."""
RELATIVE_SCORE_MIN = 0.55
"""A further sentence must be this good, measured by the best one."""
OVERLAP_MAX = 0.6
"""Sentences that share more of their words than this say the same."""

NOT_FOUND = {
    "en": "The documents I can search do not seem to answer this question.",
    "de": "In den durchsuchten Dokumenten finde ich darauf keine Antwort.",
    "fr": "Les documents consultés ne semblent pas répondre à cette question.",
    "es": "Los documentos consultados no parecen responder a esta pregunta.",
}

_WORD = re.compile(r"[^\W_]+")
_LIST_MARK = re.compile(r"^\s{0,6}(?:[-*+•]|\d{1,3}[.)])\s+")
_LINK = re.compile(r"!?\[([^\]]*)\]\((?:[^()]|\([^()]*\))*\)")
_REFERENCE_LINK = re.compile(r"!?\[([^\]]+)\]\[[^\]]*\]")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<!--.*?-->", re.DOTALL)
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")
_MARKER = re.compile(r"\[\^?\d{1,3}\]")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+(?=[\"'“‘(\[`]?[A-Z0-9À-ÞА-Я\u3040-\u9fff`])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|approx|no|nr|fig|mr|mrs|ms|dr|st|inc|ltd|co|z\.B|d\.h|bzw|usw)|\b[A-Z])\.$", re.IGNORECASE
)
_BOILERPLATE = re.compile(
    r"^(?:table of contents|contents|see also|copyright|all rights reserved|©|\(c\)|click here|back to top|edit (?:this|on)|sign in|log in"
    r"|subscribe|skip to|cookie|share this|next:|previous:|note:?$|example:?$|warning:?$)",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"(?:it|this|that|these|those|they|he|she|but|so|however|besides|unlike|otherwise|therefore|on the other hand"
    r"|in (?:this|that) case|see|if you)\b",
    re.IGNORECASE,
)
"""Openings that lean on the sentence before, or lead elsewhere."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a passage, cleaned for reading."""

    text: str
    passage: int
    """Index of the passage."""
    position: int
    """Place within the passage."""
    words: frozenset[str]


def stem(word: str) -> str:
    """Cut the commonest English endings, so that `caches` finds `cache` and `indexed` finds `index`."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    for ending in ("ations", "ation", "ings", "ing", "ers", "ed", "es", "er", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    return word.removesuffix("e") if len(word) > 3 else word


def content_words(text: str) -> list[str]:
    """Stemmed words that carry meaning."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [stem(word) for word in _WORD.findall(folded) if word not in STOP]


def clean(text: str) -> str:
    """Markdown as plain reading text: links by their words, no emphasis marks, no tags, no footnote marks of its own."""
    text = _TAG.sub(" ", text)
    text = _REFERENCE_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _MARKER.sub("", _EMPHASIS.sub(r"\2", text))
    text = _LIST_MARK.sub("", text).strip().lstrip(">").strip().strip("|").strip()
    return re.sub(r"\s+", " ", text)


def split_sentences(text: str) -> list[str]:
    """Whole sentences of a passage in reading order. Headings, code blocks, tables' rules and menus are left out."""
    blocks: list[str] = []
    fenced = False
    paragraph: list[str] = []

    def close() -> None:
        if paragraph:
            blocks.append(" ".join(paragraph))
            paragraph.clear()

    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            close()
        elif fenced or stripped.startswith("#") or (stripped and not any(letter.isalnum() for letter in stripped)) or not stripped:
            close()
        elif _LIST_MARK.match(line) or stripped.startswith("|"):
            close()
            paragraph.append(stripped)
            if stripped.startswith("|"):
                close()
        else:
            paragraph.append(stripped)
    close()
    sentences = []
    for block in blocks:
        readable = clean(block)
        begin = 0
        for end in _SENTENCE_END.finditer(readable):
            if not _ABBREVIATION.search(readable[begin : end.start()].rstrip("\"'”’)]")):
                sentences.append(readable[begin : end.start()].strip())
                begin = end.end()
        sentences.append(readable[begin:].strip())
    return [sentence for sentence in sentences if _readable(sentence)]


def _readable(sentence: str) -> bool:
    letters = sum(character.isalpha() for character in sentence)
    words = len(sentence.split())
    has_wide_script = any("\u3040" <= character <= "\u9fff" for character in sentence)
    return (
        (words >= SENTENCE_WORDS_MIN or has_wide_script)
        and len(sentence) <= SENTENCE_CHARACTERS_MAX
        and letters >= 0.5 * len(sentence.replace(" ", ""))
        and not _BOILERPLATE.match(sentence)
        and not sentence.endswith((":", "?"))
    )


def choose(question: str, passages: Sequence[Passage]) -> list[Sentence]:
    """The sentences that answer best, at most SENTENCES_MAX, in reading order; none if nothing answers."""
    asked = list(dict.fromkeys(content_words(question)))
    sentences = [
        Sentence(text, index, position, frozenset(content_words(text)))
        for index, passage in enumerate(passages)
        for position, text in enumerate(split_sentences(passage.text))
    ]
    if not asked or not sentences:
        return []
    headings = [frozenset(content_words(" ".join((passage.title, *passage.heading_path)))) for passage in passages]
    seen_in = Counter(word for sentence in sentences for word in sentence.words)
    weight = {word: math.log(1 + (len(sentences) - seen_in[word] + 0.5) / (seen_in[word] + 0.5)) for word in asked}
    for word in asked:
        if not seen_in[word]:  # perhaps what the question is about, perhaps only how it is put
            weight[word] *= UNSEEN_WEIGHT
    total = sum(weight.values()) or 1.0

    def covered(words: frozenset[str]) -> float:
        return sum(weight[word] for word in asked if word in words) / total

    best_score = max((passage.score for passage in passages), default=0.0)
    wants_number = re.match(
        r"\s*(?:how (?:many|much|long|old|large|big|often|fast)|when|what (?:port|size|number|version|year))\b", question.casefold()
    )

    def score(sentence: Sentence) -> float:
        own = covered(sentence.words)
        if own == 0.0:
            return 0.0
        passage = passages[sentence.passage]
        context = covered(sentence.words | headings[sentence.passage]) - own
        rank = (passage.score / best_score) if best_score > 0 else 1.0 / (1 + sentence.passage)
        value = own + 0.5 * context + 0.15 * max(0.0, rank)
        if wants_number and any(letter.isdigit() for letter in sentence.text):
            value += 0.15
        if _DANGLING.match(sentence.text):
            value *= 0.85
        words = len(sentence.text.split())
        return value * (1.0 if words >= 5 else 0.8) / (1.0 + max(0, words - 45) / 60)

    ranked = sorted(((score(sentence), sentence) for sentence in sentences), key=lambda pair: (-pair[0], pair[1].passage, pair[1].position))
    top, best = ranked[0]
    if covered(best.words | headings[best.passage]) < COVERAGE_MIN or top == 0.0:
        return []
    chosen: list[Sentence] = []
    for value, sentence in ranked:
        if len(chosen) == SENTENCES_MAX or value < RELATIVE_SCORE_MIN * top:
            break
        if all(_overlap(sentence.words, other.words) <= OVERLAP_MAX for other in chosen):
            chosen.append(sentence)
    return sorted(chosen, key=lambda sentence: (sentence.passage, sentence.position))


def _overlap(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / (min(len(left), len(right)) or 1)


def written(sentences: Sequence[Sentence], passages: Sequence[Passage]) -> list[str]:
    """The answer in pieces, one sentence each, with the number of its passage."""
    pieces = []
    for place, sentence in enumerate(sentences):
        text = sentence.text if sentence.text.endswith((".", "!", "。", "！")) else sentence.text.rstrip(";,") + "."
        pieces.append(f"{' ' if place else ''}{text} [{passages[sentence.passage].number}]")
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
