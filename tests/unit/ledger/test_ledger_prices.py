"""The price book, and the figures that come with the project."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from services.chassis.errors import PriceUnknown
from services.chassis.money import MTOK, Price, Usage
from services.ledger.prices import NANOUSD, ListedPrice, PriceBook, listed_prices, nanousd, parse_prices

JULY, AUGUST, SEPTEMBER = (datetime(2026, month, 1, tzinfo=UTC) for month in (7, 8, 9))
NOW = datetime(2026, 11, 1, tzinfo=UTC)
NUMBERED = [
    ListedPrice(Price(p.price.provider, p.price.model, n, *p.figures, source=p.price.source), p.valid_from, "", n)
    for n, p in enumerate(listed_prices(), 1)
]


def listed(version: int, valid_from: datetime, tenant: str = "", model: str = "m") -> ListedPrice:
    return ListedPrice(Price("p", model, version), valid_from, tenant, version)


def test_the_version_in_force_is_the_latest_that_has_begun() -> None:
    """A later day goes before an earlier one, a later version before an earlier one of the same day."""
    book = PriceBook([listed(1, JULY), listed(2, SEPTEMBER), listed(3, JULY)])

    assert book.in_force("t", "p", "m", AUGUST).price.version == 3
    assert book.in_force("t", "p", "m", SEPTEMBER).price.version == 2


def test_a_tenants_own_price_goes_before_the_common_one_for_that_tenant_alone() -> None:
    """Also when the common one is newer."""
    book = PriceBook([listed(1, JULY, "mine"), listed(2, AUGUST)])

    assert book.in_force("mine", "p", "m", NOW).price.version == 1
    assert book.in_force("other", "p", "m", NOW).price.version == 2
    assert [found.price.version for found in book.all_in_force("other", NOW)] == [2]


def test_what_has_no_price_yet_or_for_this_tenant_is_unknown() -> None:
    """Never 0, never somebody else's."""
    book = PriceBook([listed(1, SEPTEMBER), listed(2, JULY, "mine", "private")])
    for tenant, provider, model, at in (
        ("t", "p", "m", AUGUST),
        ("t", "q", "m", NOW),
        ("t", "p", "n", NOW),
        ("t", "p", "private", NOW),
        ("t", "p", "m-9", NOW),
    ):
        with pytest.raises(PriceUnknown):
            book.in_force(tenant, provider, model, at)

    assert book.all_in_force("t", AUGUST) == []


@pytest.mark.parametrize("suffix", ["-20251001", "-2025-10-01", "-latest"])
def test_a_dated_snapshot_costs_what_its_family_does_unless_listed_itself(suffix: str) -> None:
    """Providers answer with a snapshot's name."""
    book = PriceBook([listed(1, JULY), listed(2, JULY, model="n"), listed(3, JULY, model="n" + suffix)])

    assert book.in_force("t", "p", "m" + suffix, NOW).price.version == 1
    assert book.in_force("t", "p", "n" + suffix, NOW).price.version == 3


@pytest.mark.parametrize(
    ("model", "usage", "cost_usd"),
    [
        ("claude-opus-5-5", Usage(1_000_000, 1_000_000), "24"),
        ("claude-opus-5-5", Usage(cache_read_tokens=1_000_000), "0.20"),
        ("claude-sonnet-5-5", Usage(cache_read_tokens=1_000_000), "0.10"),
        ("claude-sonnet-5-5", Usage(cache_write_tokens=2_000_000, cache_write_1h_tokens=1_000_000), "6.50"),
        ("claude-haiku-5-5", Usage(100_000, 1_000_000), "0.51"),
        ("claude-haiku-5-5", Usage(100_001, 1_000_000), "2.5500005"),
        ("claude-haiku-5-5", Usage(1, cache_read_tokens=100_000), "0.0050005"),
        ("claude-haiku-4-5", Usage(1_000_000, 1_000_000), "6"),
        ("claude-fable-5-1", Usage(1_000_000, 1_000_000), "60"),
        ("claude-opus-5", Usage(1_000_000, 1_000_000), "30"),
    ],
)
def test_known_models_cost_what_their_provider_says(model: str, usage: Usage, cost_usd: str) -> None:
    """Figures from the price list, by hand."""
    price = PriceBook(NUMBERED).in_force("t", "anthropic", model, NOW).price

    assert price.cost_nanousd(usage) == nanousd(cost_usd)


def test_cache_prices_are_the_stated_multiples_of_the_input_price() -> None:
    """Writes 1.25 and 2 times, reads 0.05 times on Opus 5.5 and Sonnet 5.5 (from 7 October on) and 0.10 times elsewhere."""
    for known in PriceBook(NUMBERED).all_in_force("t", NOW):
        price = known.price
        if price.provider in ("openai", "gemini", "voyage"):
            continue
        share = 20 if price.model in ("claude-opus-5-5", "claude-sonnet-5-5") else 10

        assert (price.cache_write_5m * 4, price.cache_write_1h) == (price.input * 5, price.input * 2), price.model
        assert price.cache_read * share == price.input, price.model
        assert price.source


