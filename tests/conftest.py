"""Fixtures all tests share: stores of their own on free ports, started once and gone afterwards."""

import gc
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported: its notices about closed connections are noise here

from services.local.stores import Postgres, Valkey

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Keep thousands of collected tests out of garbage collections, as services do at their start: a full one would stop whatever runs in
    this process for half a second, which is longer than a cache is waited for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real inputs that are not part of the project."""
    if not DATA.is_dir():
        pytest.skip("../shared/data is not here: tests on real inputs need it")
    return DATA


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """A folder that every user may enter, because PostgreSQL does not run as root."""
    with tempfile.TemporaryDirectory(prefix="tailrace-test-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
async def postgres(state_dir: Path) -> AsyncIterator[Postgres]:
    """A running PostgreSQL."""
    server = Postgres(state_dir / "postgres")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(scope="session")
async def valkey(state_dir: Path) -> AsyncIterator[Valkey]:
    """A running Valkey."""
    server = Valkey(state_dir / "valkey")
    await server.start()
    yield server
    await server.stop()
