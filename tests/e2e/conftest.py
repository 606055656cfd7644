"""One whole suite for all end-to-end tests, as real processes, with the simulated provider and a collector of spans."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.suite import Suite, ingest, running

DOCUMENTS = {
    "The heron gate": "The heron gate at Lower Mill was rebuilt by Elsa Brandt after the great flood. It is opened by a bronze wheel.",
    "The eel ladder": "The eel ladder beside the weir lets young eels climb to the upper pond. Every spring the guild cleans it.",
    "The turbine hall": "The turbine hall houses a Francis turbine. Its shaft drives a generator that lights the village.",
}
"""Small enough that every question about them finds them all."""

QUICK = {
    "TAILRACE_ORCHESTRATOR_DETACH_GRACE_S": "1",
    "TAILRACE_MODEL_FIRST_TOKEN_S": "2",
    "TAILRACE_MODEL_STALL_S": "1",
}
"""Patience short enough for tests to wait for its end."""


@pytest.fixture(scope="session")
async def suite() -> AsyncIterator[Suite]:
    """The suite, ready, with documents to ask about."""
    async with running(traces=True, **QUICK) as suite:
        async with suite.client() as client:
            await ingest(client, DOCUMENTS)
        yield suite


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[httpx.AsyncClient]:
    """A user of the tenant the documents belong to, and a provider that has forgotten everything."""
    await suite.provider.reset()
    async with suite.client() as client:
        yield client
