"""The limits in Redis: one script, Redis's own clock, one round trip. What a limit means is said in `limiter`, here in Lua.

A window is one hash: `m` holds number of the first entry, number of the next, sum, first time of the latest entry, latest time; every
entry is a field named by its number, with its latest time and amount. Leases are a sorted set by their end. A grant is a hash: `s` holds
whether its answer has ended, and the lease, as long as the grant holds; of each window of tokens a field named by its key has entry and
amount. All keys of a call are in one slot.
"""

import asyncio
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError

from services.chassis.errors import Unavailable
from services.gateway.limiter import (
    ENTRIES_PER_WINDOW,
    GRANT_US,
    LEASE_RETRY_US,
    LEASE_US,
    WINDOW_US,
    Before,
    Charge,
    Kind,
    Outcome,
    Settlement,
    Verdict,
)
from services.gateway.redis_line import RedisLine

ANSWER_TIMEOUT_S = 1.0
RENEWALS_PER_CALL = 500
_LETTERS = {Kind.REQUESTS: "w", Kind.READS: "w", Kind.TOKENS: "t", Kind.CONCURRENCY: "l"}
"""How the script is told what a key limits."""

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
local count, grant, grant_us = tonumber(ARGV[6]), KEYS[tonumber(ARGV[6]) + 1], tonumber(ARGV[7])
local function kind(i) return ARGV[5 + 3 * i] end
local function asked(i)
  local limit, amount = tonumber(ARGV[6 + 3 * i]), tonumber(ARGV[7 + 3 * i])
  if amount > limit then amount = limit end
  return limit, amount
end
local before = 'never'
local given = grant and redis.call('HGET', grant, 's')
if given then before, lease = string.match(given, '(%a+) (.*)') end
local loaded = {}
for i = 1, count do
  if kind(i) ~= 'l' then
    loaded[i] = load(KEYS[i])
    if loaded[i].latest > now then now = loaded[i].latest end
  end
end
local allowed, reply = 1, {}
for i = 1, count do
  local key, w, limit, amount = KEYS[i], loaded[i], asked(i)
  if w then
    local head = w.head
    prune(key, w, now, window)
    if w.head > head then save(key, w) end
    local reset = 0
    if w.head < w.next then reset = entry(key, w.next - 1) + window - now end
    if w.sum + amount <= limit then
      reply[i] = {1, limit - w.sum, 0, reset, 0, 0}
    elseif given and kind(i) == 't' then
      reply[i] = {1, math.max(0, limit - w.sum), 0, reset, 0, 0}
    else
      local left, at, leaves = w.sum, w.head, now
      while left + amount > limit do
        local last, charged = entry(key, at)
        left, leaves, at = left - charged, last + window, at + 1
      end
      reply[i] = {0, math.max(0, limit - w.sum), leaves - now, reset, 0, 0}
    end
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
    local free = math.max(0, limit - redis.call('ZCARD', key))
    if free > 0 or given then reply[i] = {1, free, 0, 0, 0, 0} else reply[i] = {0, 0, retry, 0, 0, 0} end
  end
  if reply[i][1] == 0 then allowed = 0 end
end
if allowed == 1 then
  if grant and not given then
    redis.call('DEL', grant)
    redis.call('HSET', grant, 's', 'open ' .. lease)
    redis.call('PEXPIRE', grant, math.ceil(grant_us / 1000))
  end
  for i = 1, count do
    local key, limit, amount = KEYS[i], asked(i)
    if given and kind(i) == 't' then
      local at, charged = string.match(redis.call('HGET', grant, key) or '', '(%d+) (%d+)')
      reply[i][5], reply[i][6] = tonumber(at or 0), tonumber(charged or 0)
    elseif loaded[i] then
      reply[i][2] = reply[i][2] - amount
      reply[i][4], reply[i][5], reply[i][6] = window, charge(key, loaded[i], now, window, grain, amount), amount
      if grant and kind(i) == 't' then redis.call('HSET', grant, key, int(reply[i][5]) .. ' ' .. int(amount)) end
    elseif before ~= 'ended' then
      if not given then reply[i][2] = reply[i][2] - amount end
      redis.call('ZADD', key, int(now + lease_us), lease)
      redis.call('PEXPIRE', key, math.ceil(lease_us / 1000) + 1000)
    end
  end
end
return {allowed, now, before, lease, reply}
"""
)
SETTLE = (
    _COMMON
    + """
local window, grain, lease, lasts, count = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4] == '1', tonumber(ARGV[5])
local grant = ARGV[6] == '1' and KEYS[#KEYS]
local before, holder
if grant then before, holder = string.match(redis.call('HGET', grant, 's') or '', '(%a+) (.*)') end
for i = 1, count do
  local key, number, charged, used = KEYS[i], ARGV[4 + 3 * i], ARGV[5 + 3 * i], tonumber(ARGV[6 + 3 * i])
  local delta = used - tonumber(charged)
  if grant then
    if redis.call('HGET', grant, key) == number .. ' ' .. charged then
      redis.call('HDEL', grant, key)
    elseif lasts and before ~= 'ended' then
      delta = used
    else
      delta = 0
    end
  end
  if delta > 0 then
    local w = load(key)
    local at = math.max(now, w.latest)
    prune(key, w, at, window)
    charge(key, w, at, window, grain, delta)
  elseif delta < 0 and redis.call('HEXISTS', key, number) == 1 then
    local w = load(key)
    local last, amount = entry(key, number)
    local taken = math.min(-delta, amount)
    redis.call('HSET', key, number, int(last) .. ' ' .. int(amount - taken))
    w.sum = w.sum - taken
    save(key, w)
  end
end
for i = count + 1, #KEYS - (grant and 1 or 0) do redis.call('ZREM', KEYS[i], lease) end
if grant and lease ~= '' and holder == lease then
  if lasts then redis.call('HSET', grant, 's', 'ended ' .. lease) else redis.call('HDEL', grant, 's') end
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
_SHA = {script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest() for script in (ADMIT, SETTLE, RENEW)}


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

    async def admit(self, charges: Sequence[Charge], lease: str = "", grant: str = "") -> Outcome:
        """Charge all of `charges`, or none; see LocalLimiter. All keys and the grant share a slot.

        Raises Unavailable, after which they may or may not be charged.
        """
        arguments: list[str | int] = [self._window_us, self._grain_us, lease, self._lease_us, LEASE_RETRY_US, len(charges), GRANT_US]
        for charge in charges:
            arguments += [_LETTERS[charge.kind], charge.limit, charge.amount]
        keys = [charge.key for charge in charges]
        allowed, now_us, before, held, verdicts = await self._run(ADMIT, [*keys, grant] if grant else keys, arguments)
        said = tuple(Verdict(bool(first), *rest) for first, *rest in verdicts)
        return Outcome(bool(allowed), said, now_us, Before(before.decode()), held.decode())

    async def settle(self, settlement: Settlement) -> int:
        """See Settlement, whose keys share a slot; return the time in microseconds. Raises Unavailable."""
        corrections, grant = settlement.corrections, settlement.grant
        arguments: list[str | int] = [self._window_us, self._grain_us, settlement.lease, int(settlement.lasts), len(corrections)]
        arguments.append(int(bool(grant)))
        for correction in corrections:
            arguments += [correction.entry, correction.charged, correction.used]
        keys = [*(correction.key for correction in corrections), *settlement.lease_keys]
        return int(await self._run(SETTLE, [*keys, grant] if grant else keys, arguments))

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
