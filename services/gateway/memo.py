"""A small memory of answers to questions that are asked again and again: bounded in size and age, one question in flight per key."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Remembers at most `entries_max` values for `age_max_s` each. Errors are not remembered."""

    def __init__(self, entries_max: int, age_max_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._asking: dict[K, asyncio.Future[V]] = {}
        self._entries_max = entries_max
        self._age_max_s = age_max_s
        self._clock = clock
        self._generation = 0

    async def get(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`, asked for if it is unknown or too old. Those who ask at the same time share one question.

        Cancellation: whoever asked takes the question along; the others ask anew.
        """
        while True:
            entry = self._entries.get(key)
            if entry and self._clock() - entry[0] < self._age_max_s:
                return entry[1]
            running = self._asking.get(key)
            if running is None:
                return await self._ask(key, ask)
            await asyncio.wait([running])
            if not running.cancelled():
                return running.result()

    async def _ask(self, key: K, ask: Callable[[], Awaitable[V]]) -> V:
        answer: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._asking[key] = answer
        generation = self._generation
        try:
            value = await ask()
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except BaseException as error:
            answer.set_exception(error)
            answer.exception()  # nobody may be waiting
            raise
        else:
            answer.set_result(value)
            if generation == self._generation:
                self._keep(key, value)
            return value
        finally:
            if self._asking.get(key) is answer:
                del self._asking[key]

    def _keep(self, key: K, value: V) -> None:
        self._entries[key] = (self._clock(), value)
        self._entries.move_to_end(key)
        if len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)

    def stale(self, key: K) -> V | None:
        """The last known value, however old."""
        entry = self._entries.get(key)
        return entry[1] if entry else None

    def drop(self, key: K) -> None:
        """Forget `key`, also what is being asked right now: whoever comes from now on asks anew."""
        self._generation += 1
        self._entries.pop(key, None)
        self._asking.pop(key, None)

    def clear(self) -> None:
        """Forget everything, as `drop` does one."""
        self._generation += 1
        self._entries.clear()
        self._asking.clear()
