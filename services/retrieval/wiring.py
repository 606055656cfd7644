"""The composition root: everything the retrieval service owns, acquired downwards and released in reverse. No logic of its own."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

from services.chassis.afterwork import AfterWork
from services.chassis.clock import SystemClock
from services.chassis.lifecycle import Service
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
from services.retrieval.registry import Registry
from services.retrieval.rpc import offer
from services.retrieval.search import Searcher
from services.retrieval.upkeep import Upkeep


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
        registry = Registry(store, clock)
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
        searcher = Searcher(store, registry, sparse, embedder, Fusion(settings.fusion, settings.fusion_prefetch, weights=weights))
        ingestion = Ingestion(
            Pipeline(embedder, sparse, registry),
            afterwork,
            clock,
            lambda: str(uuid.uuid4()),
            jobs_max=settings.ingest_jobs_max,
            buffer=Buffer(settings.ingest_buffer_mib * 1024 * 1024),
        )
        passport = Passport(settings.internal_key.get_secret_value().encode())
        server = Server(passport_identity(passport), reflect=settings.environment == "development", tls=settings.mutual_tls())
        offer(server, Memory(embedder, registry, answers, searcher), ingestion)
        yield Service(server, settings.port, probes={"qdrant": upkeep.check}, drain=afterwork.drain)


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
