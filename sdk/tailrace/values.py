"""What the client gives back, as frozen values, and how each is read from its message. No call is made here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf import struct_pb2, timestamp_pb2
from google.protobuf.json_format import MessageToDict

from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens by kind; no token is counted twice."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """A place in a document: what an answer cites and what a search finds."""

    number: int
    document_id: str
    chunk_id: str
    title: str
    source_uri: str
    text: str
    start: int
    """First character in the document's extracted text."""
    end: int
    score: float
    heading_path: tuple[str, ...] = ()
    page: int = 0
    """Page it begins on, from 1; 0 = the document has no pages."""
    flags: tuple[str, ...] = ()
    """What makes it look like an instruction to the model; empty = nothing was seen."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document as it is kept."""

    chunk_id: str
    ordinal: int
    """Position in the document, from 0."""
    text: str
    start: int
    end: int
    heading_path: tuple[str, ...]
    page: int
    flags: tuple[str, ...]
    """As in Passage."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a hit came to its place."""

    dense_rank: int | None
    """Place among the hits by meaning, from 1. None = not among them."""
    dense_score: float | None
    """Cosine similarity to the query."""
    sparse_rank: int | None
    """Place among the hits by words, from 1. None = not among them."""
    sparse_score: float | None
    """BM25."""
    dense_weight: float
    """Weight the meaning had in the fusion, of 1 in all."""
    fused_score: float
    rerank_score: float | None
    """Of the reranker, or of late interaction; None = neither judged it."""
    language: str
    """What the query was taken to be in, ISO 639-1. Empty = not known."""
    embedder_id: str


@dataclass(frozen=True, slots=True)
class Hit(Passage):
    """A passage that a search found."""

    explanation: Explanation | None = None
    """None = not asked for."""
    before: tuple[Chunk, ...] = ()
    """Neighbours in reading order, as many as were asked for."""
    after: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """What one field of a document's metadata must be like. All parts hold together; without any, the field must be there."""

    key: str
    any_of: Sequence[str | float | bool] = ()
    """Equal to one of these; True is not 1, and "1" is neither."""
    at_least: float | None = None
    below: float | None = None
    since: datetime | None = None
    """A date or moment not before this. One without a time zone is taken as UTC."""
    until: datetime | None = None
    """A date or moment before this."""
    negated: bool = False
    """Turns it round: documents that do not match, those without the field included."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The question was taken on. Always the first event."""

    answer_id: str
    session_id: str
    trace_id: str


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the chain began (`running`) or ended (`done`, `skipped`, `failed`)."""

    name: str
    status: str
    started_ms: float
    duration_ms: float
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passages:
    """The passages that the answer may cite."""

    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """More text."""

    text: str


@dataclass(frozen=True, slots=True)
class Citation:
    """The text so far cites passage `number`, by the marker at `start`..`end`."""

    number: int
    start: int
    end: int
    document_id: str
    chunk_id: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers. Not part of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model calls a tool. Of the client's own, the answer ends with the receipt's `finish_reason` `tool_use`."""

    call_id: str
    name: str
    input: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolConfirmation:
    """A call waits for a person's word; see `AsyncClient.confirm`."""

    call_id: str
    name: str
    wait_ms: int
    """Then it counts as refused."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returned: read from events, and sent for the client's own tools."""

    call_id: str
    text: str
    failed: bool = False
    flags: tuple[str, ...] = ()
    """What makes it look like an instruction to the model; empty = nothing was seen. Not sent."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of the client's own, as the model sees it."""

    name: str
    """1-64 of [A-Za-z0-9_-]."""
    description: str = ""
    input_schema: Mapping[str, Any] = field(default_factory=dict)
    """JSON Schema of an object."""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture a question is about: PNG, JPEG, GIF or WebP, at most 5 MiB."""

    media_type: str
    """Such as `image/png`."""
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CacheVerdict:
    """What the answer cache said: `miss`, `exact`, `semantic`, `coalesced` or `off`."""

    verdict: str
    reason: str
    similarity: float | None
    age_s: int | None
    saved_nanousd: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the answer was made of and what it cost. Always the last event."""

    answer_id: str
    text_sha256: str
    usage: Usage
    cost_nanousd: int
    model: str
    provider: str
    tier: str
    finish_reason: str
    verdict: str
    cache: CacheVerdict
    trace_id: str
    estimated: bool
    first_token_ms: float
    duration_ms: float


