"""The servicer: validate, call the domain, translate. No decision of retrieval's own is made here.

Streaming handlers are coroutines that write, so that spans and cancellation behave; the generated types know only iterators.
"""

import asyncio
import base64
import binascii
import math
import struct
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import grpc
from google.protobuf import struct_pb2, timestamp_pb2

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Server
from services.chassis.wire import timestamp, usage_message, usage_value
from services.retrieval.access import access_of, collection_name, reach_of, tenant_of, viewer_of
from services.retrieval.domain import (
    DEFAULT_COLLECTION,
    Access,
    CachedAnswer,
    Document,
    Fact,
    Passage,
    Progress,
    SearchMode,
    StoredChunk,
    Upload,
    Viewer,
)
from services.retrieval.facts import Condition
from services.retrieval.ingest import DOCUMENTS_PER_JOB_MAX, Ingestion
from services.retrieval.intake import Begin, take_in
from services.retrieval.jobs import JobState, Owner
from services.retrieval.recall import Judged, Memory, Part, Question, Started, recall
from services.retrieval.search import Hit
from tailrace.common.v1 import common_pb2
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as pb_grpc

TEXT_BYTES_MAX = 32 * 1024
PASSAGES_MAX = 32
HITS_MAX = 100
HITS_DEFAULT = 10
NEIGHBOURS_MAX = 5
BATCH_BYTES_MAX = 1024 * 1024
"""Of hits in one message, for readers that take several."""
DOCUMENT_FILTER_MAX = 100
MORE_COLLECTIONS_MAX = 15
CONDITIONS_MAX = 16
CONDITION_VALUES_MAX = 64
MOMENT_SECONDS = (-62_135_596_800, 253_402_300_799)
"""The years 1 to 9999, which is what a timestamp may say."""
TEXTS_MAX = 256
PAGE_MAX = 1000
PAGE_DEFAULT = 100
ANSWER_BYTES_MAX = 1024 * 1024
CONTENT_MESSAGE_BYTES_MAX = 1024 * 1024
METADATA_PAIRS_MAX = 32
METADATA_CHARACTERS_MAX = 256
READERS_MAX = 64
CHUNKS_MAX = 1000
CHUNKS_BYTES_MAX = 2 * 1024 * 1024
"""Bytes of chunk texts in one reply, well below the size of a message."""

JOB_BYTES_MAX = 8 * 1024 * 1024
"""Bytes of documents' progress in one reply: of ten thousand with ordinary names all, of those with the longest some."""

_MODES = {
    pb.SEARCH_MODE_UNSPECIFIED: SearchMode.HYBRID,
    pb.SEARCH_MODE_HYBRID: SearchMode.HYBRID,
    pb.SEARCH_MODE_DENSE: SearchMode.DENSE,
    pb.SEARCH_MODE_SPARSE: SearchMode.SPARSE,
}


def offer(server: Server, memory: Memory, ingestion: Ingestion) -> None:
    """Add RetrievalService to `server`."""
    name = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
    server.add(pb_grpc.add_RetrievalServiceServicer_to_server, RetrievalServicer(memory, ingestion), name)


