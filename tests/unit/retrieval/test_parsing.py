"""Files that have no text of their own: refused by name, or handed to the OCR that somebody has put in."""

import pytest

from services.chassis.config import SettingsError
from services.chassis.errors import DocumentRejected
from services.retrieval.domain import PAGE_LIST_CHARACTERS_MAX, Block, BlockKind, Extracted, Upload, page_list
from services.retrieval.parsing import Limits, ParserPool
from services.retrieval.wiring import ocr_named
from tests.fakes.documents import half_scanned_pdf, scanned_pdf


class Reader:
    """An OCR that finds the same on every page."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def read(self, upload: Upload) -> Extracted:
        self.asked.append(upload.source_uri)
        return Extracted("Read off.", (Block(BlockKind.PARAGRAPH, 0, 9),), "application/pdf", page_starts=(0,))


@pytest.mark.slow
async def test_a_scan_goes_to_the_ocr_that_is_there_and_nothing_else_does() -> None:
    """Not a file that has text, nor one that is refused for another cause."""
    ocr = Reader()
    async with ParserPool(Limits(workers=1), ocr).running() as pool:
        scan = await pool.parse(Upload(scanned_pdf(), source_uri="scan.pdf"))
        half = await pool.parse(Upload(half_scanned_pdf("tp"), source_uri="half.pdf"))
        with pytest.raises(DocumentRejected) as refusal:
            await pool.parse(Upload(b"", source_uri="empty.pdf"))

    assert (["scan.pdf"], "Read off.") == (ocr.asked, scan.text)
    assert ("Words that stand on a page of text.", (2,)) == (half.text, half.unread_pages)
    assert "empty" == refusal.value.metadata["cause"]


@pytest.mark.slow
async def test_a_scan_is_refused_by_name_where_no_ocr_is() -> None:
    """As by default."""
    async with ParserPool(Limits(workers=1), ocr_named("")).running() as pool:
        with pytest.raises(DocumentRejected) as refusal:
            await pool.parse(Upload(scanned_pdf(), source_uri="scan.pdf"))

    assert ("no_text", "1") == (refusal.value.metadata["cause"], refusal.value.metadata["pages"])


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
