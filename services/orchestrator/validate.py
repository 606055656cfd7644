"""What is wrong with an answer, and which passages it cites. Pure; it never changes a text."""

import re
from collections.abc import Iterable, Sequence

from services.orchestrator.domain import Citation, Passage

WHOLE = frozenset({"end_turn", "stop_sequence"})
"""Finish reasons of an answer that said all it had to say."""
_MARKER = re.compile(r"\[(\d{1,3}(?:\s?,\s?\d{1,3})*)\]")
_UNFINISHED_MARKER = re.compile(r"\[[\d\s,]{0,32}\Z")


class CitationReader:
    """Finds `[n]` and `[n, m]` markers in text that comes in pieces, also where a piece ends inside one."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = {passage.number: passage for passage in passages}
        self._held = ""
        self._offset = 0
        """Code points before `_held`."""
        self.cited: set[int] = set()
        self.unknown: set[int] = set()
        """Numbers that no passage has."""

    def know(self, passages: Sequence[Passage]) -> None:
        """What may be cited from here on: `passages` have all that there were, under the same numbers, and more."""
        self._passages = {passage.number: passage for passage in passages}

    def read(self, piece: str) -> list[Citation]:
        """Return the citations that `piece` completes, in order."""
        if not self._held and "[" not in piece:  # nearly every piece
            self._offset += len(piece)
            return []
        text = self._held + piece
        found = []
        for marker in _MARKER.finditer(text):
            for number in map(int, marker[1].split(",")):
                passage = self._passages.get(number)
                if passage is None:
                    self.unknown.add(number)
                    continue
                self.cited.add(number)
                found.append(
                    Citation(number, self._offset + marker.start(), self._offset + marker.end(), passage.document_id, passage.chunk_id)
                )
        unfinished = _UNFINISHED_MARKER.search(text)
        kept_from = unfinished.start() if unfinished else len(text)
        self._offset += kept_from
        self._held = text[kept_from:]
        return found


def judge(text: str, finish_reason: str, unknown: Iterable[int]) -> str:
    """Return `passed`, or what keeps the answer from being remembered: `refused`, `cut`, `empty` or `citation_unknown`."""
    if finish_reason == "refusal":
        return "refused"
    if not text.strip():
        return "empty"
    if finish_reason not in WHOLE:
        return "cut"
    return "citation_unknown" if any(True for _ in unknown) else "passed"
