"""What has to happen without a caller: first contact with the store, recovery of changes cut short, and the end of old answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from services.chassis.clock import Clock
from services.chassis.ending import ended
from services.chassis.errors import Unavailable
from services.retrieval.ports import VectorStore
from services.retrieval.registry import Registry

log = structlog.get_logger(__name__)

RETRY_S = 1.0
INTERVAL_S = 60.0
ABANDONED_AFTER_S = 600.0
"""A change that another process began so long ago has died with it."""


class Upkeep:
    """Run it with `running`; `check` is the readiness probe."""

    def __init__(
        self,
        store: VectorStore,
        registry: Registry,
        clock: Clock,
        *,
        prepare: Callable[[], Awaitable[None]],
        flush: Callable[[], None],
        exclusive: bool,
        expire: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._registry = registry
        self._clock = clock
        self._prepare = prepare
        self._flush = flush
        self._exclusive = exclusive
        self._expire = expire
        self._ready = False
        self._wanted = asyncio.Event()

    async def check(self) -> None:
        """Raise Unavailable until first contact was made, and whenever the store is away."""
        try:
            if not self._ready:
                raise Unavailable("the vector store has not been reached yet", dependency="qdrant")
            await self._store.check()
        except Unavailable:
            # It may come back empty: first contact has to be made again, and soon.
            self._ready = False
            self._wanted.set()
            raise

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep up until left. An embedded store is prepared before this yields; a server's may come later.

        Raises what the preparation of an embedded store raises.
        """
        if self._exclusive:
            await self._begin()
        task = asyncio.create_task(self._keep_up(), name="upkeep")
        try:
            yield
        finally:
            await ended(task)

    async def _begin(self) -> None:
        await self._prepare()
        # Who owns the store alone knows that whatever was begun before is dead.
        recovered = await self._registry.recover(0.0 if self._exclusive else ABANDONED_AFTER_S)
        if recovered:
            log.info("changes_recovered", count=recovered)
        self._ready = True

    async def _keep_up(self) -> None:
        while True:
            try:
                if not self._ready:
                    await self._begin()
                await self._registry.recover(ABANDONED_AFTER_S)
                await self._expire()
                self._flush()
            except Unavailable:
                await asyncio.sleep(RETRY_S)
                continue
            except Exception as error:
                log.exception("upkeep_failed", error=type(error).__name__)
                await asyncio.sleep(INTERVAL_S)
            self._wanted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._wanted.wait()
