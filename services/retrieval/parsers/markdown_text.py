"""Markdown: blocks by CommonMark's own rules (with tables). The extracted text is the source as it stands, so offsets point into it.

Only the block structure is parsed; what stands inside a paragraph stays as written.
"""

import re
from itertools import accumulate

from markdown_it import MarkdownIt
from markdown_it.token import Token

from services.retrieval.domain import Block, BlockKind, Extracted

_KINDS = {
    "paragraph_open": BlockKind.PARAGRAPH,
    "heading_open": BlockKind.HEADING,
    "bullet_list_open": BlockKind.LIST,
    "ordered_list_open": BlockKind.LIST,
    "blockquote_open": BlockKind.PARAGRAPH,
    "table_open": BlockKind.TABLE,
    "fence": BlockKind.CODE,
    "code_block": BlockKind.CODE,
    "html_block": BlockKind.PARAGRAPH,
}
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_COMMENT_ONLY = re.compile(r"\s*(?:<!--.*?-->\s*)+", re.DOTALL)


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table")
    # Inline markup is most of the work and none of the structure.
    parser.core.ruler.enableOnly(["block"])
    return parser


def parse_markdown(text: str) -> Extracted:
    """Front matter is no content; its `title` counts, else the first heading of the first level."""
    front = _FRONT_MATTER.match(text)
    begin = front.end() if front else 0
    body = text[begin:]
    starts = [begin, *(begin + end for end in accumulate(len(line) for line in body.splitlines(keepends=True)))]
    # The parser counts lines by "\n" alone, which all line ends are by now; form feeds and the like are no line ends to it.
    if len(starts) != body.count("\n") + (2 if body and not body.endswith("\n") else 1):
        starts = [begin, *(begin + match.end() for match in re.finditer(r"\n|(?<=[^\n])\Z", body))]
    blocks: list[Block] = []
    path: list[tuple[int, str]] = []
    title = ""
    for token, following in _top_level(_parser().parse(body.replace("\x00", "\ufffd"))):
        assert token.map is not None
        start, end = _trimmed(text, starts[token.map[0]], starts[min(token.map[1], len(starts) - 1)])
        if start >= end or (token.type == "html_block" and _COMMENT_ONLY.fullmatch(text, start, end)):
            continue
        if token.type == "heading_open":
            level, heading = int(token.tag[1:]), _plain(following.content if following else "")
            path = [(above, name) for above, name in path if above < level] + [(level, heading)]
            title = title or (heading if level == 1 else "")
        blocks.append(Block(_KINDS[token.type], start, end, tuple(name for _, name in path if name)))
    if front and (named := _FRONT_TITLE.search(front.group(1))):
        title = named.group(1).strip("'\"")
    return Extracted(text, tuple(blocks), "text/markdown", title)


def _top_level(tokens: list[Token]) -> list[tuple[Token, Token | None]]:
    """Each outermost block with the token after it (a heading's text). Lists and quotes stay whole; they are cut by lines if too long."""
    found = []
    for place, token in enumerate(tokens):
        if token.level == 0 and token.nesting >= 0 and token.type in _KINDS and token.map:
            found.append((token, tokens[place + 1] if place + 1 < len(tokens) else None))
    return found


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without empty lines at its ends; the indentation of its first line stays, because code needs it."""
    piece = text[start:end]
    end = start + len(piece.rstrip())
    lead = len(piece) - len(piece.lstrip("\n"))
    return start + lead, end


def _plain(heading: str) -> str:
    """A heading's words, without link targets and emphasis."""
    return _LINK.sub(r"\1", heading).replace("`", "").replace("**", "").strip().strip("#").strip()
