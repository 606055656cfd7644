"""A shard that is rebuilt answers as before, loses nothing that is written meanwhile, and is whole wherever its process dies."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.retrieval import edge_folders, edge_store
from services.retrieval.domain import stable_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_building import build
from services.retrieval.edge_rebuilding import Rebuilding
from services.retrieval.edge_store import EdgeStore, StoreBusy
from services.retrieval.ports import CHUNKS, Filter, Point, Query, written

DIMENSION = 384
SPARSE = EdgeBm25("english")
ACME = Filter("acme")
CHANCE = np.random.default_rng(5)


def vector() -> list[float]:
    row = CHANCE.standard_normal(DIMENSION)
    return [float(value) for value in row / np.linalg.norm(row)]


def point(name: str, *, tenant: str = "acme", document: str = "d", text: str = "otter") -> Point:
    payload = {"tenant": tenant, "collection": "default", "document_id": document, "revision": "r", "ordinal": 0, "text": text}
    return Point(stable_id(name), payload, vector(), SPARSE.document(text))


async def nothing(_: Path) -> None:
    """A build that changes nothing: what is tested is everything around it."""


async def texts(store: EdgeStore) -> dict[str, str]:
    return {record.id: record.payload["text"] for record in await store.find(CHUNKS, ACME, limit=10_000)}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EdgeStore]:
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    yield store
    store.close()


async def test_a_built_shard_answers_as_the_one_before(store: EdgeStore, tmp_path: Path) -> None:
    """Rounded vectors choose, whole ones decide: same hits, same scores, same filters, for meaning and for words; also after a restart."""
    words = ("otter", "heron", "newt", "ferry over the river")
    points = [
        point(f"{number}", tenant="acme" if number % 3 else "rival", document=f"d{number % 7}", text=f"{words[number % 4]} {number}")
        for number in range(2000)
    ]
    for begin in range(0, len(points), 250):
        await store.upsert(CHUNKS, points[begin : begin + 250])
    some = Filter("acme", any_of={"document_id": ("d1", "d4")})
    queries = [Query(where, 20, vector()) for where in (ACME, some) for _ in range(5)]
    queries += [Query(where, 20, SPARSE.query("a heron's ferry 17")) for where in (ACME, some)]
    before = [await store.rank(CHUNKS, query) for query in queries]

    assert 1 == await Rebuilding(store, points_min=2000).once()
    assert (0, 2000) == store.unbuilt()["chunks"]
    built = [*(tmp_path / "qdrant" / "chunks").rglob("quantized.*")]
    assert built, "nothing was built"
    store.close()
    again = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    try:
        for query, expected in zip(queries, before, strict=True):
            found = await again.rank(CHUNKS, query)
            assert [pytest.approx(score, abs=1e-5) for score in expected.values()] == list(found.values())
            assert {number for number, score in expected.items() if score > min(expected.values())} <= found.keys()
            assert len(found) == len(await again.get(CHUNKS, "acme", [written(number) for number in found]))
        assert (0, 2000) == again.unbuilt()["chunks"]
    finally:
        again.close()


async def test_what_is_written_meanwhile_is_there_afterwards(store: EdgeStore) -> None:
    """Added, changed, removed by id and by filter, and added again after a filter removed it; vectors as well."""
    await store.upsert(CHUNKS, [point(name, document=name) for name in ("stays", "changes", "goes", "filtered", "returns")])

    async def writing(_: Path) -> None:
        await store.upsert(CHUNKS, [point("new", text="heron"), point("changes", text="newt")])
        await store.remove(CHUNKS, "acme", [stable_id("goes")])
        await store.delete(CHUNKS, Filter("acme", equal={"document_id": "filtered"}))
        await store.delete(CHUNKS, Filter("acme", equal={"document_id": "returns"}))
        await store.upsert(CHUNKS, [point("returns", document="returns", text="ferry")])

    await store.rebuild("chunks", writing)

    expected = {"stays": "otter", "changes": "newt", "new": "heron", "returns": "ferry"}
    assert {stable_id(name): text for name, text in expected.items()} == await texts(store)
    (best, *_) = await store.rank(CHUNKS, Query(ACME, 9, SPARSE.query("heron")))
    assert stable_id("new") == written(best)
    assert len(expected) == len(await store.rank(CHUNKS, Query(ACME, 9, vector())))


@pytest.mark.parametrize("rounds", [1, 2])
async def test_a_process_that_is_killed_after_a_rebuild_loses_nothing(store: EdgeStore, tmp_path: Path, rounds: int) -> None:
    """What the copy held, what was carried over and what came after; nothing of it has been flushed, and the old shard is closed.

    The files as they are now are what kill -9 leaves.
    """
    for number in range(rounds):
        await store.upsert(CHUNKS, [point(f"{number} before {place}") for place in range(200)])

        async def writing(_: Path, number: int = number) -> None:
            await store.upsert(CHUNKS, [point(f"{number} meanwhile {place}") for place in range(200)])

        await store.rebuild("chunks", writing)
        await store.upsert(CHUNKS, [point(f"{number} after {place}") for place in range(200)])

    shutil.copytree(tmp_path / "qdrant", tmp_path / "killed", symlinks=True)
    again = EdgeStore.open(tmp_path / "killed", DIMENSION)
    try:
        ids = [
            stable_id(f"{number} {when} {place}")
            for number in range(rounds)
            for when in ("before", "meanwhile", "after")
            for place in range(200)
        ]
        assert dict.fromkeys(ids, "otter") == {
            id_: record.payload["text"] for id_, record in (await again.get(CHUNKS, "acme", ids)).items()
        }
        found = await again.rank(CHUNKS, Query(ACME, len(ids), vector()))
        assert set(ids) == {written(number) for number in found}
    finally:
        again.close()


async def test_writes_wait_for_the_copy_and_questions_do_not(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is being copied would be of no moment at all."""
    await store.upsert(CHUNKS, [point("old")])
    begun, go_on, copy = threading.Event(), threading.Event(), shutil.copytree

    def slowly(*args: Any, **how: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return copy(*args, **how)

    monkeypatch.setattr(shutil, "copytree", slowly)
    rebuilding = asyncio.create_task(store.rebuild("chunks", nothing))
    assert await asyncio.to_thread(begun.wait, 10)
    writing = asyncio.create_task(store.upsert(CHUNKS, [point("new")]))
    await asyncio.sleep(0)  # it has had its turn
    assert 1 == len(await store.rank(CHUNKS, Query(ACME, 9, vector())))
    assert not writing.done()

    go_on.set()
    await asyncio.gather(rebuilding, writing)
    assert {stable_id("old"), stable_id("new")} == (await texts(store)).keys()


@pytest.mark.parametrize("failure", [OSError("no room"), asyncio.CancelledError()])
async def test_a_build_that_fails_leaves_all_as_it_was(store: EdgeStore, tmp_path: Path, failure: BaseException) -> None:
    """What was written meanwhile included, and nothing else on disk."""
    await store.upsert(CHUNKS, [point("old")])
    there = {path.name for path in (tmp_path / "qdrant").iterdir()}

    async def failing(_: Path) -> None:
        await store.upsert(CHUNKS, [point("new")])
        raise failure

    with pytest.raises(type(failure)):
        await store.rebuild("chunks", failing)
    assert {stable_id("old"), stable_id("new")} == (await texts(store)).keys()
    assert there == {path.name for path in (tmp_path / "qdrant").iterdir()}


async def test_too_much_written_meanwhile_ends_a_rebuild(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to be remembered is bounded."""
    monkeypatch.setattr(edge_store, "CARRIED_MAX", 3)

    async def writing(_: Path) -> None:
        await store.upsert(CHUNKS, [point(f"{number}") for number in range(4)])

    with pytest.raises(OSError, match="more was written"):
        await store.rebuild("chunks", writing)
    assert 4 == len(await texts(store))


async def test_a_full_disk_is_left_alone(store: EdgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fills it would stop the writes."""
    monkeypatch.setattr(edge_store, "ROOM", 10**9)
    with pytest.raises(OSError, match="no room"):
        await store.rebuild("chunks", nothing)


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die when it has given so many names to files; a process that dies removes nothing afterwards."""
    left = step

    def dying(work: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return work(*args)

        return call

    monkeypatch.setattr(edge_store.shutil, "rmtree", lambda *_, **__: None)
    for name in ("rename", "symlink_to"):
        monkeypatch.setattr(edge_folders.Path, name, dying(getattr(Path, name)))


async def whole(folder: Path, names: set[str]) -> None:
    """A start finds these points, takes more, and leaves nothing that is of no use."""
    store = EdgeStore.open(folder, DIMENSION)
    try:
        assert {stable_id(name) for name in names} == (await texts(store)).keys()
        await store.upsert(CHUNKS, [point("later")])
        links = {folder / name for name in ("chunks", "answers", "documents")}
        assert links | {link.resolve() for link in links} == {*folder.iterdir()}
        assert 6 == len([*folder.iterdir()])
    finally:
        store.close()


@pytest.mark.parametrize("step", range(2))
async def test_a_switch_that_dies_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """At every step that changes a name."""
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    await store.upsert(CHUNKS, [point("old")])

    async def writing(_: Path) -> None:
        await store.upsert(CHUNKS, [point("new")])

    with monkeypatch.context() as patched:
        dying_at(step, patched)
        with pytest.raises(KeyboardInterrupt):
            await store.rebuild("chunks", writing)
    store.close()

    await whole(tmp_path / "qdrant", {"old", "new"})


@pytest.mark.parametrize("step", range(4))
async def test_a_folder_of_an_older_release_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """It bears the name itself; also when the first start dies at one of the steps that change that. The last one lets it live."""
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    await store.upsert(CHUNKS, [point("old")])
    store.close()
    link = tmp_path / "qdrant" / "chunks"
    folder = link.resolve()
    link.unlink()
    folder.rename(link)

    with monkeypatch.context() as patched:
        dying_at(step, patched)
        try:
            EdgeStore.open(tmp_path / "qdrant", DIMENSION).close()
        except KeyboardInterrupt:
            assert step < 3
        else:
            assert step == 3

    await whole(tmp_path / "qdrant", {"old"})


async def test_a_link_that_was_lost_is_found_again(tmp_path: Path) -> None:
    """A backup need not keep links. What a rebuild had not finished is not taken for the shard."""
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    await store.upsert(CHUNKS, [point("old")])
    link = tmp_path / "qdrant" / "chunks"
    store.close()
    unfinished = edge_folders.another(link)
    shutil.copytree(link.resolve(), unfinished, dirs_exist_ok=True)
    link.unlink()

    await whole(tmp_path / "qdrant", {"old"})


async def test_nobody_guesses_which_of_two_shards_counts(tmp_path: Path) -> None:
    """Both are whole, and one of them lacks what came last; none is removed."""
    store = EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    await store.upsert(CHUNKS, [point("old")])
    store.close()
    link = tmp_path / "qdrant" / "chunks"
    folder = link.resolve()
    shutil.copytree(folder, folder.with_name("chunks~other"))
    link.unlink()
    with pytest.raises(OSError, match=f"{folder.name}, chunks~other|chunks~other, {folder.name}"):
        EdgeStore.open(tmp_path / "qdrant", DIMENSION)
    link.symlink_to(folder.name)

    await whole(tmp_path / "qdrant", {"old"})


async def test_who_cannot_open_a_shard_removes_nothing_of_it(store: EdgeStore, tmp_path: Path) -> None:
    """A second process is refused; the copy that the first one is working on stays."""

    async def intruding(copy: Path) -> None:
        with pytest.raises(StoreBusy):
            EdgeStore.open(tmp_path / "qdrant", DIMENSION)
        assert (copy / "edge_config.json").exists()

    await store.upsert(CHUNKS, [point("old")])
    await store.rebuild("chunks", intruding)
    assert {stable_id("old")} == (await texts(store)).keys()


async def test_a_shard_is_rebuilt_once_enough_was_written(store: EdgeStore) -> None:
    """Neither before that nor again."""
    rebuilding = Rebuilding(store, points_min=10)
    await store.upsert(CHUNKS, [point(f"{number}") for number in range(9)])
    assert 0 == await rebuilding.once()
    await store.upsert(CHUNKS, [point("tenth")])
    assert 1 == await rebuilding.once()
    assert 0 == await rebuilding.once()
    assert 10 == len(await texts(store))


async def test_a_folder_that_holds_no_shard_is_not_built(tmp_path: Path) -> None:
    """The process says so by its end."""
    with pytest.raises(OSError, match="ended with 1"):
        await build(tmp_path)
