"""The shared logs in Redis: a stream and a hash for each answer, a string for each idempotency key, a lease for each replica.

An event has the explicit id `<sequence>-0`, so that Redis itself refuses a number twice. Whoever may append, end or interrupt is decided
in the scripts, because between a question and an answer over the network another replica may have spoken. No answer is made here.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from services.chassis.errors import DomainError, Unavailable, restore
from services.orchestrator.domain import Claim, LogPart, LogReply, SharedAnswer, SharedEvents

READ_EVENTS_MAX = 1_000
KEY_LIFE_S = 86_400
"""How long an idempotency key stands for its answer."""
FOLLOWED_S = 10
BRIEF_S = 30
"""How long an ended log is kept when there are too many: enough for a browser that lost its line to come back."""
WALK_KEYS = 500
FORGOTTEN_S = 60
"""How long it is known that a log was forgotten: until whoever may still append to it has tried."""
_NOBODY = b"-"
"""Who makes a log that was forgotten."""
_ANSWER, _KEY = "tailrace:answer:", "tailrace:key:"
_DONE = b"-"
"""What the end of a log says if the answer ended well; otherwise it is the failure."""


class _Failure(msgspec.Struct):
    reason: str
    detail: str
    metadata: dict[str, str]
    code: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Failure).decode

_APPEND = """
local replica, tenant, user, life = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local first, over, after, known_for, left = tonumber(ARGV[5]), ARGV[6], ARGV[7], life, ARGV[9]
local known = redis.call('HMGET', KEYS[1], 'replica', 'end', 'cancel')
if known[1] and known[1] ~= replica or known[2] then return {'fenced', 0, 0} end
local last = 0
local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if newest[1] then last = tonumber(string.match(newest[1][1], '^%d+')) end
if last + 1 < first then return {'unknown', 0, 0} end
if not known[1] then redis.call('HSET', KEYS[1], 'replica', replica, 'tenant', tenant, 'user', user) end
if left ~= '' then redis.call('HSET', KEYS[1], 'left', left) end
for i = 10, #ARGV do
  local sequence = first + i - 10
  if sequence > last then
    redis.call('XADD', KEYS[2], string.format('%d-0', sequence), 'e', ARGV[i])
    last = sequence
  end
end
if over ~= '' then
  redis.call('XADD', KEYS[2], string.format('%d-0', last + 1), 'x', over)
  redis.call('HSET', KEYS[1], 'end', over)
  life, known_for = after, ARGV[8]
