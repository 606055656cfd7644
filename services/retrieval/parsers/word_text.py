"""Word files (docx): headings by style and outline level, lists, tables, notes, headers and footers. Deleted text stays deleted."""

from collections.abc import Iterator

from services.retrieval.domain import Extracted
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.office_package import core_title, main_part, part, relations
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.xml_tree import Element, attribute, name_of

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"

STYLE_CHAIN_MAX = 20
LIST_DEPTH_MAX = 20
# What is shown besides is the choice; text that was moved away or deleted is not in the document any more.
_PASSED_OVER = frozenset({"Fallback", "del", "moveFrom", "delText", "instrText", "pPr", "rPr", "sectPr", "tblPr", "tblGrid"})
_AROUND = ("header", "footer")
_NOTES = ("footnotes", "endnotes", "comments")


class _Styles:
    """Which styles make a heading or a list of a paragraph, also by what they are based on."""

    def __init__(self, root: Element | None) -> None:
        self._styles = {attribute(style, "styleId"): style for style in root if name_of(style) == "style"} if root is not None else {}

    def level(self, style_id: str) -> int:
        """The heading level from 1; 0 = no heading."""
        for style in self._chain(style_id):
            name = attribute(_child(style, "name"), "val").lower()
            if name == "title":
                return 1
            if name.startswith("heading ") and name[8:].isdigit():
                return min(int(name[8:]), 9)
            if level := _outline_level(style):
                return level
        return 0

    def is_list(self, style_id: str) -> bool:
        return any(attribute(_child(style, "name"), "val").lower().startswith("list ") for style in self._chain(style_id))

    def _chain(self, style_id: str) -> Iterator[Element]:
        for _ in range(STYLE_CHAIN_MAX):
            style = self._styles.get(style_id)
            if style is None:
                return
            yield style
            style_id = attribute(_child(style, "basedOn"), "val")


def parse_word(content: bytes) -> Extracted:
    """Headers, footers and notes come after the text, each once."""
    package = Container(content)
    main = main_part(package, "word/document.xml")
    related = relations(package, main)
    styles = _Styles(next((part(package, target) for kind, target in related.values() if kind == "styles"), None))
    writer = _Writer(styles)
    root = part(package, main)
    if root is not None:
        writer.walk(root)
    writer.end_list()
    writer.outline.leave(1)
    said: set[str] = set()
    for kind, target in sorted(related.values()):
        if kind not in (*_AROUND, *_NOTES):
            continue
        root = part(package, target)
        words = words_of(_text(root)) if root is not None else ""
        if root is not None and words and words not in said:
            said.add(words)
            writer.walk(root)
            writer.end_list()
    return writer.outline.extracted(MEDIA_TYPE, core_title(package))


class _Writer:
    """Walks a part and writes what it finds."""

    def __init__(self, styles: _Styles) -> None:
        self.outline = Outline()
        self._styles = styles
        self._items: list[str] = []

    def walk(self, element: Element) -> None:
        """Blocks in reading order. The parser bounds the depth."""
        for child in element:
            name = name_of(child)
            if name == "p":
                self._paragraph(child)
            elif name == "tbl":
                self.end_list()
                self._table(child)
            elif name not in _PASSED_OVER:
                self.walk(child)

    def end_list(self) -> None:
        self.outline.items(self._items)
        self._items = []

    def _paragraph(self, paragraph: Element) -> None:
        properties = _child(paragraph, "pPr")
        style = attribute(_child(properties, "pStyle"), "val")
        words = words_of(_text(paragraph))
        level = _outline_level(paragraph) or self._styles.level(style)
        numbered = _child(properties, "numPr")
        if level:
            self.end_list()
            self.outline.heading(level, words)
        elif numbered is not None or self._styles.is_list(style):
            depth = attribute(_child(numbered, "ilvl"), "val")
            if words:
                self._items.append(f"{'  ' * min(int(depth) if depth.isdecimal() else 0, LIST_DEPTH_MAX)}- {words}")
        elif words:
            self.end_list()
            self.outline.paragraph(words)
        for box in paragraph.iter("{*}txbxContent"):
            if not any(name_of(above) in ("Fallback", "txbxContent") for above in box.iterancestors()):
                self.end_list()
                self.walk(box)

    def _table(self, table: Element) -> None:
        nested = next((True for inner in table.iter("{*}tbl") if inner is not table), False)
        if nested:
            # A table of tables is there for the layout: its cells are read one after the other.
            for row in _rows(table):
                for cell in _cells(row):
                    self.walk(cell)
                    self.end_list()
            return
        self.outline.table([_text(cell) if not _continues(cell) else "" for cell in _cells(row)] for row in _rows(table))


def _rows(table: Element) -> Iterator[Element]:
    return (child for child in _below(table) if name_of(child) == "tr")


def _cells(row: Element) -> Iterator[Element]:
    return (child for child in _below(row) if name_of(child) == "tc")


def _below(element: Element) -> Iterator[Element]:
    """Children, and those of content controls and insertions around them."""
    for child in element:
        if name_of(child) in ("sdt", "sdtContent", "ins", "customXml"):
            yield from _below(child)
        else:
            yield child


def _continues(cell: Element) -> bool:
    """Whether the cell is the lower part of a merged one."""
    merged = _child(_child(cell, "tcPr"), "vMerge")
    return merged is not None and attribute(merged, "val") != "restart"


def _text(element: Element) -> str:
    """The words below an element, without those in text boxes of a paragraph: they are blocks of their own."""
    parts: list[str] = []
    _gather(element, parts)
    return "".join(parts)


def _gather(element: Element, parts: list[str]) -> None:
    for child in element:
        name = name_of(child)
        if name == "t":
            parts.append(child.text or "")
        elif name in ("tab", "br", "cr"):
            parts.append(" ")
        elif name == "noBreakHyphen":
            parts.append("-")
        elif name not in _PASSED_OVER and name != "txbxContent":
            _gather(child, parts)
            if name in ("p", "tc"):
                parts.append(" ")


def _child(element: Element | None, name: str) -> Element | None:
    """The first child of that name; of nothing, nothing, so that such questions can be chained."""
    return next((child for child in element if name_of(child) == name), None) if element is not None else None


def _outline_level(element: Element) -> int:
    """The level from 1 that the paragraph properties give; 0 = none. Nine there means body text."""
    level = attribute(_child(_child(element, "pPr"), "outlineLvl"), "val")
    return int(level) + 1 if level.isdecimal() and int(level) < 9 else 0
