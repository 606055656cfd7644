"""What embedders behind HTTP have in common: keys, time limits, one retry, lanes, and what comes back checked. No vendor's wire format.

Texts, vectors and keys are in no error and no log line: an error says what kind of thing went wrong.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import numpy as np
import numpy.typing as npt
import orjson

from services.chassis.deadline import budget_s
from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelRefused, Unavailable
from services.retrieval.ports import Embedded, Unanswered, Vector, Vectors
from services.retrieval.question_lane import QuestionLane
from services.retrieval.word_pieces import WordPieces

CONNECT_S = 5.0
QUESTION_RUNS_MAX = 8
QUESTION_BATCH_MAX = 32
"""Questions that waited for a free connection share the next: a round trip costs more than what they add to it."""
DOCUMENT_RUNS_MAX = 4
RETRY_S = 0.25
RETRY_AFTER_S_MAX = 20.0
"""A service that wants to be left alone for longer is away."""
BYTES_PER_NUMBER_MAX = 40
"""A number in JSON with its comma and indentation."""
REPLY_BYTES_BESIDE_MAX = 1024 * 1024
UNIT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Answered:
    """Vectors as a service sent them, and the tokens it says it read (None = it does not say)."""

    rows: Sequence[Sequence[float]] | npt.NDArray[Any]
    tokens: int | None


class Dialect(Protocol):
    """One vendor's wire format. Pure."""

    def path(self) -> str:
        """Where to post, below the base URL."""
        ...

    def headers(self, key: str) -> dict[str, str]: ...

    def body(self, texts: Sequence[str], *, question: bool) -> Mapping[str, Any]: ...

    def read(self, reply: Any) -> Answered:
        """Raises KeyError, TypeError, ValueError or IndexError for a reply that is none."""
        ...


@dataclass(frozen=True, slots=True)
class Remote:
    """Where an embedder is and how it is used."""

    base_url: str
    keys: tuple[str, ...]
    """Used in turn; the retry takes the next. Empty = the service wants none."""
    dimension: int
    batch_max: int
    timeout_s: float
    """For one call with its retry."""


