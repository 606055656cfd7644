"""What was said earlier in a conversation, in short, by rule: what was asked, and how each answer began. Pure."""

import re
from collections.abc import Sequence

from services.orchestrator.domain import Turn

SUMMARY_CHARACTERS_MAX = 4_000
QUESTION_CHARACTERS = 160
ANSWER_CHARACTERS = 240
_MARKER = re.compile(r"\s?\[\d{1,3}(?:\s?,\s?\d{1,3})*\]")
_SENTENCE = re.compile(r".*?[.!?。！？](?=\s|$)", re.DOTALL)


def by_rule(earlier: str, turns: Sequence[Turn]) -> str:
    """`earlier`, a summary of what came before, with a line for each of `turns`; where it grows too long, the oldest lines go."""
    lines = [line for line in earlier.splitlines() if line.strip()]
    for turn in turns:
        answer = " ".join(_MARKER.sub("", turn.text).split())
        first = match[0] if (match := _SENTENCE.match(answer)) else answer
        lines.append(f"- {_cut(' '.join(turn.question.split()), QUESTION_CHARACTERS)} — {_cut(first, ANSWER_CHARACTERS) or '(no answer)'}")
    while len(lines) > 1 and sum(map(len, lines)) + len(lines) > SUMMARY_CHARACTERS_MAX:
        lines.pop(0)
    return "\n".join(lines)[:SUMMARY_CHARACTERS_MAX]


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"
