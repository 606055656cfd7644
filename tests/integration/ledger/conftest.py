"""One ledger for all these tests; each test has a tenant of its own, and leaves books that balance."""

import secrets
from collections.abc import AsyncIterator

import pytest

from services.chassis.principal import Principal
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import Ledger, audit, fresh_database, running


@pytest.fixture(scope="session")
async def shared_ledger(postgres: Postgres) -> AsyncIterator[Ledger]:
    """A running ledger."""
    async with running(await fresh_database(postgres)) as ledger:
        yield ledger


@pytest.fixture
async def ledger(shared_ledger: Ledger) -> AsyncIterator[Ledger]:
    """The running ledger, audited after the test."""
    yield shared_ledger
    assert await audit(shared_ledger.url) == {}


@pytest.fixture
def ann() -> Principal:
    """A user of a tenant that nobody else has."""
    return Principal(f"tenant-{secrets.token_hex(4)}", "ann")


@pytest.fixture
def bob(ann: Principal) -> Principal:
    """Another user of the same tenant."""
    return Principal(ann.tenant, "bob")


@pytest.fixture
def boss(ann: Principal) -> Principal:
    """An admin of the same tenant."""
    return Principal(ann.tenant, "boss", frozenset({"user", "admin"}))


@pytest.fixture
def stranger() -> Principal:
    """An admin of another tenant."""
    return Principal(f"tenant-{secrets.token_hex(4)}", "eve", frozenset({"user", "admin"}))
