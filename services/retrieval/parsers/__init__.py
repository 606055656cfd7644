"""Files to text with structure, one module a format; `read` decides which. Pure functions over bytes: no I/O, no store, no embedding.

What is read here may be built to do harm: the service calls `read` in a worker process only, see `services.retrieval.parsing`. A file that
cannot be read raises DocumentRejected with its `cause`.
"""

from collections.abc import Callable
from dataclasses import replace

from services.retrieval.domain import Extracted, Upload
from services.retrieval.parsers import detection, source_code
from services.retrieval.parsers.charset import decoded
from services.retrieval.parsers.data_text import JSON, JSON_LINES, XML, parse_json, parse_json_lines, parse_xml
from services.retrieval.parsers.html_text import parse_html
from services.retrieval.parsers.markdown_text import parse_markdown
from services.retrieval.parsers.outline import BLOCKS_MAX, CHARACTERS_MAX
from services.retrieval.parsers.plain_text import parse_plain
from services.retrieval.parsers.rejection import rejected
from services.retrieval.parsers.separated_text import CSV, TSV, parse_separated
from services.retrieval.parsers.structured_text import parse_structured
from services.retrieval.parsers.xml_tree import xml_text

TEXT_PARSERS: dict[str, Callable[[str], Extracted]] = {
    detection.HTML: parse_html,
    detection.MARKDOWN: parse_markdown,
    detection.PLAIN: parse_plain,
    detection.STRUCTURED: parse_structured,
    CSV: parse_separated,
    TSV: parse_separated,
    JSON: parse_json,
    JSON_LINES: parse_json_lines,
    XML: parse_xml,
}


def read(upload: Upload) -> Extracted:
    """Extract the text of a file. Raises DocumentRejected, see `parsers.rejection` for the causes."""
    try:
        extracted = _read(upload)
    except RecursionError:
        raise rejected("the file is nested too deeply", cause="malformed") from None
    except MemoryError:
        raise rejected("reading the file takes more memory than a document may", cause="too_large") from None
    if not extracted.text.strip():
        raise rejected("the document has no text", cause="empty")
    if len(extracted.text) > CHARACTERS_MAX or len(extracted.blocks) > BLOCKS_MAX:
        raise rejected("the document holds more text than one document may", cause="too_large", characters_max=CHARACTERS_MAX)
    return extracted


def _read(upload: Upload) -> Extracted:
    if media_type := detection.binary_format_of(upload.content):
        return _read_binary(upload.content, media_type)
    head = upload.content[:1024].decode("latin-1")
    html = detection.text_format_of(replace(upload, content=b""), head) == detection.HTML
    text = decoded(upload.content, html=html)
    media_type = detection.text_format_of(upload, text)
    if media_type == detection.MAIL:
        from services.retrieval.parsers.mail_text import parse_mail

        return parse_mail(upload.content)
    if media_type == XML:
        text = xml_text(upload.content)
    if parse := TEXT_PARSERS.get(media_type):
        return parse(text)
    return source_code.parse_code(text, media_type.removeprefix(source_code.MEDIA_TYPE_PREFIX))


def _read_binary(content: bytes, media_type: str) -> Extracted:
    """Libraries for these formats are large; each is imported when the first file of its format comes."""
    match media_type:
        case detection.PDF:
            from services.retrieval.parsers.pdf_text import parse_pdf

            return parse_pdf(content)
        case detection.WORD:
            from services.retrieval.parsers.word_text import parse_word

            return parse_word(content)
        case detection.SLIDES:
            from services.retrieval.parsers.slides_text import parse_slides

            return parse_slides(content)
        case detection.SHEETS | detection.SHEETS_OLD | detection.OPEN_SHEETS:
            from services.retrieval.parsers.sheets_text import parse_sheets

            return parse_sheets(content, media_type)
        case detection.OPEN_TEXT | detection.OPEN_SLIDES:
            from services.retrieval.parsers.opendocument_text import parse_opendocument

            return parse_opendocument(content)
        case detection.BOOK:
            from services.retrieval.parsers.book_text import parse_book

            return parse_book(content)
        case _:
            from services.retrieval.parsers.rich_text import parse_rich

            return parse_rich(content)
