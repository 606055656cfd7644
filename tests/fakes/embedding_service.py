"""A small embedding service over real HTTP, in the formats of OpenAI, Voyage and Gemini; its vectors depend on the words alone."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

DIMENSION = 64


def vector(text: str, dimension: int = DIMENSION) -> list[float]:
    """The sum of a fixed direction for every word: texts with words in common are alike. Not of unit length."""
    total = np.zeros(dimension)
    for word in re.findall(r"\w+", text.lower()):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        total += np.random.default_rng(seed).normal(size=dimension)
    return [float(value) for value in total]


@dataclass
class EmbeddingService:
    """What it was asked, and how it is to behave."""

    port: int = 0
    key: str = ""
    dimension: int = DIMENSION
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    failures: list[Response] = field(default_factory=list)
    """Sent instead of answers, first come first."""
    reply: Any = None
    """Sent instead of any answer."""
    held: asyncio.Event | None = None
    """Calls wait for it."""
    busy: int = 0
    busiest: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)

    async def until_busy(self, calls: int) -> None:
        """Wait until so many calls are under way."""
        while self.busy < calls:
            self.more.clear()
            await asyncio.wait_for(self.more.wait(), 10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def embeddings(self, request: Request) -> Response:
        body = await request.json()
        if (refused := await self._met(body, request.headers.get("authorization", "").removeprefix("Bearer "))) is not None:
            return refused
        rows: list[Any] = [vector(text, self.dimension) for text in body["input"]]
        if body.get("encoding_format") == "base64":
            rows = [base64.b64encode(np.asarray(row, "<f4").tobytes()).decode() for row in rows]
        data = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]
        # Order is told by `index`, not by place.
        return JSONResponse({"data": data[::-1], "usage": {"prompt_tokens": 3 * len(rows), "total_tokens": 3 * len(rows)}})

    async def gemini(self, request: Request) -> Response:
        body = await request.json()
        if (refused := await self._met(body, request.headers.get("x-goog-api-key", ""))) is not None:
            return refused
        texts = [one["content"]["parts"][0]["text"] for one in body["requests"]]
        return JSONResponse({"embeddings": [{"values": vector(text, self.dimension)} for text in texts]})

    async def _met(self, body: dict[str, Any], key: str) -> Response | None:
        self.asked.append(body)
        self.keys.append(key)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        self.more.set()
        try:
            if self.held is not None:
                await self.held.wait()
        finally:
            self.busy -= 1
        if self.failures:
            return self.failures.pop(0)
        if self.key and key != self.key:
            return JSONResponse({"error": {"message": f"Incorrect API key provided: {key}"}}, 401)
        return JSONResponse(self.reply) if self.reply is not None else None


@contextlib.asynccontextmanager
async def embedding_service() -> AsyncIterator[EmbeddingService]:
    """The service on a free port, until left."""
    service = EmbeddingService()
    routes = [
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/v1beta/models/{call}", service.gemini, methods=["POST"]),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off"))
    config = server.config
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    service.port = server.servers[0].sockets[0].getsockname()[1]
    serving = asyncio.create_task(server.main_loop())
    try:
        yield service
    finally:
        server.should_exit = True
        await serving
        server.force_exit = True
        await server.shutdown()
