"""PDF: the text of each page in reading order, paragraphs put together from lines, headings told by their size. No pictures, no OCR.

Forms, scripts and attachments of the file are never opened.
"""

import ctypes
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from services.retrieval.domain import BlockKind, Extracted
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.rejection import rejected

MEDIA_TYPE = "application/pdf"

PAGES_MAX = 5_000
HEADING_SIZE_RATIO = 1.12
"""Text this much larger than the body's is a heading, if it is short."""
HEADING_CHARACTERS_MAX = 160
HEADING_LEVELS_MAX = 4
RUNNING_PAGES_MIN = 4
RUNNING_SHARE = 0.6
"""A line at the same end of so many pages is a running header or footer; its first appearance stays."""
RUNNING_LINES = 2
PARAGRAPH_GAP = 0.75
"""An empty space between lines of this share of their height begins a paragraph."""
FULL_LINE = 0.72
"""A line that reaches this share of the paragraph's width goes on in the next one; a shorter one ends there."""
BESIDE_GAP = 1.5
"""A wider gap, in heights of the line, separates columns or cells."""
COLUMN_CHARACTERS_MIN = 25
RUN_TOGETHER_HEIGHT = 1.5
"""What is higher, in sizes of its letters, or ends left of its beginning may be several lines."""
SHIFT_MIN = 0.3
"""A word that is so much higher or lower than the one before, in heights of it, and not behind it, begins another line."""
SLANT_MAX = 0.2
"""Radians that the letters of a line may lean."""
NO_TEXT_CHARACTERS_A_PAGE = 2
"""Scans may carry a stray sign or a page number."""

FORM_DEPTH_MAX = 3
"""How deep a scan lies in drawings within drawings."""

_ERRORS_PASSWORD = (pdfium_c.FPDF_ERR_PASSWORD, pdfium_c.FPDF_ERR_SECURITY)
_LINE_END = re.compile(r"\r\n|\r|\n")
CUT = "\x02"
"""How the library marks a hyphen that only the end of a line made; it often puts the two lines together itself."""
_CUT_WORD = re.compile(f"{CUT}(?=[^\\W\\d_A-Z])")
_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"\S+")
_BULLET = re.compile(r"(?:[•‣◦▪●○■–\uf0b7\u2022·*-]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s+\S")
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ufeff]")


@dataclass(slots=True)
class _Line:
    """One line of a page, in points from the page's lower left corner."""

    text: str
    left: float
    bottom: float
    right: float
    top: float
    size: float

    @property
    def height(self) -> float:
        return max(self.top - self.bottom, 1.0)


def parse_pdf(content: bytes) -> Extracted:
    """Raises DocumentRejected: `encrypted`, `truncated`, `malformed`, `no_text`, `too_large`.

    A file that anybody may open and only its printing or copying is restricted is read.
    """
    document = _opened(content)
    try:
        if len(document) > PAGES_MAX:
            raise rejected("the PDF has too many pages", cause="too_large", pages_max=PAGES_MAX)
        title = words_of(document.get_metadata_value("Title"))
        pages = [_lines_of_page(document, number) for number in range(len(document))]
        unread = [number + 1 for number, lines in enumerate(pages) if _says_nothing(lines) and _is_picture(document, number)]
    except pdfium.PdfiumError:
        raise rejected("the PDF is broken", cause="malformed") from None
    finally:
        document.close()
    characters = sum(len(line.text) for lines in pages for line in lines)
    if characters <= NO_TEXT_CHARACTERS_A_PAGE * len(pages):
        raise rejected("the PDF has no text, only pictures of it; it would have to be read by OCR", cause="no_text", pages=len(pages))
    _drop_running_lines(pages)
    levels = _heading_levels(pages)
    outline = Outline()
    for lines in pages:
        outline.page()
        for paragraph in _paragraphs(lines):
            _write(outline, paragraph, levels)
    return replace(outline.extracted(MEDIA_TYPE, title), unread_pages=tuple(unread))


