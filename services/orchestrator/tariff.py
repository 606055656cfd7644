"""What models cost by the common price list, as last heard of the ledger, so that the cheapest can be asked.

It sets no money aside: a tenant may pay other prices, and what a call costs is said by its hold.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from services.chassis.errors import DomainError
from services.chassis.money import Price
from services.orchestrator.domain import Candidate

log = structlog.get_logger(__name__)

REFRESH_S, AGAIN_S = 300.0, 5.0
"""How often prices are asked for, and how soon again where that failed."""


class PriceList(Protocol):
    """Where prices are known."""

    async def prices(self) -> Mapping[tuple[str, str], Price]:
        """By provider and model. Raises DomainError."""
        ...


class Tariff:
    """Prices as last heard; none before the first time."""

    def __init__(self, source: PriceList) -> None:
        self._source = source
        self._prices: Mapping[tuple[str, str], Price] = {}

    def cheapest(self, candidates: Sequence[Candidate], input_tokens: int, output_tokens: int) -> Candidate:
        """The one that a call of that size costs least with, the first of those that cost the same. Without a price nobody is called
        cheap. `candidates` are not empty."""

        def cost(candidate: Candidate) -> tuple[bool, int]:
            price = self._prices.get((candidate.provider, candidate.model))
            return price is None, 0 if price is None else price.worst_case_nanousd(input_tokens, output_tokens)

        return min(candidates, key=cost)

    async def keep_forever(self) -> None:
        """Hear of new prices until cancelled. A ledger that is away leaves what is known."""
        while True:
            wait_s = REFRESH_S
            try:
                self._prices = await self._source.prices()
            except DomainError as error:
                log.debug("prices_not_heard", reason=error.reason)
                wait_s = AGAIN_S
            await asyncio.sleep(wait_s)
