"""Ingestion jobs in Redis or Valkey: who may change what is decided in scripts, since between a question and an answer others speak.

All keys share one slot of a cluster. Nothing expires by itself: `sweep` forgets whole jobs, so that the sum of bytes stays true.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import redis.asyncio as redis
from redis.exceptions import RedisError

from services.chassis.ending import ended
from services.chassis.errors import Overloaded, Unavailable
from services.retrieval.domain import Progress, Stage, Upload
from services.retrieval.jobs import Claim, JobState, Owner, Room, Taken, Told

PREFIX = "tailrace:{ingest}:"
EVENTS_PER_JOB_MAX = 100_000
EVENTS_KEPT_MAX = 100_000
"""Progress messages of all jobs together, some 200 bytes each; above it the oldest ended jobs go."""
JOBS_KEPT_MAX = 5_000
DEATHS_MAX = 5
"""How many replicas may die over one document before it is taken for the cause."""
READ_EVENTS_MAX = 1_000
WATCH_PATIENCE_S = 30.0
"""How long a stream of progress waits for a store that is away or slow, before it ends in an error."""
WATCH_RETRY_S = 0.25
READ_WAIT_MS = 1_000
TURN_LEASE_MS = 30_000
TURN_RETRY_S = 0.02
TURN_WAIT_S = 60.0

_encode = msgspec.json.encode
_progress = msgspec.json.Decoder(Progress).decode
_pack = msgspec.msgpack.encode
_unpack = msgspec.msgpack.Decoder(Upload).decode

_LIBRARY = """
local P = KEYS[1]
local FINAL = {indexed = true, unchanged = true, failed = true, cancelled = true}
local call = redis.call
local function key(kind, name) return P .. kind .. ':' .. name end
local function now_us() local t = call('TIME'); return t[1] * 1000000 + t[2] end
local function stamp()
  -- Time, so that an order outlives a store that has lost everything; and never twice the same.
  local next = string.format('%.0f', math.max(now_us(), tonumber(call('GET', P .. 'stamp') or 0) + 1))
  call('SET', P .. 'stamp', next)
  return next
end
local function number(job, field) return tonumber(call('HGET', key('job', job), field) or 0) end

local function tell(job, index, text)
  local jk, new = key('job', job), cjson.decode(text)
  local before = call('HGET', key('latest', job), index)
  if before then
    local old = cjson.decode(before)
    call('HINCRBY', jk, 's:' .. old.stage, -1)
    new.chunks_total, new.chunks_done = new.chunks_total - old.chunks_total, new.chunks_done - old.chunks_done
  end
  call('HINCRBY', jk, 's:' .. new.stage, 1)
  if new.chunks_total ~= 0 then call('HINCRBY', jk, 'chunks_total', new.chunks_total) end
  if new.chunks_done ~= 0 then call('HINCRBY', jk, 'chunks_done', new.chunks_done) end
  call('HSET', key('latest', job), index, text)
  call('XADD', key('events', job), 'MAXLEN', '~', EVENTS_PER_JOB_MAX, '*', 'e', text)
  call('HINCRBY', jk, 'events', 1)
  call('INCR', P .. 'told')
end

local function finish(job)
  local jk = key('job', job)
  if call('HGET', jk, 'closed') ~= '1' or number(job, 'open') > 0 or call('HEXISTS', jk, 'ended') == 1 then return end
  call('HSET', jk, 'ended', '1')
  call('ZREM', P .. 'running', job)
  call('ZADD', P .. 'ended', now_us(), job)
  call('XADD', key('events', job), '*', 'x', '1')
end

local function queue(job, index, front)
  local tenant = call('HGET', key('job', job), 'tenant')
  call(front and 'LPUSH' or 'RPUSH', key('queue', job), index)
  local turn = call('INCR', P .. 'turn')
  call('ZADD', key('jobs-waiting', tenant), 'NX', turn, job)
  call('ZADD', P .. 'tenants-waiting', 'NX', turn, tenant)
end

local function enter(job, index, head, text)
  local jk = key('job', job)
  call('HSET', key('heads', job), index, head)
  call('HSET', jk, 'o:' .. index, stamp())
  call('HINCRBY', jk, 'documents', 1)
  call('HINCRBY', jk, 'bytes', cjson.decode(text).bytes)
  call('HINCRBY', jk, 'open', 1)
  tell(job, index, text)
  queue(job, index)