def excerpt(content: bytes, pages: Sequence[int]) -> tuple[bytes, list[int]]:
    """A PDF of those of the pages, from 1, that can be loaded, and which they are. Raises DocumentRejected as above."""
    document, new = _opened(content), pdfium.PdfDocument.new()
    try:
        kept = [page for page in pages if _loads(document, page - 1)]
        new.import_pages(document, [page - 1 for page in kept])
        written = io.BytesIO()
        new.save(written)
    except pdfium.PdfiumError:
        raise rejected("the PDF is broken", cause="malformed") from None
    finally:
        new.close()
        document.close()
    return written.getvalue(), kept


def _loads(document: pdfium.PdfDocument, number: int) -> bool:
    try:
        document[number].close()
    except (pdfium.PdfiumError, IndexError):
        return False
    return True


def _opened(content: bytes) -> pdfium.PdfDocument:
    try:
        document = pdfium.PdfDocument(content)
        if not len(document):
            raise rejected("the PDF has no pages", cause="malformed")
        return document
    except pdfium.PdfiumError as error:
        if getattr(error, "err_code", None) in _ERRORS_PASSWORD:
            raise rejected("the PDF is encrypted; it opens with a password only", cause="encrypted") from None
        if b"%%EOF" not in content[-2048:]:
            raise rejected("the end of the PDF is missing", cause="truncated") from None
        raise rejected("the PDF is broken", cause="malformed") from None


def _lines_of_page(document: pdfium.PdfDocument, number: int) -> list[_Line]:
    """A page that cannot be loaded has no lines; the others are read all the same."""
    try:
        page = document[number]
    except pdfium.PdfiumError:
        return []
    try:
        text_page = page.get_textpage()
        try:
            return _in_reading_order(list(_lines(text_page)))
        finally:
            text_page.close()
    finally:
        page.close()


def _says_nothing(lines: list[_Line]) -> bool:
    return sum(len(line.text) for line in lines) <= NO_TEXT_CHARACTERS_A_PAGE


def _is_picture(document: pdfium.PdfDocument, number: int) -> bool:
    """Whether the page shows what no text says; one that cannot be loaded counts as such, an empty one does not."""
    try:
        page = document[number]
    except pdfium.PdfiumError:
        return True
    try:
        return any(True for _ in page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_IMAGE], max_depth=FORM_DEPTH_MAX))
    finally:
        page.close()


def _lines(text_page: pdfium.PdfTextPage) -> Iterator[_Line]:
    """The lines as the library tells them apart, with what stands beside each other on one line put together again."""
    text = text_page.get_text_range()
    gathered: _Line | None = None
    place = 0
    for part in (*_LINE_END.finditer(text), None):
        end = part.start() if part else len(text)
        for line in _told_apart(text_page, text[place:end], place):
            if gathered is not None and _beside(gathered, line):
                _put_together(gathered, line)
            else:
                if gathered is not None:
                    yield gathered
                gathered = line
        place = part.end() if part else end
    if gathered is not None:
        yield gathered


def _told_apart(text_page: pdfium.PdfTextPage, raw: str, place: int) -> Iterator[_Line]:
    """The lines in what the library takes for one; it runs together the lines of two columns that overlap a little in height."""
    if not raw.strip():
        return
    whole = _measured(text_page, raw, place)
    # Few lines are suspicious, so that few are looked at word by word.
    if not whole.size or (whole.left <= whole.right and whole.height <= RUN_TOGETHER_HEIGHT * whole.size):
        yield whole
        return
    begin = 0
    before: _Line | None = None
    for word in _WORD.finditer(raw):
        here = _measured(text_page, word[0], place + word.start())
        if before is not None and abs(here.bottom - before.bottom) > SHIFT_MIN * before.height and not _follows(before, here):
            yield _measured(text_page, raw[begin : word.start()], place + begin)
            begin = word.start()
        before = here
    yield _measured(text_page, raw[begin:], place + begin)


def _follows(before: _Line, line: _Line) -> bool:
    """Whether the line begins where the other one ends, whatever their heights on the page."""
    return -0.5 * line.height < line.left - before.right < BESIDE_GAP * max(before.height, line.height)


