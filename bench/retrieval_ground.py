"""What every retrieval scenario stands on: the service as a process of its own on an empty folder and an empty Valkey, and a caller.

No scenario is here.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import Caller, open_channel
from services.chassis.clock import SystemClock
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.local.stores import Valkey, free_port
from services.retrieval.config import Settings
from services.retrieval.domain import Chunk, Document, document_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_rebuilding import Rebuilding
from services.retrieval.edge_store import EdgeStore
from services.retrieval.ports import Vectors
from services.retrieval.registry import Registry
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / ".tailrace" / "models"
"""Converted once, by whoever comes first, and shared by all scenarios."""
QUANT = str(Settings.model_fields["embed_quant"].default)
"""Precision of the embedder that the service has by default."""
WHO = Principal("bench", "bench")
DIMENSION = 384
PIECE = 512 * 1024
START_S, CALL_S, INGEST_S, STOP_S = 90.0, 20.0, 3600.0, 30.0

HYBRID, DENSE, SPARSE = pb.SEARCH_MODE_HYBRID, pb.SEARCH_MODE_DENSE, pb.SEARCH_MODE_SPARSE


@dataclass(frozen=True, slots=True)
class File:
    """One document to send."""

    source_uri: str
    content: bytes
    title: str = ""
    media_type: str = ""


class Service:
    """The running process, as its callers and the machine see it."""

    def __init__(self, port: int, process: psutil.Process, folder: Path) -> None:
        target = f"127.0.0.1:{port}"
        self.channel = open_channel(target)
        self.process = process
        self.folder = folder
        self._stub = pb_grpc.RetrievalServiceStub(self.channel)
        self._caller = Caller(target, Passport(KEY.encode()))

    async def until_serving(self) -> None:
        health = health_pb2_grpc.HealthStub(self.channel)
        async for state in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=START_S):
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                return

    async def search(self, query: str, collection: str, *, limit: int = 10, mode: pb.SearchMode = HYBRID) -> list[pb.SearchResponse]:
        """Hits, best first."""
        request = pb.SearchRequest(query=query, collection=collection, limit=limit, mode=mode, batches=True)
        async with self._caller.stream(self._stub.Search, request, timeout_s=CALL_S, principal=WHO) as messages:
            return [row async for message in messages for row in (message, *message.more)]

    async def timed(self, query: str, collection: str) -> float:
        """Milliseconds of one search with ten hits, from the call to its last hit."""
        began = time.perf_counter()
        hits = await self.search(query, collection)
        took_ms = (time.perf_counter() - began) * 1000
        assert hits, "a search found nothing"
        return took_ms

    async def ingest(
        self, files: Iterable[File], collection: str, seen: Callable[[pb.IngestDocumentsResponse], None] = lambda _: None
    ) -> dict[int, pb.IngestDocumentsResponse]:
        """The last progress of each file, by its place; `seen` hears all of it as it comes."""
        last: dict[int, pb.IngestDocumentsResponse] = {}
        call = self._caller.stream(self._stub.IngestDocuments, _sent(files, collection), timeout_s=INGEST_S, principal=WHO)
        async with call as messages:
            async for message in messages:
                last[message.index] = message
                seen(message)
        return last

    async def documents(self, collection: str) -> list[pb.Document]:
        """All of them."""
        found: list[pb.Document] = []
        token = ""
        while True:
            request = pb.ListDocumentsRequest(collection=collection, page_size=1000, page_token=token)
            async with self._caller.stream(self._stub.ListDocuments, request, timeout_s=CALL_S, principal=WHO) as rows:
                page = [row async for row in rows]
            found += [row.document for row in page]
            if not page or not (token := page[-1].next_page_token):
                return found

    async def chunks(self, id_: str) -> list[pb.Chunk]:
        """A document's first chunks in reading order."""
        request = pb.GetDocumentRequest(document_id=id_)
        reply = await self._caller.unary(self._stub.GetDocument, request, timeout_s=CALL_S, principal=WHO)
        return list(reply.chunks)

    async def summary(self, job_id: str) -> pb.IngestionSummary:
        request = pb.GetIngestionJobRequest(job_id=job_id)
        reply = await self._caller.unary(self._stub.GetIngestionJob, request, timeout_s=CALL_S, principal=WHO)
        return reply.summary

    def rss(self) -> int:
        """Resident bytes of the service's own process."""
        return int(self.process.memory_info().rss)

    def stored(self) -> int:
        """Bytes that the vector store takes on disk."""
        return sum(path.stat().st_blocks * 512 for path in (self.folder / "qdrant").rglob("*") if path.is_file())


