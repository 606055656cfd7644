"""Work that must outlive the request that caused it, in a bounded set of supervised tasks. It retries nothing and knows no work by name."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from services.chassis.errors import Overloaded

log = structlog.get_logger(__name__)


class AfterWork:
    """Owns tasks until they end. Open it before what they need, drain it before that is closed."""

    def __init__(self, tasks_max: int = 1000) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tasks_max = tasks_max
        self.failed = 0
        """Tasks that ended in an exception so far."""

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Start `work` as a task of its own. Raises Overloaded when too many run already; `work` is closed then."""
        if len(self._tasks) >= self._tasks_max:
            work.close()
            raise Overloaded("too much work is waiting to be finished", retry_after_ms=1000)
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed += 1
            log.error("afterwork_failed", work=task.get_name(), error=type(error).__name__, exc_info=error)

    async def drain(self, timeout_s: float) -> int:
        """Wait for what runs, cancel the rest after `timeout_s`; return how many had to be cancelled."""
        if not self._tasks:
            return 0
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return len(late)