Event = Accepted | Step | Passages | Delta | Citation | Reasoning | ToolCall | ToolConfirmation | ToolResult | Receipt


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """A whole answer."""

    text: str
    passages: tuple[Passage, ...]
    citations: tuple[Citation, ...]
    steps: tuple[Step, ...]
    session_id: str
    receipt: Receipt
    reasoning: str = ""
    """What the model was seen to think, if that was asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: tuple[ToolResult, ...] = ()
    """Of calls that were made already. Those that have none are the client's to make."""

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls that wait for the client: make them, and ask again with `continues` and `tool_results`."""
        made = {result.call_id for result in self.tool_results}
        waiting = tuple(call for call in self.tool_calls if call.call_id not in made)
        return waiting if self.receipt.finish_reason == "tool_use" else ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one document is: `received`, `parsed`, `chunked`, `embedded`, at last `indexed`, `unchanged`, `failed` or `cancelled`."""

    job_id: str
    index: int
    """Position of the document in the ingestion, from 0."""
    name: str
    document_id: str
    stage: str
    chunks_total: int
    chunks_done: int
    version: int
    error_reason: str
    error_detail: str
    unread_pages: str = ""
    """Pages that are pictures, so that nothing on them is found, such as `2-4, 9`."""

    @property
    def final(self) -> bool:
        return self.stage in {"indexed", "unchanged", "failed", "cancelled"}


