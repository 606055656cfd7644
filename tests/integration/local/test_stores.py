"""The embedded stores keep what was acknowledged, whatever ends them, and wherever the state directory lies."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio as redis

from services.local import stores
from services.local.child import Child
from services.local.stores import Postgres, Valkey

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="tailrace-stores-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def kill(store: Child) -> None:
    """kill -9 of the store and all it started."""
    store.kill()
    assert store.process is not None
    await store.process.wait()


async def test_postgres_keeps_acknowledged_rows_through_kill_9(folder: Path) -> None:
    """The same address and every row are there again after a start."""
    server = Postgres(folder / "postgres")
    await server.start()
    connection = await asyncpg.connect(server.url)
    await connection.execute("CREATE TABLE kept (n int)")
    await connection.execute("INSERT INTO kept VALUES (1), (2)")
    url = server.url
    await kill(server)
    connection.terminate()
    await server.start()
    connection = await asyncpg.connect(url)
    rows = [row["n"] for row in await connection.fetch("SELECT n FROM kept ORDER BY n")]
    await connection.close()
    await server.stop()

    assert rows == [1, 2]


async def test_valkey_keeps_what_was_synced_through_kill_9(folder: Path) -> None:
    """The append-only file is read again."""
    server = Valkey(folder / "valkey")
    await server.start()
    async with redis.Redis.from_url(server.url) as client:
        await client.set("kept", "yes")
        await client.waitaof(1, 0, 5000)
    await kill(server)
    await server.start()
    async with redis.Redis.from_url(server.url) as client:
        kept = await client.get("kept")
    await server.stop()

    assert kept == b"yes"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's PostgreSQL runs as another user")
async def test_a_state_directory_that_others_cannot_enter_serves_root_as_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster moves to where its user can reach it; the state directory points there, and no permission is changed."""
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr(stores, "SHARED_ROOT", folder / "shared")
    server = Postgres(closed / "postgres")
    await server.start()
    answered = await server.answers()
    await server.stop()

    assert answered
    assert (closed / "postgres" / "cluster").resolve().parent == folder / "shared"
    assert closed.stat().st_mode & 0o777 == 0o700


async def test_a_store_that_cannot_start_says_why(folder: Path) -> None:
    """The end of its own log is in the error."""
    blocked = Valkey(folder / "valkey", port=1)
    blocked.folder.mkdir()
    (blocked.folder / "appendonlydir").write_text("a file where a folder should be")
    with pytest.raises(stores.ChildFailed, match="valkey ended with code 1"):
        await blocked.start()
