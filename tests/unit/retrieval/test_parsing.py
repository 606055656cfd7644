"""Files and pages that have no text of their own: refused or named, or handed to the OCR that somebody has put in."""

import asyncio
from bisect import bisect_right
from dataclasses import replace

import pypdfium2
import pytest
from structlog.testing import capture_logs

from services.chassis.config import SettingsError
from services.chassis.errors import DocumentRejected, Unavailable
from services.retrieval.domain import PAGE_LIST_CHARACTERS_MAX, Block, BlockKind, Extracted, Upload, page_list
from services.retrieval.parsers import landlock
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsing import Limits, ParserPool
from services.retrieval.ports import Ocr
from services.retrieval.wiring import ocr_named
from tests.fakes.documents import (
    book,
    half_scanned_pdf,
    opendocument,
    pdf,
    row,
    scanned_pdf,
    shape,
    slides,
    word,
    words,
    workbook,
)


class Reader:
    """An OCR that reads of every page that it shows how wide it is; `asked` keeps the widths of what it was given."""

    def __init__(self) -> None:
        self.asked: dict[str, list[int]] = {}

    async def read(self, upload: Upload) -> Extracted:
        document = pypdfium2.PdfDocument(upload.content)
        widths = [round(document.get_page_size(number)[0]) for number in range(len(document))]
        document.close()
        self.asked[upload.source_uri] = widths
        outline = Outline()
        for width in widths:
            outline.page()
            outline.heading(1, f"A picture {width} points wide")
            outline.paragraph("With words that were read off it.")
        return outline.extracted("application/pdf")


class Replying:
    """An OCR that says what it was told to say, or raises it."""

    def __init__(self, reply: Extracted | Exception) -> None:
        self._reply = reply

    async def read(self, upload: Upload) -> Extracted:
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply


class Silent:
    """An OCR that never answers; `left` once it is no longer waited for."""

    def __init__(self) -> None:
        self.left = False

    async def read(self, upload: Upload) -> Extracted:
        try:
            await asyncio.Event().wait()
        finally:
            self.left = True
        raise AssertionError


async def parsed(ocr: Ocr | None, content: bytes, *, ocr_timeout_s: float = 20.0) -> Extracted:
    async with ParserPool(Limits(workers=1, ocr_timeout_s=ocr_timeout_s), ocr).running() as pool:
        return await pool.parse(Upload(content, source_uri="a.pdf"))


def pages_of(extracted: Extracted) -> list[list[str]]:
    """The blocks of each page, by their offsets."""
    pages: list[list[str]] = [[] for _ in extracted.page_starts]
    for block in extracted.blocks:
        pages[bisect_right(extracted.page_starts, block.start) - 1].append(extracted.text[block.start : block.end])
    return pages


@pytest.mark.slow
async def test_only_what_has_no_text_goes_to_the_ocr() -> None:
    """A whole scan, or those pages of a file that are pictures; not a file that is refused for another cause."""
    ocr = Reader()
    async with ParserPool(Limits(workers=1), ocr).running() as pool:
        for name, content in (("scan", scanned_pdf()), ("half", half_scanned_pdf("tppetp")), ("whole", half_scanned_pdf("te"))):
            await pool.parse(Upload(content, source_uri=name))
        with pytest.raises(DocumentRejected) as refusal:
            await pool.parse(Upload(b"", source_uri="empty.pdf"))

    assert {"scan": [600], "half": [602, 603, 606]} == ocr.asked
    assert "empty" == refusal.value.metadata["cause"]


@pytest.mark.slow
async def test_what_is_read_off_pictures_stands_on_its_own_page() -> None:
    """Page numbers and offsets are those of the whole file, and no page is called unread any more."""
    text, off = "Words that stand on a page of text.", "With words that were read off it."
    extracted = await parsed(Reader(), half_scanned_pdf("tpetp"))

    assert [[text], ["A picture 602 points wide", off], [], [text], ["A picture 605 points wide", off]] == pages_of(extracted)
    assert () == extracted.unread_pages
    assert ["A picture 602 points wide", ""] == ["".join(block.heading_path) for block in extracted.blocks[2:4]]


@pytest.mark.slow
async def test_a_page_that_the_ocr_cannot_read_stays_unread() -> None:
    """The others are there."""
    read = Extracted("Off.", (Block(BlockKind.PARAGRAPH, 0, 4),), "application/pdf", page_starts=(0, 4), unread_pages=(2,))
    extracted = await parsed(Replying(read), half_scanned_pdf("ptp"))

    assert [["Off."], ["Words that stand on a page of text."], []] == pages_of(extracted)
    assert (3,) == extracted.unread_pages


WORDS = Extracted("Off.", (Block(BlockKind.PARAGRAPH, 0, 4),), "application/pdf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        DocumentRejected("nothing to be read", cause="no_text"),
        replace(WORDS, page_starts=(0,)),  # two were asked for: which one is it?
        replace(WORDS, page_starts=(0, 5)),
        replace(WORDS, page_starts=(0, 4), unread_pages=(3,)),
        replace(WORDS, page_starts=(0, 4), blocks=(Block(BlockKind.PARAGRAPH, 0, 5),)),
    ],
)
async def test_what_an_ocr_refuses_or_garbles_leaves_the_text_that_is_there(reply: Extracted | Exception) -> None:
    """The document is taken in without its pictures, and says so."""
    extracted = await parsed(Replying(reply), half_scanned_pdf("tpp"))

    assert ("Words that stand on a page of text.", (2, 3)) == (extracted.text, extracted.unread_pages)


