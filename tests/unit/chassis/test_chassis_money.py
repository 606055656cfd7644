"""Money: integers only, rounded up once, and no call costs more than its worst case."""

from hypothesis import given
from hypothesis import strategies as st

from services.chassis.money import Price, Usage

SONNET = Price(
    "anthropic",
    "m",
    input=2_000_000_000,
    output=10_000_000_000,
    cache_read=100_000_000,
    cache_write_5m=2_500_000_000,
    cache_write_1h=4_000_000_000,
)
HAIKU = Price(
    "anthropic", "m", input=100_000_000, output=500_000_000, cache_read=10_000_000, cache_write_5m=125_000_000, cache_write_1h=200_000_000,
    long_context_above_tokens=100_000, long_input=500_000_000, long_output=2_500_000_000,
)  # fmt: skip
tokens = st.integers(0, 2_000_000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    write = draw(tokens)
    return Usage(draw(tokens), draw(tokens), draw(tokens), write, draw(st.integers(0, write)))


@st.composite
def prices(draw: st.DrawFn) -> Price:
    amounts = st.integers(0, 10**11)
    low_in, low_out = draw(amounts), draw(amounts)
    return Price(
        "p", "m", 1, low_in, low_out, draw(amounts), draw(amounts), draw(amounts),
        long_context_above_tokens=draw(st.sampled_from([0, 1000, 100_000])), long_input=low_in * 5, long_output=low_out * 5,
    )  # fmt: skip


def test_cost_of_each_kind_of_token_is_counted_at_its_own_price() -> None:
    """1,000 of each kind at Sonnet prices, by hand: 2 + 10 + 0.1 + 2.5 + 4 milli-USD."""
    usage = Usage(1000, 1000, 1000, 2000, 1000)

    assert SONNET.cost_nanousd(usage) == 2_000_000 + 10_000_000 + 100_000 + 2_500_000 + 4_000_000


def test_cost_is_rounded_up_once() -> None:
    """One token at one nano-USD per million is not free."""
    assert Price("p", "m", input=1, output=1).cost_nanousd(Usage(1, 1)) == 1


def test_long_prompts_pay_the_long_price_for_every_token() -> None:
    """The bound itself is still the short price; one more token changes all of them."""
    assert HAIKU.cost_nanousd(Usage(100_000, 10)) == 10_000_000 + 5_000
    assert HAIKU.cost_nanousd(Usage(100_001, 10)) == 50_000_500 + 25_000


@given(prices(), usages(), tokens, tokens)
def test_no_call_within_its_bounds_costs_more_than_the_worst_case(price: Price, usage: Usage, more_in: int, more_out: int) -> None:
    """The hold always covers the cost."""
    assert price.cost_nanousd(usage) <= price.worst_case_nanousd(usage.prompt_tokens + more_in, usage.output_tokens + more_out)