class Filling:
    """A store that no service has open yet: collections are written straight into it, as ingestion leaves them."""

    def __init__(self, store: EdgeStore) -> None:
        self._registry = Registry(store, SystemClock())
        self._sparse = EdgeBm25("english")

    async def add(self, collection: str, source_uri: str, chunks: Sequence[Chunk], dense: Vectors, sketches: Sequence[str]) -> None:
        """One document with these chunks, vectors and sketches, searchable once a service opens the folder."""
        sparse = [self._sparse.document(chunk.text, "en") for chunk in chunks]
        characters = max(chunk.end for chunk in chunks)
        id_ = document_id(WHO.tenant, collection, source_uri)
        draft = Document(
            id_, WHO.tenant, collection, source_uri, "", "text/plain", 0, "", characters, characters, len(chunks), 0, "", language="en"
        )
        await self._registry.replace(draft, chunks, dense, sparse, sketches)


KEY = "a key that only benchmarks know"


@contextlib.asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A state directory that is gone afterwards, but for the models."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as name:
        MODELS.mkdir(parents=True, exist_ok=True)
        (Path(name) / "models").symlink_to(MODELS)
        yield Path(name)


@contextlib.asynccontextmanager
async def filling(folder: Path) -> AsyncIterator[Filling]:
    """What is added is stored as a service leaves it some time after the last document: with its graph, if it is enough for one."""
    store = EdgeStore.open(folder / "qdrant", DIMENSION)
    try:
        yield Filling(store)
        await Rebuilding(store).once()
    finally:
        store.close()


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Service]:
    """The service on `folder` with default settings, ready, until left."""
    valkey = Valkey(folder / "valkey")
    await valkey.start()
    try:
        port = free_port()
        with (folder / "retrieval.log").open("ab") as log:
            command = (sys.executable, "-m", "services.retrieval")
            process = await asyncio.create_subprocess_exec(*command, env=_environment(folder, port, valkey.url), stderr=log, cwd=ROOT)
        service = Service(port, psutil.Process(process.pid), folder)
        try:
            await service.until_serving()
            yield service
            assert process.returncode is None, "the service ended by itself"
        finally:
            await service.channel.close()
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(process.wait(), STOP_S)
                except TimeoutError:
                    process.kill()
                    await process.wait()
    finally:
        await valkey.stop()


def _environment(folder: Path, port: int, redis_url: str) -> dict[str, str]:
    """This process's, without settings of ours: figures are those of the defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
    return {
        **kept,
        "TAILRACE_STATE_DIR": str(folder),
        "TAILRACE_INTERNAL_KEY": KEY,
        "TAILRACE_RETRIEVAL_PORT": str(port),
        "QDRANT_URL": "",
        "REDIS_URL": redis_url,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}",
    }


async def _sent(files: Iterable[File], collection: str) -> AsyncIterator[pb.IngestDocumentsRequest]:
    for file in files:
        header = pb.DocumentHeader(source_uri=file.source_uri, title=file.title, media_type=file.media_type, collection=collection)
        yield pb.IngestDocumentsRequest(header=header)
        for begin in range(0, len(file.content), PIECE):
            yield pb.IngestDocumentsRequest(content=file.content[begin : begin + PIECE])
