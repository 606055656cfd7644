"""Does a text go round in circles? Pure, and in time proportional to the text.

A model that is caught in a loop writes the same words until it is stopped; a table or a list that says similar things is no loop.
"""

import re
from collections import Counter

TAIL_CHARACTERS = 600
"""So much of the end is looked at letter by letter."""
TIMES_MIN = 4
"""A stretch that ends the text so often in a row is a loop."""
LOOP_CHARACTERS_MIN = 24
"""What is said over and over must come to this much, so that `ha ha ha ha` and rules of dashes pass."""
PHRASE_WORDS = 8
PHRASE_TIMES_MIN, PHRASE_SHARE_MIN = 5, 0.4
"""A phrase that is there so often, with all such phrases making up this share of the text, is a loop that came to an end."""
_WORD = re.compile(r"[^\W_]+")


def repeats(text: str) -> bool:
    """Whether the text ends in a loop, or is for a large part the same phrases again and again."""
    return _ends_in_loop(text.rstrip()[-TAIL_CHARACTERS:]) or _same_phrases(text)


def _ends_in_loop(tail: str) -> bool:
    """The shortest period of the tail, by the longest border of every prefix of the reversed tail (Knuth, Morris and Pratt)."""
    letters = tail[::-1]
    border = [0] * len(letters)
    for place in range(1, len(letters)):
        length = border[place - 1]
        while length and letters[place] != letters[length]:
            length = border[length - 1]
        border[place] = length + (letters[place] == letters[length])
        period = place + 1 - border[place]
        whole = place + 1 >= TIMES_MIN * period and place + 1 >= TIMES_MIN * LOOP_CHARACTERS_MIN
        if whole and len(_WORD.findall(letters[:period])) > 0:
            return True
    return False


def _same_phrases(text: str) -> bool:
    words = _WORD.findall(text.casefold())
    phrases = Counter(tuple(words[place : place + PHRASE_WORDS]) for place in range(len(words) - PHRASE_WORDS + 1))
    repeated = sum(times for times in phrases.values() if times >= PHRASE_TIMES_MIN)
    return repeated > 0 and repeated >= PHRASE_SHARE_MIN * len(words)
