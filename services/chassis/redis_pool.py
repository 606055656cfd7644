"""A bounded pool of Redis connections that loses no waiter. What is asked over them, and how many there are, others decide."""

import asyncio
from typing import Any

import redis.asyncio as redis


class PatientPool(redis.BlockingConnectionPool):
    """As its base; but whoever is cancelled just as a connection came free for it wakes the next one.

    Before Python 3.13 a condition gives that wake-up to nobody, and all that wait do so until their time limit.
    """

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        except asyncio.CancelledError:
            waking = asyncio.get_running_loop().create_task(self._wake_next())
            waking.add_done_callback(_done)
            _WAKING.add(waking)
            raise

    async def _wake_next(self) -> None:
        async with self._condition:
            self._condition.notify()


_WAKING = set[asyncio.Task[None]]()
"""Held until they are done: a loop keeps no task alive by itself."""


def _done(task: asyncio.Task[None]) -> None:
    _WAKING.discard(task)
