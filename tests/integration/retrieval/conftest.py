"""One retrieval service for all these tests; each test has tenants of its own."""

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.chassis.principal import Principal
from tests.integration.retrieval.retrieval_kit import Retrieval, running, settings_for


@pytest.fixture(scope="session")
async def retrieval(state_dir: Path) -> AsyncIterator[Retrieval]:
    """A running retrieval service with Edge."""
    async with running(settings_for(state_dir)) as service:
        yield service


@pytest.fixture
def ann() -> Principal:
    """A user of a tenant that nobody else has."""
    return Principal(f"tenant-{secrets.token_hex(4)}", "ann")


@pytest.fixture
def eve() -> Principal:
    """An admin of another tenant."""
    return Principal(f"tenant-{secrets.token_hex(4)}", "eve", frozenset({"user", "admin"}))
