"""Operations as they are recorded, by whichever replica: LISTEN/NOTIFY fanned out to the watchers of this process. It stores nothing."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
import orjson
import structlog

from services.chassis.errors import DomainError, Overloaded
from services.chassis.principal import Principal
from services.ledger.domain import Operation
from services.ledger.postgres_database import CONNECT_TIMEOUT_S, Connection, Database
from services.ledger.postgres_operations import recorded, recorded_since

log = structlog.get_logger(__name__)

CHANNEL = "tailrace_operations"
WATCHERS_MAX = 500
WAITING_MAX = 256
"""Operations that may wait for a slow watcher before it is let go."""
NOTICES_MAX = 10_000
CATCH_UP_MAX = 1_000
OVERLAP = timedelta(seconds=10)
"""Rows carry the time they were written, not the time they could be seen; a transaction takes less than this."""
RECONNECT_S = 0.5


class Watcher:
    """One reader of the feed."""

    def __init__(self, principal: Principal) -> None:
        self._tenant = principal.tenant
        self._user = None if "admin" in principal.roles else principal.user
        self._waiting: asyncio.Queue[Operation | None] = asyncio.Queue(WAITING_MAX + 1)
        self._behind = False

    def may_see(self, tenant: str, user: str) -> bool:
        return tenant == self._tenant and self._user in (None, user)

    def offer(self, operation: Operation) -> None:
        if self._waiting.qsize() < WAITING_MAX:
            self._waiting.put_nowait(operation)
        else:
            self._behind = True

    def end(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._waiting.put_nowait(None)

    async def next(self) -> Operation | None:
        if self._behind and self._waiting.empty():
            raise Overloaded("the watcher reads more slowly than operations are recorded", retry_after_ms=1000)
        return await self._waiting.get()


class PostgresFeed:
    """Hears of recorded operations on a connection of its own, and hands them to the watchers that may see them."""

    def __init__(self, url: str, database: Database) -> None:
        self._url, self._database = url, database
        self._watchers: set[Watcher] = set()
        self._recent: deque[str] = deque(maxlen=CATCH_UP_MAX)
        self._seen_until = datetime.now(UTC)
        self._ended = False

    @contextlib.contextmanager
    def watching(self, principal: Principal) -> Iterator[Watcher]:
        if len(self._watchers) >= WATCHERS_MAX:
            raise Overloaded("too many watchers", retry_after_ms=5000)
        watcher = Watcher(principal)
        self._watchers.add(watcher)
        if self._ended:
            watcher.end()
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def end(self) -> None:
        self._ended = True
        for watcher in self._watchers:
            watcher.end()

    async def run(self) -> None:
        """Listen until cancelled; after a lost connection, also look for what was recorded meanwhile."""
        while True:
            try:
                connection = await asyncpg.connect(self._url, timeout=CONNECT_TIMEOUT_S, server_settings={"timezone": "UTC"})
                try:
                    await self._listen(connection)
                finally:
                    connection.terminate()
            except (OSError, DomainError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                log.warning("feed_interrupted", error=type(error).__name__)
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, connection: Connection) -> None:
        notices: asyncio.Queue[str | None] = asyncio.Queue(NOTICES_MAX)

        def heard(_: object, __: int, ___: str, payload: str) -> None:
            try:
                notices.put_nowait(payload)
            except asyncio.QueueFull:
                connection.terminate()  # what was missed is caught up with on the next connection

        def lost(_: object) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                notices.put_nowait(None)

        connection.add_termination_listener(lost)
        await connection.add_listener(CHANNEL, heard)
        for operation, moment in await recorded_since(connection, self._seen_until - OVERLAP, CATCH_UP_MAX):
            self._hand_out(operation, moment)
        while (payload := await notices.get()) is not None:
            tenant, user, operation_id = orjson.loads(payload)
            if any(watcher.may_see(tenant, user) for watcher in self._watchers):
                found = await self._database.of(tenant).run(lambda pooled, t=tenant, o=operation_id: recorded(pooled, t, UUID(o)))  # type: ignore[misc]
                if found is not None:
                    self._hand_out(*found)

    def _hand_out(self, operation: Operation, moment: datetime) -> None:
        self._seen_until = max(self._seen_until, moment)
        if operation.operation_id in self._recent:
            return
        self._recent.append(operation.operation_id)
        for watcher in self._watchers:
            if watcher.may_see(operation.tenant, operation.user):
                watcher.offer(operation)
