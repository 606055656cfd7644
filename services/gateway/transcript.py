"""A conversation as Markdown that people read and keep, written turn by turn. Pure."""

import re
from dataclasses import dataclass, field

from tailrace.ledger.v1 import ledger_service_pb2 as ledger

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|])")


@dataclass
class Transcript:
    """Knows the turns it has written by their numbers: a turn that follows another than the one above it says so."""

    _numbers: dict[str, int] = field(default_factory=dict)
    _last: str = ""
    _head: str = ""

    def opening(self, session: ledger.Session) -> str:
        """The title."""
        self._head = session.head_answer_id
        began = session.created_at.ToDatetime().strftime("%Y-%m-%d %H:%M UTC")
        return f"# {_plain(session.title)}\n\n{began}\n"

    def turn(self, turn: ledger.Turn) -> str:
        """A question, its answer as the model wrote it, and what its markers point at."""
        number = self._numbers[turn.answer_id] = len(self._numbers) + 1
        heading = f"\n## {number}\n"
        if turn.parent_answer_id != self._last:
            followed = self._numbers.get(turn.parent_answer_id)
            heading += f"\n*Another branch: follows {followed}.*\n" if followed else "\n*Another branch, from the start.*\n"
        self._last = turn.answer_id
        question = "\n".join(f"> {line}" for line in turn.question.splitlines())
        unfinished = "" if turn.complete else "\n*This answer is not whole, or did not pass its checks.*\n"
        return f"{heading}\n{question}\n\n{turn.text.rstrip()}\n{unfinished}{_sources(turn)}"

    def closing(self) -> str:
        """Which turn the conversation goes on from, if that is not the last one."""
        if self._head == self._last or self._head not in self._numbers:
            return ""
        return f"\n*The conversation goes on from {self._numbers[self._head]}.*\n"


def _sources(turn: ledger.Turn) -> str:
    lines = []
    for passage in turn.citations:
        place = f", page {passage.page}" if passage.page else ""
        uri = f" ({_plain(passage.source_uri)})" if passage.source_uri and passage.source_uri != passage.title else ""
        lines.append(f"- \\[{passage.number}\\] {_plain(passage.title)}{place}{uri}")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _plain(text: str) -> str:
    """A text on one line that Markdown leaves as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
