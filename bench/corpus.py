"""What a benchmark ingests and asks: real abstracts if they are at hand, else the project's own files. Nothing here is measured."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from bench.provider import ROOT

SCIFACT = ROOT.parent / "shared" / "data" / "retrieval" / "scifact" / "corpus.jsonl.gz"
PIECE_CHARACTERS = 900
_UNSAFE_TOPIC = re.compile(r"[\d\"'“”:;?!()]|\b(?:not|no|never|without|non)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Documents to ingest, with where they came from."""

    source: str
    documents: tuple[tuple[str, str], ...]
    """(title, text), each short enough for about one chunk."""

    def topics(self, count: int) -> list[str]:
        """Subjects to ask about, one a document, free of digits, quotes and negations."""
        found = (title.rstrip(".") for title, _ in self.documents)
        plain = (topic for topic in found if not _UNSAFE_TOPIC.search(topic) and 20 <= len(topic) <= 120)
        return list(itertools.islice(plain, count))


def load(documents: int) -> Corpus:
    """The first `documents` abstracts of SciFact, or as many pieces of the project's own text files."""
    if SCIFACT.exists():
        return Corpus("SciFact abstracts", tuple(itertools.islice(_abstracts(), documents)))
    return Corpus("the project's own files", tuple(itertools.islice(_own_pieces(), documents)))


def _abstracts() -> Iterator[tuple[str, str]]:
    with gzip.open(SCIFACT, "rt") as lines:
        for row in map(json.loads, lines):
            yield row["title"], row["text"][: PIECE_CHARACTERS + row["text"][PIECE_CHARACTERS:].find(". ") + 1]


def _own_pieces() -> Iterator[tuple[str, str]]:
    """Pieces of the files, again and again under new titles until enough were taken."""
    found = (path for folder in ("services", "protos", "tests") for path in (ROOT / folder).rglob("*"))
    files = sorted(path for path in found if path.suffix in (".py", ".proto", ".md"))
    pieces = []
    for path in [ROOT / "README.md", *files]:
        text = path.read_text(errors="replace")
        name = re.sub(r"[_/.]+", " ", str(path.relative_to(ROOT).with_suffix("")))
        for number, start in enumerate(range(0, len(text), PIECE_CHARACTERS)):
            pieces.append((f"{name} {_letters(number)}", text[start : start + PIECE_CHARACTERS]))
    for turn in itertools.count():
        for title, text in pieces:
            yield (title if turn == 0 else f"{title} copy {_letters(turn)}"), f"{text}\n\n{_letters(turn)}"


def _letters(number: int) -> str:
    """`number` without digits, so that titles can be asked about."""
    return "part " + "".join("abcdefghij"[int(digit)] for digit in str(number))
