"""A retrieval service on a free port with Edge in a folder, and a caller that speaks for anybody."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from services.chassis.channel import Caller, open_channel
from services.chassis.lifecycle import started
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.local.stores import Valkey
from services.retrieval.config import Settings
from services.retrieval.wiring import build
from tailrace.common.v1 import common_pb2
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as pb_grpc

KEY = "a key that only the tests know"
PIECE = 256 * 1024


class Retrieval:
    """The service as its callers see it."""

    def __init__(self, target: str) -> None:
        self.channel = open_channel(target)
        self.stub = pb_grpc.RetrievalServiceStub(self.channel)
        self.caller = Caller(target, Passport(KEY.encode()))

    async def ask(self, method: str, request: Any, who: Principal) -> Any:
        """A unary call."""
        return await self.caller.unary(getattr(self.stub, method), request, timeout_s=20, principal=who, idempotent=False)

    async def stream(self, method: str, request: Any, who: Principal) -> list[Any]:
        """All messages of a server stream."""
        async with self.caller.stream(getattr(self.stub, method), request, timeout_s=60, principal=who) as messages:
            return [message async for message in messages]

    async def ingest(self, who: Principal, files: dict[str, bytes | str], **header: Any) -> list[pb.IngestDocumentsResponse]:
        """Progress of `files`, by source_uri."""
        return await self.stream("IngestDocuments", upload(files, **header), who)

    async def ids(self, who: Principal, **request: Any) -> dict[str, str]:
        """Document ids by source_uri."""
        rows = await self.stream("ListDocuments", pb.ListDocumentsRequest(**request), who)
        return {row.document.source_uri: row.document.document_id for row in rows}

    async def search(self, who: Principal, query: str, **request: Any) -> list[common_pb2.CitedPassage]:
        return [row.hit for row in await self.stream("Search", pb.SearchRequest(query=query, **request), who)]

    async def recall(self, who: Principal, question: str, **request: Any) -> tuple[int, pb.RecallVerdict, list[common_pb2.CitedPassage]]:
        """Epoch, verdict and passages."""
        asked = {"cache_scope": "scope", "want_cached": True, "passages_max": 5, **request}
        messages = await self.stream("Recall", pb.RecallRequest(question=question, **asked), who)
        assert ["started", "verdict", "passages"][: len(messages)] == [message.WhichOneof("part") for message in messages]
        return messages[0].started.collection_epoch, messages[1].verdict, list(messages[2].passages.passages) if messages[2:] else []

    async def parts(self, who: Principal, **request: Any) -> list[str]:
        """Names of what a recall sends, in order."""
        return [message.WhichOneof("part") for message in await self.stream("Recall", pb.RecallRequest(**request), who)]

    async def remember(self, who: Principal, question: str, text: str, epoch: int, **fields: Any) -> pb.RememberAnswerResponse:
        answer = pb.CachedAnswer(answer_id=f"answer to {question}", question=question, text=text, model="m", provider="p", **fields)
        return await self.ask("RememberAnswer", pb.RememberAnswerRequest(answer=answer, cache_scope="scope", collection_epoch=epoch), who)


async def upload(files: dict[str, bytes | str], **header: Any) -> AsyncIterator[pb.IngestDocumentsRequest]:
    """The stream that a client sends."""
    for name, content in files.items():
        yield pb.IngestDocumentsRequest(header=pb.DocumentHeader(source_uri=name, **header))
        whole = content.encode() if isinstance(content, str) else content
        for begin in range(0, len(whole), PIECE):
            yield pb.IngestDocumentsRequest(content=whole[begin : begin + PIECE])


def stages(progress: Iterable[pb.IngestDocumentsResponse], index: int = 0) -> list[str]:
    """The stages one document went through."""
    return [event.stage for event in progress if event.index == index]


def settings_for(folder: Path, **values: Any) -> Settings:
    return Settings(state_dir=folder, internal_key=KEY, port=0, **values)


@contextlib.asynccontextmanager
async def own_valkey() -> AsyncIterator[Valkey]:
    """An empty Valkey, until left."""
    with tempfile.TemporaryDirectory(prefix="tailrace-test-") as folder:
        valkey = Valkey(Path(folder))
        await valkey.start()
        try:
            yield valkey
        finally:
            await valkey.stop()


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Retrieval]:
    """The service in this process, until left. If the settings name no Redis, it has one of its own."""
    if "redis_url" not in settings.model_fields_set:
        async with own_valkey() as valkey, running(settings.model_copy(update={"redis_url": SecretStr(valkey.url)})) as retrieval:
            yield retrieval
        return
    async with build(settings) as service, started(service, settings.bind_host) as port:
        retrieval = Retrieval(f"127.0.0.1:{port}")
        try:
            yield retrieval
        finally:
            await retrieval.channel.close()
            await service.server.stop(0, 1)
            assert service.drain is not None
            await service.drain(5)
