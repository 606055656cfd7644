"""The engine holds the interpreter while it flushes, so every question waits for it: only what was written is flushed."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.retrieval.domain import stable_id
from services.retrieval.edge_store import EdgeStore
from services.retrieval.ports import ANSWERS, DOCUMENTS, Point, Space

DIMENSION = 8


@dataclass
class Watched:
    """A shard that notes its flushes; the first `failures` of them fail."""

    shard: Any
    name: str
    flushed: list[str]
    failures: int = 0

    def flush(self) -> None:
        self.flushed.append(self.name)
        if self.failures:
            self.failures -= 1
            raise OSError("no room")
        self.shard.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shard, name)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EdgeStore]:
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    yield store
    store.close()


def watched(store: EdgeStore) -> list[str]:
    flushed: list[str] = []
    store._shards = {name: Watched(shard, name, flushed) for name, shard in store._shards.items()}
    return flushed


async def write(store: EdgeStore, space: Space, created_us: int = 0) -> None:
    payload = {"tenant": "acme", "kind": "document", "created_us": created_us}
    await store.upsert(space, [Point(stable_id(space.name), payload, [1.0] * DIMENSION if space.dense else None)])


async def test_what_a_start_replayed_is_flushed_once_and_then_only_what_is_written(store: EdgeStore) -> None:
    """A log that was replayed would be replayed at every start; a shard that nobody wrote to stops nobody."""
    flushed = watched(store)
    store.flush()
    assert sorted(store._shards) == sorted(flushed)
    flushed.clear()
    store.flush()
    assert [] == flushed
    await write(store, DOCUMENTS)
    store.flush()
    store.flush()

    assert [DOCUMENTS.name] == flushed


async def test_a_flush_that_failed_is_made_up_for(store: EdgeStore) -> None:
    """What was written before it is still not flushed."""
    store.flush()
    flushed = watched(store)
    await write(store, DOCUMENTS)
    store._shards[DOCUMENTS.name].failures = 1
    with pytest.raises(OSError, match="no room"):
        store.flush()
    store.flush()

    assert [DOCUMENTS.name] * 2 == flushed


async def test_expiring_what_is_not_old_writes_nothing(store: EdgeStore) -> None:
    """It is done every minute, mostly in vain."""
    await write(store, ANSWERS, created_us=1000)
    store.flush()
    flushed = watched(store)
    await store.expire(ANSWERS, "created_us", 1000)
    store.flush()
    assert [] == flushed
    await store.expire(ANSWERS, "created_us", 1001)
    store.flush()

    assert [ANSWERS.name] == flushed
    assert {} == await store.get(ANSWERS, "acme", [stable_id(ANSWERS.name)])