end

local function drop(job, index)
  local size = call('HGET', key('kept', job), index)
  if not size then return end
  call('HDEL', key('kept', job), index)
  call('DEL', key('content', job .. ':' .. index))
  call('HINCRBY', key('job', job), 'held', -size)
  call('DECRBY', P .. 'bytes', size)
end

local function unclaim(job, index)
  local jk = key('job', job)
  local claim = call('HMGET', jk, 'r:' .. index, 't:' .. index)
  if claim[1] then call('SREM', key('claims', claim[1]), job .. ' ' .. index .. ' ' .. claim[2]) end
  call('HDEL', jk, 'r:' .. index, 't:' .. index, 'w:' .. index)
end

local function yield_room(job)
  local reserved = call('HGET', key('job', job), 'reserved')
  if not reserved then return end
  call('HDEL', key('job', job), 'reserved')
  drop(job, reserved)
end

local function close(job, commit)
  local jk = key('job', job)
  yield_room(job)
  local staged = call('HMGET', jk, 'staged', 'staged_head', 'staged_text')
  if staged[1] then
    call('HDEL', jk, 'staged', 'staged_head', 'staged_text')
    if commit then enter(job, staged[1], staged[2], staged[3]) else drop(job, staged[1]) end
  end
  call('HSET', jk, 'closed', '1')
  local receiver = call('HGET', jk, 'receiver')
  if receiver then call('SREM', key('receiving', receiver), job) end
  finish(job)
end

local function hand_back(replica, died)
  for _, member in ipairs(call('SMEMBERS', key('claims', replica))) do
    local job, index = string.match(member, '^(%S+) (%S+) ')
    unclaim(job, index)
    local deaths = died and call('HINCRBY', key('job', job), 'd:' .. index, 1) or 0
    if deaths < DEATHS_MAX then
      queue(job, index, true)
    else
      local row = cjson.decode(call('HGET', key('latest', job), index))
      row.stage, row.error_reason = 'failed', 'INTERNAL'
      row.error_detail = 'the service died again and again while it worked on this document'
      tell(job, index, cjson.encode(row))
      call('HINCRBY', key('job', job), 'open', -1)
      finish(job)
    end
  end
  call('DEL', key('claims', replica))
  for _, job in ipairs(call('SMEMBERS', key('receiving', replica))) do close(job, true) end
  call('DEL', key('receiving', replica))
  call('ZREM', P .. 'replicas', replica)
end

local function alive(replica, lease_ms)
  local now = math.floor(now_us() / 1000)
  call('ZADD', P .. 'replicas', now + lease_ms, replica)
  for _, dead in ipairs(call('ZRANGEBYSCORE', P .. 'replicas', '-inf', now)) do hand_back(dead, true) end
end

local function forget(job)
  local jk = key('job', job)
  for _, index in ipairs(call('HKEYS', key('kept', job))) do drop(job, index) end
  local known = call('HMGET', jk, 'tenant', 'mine', 'events')
  call('DECRBY', P .. 'told', known[3] or 0)
  call('ZREM', key('jobs', known[1]), job)
  call('ZREM', key('mine', known[2]), job)
  call('ZREM', P .. 'ended', job)
  call('DEL', jk, key('latest', job), key('heads', job), key('events', job), key('queue', job), key('kept', job))
