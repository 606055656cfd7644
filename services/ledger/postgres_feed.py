"""Operations as they are recorded, by whichever replica: LISTEN/NOTIFY fanned out to the watchers of this process. It stores nothing."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from datetime import datetime, timedelta
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
CATCH_UP_PAGE = 100
"""Fewer than may wait for a watcher: who keeps up is not let go for what was missed."""
PATIENCE_S = 1.0
"""How long a page that was missed waits for watchers to read the one before."""
OVERLAP = timedelta(seconds=10)
"""Rows carry the time they were written, not the time they could be seen; a transaction takes less than this."""
RECENT_MAX = 20_000
"""What may be recorded within OVERLAP, so that nothing is handed out twice."""
RECONNECT_S = 0.5
NO_ID = UUID(int=0)


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
        operation = await self._waiting.get()
        self._waiting.task_done()
        return operation

    async def caught_up(self) -> None:
        """Wait until all that was offered is taken; of one that is too slow nothing is expected any more."""
        if not self._behind:
            await self._waiting.join()


class PostgresFeed:
    """Hears of recorded operations on a connection of its own, and hands them to the watchers that may see them."""

    def __init__(self, url: str, database: Database) -> None:
        self._url, self._database = url, database
        self._watchers: set[Watcher] = set()
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Tenant and id of what was heard of last, whether or not anybody watched."""
        self._seen_until: datetime | None = None
        """What was recorded before is seen, but for OVERLAP. By the database's clock; None until it was asked."""
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
        notices: asyncio.Queue[tuple[str, datetime] | None] = asyncio.Queue()
        clock = asyncio.get_running_loop().time
        began, began_s = await connection.fetchval("SELECT clock_timestamp()"), clock()

        def heard(_: object, __: int, ___: str, payload: str) -> None:
            if notices.qsize() < NOTICES_MAX:
                notices.put_nowait((payload, began + timedelta(seconds=clock() - began_s)))
            else:
                connection.terminate()  # what was missed is caught up with on the next connection

        connection.add_termination_listener(lambda _: notices.put_nowait(None))
        await connection.add_listener(CHANNEL, heard)
        await self._catch_up(connection, (self._seen_until or began) - OVERLAP)
        self._seen_until = max(self._seen_until or began, began)
        while (notice := await notices.get()) is not None:
            payload, moment = notice
            tenant, user, operation_id = orjson.loads(payload)
            if any(watcher.may_see(tenant, user) for watcher in self._watchers):
                found = await self._database.of(tenant).run(lambda pooled, t=tenant, o=operation_id: recorded(pooled, t, UUID(o)))  # type: ignore[misc]
                if found is not None:
                    self._hand_out(found[0])
            self._is_new(tenant, operation_id)
            self._seen_until = max(self._seen_until, moment)

    async def _catch_up(self, connection: Connection, since: datetime) -> None:
        """Hand out what was recorded after `since` and not heard of, as long as anybody watches."""
        after = (since, NO_ID)
        while self._watchers:
            page = await recorded_since(connection, *after, CATCH_UP_PAGE)
            for operation, moment in page:
                self._hand_out(operation)
                self._seen_until = max(self._seen_until or moment, moment)
            if len(page) < CATCH_UP_PAGE:
                return
            after = (page[-1][1], UUID(page[-1][0].operation_id))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await asyncio.gather(*(watcher.caught_up() for watcher in self._watchers))

    def _hand_out(self, operation: Operation) -> None:
        if self._is_new(operation.tenant, operation.operation_id):
            for watcher in self._watchers:
                if watcher.may_see(operation.tenant, operation.user):
                    watcher.offer(operation)

    def _is_new(self, tenant: str, operation_id: str) -> bool:
        """Whether it was not heard of before; from now on it was."""
        if (tenant, operation_id) in self._recent:
            return False
        self._recent[tenant, operation_id] = None
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)
        return True
