"""What is wrong with a finished answer, as one word. Pure; it never changes a text. What each check looks at lives in its own module."""

from collections.abc import Iterable

from services.orchestrator.citations import CitationReader
from services.orchestrator.grounding import GROUNDEDNESS_MIN
from services.orchestrator.leaks import Instructions
from services.orchestrator.repetition import repeats
from services.orchestrator.unsafe_markdown import carries_out

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


def danger(text: str, instructions: Instructions, shown: Iterable[str], *, is_markdown: bool) -> str:
    """Return `prompt_leaked` or `unsafe_markdown` if showing the text may do harm, else nothing.

    `shown`: what else the model was shown and may quote: question, passages, earlier turns.
    """
    material = tuple(shown)
    if instructions.leak_into(text, material):
        return "prompt_leaked"
    return "unsafe_markdown" if is_markdown and carries_out(text, material) else ""