end
redis.call('EXPIRE', KEYS[1], known_for)
redis.call('EXPIRE', KEYS[2], life)
return {'taken', known[3] and 1 or 0, redis.call('EXISTS', KEYS[3])}
"""

_INTERRUPT = """
local known = redis.call('HMGET', KEYS[1], 'replica', 'end')
if known[1] ~= ARGV[1] or known[2] then return 0 end
local last = 0
local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if newest[1] then last = tonumber(string.match(newest[1][1], '^%d+')) end
redis.call('XADD', KEYS[2], string.format('%d-0', last + 1), 'x', ARGV[2])
redis.call('HSET', KEYS[1], 'end', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""

_CLAIM_AGAIN = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""


class RedisLogs:
    """SharedLogs on Redis or Valkey.

    `blocking` is a client whose connections may wait: each reader and the listener for cancels hold one. A command that is cancelled
    costs its connection.
    """

    def __init__(
        self, client: redis.Redis, blocking: redis.Redis, *, running_life_s: int, ended_life_s: int, lease_s: float, timeout_s: float
    ) -> None:
        self._client: Any = client
        self._blocking: Any = blocking
        self._running_life_s, self._ended_life_s = running_life_s, ended_life_s
        self._lease_ms, self._timeout_s = int(lease_s * 1000), timeout_s
        self._append = client.register_script(_APPEND)
        self._interrupt = client.register_script(_INTERRUPT)
        self._claim_again = client.register_script(_CLAIM_AGAIN)

    async def register(self, answer_id: str, owner: tuple[str, str], replica: str) -> None:
        part = LogPart(answer_id, owner, 1, ())
        await self.append(replica, [part])

    async def claim(self, owner: tuple[str, str], key: str, claim: Claim) -> Claim | None:
        async with self._asking():
            held = await self._client.set(_claim_key(owner, key), _claim_value(claim), nx=True, get=True, ex=KEY_LIFE_S)
        return _claim_of(held) if isinstance(held, bytes) else None

    async def claimed(self, owner: tuple[str, str], key: str) -> Claim | None:
        async with self._asking():
            held = await self._client.get(_claim_key(owner, key))
        return _claim_of(held) if isinstance(held, bytes) else None

    async def claim_again(self, owner: tuple[str, str], key: str, old: Claim, new: Claim) -> bool:
        async with self._asking():
            return bool(await self._claim_again([_claim_key(owner, key)], [_claim_value(old), _claim_value(new), KEY_LIFE_S]))

    async def append(self, replica: str, parts: Sequence[LogPart]) -> Sequence[LogReply]:
        async with self._asking():
            try:
                replies = await self._append_all(replica, parts)
            except NoScriptError:  # a restarted Redis has forgotten it
                await self._client.script_load(_APPEND)
                replies = await self._append_all(replica, parts)
        return [LogReply(word.decode(), bool(cancel), bool(followed)) for word, cancel, followed in replies]

    async def _append_all(self, replica: str, parts: Sequence[LogPart]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for part in parts:
                over = b"" if not part.ended else _DONE if part.failure is None else _failure(part.failure)
                after_s = min(BRIEF_S, self._ended_life_s) if part.brief else self._ended_life_s
                pipeline.evalsha(
                    self._append.sha,
                    3,
                    *_keys(part.answer_id),
                    _followed(part.answer_id),
                    *(replica, *part.owner, self._running_life_s, part.first, over, after_s, KEY_LIFE_S if part.keyed else after_s),
                    "" if part.left_at is None else part.left_at,
                    *part.payloads,
                )
            return list(await pipeline.execute())

    async def look_up(self, answer_id: str) -> SharedAnswer | None:
        answer, events = _keys(answer_id)
        async with self._asking(), self._client.pipeline(transaction=True) as pipeline:
            pipeline.hmget(answer, "tenant", "user", "replica", "end", "left")
            pipeline.exists(events)
            (tenant, user, replica, end, left), kept = await pipeline.execute()
        if replica is None or replica == _NOBODY:
            return None
        failure = _failure_of(end) if end is not None else None
        return SharedAnswer(
            (tenant.decode(), user.decode()), replica.decode(), end is not None, failure, end is not None and not kept, _number(left)
        )

    async def read(self, answer_id: str, after: int, wait_s: float) -> SharedEvents:
        answer, stream = _keys(answer_id)
        async with self._asking(wait_s), self._blocking.pipeline(transaction=False) as pipeline:
            pipeline.xread({stream: f"{after}-0"}, count=READ_EVENTS_MAX, block=max(1, int(wait_s * 1000)))
            pipeline.hget(answer, "left")  # asked after the events, so none of them came after what it says
            found, left = await pipeline.execute()
        rows = found[0][1] if found else []
        events, ended, failure = [], False, None
        for number, fields in rows:
            if b"x" in fields:
                ended, failure = True, _failure_of(fields[b"x"])
            else:
                events.append((int(number.partition(b"-")[0]), fields[b"e"]))
        return SharedEvents(tuple(events), ended, failure, _number(left))

    async def interrupt(self, answer_id: str, replica: str, failure: DomainError) -> bool:
        async with self._asking():
            return bool(await self._interrupt(list(_keys(answer_id)), [replica, _failure(failure), self._ended_life_s]))

    async def forget(self, owner: tuple[str, str]) -> int:
        # All keys are walked, a part of them within the time of one question: erasing is rare, and an index would be written always.
        theirs = set[str]()
        async for answers in self._walk(_ANSWER):
            async with self._asking(), self._client.pipeline(transaction=False) as pipeline:
                for answer in answers:
                    pipeline.hmget(answer, "tenant", "user")
                said = await pipeline.execute()
            mine = [part.encode() for part in owner]
            theirs |= {answer.decode()[len(_ANSWER) :].strip("{}") for answer, whose in zip(answers, said, strict=True) if whose == mine}
        async for keys in self._walk(_KEY):
            async with self._asking():
                held = await self._client.mget(keys)
                stale = [key for key, value in zip(keys, held, strict=True) if value and _claim_of(value).answer_id in theirs]
                if stale:
                    await self._client.delete(*stale)
        for answer_id in theirs:
            known, events = _keys(answer_id)
            async with self._asking(), self._client.pipeline(transaction=True) as pipeline:
                pipeline.delete(known, events)
                pipeline.hset(known, "replica", _NOBODY)
                pipeline.expire(known, FORGOTTEN_S)
                await pipeline.execute()
        return len(theirs)

    async def _walk(self, prefix: str) -> AsyncIterator[list[bytes]]:
        """Keys that begin with `prefix`, a handful at a time; one may come twice."""
        cursor = 0
        while True:
            async with self._asking():
                cursor, found = await self._client.scan(cursor, match=f"{prefix}*", count=WALK_KEYS)
            if found:
                yield found
            if cursor == 0:
                return

    async def ask_to_cancel(self, answer_id: str, replica: str) -> bool:
        async with self._asking(), self._client.pipeline(transaction=False) as pipeline:
            pipeline.publish(_channel(replica), answer_id)
            pipeline.hset(_keys(answer_id)[0], "cancel", "1")
            pipeline.exists(_lease(replica))
            return bool((await pipeline.execute())[-1])

    async def asked_to_cancel(self, answer_ids: Sequence[str]) -> Sequence[str]:
        if not answer_ids:
            return ()
        async with self._asking(), self._client.pipeline(transaction=False) as pipeline:
            for answer_id in answer_ids:
                pipeline.hexists(_keys(answer_id)[0], "cancel")
            asked = await pipeline.execute()
        return [answer_id for answer_id, wish in zip(answer_ids, asked, strict=True) if wish]

    async def renew(self, replica: str) -> None:
        async with self._asking():
            await self._client.set(_lease(replica), "1", px=self._lease_ms)

    async def is_alive(self, replica: str) -> bool:
        async with self._asking():
            return bool(await self._client.exists(_lease(replica)))

    async def follow(self, answer_id: str) -> None:
        async with self._asking():
            await self._client.set(_followed(answer_id), "1", ex=FOLLOWED_S)

    async def is_followed(self, answer_id: str) -> bool:
        async with self._asking():
            return bool(await self._client.exists(_followed(answer_id)))

    async def cancels(self, replica: str) -> AsyncIterator[str]:
        with _errors_are_unavailable():
            async with self._blocking.pubsub(ignore_subscribe_messages=True) as channel:
                await channel.subscribe(_channel(replica))
                async for message in channel.listen():
                    yield message["data"].decode()

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
    except ResponseError as error:
        raise Unavailable("the shared logs refused a command", dependency="redis") from error
    except (RedisError, OSError, TimeoutError) as error:
        raise Unavailable("the shared logs cannot be reached", dependency="redis") from error


def _keys(answer_id: str) -> tuple[str, str]:
    """Hash and stream of an answer; the braces keep them in one slot of a cluster."""
    return f"{_ANSWER}{{{answer_id}}}", f"tailrace:events:{{{answer_id}}}"


def _followed(answer_id: str) -> str:
    return f"tailrace:followed:{{{answer_id}}}"


def _lease(replica: str) -> str:
    return f"tailrace:replica:{replica}"


def _channel(replica: str) -> str:
    return f"tailrace:control:{replica}"


def _claim_key(owner: tuple[str, str], key: str) -> str:
    """Names and keys are arbitrary; a digest of all three, with lengths, cannot be made to collide with another owner's."""
    digest = hashlib.sha256()
    for part in (*owner, key):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return f"{_KEY}{digest.hexdigest()}"


def _claim_value(claim: Claim) -> bytes:
    return claim.answer_id.encode() + b"\n" + claim.fingerprint


def _claim_of(value: bytes) -> Claim:
    answer_id, _, fingerprint = value.partition(b"\n")
    return Claim(answer_id.decode(), fingerprint)


def _number(value: bytes | None) -> int | None:
    return None if value is None else int(value)


def _failure(error: DomainError) -> bytes:
    return _encode(_Failure(error.reason, error.detail, error.metadata, error.code))


def _failure_of(value: bytes) -> DomainError | None:
    if value == _DONE:
        return None
    kept = _decode(value)
    return restore(kept.reason, kept.detail, kept.metadata, kept.code)
