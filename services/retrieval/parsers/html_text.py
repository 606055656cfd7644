"""HTML: what a reader of the page sees, with headings, lists, tables and code kept apart. Scripts, styles and navigation are dropped.

The extracted text is made here, block by block, so offsets are exact by construction.
"""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode

from services.retrieval.domain import Block, BlockKind, Extracted
from services.retrieval.parsers.rejection import rejected

_DROPPED = (
    "script, style, noscript, template, svg, canvas, iframe, object, nav, footer, form, button, select, head, [hidden], [aria-hidden=true]"
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
# fmt: off
_BREAKING = frozenset({
    "address", "article", "aside", "blockquote", "body", "center", "dd", "details", "dialog", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "header", "hgroup", "hr", "html", "li", "main", "menu", "ol", "p",
    "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
})
# fmt: on
# Void elements, and those that the next of their kind or the end of their parent closes.
# fmt: off
_CLOSED_BY_OTHERS = frozenset({
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
    "p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "html", "head", "body",
})
# fmt: on
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
_SPACE = re.compile(r"[ \t\n\r\f\v\u00a0\u200b]+")
DEPTH_MAX = 200
"""Deeper nesting than any page has; what lies below is read as one piece of text, so that the walk stays within Python's stack."""
LIST_DEPTH_MAX = 20
NESTING_MAX = 5_000
"""The parser's time grows with the square of the depth (100,000 unclosed tags: 15 s, during which nothing else runs)."""


class _Page:
    """The text and blocks so far, and the paragraph being gathered."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._pending: list[str] = []
        self._path: list[tuple[int, str]] = []
        self.blocks: list[Block] = []
        self.title = ""

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def gather(self, words: str) -> None:
        self._pending.append(words)

    def paragraph(self) -> None:
        """End the paragraph being gathered, if there is one."""
        words = _SPACE.sub(" ", "".join(self._pending)).strip()
        self._pending.clear()
        if words:
            self.block(BlockKind.PARAGRAPH, words)

    def heading(self, level: int, words: str) -> None:
        if not words:
            return
        self._path = [(above, name) for above, name in self._path if above < level] + [(level, words)]
        self.title = self.title or (words if level == 1 else "")
        self.block(BlockKind.HEADING, words)

    def block(self, kind: BlockKind, words: str) -> None:
        if self._length:
            self._parts.append("\n\n")
            self._length += 2
        self.blocks.append(Block(kind, self._length, self._length + len(words), tuple(name for _, name in self._path)))
        self._parts.append(words)
        self._length += len(words)


def parse_html(text: str) -> Extracted:
    """The title is the page's own, else its first heading of the first level."""
    if _nesting(text) > NESTING_MAX:
        raise rejected("the page is nested too deeply", cause="malformed", depth_max=NESTING_MAX)
    tree = LexborHTMLParser(text)
    named = tree.css_first("title")
    title = _SPACE.sub(" ", named.text()).strip() if named is not None else ""
    page = _Page()
    root = tree.body
    if root is not None:
        for node in root.css(_DROPPED):
            node.decompose()
        _walk(root, page, 0)
        page.paragraph()
    return Extracted(page.text, tuple(page.blocks), "text/html", title or page.title)


def _nesting(text: str) -> int:
    """How deep tags that nothing but their own end closes are open at most. A guess from above, in one pass."""
    depth = deepest = 0
    for match in _TAG.finditer(text):
        if match.group(2).lower() not in _CLOSED_BY_OTHERS:
            depth = max(0, depth - 1) if match.group(1) else depth + 1
            deepest = max(deepest, depth)
    return deepest


def _walk(node: LexborNode, page: _Page, depth: int) -> None:
    child = node.child
    while child is not None:
        tag = child.tag or ""
        if tag == "-text":
            page.gather(child.text_content or "")
        elif tag in _HEADINGS:
            page.paragraph()
            page.heading(_HEADINGS[tag], _words(child))
        elif tag == "pre":
            page.paragraph()
            _add(page, BlockKind.CODE, child.text().strip("\n").rstrip())
        elif tag == "table" and not child.css("table table, h1, h2, h3, p + p"):
            page.paragraph()
            _add(page, BlockKind.TABLE, "\n".join(filter(None, (_row(row) for row in child.css("tr")))))
        elif tag in ("ul", "ol") and not child.css("h1, h2, h3, table, pre"):
            page.paragraph()
            _add(page, BlockKind.LIST, "\n".join(_items(child, tag == "ol", 0)))
        elif tag == "br":
            page.gather(" ")
        elif not tag.startswith("-") and tag != "_comment":
            breaks = tag in _BREAKING
            if breaks:
                page.paragraph()
            if depth < DEPTH_MAX:
                _walk(child, page, depth + 1)
            else:
                page.gather(child.text(separator=" "))
            if breaks:
                page.paragraph()
        child = child.next


def _add(page: _Page, kind: BlockKind, words: str) -> None:
    if words.strip():
        page.block(kind, words)


def _words(node: LexborNode) -> str:
    return _SPACE.sub(" ", node.text(separator=" ")).strip()


def _row(row: LexborNode) -> str:
    cells = [_words(cell) for cell in row.css("th, td")]
    return " | ".join(cells) if any(cells) else ""


def _items(items: LexborNode, numbered: bool, depth: int) -> list[str]:
    """One line an item, nested lists indented below it."""
    lines: list[str] = []
    number = 0
    item = items.child
    while item is not None:
        if item.tag == "li":
            number += 1
            place, own = len(lines), []
            part = item.child
            while part is not None:
                if part.tag in ("ul", "ol") and depth < LIST_DEPTH_MAX:
                    lines.extend(_items(part, part.tag == "ol", depth + 1))
                else:
                    own.append(_words(part))
                part = part.next
            words = " ".join(filter(None, own))
            if words:
                lines.insert(place, f"{'  ' * depth}{f'{number}.' if numbered else '-'} {words}")
        item = item.next
    return lines
