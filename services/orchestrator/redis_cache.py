"""The exact tier of the answer cache, in Redis: an answer by the very words of its question. What may be cached is decided in `answer`.

A store that is away, slow or full is a miss, counted and logged, never an error. A command that is cancelled costs its connection:
the reply that was on its way belongs to nobody, so redis-py closes the connection instead of giving it to the next command.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import redis.asyncio as redis
import structlog
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError

from services.chassis.errors import Unavailable
from services.orchestrator.domain import CachedAnswer, Edition, HeldAnswer, Question
from services.orchestrator.standalone import normalise

log = structlog.get_logger(__name__)

PAUSE_S = 1.0
"""How long a cache that failed is left alone, so that not every answer waits for it."""
VALUE_BYTES_MAX = 512 * 1024
FORGET_TOGETHER = 64
"""Values that are held at the same time when a user's are looked for."""
_PREFIX = "tailrace:exact:v2:"


class _Kept(msgspec.Struct):
    """A cached answer with the mark of the tenant it belongs to: a second lock should a reply ever reach the wrong command."""

    tenant: str
    question: str
    """Normalised."""
    edition: Edition
    answer: CachedAnswer


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


def cache_key(question: Question, scope: str) -> str:
    """Everything the answer depends on but the edition, so that only the very same question in the very same place finds it.

    The edition is in the value: one entry a question, which a newer answer replaces.
    """
    parts = (question.principal.tenant, scope, question.collection, normalise(question.text))
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))  # lengths, so that no two lists of parts look alike
        digest.update(encoded)
    return f"{_PREFIX}{digest.hexdigest()}"


def _owner(value: Any) -> tuple[str, str] | None:
    """The tenant and user that a kept answer was given to; None if it is gone or of another version, which nobody is served."""
    try:
        kept = _decode(value) if isinstance(value, bytes) else None
    except msgspec.MsgspecError:
        return None
    return (kept.tenant, kept.answer.user) if kept is not None else None


class RedisCache:
    """ExactCache on Redis or Valkey."""

    def __init__(self, client: redis.Redis, *, ttl_s: int, timeout_s: float) -> None:
        self._client, self._ttl_s, self._timeout_s = client, ttl_s, timeout_s
        self.failures = 0
        """Commands that did not get an answer in time, or any."""
        self._skip_until = 0.0

    async def get(self, question: Question, scope: str) -> HeldAnswer | None:
        if time.monotonic() < self._skip_until:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                value = await self._once_more(lambda: self._client.get(cache_key(question, scope)))
            kept = _decode(value) if isinstance(value, bytes) else None
        except (RedisError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            self._failed("get", error)
            return None
        if kept is None:
            return None
        if kept.tenant != question.principal.tenant or kept.question != normalise(question.text):
            self._failed("get", ValueError("the value is not the one that was asked for"))
            return None
        return HeldAnswer(kept.answer, kept.edition)

    async def put(self, question: Question, scope: str, held: HeldAnswer) -> bool:
        value = _encode(_Kept(question.principal.tenant, normalise(question.text), held.edition, held.answer))
        if len(value) > VALUE_BYTES_MAX or time.monotonic() < self._skip_until:
            return False
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._once_more(lambda: self._client.set(cache_key(question, scope), value, ex=self._ttl_s))
        except (RedisError, OSError, TimeoutError) as error:
            self._failed("put", error)
            return False
        return True

    async def forget(self, tenant: str, user: str) -> int:
        forgotten = 0
        try:
            # All keys are walked: erasing is rare, and an index would be written with every answer.
            batch: list[Any] = []
            async for key in self._client.scan_iter(match=f"{_PREFIX}*", count=1000):
                batch.append(key)
                if len(batch) == FORGET_TOGETHER:
                    forgotten += await self._forget_of(batch, tenant, user)
                    batch = []
            return forgotten + await self._forget_of(batch, tenant, user)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the store of exact answers cannot be reached", dependency="redis") from error

    async def _forget_of(self, keys: list[Any], tenant: str, user: str) -> int:
        """Delete those of `keys` that hold an answer given to the user; return how many that were."""
        values = await self._client.mget(keys) if keys else []
        theirs = [key for key, value in zip(keys, values, strict=True) if _owner(value) == (tenant, user)]
        return int(await self._client.delete(*theirs)) if theirs else 0

    async def _once_more(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """What `command` gives. A store that was restarted has left us lines that are dead: they go, and a new one is tried."""
        try:
            return await command()
        except ConnectionLost:
            await self._client.connection_pool.disconnect(inuse_connections=False)
            return await command()

    def _failed(self, command: str, error: Exception) -> None:
        self.failures += 1
        self._skip_until = time.monotonic() + PAUSE_S
        log.warning("exact_cache_failed", command=command, error=type(error).__name__, failures=self.failures)
