"""Where questions wait to be embedded: a lane of their own, bounded, in which those that wait together go together.

It knows nothing of models: what embeds a batch is given to it.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from services.chassis.errors import Overloaded

QUESTIONS_WAITING_MAX = 256

Made = TypeVar("Made")
"""What is made of a question: its vector, and what else its embedder tells."""


class QuestionLane(Generic[Made]):
    """At most `runs_max` batches are under way at once; a question that finds one free goes at once and alone.

    Nothing waits for company: what came while all runs were busy is what the next run takes, oldest first, up to `batch_max`.
    Where padding costs, `spread_max` bounds how much longer or shorter than the oldest the others may be; who does not fit goes next.
    """

    def __init__(
        self,
        embed: Callable[[tuple[str, ...]], Awaitable[Sequence[Made]]],
        *,
        runs_max: int,
        batch_max: int,
        spread_max: float = math.inf,
    ) -> None:
        """`embed` makes one of each text, in the same order."""
        self._embed = embed
        self._runs_max = runs_max
        self._batch_max = batch_max
        self._spread_max = spread_max
        self._waiting: deque[tuple[str, asyncio.Future[Made]]] = deque()
        self._asked = 0
        self._runs: set[asyncio.Task[None]] = set()

    async def embed(self, text: str, waiting_max: int = QUESTIONS_WAITING_MAX) -> Made:
        """What `embed` makes of it. Raises Overloaded when `waiting_max` questions are there already.

        Cancellation: a question that has not begun is dropped; one that shares a batch leaves the others to it.
        """
        if self._asked >= waiting_max:
            raise Overloaded("too many questions wait to be embedded", retry_after_ms=1000)
        future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        self._asked += 1
        if len(self._runs) < self._runs_max:
            self._runs.add(asyncio.create_task(self._run(), name="embed questions"))
        try:
            return await future
        finally:
            self._asked -= 1

    async def close(self) -> None:
        """End what is under way; what waits is cancelled."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        runs = list(self._runs)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while batch := self._next():
                await self._one(batch)
        finally:
            # Here and not in a callback: the next question must not count on a run that has found nothing more to do.
            task = asyncio.current_task()
            assert task is not None
            self._runs.discard(task)

    async def _one(self, batch: Sequence[tuple[str, asyncio.Future[Made]]]) -> None:
        try:
            made = await self._embed(tuple(text for text, _ in batch))
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), one in zip(batch, made, strict=True):
            if not future.done():
                future.set_result(one)

    def _next(self) -> list[tuple[str, asyncio.Future[Made]]]:
        batch: list[tuple[str, asyncio.Future[Made]]] = []
        left: deque[tuple[str, asyncio.Future[Made]]] = deque()
        while self._waiting and len(batch) < self._batch_max:
            asked = self._waiting.popleft()
            if asked[1].done():
                continue
            if not batch or self._alike(batch[0][0], asked[0]):
                batch.append(asked)
            else:
                left.append(asked)
        self._waiting.extendleft(reversed(left))
        return batch

    def _alike(self, one: str, other: str) -> bool:
        short, long = sorted((len(one) + 1, len(other) + 1))
        return long <= short * self._spread_max
