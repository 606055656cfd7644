"""The limits in Redis: one script, Redis's own clock, one round trip. What a limit means is said in `limiter`, here in Lua.

A window is one hash: `m` holds number of the first entry, number of the next, sum, first time of the latest entry, latest time; every
entry is a field named by its number, with its latest time and amount. Leases are a sorted set by their end. All keys of a call are in
one slot.
"""

import asyncio
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError

from services.chassis.errors import Unavailable
from services.gateway.limiter import ENTRIES_PER_WINDOW, LEASE_RETRY_US, LEASE_US, WINDOW_US, Charge, Correction, Kind, Outcome, Verdict
from services.gateway.redis_line import RedisLine

ANSWER_TIMEOUT_S = 1.0
RENEWALS_PER_CALL = 500

_COMMON = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local function int(value) return string.format('%.0f', value) end
local function load(key)
  local meta = redis.call('HGET', key, 'm')
  if not meta then return {head = 0, next = 0, sum = 0, first = 0, latest = 0} end
  local head, next, sum, first, latest = string.match(meta, '(%d+) (%d+) (%d+) (%d+) (%d+)')
  return {head = tonumber(head), next = tonumber(next), sum = tonumber(sum), first = tonumber(first), latest = tonumber(latest)}
end
local function entry(key, number)
  local last, amount = string.match(redis.call('HGET', key, int(number)), '(%d+) (%d+)')
  return tonumber(last), tonumber(amount)
end
local function prune(key, w, now, window)
  while w.head < w.next do
    local last, amount = entry(key, w.head)
    if last > now - window then break end
    redis.call('HDEL', key, int(w.head))
    w.sum = w.sum - amount
    w.head = w.head + 1
  end
end
local function save(key, w)
  redis.call('HSET', key, 'm', table.concat({int(w.head), int(w.next), int(w.sum), int(w.first), int(w.latest)}, ' '))
end
local function charge(key, w, now, window, grain, amount)
  if w.head == w.next then w.head, w.next = now, now end
  if w.head < w.next and now - w.first < grain then
    local _, before = entry(key, w.next - 1)
    redis.call('HSET', key, int(w.next - 1), int(now) .. ' ' .. int(before + amount))
  else
    redis.call('HSET', key, int(w.next), int(now) .. ' ' .. int(amount))
    w.next, w.first = w.next + 1, now
  end
  w.sum, w.latest = w.sum + amount, now
  save(key, w)
  redis.call('PEXPIRE', key, math.ceil(window / 1000) + 1000)
  return w.next - 1
end
"""
ADMIT = (
    _COMMON
    + """
local window, grain, lease, lease_us, retry = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local loaded = {}
for i, key in ipairs(KEYS) do
  if ARGV[3 + 3 * i] == 'w' then
    loaded[i] = load(key)
    if loaded[i].latest > now then now = loaded[i].latest end
  end
end
local allowed, reply = 1, {}
for i, key in ipairs(KEYS) do
  local limit, amount = tonumber(ARGV[4 + 3 * i]), tonumber(ARGV[5 + 3 * i])
  if amount > limit then amount = limit end
  local w = loaded[i]
  if w then
    local head = w.head
    prune(key, w, now, window)
    if w.head > head then save(key, w) end
    local reset = 0
    if w.head < w.next then reset = entry(key, w.next - 1) + window - now end
    if w.sum + amount <= limit then
      reply[i] = {1, limit - w.sum, 0, reset, 0}
    else
      local left, at, leaves = w.sum, w.head, now
      while left + amount > limit do
        local last, charged = entry(key, at)
        left, leaves, at = left - charged, last + window, at + 1
      end
      reply[i] = {0, math.max(0, limit - w.sum), leaves - now, reset, 0}
    end
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
    local free = math.max(0, limit - redis.call('ZCARD', key))
    if free > 0 then reply[i] = {1, free, 0, 0, 0} else reply[i] = {0, 0, retry, 0, 0} end
  end
  if reply[i][1] == 0 then allowed = 0 end
end
if allowed == 1 then
  for i, key in ipairs(KEYS) do
    local limit, amount = tonumber(ARGV[4 + 3 * i]), tonumber(ARGV[5 + 3 * i])
    if amount > limit then amount = limit end
    reply[i][2] = reply[i][2] - amount
    if loaded[i] then
      reply[i][4], reply[i][5] = window, charge(key, loaded[i], now, window, grain, amount)
    else
      redis.call('ZADD', key, int(now + lease_us), lease)
      redis.call('PEXPIRE', key, math.ceil(lease_us / 1000) + 1000)
    end
  end
