"""Tables as text (CSV, TSV): which sign separates, and the rows. No types are guessed: cells stay as written."""

import csv
import io
import re
from collections.abc import Iterator

from services.retrieval.domain import Extracted
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsers.rejection import rejected

CSV = "text/csv"
TSV = "text/tab-separated-values"

CELL_CHARACTERS_MAX = 1_000_000
SAMPLE_ROWS = 50
SAMPLE_CHARACTERS = 64 * 1024
_SEPARATORS = ",;\t|"
_NAMED = re.compile(r"sep=([,;\t|])\n")
"""How spreadsheet programs say in a first line what separates."""


def parse_separated(text: str) -> Extracted:
    """Raises DocumentRejected, cause `malformed`, if a quotation never ends within a cell's bound."""
    if named := _NAMED.match(text):
        separator, text = named[1], text[named.end() :]
    else:
        separator = separator_of(text)
    outline = Outline()
    try:
        outline.table(_rows(text, separator))
    except csv.Error:
        raise rejected("the table is broken: a quoted cell does not end", cause="malformed") from None
    return outline.extracted(TSV if separator == "\t" else CSV)


def separator_of(text: str) -> str:
    """The sign that cuts the first rows most evenly, above all one that cuts every row the same. A comma if none does."""
    sample = text[:SAMPLE_CHARACTERS]
    best, best_score = ",", (False, 0.0)
    for separator in _SEPARATORS:
        widths = _widths(sample, separator)
        if len(widths) and max(widths) > 1:
            usual = max(set(widths), key=widths.count)
            share = widths.count(usual) / len(widths) if usual > 1 else 0.0
            score = share == 1, share * min(usual, 4)
            if score > best_score:
                best, best_score = separator, score
    return best


def is_table(text: str) -> bool:
    """Whether a text nobody has named is one: several rows, all as wide, with more columns than prose has commas in every line."""
    sample = text[:SAMPLE_CHARACTERS]
    separator = separator_of(sample)
    widths = _widths(sample, separator)
    return len(widths) >= 3 and len(set(widths)) == 1 and widths[0] >= (2 if separator == "\t" else 3)


def _widths(sample: str, separator: str) -> list[int]:
    try:
        rows = [row for _, row in zip(range(SAMPLE_ROWS), _rows(sample, separator), strict=False) if row]
    except csv.Error:
        return []
    # The sample's last row may be cut.
    return [len(row) for row in (rows[:-1] if len(rows) > 2 and len(rows) < SAMPLE_ROWS and len(sample) == SAMPLE_CHARACTERS else rows)]


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(CELL_CHARACTERS_MAX)
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator)
