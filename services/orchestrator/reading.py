"""Text taken apart for comparing: words by their stems, numbers, negations, and the sentences of a passage. Pure, and for any language as
far as word endings go; what follows from a comparison is decided elsewhere.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable

from services.orchestrator.words import NEGATIONS, NUMBERS, OPPOSITES, STOP

SENTENCE_CHARACTERS_MAX = 420
"""A longer one is a table or a list that lost its lines."""
SENTENCE_WORDS_MIN = 4
LEAD_WORDS_MIN = 8
"""Of a sentence that ends in a colon and leads to code, it says by itself what the code does."""
CODE_SPANS_MAX = 6400
"""Of one text: so many private characters there are."""
STEMS_KEPT_MAX = 16_384
"""The words of a few hundred passages: the same ones are asked for again and again."""
_WORD = re.compile(r"[^\W_]+")
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""Letters of scripts that put no space between words."""
_NUMBER = re.compile(r"(?<![\w.,])(?<![^\W\d_]-)(?<![A-Z]{2} )\d+(?:[.,]\d+)*(?=[^\W\d_]{0,3}(?!\w))")
"""A figure, perhaps with its unit; not the number in a name such as `IL-2`, `utf8`, `3T3` or `BRCA 1`."""
_LIST_MARK = re.compile(r"^\s{0,6}(?:[-*+•]|\d{1,3}[.)])\s+")
_LINK = re.compile(r"!?\[([^\]]*)\]\((?:[^()]|\([^()]*\))*\)")
_REFERENCE_LINK = re.compile(r"!?\[([^\]]+)\]\[[^\]]*\]")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<!--.*?-->", re.DOTALL)
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")
_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_PRIVATE = re.compile("[\ue000-\uf8ff]")
"""Characters that no text means. Each stands for a span of code while marks are taken away."""
_MARKER = re.compile(r"\[\^?\d{1,3}\]")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+(?=[\"'“‘(\[`]?[A-Z0-9À-ÞА-Я\u3040-\u9fff`])")
_BLOCK_MARK = r"(?:[-*+•]|\d{1,3}[.)]|#{1,6}|>|\|)[ \t]+"
_FENCE_LINE = r"(?:`{3,}|~{3,})[^\n]*\n[ \t]*"
_BLOCK_START = re.compile(rf"\n\s*\n[ \t]*(?:{_BLOCK_MARK})?|(?:\A|\n)[ \t]{{0,6}}(?:{_BLOCK_MARK}|{_FENCE_LINE})")
ABBREVIATION_CHARACTERS_MAX = 16
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|cf|vs|approx|no|nr|fig|mr|mrs|ms|dr|st|inc|ltd|co|z\.B|d\.h|bzw|usw)|\b[A-Z])\.$", re.IGNORECASE
)
_BOILERPLATE = re.compile(
    r"^(?:table of contents|contents|see also|copyright|all rights reserved|©|\(c\)|click here|back to top|edit (?:this|on)|sign in|log in"
    r"|subscribe|skip to|cookie|share this|next:|previous:|note:?$|example:?$|warning:?$)",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=STEMS_KEPT_MAX)
def stem(word: str) -> str:
    """Cut the commonest English endings, so that `caches` finds `cache` and `indexed` finds `index`."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    for ending in ("ations", "ation", "ings", "ing", "ers", "ed", "es", "er", "ly", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)]
            break
    return word.removesuffix("e") if len(word) > 3 else word


_OPPOSITES: dict[str, frozenset[str]] = {}
for _one, _other in OPPOSITES:
    for _word, _opposite in ((_one, _other), (_other, _one)):
        _OPPOSITES[stem(_word)] = _OPPOSITES.get(stem(_word), frozenset()) | {stem(_opposite)}


def content_words(text: str) -> list[str]:
    """Stemmed words that carry meaning, in their order; of scripts without spaces, pairs of neighbouring letters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    found: list[str] = []
    for word in _WORD.findall(folded):
        if not word.isascii() and _WIDE.search(word):
            found += [word[place : place + 2] for place in range(max(1, len(word) - 1))]
        elif word not in STOP:
            found.append(stem(word))
    return found


