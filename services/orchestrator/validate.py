"""What is wrong with a finished answer, as one word. Pure; it never changes a text. What each check looks at lives in its own module."""

from collections.abc import Iterable, Sequence

from services.orchestrator.citations import CitationReader
from services.orchestrator.domain import Passage
from services.orchestrator.grounding import GROUNDEDNESS_MIN
from services.orchestrator.leaks import Instructions
from services.orchestrator.repetition import repeats
from services.orchestrator.unsafe_markdown import Shown, carries_out

WHOLE = frozenset({"end_turn", "stop_sequence"})
"""Finish reasons of an answer that said all it had to say."""


def judge(text: str, finish_reason: str, citations: CitationReader) -> str:
    """Return `passed`, or what keeps the answer from being remembered: `refused`, `empty`, `repeated`, `context_overflow`, `cut`,
    `citation_unknown` or `ungrounded`; the first that holds, in this order."""
    if finish_reason == "refusal":
        return "refused"
    if not text.strip():
        return "context_overflow" if finish_reason == "context_window" else "empty"
    if repeats(text):
        return "repeated"
    if finish_reason not in WHOLE:
        return "context_overflow" if finish_reason == "context_window" else "cut"
    if citations.unknown:
        return "citation_unknown"
    groundedness = citations.groundedness
    return "ungrounded" if groundedness is not None and groundedness < GROUNDEDNESS_MIN else "passed"


def danger(text: str, instructions: Instructions, question: str, passages: Sequence[Passage], earlier: Iterable[str] = ()) -> str:
    """Return `prompt_leaked` or `unsafe_markdown` if showing the text may do harm, else nothing. `earlier`: turns that were shown too."""
    shown = [question, *(part for passage in passages for part in (passage.text, passage.source_uri, passage.title)), *earlier]
    if instructions.leak_into(text, shown):
        return "prompt_leaked"
    return "unsafe_markdown" if carries_out(text, Shown(shown)) else ""
