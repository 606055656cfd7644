"""The sliding window in Redis: one script, Redis's own clock, one round trip. What a window means is said in `window`, here in Lua.

Members of the sorted set are `<time>-<n>`, so that two requests in one microsecond are two.
"""

import hashlib
from typing import Any

import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError

from services.chassis.errors import Unavailable
from services.gateway.window import Decision

SCRIPT = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local window, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if last[2] and tonumber(last[2]) > now then now = tonumber(last[2]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - window))
local count = redis.call('ZCARD', KEYS[1])
if count < limit then
  local same = redis.call('ZCOUNT', KEYS[1], string.format('%.0f', now), '+inf')
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), string.format('%.0f-%d', now, same))
  redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1000)
  return {1, limit - count - 1, 0, window, now}
end
local leaves = tonumber(redis.call('ZRANGE', KEYS[1], count - limit, count - limit, 'WITHSCORES')[2]) + window
local newest = tonumber(redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]) + window
return {0, 0, leaves - now, newest - now, now}
"""
_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


class RedisWindow:
    """Windows by key, shared by all replicas."""

    def __init__(self, client: "redis.Redis", window_us: int) -> None:
        self._client: Any = client
        self._window_us = window_us

    async def admit(self, key: str, limit: int) -> Decision:
        """Decide on a request now. Raises Unavailable if Redis cannot be asked."""
        return (await self.admit_at(key, limit))[0]

    async def admit_at(self, key: str, limit: int) -> tuple[Decision, int]:
        """As `admit`, and the time in microseconds that Redis decided by."""
        try:
            try:
                reply = await self._client.evalsha(_SHA, 1, key, self._window_us, limit)
            except NoScriptError:  # a restarted Redis has forgotten it
                reply = await self._client.eval(SCRIPT, 1, key, self._window_us, limit)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the request windows cannot be reached", dependency="redis") from error
        allowed, remaining, retry_after_us, reset_us, now_us = (int(value) for value in reply)
        return Decision(bool(allowed), limit, remaining, retry_after_us, reset_us), now_us

    async def ping(self) -> None:
        """Raises if Redis does not answer."""
        await self._client.ping()