def numbers(text: str) -> frozenset[str]:
    """The numbers of a text, one way of writing for each: `1,000`, `1000` and `1000.0` are one, and so are `two` and `2`."""
    normal = unicodedata.normalize("NFKC", text)
    found = {_plain_number(digits) for digits in _NUMBER.findall(normal)}
    return frozenset(found | {NUMBERS[word] for word in _WORD.findall(normal.casefold()) if word in NUMBERS})


def _plain_number(digits: str) -> str:
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        digits = digits.replace(",", "")
    whole, dot, fraction = digits.replace(",", ".").partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (dot + fraction if fraction else "")


def opposed(left: Iterable[str], right: Iterable[str]) -> bool:
    """Whether a stemmed word on the left has its opposite, and not itself, on the right."""
    said, other = set(left), set(right)
    return any(_OPPOSITES.get(word, frozenset()) & other - said for word in said - other)


def all_words(text: str) -> list[str]:
    """Stemmed words, also those that carry little meaning."""
    return [stem(word) for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold())]


def negations(text: str) -> int:
    """How many words of a text turn its meaning round."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return sum(word in NEGATIONS for word in _WORD.findall(folded.replace("n't", " not")))


def clean(text: str) -> str:
    """Markdown as plain reading text: links by their words, no emphasis marks, no tags, no footnote marks. Code stays as it is written."""
    code: list[str] = []
    if "`" in text:

        def put_aside(span: re.Match[str]) -> str:
            code.append(span.group())
            return chr(0xE000 + len(code) - 1) if len(code) <= CODE_SPANS_MAX else span.group()

        text = _CODE.sub(put_aside, _PRIVATE.sub("", text))
    text = _TAG.sub(" ", text)
    text = _REFERENCE_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _MARKER.sub("", _EMPHASIS.sub(r"\2", text))
    text = _LIST_MARK.sub("", text).strip().lstrip(">").strip().strip("|").strip()
    if code:
        text = _PRIVATE.sub(lambda place: code[ord(place.group()) - 0xE000], text)
    return re.sub(r"\s+", " ", text)


def split_sentences(text: str) -> list[str]:
    """Whole sentences of a passage in reading order. Headings, code blocks, tables' rules and menus are left out.

    A few words that stand behind a sentence belong to it. One that leads to code ends in a full stop here.
    """
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
            if fenced and blocks and blocks[-1].endswith(":"):
                blocks[-1] = _led_to_code(blocks[-1])
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
        found: list[str] = []
        begin = 0
        for end in (*(match.span() for match in _SENTENCE_END.finditer(readable)), (len(readable), len(readable))):
            sentence = readable[begin : end[0]].strip()
            if end[0] < len(readable) and _ABBREVIATION.search(sentence.rstrip("\"'”’)]")):
                continue
            begin = end[1]
            if found and _belongs_to_the_one_before(sentence, found[-1]):
                found[-1] += f" {sentence}"
            else:
                found.append(sentence)
        sentences += found
    return [sentence for sentence in sentences if _readable(sentence)]


def _led_to_code(block: str) -> str:
    lead = block[max((end.end() for end in _SENTENCE_END.finditer(block)), default=0) :]
    return block[:-1] + "." if len(lead.split()) >= LEAD_WORDS_MIN else block


def _belongs_to_the_one_before(sentence: str, before: str) -> bool:
    few = 0 < len(sentence.split()) < SENTENCE_WORDS_MIN and sentence.endswith((".", "!")) and any(map(str.isalnum, sentence))
    return few and _readable(before) and len(before) + len(sentence) < SENTENCE_CHARACTERS_MAX


def sentence_start(text: str) -> int:
    """Where the last sentence of a Markdown text begins, in code points: after the end of another, a blank line, a list's mark or
    a line that opens or closes code."""
    start = 0
    for line in _BLOCK_START.finditer(text):
        start = line.end()
    for end in _SENTENCE_END.finditer(text, start):
        if not _ABBREVIATION.search(text[max(start, end.start() - ABBREVIATION_CHARACTERS_MAX) : end.start()].rstrip("\"'”’)]")):
            start = end.end()
    return start + len(text[start:]) - len(text[start:].lstrip(" \t\n.,;:!?。！？)\"'”’"))


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