def _measured(text_page: pdfium.PdfTextPage, raw: str, place: int) -> _Line:
    """The line with its place, from the boxes of its first and last sign; its size is that of its first letter."""
    first = place + len(raw) - len(raw.lstrip())
    last = place + len(raw.rstrip()) - 1
    letter = next((place + number for number, sign in enumerate(raw) if sign.isalnum()), first)
    left, bottom, _, top = _box(text_page, first)
    _, other_bottom, right, other_top = _box(text_page, last)
    index = pdfium_c.FPDFText_GetCharIndexFromTextIndex(text_page, letter)
    size = pdfium_c.FPDFText_GetFontSize(text_page, index) if index >= 0 else 0.0
    if index >= 0 and SLANT_MAX < pdfium_c.FPDFText_GetCharAngle(text_page, index) < 2 * math.pi - SLANT_MAX:
        # What runs up the margin is no heading, however large.
        size = 0.0
    elif size <= 1:
        # Some files scale their letters up from a font of size 1.
        size = top - bottom
    return _Line(_readable(raw), left, min(bottom, other_bottom), right, max(top, other_top), round(size, 1))


def _readable(raw: str) -> str:
    """Words cut by a hyphen at the end of a line are whole again; one that ends here keeps its mark for the next line."""
    text = _CUT_WORD.sub("", raw.replace("\ufffe", CUT).rstrip())
    ends = CUT if text.endswith(CUT) else ""
    return _UNREADABLE.sub("", text.removesuffix(CUT).replace(CUT, "-")) + ends


def _beside(before: _Line, line: _Line) -> bool:
    """Whether the line goes on at the same height, such as behind a raised number or another font."""
    return _overlap(before, line) > 0.5 and _follows(before, line)


def _overlap(one: _Line, other: _Line) -> float:
    """How much of the lower of two lines stands at the height of the other one."""
    return (min(one.top, other.top) - max(one.bottom, other.bottom)) / min(one.height, other.height)


def _put_together(before: _Line, line: _Line) -> None:
    space = " " if line.left - before.right > 0.15 * before.height else ""
    before.size = max(before.size, line.size)
    before.text = before.text.rstrip() + space + line.text.lstrip()
    before.right = line.right
    before.bottom, before.top = min(before.bottom, line.bottom), max(before.top, line.top)


