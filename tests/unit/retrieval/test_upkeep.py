"""First contact with a store that is away, comes, goes and comes back."""

import asyncio
from typing import Any

import pytest

from services.chassis.clock import SystemClock
from services.chassis.errors import Unavailable
from services.retrieval import upkeep
from services.retrieval.registry import Registry
from services.retrieval.upkeep import Upkeep


class ComingAndGoing:
    """A store that answers while it is `there`, and forgets its preparation when it goes."""

    def __init__(self) -> None:
        self.there = False
        self.prepared = 0
        self.expired = asyncio.Event()
        self.refuses = False

    async def prepare(self) -> None:
        if self.refuses:
            raise OSError("it is damaged")
        await self.check()
        self.prepared += 1

    async def check(self) -> None:
        if not self.there:
            raise Unavailable("away", dependency="qdrant")

    async def find(self, *_: Any, **__: Any) -> list[Any]:
        await self.check()
        return []

    async def expire(self) -> None:
        await self.check()
        self.expired.set()


def keeping(store: ComingAndGoing, *, exclusive: bool = False) -> Upkeep:
    registry = Registry(store, SystemClock())  # type: ignore[arg-type]
    return Upkeep(
        store,  # type: ignore[arg-type]
        registry,
        SystemClock(),
        prepare=store.prepare,
        flush=lambda: None,
        exclusive=exclusive,
        expire=store.expire,
    )


async def test_a_store_is_prepared_when_it_comes_and_again_when_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readiness follows the store, without a restart."""
    monkeypatch.setattr(upkeep, "RETRY_S", 0.001)
    store = ComingAndGoing()
    keeper = keeping(store)
    async with keeper.running():
        for round_ in (1, 2):
            with pytest.raises(Unavailable):
                await keeper.check()
            store.expired.clear()
            store.there = True
            await asyncio.wait_for(store.expired.wait(), 5)
            await keeper.check()
            assert round_ == store.prepared
            store.there = False


async def test_an_embedded_store_that_cannot_be_prepared_stops_the_start() -> None:
    """Its owner is told at once; there is nothing to wait for."""
    store = ComingAndGoing()
    store.there, store.refuses = True, True
    with pytest.raises(OSError, match="damaged"):
        async with keeping(store, exclusive=True).running():
            pytest.fail("it started")
