"""The prompts of answers, kept in Redis for a while so that an administrator can see what was sent. Whether they are, is a setting."""

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import redis.asyncio as redis
from redis.exceptions import RedisError

from services.chassis.errors import Unavailable
from services.chassis.principal import Principal
from services.orchestrator.domain import SentPrompt

VALUE_BYTES_MAX = 4 * 1024 * 1024
"""A dozen calls with long prompts; what is larger is not kept at all, since part of it would not be the exact prompt."""


class _Kept(msgspec.Struct):
    """With the tenant it belongs to: a second lock should a reply ever reach the wrong command."""

    tenant: str
    prompts: tuple[SentPrompt, ...]
    answer_id: str = ""
    """Empty = kept by a former version."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Kept).decode


class RedisPrompts:
    """PromptShelf on Redis or Valkey. Every key lives `kept_s` seconds; with 0 nothing is kept, and what was can still be forgotten."""

    def __init__(self, client: redis.Redis, *, kept_s: int) -> None:
        self._client, self._kept_s = client, kept_s

    async def keep(self, principal: Principal, answer_id: str, prompts: Sequence[SentPrompt]) -> bool:
        value = _encode(_Kept(principal.tenant, tuple(prompts), answer_id))
        if not self._kept_s or len(value) > VALUE_BYTES_MAX:
            return False
        key, index, now = _key("answer", principal.tenant, answer_id), _key("user", principal.tenant, principal.user), time.time()
        try:
            async with self._client.pipeline(transaction=True) as commands:
                commands.set(key, value, ex=self._kept_s)
                commands.zadd(index, {key: now})
                commands.zremrangebyscore(index, 0, now - self._kept_s)  # those that have expired
                commands.expire(index, self._kept_s)
                await commands.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise _away() from error
        return True

    async def get(self, tenant: str, answer_id: str) -> tuple[SentPrompt, ...]:
        kept = await self._kept(tenant, _key("answer", tenant, answer_id))
        return kept.prompts if kept is not None else ()

    async def of_user(self, tenant: str, user: str) -> AsyncGenerator[tuple[str, tuple[SentPrompt, ...]], None]:
        try:
            keys: list[Any] = await self._client.zrange(_key("user", tenant, user), 0, -1)
        except (RedisError, OSError, TimeoutError) as error:
            raise _away() from error
        for key in keys:  # one at a time: each may be some MiB
            if (kept := await self._kept(tenant, key)) is not None:
                yield kept.answer_id, kept.prompts

    async def _kept(self, tenant: str, key: str | bytes) -> _Kept | None:
        """What is kept under a key; None if that is nothing, or another tenant's."""
        try:
            value = await self._client.get(key)
        except (RedisError, OSError, TimeoutError) as error:
            raise _away() from error
        if not isinstance(value, bytes):
            return None
        try:
            kept = _decode(value)
        except msgspec.MsgspecError:
            return None  # of another version
        return kept if kept.tenant == tenant else None

    async def forget(self, tenant: str, user: str) -> int:
        index = _key("user", tenant, user)
        try:
            keys = await self._client.zrange(index, 0, -1)
            await self._client.delete(index, *keys)
        except (RedisError, OSError, TimeoutError) as error:
            raise _away() from error
        return len(keys)


def _key(kind: str, tenant: str, name: str) -> str:
    digest = hashlib.sha256()
    for part in (tenant, name):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))  # lengths, so that no two pairs look alike
        digest.update(encoded)
    return f"tailrace:prompts:v1:{kind}:{digest.hexdigest()}"


def _away() -> Unavailable:
    return Unavailable("the store of prompts cannot be reached", dependency="redis")
