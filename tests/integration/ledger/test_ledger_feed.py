"""The feed of operations over a lost connection: what was recorded meanwhile reaches every watcher, once, and nothing older does."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from services.chassis.principal import Principal
from services.ledger import postgres_feed, postgres_schema
from services.ledger.domain import CacheFacts, Operation
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_feed import PostgresFeed
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_operations import PostgresOperations
from services.ledger.postgres_prices import PostgresPrices
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import SetClock, fresh_database, until, value

ANN = Principal("acme", "ann")


@dataclass
class Recorder:
    """Records operations of Ann, and runs a feed that can lose its connection."""

    url: str
    database: Database
    feed: PostgresFeed

    async def record(self, count: int) -> list[str]:
        clock = SetClock(datetime.now(UTC))
        prices = PostgresPrices(self.database, clock)
        operations = PostgresOperations(self.database, PostgresHolds(self.database, prices), prices, clock)
        facts = {"tenant": ANN.tenant, "user": ANN.user, "status": "done", "created_at": clock.now(), "cache": CacheFacts("exact")}
        made = [Operation(str(uuid.uuid4()), **facts) for _ in range(count)]  # type: ignore[arg-type]
        await operations.record_all(made)
        return [operation.operation_id for operation in made]

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """A connection of the feed; with its end the connection is lost, and the feed can be given another."""
        task = asyncio.create_task(self.feed.run())
        try:
            await until(lambda: self._listeners(1))
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await until(lambda: self._listeners(0))

    async def _listeners(self, count: int) -> bool:
        found = await value(
            self.url,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'"
            " AND (query LIKE 'LISTEN%' OR query LIKE '%o.recorded_at >%')",
        )
        return found == count


@pytest.fixture
async def recorder(postgres: Postgres) -> AsyncIterator[Recorder]:
    url = await fresh_database(postgres)
    async with opened(url, connections_max=3, wait_s=10) as database:
        await postgres_schema.prepare(database)
        yield Recorder(url, database, PostgresFeed(url, database))


async def taken(watcher: postgres_feed.Watcher, count: int) -> list[str]:
    async with asyncio.timeout(30):
        operations = [await watcher.next() for _ in range(count)]
    return [operation.operation_id for operation in operations if operation is not None]


async def test_all_that_was_recorded_while_the_connection_was_lost_reaches_who_keeps_up(recorder: Recorder) -> None:
    """More than a page, and more than may wait for a watcher at once: each comes once, then what is recorded live."""
    with recorder.feed.watching(ANN) as watcher:
        async with recorder.listening():
            live = await recorder.record(3)
            assert sorted(await taken(watcher, 3)) == sorted(live)
        missed = await recorder.record(1300)
        async with recorder.listening():
            assert sorted(await taken(watcher, 1300)) == sorted(missed)
            after = await recorder.record(2)
            assert sorted(await taken(watcher, 2)) == sorted(after)


async def test_a_watcher_after_hours_without_any_gets_what_was_missed_and_nothing_older(recorder: Recorder) -> None:
    """What was heard while nobody watched is not new after a reconnect, and does not stand before what is."""
    async with recorder.listening():
        await recorder.record(150)
        with recorder.feed.watching(ANN) as watcher:
            last = await recorder.record(1)
            while last[0] not in await taken(watcher, 1):  # word of those before may still be on its way
                pass
    with recorder.feed.watching(ANN) as watcher:
        missed = await recorder.record(2)
        async with recorder.listening():
            assert sorted(await taken(watcher, 2)) == sorted(missed)


async def test_notices_that_come_faster_than_they_are_handled_are_caught_up_with(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is given up, another one is made, and nothing is lost on the way."""
    monkeypatch.setattr(postgres_feed, "NOTICES_MAX", 5)
    with recorder.feed.watching(ANN) as watcher:
        async with recorder.listening():
            burst = await recorder.record(100)

            assert sorted(await taken(watcher, 100)) == sorted(burst)
