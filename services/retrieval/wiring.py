"""The composition root: everything the retrieval service owns, acquired downwards and released in reverse. No logic of its own."""

import contextlib
import functools
import importlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import redis.asyncio as redis

from services.chassis.afterwork import AfterWork
from services.chassis.channel import Caller, open_channel
from services.chassis.clock import Clock, SystemClock
from services.chassis.config import SettingsError
from services.chassis.lifecycle import Probe, Service
from services.chassis.passport import Passport
from services.chassis.redis_pool import PatientPool
from services.chassis.server import Server, passport_identity
from services.retrieval.answer_cache import AnswerCache
from services.retrieval.clients import LedgerBooks
from services.retrieval.config import Settings
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_rebuilding import Rebuilding
from services.retrieval.edge_store import EdgeStore
from services.retrieval.embedders import opened, payable
from services.retrieval.encoding_spaces import Encodings, encoding_id
from services.retrieval.ingest import Buffer, Ingestion, Pipeline
from services.retrieval.paid_embedder import PaidEmbedder
from services.retrieval.parsing import Limits, ParserPool
from services.retrieval.ports import Embedder, EmbeddingBooks, Fusion, Ocr, VectorStore
from services.retrieval.recall import Memory
from services.retrieval.redis_jobs import RedisJobs
from services.retrieval.reencoding import Reencoding
from services.retrieval.registry import Registry, alone
from services.retrieval.remote_reranker import RemoteReranker
from services.retrieval.rpc import offer
from services.retrieval.search import Reranking, Searcher
from services.retrieval.upkeep import Upkeep

JOB_CONNECTIONS_MAX = 32


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Service]:
    """Open store and embedder, start upkeep, offer the RPCs."""
    # Chunking is Python in a thread: with the usual 5 ms between switches a question would wait that long several times.
    sys.setswitchinterval(0.001)
    clock, afterwork = SystemClock(), AfterWork()
    async with contextlib.AsyncExitStack() as stack:
        passport = Passport(settings.internal_key.get_secret_value().encode())
        channel = await stack.enter_async_context(open_channel(settings.ledger_target, settings.mutual_tls()))
        books = LedgerBooks(channel, Caller("ledger", passport))
        open_embedder = functools.partial(_opened, settings, books, clock, afterwork)
        embedder = await stack.enter_async_context(open_embedder(settings.embedder_name))
        sparse, sketching = EdgeBm25(settings.language), settings.late_candidates > 0
        store, prepare, flush = await stack.enter_async_context(
            _store(settings, embedder.dimension, encoding_id(embedder, sparse, sketching=sketching))
        )
        encodings = Encodings(
            store,
            embedder,
            settings.embedder_name,
            sparse,
            open_embedder,
            lambda id_: EdgeBm25.like(id_, sparse),
            clock,
            sketching=sketching,
        )
        stack.push_async_callback(encodings.close)
        jobs = await stack.enter_async_context(_jobs(settings))
        exclusive = not settings.qdrant_url
        registry = Registry(store, clock, encodings, alone if exclusive else jobs.turn)
        answers = AnswerCache(store, encodings, clock, similarity_min=settings.cache_similarity_min, ttl_s=settings.cache_ttl_s)

        async def first_contact() -> None:
            await prepare()
            await encodings.begin()

        upkeep = Upkeep(store, registry, clock, prepare=first_contact, flush=flush, exclusive=exclusive, expire=answers.expire)
        await stack.enter_async_context(upkeep.running())
        reencoding = Reencoding(store, registry, encodings, clock, str(uuid.uuid4()), exclusive=exclusive)
        await stack.enter_async_context(reencoding.running())
        weights = (settings.fusion_weight_dense, settings.fusion_weight_sparse)
        reranking = await stack.enter_async_context(_reranking(settings))
        fusion = Fusion(settings.fusion, settings.fusion_prefetch, weights=weights)
        searcher = Searcher(store, registry, encodings, fusion, clock, reranking, late_candidates=settings.late_candidates)
        parsers = await stack.enter_async_context(ParserPool(_parser_limits(settings), ocr_named(settings.ocr)).running())
        ingestion = Ingestion(
            Pipeline(embedder, sparse, registry, parsers.parse),
            jobs,
            afterwork,
            lambda: str(uuid.uuid4()),
            workers=settings.ingest_workers,
            lease_s=settings.ingest_lease_s,
            buffer=Buffer(settings.ingest_buffer_mib * 1024 * 1024),
        )
        await stack.enter_async_context(ingestion.running())
        server = Server(passport_identity(passport), reflect=settings.environment == "development", tls=settings.mutual_tls())
        offer(server, Memory(embedder, encodings, registry, answers, searcher), ingestion)
        probes: dict[str, Probe] = {"qdrant": upkeep.check, "redis": jobs.check}
        yield Service(server, settings.port, probes=probes, drain=ingestion.drain, stopping=ingestion.stop)


