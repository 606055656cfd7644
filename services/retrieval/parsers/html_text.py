"""HTML: what a reader of the page sees, with headings, lists, tables and code kept apart. Scripts, styles and navigation are dropped.

The extracted text is made here, block by block, so offsets are exact by construction.
"""

import re

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from services.retrieval.domain import BlockKind, Extracted
from services.retrieval.parsers.outline import Outline, words_of
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
DEPTH_MAX = 200
"""Deeper nesting than any page has; what lies below is read as one piece of text, so that the walk stays within Python's stack."""
LIST_DEPTH_MAX = 20
NESTING_MAX = 5_000
"""The parser's time grows with the square of the depth (100,000 unclosed tags: 15 s, during which nothing else runs)."""


class _Page(Outline):
    """The outline so far, and the paragraph being gathered."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[str] = []

    def gather(self, words: str) -> None:
        self._pending.append(words)

    def end_paragraph(self) -> None:
        """End the paragraph being gathered, if there is one."""
        words = "".join(self._pending)
        self._pending.clear()
        self.paragraph(words)


def parse_html(text: str) -> Extracted:
    """The title is the page's own, else its first heading of the first level."""
    if _nesting(text) > NESTING_MAX:
        raise rejected("the page is nested too deeply", cause="malformed", depth_max=NESTING_MAX)
    try:
        tree = LexborHTMLParser(text)
    except SelectolaxError:
        # Any text is a page to this parser; it fails for want of memory only.
        raise MemoryError from None
    named = tree.css_first("title")
    title = words_of(named.text()) if named is not None else ""
    page = _Page()
    root = tree.body
    if root is not None:
        for node in root.css(_DROPPED):
            node.decompose()
        _walk(root, page, 0)
        page.end_paragraph()
    return page.extracted("text/html", title)


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
            page.end_paragraph()
            page.heading(_HEADINGS[tag], _words(child))
        elif tag == "pre":
            page.end_paragraph()
            page.block(BlockKind.CODE, child.text().strip("\n").rstrip())
        elif tag == "table" and not child.css("table table, h1, h2, h3, p + p"):
            page.end_paragraph()
            page.table(_row(row) for row in child.css("tr"))
        elif tag in ("ul", "ol") and not child.css("h1, h2, h3, table, pre"):
            page.end_paragraph()
            page.items(_items(child, tag == "ol", 0))
        elif tag == "br":
            page.gather(" ")
        elif not tag.startswith("-") and tag != "_comment":
            breaks = tag in _BREAKING
            if breaks:
                page.end_paragraph()
            if depth < DEPTH_MAX:
                _walk(child, page, depth + 1)
            else:
                page.gather(child.text(separator=" "))
            if breaks:
                page.end_paragraph()
        child = child.next


def _words(node: LexborNode) -> str:
    return words_of(node.text(separator=" "))


def _row(row: LexborNode) -> list[str]:
    return [_words(cell) for cell in row.css("th, td")]


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
