"""Progress on its way to the store: in order, and in as few round trips as those who wait for it allow."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from services.chassis.ending import ended
from services.retrieval import ingest
from services.retrieval.domain import Progress, Stage, Upload
from services.retrieval.ingest import Reporter
from services.retrieval.jobs import Claim, Owner, Told


class Store:
    """Keeps what each round trip brought. `ours` is what it says of every claim."""

    def __init__(self) -> None:
        self.trips: list[list[Stage]] = []
        self.ours = True
        self.came = asyncio.Event()

    async def record(self, told: Sequence[Told]) -> list[bool]:
        self.trips.append([item.progress.stage for item in told])
        self.came.set()
        return [self.ours] * len(told)


def told(stage: Stage) -> Told:
    progress = Progress(0, "a", stage)
    return Told(Claim("job", 0, 1, Owner("acme", "ann"), Upload(b""), progress, 1), progress)


@contextlib.asynccontextmanager
async def reporting(store: Store, lost: list[Claim]) -> AsyncIterator[Reporter]:
    reporter = Reporter(store, lost.append)  # type: ignore[arg-type]
    running = asyncio.create_task(reporter.run())
    try:
        yield reporter
    finally:
        await ended(running)


async def test_what_nobody_waits_for_goes_with_the_next_that_somebody_does() -> None:
    store = Store()
    async with reporting(store, []) as reporter:
        reporter.mention(told(Stage.PARSED))
        reporter.mention(told(Stage.CHUNKED))
        await asyncio.sleep(0)
        assert store.trips == []
        assert await asyncio.wait_for(reporter.say(told(Stage.EMBEDDED)), 5)

    assert store.trips == [[Stage.PARSED, Stage.CHUNKED, Stage.EMBEDDED]]


async def test_it_goes_by_itself_soon_and_tells_of_a_claim_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "TOLD_TOGETHER_S", 0.01)
    store, lost = Store(), list[Claim]()
    store.ours = False
    async with reporting(store, lost) as reporter:
        reporter.mention(told(Stage.PARSED))
        reporter.mention(told(Stage.CHUNKED))
        await asyncio.wait_for(store.came.wait(), 5)
        await asyncio.sleep(0)

    assert store.trips == [[Stage.PARSED, Stage.CHUNKED]]
    assert [claim.index for claim in lost] == [0, 0]