class RetrievalServicer(pb_grpc.RetrievalServiceServicer):
    """RetrievalService over one memory and one ingestion."""

    def __init__(self, memory: Memory, ingestion: Ingestion) -> None:
        self._memory = memory
        self._ingestion = ingestion

    async def Recall(self, request: pb.RecallRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        question = Question(
            text=_text(request.question, "question"),
            reach=reach_of(current_principal(), request.collection),
            cache_scope=_bounded(request.cache_scope, "cache_scope", 1 if request.want_cached else 0, 128),
            want_cached=request.want_cached,
            passages_max=_within(request.passages_max, "passages_max", 0, PASSAGES_MAX),
            held_epoch=request.held_epoch if request.HasField("held_epoch") else None,
            held_audience=_bounded(request.held_audience, "held_audience", 0, 64),
        )

        async def emit(part: Part) -> None:
            await context.write(_recall_message(part))

        await recall(question, self._memory, emit)

    async def Search(self, request: pb.SearchRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        query = _text(request.query, "query")
        limit = _within(request.limit, "limit", 0, HITS_MAX) or HITS_DEFAULT
        if request.mode not in _MODES:
            raise RequestInvalid("there is no such search mode", field="mode")
        if len(request.document_ids) > DOCUMENT_FILTER_MAX:
            raise RequestInvalid("too many documents to search in", field="document_ids", bound=f"at most {DOCUMENT_FILTER_MAX}")
        if len(request.more_collections) > MORE_COLLECTIONS_MAX:
            raise RequestInvalid("too many collections", field="more_collections", bound=f"at most {MORE_COLLECTIONS_MAX}")
        reach, mode = reach_of(current_principal(), request.collection, request.more_collections), _MODES[request.mode]
        facts = _conditions(request.metadata)
        around = _within(request.neighbours, "neighbours", 0, NEIGHBOURS_MAX)
        encodings, searcher = self._memory.encodings, self._memory.searcher
        encoding = await searcher.encoding(reach)
        language = encodings.words(encoding).language(query) if request.explain else ""
        hits = await searcher.asked(
            reach, query, limit=limit, mode=mode, encoding=encoding, document_ids=tuple(request.document_ids), facts=facts
        )
        ready, size = list[pb.SearchResponse](), 0
        for hit in hits:
            before, after = await searcher.neighbours(hit, around) if around else ([], [])
            row = pb.SearchResponse(
                hit=_passage_message(hit.passage),
                explanation=_explanation_message(hit, encoding.embedder_id, language) if request.explain else None,
                before=[_chunk_message(stored) for stored in before],
                after=[_chunk_message(stored) for stored in after],
            )
            size += row.ByteSize()
            if ready and (not request.batches or size > BATCH_BYTES_MAX):
                await context.write(_together(ready))
                ready, size = [], row.ByteSize()
            ready.append(row)
        if ready:
            await context.write(_together(ready))

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> pb.EmbedResponse:
        if not 1 <= len(request.texts) <= TEXTS_MAX:
            raise RequestInvalid("the number of texts is out of bounds", field="texts", bound=f"1-{TEXTS_MAX}")
        texts = [_text(text, f"texts[{place}]") for place, text in enumerate(request.texts)]
        embedded = await self._memory.embedder.embed_texts(texts)
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=row) for row in embedded.vectors],
            embedder_id=self._memory.embedder.embedder_id,
            tokens=embedded.tokens,
        )

    async def IngestDocuments(  # type: ignore[override]
        self, requests: AsyncIterator[pb.IngestDocumentsRequest], context: grpc.aio.ServicerContext
    ) -> None:
        writing = asyncio.Lock()  # a call takes one write at a time, and both progress and the receiving end write

        async def emit(job_id: str, event: Progress) -> None:
            async with writing:
                await context.write(_progress_message(job_id, event))

        principal = current_principal()
        owner = Owner(tenant_of(principal), principal.user, principal.api_key_id)
        await take_in(self._ingestion, owner, _parts(requests, viewer_of(principal)), lambda job, event: emit(job.job_id, event))

    async def GetIngestionJob(self, request: pb.GetIngestionJobRequest, context: grpc.aio.ServicerContext) -> pb.GetIngestionJobResponse:
        job = await self._ingestion.job(_reader(current_principal()), request.job_id)
        first = _within(request.first_document, "first_document", 0, 2**31 - 1)
        rows = [_progress_message(job.job_id, row) for row in await self._ingestion.store.latest(job.job_id) if row.index >= first]
        fitting = _rows_that_fit(rows)
        return pb.GetIngestionJobResponse(
            job_id=job.job_id,
            status=job.status,
            documents=fitting,
            created_at=_moment_message(job.created_us),
            summary=_summary_message(job),
            next_document=rows[len(fitting)].index if len(fitting) < len(rows) else 0,
        )

    async def WatchIngestionJob(self, request: pb.WatchIngestionJobRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        job = await self._ingestion.job(_reader(current_principal()), request.job_id)
        async for event in self._ingestion.store.events(job.job_id):
            await context.write(_progress_message(job.job_id, event))

    async def ListIngestionJobs(self, request: pb.ListIngestionJobsRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        size = _within(request.page_size, "page_size", 0, PAGE_MAX) or PAGE_DEFAULT
        before_us = _place(request.page_token) if request.page_token else None
        reader = _reader(current_principal())
        # One more than wanted tells whether there are more.
        jobs = await self._ingestion.store.page(reader.tenant, reader.user, size + 1, before_us)
        for place, job in enumerate(jobs[:size], 1):
            row = pb.ListIngestionJobsResponse(
                job_id=job.job_id,
                status=job.status,
                created_at=_moment_message(job.created_us),
                summary=_summary_message(job),
                next_page_token=_token(job.created_us) if place == size < len(jobs) else "",
            )
            await context.write(row)

    async def CancelIngestionJob(
        self, request: pb.CancelIngestionJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelIngestionJobResponse:
        cancelled = await self._ingestion.cancel(_reader(current_principal()), request.job_id, _index(request))
        return pb.CancelIngestionJobResponse(cancelled=cancelled)

    async def RetryIngestionJob(
        self, request: pb.RetryIngestionJobRequest, context: grpc.aio.ServicerContext
    ) -> pb.RetryIngestionJobResponse:
        retried = await self._ingestion.retry(_reader(current_principal()), request.job_id, _index(request))
        return pb.RetryIngestionJobResponse(retried=retried)

    async def ListCollections(self, request: pb.ListCollectionsRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        principal, encodings, registry = current_principal(), self._memory.encodings, self._memory.registry
        for collection in await registry.collections(tenant_of(principal)):
            reach = reach_of(principal, collection)
            documents = await registry.count(reach)
            standing = await encodings.standing(reach.tenant, collection)
            moving = bool(standing.next)
            row = pb.ListCollectionsResponse(
                collection=collection,
                documents=documents,
                epoch=(await registry.epoch(reach.tenant, collection)).number,
                embedder_id=(await encodings.encoding(standing.encoding)).embedder_id,
                next_embedder_id=(await encodings.encoding(standing.next)).embedder_id if moving else "",
                reembedded=await encodings.progress(reach.tenant, collection) if moving else 0,
            )
            await context.write(row)

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        size = _within(request.page_size, "page_size", 0, PAGE_MAX) or PAGE_DEFAULT
        before_us = _place(request.page_token) if request.page_token else None
        # One more than wanted tells whether there are more.
        viewer = viewer_of(current_principal())
        documents = await self._memory.registry.page(viewer, collection_name(request.collection), size + 1, before_us)
        embedders = {name: await self._embedder_of(viewer, name) for name in {document.collection for document in documents}}
        for place, document in enumerate(documents[:size], 1):
            last = place == size < len(documents)
            row = pb.ListDocumentsResponse(
                document=_document_message(document, viewer, embedders[document.collection]),
                next_page_token=_page_token(document) if last else "",
            )
            await context.write(row)

    async def _embedder_of(self, viewer: Viewer, collection: str) -> str:
        return (await self._memory.encodings.answering(viewer.tenant, collection)).embedder_id

    async def GetDocument(self, request: pb.GetDocumentRequest, context: grpc.aio.ServicerContext) -> pb.GetDocumentResponse:
        registry = self._memory.registry
        viewer = viewer_of(current_principal())
        document = await registry.document(viewer, _document_id(request.document_id))
        first = _within(request.first_chunk, "first_chunk", 0, 2**31 - 1)
        limit = _within(request.chunks_max, "chunks_max", 0, CHUNKS_MAX) or CHUNKS_MAX
        chunks = _as_many_as_fit(await registry.chunks(document, first, limit))
        following = first + len(chunks)
        return pb.GetDocumentResponse(
            document=_document_message(document, viewer, await self._embedder_of(viewer, document.collection)),
            chunks=[_chunk_message(chunk) for chunk in chunks],
            next_chunk=following if chunks and following < document.chunks else 0,
        )

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: grpc.aio.ServicerContext) -> pb.DeleteDocumentResponse:
        deleted = await self._ingestion.delete(viewer_of(current_principal()), _document_id(request.document_id))
        return pb.DeleteDocumentResponse(chunks_deleted=deleted.chunks)

    async def RememberAnswer(self, request: pb.RememberAnswerRequest, context: grpc.aio.ServicerContext) -> pb.RememberAnswerResponse:
        principal = current_principal()
        reach, scope = reach_of(principal, request.collection), _bounded(request.cache_scope, "cache_scope", 1, 128)
        answer = _answer_value(request.answer, principal)
        # An answer that slips in while the epoch moves on is written under its old epoch, where nobody looks.
        state = await self._memory.registry.epoch(reach.tenant, reach.collection)
        audience = reach.viewer.audience(limited=state.limited)
        if state.number != request.collection_epoch:
            return pb.RememberAnswerResponse(remembered=False, reason="epoch_changed")
        if audience != request.audience:
            return pb.RememberAnswerResponse(remembered=False, reason="audience_changed")
        if any(passage.flags for passage in answer.passages):
            return pb.RememberAnswerResponse(remembered=False, reason="flagged")
        if not await self._memory.answers.remember(reach, (scope, audience), request.collection_epoch, answer):
            return pb.RememberAnswerResponse(remembered=False, reason="embedder_unavailable")
        return pb.RememberAnswerResponse(remembered=True)

    async def ForgetAnswers(self, request: pb.ForgetAnswersRequest, context: grpc.aio.ServicerContext) -> pb.ForgetAnswersResponse:
        principal = current_principal()
        # Who is no more than a user forgets only what was answered to that user.
        user = "" if principal.roles & {"admin", "service"} else principal.user
        forgotten = await self._memory.answers.forget(
            tenant_of(principal),
            collection=collection_name(request.collection),
            answer_id=_bounded(request.answer_id, "answer_id", 0, 128),
            user=user,
        )
        return pb.ForgetAnswersResponse(forgotten=forgotten)


async def _parts(requests: AsyncIterator[pb.IngestDocumentsRequest], viewer: Viewer) -> AsyncIterator[Begin | bytes]:
    """The stream's messages, checked."""
    async for request in requests:
        part = request.WhichOneof("part")
        if part == "header":
            yield Begin(_upload(request.header, viewer), request.header.detach)
        elif part == "content":
            if len(request.content) > CONTENT_MESSAGE_BYTES_MAX:
                raise RequestInvalid("a piece of content is too large", field="content", bound=f"at most {CONTENT_MESSAGE_BYTES_MAX} bytes")
            yield request.content
        else:
            raise RequestInvalid("a message holds neither a header nor content", field="part")


def _upload(header: pb.DocumentHeader, uploader: Viewer) -> Upload:
    if len(header.metadata) > METADATA_PAIRS_MAX:
        raise RequestInvalid("too much metadata", field="header.metadata", bound=f"at most {METADATA_PAIRS_MAX} pairs")
    for key in header.metadata:
        _bounded(key, "header.metadata", 1, METADATA_CHARACTERS_MAX)
    return Upload(
        b"",
        title=_bounded(header.title, "header.title", 0, 512).strip(),
        source_uri=_bounded(header.source_uri, "header.source_uri", 0, 1024).strip(),
        collection=collection_name(header.collection) or DEFAULT_COLLECTION,
        media_type=_bounded(header.media_type, "header.media_type", 0, 256),
        metadata={key: _fact(value, f"header.metadata.{key}") for key, value in header.metadata.items()},
        uploader=uploader,
        access=_access(header.access) if header.HasField("access") else None,
    )


def _access(message: pb.Access) -> Access:
    for field, names in (("users", message.users), ("groups", message.groups)):
        if len(names) > READERS_MAX:
            raise RequestInvalid("too many names", field=f"header.access.{field}", bound=f"at most {READERS_MAX}")
        for name in names:
            _bounded(name, f"header.access.{field}", 1, 256 if field == "users" else 128)
    return Access(tuple(message.users), tuple(message.groups))


def _fact(value: struct_pb2.Value, field: str) -> Fact:
    """A string, a finite number or a boolean."""
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return _bounded(value.string_value, field, 0, METADATA_CHARACTERS_MAX)
    if kind == "bool_value":
        return value.bool_value
    if kind == "number_value" and math.isfinite(value.number_value):
        return value.number_value
    raise RequestInvalid("metadata is strings, finite numbers and booleans", field=field, bound="string, number, boolean")


def _conditions(messages: Sequence[pb.MetadataCondition]) -> tuple[Condition, ...]:
    """Raises RequestInvalid, which names the condition by its place."""
    if len(messages) > CONDITIONS_MAX:
        raise RequestInvalid("too many conditions on metadata", field="metadata", bound=f"at most {CONDITIONS_MAX}")
    return tuple(_condition(message, f"metadata[{place}]") for place, message in enumerate(messages))


def _condition(message: pb.MetadataCondition, field: str) -> Condition:
    if len(message.any_of) > CONDITION_VALUES_MAX:
        raise RequestInvalid("too many values", field=f"{field}.any_of", bound=f"at most {CONDITION_VALUES_MAX}")
    for name in ("at_least", "below"):
        if message.HasField(name) and not math.isfinite(getattr(message, name)):
            raise RequestInvalid("the number is not finite", field=f"{field}.{name}", bound="a finite number")
    return Condition(
        key=_bounded(message.key, f"{field}.key", 1, METADATA_CHARACTERS_MAX),
        any_of=tuple(_fact(value, f"{field}.any_of[{place}]") for place, value in enumerate(message.any_of)),
        at_least=message.at_least if message.HasField("at_least") else None,
        below=message.below if message.HasField("below") else None,
        from_us=_moment_us(getattr(message, "from"), f"{field}.from") if message.HasField("from") else None,
        until_us=_moment_us(message.until, f"{field}.until") if message.HasField("until") else None,
        negated=message.negated,
    )


def _moment_us(message: timestamp_pb2.Timestamp, field: str) -> int:
    """Rounded up: what is kept has whole microseconds, so that a bound between two of them means the later one."""
    least, most = MOMENT_SECONDS
    if not least <= message.seconds <= most or not 0 <= message.nanos < 1_000_000_000:
        raise RequestInvalid("the moment cannot be", field=field, bound="years 1 to 9999")
    return message.seconds * 1_000_000 + -(-message.nanos // 1000)


def _value(fact: Fact) -> struct_pb2.Value:
    if isinstance(fact, bool):
        return struct_pb2.Value(bool_value=fact)
    return struct_pb2.Value(string_value=fact) if isinstance(fact, str) else struct_pb2.Value(number_value=fact)


def _text(text: str, field: str) -> str:
    if not 1 <= len(text.encode()) <= TEXT_BYTES_MAX:
        raise RequestInvalid("the text is empty or too long", field=field, bound=f"1-{TEXT_BYTES_MAX} bytes")
    if not text.strip():
        raise RequestInvalid("the text holds nothing but spaces", field=field, bound=f"1-{TEXT_BYTES_MAX} bytes")
    return text


def _bounded(text: str, field: str, least: int, most: int) -> str:
    if not least <= len(text) <= most:
        raise RequestInvalid("the text is too short or too long", field=field, bound=f"{least}-{most} characters")
    return text


def _within(number: int, field: str, least: int, most: int) -> int:
    if not least <= number <= most:
        raise RequestInvalid("the number is out of bounds", field=field, bound=f"{least}-{most}")
    return number


def _document_id(text: str) -> str:
    # Foreign, unknown and malformed ids look the same; only the length is worth a word of its own.
    return _bounded(text, "document_id", 1, 128)


def _page_token(document: Document) -> str:
    return _token(document.indexed_us)


def _token(moment_us: int) -> str:
    return base64.urlsafe_b64encode(struct.pack(">q", moment_us)).decode().rstrip("=")


def _place(token: str) -> int:
    """Where a page goes on. Raises RequestInvalid for a token that is not ours."""
    try:
        (indexed_us,) = struct.unpack(">q", base64.b64decode(token + "=", altchars=b"-_", validate=True))
    except (binascii.Error, struct.error, ValueError):
        raise RequestInvalid("the page token is not one of ours", field="page_token") from None
    return int(indexed_us)


def _as_many_as_fit(chunks: Sequence[StoredChunk]) -> list[StoredChunk]:
    fitting: list[StoredChunk] = []
    size = 0
    for chunk in chunks:
        size += len(chunk.chunk.text.encode())
        if fitting and size > CHUNKS_BYTES_MAX:
            break
        fitting.append(chunk)
    return fitting


def _rows_that_fit(rows: Sequence[pb.IngestDocumentsResponse]) -> Sequence[pb.IngestDocumentsResponse]:
    size = 0
    for place, row in enumerate(rows):
        size += row.ByteSize() + 8
        if place and size > JOB_BYTES_MAX:
            return rows[:place]
    return rows


def _answer_value(message: pb.CachedAnswer, principal: Principal) -> CachedAnswer:
    if not 1 <= len(message.text.encode()) <= ANSWER_BYTES_MAX:
        raise RequestInvalid("the answer is empty or too long", field="answer.text", bound=f"1-{ANSWER_BYTES_MAX} bytes")
    if len(message.passages) > PASSAGES_MAX:
        raise RequestInvalid("too many passages", field="answer.passages", bound=f"at most {PASSAGES_MAX}")
    if message.cost_nanousd < 0:
        raise RequestInvalid("a cost cannot be negative", field="answer.cost_nanousd", bound=">= 0")
    try:
        usage = usage_value(message.usage)
    except ValueError:
        raise RequestInvalid("the token counts cannot be", field="answer.usage") from None
    return CachedAnswer(
        answer_id=_bounded(message.answer_id, "answer.answer_id", 1, 128),
        question=_text(message.question, "answer.question"),
        # Only another service may say that somebody else had asked.
        user=message.user if "service" in principal.roles else principal.user,
        text=message.text,
        passages=tuple(_passage_value(passage) for passage in message.passages),
        model=_bounded(message.model, "answer.model", 0, 256),
        provider=_bounded(message.provider, "answer.provider", 0, 256),
        cost_nanousd=message.cost_nanousd,
        created_at=message.created_at.ToDatetime(UTC) if message.HasField("created_at") else datetime.now(UTC),
        finish_reason=_bounded(message.finish_reason, "answer.finish_reason", 0, 64),
        usage=usage,
    )


def _recall_message(part: Part) -> pb.RecallResponse:
    if isinstance(part, Started):
        return pb.RecallResponse(started=pb.RecallStarted(collection_epoch=part.epoch, audience=part.audience))
    if isinstance(part, Judged):
        verdict = part.verdict
        return pb.RecallResponse(
            verdict=pb.RecallVerdict(
                answer=_answer_message(verdict.answer) if verdict.answer else None,
                similarity=verdict.similarity,
                reason=verdict.reason,
                embed_ms=part.embed_ms,
                lookup_ms=part.lookup_ms,
            )
        )
    passages = [_passage_message(passage) for passage in part.passages]
    return pb.RecallResponse(passages=pb.RecallPassages(passages=passages, search_ms=part.search_ms))


def _answer_message(answer: CachedAnswer) -> pb.CachedAnswer:
    return pb.CachedAnswer(
        answer_id=answer.answer_id,
        question=answer.question,
        user=answer.user,
        text=answer.text,
        passages=[_passage_message(passage) for passage in answer.passages],
        model=answer.model,
        provider=answer.provider,
        cost_nanousd=answer.cost_nanousd,
        created_at=timestamp(answer.created_at),
        finish_reason=answer.finish_reason,
        usage=usage_message(answer.usage),
    )


def _together(rows: list[pb.SearchResponse]) -> pb.SearchResponse:
    """One message for all: the first, with the others in it."""
    rows[0].more.extend(rows[1:])
    return rows[0]


def _passage_message(passage: Passage) -> common_pb2.CitedPassage:
    return common_pb2.CitedPassage(
        number=passage.number,
        document_id=passage.document_id,
        chunk_id=passage.chunk_id,
        title=passage.title,
        source_uri=passage.source_uri,
        text=passage.text,
        start=passage.start,
        end=passage.end,
        score=passage.score,
        heading_path=passage.heading_path,
        document_version=passage.document_version,
        page=passage.page,
        flags=passage.flags,
        similarity=passage.similarity,
    )


def _explanation_message(hit: Hit, embedder_id: str, language: str) -> pb.HitExplanation:
    return pb.HitExplanation(
        dense_rank=hit.fused.dense_rank,
        dense_score=hit.fused.dense_score,
        sparse_rank=hit.fused.sparse_rank,
        sparse_score=hit.fused.sparse_score,
        dense_weight=hit.dense_weight,
        fused_score=hit.passage.score,
        rerank_score=hit.rerank_score,
        language=language,
        embedder_id=embedder_id,
    )


def _passage_value(message: common_pb2.CitedPassage) -> Passage:
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
        document_version=message.document_version,
        page=message.page,
        flags=tuple(message.flags),
        similarity=message.similarity if message.HasField("similarity") else None,
    )


def _reader(principal: Principal) -> Owner:
    """Whose jobs the caller may see: its own, or as admin or service all of the tenant's."""
    return Owner(tenant_of(principal), "" if principal.roles & {"admin", "service"} else principal.user)


def _index(request: pb.CancelIngestionJobRequest | pb.RetryIngestionJobRequest) -> int | None:
    return _within(request.index, "index", 0, DOCUMENTS_PER_JOB_MAX - 1) if request.HasField("index") else None


def _moment_message(microseconds: int) -> timestamp_pb2.Timestamp:
    return timestamp(datetime.fromtimestamp(microseconds / 1_000_000, UTC))


def _summary_message(job: JobState) -> pb.IngestionSummary:
    return pb.IngestionSummary(
        documents=job.documents, stages=job.stages, bytes=job.bytes, chunks_total=job.chunks_total, chunks_done=job.chunks_done
    )


def _progress_message(job_id: str, progress: Progress) -> pb.IngestDocumentsResponse:
    return pb.IngestDocumentsResponse(
        job_id=job_id,
        index=progress.index,
        name=progress.name,
        document_id=progress.document_id,
        stage=progress.stage.value,
        bytes=progress.bytes,
        chunks_total=progress.chunks_total,
        chunks_done=progress.chunks_done,
        version=progress.version,
        error_reason=progress.error_reason,
        error_detail=progress.error_detail,
        attempt=progress.attempt,
        unread_pages=progress.unread_pages,
    )


def _document_message(document: Document, viewer: Viewer, embedder_id: str) -> pb.Document:
    # The names of the others are their uploader's and the admins' business; who reads as a member of a group learns of no other.
    shown = access_of(document.readers if viewer.readers is None else [name for name in document.readers if name in viewer.readers])
    return pb.Document(
        document_id=document.document_id,
        title=document.title,
        source_uri=document.source_uri,
        collection=document.collection,
        media_type=document.media_type,
        version=document.version,
        content_sha256=document.content_sha256,
        bytes=document.bytes,
        characters=document.characters,
        chunks=document.chunks,
        indexed_at=timestamp(datetime.fromtimestamp(document.indexed_us / 1_000_000, UTC)),
        metadata={key: _value(fact) for key, fact in document.metadata.items()},
        pages=document.pages,
        embedder_id=embedder_id,
        access=pb.Access(users=shown.users, groups=shown.groups) if document.readers else None,
        language=document.language,
        unread_pages=document.unread_pages,
    )


def _chunk_message(stored: StoredChunk) -> pb.Chunk:
    chunk = stored.chunk
    return pb.Chunk(
        chunk_id=stored.chunk_id,
        ordinal=chunk.ordinal,
        text=chunk.text,
        start=chunk.start,
        end=chunk.end,
        heading_path=chunk.heading_path,
        page=chunk.page,
        flags=chunk.flags,
    )
