"""Who is cheapest for a small call."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import pytest

from services.chassis.errors import Unavailable
from services.chassis.money import Price
from services.orchestrator import tariff
from services.orchestrator.tariff import Tariff
from tests.fakes.orchestrator_world import until
from tests.fakes.scripted_model import CANDIDATE

DEAR, CHEAP, TALKATIVE, UNKNOWN = (replace(CANDIDATE, model=name) for name in ("dear", "cheap", "talkative", "unknown"))
PRICES = {
    (model.provider, model.model): Price(model.provider, model.model, 1, per_input, per_output, 0, 0, 0)
    for model, per_input, per_output in ((DEAR, 9_000, 9_000), (CHEAP, 1_000, 4_000), (TALKATIVE, 500, 40_000))
}


class Source:
    def __init__(self) -> None:
        self.asked, self.away = 0, False

    async def prices(self) -> Mapping[tuple[str, str], Price]:
        self.asked += 1
        if self.away:
            raise Unavailable("the ledger is away", dependency="ledger")
        return PRICES


@contextlib.asynccontextmanager
async def kept(source: Source) -> AsyncIterator[Tariff]:
    made = Tariff(source)
    keeping = asyncio.create_task(made.keep_forever())
    try:
        yield made
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def test_the_cheapest_for_the_size_of_the_call_is_chosen() -> None:
    """Not the first, nor the one with the lowest price of one kind; one whose price nobody knows comes last."""
    source = Source()
    async with kept(source) as made:
        await until(lambda: source.asked)

        assert made.cheapest([UNKNOWN, DEAR, TALKATIVE, CHEAP], 1_000_000, 1_000_000) == CHEAP
        assert made.cheapest([DEAR, TALKATIVE, CHEAP], 1_000_000, 1) == TALKATIVE
        assert made.cheapest([UNKNOWN, DEAR], 1_000_000, 1_000_000) == DEAR
        assert made.cheapest([UNKNOWN], 1, 1) == UNKNOWN


async def test_before_prices_are_known_it_is_the_first() -> None:
    """As the file has them in order."""
    assert Tariff(Source()).cheapest([DEAR, CHEAP], 1_000_000, 1_000_000) == DEAR


async def test_a_ledger_that_is_away_is_asked_again_and_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices do not go with it."""
    monkeypatch.setattr(tariff, "REFRESH_S", 0.01)
    monkeypatch.setattr(tariff, "AGAIN_S", 0.01)
    source = Source()
    async with kept(source) as made:
        await until(lambda: source.asked)
        source.away, before = True, source.asked
        await until(lambda: source.asked > before + 2)

        assert made.cheapest([DEAR, CHEAP], 1_000_000, 1_000_000) == CHEAP
