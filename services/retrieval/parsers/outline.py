"""Extracted text as it grows, block by block, with the headings each stands under: offsets are exact by construction.

Every format whose text is made here and not taken over as it stands builds it through this; formats themselves are not known here.
"""

import re
from collections.abc import Iterable, Sequence

from services.retrieval.domain import Block, BlockKind, Extracted
from services.retrieval.parsers.rejection import rejected

CHARACTERS_MAX = 24_000_000
"""More text than any upload holds uncompressed; a small file that says more is built to do harm."""
BLOCKS_MAX = 300_000
HEADING_CHARACTERS_MAX = 300
"""A longer heading is a paragraph in a heading's clothes: it would stand in the path of everything below it."""
TABLE_CHARACTERS = 700
"""Rows of a long table that share one block. Each block begins with the header, so that a chunk of it can be read alone."""
CELL_CHARACTERS_MAX = 20_000

_SPACE = re.compile(r"[ \t\n\r\f\v\u00a0\u200b]+")
_NUMBER = re.compile(r"[\d\s.,:%€$£+()/-]*")


def words_of(text: str) -> str:
    """`text` with every run of white space as one space."""
    return _SPACE.sub(" ", text).strip()


class Outline:
    """Gathers blocks. Raises DocumentRejected, cause `too_large`, beyond its bounds."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._path: list[tuple[int, str]] = []
        self._names: tuple[str, ...] = ()
        self.blocks: list[Block] = []
        self.page_starts: list[int] = []
        self.title = ""

    def page(self) -> None:
        """Begin a new page with the next block."""
        # Two characters will stand between the blocks; a page without text shares its beginning with the next.
        self.page_starts.append(self._length + (2 if self._length else 0))

    def heading(self, level: int, text: str) -> None:
        """A heading; everything after it stands under it until one of its level or above."""
        words = words_of(text)
        if not words:
            return
        if len(words) > HEADING_CHARACTERS_MAX:
            self.paragraph(text)
            return
        self._path = [(above, name) for above, name in self._path if above < level] + [(level, words)]
        self._names = tuple(name for _, name in self._path)
        self.title = self.title or (words if level == 1 else "")
        self.block(BlockKind.HEADING, words)

    def leave(self, level: int) -> None:
        """End the headings of `level` and below it."""
        self._path = [(above, name) for above, name in self._path if above < level]
        self._names = tuple(name for _, name in self._path)

    def paragraph(self, text: str) -> None:
        """Prose; its white space means nothing."""
        if words := words_of(text):
            self.block(BlockKind.PARAGRAPH, words)

    def items(self, lines: Sequence[str]) -> None:
        """A list, one line an item."""
        if lines:
            self.block(BlockKind.LIST, "\n".join(lines))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """A table, one line a row. A long one becomes several blocks, each with the header row if there is one."""
        header: str | None = None
        lines: list[str] = []
        characters = 0
        for row in rows:
            line = _line(row)
            if not line:
                continue
            # A line of one cell above the header is the table's caption.
            if header is None and sum(map(bool, row)) > 1:
                header = line if _is_header(row) else ""
            if lines and characters + len(line) > TABLE_CHARACTERS:
                self.block(BlockKind.TABLE, "\n".join(lines))
                lines = [header] if header else []
                characters = len(header or "")
            lines.append(line)
            characters += len(line) + 1
        if lines:
            self.block(BlockKind.TABLE, "\n".join(lines))

    def block(self, kind: BlockKind, words: str) -> None:
        """Any block, its text as it stands. Blank ones are left out."""
        if not words.strip():
            return
        gap = 2 if self._length else 0
        if self._length + gap + len(words) > CHARACTERS_MAX or len(self.blocks) >= BLOCKS_MAX:
            raise rejected("the document holds more text than one document may", cause="too_large", characters_max=CHARACTERS_MAX)
        if gap:
            self._parts.append("\n\n")
        start = self._length + gap
        self.blocks.append(Block(kind, start, start + len(words), self._names))
        self._parts.append(words)
        self._length = start + len(words)

    def append(self, other: Extracted, level: int) -> None:
        """Take over the blocks of another document below the headings above `level`, for instance a chapter of a book."""
        self.leave(level)
        above = self._names
        for block in other.blocks:
            self._names = above + block.heading_path
            self.block(block.kind, other.text[block.start : block.end])
        self._names = above

    def extracted(self, media_type: str, title: str = "") -> Extracted:
        """What was gathered. `title` wins over the first heading of the first level."""
        text = "".join(self._parts)
        # A last page without text begins at the end of the text, not behind it.
        pages = tuple(min(start, len(text)) for start in self.page_starts)
        return Extracted(text, tuple(self.blocks), media_type, words_of(title) or self.title, pages)


def _line(row: Sequence[str]) -> str:
    cells = [words_of(cell[:CELL_CHARACTERS_MAX]) for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return " | ".join(cells) if any(cells) else ""


def _is_header(row: Sequence[str]) -> bool:
    """Names stand in a header, not numbers; and it is short enough to be said again."""
    named = [cell for cell in row if cell.strip()]
    return len(named) >= 2 and not any(_NUMBER.fullmatch(cell) for cell in named) and len(_line(row)) <= TABLE_CHARACTERS // 2
