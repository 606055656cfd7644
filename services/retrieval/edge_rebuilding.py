"""When a shard is worth rebuilding, in the background: once enough was written that looking at every vector takes long."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from services.chassis.ending import ended
from services.retrieval.edge_building import build
from services.retrieval.edge_store import EdgeStore

log = structlog.get_logger(__name__)

POINTS_MIN = 10_000
"""A search looks at so many vectors in some milliseconds; below that a graph gains nothing."""
SHARE_MIN = 0.1
"""Of all points. Each rebuild copies the whole shard, so that a larger one is rebuilt after more has come."""
INTERVAL_S = 5.0
FAILED_PAUSE_S = 600.0


class Rebuilding:
    """Run it with `running`, or one pass with `once`."""

    def __init__(self, store: EdgeStore, *, points_min: int = POINTS_MIN) -> None:
        self._store = store
        self._points_min = points_min

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look again and again until left."""
        task = asyncio.create_task(self._keep_going(), name="rebuilding")
        try:
            yield
        finally:
            await ended(task)

    async def once(self) -> int:
        """Rebuild what is worth it; return how many shards. Raises OSError.

        Cancellation: gives up the one that is under way, which goes on as it was.
        """
        due = [name for name, (new, all_) in self._store.unbuilt().items() if new >= max(self._points_min, SHARE_MIN * all_)]
        for name in due:
            log.info("shard_is_being_rebuilt", space=name)
            await self._store.rebuild(name, build)
            log.info("shard_was_rebuilt", space=name)
        return len(due)

    async def _keep_going(self) -> None:
        while True:
            pause_s = INTERVAL_S
            try:
                await self.once()
            except Exception as error:
                # Found is everything all the same, only less quickly.
                log.error("shard_not_rebuilt", error=type(error).__name__, detail=str(error)[:200])
                pause_s = FAILED_PAUSE_S
            await asyncio.sleep(pause_s)
