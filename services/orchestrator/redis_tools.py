"""What replicas share for tools, in Redis: answers that wait for their clients' tools, and the words on calls that wait for one."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import redis.asyncio as redis
from redis.exceptions import RedisError

from services.chassis.errors import Overloaded, Unavailable
from services.orchestrator.domain import Suspended

PENDING_BYTES_MAX = 2 * 1024 * 1024
"""One answer that waits."""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Suspended).decode

_SAY = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= '?' then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""


@contextlib.asynccontextmanager
async def _asking(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (RedisError, OSError, TimeoutError) as error:
        raise Unavailable("the store for tools cannot be reached", dependency="redis") from error


class RedisPendingCalls:
    """PendingCalls on Redis or Valkey. `kept_s`: how long an answer waits; `bytes_max`: what those of this replica may take together."""

    def __init__(
        self, client: redis.Redis, *, kept_s: float, bytes_max: int, timeout_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._client: Any = client
        self._kept_s, self._bytes_max, self._timeout_s, self._now = kept_s, bytes_max, timeout_s, now
        self._kept: deque[tuple[float, int]] = deque()
        self._bytes = 0

    async def keep(self, suspended: Suspended) -> None:
        payload = _encode(suspended)
        while self._kept and self._kept[0][0] <= self._now() - self._kept_s:
            self._bytes -= self._kept.popleft()[1]
        if len(payload) > PENDING_BYTES_MAX or self._bytes + len(payload) > self._bytes_max:
            raise Overloaded("too much waits for clients' tools already", retry_after_ms=5000)
        async with _asking(self._timeout_s):
            await self._client.set(_pending(suspended.answer_id), payload, px=int(self._kept_s * 1000))
        self._kept.append((self._now(), len(payload)))
        self._bytes += len(payload)

    async def find(self, owner: tuple[str, str], answer_id: str) -> Suspended | None:
        async with _asking(self._timeout_s):
            payload = await self._client.get(_pending(answer_id))
        if payload is None:
            return None
        try:
            suspended = _decode(payload)
        except msgspec.DecodeError:  # of a version that kept it otherwise
            return None
        return suspended if suspended.owner == owner else None


class RedisWords:
    """SharedWords on Redis or Valkey: a hash for each answer, with `?` for a call that waits."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._client: Any = client
        self._timeout_s = timeout_s
        self._say = client.register_script(_SAY)

    async def ask(self, answer_id: str, call_id: str, life_s: float) -> None:
        async with _asking(self._timeout_s), self._client.pipeline(transaction=True) as pipeline:
            pipeline.hset(_words(answer_id), call_id, "?")
            pipeline.pexpire(_words(answer_id), int(life_s * 1000))
            await pipeline.execute()

    async def say(self, answer_id: str, call_id: str, allowed: bool) -> bool:
        async with _asking(self._timeout_s):
            return bool(await self._say([_words(answer_id)], [call_id, "1" if allowed else "0"]))

    async def hear(self, answer_id: str, call_id: str) -> bool | None:
        async with _asking(self._timeout_s):
            return _word(await self._client.hget(_words(answer_id), call_id))

    async def end(self, answer_id: str, call_id: str) -> bool | None:
        async with _asking(self._timeout_s), self._client.pipeline(transaction=True) as pipeline:
            pipeline.hget(_words(answer_id), call_id)
            pipeline.hdel(_words(answer_id), call_id)
            return _word((await pipeline.execute())[0])


def _word(value: bytes | None) -> bool | None:
    return None if value is None or value == b"?" else value == b"1"


def _pending(answer_id: str) -> str:
    return f"tailrace:pending:{answer_id}"


def _words(answer_id: str) -> str:
    return f"tailrace:words:{answer_id}"