end
""".replace("EVENTS_PER_JOB_MAX", str(EVENTS_PER_JOB_MAX)).replace("DEATHS_MAX", str(DEATHS_MAX))

_BEGIN = """
local job, tenant, user, api_key, mine, replica, jobs_max, lease_ms = unpack(ARGV)
alive(replica, tonumber(lease_ms))
if call('ZCARD', P .. 'running') >= tonumber(jobs_max) then return 0 end
local shown = stamp()
call('HSET', key('job', job), 'tenant', tenant, 'user', user, 'key', api_key, 'mine', mine)
call('HSET', key('job', job), 'created', shown, 'receiver', replica, 'closed', '0')
call('ZADD', P .. 'running', shown, job)
call('ZADD', key('jobs', tenant), shown, job)
call('ZADD', key('mine', mine), shown, job)
call('SADD', key('receiving', replica), job)
return 1
"""

# Room is counted before the content is sent: what has to wait costs one short question. The reservation is the receiving job's,
# and goes with it: a replica that dies gives back its jobs, and with them what they had reserved.
_RESERVE = """
local job, index, size, total_max, share_max = unpack(ARGV)
local jk = key('job', job)
size = tonumber(size)
local function answer(what) return {what, tonumber(call('GET', P .. 'told') or 0)} end
if call('HGET', jk, 'closed') ~= '0' then return answer('closed') end
yield_room(job)
if number(job, 'open') > 0 and number(job, 'held') + size > tonumber(share_max) then return answer('wait') end
local function full() return tonumber(call('GET', P .. 'bytes') or 0) + size > tonumber(total_max) end
if full() then
  -- What failed long ago is kept for a retry only while nobody needs its place.
  for _, old in ipairs(call('ZRANGE', P .. 'ended', 0, -1)) do
    for _, other in ipairs(call('HKEYS', key('kept', old))) do drop(old, other) end
    if not full() then break end
  end
  if full() then return answer('full') end
end
call('INCRBY', P .. 'bytes', size)
call('HINCRBY', jk, 'held', size)
call('HSET', key('kept', job), index, size)
call('HSET', jk, 'reserved', index)
return answer('taken')
"""

_ADD = """
local job, index, head, text, staged = unpack(ARGV)
local jk = key('job', job)
if call('HGET', jk, 'closed') ~= '0' or call('HGET', jk, 'reserved') ~= index then
  call('DEL', key('content', job .. ':' .. index))
  return 0
end
call('HDEL', jk, 'reserved')
if staged == '1' then
  call('HSET', jk, 'staged', index, 'staged_head', head, 'staged_text', text)
else
  enter(job, index, head, text)
end
return 1
"""

_REFUSE = """
local job, index = ARGV[1], ARGV[2]
if call('HGET', key('job', job), 'closed') ~= '0' then return end
call('HINCRBY', key('job', job), 'documents', 1)
for place = 3, #ARGV do tell(job, index, ARGV[place]) end
"""

_CLOSE = "if call('EXISTS', key('job', ARGV[1])) == 1 then close(ARGV[1], ARGV[2] == '1') end"

_CLAIM = """
local replica, lease_ms = ARGV[1], tonumber(ARGV[2])
alive(replica, lease_ms)
while true do
  local tenant = call('ZRANGE', P .. 'tenants-waiting', 0, 0)[1]
  if not tenant then return false end
  local turn = call('INCR', P .. 'turn')
  local waiting = key('jobs-waiting', tenant)
  local job = call('ZRANGE', waiting, 0, 0)[1]
  local index = job and call('LPOP', key('queue', job))
  if job and call('LLEN', key('queue', job)) > 0 then call('ZADD', waiting, turn, job) elseif job then call('ZREM', waiting, job) end
  if call('ZCARD', waiting) > 0 then
    call('ZADD', P .. 'tenants-waiting', turn, tenant)
  else
    call('ZREM', P .. 'tenants-waiting', tenant)
  end
  if index then
    local jk, token = key('job', job), call('INCR', P .. 'fence')
    call('HSET', jk, 't:' .. index, token, 'r:' .. index, replica)
    call('SADD', key('claims', replica), job .. ' ' .. index .. ' ' .. token)
    local attempt = call('HINCRBY', jk, 'a:' .. index, 1)
    local known = call('HMGET', jk, 'user', 'key', 'o:' .. index)
    local head, latest = call('HGET', key('heads', job), index), call('HGET', key('latest', job), index)
    return {job, index, token, attempt, tenant, known[1], known[2] or '', known[3], head, latest}
  end
end
"""

_RECORD = """
local job, index, token, text, committing = unpack(ARGV)
local jk = key('job', job)
if call('HGET', jk, 't:' .. index) ~= token then return 0 end
tell(job, index, text)
if committing == '1' then call('HSET', jk, 'w:' .. index, '1') end
local stage = cjson.decode(text).stage
if FINAL[stage] then
  unclaim(job, index)
  if stage ~= 'failed' then drop(job, index) end
  call('HINCRBY', jk, 'open', -1)
  finish(job)