def _box(text_page: pdfium.PdfTextPage, place: int) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of the sign at that place of the text. Its loose box: of one height for all signs of a font."""
    index = pdfium_c.FPDFText_GetCharIndexFromTextIndex(text_page, place)
    rectangle = pdfium_c.FS_RECTF()
    if index < 0 or not pdfium_c.FPDFText_GetLooseCharBox(text_page, index, ctypes.byref(rectangle)):
        return (0.0, 0.0, 0.0, 0.0)
    return (rectangle.left, rectangle.bottom, rectangle.right, rectangle.top)


def _in_reading_order(lines: list[_Line]) -> list[_Line]:
    """The lines as they are to be read.

    Most files hold them in that order already, columns included. Where they do not, they go up and down the page; then a gutter is
    looked for, and the columns are read one after the other.
    """
    # Short lines side by side are a table, to be read row by row; long ones are columns.
    prose = sum(len(line.text) for line in lines) > COLUMN_CHARACTERS_MIN * len(lines)
    jumps = sum(
        1
        for before, line in pairwise(lines)
        if line.bottom > before.top + before.height or (prose and (line.left > before.right or line.right < before.left))
    )
    if jumps <= max(3, len(lines) // 12):
        return lines
    gutter = _gutter(lines)
    if gutter is None:
        return sorted(lines, key=lambda line: (-round(line.top), line.left))
    ordered: list[_Line] = []
    band: list[_Line] = []
    # What spans both columns ends them; below it they begin again.
    for line in sorted(lines, key=lambda line: -line.top):
        if line.left < gutter < line.right:
            ordered.extend(sorted(band, key=lambda line: (line.left > gutter, -line.top)))
            ordered.append(line)
            band = []
        else:
            band.append(line)
    ordered.extend(sorted(band, key=lambda line: (line.left > gutter, -line.top)))
    return ordered


def _gutter(lines: list[_Line]) -> float | None:
    """Where between a quarter and three quarters of the width hardly any line crosses and both sides hold many."""
    left, right = min(line.left for line in lines), max(line.right for line in lines)
    best: tuple[int, float] | None = None
    for step in range(25, 76):
        place = left + (right - left) * step / 100
        crossing = sum(1 for line in lines if line.left < place < line.right)
        sides = (sum(1 for line in lines if line.right <= place), sum(1 for line in lines if line.left >= place))
        if crossing <= len(lines) // 5 and min(sides) >= len(lines) // 5 and (best is None or crossing < best[0]):
            best = (crossing, place)
    return best[1] if best else None


def _drop_running_lines(pages: list[list[_Line]]) -> None:
    """Headers and footers that run through the document, all but the first of each."""
    if len(pages) < RUNNING_PAGES_MIN:
        return
    seen: Counter[tuple[str, int]] = Counter()
    for lines in pages:
        seen.update({_running_key(line) for line in _at_the_ends(lines)})
    running = {key for key, count in seen.items() if count >= max(RUNNING_PAGES_MIN, RUNNING_SHARE * len(pages))}
    kept: set[tuple[str, int]] = set()
    for lines in pages:
        for line in _at_the_ends(lines):
            key = _running_key(line)
            if key in running:
                if key in kept:
                    lines.remove(line)
                kept.add(key)


def _at_the_ends(lines: list[_Line]) -> list[_Line]:
    by_height = sorted(lines, key=lambda line: -line.top)
    return by_height[:RUNNING_LINES] + by_height[RUNNING_LINES:][-RUNNING_LINES:]


def _running_key(line: _Line) -> tuple[str, int]:
    """The words without their numbers, and the height on the page: page 7 and page 8 are one footer."""
    return _DIGITS.sub("#", words_of(line.text)), round(line.top / 8)


def _heading_levels(pages: list[list[_Line]]) -> dict[float, int]:
    """Sizes that are headings, and their levels. The body has the size in which most is written."""
    written: Counter[float] = Counter()
    for lines in pages:
        for line in lines:
            written[line.size] += len(line.text)
    if not written:
        return {}
    body = written.most_common(1)[0][0]
    total = sum(written.values())
    larger = sorted((size for size, count in written.items() if size >= body * HEADING_SIZE_RATIO and count < total / 4), reverse=True)
    return {size: min(place + 1, HEADING_LEVELS_MAX) for place, size in enumerate(larger)}


def _paragraphs(lines: list[_Line]) -> Iterator[list[_Line]]:
    """Lines that belong together: of one size, close below each other, and not begun by a sign of a list."""
    gathered: list[_Line] = []
    for line in lines:
        if gathered and not _goes_on(gathered[-1], line):
            yield gathered
            gathered = []
        gathered.append(line)
    if gathered:
        yield gathered


def _goes_on(before: _Line, line: _Line) -> bool:
    gap = before.bottom - line.top
    same_size = abs(before.size - line.size) <= 0.05 * max(before.size, line.size)
    return same_size and -2.5 * before.height < gap < PARAGRAPH_GAP * line.height and not _BULLET.match(line.text.strip())


def _write(outline: Outline, paragraph: list[_Line], levels: dict[float, int]) -> None:
    text = _joined(paragraph)
    words = words_of(text)
    level = levels.get(paragraph[0].size)
    if level and len(words) <= HEADING_CHARACTERS_MAX and words[0].isalnum() and any(sign.isalpha() for sign in words):
        outline.heading(level, words)
    elif _BULLET.match(words):
        outline.block(BlockKind.LIST, text)
    else:
        outline.block(BlockKind.PARAGRAPH, text)


def _joined(paragraph: list[_Line]) -> str:
    """Full lines run on into the next, words cut at their end are put together; a line that stops short keeps its end."""
    width = max(line.right for line in paragraph) - min(line.left for line in paragraph)
    left = min(line.left for line in paragraph)
    parts: list[str] = []
    for line, following in zip(paragraph, [*paragraph[1:], None], strict=True):
        words = words_of(line.text)
        if words.endswith(CUT):
            goes_on = following is not None and following.text.lstrip()[:1].islower()
            parts.append(words.removesuffix(CUT) + ("" if goes_on else "-"))
        elif following is not None:
            parts.append(words + (" " if line.right - left >= FULL_LINE * width else "\n"))
        else:
            parts.append(words)
    return "".join(parts)
