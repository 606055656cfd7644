"""OpenDocument texts and presentations (odt, odp): headings, lists, tables, one page a slide. Spreadsheets are read in `sheets_text`."""

from services.retrieval.domain import Extracted
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.rejection import rejected
from services.retrieval.parsers.xml_tree import Element, attribute, name_of, parse_tree

TEXT = "application/vnd.oasis.opendocument.text"
PRESENTATION = "application/vnd.oasis.opendocument.presentation"

LIST_DEPTH_MAX = 20
REPEATED_MAX = 100
"""Cells and spaces that say they stand there several times; a file may claim a million."""
_PASSED_OVER = frozenset({"tracked-changes", "sequence-decls", "forms", "settings", "annotation", "automatic-styles", "scripts"})
_DELETED = "deletion"


def parse_opendocument(content: bytes) -> Extracted:
    """The title is that of the properties, else the first heading."""
    package = Container(content)
    if b"encryption-data" in package.read("META-INF/manifest.xml"):
        raise rejected("the file is encrypted; it opens with a password only", cause="encrypted")
    if not package.has("content.xml"):
        raise rejected("the file's main part is missing", cause="malformed")
    root = parse_tree(package.read("content.xml"))
    outline = Outline()
    _walk(root, outline)
    presentation = next(root.iter("{*}presentation"), None) is not None
    return outline.extracted(PRESENTATION if presentation else TEXT, _title(package))


def _walk(element: Element, outline: Outline) -> None:
    for child in element:
        name = name_of(child)
        if name == "h":
            level = attribute(child, "outline-level")
            outline.heading(min(int(level), 9) if level.isdecimal() and level != "0" else 1, _text(child))
        elif name == "p":
            if attribute(child, "style-name").lower() == "title":
                outline.heading(1, _text(child))
            else:
                outline.paragraph(_text(child))
        elif name == "list":
            outline.items(_items(child, 0))
        elif name == "table" and next(child.iter("{*}table-cell"), None) is not None:
            outline.table(_row(row) for row in child.iter("{*}table-row"))
        elif name == "page":
            outline.leave(1)
            outline.page()
            _walk(child, outline)
        elif name not in _PASSED_OVER:
            _walk(child, outline)


def _items(items: Element, depth: int) -> list[str]:
    lines = []
    for item in items:
        words = words_of(" ".join(_text(child) for child in item if name_of(child) in ("p", "h")))
        if words:
            lines.append(f"{'  ' * min(depth, LIST_DEPTH_MAX)}- {words}")
        for child in item:
            if name_of(child) == "list":
                lines.extend(_items(child, depth + 1))
    return lines


def _row(row: Element) -> list[str]:
    cells: list[str] = []
    for cell in row:
        if name_of(cell) in ("table-cell", "covered-table-cell"):
            cells.extend([_text(cell)] * _times(attribute(cell, "number-columns-repeated")))
    return cells


def _text(element: Element) -> str:
    parts: list[str] = []
    _gather(element, parts)
    return "".join(parts)


def _gather(element: Element, parts: list[str]) -> None:
    parts.append(element.text or "")
    for child in element:
        name = name_of(child)
        if name == "s":
            parts.append(" " * _times(attribute(child, "c")))
        elif name in ("tab", "line-break"):
            parts.append(" ")
        elif name not in _PASSED_OVER and name != _DELETED:
            _gather(child, parts)
            if name == "p":
                parts.append(" ")
        parts.append(child.tail or "")


def _times(text: str) -> int:
    return min(int(text), REPEATED_MAX) if text.isdecimal() and len(text) < 10 else 1


def _title(package: Container) -> str:
    if not package.has("meta.xml"):
        return ""
    return next((element.text or "" for element in parse_tree(package.read("meta.xml")).iter("{*}title")), "")