end
return 1
"""

_CANCEL = """
local job, only = ARGV[1], ARGV[2]
local jk, cancelled = key('job', job), 0
if only == '' then close(job, false) end
for _, index in ipairs(only ~= '' and {only} or call('HKEYS', key('latest', job))) do
  local text = call('HGET', key('latest', job), index)
  local row = text and cjson.decode(text)
  if row and not FINAL[row.stage] and call('HEXISTS', jk, 'w:' .. index) == 0 then
    row.stage = 'cancelled'
    tell(job, index, cjson.encode(row))
    call('LREM', key('queue', job), 0, index)
    unclaim(job, index)
    call('HINCRBY', jk, 'open', -1)
    cancelled = cancelled + 1
  end
end
finish(job)
return cancelled
"""

_RETRY = """
local job, only, jobs_max = ARGV[1], ARGV[2], tonumber(ARGV[3])
local jk, retried = key('job', job), 0
for _, index in ipairs(only ~= '' and {only} or call('HKEYS', key('kept', job))) do
  local text = call('HGET', key('latest', job), index)
  local row = text and cjson.decode(text)
  if row and (row.stage == 'failed' or row.stage == 'cancelled') and call('HEXISTS', key('kept', job), index) == 1 then
    if call('HEXISTS', jk, 'ended') == 1 then
      if call('ZCARD', P .. 'running') >= jobs_max then return -1 end
      call('HDEL', jk, 'ended')
      call('ZREM', P .. 'ended', job)
      call('ZADD', P .. 'running', call('HGET', jk, 'created'), job)
    end
    row.stage, row.chunks_total, row.chunks_done, row.error_reason, row.error_detail = 'received', 0, 0, '', ''
    call('HDEL', jk, 'd:' .. index)
    call('HSET', jk, 'o:' .. index, stamp())
    call('HINCRBY', jk, 'open', 1)
    tell(job, index, cjson.encode(row))
    queue(job, index)
    retried = retried + 1
  end
end
return retried
"""

_BEAT = "alive(ARGV[1], tonumber(ARGV[2])); return call('SMEMBERS', key('claims', ARGV[1]))"

_LEAVE = "hand_back(ARGV[1], false)"

_SWEEP = """
local before, events_max, jobs_max = now_us() - tonumber(ARGV[1]) * 1000000, tonumber(ARGV[2]), tonumber(ARGV[3])
for _ = 1, 100 do
  local oldest = call('ZRANGE', P .. 'ended', 0, 0, 'WITHSCORES')
  if not oldest[1] then return end
  local many = tonumber(call('GET', P .. 'told') or 0) > events_max or call('ZCARD', P .. 'ended') > jobs_max
  if tonumber(oldest[2]) > before and not many then return end
  forget(oldest[1])
