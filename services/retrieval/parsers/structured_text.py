"""reStructuredText: its blocks found by their lines. The extracted text is the source as it stands; directives are never carried out.

Nothing here opens a file: what an `include` names is not looked for, whatever it names.
"""

import re
from collections.abc import Iterator

from services.retrieval.domain import Block, BlockKind, Extracted

MEDIA_TYPE = "text/x-rst"

_ADORNMENT = re.compile(r"([=\-`:.'\"~^_*+#<>])\1{2,}[ \t]*\Z")
_ITEM = re.compile(r"[ \t]*(?:[-*+•]|(?:\d{1,3}|[A-Za-z#])[.)]|\((?:\d{1,3}|[A-Za-z#])\))[ \t]+\S")
_CODE = re.compile(r"\.\.[ \t]+(?:code|code-block|sourcecode|literalinclude|highlight|parsed-literal|math|doctest)::")
_DIRECTIVE = re.compile(r"\.\.[ \t]+[\w-]+::|\.\.[ \t]+(?:_|\[|\|)")
_COMMENT = re.compile(r"\.\.(?:[ \t]|\Z)")
_GRID = re.compile(r"[ \t]*(?:\+[-=+]{2,}\+?|={2,}(?:[ \t]+={2,})+)[ \t]*\Z")
_ROLE = re.compile(r":[\w:+.-]{1,40}:(?=`)|`_{0,2}|\*\*|(?<=\w)_\b")


def parse_structured(text: str) -> Extracted:
    """The title is the first heading."""
    blocks: list[Block] = []
    path: list[tuple[int, str]] = []
    # Which adornment is which level is decided by the order in which they come.
    levels: list[str] = []
    title = ""
    code_follows = False
    for start, end in _stretches(text):
        lines = text[start:end].split("\n")
        for kind, begin, stop in _blocks_of(lines, start, code_follows):
            if kind is BlockKind.HEADING:
                heading = text[begin:stop].split("\n")
                over = len(heading) == 3
                sign = heading[-1].strip()[0] * (2 if over else 1)
                if sign not in levels:
                    levels.append(sign)
                level = levels.index(sign)
                words = _ROLE.sub("", heading[1 if over else 0]).strip()
                path = [(above, name) for above, name in path if above < level] + [(level, words)]
                title = title or words
            if kind is None:
                continue
            blocks.append(Block(kind, begin, stop, tuple(name for _, name in path)))
        code_follows = _opens_code(lines, code_follows)
    return Extracted(text, tuple(blocks), MEDIA_TYPE, title)


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Runs of lines between empty ones."""
    begin: int | None = None
    place = 0
    for line in text.split("\n"):
        if line.strip():
            begin = place if begin is None else begin
            end = place + len(line.rstrip())
        elif begin is not None:
            yield begin, end
            begin = None
        place += len(line) + 1
    if begin is not None:
        yield begin, end


def _blocks_of(lines: list[str], start: int, code: bool) -> Iterator[tuple[BlockKind | None, int, int]]:
    """The blocks of one stretch. None = a comment."""
    number, begin, place = 0, 0, start
    body = start
    while number <= len(lines):
        size = _heading_lines(lines, number) if number < len(lines) else 0
        if not size and number < len(lines):
            place += len(lines[number]) + 1
            number += 1
            continue
        if number > begin:
            yield _kind(lines[begin], code), body, body + len("\n".join(lines[begin:number]).rstrip())
        if not size:
            return
        heading = "\n".join(lines[number : number + size])
        yield BlockKind.HEADING, place, place + len(heading.rstrip())
        place += len(heading) + 1
        number += size
        begin, body = number, place


def _heading_lines(lines: list[str], place: int) -> int:
    """How many lines from `place` on are a heading: with a line below it, or above and below; 0 = none is."""
    first, second, third = (lines[number].rstrip() if number < len(lines) else "" for number in range(place, place + 3))
    if third and _ADORNMENT.match(first) and third == first and not _ADORNMENT.match(second):
        return 3
    if _ADORNMENT.match(second) and not first[0].isspace() and not _ADORNMENT.match(first) and not _GRID.match(first):
        # A short line below a long one is a table's rule or a transition.
        return 2 if len(second) >= min(len(first), 4) else 0
    return 0


def _kind(first: str, code: bool) -> BlockKind | None:
    if (code and first[0].isspace()) or _CODE.match(first):
        return BlockKind.CODE
    if _GRID.match(first):
        return BlockKind.TABLE
    if _ITEM.match(first):
        return BlockKind.LIST
    if _COMMENT.match(first) and not _DIRECTIVE.match(first):
        return None
    return BlockKind.PARAGRAPH


def _opens_code(lines: list[str], code: bool) -> bool:
    """Whether an indented stretch after this one is code."""
    last = lines[-1].rstrip()
    if code and lines[0][0].isspace():
        return True
    return bool(_CODE.match(lines[0])) or (last.endswith("::") and not _DIRECTIVE.match(last))
