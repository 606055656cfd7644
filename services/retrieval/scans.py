"""What no parser can read because it is pictures, read by the OCR that the settings name: within its time, and checked before use.

Only the port and values here; which pages are pictures the parser says, and it makes a file of them.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import structlog

from services.chassis.errors import DocumentRejected
from services.retrieval.domain import Block, Extracted, Upload
from services.retrieval.parsers.frames import Outcome
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsers.rejection import rejected
from services.retrieval.ports import Ocr

log = structlog.get_logger(__name__)


async def read_off(ocr: Ocr, upload: Upload, timeout_s: float) -> Extracted:
    """The text of a file that is pictures. Raises DocumentRejected, and what the adapter raises."""
    try:
        async with asyncio.timeout(timeout_s) as patience:
            extracted = await ocr.read(upload)
    except TimeoutError:
        if not patience.expired():
            raise  # the adapter's own
        raise rejected("reading the pictures takes longer than it may", cause="timeout", seconds_max=round(timeout_s)) from None
    try:
        checked = Outcome.of(extracted, 0).extracted()
    except ValueError as error:
        log.error("ocr_reply_makes_no_sense", error=str(error))
        raise rejected("what the OCR says about the pictures makes no sense", cause="no_text") from None
    if not checked.text.strip():
        raise rejected("the OCR finds no text on the pictures", cause="no_text")
    return checked


async def completed(ocr: Ocr, half: Extracted, pages: Sequence[int], pictures: Upload, timeout_s: float) -> Extracted:
    """`half` with what stands on those of its `pages` that `pictures` is a file of, in this order.

    What cannot be read off leaves `half` as it is: most of a document is better than none, and it says which pages are missing. Raises what
    the adapter raises besides DocumentRejected.
    """
    try:
        read = await read_off(ocr, pictures, timeout_s)
        if len(read.page_starts or (0,)) == len(pages):
            return _filled(half, pages, read)
        log.error("ocr_reply_makes_no_sense", error="as many pages as were asked for", asked=len(pages), told=len(read.page_starts))
    except DocumentRejected as refusal:
        log.warning("ocr_read_nothing", cause=refusal.metadata.get("cause", ""), pages=len(pages))
    return half


def _filled(half: Extracted, pages: Sequence[int], read: Extracted) -> Extracted:
    """Both texts in the order of the pages. Raises DocumentRejected if together they are too large."""
    said = _blocks_by_page(half)
    seen = dict(zip(pages, _blocks_by_page(read), strict=True))
    outline = Outline()
    for page, blocks in enumerate(said, 1):
        outline.page()
        outline.append(replace(read, blocks=seen[page]) if seen.get(page) else replace(half, blocks=blocks), 0)
    still = {pages[place - 1] for place in read.unread_pages}
    unread = tuple(page for page in half.unread_pages if page not in seen or page in still)
    return replace(outline.extracted(half.media_type, half.title), unread_pages=unread)


def _blocks_by_page(extracted: Extracted) -> list[tuple[Block, ...]]:
    """Each page's blocks: those that begin on it."""
    starts = extracted.page_starts or (0,)
    pages: list[list[Block]] = [[] for _ in starts]
    for block in extracted.blocks:
        pages[max(0, bisect_right(starts, block.start) - 1)].append(block)
    return [tuple(blocks) for blocks in pages]
