"""The self-contained form of a question that leans on the conversation, by rule: what it points at is named, what it leaves out is said.

Pure. The form is for searching and for choosing sentences; a model that writes is given the question as it was asked.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.orchestrator.domain import Turn
from services.orchestrator.standalone import depends_on_history
from services.orchestrator.words import CONVERSATION, GRAMMAR, LITTLE, POINTERS, STOP

FORM_CHARACTERS_MAX = 4_000
ANSWER_READ_CHARACTERS = 400
"""Who was asked for is said at the beginning of an answer."""
INSTEAD_WORDS_MAX = 6
"""A follow-up that names another thing does it briefly; a longer one is a question of its own."""
PHRASE_WORDS_MAX = 4

_WORD = re.compile(r"[^\W_]+(?:[-'’.][^\W_]+)*")
_PERSONS, _OF_PERSONS = GRAMMAR["persons"], GRAMMAR["of_persons"]
_THINGS, _OF_THINGS, _DEMONSTRATIVES = GRAMMAR["things"], GRAMMAR["of_things"], GRAMMAR["demonstratives"]
_DETERMINERS, _ASKING, _PREPOSITIONS = GRAMMAR["determiners"], GRAMMAR["asking"], GRAMMAR["prepositions"]
_AUXILIARIES = GRAMMAR["auxiliaries"]
_DO = frozenset({"do", "does", "did"})
_PARTICIPLE = re.compile(
    r"\w+(?:ed|en)|made|built|kept|known|held|found|sold|sent|set|done|lost|won|paid|put|born|meant|called|used", re.IGNORECASE
)
_OPENER = re.compile(r"^\s*(?:(?:and|but|so|or|also|then|und|aber|et|mais|y|pero)\b[\s,]*)+", re.IGNORECASE)
_INSTEAD = re.compile(
    r"^\s*(?:(?:and|but|so)\s+)?(?:(?:what|how)\s+about|and|or|was\s+ist\s+mit|und|oder|et|ou|y|o)\s+"
    r"(?:(?P<place>of|for|with|in|on|by|from|at|von|für|mit|bei|de|en)\s+)?(?P<what>[^\s].*?)\s*[?!.]*\s*$",
    re.IGNORECASE | re.DOTALL,
)
"""A follow-up that only names another thing to ask the same of."""

Kind = Literal["name", "thing", "number"]


@dataclass(frozen=True, slots=True)
class _Phrase:
    """A part of a question that names something, with its determiner."""

    kind: Kind
    begin: int
    end: int


def self_contained(question: str, turns: Sequence[Turn]) -> str:
    """`question` as somebody would ask it who has not heard `turns`, the turns before it, oldest first; at most 4000 characters.

    Of the turns only those count that lead back to the last question that stood alone.
    """
    chain: list[Turn] = []
    for turn in reversed(turns):
        chain.insert(0, turn)
        if not depends_on_history(turn.question):
            break
    before, answer = "", ""
    for turn in chain:
        before, answer = _resolved(turn.question, before, answer), turn.text
    return _resolved(question, before, answer)[:FORM_CHARACTERS_MAX]


def _resolved(question: str, before: str, answer: str) -> str:
    """`question` after `before`, which is self-contained already, and the answer to that."""
    question = " ".join(question.split())
    if not before or not depends_on_history(question):
        return question
    swapped = _asked_of_another(question, before)
    if swapped is not None:
        return swapped
    named = _with_names(question, before, answer)
    if named is not None:
        return named
    return f"{before}\n{question}"


def _asked_of_another(question: str, before: str) -> str | None:
    """ "And the ledger?" after "Which port does the gateway listen on?": the same question, of the ledger."""
    match = _INSTEAD.match(question)
    if match is None:
        return None
    what = match["what"]
    words = _words(what)
    if (
        not words
        or len(words) > INSTEAD_WORDS_MAX
        or words[0] in _ASKING
        or any(word in POINTERS or word in _AUXILIARIES for word in words)
    ):
        return None
    replaced = _counterpart(what, (match["place"] or "").casefold(), before)
    if replaced is None:
        place = f"{match['place']} " if match["place"] else ""
        return f"{before.rstrip(' ?.!')} {place}{what}?"
    return f"{before[: replaced.begin]}{what}{before[replaced.end :]}"


def _counterpart(what: str, place: str, before: str) -> _Phrase | None:
    """What `before` says of the kind of `what`: with the same last word, after the same preposition, or else of the same form."""
    phrases = _phrases(before)
    if what.strip().isdigit():
        return next((phrase for phrase in reversed(phrases) if phrase.kind == "number"), None)
    last = _words(what)[-1]
    for phrase in phrases:
        if _words(before[phrase.begin : phrase.end])[-1] == last:
            return phrase
    if place:
        return next((phrase for phrase in phrases if _words(before[: phrase.begin])[-1:] == [place]), None)
    is_name = any(word[0].isupper() for word in _WORD.findall(what))
    for kind in ("name", "thing") if is_name else ("thing", "name"):
        found = [phrase for phrase in _by_weight(phrases, before) if phrase.kind == kind]
        if found:
            return found[0]
    return None


def _with_names(question: str, before: str, answer: str) -> str | None:
    """`question` with its first pointer named; None if it has none that can be."""
    front, comma, _ = question.partition(",")
    if comma and any(phrase.kind != "number" for phrase in _phrases(_OPENER.sub("", front))):
        return None  # "and the ledger, what does it keep?": it is named already
    for match in _WORD.finditer(question):
        word = match[0].casefold().replace("’", "'")
        plain, is_short_for = word.removesuffix("'s"), word.endswith("'s")
        person = plain in _PERSONS | _OF_PERSONS
        if not person and plain not in _THINGS | _OF_THINGS | _DEMONSTRATIVES:
            continue
        following = _WORD.match(question, match.end() + 1)
        if plain in _DEMONSTRATIVES and following is not None and following[0].casefold() not in LITTLE:
            continue  # "this error": it has a name of its own, only not a full one
        topic = _topic(before, answer, person=person, last=plain in _DEMONSTRATIVES | {"there"})
        if topic is None:
            return None
        if plain in _OF_THINGS | _OF_PERSONS:
            topic += "'" if topic.endswith("s") else "'s"
        elif is_short_for:
            topic += " is"
        elif plain == "there" and _words(question[: match.start()])[-1:] not in (["in"], ["from"]):
            topic = f"in {topic}"
        others = {word for word in _words(question) if word not in POINTERS | LITTLE | _AUXILIARIES}
        if not others:
            return None  # "why does it?": what it does was left out too
        whole = _OPENER.sub("", f"{question[: match.start()]}{topic}{question[match.end() :]}")
        return whole[:1].upper() + whole[1:]
    return None


def _topic(before: str, answer: str, *, person: bool, last: bool) -> str | None:
    """What a pointer points at: whom the answer names if somebody was asked for, else the weightiest name, or thing, of the question."""
    if person and _words(before)[:1] in (["who"], ["whom"], ["wer"], ["qui"]):
        said = answer[:ANSWER_READ_CHARACTERS]
        named = [said[phrase.begin : phrase.end] for phrase in _phrases(said) if phrase.kind == "name"]
        if named:
            return _bare(named[0])
    phrases = _by_weight(_phrases(before), before)
    for kind in ("name", "thing"):
        found = [before[phrase.begin : phrase.end] for phrase in phrases if phrase.kind == kind]
        if found:
            return _bare(found[-1] if last else found[0])
    return None


def _bare(phrase: str) -> str:
    return re.sub(r"['’]s?$", "", phrase)


def _by_weight(phrases: Sequence[_Phrase], text: str) -> list[_Phrase]:
    """First what follows the auxiliary, which is what a question is about; then what belongs to the asking word, as in "which port"."""
    turning = next((match.start() for match in _WORD.finditer(text) if match[0].casefold() in _AUXILIARIES), 0)
    return [phrase for phrase in phrases if phrase.begin > turning] + [phrase for phrase in phrases if phrase.begin <= turning]


def _phrases(text: str) -> list[_Phrase]:
    """Names, things and numbers, in order. A thing is a determiner with the words that seem to belong to it."""
    found: list[_Phrase] = []
    words = list(_WORD.finditer(text))
    place = 0
    while place < len(words):
        begin = words[place].start()
        start = place
        if words[place][0].casefold() in _DETERMINERS and place + 1 < len(words) and _apart(text, words, place) == " ":
            start = place + 1
        if _is_name(text, words, start):
            until = start
            while until + 1 < len(words) and _apart(text, words, until) == " " and _goes_on_a_name(words[until + 1][0]):
                until += 1
            found.append(_Phrase("name", begin, words[until].end()))
            place = until + 1
        elif start > place and (last := _thing_end(text, words, start)) is not None:
            found.append(_Phrase("thing", begin, words[last].end()))
            place = last + 1
        else:
            if words[place][0].isdigit():
                found.append(_Phrase("number", begin, words[place].end()))
            place += 1
    return found


def _goes_on_a_name(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit()


def _is_name(text: str, words: Sequence[re.Match[str]], place: int) -> bool:
    word = words[place][0]
    if not word[0].isupper():
        return False
    folded = word.casefold()
    is_first = place == 0 or text[: words[place].start()].rstrip()[-1:] in (".", "!", "?", ":")
    return not (is_first and (folded in LITTLE | STOP | _ASKING | _PREPOSITIONS | _DETERMINERS))


def _thing_end(text: str, words: Sequence[re.Match[str]], start: int) -> int | None:
    """The last word of a thing that begins at `start`, after its determiner; None if no word belongs to it."""
    last = start - 1
    while last + 1 < len(words) and last + 1 - start < PHRASE_WORDS_MAX:
        following = words[last + 1][0]
        if last >= start and _apart(text, words, last) != " ":
            break
        if not following[0].islower() or following.casefold() in LITTLE | STOP | POINTERS | CONVERSATION | _PREPOSITIONS | _AUXILIARIES:
            break
        last += 1
    if last < start:
        return None
    # What follows the thing in a question is a verb: "does the gateway listen", "is the ladder made".
    after = words[start - 2][0].casefold() if start >= 2 else ""
    if last > start and (after in _DO or (after in _AUXILIARIES and _PARTICIPLE.fullmatch(words[last][0]))):
        last -= 1
    return last


def _apart(text: str, words: Sequence[re.Match[str]], place: int) -> str:
    """What stands between a word and the next."""
    return text[words[place].end() : words[place + 1].start()]


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(unicodedata.normalize("NFKC", text))]
