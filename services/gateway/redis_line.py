"""One connection to Redis that all calls of a process share: each leaves at once, and replies are handed out in the order of the calls.

A connection that is taken from a pool and given back costs more CPU than the call it is taken for. What is asked is not known here.
"""

import asyncio
import contextlib
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from services.chassis.ending import ended

SILENCE_MAX_S = 1.0
"""How long the oldest call may wait for its reply before the connection counts as lost."""
WAITING_MAX = 10_000
"""Calls under way at the same time."""


@dataclass(eq=False)
class _Open:
    """A connection that is open, and who waits for its replies: when each called and where the reply goes, oldest first."""

    connection: Any
    waiting: deque[tuple[float, asyncio.Future[Any]]] = field(default_factory=deque)
    reading: asyncio.Task[None] | None = None
    silence: asyncio.TimerHandle | None = None


class RedisLine:
    """Calls over one connection, which is made when it is first needed and again when it was lost. Use within one event loop.

    Errors: a call raises RedisError, or OSError, if the connection is or gets lost; then it may or may not have been carried out, and it
    is not made again. A silence of `silence_max_s` loses the connection, and fails every call that waits.
    Cancellation: a call that is given up costs the others nothing; its reply is thrown away when it comes.
    """

    def __init__(self, pool: "redis.ConnectionPool", *, silence_max_s: float = SILENCE_MAX_S) -> None:
        """`pool` says where Redis is and how it is reached; what it says of time limits holds for reaching it alone."""
        self._pool: Any = pool
        self._silence_max_s = silence_max_s
        self._open: _Open | None = None
        self._opening = asyncio.Lock()

    async def evalsha(self, sha: str, keys: int, *arguments: str | int) -> Any:
        """Run a script that Redis knows. Raises NoScriptError if it does not."""
        return await self._call("EVALSHA", sha, keys, *arguments)

    async def eval(self, script: str, keys: int, *arguments: str | int) -> Any:
        """Run a script."""
        return await self._call("EVAL", script, keys, *arguments)

    async def ping(self) -> None:
        """Raises if Redis does not answer."""
        await self._call("PING")

    async def aclose(self) -> None:
        """Close the connection; calls under way fail."""
        if self._open is not None and self._open.reading is not None:
            await ended(self._open.reading)

    async def _call(self, *command: str | int) -> Any:
        line = self._open
        if line is None or not line.connection.is_connected:
            line = await self._opened()
        if len(line.waiting) >= WAITING_MAX:
            raise RedisConnectionError("too many calls wait for Redis")
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        line.waiting.append((loop.time(), reply))
        if line.silence is None:
            line.silence = loop.call_later(self._silence_max_s, self._look, line)
        # Nothing is awaited before the command is in the socket's buffer, so that the order of the calls is that of the commands.
        await line.connection.send_packed_command(line.connection.pack_command(*command), check_health=False)
        return await reply

    async def _opened(self) -> _Open:
        async with self._opening:
            if self._open is None or not self._open.connection.is_connected:
                line = _Open(self._pool.make_connection())
                try:
                    await line.connection.connect()
                except BaseException:
                    await line.connection.disconnect(nowait=True)
                    raise
                # With a limit of its own every command would be sent by a task of its own, out of turn; here `_look` sees to silences.
                line.connection.socket_timeout = None
                line.reading = asyncio.create_task(self._read(line), name="redis-line")
                self._open = line
            return self._open

    async def _read(self, line: _Open) -> None:
        """Hand out replies until the connection is lost or this is cancelled."""
        error: Exception = RedisConnectionError("the connection to Redis was closed")
        try:
            while True:
                failure: ResponseError | None = None
                value = None
                try:
                    value = await line.connection.read_response(timeout=math.inf)
                except ResponseError as refused:
                    failure = refused
                if not line.waiting:
                    raise RedisConnectionError("a reply came that nobody waits for")
                _, reply = line.waiting.popleft()
                if reply.done():
                    continue
                if failure is None:
                    reply.set_result(value)
                else:
                    reply.set_exception(failure)
        except (RedisError, OSError) as lost:
            error = lost
        finally:
            if self._open is line:
                self._open = None
            if line.silence is not None:
                line.silence.cancel()
            for _, reply in line.waiting:
                if not reply.done():
                    reply.set_exception(error)
                    reply.exception()  # its caller may have gone meanwhile
            line.waiting.clear()
            with contextlib.suppress(RedisError, OSError):
                await line.connection.disconnect(nowait=True)

    def _look(self, line: _Open) -> None:
        """Lose a connection whose oldest call has waited too long. One timer, and none a call."""
        loop = asyncio.get_running_loop()
        line.silence = None
        if not line.waiting:
            return
        left_s = line.waiting[0][0] + self._silence_max_s - loop.time()
        if left_s > 0:
            line.silence = loop.call_later(left_s, self._look, line)
        elif line.reading is not None:
            line.reading.cancel()