def ocr_named(name: str) -> Ocr | None:
    """The adapter that the settings name. Raises SettingsError if there is none of that name."""
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        made: Ocr = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"TAILRACE_RETRIEVAL_OCR: {name} cannot be had: {error}") from None
    return made


@contextlib.asynccontextmanager
async def _reranking(settings: Settings) -> AsyncIterator[Reranking | None]:
    if not settings.reranker_url:
        yield None
        return
    keys = [key.strip() for key in settings.reranker_key.get_secret_value().split(",") if key.strip()]
    reranker = RemoteReranker(settings.reranker_url, settings.reranker_model, keys, settings.reranker_format, settings.reranker_timeout_s)
    try:
        yield Reranking(reranker, settings.reranker_candidates)
    finally:
        await reranker.close()


@contextlib.asynccontextmanager
async def _jobs(settings: Settings) -> AsyncIterator[RedisJobs]:
    """The store of jobs, with connections of its own for those who wait."""

    def pool(connections_max: int, timeout_s: float | None) -> PatientPool:
        return PatientPool.from_url(
            settings.redis_url.get_secret_value(),
            max_connections=connections_max,
            timeout=settings.ingest_timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=settings.ingest_timeout_s,
            retry=None,
        )

    asking = redis.Redis.from_pool(pool(JOB_CONNECTIONS_MAX, settings.ingest_timeout_s))
    waiting = redis.Redis.from_pool(pool(settings.ingest_watchers_max, None))
    async with asking, waiting:
        yield RedisJobs(
            asking,
            waiting,
            str(uuid.uuid4()),
            jobs_max=settings.ingest_jobs_max,
            bytes_max=settings.ingest_store_mib * 1024 * 1024,
            lease_s=settings.ingest_lease_s,
            kept_s=settings.ingest_kept_s,
            timeout_s=settings.ingest_timeout_s,
        )


@contextlib.asynccontextmanager
async def _opened(
    settings: Settings, books: EmbeddingBooks, clock: Clock, afterwork: AfterWork, name: str, dimension: int = 0
) -> AsyncIterator[Embedder]:
    """The embedder called `name`, paid for if it is to be. With a `dimension` it is one that the settings named once: the length of vectors
    that they name now is another's."""
    if dimension:
        settings = settings.model_copy(update={"embedder_dimensions": dimension})
    async with opened(name, settings) as embedder:
        if (tariff := payable(name, settings)) is None:
            yield embedder
            return
        prefix_bytes = max(len(text.encode()) for text in (settings.embedder_question_prefix, settings.embedder_document_prefix))
        batch_max, new_id = settings.embedder_batch, lambda: str(uuid.uuid4())
        yield PaidEmbedder(embedder, books, *tariff, clock, new_id, afterwork, batch_max=batch_max, prefix_bytes=prefix_bytes)


def _parser_limits(settings: Settings) -> Limits:
    return Limits(settings.parse_workers, settings.parse_timeout_s, settings.parse_memory_mib, ocr_timeout_s=settings.ocr_timeout_s)


Opened = tuple[VectorStore, Callable[[], Awaitable[None]], Callable[[], None]]


@contextlib.asynccontextmanager
async def _store(settings: Settings, dimension: int, fingerprint: str) -> AsyncIterator[Opened]:
    """The store the settings name, how to prepare it, and how to flush it."""
    if not settings.qdrant_url:
        edge_store = EdgeStore.open(settings.qdrant_folder, dimension)
        try:
            async with Rebuilding(edge_store).running():
                yield edge_store, _nothing, edge_store.flush
        finally:
            edge_store.close()
        return
    # Not needed otherwise, and 40 MB.
    from qdrant_client import AsyncQdrantClient

    from services.retrieval.qdrant_layout import Layout
    from services.retrieval.qdrant_store import QdrantStore

    client = AsyncQdrantClient(
        url=settings.qdrant_url,
        grpc_port=settings.qdrant_grpc_port,
        prefer_grpc=True,
        api_key=settings.qdrant_api_key.get_secret_value() or None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,
    )
    layout = Layout(
        settings.qdrant_shards,
        settings.qdrant_replicas,
        settings.qdrant_write_replicas,
        settings.qdrant_quantization,
        settings.qdrant_vectors_memory,
        settings.qdrant_payload_on_disk,
        settings.qdrant_hnsw_m,
        settings.qdrant_hnsw_payload_m,
        settings.qdrant_write_ordering,
        settings.qdrant_read_consistency,
    )
    server_store = QdrantStore(client, dimension, fingerprint, layout=layout)
    try:
        yield server_store, server_store.prepare, lambda: None
    finally:
        await server_store.close()


async def _nothing() -> None:
    """Edge is ready when it is open."""
