"""A cross-encoder behind HTTP, in the two formats that servers of such models speak: Cohere's (Jina, Voyage, vLLM, LiteLLM) and TEI's.

It improves the order and is never needed: whoever uses it goes on without it. Questions, passages and keys are in no error and no log line.
"""

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import httpx
import orjson

from services.chassis.errors import ModelFailed, Unavailable
from services.retrieval.remote_embedding import CONNECT_S, refusal

Format = Literal["cohere", "tei"]
CONNECTIONS_MAX = 16
REPLY_BYTES_MAX = 1024 * 1024


class RemoteReranker:
    """The Reranker port. Close it with `close`."""

    def __init__(self, url: str, model: str, keys: Sequence[str], wire: Format, timeout_s: float) -> None:
        """`url` is the whole address that is posted to; `keys` are used in turn, none = the server wants none."""
        self.model = model
        self._url, self._wire, self._timeout_s = url, wire, timeout_s
        self._keys = itertools.cycle(keys or [""])
        limits = httpx.Limits(max_connections=CONNECTIONS_MAX)
        # Neither proxies nor credentials of the machine: where texts go is what the settings say.
        self._client = httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(timeout_s, connect=CONNECT_S), trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._posted(orjson.dumps(self._body(question, texts)))
        except (TimeoutError, httpx.HTTPError):
            raise Unavailable("the reranker did not answer in time", dependency="reranker") from None
        return _read(reply, len(texts))

    def _body(self, question: str, texts: Sequence[str]) -> Mapping[str, Any]:
        if self._wire == "tei":
            return {"query": question, "texts": texts, "truncate": True}
        return {"model": self.model, "query": question, "documents": texts, "top_n": len(texts)}

    async def _posted(self, content: bytes) -> bytes:
        headers = {"content-type": "application/json"}
        if key := next(self._keys):
            headers["authorization"] = f"Bearer {key}"
        async with self._client.stream("POST", self._url, content=content, headers=headers) as reply:
            if reply.status_code != httpx.codes.OK:
                raise refusal(reply.status_code, reply.headers.get("retry-after", ""))
            body = b""
            async for part in reply.aiter_bytes():
                body += part
                if len(body) > REPLY_BYTES_MAX:
                    raise ModelFailed("the reranker's reply is too large")
            return body


def _read(reply: bytes, count: int) -> list[float]:
    """One score a text, in the texts' order. Raises ModelFailed unless each is told exactly once, as a number."""
    try:
        told = orjson.loads(reply)
        rows = told if isinstance(told, list) else told.get("results") or told["data"]
        scores = {int(row["index"]): float(row["relevance_score"] if "relevance_score" in row else row["score"]) for row in rows}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ModelFailed("the reranker's reply cannot be read") from None
    if len(rows) != count or scores.keys() != set(range(count)) or not all(map(math.isfinite, scores.values())):
        raise ModelFailed("the reranker did not judge every passage once")
    return [scores[place] for place in range(count)]
