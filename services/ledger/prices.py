"""The price book: which price applies to whom and when, and the figures that come with the project. Pure; it stores nothing."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from importlib import resources

from services.chassis.errors import PriceUnknown
from services.chassis.money import Price

NANOUSD = 1_000_000_000
ALL_TENANTS = ""
_DATED = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


@dataclass(frozen=True, slots=True)
class ListedPrice:
    """A version of a price. `price_id` is 0 until it is stored."""

    price: Price
    valid_from: datetime
    tenant: str = ALL_TENANTS
    price_id: int = 0

    @property
    def figures(self) -> tuple[int, ...]:
        """What makes two versions the same price."""
        p = self.price
        tokens = (p.input, p.output, p.cache_read, p.cache_write_5m, p.cache_write_1h)
        return (*tokens, p.long_context_above_tokens, p.long_input, p.long_output)


class PriceBook:
    """Every version of every price that was known when it was read."""

    def __init__(self, versions: Iterable[ListedPrice]) -> None:
        self._by_id = {listed.price_id: listed for listed in versions}
        self._by_model: defaultdict[tuple[str, str], list[ListedPrice]] = defaultdict(list)
        for listed in self._by_id.values():
            self._by_model[listed.price.provider, listed.price.model].append(listed)

    def in_force(self, tenant: str, provider: str, model: str, at: datetime) -> ListedPrice:
        """The price of `model` for `tenant` at `at`; the tenant's own goes before the common one.

        Providers answer with dated snapshots (`claude-haiku-4-5-20251001`), which cost what their family costs unless
        listed themselves. Raises PriceUnknown: an unknown price is never 0.
        """
        for name in (model, _DATED.sub("", model)):
            candidates = [
                listed
                for listed in self._by_model.get((provider, name), ())
                if listed.tenant in (ALL_TENANTS, tenant) and listed.valid_from <= at
            ]
            if candidates:
                return max(candidates, key=lambda listed: (listed.tenant != ALL_TENANTS, listed.valid_from, listed.price.version))
        raise PriceUnknown(f"the model {model[:128]} of {provider[:64]} has no price", provider=provider[:64], model=model[:128])

    def numbered(self, tenant: str, provider: str, model: str, number: int) -> ListedPrice | None:
        """Version `number` of the price of `model`, if it is one that `tenant` may have been told."""
        for name in (model, _DATED.sub("", model)):
            for listed in self._by_model.get((provider, name), ()):
                if listed.price.version == number and listed.tenant in (ALL_TENANTS, tenant):
                    return listed
        return None

    def versions(self) -> Iterable[ListedPrice]:
        """Every version, in no order."""
        return self._by_id.values()

    def models_of(self, tenant: str) -> set[tuple[str, str]]:
        """Provider and name of the models that `tenant` has prices of its own for."""
        return {(listed.price.provider, listed.price.model) for listed in self._by_id.values() if listed.tenant == tenant}

    def version(self, price_id: int) -> ListedPrice | None:
        """A stored version, or None if this book is older than it."""
        return self._by_id.get(price_id)

    def all_in_force(self, tenant: str, at: datetime) -> list[ListedPrice]:
        """What `tenant` pays now, one price a model, in alphabetical order."""
        found = []
        for provider, model in sorted(self._by_model):
            try:
                found.append(self.in_force(tenant, provider, model, at))
            except PriceUnknown:
                continue  # listed, but only from later on or for another tenant
        return found


def listed_prices() -> list[ListedPrice]:
    """The figures of prices.toml, in the file's order."""
    return parse_prices(resources.files(__package__).joinpath("prices.toml").read_text())


def parse_prices(text: str) -> list[ListedPrice]:
    """Read prices in USD per million tokens.

    Raises ValueError for a figure that is no whole number of nano-USD, KeyError for one that is missing.
    """
    found = []
    for row in tomllib.loads(text)["price"]:
        price = Price(
            provider=row["provider"],
            model=row["model"],
            input=nanousd(row["input"]),
            output=nanousd(row["output"]),
            cache_read=nanousd(row["cache_read"]),
            cache_write_5m=nanousd(row["cache_write_5m"]),
            cache_write_1h=nanousd(row["cache_write_1h"]),
            long_context_above_tokens=row.get("long_context_above_tokens", 0),
            long_input=nanousd(row.get("long_input", "0")),
            long_output=nanousd(row.get("long_output", "0")),
            source=row["source"],
        )
        found.append(ListedPrice(price, row["valid_from"]))
    return found


def nanousd(usd: str) -> int:
    """Turn a decimal string in USD into nano-USD. Raises ValueError unless it is a whole, non-negative number of them."""
    amount = Decimal(usd) * NANOUSD
    if amount != amount.to_integral_value() or amount < 0:
        raise ValueError(f"{usd} USD is not a whole number of nano-USD")
    return int(amount)


def usd(nanousd: int) -> str:
    """nano-USD as people read it: the exact amount in USD."""
    return f"{Decimal(nanousd) / NANOUSD:f}"
