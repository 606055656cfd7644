"""Which answers are being made to which questions, in Redis: a string for each question, which expires. Nothing is decided here."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import redis.asyncio as redis
from redis.exceptions import RedisError

from services.chassis.errors import Unavailable
from services.orchestrator.domain import Flight

FOLLOWED_S = 10
MARGIN_S = 5.0
"""How long a flight outlives its answer's deadline: time to close, book and tell."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Flight).decode

_CLAIM = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[2] and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return false
"""
_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
return redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
"""


class RedisFlights:
    """SharedFlights on Redis or Valkey."""

    def __init__(self, client: redis.Redis, *, timeout_s: float) -> None:
        self._client, self._timeout_s = client, timeout_s
        self._claim, self._release = client.register_script(_CLAIM), client.register_script(_RELEASE)

    async def claim(self, key: str, flight: Flight, instead_of: Flight | None = None) -> Flight | None:
        stale = b"" if instead_of is None else _encode(instead_of)
        life_ms = max(1, math.ceil((flight.ends_at - time.time() + MARGIN_S) * 1000))
        async with self._asking():
            held = await self._claim([_key(key)], [_encode(flight), stale, life_ms])
        try:
            return _decode(held) if isinstance(held, bytes) else None
        except msgspec.MsgspecError as error:
            raise Unavailable("a flight is not what this version writes", dependency="redis") from error

    async def release(self, key: str, flight: Flight, linger_s: float) -> None:
        async with self._asking():
            await self._release([_key(key)], [_encode(flight), math.ceil(linger_s * 1000), _encode(replace(flight, ends_at=0.0))])

    async def follow(self, answer_id: str) -> None:
        async with self._asking():
            await self._client.set(_followed(answer_id), "1", ex=FOLLOWED_S)

    async def is_followed(self, answer_id: str) -> bool:
        async with self._asking():
            return bool(await self._client.exists(_followed(answer_id)))

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the shared flights cannot be reached", dependency="redis") from error


def _key(key: str) -> str:
    return f"tailrace:flight:v1:{key}"


def _followed(answer_id: str) -> str:
    return f"tailrace:flight-followed:{{{answer_id}}}"
