"""Spreadsheets (xlsx, xlsm, xls, ods): each sheet a section, its rows a table. Values as the file keeps them; formulas are not computed."""

import datetime
import io

from python_calamine import CalamineError, CalamineWorkbook

from services.retrieval.domain import Extracted
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsers.rejection import rejected

EXCEL = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
EXCEL_OLD = "application/vnd.ms-excel"
OPENDOCUMENT = "application/vnd.oasis.opendocument.spreadsheet"

CELLS_MAX = 5_000_000
"""A sheet is held as a full rectangle: one stray cell in the last corner would make 17 billion of it."""

Value = int | float | str | bool | datetime.time | datetime.date | datetime.datetime | datetime.timedelta


def parse_sheets(content: bytes, media_type: str) -> Extracted:
    """Hidden sheets and empty ones are left out."""
    if media_type != EXCEL_OLD:
        Container(content).refuse_document_types()
    outline = Outline()
    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(content))
        for name in book.sheet_names:
            sheet = book.get_sheet_by_name(name)
            if sheet.height * sheet.width > CELLS_MAX:
                raise rejected("a sheet is too large", cause="too_large", cells_max=CELLS_MAX)
            if sheet.height:
                if len(book.sheet_names) > 1:
                    outline.heading(1, name)
                outline.table([_written(value) for value in row] for row in sheet.iter_rows())
    except CalamineError:
        raise rejected("the spreadsheet is broken", cause="malformed") from None
    return outline.extracted(media_type)


def _written(value: Value) -> str:
    """As a person would write it: no decimals that are not there, dates without a time that was never given."""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    return str(value)
