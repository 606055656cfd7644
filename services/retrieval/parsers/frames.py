"""What a worker and the service say to each other over a pipe: frames of a length and a message. Values only, never pickled objects.

The service decodes what a worker wrote as if an enemy had: typed, bounded, and checked.
"""

import struct
from collections.abc import Sequence

import msgspec

from services.chassis.errors import DocumentRejected
from services.retrieval.domain import Block, BlockKind, Extracted, Upload
from services.retrieval.parsers.outline import BLOCKS_MAX, CHARACTERS_MAX

LENGTH = struct.Struct("<Q")
OUTCOME_BYTES_MAX = 64 * 1024 * 1024
OUT_OF_MEMORY = 70
"""Exit code of a worker that had no room left to say so."""
_KINDS = tuple(BlockKind)


class Task(msgspec.Struct, array_like=True):
    """A file to read; with `pages`, a PDF of which a PDF of those pages is to be made."""

    content: bytes
    title: str
    source_uri: str
    media_type: str
    pages: list[int] = []
    """From 1, ascending."""

    @classmethod
    def of(cls, upload: Upload, pages: Sequence[int] = ()) -> "Task":
        return cls(upload.content, upload.title, upload.source_uri, upload.media_type, list(pages))

    def upload(self) -> Upload:
        return Upload(self.content, title=self.title, source_uri=self.source_uri, media_type=self.media_type)


class Outcome(msgspec.Struct, array_like=True):
    """What became of it: the text, or why there is none. `peak_mib` is the worker's largest resident memory so far."""

    peak_mib: int
    cause: str = ""
    detail: str = ""
    facts: dict[str, str] = {}
    text: str = ""
    media_type: str = ""
    title: str = ""
    page_starts: list[int] = []
    paths: list[tuple[str, ...]] = []
    """Each heading path once."""
    blocks: list[tuple[int, int, int, int]] = []
    """Kind, start, end, path; kind and path by number."""
    unread_pages: list[int] = []
    excerpt: bytes = b""
    """A PDF of those pages that were asked for and can be loaded, `excerpt_pages`."""
    excerpt_pages: list[int] = []

    @classmethod
    def of(cls, extracted: Extracted, peak_mib: int) -> "Outcome":
        numbers: dict[tuple[str, ...], int] = {}
        blocks = [
            (_KINDS.index(block.kind), block.start, block.end, numbers.setdefault(block.heading_path, len(numbers)))
            for block in extracted.blocks
        ]
        return cls(
            peak_mib,
            text=extracted.text,
            media_type=extracted.media_type,
            title=extracted.title,
            page_starts=list(extracted.page_starts),
            paths=list(numbers),
            blocks=blocks,
            unread_pages=list(extracted.unread_pages),
        )

    @classmethod
    def refusal(cls, error: DocumentRejected, peak_mib: int) -> "Outcome":
        facts = dict(error.metadata)
        return cls(peak_mib, cause=facts.pop("cause"), detail=error.detail, facts=facts)

    def extracted(self) -> Extracted:
        """Raises DocumentRejected if the worker refused the file, ValueError if what it wrote makes no sense."""
        self._accepted()
        if len(self.text) > CHARACTERS_MAX or len(self.blocks) > BLOCKS_MAX:
            raise ValueError("more text than a document may hold")
        last = 0
        blocks = []
        for kind, start, end, path in self.blocks:
            if not (0 <= kind < len(_KINDS) and last <= start < end <= len(self.text) and 0 <= path < len(self.paths)):
                raise ValueError("a block that lies outside the text")
            last = end
            blocks.append(Block(_KINDS[kind], start, end, self.paths[path]))
        if any(not 0 <= start <= len(self.text) for start in self.page_starts) or self.page_starts != sorted(self.page_starts):
            raise ValueError("a page that lies outside the text")
        if any(not 0 < page <= len(self.page_starts) for page in self.unread_pages) or self.unread_pages != sorted(set(self.unread_pages)):
            raise ValueError("a page that is not there")
        return Extracted(self.text, tuple(blocks), self.media_type, self.title, tuple(self.page_starts), tuple(self.unread_pages))

    def excerpted(self) -> tuple[bytes, list[int]]:
        """A file of pages, and which they are. Raises DocumentRejected if the worker refused the file, ValueError as above."""
        self._accepted()
        if not (self.excerpt and self.excerpt_pages) or self.excerpt_pages != sorted(set(self.excerpt_pages)):
            raise ValueError("a file without pages")
        return self.excerpt, self.excerpt_pages

    def _accepted(self) -> None:
        if self.cause:
            raise DocumentRejected(self.detail, cause=self.cause, **self.facts)


TASK = msgspec.msgpack.Decoder(Task)
OUTCOME = msgspec.msgpack.Decoder(Outcome)
_ENCODER = msgspec.msgpack.Encoder()


def framed(message: Task | Outcome | None) -> bytes:
    """A message as it goes over the pipe; None = a frame that says only that its sender is there."""
    body = b"" if message is None else _ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body