@dataclass(frozen=True, slots=True)
class Access:
    """Who may read a document, besides its uploader and the tenant's admins and services. Empty = everybody in the tenant."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """An ingestion as a whole."""

    job_id: str
    status: str
    """`receiving`, `running` or `ended`."""
    created_at: datetime
    documents: int
    stages: Mapping[str, int]
    """How many documents are at each stage."""
    bytes: int
    chunks_total: int
    chunks_done: int


@dataclass(frozen=True, slots=True)
class Document:
    document_id: str
    title: str
    source_uri: str
    collection: str
    media_type: str
    version: int
    bytes: int
    characters: int
    chunks: int
    indexed_at: datetime
    metadata: Mapping[str, str | float | bool]
    pages: int
    """0 = it has none."""
    access: Access | None
    """None = everybody in the tenant. A user sees the own names only."""
    unread_pages: str = ""
    """Pages that are pictures, so that nothing on them is found, such as `2-4, 9`."""


@dataclass(frozen=True, slots=True)
class Collection:
    name: str
    documents: int
    """That the caller may read."""
    epoch: int
    """Grows with every change of its documents."""
    embedder_id: str
    next_embedder_id: str
    """The embedder it is being moved to. Empty = none."""
    reembedded: int
    """Documents that have vectors of the next embedder already."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is kept of one answer, without its text."""

    operation_id: str
    user: str
    session_id: str
    trace_id: str
    status: str
    model: str
    tier: str
    finish_reason: str
    error_reason: str
    usage: Usage
    cost_nanousd: int
    cache: CacheVerdict
    estimated: bool
    created_at: datetime
    first_token_ms: float
    duration_ms: float
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over the operations of one group."""

    group: Mapping[str, str]
    operations: int
    failed: int
    cancelled: int
    estimated: int
    cache_hits: int
    coalesced: int
    attempts: int
    usage: Usage
    cost_nanousd: int
    saved_nanousd: int
    prompt_cache_saved_nanousd: int
    tiering_saved_nanousd: int
    duration_ms_p50: float
    duration_ms_p90: float
    duration_ms_p99: float
    first_token_ms_p50: float
    first_token_ms_p90: float
    first_token_ms_p99: float


def event(message: orchestrator.AnswerEvent) -> Event | None:
    """The event in `message`; None for a heartbeat and for kinds that this version does not know."""
    match message.WhichOneof("event"):
        case "accepted":
            return Accepted(message.accepted.answer_id, message.accepted.session_id, message.accepted.trace_id)
        case "step":
            return step(message.step)
        case "passages":
            return Passages(tuple(passage(item) for item in message.passages.passages))
        case "delta":
            return Delta(message.delta.text)
        case "citation":
            cited = message.citation
            return Citation(cited.number, cited.start, cited.end, cited.document_id, cited.chunk_id)
        case "tool_call":
            return ToolCall(message.tool_call.call_id, message.tool_call.name, MessageToDict(message.tool_call.input))
        case "tool_result":
            returned = message.tool_result
            return ToolResult(returned.call_id, returned.text, returned.failed, tuple(returned.flags))
        case "reasoning":
            return Reasoning(message.reasoning.text)
        case "tool_confirmation":
            waiting = message.tool_confirmation
            return ToolConfirmation(waiting.call_id, waiting.name, waiting.wait_ms)
        case "done":
            return receipt(message.done)
        case _:
            return None


def tool_message(tool: Tool) -> orchestrator.ToolDefinition:
    message = orchestrator.ToolDefinition(name=tool.name, description=tool.description)
    message.input_schema.update(tool.input_schema)
    return message


def receipt(done: orchestrator.Done) -> Receipt:
    return Receipt(
        answer_id=done.answer_id,
        text_sha256=done.text_sha256,
        usage=usage(done.usage),
        cost_nanousd=done.cost_nanousd,
        model=done.model,
        provider=done.provider,
        tier=done.tier,
        finish_reason=done.finish_reason,
        verdict=done.verdict,
        cache=cache_verdict(done.cache),
        trace_id=done.trace_id,
        estimated=done.estimated,
        first_token_ms=done.first_token_ms,
        duration_ms=done.duration_ms,
    )


def usage(message: common_pb2.Usage) -> Usage:
    return Usage(message.input_tokens, message.output_tokens, message.cache_read_tokens, message.cache_write_tokens)


def cache_verdict(message: common_pb2.CacheReceipt) -> CacheVerdict:
    return CacheVerdict(
        verdict=message.verdict,
        reason=message.reason,
        similarity=message.similarity if message.HasField("similarity") else None,
        age_s=message.age_s if message.HasField("age_s") else None,
        saved_nanousd=message.saved_nanousd,
    )


def step(message: orchestrator.Step | common_pb2.StepTiming) -> Step:
    return Step(message.name, message.status, message.started_ms, message.duration_ms, dict(message.facts))


def passage(message: common_pb2.CitedPassage) -> Passage:
    return Passage(
        number=message.number,
        document_id=message.document_id,
        chunk_id=message.chunk_id,
        title=message.title,
        source_uri=message.source_uri,
        text=message.text,
        start=message.start,
        end=message.end,
        score=message.score,
        heading_path=tuple(message.heading_path),
        page=message.page,
        flags=tuple(message.flags),
    )


def hit(message: retrieval.SearchResponse) -> Hit:
    found = passage(message.hit)
    return Hit(
        **{item.name: getattr(found, item.name) for item in fields(found)},
        explanation=_explanation(message.explanation) if message.HasField("explanation") else None,
        before=tuple(chunk(item) for item in message.before),
        after=tuple(chunk(item) for item in message.after),
    )


def chunk(message: retrieval.Chunk) -> Chunk:
    return Chunk(
        chunk_id=message.chunk_id,
        ordinal=message.ordinal,
        text=message.text,
        start=message.start,
        end=message.end,
        heading_path=tuple(message.heading_path),
        page=message.page,
        flags=tuple(message.flags),
    )


def _explanation(message: retrieval.HitExplanation) -> Explanation:
    return Explanation(
        dense_rank=message.dense_rank if message.HasField("dense_rank") else None,
        dense_score=message.dense_score if message.HasField("dense_score") else None,
        sparse_rank=message.sparse_rank if message.HasField("sparse_rank") else None,
        sparse_score=message.sparse_score if message.HasField("sparse_score") else None,
        dense_weight=message.dense_weight,
        fused_score=message.fused_score,
        rerank_score=message.rerank_score if message.HasField("rerank_score") else None,
        language=message.language,
        embedder_id=message.embedder_id,
    )


def condition_message(condition: Condition) -> retrieval.MetadataCondition:
    """A condition as it crosses the wire."""
    return retrieval.MetadataCondition(
        key=condition.key,
        any_of=[fact_message(fact) for fact in condition.any_of],
        at_least=condition.at_least,
        below=condition.below,
        until=moment_message(condition.until),
        negated=condition.negated,
        **{"from": moment_message(condition.since)},
    )


def moment_message(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment as it crosses the wire; one without a time zone is taken as UTC."""
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


