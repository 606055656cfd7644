"""May the answer to one question be served for another one that sounds alike? Pure text comparison; any doubt is a no.

Two questions close in meaning differ in their answers when a number, a negation, a name, a quoted string, the kind of question or the
order of what is compared differs. Embeddings hardly see those; words do.
"""

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_NEGATION = re.compile(r"(?:not|no|never|none|neither|nor|without|cannot|\w+n['’]?t)\Z")


def normalised(question: str) -> str:
    """The question without what makes no difference: case, width, spaces, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split()).rstrip(" ?!.。？！")


def difference(asked: str, answered: str) -> str:
    """Why the answer to `answered` must not be served for `asked`: a CacheReceipt reason, or empty if nothing speaks against it."""
    left, right = normalised(asked), normalised(answered)
    if left == right:
        return ""
    if sorted(_NUMBER.findall(left)) != sorted(_NUMBER.findall(right)):
        return "guard_numbers"
    if [word for word in _WORD.findall(left) if _NEGATION.match(word)] != [word for word in _WORD.findall(right) if _NEGATION.match(word)]:
        return "guard_negation"
    return ""
