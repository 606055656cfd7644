"""What retrieval needs from outside, as protocols, and the neutral values they speak in. No vendor's types.

Every filter and every read by id names a tenant: a query over all tenants cannot be written down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from services.chassis.errors import Unavailable
from services.chassis.principal import Principal
from services.retrieval.domain import Extracted, Upload
from services.retrieval.facts import FACTS, MOMENTS, NAME, NUMBERS, VALUE, Condition
from services.retrieval.late_interaction import AskedTokens

Vectors = npt.NDArray[np.float32]
"""(n, d), rows of unit length."""
Vector = npt.NDArray[np.float32]
"""(d,), of unit length."""
Payload = Mapping[str, Any]

SYSTEM_TENANT = ""
"""Owner of our own records. No principal has it: tenants have at least one character."""

TENANTS_MAX = 100_000
"""Tenants that our own upkeep looks at."""


@dataclass(frozen=True, slots=True)
class Space:
    """One kind of point. `keywords`, `integers` and `numbers` are the payload fields that filters and orders use."""

    name: str
    dense: bool = False
    sparse: bool = False
    keywords: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    dimension: int = 0
    """Numbers in a dense vector. 0 = as many as the store's first embedder makes."""
    sketched: bool = False
    """Whether its points may have a sketch."""


CHUNKS = Space(
    "chunks",
    dense=True,
    sparse=True,
    keywords=("collection", "document_id", "revision", "readers", FACTS, f"{NUMBERS}[].{NAME}", f"{MOMENTS}[].{NAME}"),
    integers=("ordinal",),
    numbers=(f"{NUMBERS}[].{VALUE}", f"{MOMENTS}[].{VALUE}"),
    sketched=True,
)
ANSWERS = Space("answers", dense=True, keywords=("collection", "cache_scope", "answer_id", "user"), integers=("epoch", "created_us"))
# The engines want at least one vector; documents are found by their fields alone and leave it empty.
DOCUMENTS = Space("documents", sparse=True, keywords=("kind", "collection", "readers"), integers=("indexed_us",))
SPACES = (CHUNKS, ANSWERS, DOCUMENTS)


@dataclass(frozen=True, slots=True)
class Filter:
    """What a point must be like. All conditions hold together."""

    tenant: str
    equal: Mapping[str, str | int] = field(default_factory=dict)
    any_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_least: Mapping[str, int] = field(default_factory=dict)
    below: Mapping[str, int] = field(default_factory=dict)
    readers: tuple[str, ...] | None = None
    """Only points without `readers`, or with one of these among them. None = all points, whoever may read them."""
    facts: tuple[Condition, ...] = ()
    """On the metadata of the document that a chunk is from."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """Weights by token id; all other tokens weigh nothing."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to store. `payload` holds its tenant."""

    id: str
    payload: Payload
    dense: Sequence[float] | None = None
    sparse: Sparse | None = None
    sketch: str = ""
    """Of the vectors of its tokens, as `late_interaction` makes it: several times the rest of a point. Empty = it has none."""


SKETCH = "sketch"
"""Payload field that adapters keep the sketch in. No record's payload has it."""


def stored_payload(point: Point) -> dict[str, Any]:
    """The payload as adapters write it."""
    return {**point.payload, SKETCH: point.sketch} if point.sketch else dict(point.payload)


@dataclass(frozen=True, slots=True)
class Record:
    """One stored thing."""

    id: str
    payload: Payload
    sketch: str = ""
    """Where it was asked for; empty = it has none."""


def record_of(id_: str, payload: dict[str, Any]) -> Record:
    """The record of what an adapter wrote with `stored_payload`."""
    return Record(id_, payload, payload.pop(SKETCH, ""))


Ranked = Mapping[int, float]
"""Scores of points, best first, by the number that a point's id is: of a hundred that are ranked a dozen is read, and writing an id as text
takes longer than ranking its point."""


