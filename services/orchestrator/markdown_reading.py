"""What a renderer of Markdown makes of a text: where it leads, what HTML it holds, and what is left of it once code is gone. Pure.

What is unsafe is not decided here. Source: CommonMark 0.31, and the tables of GFM.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.token import Token

NESTING_MAX = 20
"""Blocks within blocks. A reader drops what lies deeper, which others show."""
LINES_MAX = 5_000
INLINE_CHARACTERS_MAX = 20_000
"""Of one paragraph."""
STEPS_MAX = 5_000_000
"""Brackets times characters, over all paragraphs: each bracket may look for its other half to the end of its own. About a second."""
_MARKS = re.compile(r"[\[<`\\&]")


@dataclass(slots=True)
class Reading:
    """One way to read a text."""

    links: list[str] = field(default_factory=list)
    """Addresses that are followed by a click, and those of definitions, entities and escapes resolved."""
    images: list[str] = field(default_factory=list)
    """Addresses that are fetched at once."""
    html: list[str] = field(default_factory=list)
    """Raw HTML as it stands."""
    words: list[str] = field(default_factory=list)
    """All that is neither code nor HTML, paragraph by paragraph. What is no link here may be one to a reader who is less strict."""


def readings(text: str) -> Iterator[Reading]:
    """The ways to read a text: with tables and without, where that makes a difference: code ends with its cell."""
    yield _read(text, _PLAIN)
    if "|" in text and "`" in text:
        yield _read(text, _TABLES)


def _parser(*more: str) -> MarkdownIt:
    made = MarkdownIt("commonmark", {"maxNesting": NESTING_MAX}).enable(list(more)).disable(["inline", "emphasis"])
    made.validateLink = lambda url: True  # type: ignore[method-assign] # ours to judge
    made.normalizeLink = lambda url: url  # type: ignore[method-assign]
    return made


_PLAIN, _TABLES = _parser(), _parser("table")


def _read(text: str, parser: MarkdownIt) -> Reading:
    found, steps, unread = Reading(), 0, False
    env: dict[str, dict[str, dict[str, str]]] = {}
    blocks = parser.parse(text, env) if text.count("\n") < LINES_MAX else None
    if blocks is None or any(block.level >= NESTING_MAX - 1 for block in blocks):
        return Reading(html=[text], words=[text])  # as if nothing in it were code
    found.links += [definition["href"] for definition in env.get("references", {}).values()]
    for block in blocks:
        if block.type == "html_block":
            found.html.append(block.content)
        elif block.type == "inline":
            brackets = block.content.count("[")
            steps += brackets * len(block.content)
            if not _MARKS.search(block.content):
                found.words.append(block.content)
            elif len(block.content) > INLINE_CHARACTERS_MAX or steps > STEPS_MAX:
                found.words.append(block.content)
                unread = True
            else:
                pieces: list[Token] = []
                parser.inline.parse(block.content, parser, env, pieces)
                found.words.append("".join(_words_of(pieces, found)))
    if unread:  # what refers to a definition is not known then
        found.images += found.links
    return found


def _words_of(pieces: Iterable[Token], found: Reading) -> Iterator[str]:
    """The text of `pieces`, code left out; what else is in them is added to `found`."""
    for piece in pieces:
        if piece.type == "html_inline":
            found.html.append(piece.content)
            yield " "
        elif piece.type == "link_open":
            found.links.append(str(piece.attrs["href"]))
        elif piece.type == "image":
            found.images.append(str(piece.attrs["src"]))
            yield from _words_of(piece.children or (), found)
        elif piece.type in ("text", "text_special"):
            yield piece.content
        else:
            yield "\n" if piece.type.endswith("break") else " "
