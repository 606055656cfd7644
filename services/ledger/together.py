"""Work that would wait for its like anyway, done together. What the work is, and what may go together, others know.

Nothing waits for company: what comes first begins at once, and alone. Only what comes while that is under way goes together, next.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

from services.chassis.errors import DomainError, Overloaded

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")
R = TypeVar("R")

TOGETHER_MAX = 32
"""So few that the first of them does not wait long for the last."""
WAITING_MAX = 1024
"""Of one key."""


class Together(Generic[K, A, R]):
    """What is asked of one key goes to `work` one after the other, with all that was asked meanwhile. Used from one event loop."""

    def __init__(self, work: Callable[[K, Sequence[A]], Awaitable[Sequence[R | Exception]]]) -> None:
        """`work` returns what became of each, in order, or raises what became of all."""
        self._work = work
        self._waiting: dict[K, deque[tuple[A, asyncio.Future[R]]]] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def do(self, key: K, asked: A) -> R:
        """What became of `asked`. Raises what `work` says, Overloaded if too much waits.

        Cancellation: what waits is not begun. What has begun goes on without us, for the sake of the others.
        """
        waiting = self._waiting.get(key)
        if waiting is not None and len(waiting) >= WAITING_MAX:
            raise Overloaded("too much is asked for one tenant at once", retry_after_ms=500)
        told: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if waiting is None:
            self._waiting[key] = deque([(asked, told)])
            # Nobody's deadline and nobody's span: it is everybody's work.
            running = asyncio.create_task(self._run(key), context=contextvars.Context())
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        else:
            waiting.append((asked, told))
        return await told

    async def _run(self, key: K) -> None:
        waiting = self._waiting[key]
        try:
            while waiting:
                batch = [waiting.popleft() for _ in range(min(TOGETHER_MAX, len(waiting)))]
                if wanted := [(asked, told) for asked, told in batch if not told.done()]:  # else its asker has left
                    await self._do(key, wanted)
        finally:
            del self._waiting[key]
            for _, told in waiting:  # only if we are stopped
                told.cancel()

    async def _do(self, key: K, wanted: Sequence[tuple[A, "asyncio.Future[R]"]]) -> None:
        outcomes: Sequence[R | Exception]
        try:
            outcomes = await self._work(key, [asked for asked, _ in wanted])
        except asyncio.CancelledError:
            for _, told in wanted:
                told.cancel()
            raise
        except DomainError as error:
            outcomes = [error.bare() for _ in wanted]
        except Exception as error:
            outcomes = [error] * len(wanted)
        for (_, told), outcome in zip(wanted, outcomes, strict=True):
            if told.done():
                continue
            if isinstance(outcome, Exception):
                told.set_exception(outcome)
            else:
                told.set_result(outcome)
