"""Connections to PostgreSQL and its failures as ours. What is asked of it is in the other postgres files.

A connection that was cancelled or failed in the middle is closed, never handed to the next caller. Every unit of work the
ledger does can be done twice with the same outcome, so one that lost its connection is tried once more.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import asyncpg
import structlog

from services.chassis.errors import DomainError, Overloaded, Unavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")
Connection = Any
"""An asyncpg connection or its pooled proxy; asyncpg has no types of its own."""
Work = Callable[[Connection], Awaitable[T]]

ALL = ""
"""No single tenant: all of them, and no tenant has this name."""
ACQUIRE_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 3.0
COMMAND_TIMEOUT_S = 10.0
IDLE_IN_TRANSACTION_MAX_S = 5.0
"""How long the database waits for the next word of a replica in the middle of a transaction. One that stands still there, or whose machine
is gone, would keep its locks, and everybody who needs the same rows would wait with it."""
TRIES_MAX = 3
RETRY_PAUSE_S = 0.05
OPEN_AT_START = 4
"""A new connection costs 10-20 ms, most of it SCRAM in Python, and the first token would wait for it. What is open stays open."""

_AWAY = (OSError, asyncpg.PostgresConnectionError, asyncpg.InternalClientError, asyncpg.TooManyConnectionsError)
_SHUTTING = (asyncpg.CannotConnectNowError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError)
_TROUBLED = ("53", "57", "58", "F0", "XX", "25006")
"""How codes begin that tell of the server and not of what it was asked: no room, ended from outside, files that cannot be read or are
damaged, and one that may only be read, as after a failover. Source: PostgreSQL, appendix A, error codes."""
_CLASHED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)


class ScopedConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that knows for whom it works: a tenant, or "" for all, as the owner of the tables. It begins as the owner."""

    __slots__ = ("_scope",)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._scope: str | None = ALL

    async def enter(self, scope: str) -> None:
        """Work for `scope` from now on. Costs a round trip if it worked for another before."""
        if scope == self._scope:
            return
        self._scope = None  # until the server has said so
        await (self.execute("SELECT enter_tenant($1, false)", scope) if scope else self.execute("SELECT leave_tenant()"))
        self._scope = scope


class Queries(Protocol):
    """What can be asked, for whomever it is."""

    async def run(self, work: Work[T]) -> T:
        """Do `work` on a connection. Raises Unavailable or Overloaded; whatever DomainError `work` raises passes."""
        ...

    async def fetch(self, query: str, *arguments: object) -> list[Any]:
        return await self.run(lambda connection: connection.fetch(query, *arguments))

    async def row(self, query: str, *arguments: object) -> Any:
        """The first row, or None."""
        return await self.run(lambda connection: connection.fetchrow(query, *arguments))

    async def value(self, query: str, *arguments: object) -> Any:
        """The first column of the first row, or None."""
        return await self.run(lambda connection: connection.fetchval(query, *arguments))


class Database(Queries):
    """A pool of connections. What it is asked itself goes across tenants; work for one tenant goes through `of`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def of(self, tenant: str) -> Queries:
        """The same, but row security hides what is not the tenant's."""
        return _Scoped(self, tenant)

    def self_scoped(self) -> Queries:
        """For functions that enter the tenant they are given by themselves, or need none: no round trip goes into saying it before."""
        return _Scoped(self, None)

    async def run(self, work: Work[T]) -> T:
        return await self.run_for(ALL, work)

    async def run_for(self, scope: str | None, work: Work[T]) -> T:
        """Do `work` for a tenant, for ALL, or, if None, for whomever the connection worked for last."""
        for attempt in range(1, TRIES_MAX + 1):
            try:
                async with self._connection() as connection:
                    if scope is not None:
                        await connection.enter(scope)
                    return await work(connection)
            except _Clash:
                if attempt == TRIES_MAX:
                    raise Overloaded("too many changes to the same rows at once", retry_after_ms=200) from None
            except Unavailable:
                if attempt >= 2:
                    raise
            await asyncio.sleep(random.uniform(0, RETRY_PAUSE_S))  # noqa: S311 - jitter
        raise AssertionError("unreachable")

    async def probe(self) -> None:
        """Raise unless the database answers."""
        async with self._connection() as connection:
            await connection.execute("SELECT 1")

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        try:
            connection = await self._pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
        except TimeoutError as error:
            if self._pool.get_size() - self._pool.get_idle_size() >= self._pool.get_max_size():
                raise Overloaded("every connection to the database is in use", retry_after_ms=500) from error
            raise _away(error) from error
        except Exception as error:
            raise _translated(error, closed=True) from error
        try:
            yield connection
        except DomainError:
            raise
        except asyncio.CancelledError:
            _cut(connection)
            raise
        except Exception as error:
            translated = _translated(error, closed=_lost(connection))
            if isinstance(translated, Unavailable):
                _cut(connection)
            if translated is error:
                raise
            raise translated from error
        finally:
            await self._pool.release(connection)