def test_gpt_costs_its_multiples_for_cache_and_long_prompts() -> None:
    """Writes 1.25 and 2 times, reads 0.05 times but on Luna; above 272,000 tokens twice for what goes in, 1.5 times for what comes out."""
    for model in ("gpt-6.2-astra", "gpt-6.2-sol", "gpt-6.1-terra", "gpt-6-luna"):
        price = PriceBook(NUMBERED).in_force("t", "openai", model, datetime(2026, 11, 26, tzinfo=UTC)).price
        long = (price.long_context_above_tokens, price.long_input, price.long_output * 2)

        assert (price.cache_write_5m * 4, price.cache_write_1h) == (price.input * 5, price.input * 2), model
        assert price.cache_read * (10 if model == "gpt-6-luna" else 20) == price.input, model
        assert long == (272_000, price.input * 2, price.output * 3), model


@pytest.mark.parametrize(("model", "last_day"), [("gemini-4-argon", (2026, 11, 30)), ("gemini-3.8-flash", (2026, 12, 31))])
def test_gemini_costs_twice_as_much_once_its_introduction_is_over(model: str, last_day: tuple[int, int, int]) -> None:
    """Both prices are listed ahead, and what is written to the cache costs what any token does."""
    book, day = PriceBook(NUMBERED), datetime(*last_day, 23, 59, tzinfo=UTC)
    before, after = (book.in_force("t", "gemini", model, at).price for at in (day, day + timedelta(minutes=1)))

    assert (before.input * 2, before.output * 2, before.cache_read * 2) == (after.input, after.output, after.cache_read)
    assert (after.cache_write_5m, after.cache_write_1h) == (after.input, after.input)


def test_a_cached_token_of_an_embedding_costs_what_any_does() -> None:
    """Embeddings have no cache: whoever reports a token there anyway does not get it for nothing."""
    for provider, model, usd in (
        ("openai", "text-embedding-3-small", "0.02"),
        ("openai", "text-embedding-3-large", "0.13"),
        ("openai", "text-embedding-ada-002", "0.10"),
        ("gemini", "gemini-embedding-001", "0.15"),
        ("voyage", "voyage-3-large", "0.18"),
        ("voyage", "voyage-3.5", "0.06"),
        ("voyage", "voyage-3.5-lite", "0.02"),
    ):
        price = PriceBook(NUMBERED).in_force("t", provider, model, NOW).price

        for usage in (Usage(1_000_000), Usage(cache_read_tokens=1_000_000), Usage(cache_write_tokens=1_000_000)):
            assert price.cost_nanousd(usage) == nanousd(usd)


NEWER = {
    *("extractive", "claude-fable-5-1", "claude-opus-5-5", "claude-opus-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-haiku-4-5"),
    *("gpt-6.2-astra", "gpt-6.2-sol", "gpt-6.1-terra", "gpt-6-luna", "gemini-4-argon", "gemini-3.8-flash"),
    *("gemini-embedding-001", "voyage-3.5", "voyage-3.5-lite"),
}
"""What the collected list does not know, because it is of September 2025 or because the model is our own."""


def test_prices_are_those_of_a_list_that_others_collected(data_dir: Path) -> None:
    """Every figure that the list has, for every model it knows; and it knows every model that is not newer than itself."""
    collected = json.loads((data_dir / "prices" / "litellm_format_model_prices.json").read_text(), parse_float=Decimal)
    fields = {
        "input": "input_cost_per_token",
        "output": "output_cost_per_token",
        "cache_read": "cache_read_input_token_cost",
        "cache_write_5m": "cache_creation_input_token_cost",
    }
    unknown = set()
    for listed in listed_prices():
        price = listed.price
        row = listed_by_others(collected, price.provider, price.model)
        if row is None:
            unknown.add(price.model)
            continue
        theirs = {field: row[name] * NANOUSD * MTOK for field, name in fields.items() if name in row}
        assert {field: getattr(price, field) for field in theirs} == theirs, price.model

    assert listed_by_others(collected, "gemini", "gemini-1.5-pro") is not None  # of each provider it would know a model that is there
    assert listed_by_others(collected, "anthropic", "claude-3-opus-20240229") is not None
    assert unknown == NEWER, f"not in the list: {sorted(unknown)}"


def listed_by_others(collected: dict[str, Any], provider: str, model: str) -> dict[str, Any] | None:
    """A model's row: some are listed by their name, some with their provider before it, and one name may be another provider's."""
    rows = (collected.get(name) for name in (f"{provider}/{model}", model))
    return next((row for row in rows if row is not None and row["litellm_provider"] == provider), None)


def test_answering_without_a_provider_is_free_and_listed() -> None:
    """Free is a price like any other, not the lack of one."""
    price = PriceBook(NUMBERED).in_force("t", "extractive", "extractive", NOW).price

    assert price.worst_case_nanousd(10_000_000, 1_000_000) == 0


@pytest.mark.parametrize("figure", ["0.0000000001", "-1", "1e-10"])
def test_a_figure_that_is_no_whole_nano_usd_is_refused(figure: str) -> None:
    """Nothing is rounded on the way in."""
    with pytest.raises(ValueError, match="nano-USD"):
        nanousd(figure)


def test_a_price_without_all_its_figures_is_refused() -> None:
    """A figure that was forgotten must not become 0."""
    with pytest.raises(KeyError):
        parse_prices('[[price]]\nprovider = "p"\nmodel = "m"\nvalid_from = 2026-01-01T00:00:00Z\nsource = "s"\ninput = "1"\noutput = "1"\n')
