"""The composition root: everything the retrieval service owns, acquired downwards and released in reverse. No logic of its own."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import redis.asyncio as redis

from services.chassis.afterwork import AfterWork
from services.chassis.clock import SystemClock
from services.chassis.lifecycle import Probe, Service
from services.chassis.passport import Passport
from services.chassis.server import Server, passport_identity
from services.retrieval.answer_cache import AnswerCache
from services.retrieval.config import Settings
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore
from services.retrieval.fingerprint import settle
from services.retrieval.ingest import Buffer, Ingestion, Pipeline
from services.retrieval.minilm_embedder import MiniLmEmbedder
from services.retrieval.ports import Fusion, VectorStore
from services.retrieval.recall import Memory
from services.retrieval.redis_jobs import RedisJobs
from services.retrieval.registry import Registry
from services.retrieval.rpc import offer
from services.retrieval.search import Searcher
from services.retrieval.upkeep import Upkeep

JOB_CONNECTIONS_MAX = 32


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Service]:
    """Open store and embedder, start upkeep, offer the RPCs."""
    # Parsing is Python in a thread: with the usual 5 ms between switches a question would wait that long several times.
    sys.setswitchinterval(0.001)
    clock, afterwork = SystemClock(), AfterWork()
    async with contextlib.AsyncExitStack() as stack:
        embedder = await asyncio.to_thread(MiniLmEmbedder.load, settings.models_folder, settings.embed_quant)
        stack.callback(embedder.close)
        sparse = EdgeBm25(settings.language)
        fingerprint = f"{embedder.embedder_id} {sparse.encoder_id}"
        store, prepare, flush = await stack.enter_async_context(_opened(settings, embedder.dimension, fingerprint))
        jobs = await stack.enter_async_context(_jobs(settings))
        registry = Registry(store, clock, jobs.turn)
        upkeep = Upkeep(
            store,
            registry,
            clock,
            prepare=prepare,
            flush=flush,
            exclusive=not settings.qdrant_url,
            answer_ttl_s=settings.cache_ttl_s,
        )
        await stack.enter_async_context(upkeep.running())
        answers = AnswerCache(store, embedder, clock, similarity_min=settings.cache_similarity_min, ttl_s=settings.cache_ttl_s)
        weights = (settings.fusion_weight_dense, settings.fusion_weight_sparse)
        searcher = Searcher(store, registry, sparse, Fusion(settings.fusion, settings.fusion_prefetch, weights=weights))
        ingestion = Ingestion(
            Pipeline(embedder, sparse, registry),
            jobs,
            afterwork,
            lambda: str(uuid.uuid4()),
            workers=settings.ingest_workers,
            lease_s=settings.ingest_lease_s,
            buffer=Buffer(settings.ingest_buffer_mib * 1024 * 1024),
        )
        await stack.enter_async_context(ingestion.running())
        passport = Passport(settings.internal_key.get_secret_value().encode())
        server = Server(passport_identity(passport), reflect=settings.environment == "development", tls=settings.mutual_tls())
        offer(server, Memory(embedder, registry, answers, searcher), ingestion)
        probes: dict[str, Probe] = {"qdrant": upkeep.check, "redis": jobs.check}
        yield Service(server, settings.port, probes=probes, drain=ingestion.drain, stopping=ingestion.stop)


@contextlib.asynccontextmanager
async def _jobs(settings: Settings) -> AsyncIterator[RedisJobs]:
    """The store of jobs, with connections of its own for those who wait."""

    def pool(connections_max: int, timeout_s: float | None) -> redis.BlockingConnectionPool:
        return redis.BlockingConnectionPool.from_url(
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


Opened = tuple[VectorStore, Callable[[], Awaitable[None]], Callable[[], None]]


@contextlib.asynccontextmanager
async def _opened(settings: Settings, dimension: int, fingerprint: str) -> AsyncIterator[Opened]:
    """The store the settings name, how to prepare it, and how to flush it."""
    if not settings.qdrant_url:
        edge_store = EdgeStore.open(settings.qdrant_folder, dimension)
        try:
            yield edge_store, lambda: settle(edge_store, fingerprint), edge_store.flush
        finally:
            edge_store.close()
        return
    # Not needed otherwise, and 40 MB.
    from qdrant_client import AsyncQdrantClient

    from services.retrieval.qdrant_store import QdrantStore

    client = AsyncQdrantClient(
        url=settings.qdrant_url,
        grpc_port=settings.qdrant_grpc_port,
        prefer_grpc=True,
        api_key=settings.qdrant_api_key.get_secret_value() or None,
        timeout=settings.qdrant_timeout_s,
        check_compatibility=False,
    )
    server_store = QdrantStore(client, dimension, fingerprint)
    try:
        yield server_store, server_store.prepare, lambda: None
    finally:
        await server_store.close()
