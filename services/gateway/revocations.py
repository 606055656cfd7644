"""Tokens that ended before their time: one list in Redis, kept in memory by every gateway. No token and no secret is ever in it.

A request looks into memory alone. Once in `PULL_S` each gateway asks whether the list has changed and reads it anew if so; while Redis
is away, the list that was read last holds.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis.asyncio as redis
import structlog
from redis.exceptions import RedisError

from services.chassis.errors import NotFound, Overloaded, Unavailable

log = structlog.get_logger(__name__)

PULL_S = 1.0
"""How long a token that was revoked at another gateway may go on, besides the time that Redis takes."""
REVOCATIONS_MAX = 20_000
"""Entries of each kind; ended ones leave when something is added."""
TENANT_MAX = 2_000
"""Of those, one tenant's: no administrator can fill the list of all the others."""

_VERSION, _TOKENS, _USERS = "tailrace:revoked:version", "tailrace:revoked:tokens", "tailrace:revoked:users"

ADD = """
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[3])
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  local all, own = redis.call('ZCARD', KEYS[2]), 0
  if all >= tonumber(ARGV[4]) then return 0 end
  if all >= tonumber(ARGV[5]) then
    for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
      if string.sub(member, 1, #ARGV[6]) == ARGV[6] then own = own + 1 end
    end
  end
  if own >= tonumber(ARGV[5]) then return -1 end
end
redis.call('ZADD', KEYS[2], 'GT', ARGV[2], ARGV[1])
local time = redis.call('TIME')
redis.call('HSETNX', KEYS[1], 'epoch', time[1] .. '.' .. time[2])
redis.call('HINCRBY', KEYS[1], 'changes', 1)
return 1
"""
REMOVE = """
local removed = redis.call('ZREM', KEYS[2], ARGV[1])
if removed == 1 then redis.call('HINCRBY', KEYS[1], 'changes', 1) end
return removed
"""


@dataclass(frozen=True, slots=True)
class Revoked:
    """The list as of one version."""

    epoch: bytes = b""
    """Names the life of the list; a Redis that lost its data begins another."""
    changes: int = 0
    """How often it was changed in that life."""
    tokens: dict[bytes, float] = field(default_factory=dict)
    """When each token would have ended anyway, by tenant and `jti`."""
    users: dict[bytes, float] = field(default_factory=dict)
    """Up to when each user's tokens were issued that no longer count, by tenant and user."""

    def holds(self, tenant: str, user: str, token_id: str, issued_at: float) -> bool:
        """Whether a token was revoked. One that does not say when it was issued counts as issued before everything."""
        if token_id and _member(tenant, token_id) in self.tokens:
            return True
        until = self.users.get(_member(tenant, user)) if self.users else None
        return until is not None and issued_at <= until


