"""The citations of a text that is being written: where each marker stands, which sentence it belongs to, and how well that is borne out.

Nothing here changes or holds back a text, and nothing is done for a piece that completes no marker but counting its characters. A marker
in code is code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.orchestrator.code_marks import CodeMarks
from services.orchestrator.domain import Citation, Passage
from services.orchestrator.grounding import SUPPORT_MIN, Evidence, support
from services.orchestrator.reading import sentence_start

SENTENCE_CHARACTERS_MAX = 2_000
"""How far back from its marker a cited sentence may begin."""
LEARNT_CHARACTERS_MAX = 16_384
JUDGED_MAX = 500
"""Sentences of one answer that are judged; it is some milliseconds of work for each thousand characters cited."""
_MARKER = re.compile(r"\[(\d{1,3}(?:\s?,\s?\d{1,3}){0,31})\]")
_UNFINISHED_MARKER = re.compile(r"\[[\d\s,]{0,189}\Z")
"""As long as a marker with as many numbers as there can be passages."""
_BETWEEN = re.compile(r"[\s,;.:!?。！？)\"'”’*_]*\Z")
"""What may stand between two markers of the same sentence."""
_FENCED = re.compile(r"(?:\A|(?<=\n))[ \t]*(`{3,}|~{3,})(?:(?!\n[ \t]*\1).)*\n[ \t]*\1[`~]*\Z", re.DOTALL)
"""A block of code at the end of a text."""


@dataclass(slots=True)
class _Cited:
    """A sentence with a marker behind it."""

    start: int
    end: int
    text: str
    numbers: dict[int, float | None]
    """Passages it cites, with what each bears out alone."""


class CitationReader:
    """Finds `[n]` and `[n, m]` markers in text that comes in pieces, also where a piece ends inside one, and judges what they stand for.

    However a text is cut, it gives the same citations with the same supports.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = {passage.number: passage for passage in passages}
        self._evidence: dict[int, Evidence] = {}
        self._learnt = ""
        """What tools have returned: a sentence may rest on it as well as on the passage that it cites."""
        self._before = ""
        """Text before `_held`: at least as much as a cited sentence may have."""
        self._held = ""
        self._offset = 0
        """Code points before `_held`."""
        self._code = CodeMarks()
        self._code_read = 0
        """How much of `_before` the marks of code have been looked for in."""
        self._marker_end = 0
        self._sentence: _Cited | None = None
        self._judged = 0
        self._borne_out = 0
        self.cited: set[int] = set()
        self.unknown: set[int] = set()
        """Numbers that no passage has."""

    def know(self, passages: Sequence[Passage]) -> None:
        """What may be cited from here on: `passages` have all that there were, under the same numbers, and more."""
        self._passages = {passage.number: passage for passage in passages}

    def learn(self, text: str) -> None:
        """Let what is read from here on rest on `text` too. Of the latest LEARNT_CHARACTERS_MAX."""
        self._learnt = f"{self._learnt}\n\n{text}"[-LEARNT_CHARACTERS_MAX:]
        self._evidence.clear()

    def read(self, piece: str) -> list[Citation]:
        """Return the citations that `piece` completes, in order."""
        if not self._held and "[" not in piece:  # nearly every piece
            self._pass(piece)
            return []
        text = self._held + piece
        found, read_to = list[Citation](), 0
        for marker in _MARKER.finditer(text):
            self._pass(text[read_to : marker.start()])
            read_to = marker.end()
            if self._in_code():
                self._pass(marker[0])
                continue
            found += self._cite(marker)
            self._pass(marker[0])
            self._marker_end = self._offset
        unfinished = _UNFINISHED_MARKER.search(text, read_to)
        kept_from = unfinished.start() if unfinished else len(text)
        self._pass(text[read_to:kept_from])
        self._held = text[kept_from:]
        return found

    @property
    def judged(self) -> int:
        """Number of sentences that were judged."""
        return self._judged + (self._verdict() is not None)

    @property
    def groundedness(self) -> float | None:
        """Share of them that their passages, taken together, bear out; None if none was judged."""
        return (self._borne_out + bool(self._verdict())) / self.judged if self.judged else None

    def _pass(self, text: str) -> None:
        self._offset += len(text)
        self._before += text
        if len(self._before) > 2 * SENTENCE_CHARACTERS_MAX:
            self._code.read(self._before[self._code_read :])
            self._before = self._before[-SENTENCE_CHARACTERS_MAX:]
            self._code_read = len(self._before)

    def _in_code(self) -> bool:
        self._code.read(self._before[self._code_read :])
        self._code_read = len(self._before)
        return self._code.inside

    def _cite(self, marker: re.Match[str]) -> list[Citation]:
        """The citations of a marker that begins at `_offset`."""
        start, end = self._offset, self._offset + len(marker[0])
        sentence = self._cited_sentence()
        found = []
        for number in map(int, marker[1].split(",")):
            passage = self._passages.get(number)
            if passage is None:
                self.unknown.add(number)
                continue
            self.cited.add(number)
            if number not in sentence.numbers:
                sentence.numbers[number] = self._support(sentence.text, number)
            found.append(
                Citation(
                    number,
                    start,
                    end,
                    passage.document_id,
                    passage.chunk_id,
                    sentence.numbers[number],
                    sentence.start,
                    sentence.end,
                )
            )
        return found

    def _cited_sentence(self) -> _Cited:
        """The sentence that a marker at `_offset` belongs to: the one it ends, back to the marker before; a marker right behind another
        belongs to the same."""
        since = min(self._offset - self._marker_end, SENTENCE_CHARACTERS_MAX, len(self._before))
        recent = self._before[len(self._before) - since :]
        if self._sentence is not None and since < SENTENCE_CHARACTERS_MAX and _BETWEEN.match(recent):
            return self._sentence
        self._close()
        text = recent.rstrip()
        begin = block.start() if text.endswith(("```", "~~~")) and (block := _FENCED.search(text)) else sentence_start(text)
        start = self._offset - since + begin
        self._sentence = _Cited(start, start + len(text) - begin, text[begin:], {})
        return self._sentence

    def _support(self, sentence: str, number: int) -> float | None:
        if self._judged >= JUDGED_MAX:
            return None
        if number not in self._evidence:
            self._evidence[number] = Evidence((self._passages[number],), self._learnt)
        return support(sentence, self._evidence[number])

    def _verdict(self) -> bool | None:
        """Whether the sentence read last is borne out by what it cites; None if it is not judged."""
        if self._sentence is None:
            return None
        alone = [value for value in self._sentence.numbers.values() if value is not None]
        if not alone:
            return None
        if max(alone) >= SUPPORT_MIN or len(alone) == 1:
            return max(alone) >= SUPPORT_MIN
        together = support(self._sentence.text, Evidence((self._passages[number] for number in self._sentence.numbers), self._learnt))
        return together is None or together >= SUPPORT_MIN

    def _close(self) -> None:
        """Count the sentence read last; nothing more is cited for it."""
        verdict = self._verdict()
        if verdict is not None:
            self._judged += 1
            self._borne_out += verdict
        self._sentence = None