end
return {allowed, now, reply}
"""
)
CORRECT = (
    _COMMON
    + """
local window, grain, lease = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
for i, key in ipairs(KEYS) do
  local number, delta = ARGV[2 + 2 * i], tonumber(ARGV[3 + 2 * i])
  if number == 'l' then
    redis.call('ZREM', key, lease)
  elseif delta > 0 then
    local w = load(key)
    local at = math.max(now, w.latest)
    prune(key, w, at, window)
    charge(key, w, at, window, grain, delta)
  elseif redis.call('HEXISTS', key, number) == 1 then
    local w = load(key)
    local last, amount = entry(key, number)
    local taken = math.min(-delta, amount)
    redis.call('HSET', key, number, int(last) .. ' ' .. int(amount - taken))
    w.sum = w.sum - taken
    save(key, w)
  end
end
return now
"""
)
RENEW = """
local time = redis.call('TIME')
local ends = tonumber(time[1]) * 1000000 + tonumber(time[2]) + tonumber(ARGV[1])
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, string.format('%.0f', ends), ARGV[1 + i])
  redis.call('PEXPIRE', key, math.ceil(tonumber(ARGV[1]) / 1000) + 1000)
end
return 1
"""
_SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (ADMIT, CORRECT, RENEW)}


class RedisLimiter:
    """Limits shared by all replicas. Every call ends within `timeout_s`, whether or not a reply comes."""

    def __init__(
        self,
        client: "RedisLine | redis.Redis",
        window_us: int = WINDOW_US,
        lease_us: int = LEASE_US,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`client` must not try again by itself: a charge whose reply was lost would be made twice."""
        self._client: Any = client
        self._window_us = window_us
        self._grain_us = window_us // ENTRIES_PER_WINDOW
        self._lease_us = lease_us
        self._timeout_s = timeout_s

    async def admit(self, charges: Sequence[Charge], lease: str = "") -> Outcome:
        """Charge all of `charges`, whose keys share a slot, or none. Raises Unavailable, after which they may or may not be charged."""
        arguments: list[str | int] = [self._window_us, self._grain_us, lease, self._lease_us, LEASE_RETRY_US]
        for charge in charges:
            arguments += ["l" if charge.kind is Kind.CONCURRENCY else "w", charge.limit, charge.amount]
        allowed, now_us, verdicts = await self._run(ADMIT, [charge.key for charge in charges], arguments)
        return Outcome(bool(allowed), tuple(Verdict(bool(first), *rest) for first, *rest in verdicts), now_us)

    async def settle(self, corrections: Sequence[Correction], lease: str, lease_keys: Sequence[str]) -> int:
        """Correct windows and end `lease`, all in one slot; return the time in microseconds. Raises Unavailable."""
        arguments: list[str | int] = [self._window_us, self._grain_us, lease]
        for correction in corrections:
            arguments += [correction.entry, correction.delta]
        for _ in lease_keys:
            arguments += ["l", 0]
        return int(await self._run(CORRECT, [*(correction.key for correction in corrections), *lease_keys], arguments))

    async def renew(self, leases: Sequence[tuple[str, str]]) -> None:
        """Hold leases (key and name), known or not, for another lifetime. Raises Unavailable."""

        def slot(lease: tuple[str, str]) -> str:
            return lease[0].partition("}")[0]

        for _, group in itertools.groupby(sorted(leases, key=slot), slot):
            while batch := list(itertools.islice(group, RENEWALS_PER_CALL)):
                await self._run(RENEW, [key for key, _ in batch], [self._lease_us, *(lease for _, lease in batch)])

    async def ping(self) -> None:
        """Raises if Redis does not answer."""
        await self._client.ping()

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    return await self._client.evalsha(_SHA[script], len(keys), *keys, *arguments)
                except NoScriptError:  # a restarted Redis has forgotten it
                    return await self._client.eval(script, len(keys), *keys, *arguments)
        except (RedisError, OSError, TimeoutError) as error:
            raise Unavailable("the limits cannot be reached", dependency="redis") from error
