"""Does a question stand alone, or lean on the conversation or on the clock? When are two the same? Pure: rules over words, no model.

A wrong "leans" costs a cache hit; a wrong "stands alone" could cost a wrong answer. So in doubt it leans.
"""

import re
import unicodedata

from services.orchestrator.words import CONVERSATION, LANGUAGES, LITTLE, POINTERS

_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[^\W_]+(?:[-'’.][^\W_]+)*")

_CONVERSATION_PHRASES = re.compile(
    r"\b(you (?:said|told|mentioned|wrote|meant)|did you (?:say|tell|mention|write|mean)"
    r"|your (?:last|previous|earlier)? ?(?:answer|reply|response|point)|(?:last|previous|first|"
    r"second|third) (?:answer|question|point|one)|tell me more|more (?:detail|details|examples?)|go on|continue|keep going|elaborate|"
    r"for example|rephrase|shorter|longer|simpler|summari[sz]e (?:that|this|it)|translate (?:that|this|it))\b"
)
_OPENERS = re.compile(r"^(?:and|but|so|also|or|then|else|what about|how about|what if|why not|und|aber|auch|et|mais|y|pero)\b")
# First-person questions that only ask for help are about the matter, not about the asker: "how do I install x".
_ASKING_FOR_HELP = re.compile(
    r"\b(?:(?:do|can|could|should|would|must|may|might|will) (?:i|we)|(?:show|tell|give|help|let) (?:me|us)|if (?:i|we)|when (?:i|we)"
    r"|i (?:want|need|would like|have) to|i'd like to)\b"
)
# "Is there a limit" points at nothing, unlike "how do I get there".
_EXISTS = re.compile(
    r"\b(?:is|are|was|were|will|would|can|could|should|has|have|had|does|do|did) there\b"
    r"|\bthere(?:['’]s| (?:is|are|was|were|will|would|can|could|should|has|have|had|exists?))\b"
)
# "How many points did they score": whoever it is, the question has not named them, only what is asked of them.
_UNNAMED_SUBJECT = re.compile(
    r"^(?:who|whom|whose|what|which|when|where|why|how)\b[^,;:]*?\b(?P<auxiliary>is|are|was|were|do|does|did|has|have|had|can|could|will|would"
    r"|should|must|may|might)(?:n['’]t)? (?P<next>\w+)"
)
_SUBJECTS = frozenset({"it", "they", "he", "she", "this", "these", "those"})
_DETERMINERS = frozenset({"the", "a", "an", "any", "every", "each", "all"})
_CLOCK = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|now|nowadays|currently|at (?:the|this) moment|right now|at present"
    r"|(?:this|last|next|past|coming) (?:hour|day|week|weekend|month|quarter|year|monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
    r"|latest|newest|most recent|recently|up[- ]to[- ]date|current|so far|ago|what (?:time|day|date) is it|how (?:old|long ago)"
    r"|heute|gestern|morgen|jetzt|aktuell|aktuelle|zurzeit|derzeit|aujourd'hui|hier|demain|maintenant|actuellement"
    r"|hoy|ayer|mañana|ahora|actualmente)\b"
)


def normalise(question: str) -> str:
    """Fold what cannot change the meaning: Unicode compatibility forms, white space, the case of a first letter, a final mark.

    Case elsewhere stays: `US` is not `us`. A final `!` or several marks stay too.
    """
    text = _SPACE.sub(" ", unicodedata.normalize("NFKC", question)).strip()
    if len(text) > 1 and text[-1] in ".?" and text[-2] not in ".?!":
        text = text[:-1].rstrip()
    first, separator, rest = text.partition(" ")
    return first.lower() + separator + rest if first.istitle() else text


def depends_on_history(question: str) -> bool:
    """Whether the question cannot be understood, or not safely, without the turns before it."""
    folded = unicodedata.normalize("NFKC", question).casefold().strip()
    if _OPENERS.search(folded) or _CONVERSATION_PHRASES.search(folded):
        return True
    matter, existential = _EXISTS.subn(" ", _ASKING_FOR_HELP.sub(" ", folded))
    words = _WORD.findall(matter)
    if (asked := _UNNAMED_SUBJECT.match(folded)) is not None and asked["next"] in _SUBJECTS:
        return True
    if words[-1:] == ["there"] or any(word in CONVERSATION for word in words):
        return True
    names = {word.casefold() for word in _WORD.findall(question)[1:] if word[0].isupper() or any(letter.isdigit() for letter in word)}
    named = 0
    for place, word in enumerate(words):
        if word == "that" and named and _DETERMINERS & set(words[max(0, place - 3) : place - 1]):
            continue  # "the header that carries it": a relative, not a pointer
        if word in POINTERS:
            if named < 2 or existential:  # "is there a second limit on it": what comes after it names the new, not the old
                return True
        elif word not in LITTLE and len(word) > 1:
            named += 2 if word in names else 1
    return named < (2 if existential else 1)  # "is there any": of what?


def depends_on_time(question: str) -> bool:
    """Whether the right answer may change with the clock alone."""
    return _CLOCK.search(unicodedata.normalize("NFKC", question).casefold()) is not None


def language(question: str) -> str:
    """Language the answer will be in, roughly: a language code for Latin script where its little words show, else the script's name."""
    scripts = [unicodedata.name(letter, "").split(" ", 1)[0] for letter in question if letter.isalpha()]
    if not scripts:
        return "none"
    script = max(sorted(set(scripts)), key=scripts.count)
    if script != "LATIN":
        return script.lower()
    words = set(_WORD.findall(question.casefold()))
    scores = {code: len(words & stop_words) for code, stop_words in LANGUAGES.items()}
    best = max(scores, key=lambda code: scores[code])
    return best if scores[best] else "latin"