class RemoteEmbedder:
    """The Embedder port over a dialect. Questions and documents have connections of their own."""

    def __init__(
        self,
        embedder_id: str,
        dialect: Dialect,
        remote: Remote,
        pieces: WordPieces,
        *,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.embedder_id = embedder_id
        self.dimension = remote.dimension
        self._dialect = dialect
        self._remote = remote
        self._pieces = pieces
        self._jitter = jitter
        self._sleep = sleep
        self._turn = 0
        limits = httpx.Limits(max_connections=QUESTION_RUNS_MAX + DOCUMENT_RUNS_MAX)
        timeout = httpx.Timeout(remote.timeout_s, connect=CONNECT_S)
        # Neither proxies nor credentials of the machine: where texts go is what the settings say.
        self._client = httpx.AsyncClient(base_url=remote.base_url.rstrip("/") + "/", limits=limits, timeout=timeout, trust_env=False)
        self._questions: QuestionLane[Vector] = QuestionLane(
            self._question_batch, runs_max=QUESTION_RUNS_MAX, batch_max=min(QUESTION_BATCH_MAX, remote.batch_max)
        )
        self._documents = asyncio.Semaphore(DOCUMENT_RUNS_MAX)

    async def close(self) -> None:
        """End what is under way and close the connections."""
        await self._questions.close()
        await self._client.aclose()

    async def embed_question(self, text: str) -> Vectors:
        return (await self._questions.embed(text))[None]

    async def embed_texts(self, texts: Sequence[str]) -> Embedded:
        size = self._remote.batch_max
        batches = [texts[begin : begin + size] for begin in range(0, len(texts), size)]
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._document_batch(batch)) for batch in batches]
        except ExceptionGroup as failed:
            # One batch that fails ends the others; which of them failed is nobody's concern.
            raise failed.exceptions[0] from None
        done = [task.result() for task in asked]
        return Embedded(np.concatenate([one.vectors for one in done]), sum(one.tokens for one in done), any(one.counted for one in done))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._pieces.count(texts)

    async def _question_batch(self, texts: tuple[str, ...]) -> list[Vector]:
        # The lane's task outlives the request that started it: its deadline is that of the call alone.
        return list((await self._embed(texts, self._remote.timeout_s, question=True)).vectors)

    async def _document_batch(self, texts: Sequence[str]) -> Embedded:
        async with self._documents:
            return await self._embed(texts, budget_s(self._remote.timeout_s), question=False)

    async def _embed(self, texts: Sequence[str], timeout_s: float, *, question: bool) -> Embedded:
        content = orjson.dumps(self._dialect.body(texts, question=question))
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._tried(content, len(texts))
        except TimeoutError:
            raise Unanswered("the embedder did not answer in time", dependency="embedder") from None
        try:
            answered = self._dialect.read(orjson.loads(reply))
            rows = np.asarray(answered.rows, np.float64)
        except (KeyError, TypeError, ValueError, IndexError):
            raise ModelFailed("the embedder's reply cannot be read") from None
        vectors = checked(rows, len(texts), self.dimension)
        tokens = answered.tokens
        if tokens is None:
            return Embedded(vectors, sum(await asyncio.to_thread(self._pieces.count, texts)), counted=True)
        return Embedded(vectors, tokens)

    async def _tried(self, content: bytes, texts: int) -> bytes:
        """Post, and once more if that may help."""
        try:
            return await self._posted(content, texts)
        except Unavailable as error:
            wait_s = (error.retry_after_ms or 0) / 1000
            if wait_s > RETRY_AFTER_S_MAX:
                raise
            await self._sleep(wait_s + RETRY_S * self._jitter())
        except ModelMisconfigured:
            if len(self._remote.keys) < 2:
                raise
        return await self._posted(content, texts)

    async def _posted(self, content: bytes, texts: int) -> bytes:
        most = texts * self.dimension * BYTES_PER_NUMBER_MAX + REPLY_BYTES_BESIDE_MAX
        headers = {"content-type": "application/json", **self._dialect.headers(self._key())}
        try:
            async with self._client.stream("POST", self._dialect.path(), content=content, headers=headers) as reply:
                if reply.status_code != httpx.codes.OK:
                    raise refusal(reply.status_code, reply.headers.get("retry-after", ""))
                parts, size = [], 0
                async for part in reply.aiter_bytes():
                    size += len(part)
                    if size > most:
                        raise ModelFailed("the embedder's reply is too large")
                    parts.append(part)
                return b"".join(parts)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise Unavailable("the embedder cannot be reached", dependency="embedder", retry_after_ms=0) from None
        except httpx.HTTPError:
            raise Unanswered("the embedder broke off", dependency="embedder", retry_after_ms=0) from None

    def _key(self) -> str:
        keys = self._remote.keys
        self._turn += 1
        return keys[self._turn % len(keys)] if keys else ""


def refusal(status: int, retry_after: str) -> DomainError:
    """What a status other than 200 means. The body is not looked at: it may quote the texts or the key."""
    if status in (401, 403):
        return ModelMisconfigured("the embedder's provider does not accept our key")
    if status == 404:
        return ModelMisconfigured("the embedder's provider knows no such model or address")
    if status in (408, 409, 425, 429) or status >= 500:
        wait_ms = int(float(retry_after) * 1000) if retry_after.replace(".", "", 1).isdigit() else 0
        return Unavailable(f"the embedder answers with status {status}", dependency="embedder", retry_after_ms=wait_ms)
    return ModelRefused(f"the embedder refused the texts with status {status}")


def checked(rows: npt.NDArray[Any], count: int, dimension: int) -> Vectors:
    """`rows` with unit length. Raises ModelMisconfigured for another dimension, ModelFailed for what is no vector."""
    if rows.ndim != 2 or len(rows) != count:
        raise ModelFailed(f"the embedder sent {len(rows)} vectors for {count} texts")
    if rows.shape[1] != dimension:
        raise ModelMisconfigured(f"the embedder sends vectors of {rows.shape[1]} numbers, the settings say {dimension}")
    with np.errstate(over="ignore"):  # what is too large is refused in the next line
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not np.all(np.isfinite(lengths)) or np.any(lengths < UNIT_TOLERANCE):
        raise ModelFailed("the embedder sent a vector without a direction")
    unit: Vectors = (rows / lengths).astype(np.float32)
    return unit