def written(number: int) -> str:
    """The id with that number: ids of points are UUIDs."""
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the dense and the sparse ranking become one."""

    mode: str = "linear"
    """`linear` (scores as they are), `dbsf` (each normalised by its own spread) or `rrf` (ranks)."""
    prefetch: int = 100
    """How many candidates each ranking brings."""
    rrf_k: int = 60
    weights: tuple[float, float] = (1.0, 1.0)
    """Dense, sparse. Only their ratio counts."""


@dataclass(frozen=True, slots=True)
class Query:
    """A ranking by meaning (`near` is a vector) or by words (`near` is sparse)."""

    where: Filter
    limit: int
    near: Sequence[float] | Sparse


class VectorStore(Protocol):
    """Points with vectors and payload in a few spaces. Raises Unavailable(dependency="qdrant") when it cannot be reached."""

    async def ensure(self, space: Space) -> None:
        """Make the space, or open it, if that has not been done."""
        ...

    async def claim(self, space: Space, point: Point) -> Record:
        """Write `point` unless its id is taken; return what is there. Of several who claim an id at once, one prevails."""
        ...

    async def exchange(self, space: Space, point: Point, expected: Mapping[str, str | int]) -> None:
        """Write `point` in the place of the one with its id if that has these fields; where there is none, or another, change nothing.

        Looking and writing are one step. What came of it, a look at the point says.
        """
        ...

    async def tenants(self, space: Space) -> list[str]:
        """Whose points there are. For our own upkeep: no caller's request may come to this."""
        ...

    async def upsert(self, space: Space, points: Sequence[Point]) -> None:
        """Write `points` (a few hundred at most); durable against the death of this process on return."""
        ...

    async def delete(self, space: Space, where: Filter) -> None:
        """Remove every point that matches."""
        ...

    async def remove(self, space: Space, tenant: str, ids: Sequence[str], expected: Mapping[str, str | int] = {}) -> None:
        """Remove the tenant's points among `ids`, those that have the `expected` fields."""
        ...

    async def expire(self, space: Space, field: str, below: int) -> None:
        """Remove the points of all tenants whose integer `field` is below a bound."""
        ...

    async def get(self, space: Space, tenant: str, ids: Sequence[str], *, sketches: bool = False) -> dict[str, Record]:
        """The tenant's points among `ids`, by id; with their sketches if those are asked for."""
        ...

    async def find(self, space: Space, where: Filter, *, limit: int, order_by: str = "", descending: bool = False) -> list[Record]:
        """Up to `limit` points that match, ordered by an integer field if one is named."""
        ...

    async def count(self, space: Space, where: Filter) -> int:
        """How many points match, exactly."""
        ...

    async def rank(self, space: Space, query: Query) -> Ranked:
        """The best points that match."""
        ...

    async def check(self) -> None:
        """Raise Unavailable if the store does not answer or is not prepared."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors in the order of the texts, and how many tokens were read for them."""

    vectors: Vectors
    tokens: int
    counted: bool = False
    """Whether nobody but ourselves counted them."""
    sketches: tuple[str, ...] | None = None
    """Of the vectors of the texts' tokens; None = the embedder does not tell those."""


@dataclass(frozen=True, slots=True)
class EmbeddedQuestion:
    """A question as its embedder tells it."""

    vector: Sequence[float]
    """(d,) of plain floats: the stores take a vector number by number, and numpy's own are slow to be taken so."""
    tokens: AskedTokens | None = None
    """None = the embedder does not tell them, or the encoding has no sketches to hold against them."""


class Embedder(Protocol):
    """Texts to vectors, in two lanes: a question never waits for documents."""

    @property
    def embedder_id(self) -> str:
        """Names the model, its precision and its length limit. Vectors of two ids are never mixed."""
        ...

    @property
    def dimension(self) -> int: ...

    async def embed_question(self, text: str) -> Vectors:
        """(1, d), at once. Raises Overloaded when too many wait. Cancelled work that has not begun is dropped."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """In the documents' lane, taking turns with others there. At least one text."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without a length limit. Blocks; call it in a thread."""
        ...


class TokenEmbedder(Embedder, Protocol):
    """One that tells the vectors of a text's tokens as well, of the same pass through its model. Its `Embedded` have sketches."""

    sketch_form: str
    """Names how its sketches are made; those of two forms are never compared."""

    async def read_question(self, text: str) -> tuple[Vectors, AskedTokens | None]:
        """As `embed_question`, with its tokens; None = it has none."""
        ...


class Unanswered(Unavailable):
    """It was sent and nothing came back: whoever bills for it may have done the work."""


class Unpayable(Unavailable):
    """Nobody can say now whether it can be paid, so it was not sent."""


@dataclass(frozen=True, slots=True)
class PaidCall:
    """A call of an embedder that costs money."""

    operation_id: str
    provider: str
    model: str
    tokens_max: int
    began: datetime


@dataclass(frozen=True, slots=True)
class Spent:
    """What came of it."""

    tokens: int
    estimated: bool = False
    error_reason: str = ""
    not_sent: bool = False
    duration_ms: float = 0.0


class EmbeddingBooks(Protocol):
    """Where money for embeddings is set aside, and what was used of it written down."""

    async def reserve(self, payer: Principal, call: PaidCall) -> str:
        """The id of what was set aside. Raises BudgetExhausted, PriceUnknown, Overloaded, Unpayable."""
        ...

    async def record(self, payer: Principal, call: PaidCall, hold_id: str, spent: Spent) -> None:
        """Book it. What cannot be booked in time is left set aside, and is booked in full once that expires."""
        ...


class Reranker(Protocol):
    """Judges passages by reading them together with the question."""

    @property
    def model(self) -> str: ...

    async def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers, in their order; more is better, any scale. Raises Unavailable, ModelFailed, ModelMisconfigured,
        ModelRefused: the order that was there before is still good."""
        ...


class SparseEncoder(Protocol):
    """Texts to weighted words. Pure and quick (tens of microseconds)."""

    @property
    def encoder_id(self) -> str: ...

    def language(self, text: str) -> str:
        """ISO 639-1 code of the language of a text; empty = it cannot be told."""
        ...

    def document(self, text: str, language: str = "") -> Sparse:
        """`language` as `language()` told it for the whole document."""
        ...

    def query(self, text: str) -> Sparse: ...


class Ocr(Protocol):
    """Reads pages that are pictures. None is built in: without one, files of nothing else are refused with the cause `no_text`."""

    async def read(self, upload: Upload) -> Extracted:
        """The text of a file without any, with its pages: `page_starts` has one entry for each. Raises DocumentRejected, Unavailable.

        The file is the whole upload, or a PDF of those of its pages that are pictures. `unread_pages` names, by their place in the file
        that is given, those that it cannot read either. Cancellation: nobody waits any more, so what is begun is to be given up.
        """
        ...
