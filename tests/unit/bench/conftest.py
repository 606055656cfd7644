"""The provider simulator for its own tests."""

from collections.abc import AsyncIterator

import pytest
from anthropic import AsyncAnthropic

from bench.provider import Simulator, simulator


@pytest.fixture(scope="session")
async def running_provider() -> AsyncIterator[Simulator]:
    """One simulator for the session."""
    async with simulator() as running:
        yield running


@pytest.fixture
async def provider(running_provider: Simulator) -> Simulator:
    """The simulator, with nothing remembered."""
    await running_provider.reset()
    return running_provider


@pytest.fixture(scope="session")
async def client(running_provider: Simulator) -> AsyncIterator[AsyncAnthropic]:
    """The real SDK, pointed at the simulator."""
    async with AsyncAnthropic(base_url=running_provider.url, api_key="k", max_retries=0, timeout=5) as sdk:
        yield sdk
