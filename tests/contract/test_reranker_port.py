"""The Reranker port over both wire formats, against a server that speaks them over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.chassis.errors import ModelFailed, ModelMisconfigured, Unavailable
from services.local.stores import free_port
from services.retrieval.remote_reranker import Format, RemoteReranker

TEXTS = ["about newts", "about herons and gates", "about herons"]


class Server:
    """Judges by the words a text shares with the question; `reply` is sent instead."""

    def __init__(self) -> None:
        self.port = free_port()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.reply: Response | None = None
        self.slow_s = 0.0

    async def rerank(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization", ""))
        await asyncio.sleep(self.slow_s)
        if self.reply is not None:
            return self.reply
        texts = body["texts"] if "texts" in body else body["documents"]
        shared = [len(set(text.split()) & set(body["query"].split())) for text in texts]
        best_first = sorted(range(len(texts)), key=lambda place: -shared[place])
        if "texts" in body:
            return JSONResponse([{"index": place, "score": shared[place] / 10} for place in best_first])
        return JSONResponse({"results": [{"index": place, "relevance_score": shared[place] / 10} for place in best_first]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = Starlette(routes=[Route("/rerank", server.rerank, methods=["POST"])])
    listening = uvicorn.Server(uvicorn.Config(app, port=server.port, log_level="error", lifespan="off"))
    task = asyncio.create_task(listening.serve())
    while not listening.started:  # noqa: ASYNC110 - uvicorn tells it this way only
        await asyncio.sleep(0.01)
    yield server
    listening.should_exit = True
    await task


@pytest.fixture(params=["cohere", "tei"])
def wire(request: pytest.FixtureRequest) -> Iterator[Format]:
    yield request.param


def reranker_of(server: Server, wire: Format, keys: tuple[str, ...] = (), timeout_s: float = 5.0) -> RemoteReranker:
    return RemoteReranker(f"http://127.0.0.1:{server.port}/rerank", "a-model", keys, wire, timeout_s)


async def test_each_text_gets_its_own_score(server: Server, wire: Format) -> None:
    """In the texts' order, though the server sends the best first; keys are used in turn."""
    reranker = reranker_of(server, wire, ("one", "two"))
    try:
        assert [0.1, 0.3, 0.2] == await reranker.scores("about herons and", TEXTS)
        await reranker.scores("about", TEXTS)
    finally:
        await reranker.close()

    assert ["Bearer one", "Bearer two"] == server.keys
    assert ("a-model" == server.asked[0].get("model")) is (wire == "cohere")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"index": 0, "score": 1.0}],
        [{"index": 0, "score": 1.0}, {"index": 1, "score": 1.0}, {"index": 1, "score": 1.0}],
        [{"index": 0, "score": 1.0}, {"index": 1, "score": 1.0}, {"index": 3, "score": 1.0}],
        [{"index": 0, "score": 1.0}, {"index": 1, "score": "nan"}, {"index": 2, "score": 1.0}],
        [{"index": 0}, {"index": 1}, {"index": 2}],
        "three",
        {"data": 7},
    ],
)
async def test_a_reply_that_does_not_judge_each_text_once_is_none(server: Server, wire: Format, rows: Any) -> None:
    """Too few, twice the same, a place nobody asked about, no number."""
    server.reply = JSONResponse(rows)
    reranker = reranker_of(server, wire)
    try:
        with pytest.raises(ModelFailed):
            await reranker.scores("x", TEXTS)
    finally:
        await reranker.close()


async def test_what_fails_says_how_and_within_the_time_limit(server: Server, wire: Format) -> None:
    """A wrong key, an overloaded server, one that is slow, one that is not there."""
    reranker, hasty = reranker_of(server, wire), reranker_of(server, wire, timeout_s=0.2)
    nobody = RemoteReranker(f"http://127.0.0.1:{free_port()}/rerank", "", (), wire, 1.0)
    try:
        for status, error in ((401, ModelMisconfigured), (503, Unavailable), (429, Unavailable)):
            server.reply = Response("the key of ann and her words", status)
            with pytest.raises(error) as refused:
                await reranker.scores("x", TEXTS)
            assert "ann" not in str(refused.value)
        server.slow_s = 3.0
        with pytest.raises(Unavailable):
            async with asyncio.timeout(2):
                await hasty.scores("x", TEXTS)
        with pytest.raises(Unavailable):
            await nobody.scores("x", TEXTS)
    finally:
        for one in (reranker, hasty, nobody):
            await one.close()
