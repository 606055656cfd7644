"""Does an answer give away its instructions? Pure; told by stretches that the instructions have and nothing else that was shown has.

Only consonants are compared, so case, spaces, punctuation, letters spelt one by one and vowels that are starred out make no difference. It
is looked for backwards, in ROT13, base64 and hexadecimal as well; a translation is not recognised.
"""

import base64
import binascii
import codecs
import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator

STRETCH, STRIDE = 24, 12
"""Consonants of a stretch, and from the start of one to the next: about eight words, which no other text has by chance."""
STRETCHES_MIN = 3
"""So many give it away, about fifteen words in a row or as much in parts; fewer may be a manner of speaking."""
ENCODED_PARTS_MAX = 64
_CONSONANTS = re.compile(r"[b-df-hj-np-tv-z]+")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*")
_HEXADECIMAL = re.compile(r"(?:[0-9A-Fa-f]{2}[ :]?){32,}")


class Instructions:
    """Instructions that should not be told, taken apart once for many answers."""

    def __init__(self, text: str) -> None:
        letters = _consonants(text)
        self._stretches = frozenset(letters[place : place + STRETCH] for place in range(0, len(letters) - STRETCH + 1, STRIDE))

    def leak_into(self, text: str, shown: Iterable[str] = ()) -> bool:
        """Whether `text` holds a part of the instructions that is in nothing of what else was `shown`, which the text may quote."""
        told: set[str] = set()
        for reading in _readings(text):
            letters = _consonants(reading)
            told |= {stretch for stretch in self._stretches - told if stretch in letters}
        if len(told) < STRETCHES_MIN:
            return False
        for part in shown:
            letters = _consonants(part)
            told = {stretch for stretch in told if stretch not in letters}
        return len(told) >= STRETCHES_MIN


@functools.lru_cache(maxsize=64)
def instructions(text: str) -> Instructions:
    """The instructions of a template."""
    return Instructions(text)


def _consonants(text: str) -> str:
    return "".join(_CONSONANTS.findall(unicodedata.normalize("NFKC", text).casefold()))


def _readings(text: str) -> Iterator[str]:
    """The text as it may be meant."""
    yield text
    yield text[::-1]
    yield codecs.encode(text, "rot13")
    for place, part in enumerate(_BASE64.finditer(text)):
        if place == ENCODED_PARTS_MAX:
            break
        plain = "".join(part[0].split()).replace("-", "+").replace("_", "/")
        yield base64.b64decode(plain[: len(plain) // 4 * 4]).decode("utf-8", "ignore")
    for place, part in enumerate(_HEXADECIMAL.finditer(text)):
        if place == ENCODED_PARTS_MAX:
            break
        yield binascii.unhexlify(part[0].replace(" ", "").replace(":", "")).decode("utf-8", "ignore")