class Revocations:
    """The shared list. Times are Unix seconds."""

    def __init__(
        self,
        client: "redis.Redis",
        *,
        lifetime_max_s: int,
        on_stale: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._client: Any = client
        self._lifetime_max_s = lifetime_max_s
        self._on_stale = on_stale
        self._now = now
        self._revoked: Revoked | None = None
        self._readable = True
        self._lock = asyncio.Lock()

    async def holds(self, tenant: str, user: str, token_id: str, issued_at: float) -> bool:
        """Whether a token was revoked, as far as is known here. Raises Unavailable if the list was never read."""
        if self._revoked is None:
            await self.pull()
        if self._revoked is None:
            raise Unavailable("the list of revoked tokens cannot be read", dependency="redis", retry_after_ms=1000)
        return self._revoked.holds(tenant, user, token_id, issued_at)

    async def revoke_token(self, tenant: str, token_id: str, expires_at: float) -> None:
        """End a token. It is forgotten when it would have ended anyway. Raises Overloaded if the list is full, Unavailable."""
        await self._add(_TOKENS, tenant, token_id, expires_at, forget_before=self._now())

    async def revoke_user(self, tenant: str, user: str) -> float:
        """End every token of a user that was issued up to now, and return that time. Raises Overloaded if the list is full, Unavailable.

        Forgotten when no token of that time can be valid any more.
        """
        until = float(int(self._now()))
        await self._add(_USERS, tenant, user, until, forget_before=until - self._lifetime_max_s)
        return until

    async def restore(self, kind: str, tenant: str, subject: str) -> None:
        """Take a token (`kind` tokens) or a user (`users`) from the list. Raises NotFound, Unavailable."""
        key = {"tokens": _TOKENS, "users": _USERS}[kind]
        if not await self._run(REMOVE, key, _member(tenant, subject)):
            raise NotFound("no such revocation", kind="revocation")
        await self.pull()

    async def watch(self) -> None:
        """Keep the list as new as `PULL_S`; runs until it is cancelled."""
        while True:
            await self.pull()
            await asyncio.sleep(PULL_S)

    async def pull(self) -> None:
        """Read the list if it has changed. Trouble is counted, and what was known stays."""
        async with self._lock:
            try:
                epoch, changes = await self._version()
                known = self._revoked
                if known is None or (epoch, changes) != (known.epoch, known.changes):
                    if known is not None and known.epoch and (epoch != known.epoch or changes < known.changes):
                        await self._write_back(known)
                        epoch, changes = await self._version()
                    self._revoked = await self._read(epoch, changes)
                readable = True
            except (RedisError, OSError, TimeoutError, ValueError) as error:
                readable = False
                self._on_stale()
                if self._readable:
                    log.warning("revocations_unreadable", error=type(error).__name__)
            if readable and not self._readable:
                log.info("revocations_readable_again")
            self._readable = readable

    async def _version(self) -> tuple[bytes, int]:
        epoch, changes = await self._client.hmget(_VERSION, "epoch", "changes")
        return epoch or b"", int(changes or 0)

    async def _write_back(self, known: Revoked) -> None:
        """Tell a Redis that lost its data what it forgot. Every gateway may do so: doing it twice changes nothing."""
        log.warning("revocations_written_back", tokens=len(known.tokens), users=len(known.users))
        async with self._client.pipeline(transaction=True) as pipeline:
            if known.tokens:
                pipeline.zadd(_TOKENS, known.tokens, gt=True)
            if known.users:
                pipeline.zadd(_USERS, known.users, gt=True)
            pipeline.hsetnx(_VERSION, "epoch", known.epoch)
            pipeline.hincrby(_VERSION, "changes", known.changes + 1)
            await pipeline.execute()

    async def _read(self, epoch: bytes, changes: int) -> Revoked:
        async with self._client.pipeline(transaction=True) as pipeline:
            pipeline.zrange(_TOKENS, 0, REVOCATIONS_MAX - 1, withscores=True)
            pipeline.zrange(_USERS, 0, REVOCATIONS_MAX - 1, withscores=True)
            tokens, users = await pipeline.execute()
        return Revoked(epoch, changes, dict(tokens), dict(users))

    async def _add(self, key: str, tenant: str, subject: str, score: float, *, forget_before: float) -> None:
        bounds = (REVOCATIONS_MAX, TENANT_MAX, _prefix(tenant))
        added = await self._run(ADD, key, _member(tenant, subject), repr(score), repr(forget_before), *bounds)
        if added < 0:
            raise Overloaded(f"at most {TENANT_MAX} revocations are kept for a tenant", bound=TENANT_MAX)
        if not added:
            raise Overloaded(f"at most {REVOCATIONS_MAX} revocations are kept", bound=REVOCATIONS_MAX)
        await self.pull()

    async def _run(self, script: str, key: str, *arguments: Any) -> int:
        try:
            return int(await self._client.eval(script, 2, _VERSION, key, *arguments))
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the list of revoked tokens cannot be reached", dependency="redis", retry_after_ms=1000) from error


def _member(tenant: str, subject: str) -> bytes:
    """One name of two parts that no choice of parts makes ambiguous."""
    return orjson.dumps((tenant, subject))


def _prefix(tenant: str) -> bytes:
    """What the names of a tenant begin with, and no other's."""
    return orjson.dumps((tenant,))[:-1] + b","
