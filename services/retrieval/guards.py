"""May the answer to one question be served for another one that sounds alike? Pure text comparison; any doubt is a no.

Two questions close in meaning have different answers when a number, a negation, a name, a quoted string, the kind of question or the
order of what is compared differs. Embeddings hardly see those; words do. The last guard turns the burden round: what is left of the two
questions without function words, endings and synonyms has to be the same.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from services.retrieval.guard_words import (
    ANTONYMS,
    CONTRACTIONS,
    DATE_WORDS,
    FILLERS,
    FUNCTION_WORDS,
    LANGUAGE_WORDS,
    LEMMAS,
    NEGATIONS,
    NUMBER_WORDS,
    POINTING,
    SYMMETRIC,
    SYNONYMS,
    UNITS,
)

_CONTRACTIONS = [(re.compile(pattern), whole) for pattern, whole in CONTRACTIONS]
_TOKEN = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+|[%$€£¥₹°#+&@=<>*^|~\\/-]")
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|`([^`]+)`|(?<!\w)'([^']+)'(?!\w)|(?<!\w)‘([^’]+)’(?!\w)")
_CODE = re.compile(
    r"""(?<![^\s("'`])(?:
        --?\w[\w-]*                       # --option
      | \w+(?:[_./\\:@]+\w+)+(?:\(\))?    # snake_case, dotted.name, path/to, a::b, user@host
      | \w+\(\)                          # call()
      | \w*[a-z][A-Z]\w*                 # camelCase
      | (?=\w*\d)(?=\w*[A-Za-z])\w+      # utf8, RS232
      | [A-Za-z]+(?:\+\+|\#)             # C++, C#
    )""",
    re.VERBOSE,
)
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b")
_PAST = frozenset({"was", "were", "did", "had"})
_PRESENT = frozenset({"is", "are", "am", "do", "does", "has"})
_FUTURE = frozenset({"will", "shall"})
_POLITE = re.compile(
    r"""\A(?:
        (?:hi|hello|hey|please|kindly|so|and|but|ok|okay|well)\b[ ,]*
      | (?:can|could|would|will)[ ](?:you|someone|anyone|somebody|anybody)[ ](?:please[ ]|kindly[ ])?
        (?=tell|explain|describe|give|show|say|let)
      | i[ ](?:want|would[ ]like|need|am[ ]trying|wish)[ ]to[ ](?:know|understand|find[ ]out)[ ,]*
      | (?:i[ ](?:am|was)[ ])?(?:wondering|curious)[ ](?:about[ ])?
      | (?:do[ ]you|does[ ]anyone)[ ]know[ ]
      | (?:tell|explain[ ]to|show|let)[ ](?:me|us)[ ](?:know[ ])?(?:about[ ])?
    )+""",
    re.VERBOSE,
)
_COUNTED = re.compile(
    r"how (many|much|long|old|far|often|tall|big|large|high|fast|deep|wide|heavy|soon|late|early|good|well|bad|hard|easy|likely|safe)\b"
)
_MANNER = re.compile(
    r"""how\b
      | (?:what|which)[ ](?:is|are)[ ](?:some[ ]of[ ])?(?:the[ ]|a[ ]|an[ ]|some[ ]|any[ ])?(?:\w+[ ]){0,2}
        (?:ways?|methods?|steps?)[ ](?:to|of|for|i[ ]can)\b
      | what[ ](?:can|could|should|do|must)[ ](?:i|we|one|you)[ ](?:have[ ]to[ ])?do[ ]to\b
      | (?:is|are)[ ]there[ ](?:a|any|some)[ ](?:\w+[ ])?ways?[ ](?:to|of|for)\b
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(r"(?:(?:in|on|at|for|by|to|from|with|of|about|under|during|since|until) )?(whose|whom|who|when|where|why|what|which)\b")
_FRONTED = re.compile(r"((?:in|on|at|for|with|using|under|during|within|when|if)\b[^,?!.;]{1,80}), (.+)")
_ASIDE = re.compile(r"\b(why|when|where|who|whom|whose|how)\b")
_AUXILIARY = {
    **dict.fromkeys(["is", "are", "am", "was", "were"], "is"),
    **dict.fromkeys(["do", "does", "did", "have", "has", "had"], "does"),
    **dict.fromkeys(["can", "could", "may", "might"], "can"),
    **dict.fromkeys(["should", "ought", "must", "shall"], "should"),
    **dict.fromkeys(["will", "would"], "will"),
}
_PERSONS = {"me": {"i", "me", "my", "mine", "we", "us", "our"}, "you": {"you", "your", "yours"}}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a question says, as far as its words tell."""

    numbers: tuple[str, ...]
    units: tuple[str, ...]
    dates: tuple[str, ...]
    negations: int
    quoted: tuple[str, ...]
    names: frozenset[str]
    """Words that are written like names or code, in lower case."""
    all_words: frozenset[str]
    kind: str
    tense: str
    scripts: frozenset[str]
    language: str
    content: tuple[str, ...]
    """Stems of the words that carry meaning, in their order."""


def normalised(question: str) -> str:
    """The question without what makes no difference: case, width, spaces, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split()).rstrip(" ?!.。？！")


def difference(asked: str, answered: str) -> str:
    """Why the answer to `answered` must not be served for `asked`: a CacheReceipt reason, or empty if nothing speaks against it."""
    if normalised(asked) == normalised(answered):
        return ""
    left, right = read(asked), read(answered)
    if POINTING & (left.all_words | right.all_words):
        return "context_dependent"
    if left.scripts != right.scripts or (left.language and right.language and left.language != right.language):
        return "guard_language"
    if left.quoted != right.quoted:
        return "guard_quoted"
    if left.numbers != right.numbers or left.units != right.units:
        return "guard_numbers"
    if left.dates != right.dates:
        return "guard_dates"
    if left.negations != right.negations:
        return "guard_negation"
    if not (left.names <= right.all_words and right.names <= left.all_words):
        return "guard_names"
    if left.kind != right.kind:
        return "guard_question"
    if left.tense and right.tense and left.tense != right.tense:
        return "guard_tense"
    if _opposed(left.content, right.content):
        return "guard_opposite"
    if not left.content or Counter(left.content) != Counter(right.content):
        return "guard_words"
    if not _same_order(left.content, right.content):
        return "guard_order"
    return ""


@lru_cache(maxsize=4096)
def read(question: str) -> Reading:
    """Take a question apart."""
    text = unicodedata.normalize("NFKC", question).replace("’", "'")
    plain = _expanded(text.casefold())
    words = _TOKEN.findall(_ORDINAL.sub(r"\1", plain))
    # A circumstance said first goes where it is said last: "in python, how do i …" asks "how do i … in python".
    asked = _FRONTED.sub(r"\2 \1", _POLITE.sub("", plain).rstrip(" ?!."))
    said = _TOKEN.findall(_ORDINAL.sub(r"\1", asked))
    kept = [word for word in said if word not in FUNCTION_WORDS and word not in FILLERS]
    content = tuple(_number(word) if _is_number(word) else stem(word) for word in kept or said)
    present = frozenset(words)
    return Reading(
        numbers=tuple(sorted(_number(word) for word in words if _is_number(word))),
        units=tuple(sorted(UNITS[word] for word in words if word in UNITS)),
        dates=tuple(sorted(word[:3] for word in words if word in DATE_WORDS and word != "may")),
        negations=sum(word in NEGATIONS for word in words) % 2 + 2 * bool(present & NEGATIONS),
        quoted=tuple(sorted(" ".join("".join(parts).casefold().split()) for parts in _QUOTED.findall(text))),
        names=_names(text),
        all_words=present | frozenset(plain.split()) | frozenset(re.findall(r"[\w.+#/:@\\()-]+", plain)),
        kind=_kind(asked, said),
        tense=_tense(present),
        scripts=frozenset(_script(letter) for letter in text if letter.isalpha()),
        language=_language(words),
        content=content,
    )


def stem(word: str) -> str:
    """A word without its English ending, then the first of its synonyms. Crude, and the same for both questions."""
    word = LEMMAS.get(word, word)
    if word in SYNONYMS:
        return SYNONYMS[word]
    return SYNONYMS.get(_bare(word), _bare(word))


def _bare(word: str) -> str:
    if len(word) <= 3 or not word.isascii():
        return word
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            word = word[: -len(ending)] + instead
            break
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and re.search(r"[aeiouy]", word[: -len(ending)]):
            word = word[: -len(ending)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word.removesuffix("e") if len(word) > 3 else word


def _expanded(text: str) -> str:
    for pattern, whole in _CONTRACTIONS:
        text = pattern.sub(whole, text)
    return " ".join(text.split())


def _is_number(word: str) -> bool:
    return word[0].isdigit() or word in NUMBER_WORDS


def _number(word: str) -> str:
    spoken = NUMBER_WORDS.get(word)
    if spoken:
        return spoken
    # 1,000 is 1000; 1.50 is 1.5; dates and ratios stay as written.
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", word):
        word = word.replace(",", "")
    if re.fullmatch(r"\d+\.\d+", word):
        word = word.rstrip("0").rstrip(".")
    return word.lstrip("0") or "0"


def _names(text: str) -> frozenset[str]:
    """Words with a capital inside a sentence, words all in capitals, and code."""
    names = {match.group().casefold() for match in _CODE.finditer(text)}
    sentence_start = True
    for match in re.finditer(r"[^\W\d_]+|[.?!:]", text):
        word = match.group()
        if not word[0].isalpha():
            sentence_start = True
            continue
        capital = word[0].isupper() and not sentence_start and word.casefold() not in FUNCTION_WORDS
        if capital or (len(word) > 1 and word.isupper()):
            names.add(word.casefold())
        sentence_start = False
    # A title written all in capitals names nobody.
    letters = [letter for letter in text if letter.isalpha()]
    if letters and sum(letter.isupper() for letter in letters) > 0.7 * len(letters):
        return frozenset()
    return frozenset(names)


def _kind(asked: str, words: list[str]) -> str:
    """Manner, count, person, time, place, reason or thing, with its auxiliary and whom it is about; or yes-or-no by its auxiliary.

    Ways to do something are the same for everybody; anything else may differ with who asks whom.
    """
    asides = sorted(match.group() for match in _ASIDE.finditer(asked, 1))
    counted = _COUNTED.match(asked)
    if _MANNER.match(asked) and not counted:
        return " ".join(["manner", *asides])
    about = [who for who, forms in _PERSONS.items() if forms.intersection(words)]
    auxiliary = next((_AUXILIARY[word] for word in words if word in _AUXILIARY), "")
    if {"mean", "means", "meaning", "definition", "define", "explain", "describe"}.intersection(words) and auxiliary in ("", "does"):
        auxiliary = "is"
    if counted:
        return " ".join(["how", counted.group(1), auxiliary, *about, *asides])
    if plain := _PLAIN.match(asked):
        word = {"whom": "who", "which": "what"}.get(plain.group(1), plain.group(1))
        return " ".join([word, auxiliary, *about, *asides])
    if asked.split(" ", 1)[0] in _AUXILIARY:
        return " ".join(["whether", auxiliary, *about, *asides])
    return " ".join(["what", auxiliary or "is", *about, *asides])


def _tense(words: frozenset[str]) -> str:
    found = [name for name, marks in (("past", _PAST), ("present", _PRESENT), ("future", _FUTURE)) if words & marks]
    return found[0] if len(found) == 1 else ""


def _script(letter: str) -> str:
    return "LATIN" if letter.isascii() else unicodedata.name(letter, "?").split(" ", 1)[0]


def _language(words: list[str]) -> str:
    """The language most of whose commonest words occur; empty if none stands out."""
    counts = sorted(((sum(word in common for word in words), name) for name, common in LANGUAGE_WORDS.items()), reverse=True)
    return counts[0][1] if counts[0][0] >= counts[1][0] + 2 else ""


def _opposed(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Whether one question has a word whose opposite stands in the other one alone."""
    only_left, only_right = set(left) - set(right), set(right) - set(left)
    return any(frozenset((one, other)) in _OPPOSITES for one in only_left for other in only_right)


def _same_order(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Whether the words come in one order, but for the two sides of a symmetric word."""
    return left == right or _sides(left) == _sides(right)


def _sides(content: tuple[str, ...]) -> tuple[str, ...]:
    """The words with the two neighbours of each symmetric word in alphabetical order."""
    ordered = list(content)
    for place in range(1, len(ordered) - 1):
        if ordered[place] in SYMMETRIC:
            ordered[place - 1], ordered[place + 1] = sorted((ordered[place - 1], ordered[place + 1]))
    return tuple(ordered)


_OPPOSITES = frozenset(frozenset(stem(word) for word in pair) for pair in ANTONYMS)