def job(message: retrieval.ListIngestionJobsResponse | retrieval.GetIngestionJobResponse) -> Job:
    summary = message.summary
    return Job(
        job_id=message.job_id,
        status=message.status,
        created_at=message.created_at.ToDatetime(UTC),
        documents=summary.documents,
        stages=dict(summary.stages),
        bytes=summary.bytes,
        chunks_total=summary.chunks_total,
        chunks_done=summary.chunks_done,
    )


def progress(message: retrieval.IngestDocumentsResponse) -> Progress:
    return Progress(
        job_id=message.job_id,
        index=message.index,
        name=message.name,
        document_id=message.document_id,
        stage=message.stage,
        chunks_total=message.chunks_total,
        chunks_done=message.chunks_done,
        version=message.version,
        error_reason=message.error_reason,
        error_detail=message.error_detail,
        unread_pages=message.unread_pages,
    )


def document(message: retrieval.Document) -> Document:
    return Document(
        document_id=message.document_id,
        title=message.title,
        source_uri=message.source_uri,
        collection=message.collection,
        media_type=message.media_type,
        version=message.version,
        bytes=message.bytes,
        characters=message.characters,
        chunks=message.chunks,
        indexed_at=message.indexed_at.ToDatetime(UTC),
        metadata={key: _fact(value) for key, value in message.metadata.items()},
        pages=message.pages,
        access=Access(tuple(message.access.users), tuple(message.access.groups)) if message.HasField("access") else None,
        unread_pages=message.unread_pages,
    )


def collection(message: retrieval.ListCollectionsResponse) -> Collection:
    return Collection(
        name=message.collection,
        documents=message.documents,
        epoch=message.epoch,
        embedder_id=message.embedder_id,
        next_embedder_id=message.next_embedder_id,
        reembedded=message.reembedded,
    )


def _fact(message: struct_pb2.Value) -> str | float | bool:
    kind = message.WhichOneof("kind")
    if kind == "bool_value":
        return message.bool_value
    return message.number_value if kind == "number_value" else message.string_value


def fact_message(fact: str | float | bool) -> struct_pb2.Value:
    """A value of a document's metadata as it crosses the wire."""
    if isinstance(fact, bool):
        return struct_pb2.Value(bool_value=fact)
    return struct_pb2.Value(string_value=fact) if isinstance(fact, str) else struct_pb2.Value(number_value=fact)


def operation(message: ledger.Operation) -> Operation:
    return Operation(
        operation_id=message.operation_id,
        user=message.user,
        session_id=message.session_id,
        trace_id=message.trace_id,
        status=message.status,
        model=message.model,
        tier=message.tier,
        finish_reason=message.finish_reason,
        error_reason=message.error_reason,
        usage=usage(message.usage),
        cost_nanousd=message.cost_nanousd,
        cache=cache_verdict(message.cache),
        estimated=message.estimated,
        created_at=message.created_at.ToDatetime(UTC),
        first_token_ms=message.first_token_ms,
        duration_ms=message.duration_ms,
        steps=tuple(step(item) for item in message.steps),
    )


def usage_row(message: ledger.QueryUsageResponse) -> UsageRow:
    return UsageRow(
        group=dict(message.group),
        operations=message.operations,
        failed=message.failed,
        cancelled=message.cancelled,
        estimated=message.estimated,
        cache_hits=message.cache_hits,
        coalesced=message.coalesced,
        attempts=message.attempts,
        usage=usage(message.usage),
        cost_nanousd=message.cost_nanousd,
        saved_nanousd=message.saved_nanousd,
        prompt_cache_saved_nanousd=message.prompt_cache_saved_nanousd,
        tiering_saved_nanousd=message.tiering_saved_nanousd,
        duration_ms_p50=message.duration_ms_p50,
        duration_ms_p90=message.duration_ms_p90,
        duration_ms_p99=message.duration_ms_p99,
        first_token_ms_p50=message.first_token_ms_p50,
        first_token_ms_p90=message.first_token_ms_p90,
        first_token_ms_p99=message.first_token_ms_p99,
    )
