"""Plain text: paragraphs between empty lines. The extracted text is the file's own."""

import re

from services.retrieval.domain import Block, BlockKind, Extracted

TITLE_CHARACTERS_MAX = 120
_PARAGRAPH = re.compile(r"\S(?:.*(?:\n(?![^\S\n]*(?:\n|\Z)).*)*)")


def parse_plain(text: str) -> Extracted:
    """Blocks are paragraphs; the title is the first line if it looks like one."""
    blocks = tuple(
        Block(BlockKind.PARAGRAPH, match.start(), match.start() + len(match.group().rstrip())) for match in _PARAGRAPH.finditer(text)
    )
    first = text[blocks[0].start :].split("\n", 1)[0].strip() if blocks else ""
    names = len(first) <= TITLE_CHARACTERS_MAX and not first.endswith((".", ",", ";", ":")) and any(map(str.isalpha, first))
    title = first if names else ""
    return Extracted(text, blocks, "text/plain", title)
