"""The title that a conversation has before anybody gives it one. Pure."""

import re

TITLE_CHARACTERS_MAX = 120
"""As the schema has it, and as the contract says."""
RULE_CHARACTERS_MAX = 80
"""What a list can show on one line."""
_MARKS = re.compile(r"^[\s#>*_`~-]+|[\s*_`~]+$")
_SPACE = re.compile(r"\s+")


def title_of(question: str) -> str:
    """The first line that says something, without marks of Markdown, cut between words where it is long."""
    lines = (_SPACE.sub(" ", _MARKS.sub("", line)) for line in question.splitlines())
    line = next((line for line in lines if any(letter.isalnum() for letter in line)), _SPACE.sub(" ", question).strip())
    if len(line) <= RULE_CHARACTERS_MAX:
        return line
    cut = line[: RULE_CHARACTERS_MAX - 1]
    whole, space, _ = cut.rpartition(" ")
    # One long word, or a script without spaces, is cut where it is.
    kept = whole if space and len(whole) >= RULE_CHARACTERS_MAX // 2 else cut
    return kept.rstrip(" ,;:.-–") + "…"
