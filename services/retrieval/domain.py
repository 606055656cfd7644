"""The values retrieval works with: documents, chunks, passages, cached answers, progress. No I/O, no wire, no vendor."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from services.chassis.money import Usage

DEFAULT_COLLECTION = "default"
PAGE_LIST_CHARACTERS_MAX = 200

Fact = str | float | bool
"""A value of a document's metadata."""

_NAMESPACE = uuid.UUID("6f0e3c52-6f6b-5f0e-9d39-9b7f3f0d2a11")
"""Root of all ids made from names, so that they are the same in every process and never those of another program."""


def stable_id(*parts: str) -> str:
    """A UUID made from `parts`; no two different lists of parts share one."""
    return str(uuid.uuid5(_NAMESPACE, "".join(f"{len(part)}:{part}" for part in parts)))


def document_id(tenant: str, collection: str, source_uri: str) -> str:
    """What a document is known by: the same source again is a new version of the same document."""
    return stable_id("document", tenant, collection, source_uri)


def page_list(pages: Sequence[int]) -> str:
    """Pages in ascending order for people, such as `2-4, 9`; a long list ends with `…`."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] == page - 1:
            runs[-1][1:] = [page]
        else:
            runs.append([page])
    written = ", ".join("-".join(map(str, run)) for run in runs)
    return written if len(written) <= PAGE_LIST_CHARACTERS_MAX else f"{written[: PAGE_LIST_CHARACTERS_MAX - 3].rpartition(',')[0]}, …"


class BlockKind(StrEnum):
    """What a stretch of a document is; decides where it may be cut."""

    HEADING = "heading"
    PARAGRAPH = "paragraph"
    LIST = "list"
    CODE = "code"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Block:
    """One stretch of extracted text that belongs together."""

    kind: BlockKind
    start: int
    end: int
    heading_path: tuple[str, ...] = ()
    """Headings above it, outermost first; a heading's own path ends with itself."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What a parser made of a file: its text, and the blocks of it in reading order, without overlap."""

    text: str
    blocks: tuple[Block, ...]
    media_type: str
    title: str = ""
    page_starts: tuple[int, ...] = ()
    """Where in `text` each page begins, first page first. Empty = the document has no pages."""
    unread_pages: tuple[int, ...] = ()
    """Pages, from 1, that are pictures: what stands on them is not in `text`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document that is found as a whole: `text` is exactly the extracted text from `start` to `end`."""

    ordinal: int
    text: str
    start: int
    end: int
    heading_path: tuple[str, ...] = ()
    page: int = 0
    """Page it begins on, from 1; 0 = the document has no pages."""
    flags: tuple[str, ...] = ()
    """What makes it look like an instruction to the model instead of material; empty = nothing was seen."""
    lead: str = ""
    """The words before it that it is found by as well, and that are not shown with it."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may read a document besides its uploader, admins and services. Empty = everybody in the tenant."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk as the store keeps it."""

    chunk_id: str
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Document:
    """One document in its current version."""

    document_id: str
    tenant: str
    collection: str
    source_uri: str
    title: str
    media_type: str
    version: int
    content_sha256: str
    bytes: int
    characters: int
    chunks: int
    indexed_us: int
    """When this version was indexed: microseconds of the wall clock, unique among this process's documents."""
    revision: str
    """Names this version's chunks; the document points at exactly one revision, so a search sees the old or the new."""
    metadata: Mapping[str, Fact] = field(default_factory=dict)
    pages: int = 0
    """0 = it has none."""
    readers: tuple[str, ...] = ()
    """Names of those who may read it, as `access.readers_of` makes them; empty = everybody in the tenant."""
    received: int = 0
    """Place of this version in the order in which documents were received; an older one never takes the place of a newer one."""
    language: str = ""
    """ISO 639-1 code of what most of it is in; empty = not known."""
    cut: str = ""
    """The rules by which it was cut into chunks, as `chunking.CUT` names them; empty = those of before they had a name."""
    unread_pages: str = ""
    """Pages that are pictures, as `page_list` writes them."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody of a tenant, as a reader of documents. Only `access` makes one."""

    tenant: str
    readers: tuple[str, ...] | None
    """The names under which documents may be limited to this one, the user's own first; None = all documents, limited or not."""

    def sees(self, document: Document) -> bool:
        """Whether the document may be read, listed, replaced and deleted."""
        return document.tenant == self.tenant and (
            self.readers is None or not document.readers or not set(self.readers).isdisjoint(document.readers)
        )

    def audience(self, *, limited: bool) -> str:
        """Who may share an answer from a collection, some of whose documents are `limited`: empty = the whole tenant."""
        if not limited:
            return ""
        if self.readers is None:
            return "all"
        return hashlib.sha256("".join(f"{len(name)}:{name}" for name in self.readers).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk as an answer cites it."""

    number: int
    document_id: str
    chunk_id: str
    title: str
    source_uri: str
    text: str
    start: int
    end: int
    score: float
    heading_path: tuple[str, ...] = ()
    document_version: int = 1
    page: int = 0
    flags: tuple[str, ...] = ()
    similarity: float | None = None
    """Cosine of question and passage; None = it is not among those nearest in meaning, or the embedder hardly knows the language."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """A validated answer that may be served again."""

    answer_id: str
    question: str
    user: str
    text: str
    passages: tuple[Passage, ...]
    model: str
    provider: str
    cost_nanousd: int
    created_at: datetime
    finish_reason: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the semantic tier said: an answer, or why there is none."""

    answer: CachedAnswer | None = None
    similarity: float | None = None
    """Of the nearest candidate, served or not."""
    reason: str = ""


class SearchMode(StrEnum):
    """By meaning, by words, or both fused."""

    HYBRID = "hybrid"
    DENSE = "dense"
    SPARSE = "sparse"


class Stage(StrEnum):
    """How far a document has come. Only forward; the last four are final, unless the document is retried."""

    RECEIVED = "received"
    PARSED = "parsed"
    CHUNKED = "chunked"
    EMBEDDED = "embedded"
    INDEXED = "indexed"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Stage.INDEXED, Stage.UNCHANGED, Stage.FAILED, Stage.CANCELLED)


@dataclass(frozen=True, slots=True)
class Upload:
    """One received file, not yet looked into."""

    content: bytes
    title: str = ""
    source_uri: str = ""
    collection: str = DEFAULT_COLLECTION
    media_type: str = ""
    metadata: Mapping[str, Fact] = field(default_factory=dict)
    uploader: Viewer | None = None
    """Who sent it. None = ourselves."""
    access: Access | None = None
    """Who may read it. None = as the version before; everybody in the tenant if there was none."""

    @property
    def name(self) -> str:
        """What the caller knows it by."""
        return self.source_uri or self.title


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one document of an ingestion has come."""

    index: int
    name: str
    stage: Stage
    document_id: str = ""
    bytes: int = 0
    chunks_total: int = 0
    chunks_done: int = 0
    version: int = 0
    error_reason: str = ""
    error_detail: str = ""
    attempt: int = 0
    """How often work on it was begun."""
    unread_pages: str = ""
    """Pages that are pictures, as `page_list` writes them."""