class _Scoped(Queries):
    def __init__(self, database: Database, scope: str | None) -> None:
        self._database, self._scope = database, scope

    async def run(self, work: Work[T]) -> T:
        return await self._database.run_for(self._scope, work)


class _Clash(Exception):
    """Two transactions stood in each other's way, and this one was undone."""


def _lost(connection: Connection) -> bool:
    """Whether the connection is gone. The pool takes one that broke back at once, and then even the question is an error."""
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        return True


def _cut(connection: Connection) -> None:
    """Close without a word to the server, unless the pool has done so already."""
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


def _translated(error: Exception, *, closed: bool) -> Exception:
    if isinstance(error, (*_AWAY, *_SHUTTING)) or (closed and isinstance(error, asyncpg.InterfaceError)):
        return _away(error)
    if isinstance(error, _CLASHED):
        return _Clash()
    if isinstance(error, asyncpg.PostgresError) and str(error.sqlstate).startswith(_TROUBLED):
        log.error("database_in_trouble", error=type(error).__name__, sqlstate=error.sqlstate)
        return Unavailable(f"the database is in trouble ({type(error).__name__})", dependency="postgres")
    return error


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"the database is not reachable ({type(error).__name__})", dependency="postgres")


async def _leave_clean(connection: Connection) -> None:
    """Replaces the pool's own reset, one more round trip for each call: a session keeps for whom it works, and nothing else."""
    assert not connection.is_in_transaction()


@contextlib.asynccontextmanager
async def opened(url: str, *, connections_max: int, wait_s: float) -> AsyncIterator[Database]:
    """A pool, once the database answers. Raises ConnectionError if it does not within `wait_s` or refuses us."""
    pool = await _first_answer(url, connections_max, wait_s)
    try:
        yield Database(pool)
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                await pool.close()
        pool.terminate()


async def _first_answer(url: str, connections_max: int, wait_s: float) -> Any:
    ends_at = asyncio.get_running_loop().time() + wait_s
    waiting = False
    while True:
        try:
            return await asyncpg.create_pool(
                url,
                connection_class=ScopedConnection,
                init_size=min(OPEN_AT_START, connections_max),
                min_size=0,
                max_size=connections_max,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
                reset=_leave_clean,
                max_inactive_connection_lifetime=0,
                server_settings={
                    "application_name": "tailrace-ledger",
                    "timezone": "UTC",
                    "jit": "off",  # compiling a plan takes longer than any of our queries
                    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_MAX_S * 1000:.0f}",
                },
            )
        except (*_AWAY, *_SHUTTING) as error:
            if asyncio.get_running_loop().time() > ends_at:
                raise ConnectionError(f"the database in DATABASE_URL does not answer: {type(error).__name__}") from error
            if not waiting:
                log.warning("waiting_for_database", error=type(error).__name__)
                waiting = True
            await asyncio.sleep(0.2)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            raise ConnectionError(f"the database in DATABASE_URL refuses us: {type(error).__name__}") from error