@pytest.mark.slow
async def test_an_absent_ocr_does_not_make_half_a_document_of_a_whole_one() -> None:
    """What may pass by itself is tried again by the ingestion, as for a file that is all pictures."""
    for content in (half_scanned_pdf("tp"), scanned_pdf()):
        with pytest.raises(Unavailable):
            await parsed(Replying(Unavailable("not now", dependency="ocr")), content)


@pytest.mark.slow
async def test_a_silent_ocr_is_waited_for_no_longer_than_it_may_take() -> None:
    """Half a document goes on without it; a whole scan is refused."""
    ocr = Silent()
    extracted = await parsed(ocr, half_scanned_pdf("tp"), ocr_timeout_s=0.05)

    assert ("Words that stand on a page of text.", (2,), True) == (extracted.text, extracted.unread_pages, ocr.left)
    with pytest.raises(DocumentRejected) as refusal:
        await parsed(ocr, scanned_pdf(), ocr_timeout_s=0.05)
    assert "timeout" == refusal.value.metadata["cause"]


@pytest.mark.slow
async def test_what_an_ocr_garbles_of_a_whole_scan_is_refused() -> None:
    """A block outside the text would be cited as what stands nowhere."""
    with pytest.raises(DocumentRejected) as refusal:
        await parsed(Replying(replace(WORDS, blocks=(Block(BlockKind.PARAGRAPH, 0, 5),))), scanned_pdf())

    assert "no_text" == refusal.value.metadata["cause"]


@pytest.mark.slow
async def test_a_scan_is_refused_by_name_where_no_ocr_is() -> None:
    """As by default."""
    async with ParserPool(Limits(workers=1), ocr_named("")).running() as pool:
        with pytest.raises(DocumentRejected) as refusal:
            await pool.parse(Upload(scanned_pdf(), source_uri="scan.pdf"))

    assert ("no_text", "1") == (refusal.value.metadata["cause"], refusal.value.metadata["pages"])


EVERY_FORMAT = {
    "a.pdf": pdf([(50, 700, 12, "An otter swims.")]),
    "a.docx": word(words("An otter swims.")),
    "a.pptx": slides(shape("An otter swims.")),
    "a.xlsx": workbook(("Sheet", row(1, "An otter swims."))),
    "a.odt": opendocument("<text:p>An otter swims.</text:p>"),
    "a.odp": opendocument("<draw:page><text:p>An otter swims.</text:p></draw:page>", "presentation"),
    "a.epub": book("<p>An otter swims.</p>"),
    "a.rtf": rb"{\rtf1 An otter swims.}",
    "a.eml": b"From: a@example.org\r\nSubject: s\r\nMIME-Version: 1.0\r\n\r\nAn otter swims.",
    "a.md": b"# Otters\n\nAn otter swims.",
    "a.html": b"<html><body><p>An otter swims.</p></body></html>",
    "a.rst": b"Otters\n======\n\nAn otter swims.",
    "a.txt": "An otter swims. Größe: 5 €".encode("cp1252"),
    "a.csv": b"animal,deed\notter,An otter swims.\n",
    "a.json": b'{"deed": "An otter swims."}',
    "a.jsonl": b'{"deed": "An otter swims."}\n{"deed": "no"}\n',
    "a.xml": b"<deeds><deed>An otter swims.</deed></deeds>",
    "a.py": b"def otter():\n    return 'An otter swims.'\n",
}


@pytest.mark.slow
async def test_every_format_is_read_by_a_process_that_may_open_nothing_but_its_modules() -> None:
    """Libraries that are loaded with the first file of their format are within its walls."""
    async with ParserPool(Limits(workers=1)).running() as pool:
        read = {name: (await pool.parse(Upload(content, source_uri=name))).text for name, content in EVERY_FORMAT.items()}

    assert [] == [name for name, text in read.items() if "An otter swims." not in text]


async def test_a_kernel_without_landlock_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read all the same, behind the other locks."""
    monkeypatch.setattr(landlock, "_call", lambda *_: -1)
    with capture_logs() as logs:
        async with ParserPool(Limits()).running():
            pass

    assert [("parsers_without_landlock", "warning")] == [(line["event"], line["log_level"]) for line in logs]
    assert not landlock.allow_reading_only([])


def test_an_ocr_is_named_by_where_it_is_imported_from() -> None:
    """What cannot be had is said with the setting's name, before anything is served."""
    assert isinstance(ocr_named(f"{__name__}:Reader"), Reader)
    for name in ("no.such.module:Reader", f"{__name__}:Nobody"):
        with pytest.raises(SettingsError, match="TAILRACE_RETRIEVAL_OCR"):
            ocr_named(name)


@pytest.mark.parametrize(("pages", "written"), [((), ""), ((3,), "3"), ((2, 3, 4, 9), "2-4, 9"), ((1, 2, 4, 5), "1-2, 4-5")])
def test_pages_are_written_as_people_write_them(pages: tuple[int, ...], written: str) -> None:
    """Runs by their ends."""
    assert written == page_list(pages)


def test_a_long_list_of_pages_is_cut_at_a_whole_page() -> None:
    """And says that it goes on."""
    written = page_list(range(1, 5000, 2))

    assert len(written) <= PAGE_LIST_CHARACTERS_MAX
    assert written.endswith(", …")
    assert "1, 3, 5" == written[:7]
    assert all(page.isdecimal() for page in written.removesuffix(", …").split(", "))