end
"""

_YIELD_TURN = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"
_KEEP_TURN = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2]) or 0"


class RedisJobs:
    """JobStore in Redis, as one replica sees it.

    `blocking` is a client whose connections may wait: each reader of events holds one.
    """

    def __init__(
        self,
        client: redis.Redis,
        blocking: redis.Redis,
        replica: str,
        *,
        jobs_max: int,
        bytes_max: int,
        lease_s: float,
        kept_s: float,
        timeout_s: float,
    ) -> None:
        self._client: Any = client
        self._blocking: Any = blocking
        self._replica = replica
        self._jobs_max, self._bytes_max = jobs_max, bytes_max
        self._lease_ms, self._kept_s, self._timeout_s = int(lease_s * 1000), kept_s, timeout_s
        self._add = _LIBRARY + _ADD
        self._record = _LIBRARY + _RECORD
        bodies = {
            "begin": _BEGIN, "reserve": _RESERVE, "refuse": _REFUSE, "close": _CLOSE, "claim": _CLAIM, "cancel": _CANCEL,
            "retry": _RETRY, "beat": _BEAT, "leave": _LEAVE, "sweep": _SWEEP,
        }  # fmt: skip
        self._scripts = {name: client.register_script(_LIBRARY + body) for name, body in bodies.items()}

    async def begin(self, job_id: str, owner: Owner) -> bool:
        whose = (owner.tenant, owner.user, owner.api_key_id, _mine(owner))
        return bool(await self._run("begin", job_id, *whose, self._replica, self._jobs_max, self._lease_ms))

    async def reserve(self, job_id: str, index: int, size: int) -> Room:
        # Half of the store at most for one job, so that the next caller's document finds room.
        bounds = (self._bytes_max, self._bytes_max // 2)
        taken, told = await self._run("reserve", job_id, index, size, *bounds)
        return Room(Taken(taken.decode()), told)

    async def add(self, job_id: str, upload: Upload, received: Progress, pieces: Sequence[bytes], *, staged: bool) -> bool:
        async with self._asking(), self._client.pipeline(transaction=True) as pipeline:
            for piece in pieces:
                pipeline.rpush(_content(job_id, received.index), piece)
            values = (job_id, received.index, _pack(upload), _encode(received), int(staged))
            pipeline.eval(self._add, 1, PREFIX, *values)
            return bool((await pipeline.execute())[-1])

    async def refuse(self, job_id: str, events: Sequence[Progress]) -> None:
        await self._run("refuse", job_id, events[0].index, *map(_encode, events))

    async def close(self, job_id: str, *, commit: bool) -> None:
        await self._run("close", job_id, int(commit))

    async def claim(self) -> Claim | None:
        found = await self._run("claim", self._replica, self._lease_ms)
        if not found:
            return None
        job, index, token, attempt, tenant, user, api_key, received, head, latest = found
        return Claim(
            job.decode(),
            int(index),
            token,
            Owner(tenant.decode(), user.decode(), api_key.decode()),
            _unpack(head),
            replace(_progress(latest), attempt=attempt),
            int(received),
        )

    async def content(self, claim: Claim) -> bytes | None:
        async with self._asking():
            pieces = await self._client.lrange(_content(claim.job_id, claim.index), 0, -1)
        # A document without content is kept without pieces.
        return b"".join(pieces) if pieces or claim.latest.bytes == 0 else None

    async def record(self, told: Sequence[Told]) -> list[bool]:
        async with self._asking(), self._client.pipeline(transaction=False) as pipeline:
            for item in told:
                claim = item.claim
                values = (claim.job_id, claim.index, claim.token, _encode(item.progress), int(item.committing))
                pipeline.eval(self._record, 1, PREFIX, *values)
            return [bool(taken) for taken in await pipeline.execute()]

    async def cancel(self, job_id: str, index: int | None) -> int:
        return int(await self._run("cancel", job_id, "" if index is None else index))

    async def retry(self, job_id: str, index: int | None) -> int | None:
        retried = int(await self._run("retry", job_id, "" if index is None else index, self._jobs_max))
        return None if retried < 0 else retried

    async def job(self, job_id: str) -> JobState | None:
        async with self._asking():
            (state,) = await self._states([job_id])
        return state

    async def latest(self, job_id: str) -> list[Progress]:
        async with self._asking():
            rows = await self._client.hvals(f"{PREFIX}latest:{job_id}")
        return sorted(map(_progress, rows), key=lambda row: row.index)

    async def page(self, tenant: str, user: str, limit: int, before_us: int | None) -> list[JobState]:
        place = f"{PREFIX}mine:{_mine(Owner(tenant, user))}" if user else f"{PREFIX}jobs:{tenant}"
        top = "+inf" if before_us is None else f"({before_us}"
        async with self._asking():
            ids = await self._client.zrevrangebyscore(place, top, "-inf", start=0, num=limit)
            return [state for state in await self._states([id_.decode() for id_ in ids]) if state is not None]

    async def _states(self, job_ids: Sequence[str]) -> list[JobState | None]:
        async with self._client.pipeline(transaction=False) as pipeline:
            names = ("tenant", "user", "created", "closed", "ended", "documents", "bytes", "chunks_total", "chunks_done")
            for job_id in job_ids:
                pipeline.hmget(f"{PREFIX}job:{job_id}", *names, *(f"s:{stage}" for stage in Stage))
            rows = await pipeline.execute() if job_ids else []
        return [_state(job_id, row) for job_id, row in zip(job_ids, rows, strict=True)]

    async def events(self, job_id: str) -> AsyncIterator[Progress]:
        stream, place, ending, heard_at = f"{PREFIX}events:{job_id}", "0-0", False, time.monotonic()
        while True:
            rows: list[Any] = []
            try:
                async with self._asking(READ_WAIT_MS / 1000):
                    found = await self._blocking.xread({stream: place}, count=READ_EVENTS_MAX, block=None if ending else READ_WAIT_MS)
                rows = found[0][1] if found else []
                # An end is one unless the job was taken up again since; and a job that was forgotten has no more to say.
                state = None if rows and b"x" not in rows[-1][1] else await self.job(job_id)
                heard_at = time.monotonic()
            except Unavailable:  # who watches has nothing better to do than to wait, and what is told meanwhile is not lost
                if time.monotonic() - heard_at > WATCH_PATIENCE_S:
                    raise
                await asyncio.sleep(WATCH_RETRY_S)
                continue
            for number, fields in rows:
                place = number.decode()
                if b"e" in fields:
                    yield _progress(fields[b"e"])
            if not rows and (state is None or (ending and state.ended)):
                return
            ending = state is not None and state.ended

    async def beat(self) -> set[str]:
        return {member.decode() for member in await self._run("beat", self._replica, self._lease_ms)}

    async def leave(self) -> None:
        await self._run("leave", self._replica)

    async def sweep(self) -> None:
        await self._run("sweep", self._kept_s, EVENTS_KEPT_MAX, JOBS_KEPT_MAX)

    async def check(self) -> None:
        async with self._asking():
            await self._client.ping()

    @contextlib.asynccontextmanager
    async def turn(self, document_id: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Wait until nobody else changes the document. Raises Overloaded if that takes too long.

        The turn is kept by a lease, so that a replica that dies in it stops nobody for long. One that only stood still learns from what
        this yields that it has lost it.
        """
        place, mine = f"{PREFIX}turn:{document_id}", secrets.token_hex(8)
        give_up = time.monotonic() + TURN_WAIT_S
        while True:
            async with self._asking():
                if await self._client.set(place, mine, nx=True, px=TURN_LEASE_MS):
                    break
            if time.monotonic() > give_up:
                raise Overloaded("the document is being changed by another", retry_after_ms=5000)
            await asyncio.sleep(TURN_RETRY_S)

        async def renew() -> None:
            async with self._asking():
                if not await self._client.eval(_KEEP_TURN, 1, place, mine, TURN_LEASE_MS):
                    raise Unavailable("the document was taken over by another while this replica stood still", dependency="redis")

        keeping = asyncio.create_task(self._keep_turn(place, mine), name="keep the turn")
        try:
            yield renew
        finally:
            await ended(keeping)
            with contextlib.suppress(Unavailable):  # then the lease ends it
                async with self._asking():
                    await self._client.eval(_YIELD_TURN, 1, place, mine)

    async def _keep_turn(self, place: str, mine: str) -> None:
        while True:
            await asyncio.sleep(TURN_LEASE_MS / 3000)
            with contextlib.suppress(Unavailable):
                async with self._asking():
                    await self._client.eval(_KEEP_TURN, 1, place, mine, TURN_LEASE_MS)

    async def _run(self, script: str, *values: Any) -> Any:
        async with self._asking():
            return await self._scripts[script]([PREFIX], values)

    @contextlib.asynccontextmanager
    async def _asking(self, wait_s: float = 0.0) -> AsyncIterator[None]:
        """One question to the store, within its time."""
        with _errors_are_unavailable():
            async with asyncio.timeout(wait_s + self._timeout_s):
                yield


@contextlib.contextmanager
def _errors_are_unavailable() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise Unavailable("the store of ingestion jobs cannot be reached", dependency="redis") from error


def _mine(owner: Owner) -> str:
    return f"{len(owner.tenant)}:{owner.tenant}:{owner.user}"


def _content(job_id: str, index: int) -> str:
    return f"{PREFIX}content:{job_id}:{index}"


def _state(job_id: str, row: Sequence[bytes | None]) -> JobState | None:
    tenant, user, created, closed, ended, documents, size, chunks_total, chunks_done, *stages = row
    if tenant is None or user is None:
        return None
    counts = {stage.value: int(count or 0) for stage, count in zip(Stage, stages, strict=True)}
    return JobState(
        job_id,
        Owner(tenant.decode(), user.decode()),
        int(created or 0),
        closed == b"1",
        ended is not None,
        int(documents or 0),
        int(size or 0),
        int(chunks_total or 0),
        int(chunks_done or 0),
        {stage: count for stage, count in counts.items() if count},
    )
