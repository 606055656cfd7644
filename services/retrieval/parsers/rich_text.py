"""RTF: paragraphs and tables. Its groups are unwound by a library without recursion; fonts, colours and pictures are dropped."""

import re

from striprtf.striprtf import rtf_to_text

from services.retrieval.domain import Extracted
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsers.rejection import rejected

MEDIA_TYPE = "application/rtf"

_ANSI = re.compile(rb"\\ansicpg(\d{3,5})")


def parse_rich(content: bytes) -> Extracted:
    """Raises DocumentRejected, cause `malformed`, for a file whose groups do not make sense."""
    page = _ANSI.search(content[:4096])
    try:
        text = rtf_to_text(content.decode("latin-1"), encoding=f"cp{page[1].decode()}" if page else "cp1252", errors="replace")  # type: ignore[no-untyped-call]
    except (ValueError, LookupError, IndexError, TypeError):
        raise rejected("the RTF is broken", cause="malformed") from None
    outline = Outline()
    rows: list[list[str]] = []
    for line in text.split("\n"):
        if line.count("|") >= 1 and line.rstrip().endswith("|"):
            rows.append(line.rstrip()[:-1].split("|"))
            continue
        outline.table(rows)
        rows = []
        outline.paragraph(line)
    outline.table(rows)
    return outline.extracted(MEDIA_TYPE)
