"""A change that is cut short, at whichever write, is undone or finished; nothing is ever half there."""

import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.chassis.clock import SystemClock
from services.chassis.errors import NotFound, Unavailable
from services.retrieval.access import everything_of
from services.retrieval.domain import Chunk, Document, document_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore, StoreBusy
from services.retrieval.ports import ANSWERS, CHUNKS, DOCUMENTS, SYSTEM_TENANT, Filter, Point, Query, written
from services.retrieval.registry import Registry

TENANT = "acme"
SPARSE = EdgeBm25("english")
WRITES_OF_A_CHANGE = 8


class DyingStore:
    """A store whose process dies: after so many writes every call fails."""

    def __init__(self, store: EdgeStore, writes: int) -> None:
        self._store = store
        self._left = writes

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)
        writes = name in ("upsert", "claim", "exchange", "delete", "remove")

        async def call(*args: Any, **kwargs: Any) -> Any:
            if writes:
                self._left -= 1
            if self._left < 0:
                raise Unavailable("dead", dependency="qdrant")
            return await work(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
async def opened(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EdgeStore]:
    """A store with vectors of two dimensions."""
    store = EdgeStore.open(tmp_path_factory.mktemp("recovery") / "qdrant", 2)
    yield store
    store.close()


@pytest.fixture
async def store(opened: EdgeStore) -> EdgeStore:
    """The same, empty."""
    for space in (CHUNKS, ANSWERS, DOCUMENTS):
        for tenant in (TENANT, SYSTEM_TENANT):
            await opened.delete(space, Filter(tenant))
    return opened


def draft(text: str) -> tuple[Document, list[Chunk], Any, list[Any]]:
    """A document of three chunks."""
    chunks = [Chunk(ordinal, f"{text} {ordinal}", ordinal * 10, ordinal * 10 + 5) for ordinal in range(3)]
    vectors = np.array([[math.cos(angle), math.sin(angle)] for angle in (0.1, 0.2, 0.3)], np.float32)
    document = Document(
        document_id=document_id(TENANT, "default", "a.md"),
        tenant=TENANT,
        collection="default",
        source_uri="a.md",
        title="A",
        media_type="text/markdown",
        version=0,
        content_sha256=text,
        bytes=1,
        characters=1,
        chunks=3,
        indexed_us=0,
        revision="",
    )
    return document, chunks, vectors, [SPARSE.document(chunk.text) for chunk in chunks]


async def visible(store: EdgeStore, registry: Registry) -> list[str]:
    """Texts a search finds, in reading order."""
    ranked = await store.rank(CHUNKS, Query(Filter(TENANT), 99, [1.0, 0.0]))
    records = await store.get(CHUNKS, TENANT, [written(number) for number in ranked])
    return sorted(stored.chunk.text for stored, _ in await registry.current(everything_of(TENANT), list(records.values())))


def texts(name: str) -> list[str]:
    return [f"{name} {ordinal}" for ordinal in range(3)]


async def leftovers(store: EdgeStore) -> tuple[int, int]:
    """All chunks that are stored, and all intents."""
    return await store.count(CHUNKS, Filter(TENANT)), await store.count(DOCUMENTS, Filter(SYSTEM_TENANT))


@pytest.mark.parametrize("writes", range(WRITES_OF_A_CHANGE))
async def test_a_new_version_that_dies_is_there_whole_or_not_at_all(store: EdgeStore, writes: int) -> None:
    """Before and after recovery a search sees one version; recovery leaves no chunk of another and no intent."""
    registry = Registry(store, SystemClock())
    await registry.replace(*draft("old"))
    epoch = (await registry.epoch(TENANT, "default")).number
    dying = Registry(DyingStore(store, writes), SystemClock())  # type: ignore[arg-type]
    try:
        await dying.replace(*draft("new"))
        acknowledged = True
    except Unavailable:
        acknowledged = False

    seen = await visible(store, registry)
    assert seen in (texts("old"), texts("new"))
    assert not acknowledged or (seen == texts("new") and (await registry.epoch(TENANT, "default")).number > epoch)
    restarted = Registry(store, SystemClock())
    await restarted.recover(0)
    assert seen == await visible(store, restarted)
    assert (3, 0) == await leftovers(store)
    if seen == texts("new"):
        assert (await restarted.epoch(TENANT, "default")).number > epoch


@pytest.mark.parametrize("writes", range(WRITES_OF_A_CHANGE))
async def test_a_first_version_that_dies_leaves_nothing_or_all(store: EdgeStore, writes: int) -> None:
    """Where there was no document before, either the whole new one is there or nothing of it."""
    dying = Registry(DyingStore(store, writes), SystemClock())  # type: ignore[arg-type]
    with contextlib.suppress(Unavailable):
        await dying.replace(*draft("new"))
    restarted = Registry(store, SystemClock())
    seen = await visible(store, restarted)
    await restarted.recover(0)

    assert seen in ([], texts("new"))
    assert seen == await visible(store, restarted)
    assert (len(seen), 0) == await leftovers(store)


@pytest.mark.parametrize("writes", range(WRITES_OF_A_CHANGE))
async def test_a_deletion_that_dies_is_done_or_not_begun(store: EdgeStore, writes: int) -> None:
    """Acknowledged or not, after recovery the document is there with all its chunks or gone with all of them."""
    registry = Registry(store, SystemClock())
    document = await registry.replace(*draft("old"))
    epoch = (await registry.epoch(TENANT, "default")).number
    await store.upsert(ANSWERS, [Point(document.document_id, {"tenant": TENANT, "collection": "default", "epoch": epoch}, [1.0, 0.0])])
    dying = Registry(DyingStore(store, writes), SystemClock())  # type: ignore[arg-type]
    try:
        await dying.delete(TENANT, document.document_id)
        acknowledged = True
    except Unavailable:
        acknowledged = False
    restarted = Registry(store, SystemClock())
    seen = await visible(store, restarted)
    await restarted.recover(0)

    assert seen in ([], texts("old"))
    assert not (acknowledged and seen)
    assert seen == await visible(store, restarted)
    assert (len(seen), 0) == await leftovers(store)
    if not seen:
        assert (await restarted.epoch(TENANT, "default")).number > epoch
        assert 0 == await store.count(ANSWERS, Filter(TENANT))
        with pytest.raises(NotFound):
            await restarted.document(everything_of(TENANT), document.document_id)


async def test_a_change_of_a_living_process_is_left_alone(store: EdgeStore) -> None:
    """Where several processes share a store, only changes begun long ago are taken for dead."""
    dying = Registry(DyingStore(store, 2), SystemClock())  # type: ignore[arg-type]
    with pytest.raises(Unavailable):
        await dying.replace(*draft("new"))

    assert 0 == await Registry(store, SystemClock()).recover(600)
    assert (3, 1) == await leftovers(store)


async def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    """The second opener is told who has it, and the first goes on; after closing, everything is still there."""
    first = EdgeStore.open(tmp_path / "qdrant", 2)
    await first.upsert(CHUNKS, [Point(document_id(TENANT, "c", "x"), {"tenant": TENANT}, [1.0, 0.0])])
    with pytest.raises(StoreBusy, match="in use by another retrieval process"):
        EdgeStore.open(tmp_path / "qdrant", 2)
    assert 1 == await first.count(CHUNKS, Filter(TENANT))
    first.close()
    with pytest.raises(Unavailable):
        await first.count(CHUNKS, Filter(TENANT))
    again = EdgeStore.open(tmp_path / "qdrant", 2)

    assert 1 == await again.count(CHUNKS, Filter(TENANT))
    again.close()
