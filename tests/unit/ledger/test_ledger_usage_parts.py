"""The pure parts of usage: percentiles of histograms, ranges cut into days and hours, savings, and how long operations are kept."""

import itertools
import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.money import Price, Usage
from services.ledger.histograms import ERROR_MAX, GROWTH, SMALLEST_MS, percentile, unpacked
from services.ledger.roller import kept_since, months_kept_since
from services.ledger.savings import prompt_cache_saved_nanousd, tiering_saved_nanousd
from services.ledger.spans import DAY, HOUR, spans

MOMENTS = st.datetimes(datetime(2026, 1, 1), datetime(2026, 3, 1), timezones=st.just(UTC))
HAIKU = Price(
    "anthropic", "haiku", input=1_000_000, output=5_000_000, cache_read=100_000, cache_write_5m=1_250_000, cache_write_1h=2_000_000
)
OPUS = Price(
    "anthropic", "opus", input=5_000_000, output=25_000_000, cache_read=500_000, cache_write_5m=6_250_000, cache_write_1h=10_000_000
)


def bucket_of(ms: float) -> int:
    """As the schema's `time_bucket`, which an integration test compares."""
    return 0 if ms <= SMALLEST_MS else min(math.ceil(math.log(ms / SMALLEST_MS) / math.log(GROWTH)), 266)


@given(st.lists(st.floats(SMALLEST_MS, 1e9), min_size=1), st.sampled_from([50, 90, 99, 100]))
def test_a_percentile_is_within_the_stated_error_of_the_true_one(times: list[float], percent: int) -> None:
    """The true one by nearest rank: the least time that so many do not exceed."""
    counts: dict[int, int] = {}
    for ms in times:
        counts[bucket_of(ms)] = counts.get(bucket_of(ms), 0) + 1
    true = sorted(times)[math.ceil(len(times) * percent / 100) - 1]

    assert percentile(counts, percent) == pytest.approx(true, rel=ERROR_MAX * 1.0001)
    assert ERROR_MAX < 0.05


def test_no_times_have_no_percentile_and_pairs_unpack() -> None:
    """Nothing is 0; a pair is bucket and count."""
    assert percentile({}, 99) == 0.0
    assert unpacked([(3 << 40) | 7, (266 << 40) | 1]) == {3: 7, 266: 1}


@given(MOMENTS, MOMENTS, st.booleans(), st.booleans())
def test_spans_cover_a_range_once_and_coarse_ones_are_whole(start: datetime, end: datetime, days: bool, hours: bool) -> None:
    """Without gap or overlap; a day is a UTC day, an hour an hour, and no more is read singly than one of them at each edge."""
    cut = spans(start, end, days=days, hours=hours)
    if start >= end:
        assert cut == []
        return

    assert (cut[0].start, cut[-1].end) == (start, end)
    assert all(one.end == other.start for one, other in itertools.pairwise(cut))
    whole = {"day": DAY, "hour": HOUR, "row": timedelta.resolution}
    epoch = datetime(2026, 1, 1, tzinfo=UTC)
    for span in cut:
        assert span.start < span.end
        assert (span.start - epoch) % whole[span.grain] == (span.end - epoch) % whole[span.grain] == timedelta()
    singly = sum((span.end - span.start for span in cut if span.grain == "row"), timedelta())
    assert singly < 2 * (HOUR if hours else DAY if days else end - start + HOUR)


def test_prompt_caching_saves_what_reads_are_cheaper_less_what_writes_cost_on_top() -> None:
    """1,000,000 read at a tenth save 0.9 USD; 1,000,000 written for an hour cost 1 USD more than plain input."""
    assert prompt_cache_saved_nanousd(HAIKU, Usage(input_tokens=10, cache_read_tokens=1_000_000, output_tokens=7)) == 900_000
    assert prompt_cache_saved_nanousd(HAIKU, Usage(cache_write_tokens=1_000_000, cache_write_1h_tokens=1_000_000)) == -1_000_000
    assert prompt_cache_saved_nanousd(HAIKU, Usage(input_tokens=10, output_tokens=7)) == 0


def test_a_tier_saves_what_the_baseline_would_have_cost_more() -> None:
    """Compared with the same provider only, and below 0 for a dearer model."""
    used = Usage(input_tokens=1_000_000, output_tokens=1_000_000)

    assert tiering_saved_nanousd(HAIKU, OPUS, used) == 24_000_000
    assert tiering_saved_nanousd(OPUS, HAIKU, used) == -24_000_000
    assert tiering_saved_nanousd(Price("other", "m"), OPUS, used) == 0


def test_operations_are_kept_for_whole_days() -> None:
    """From a midnight in UTC on, at least so many days back."""
    assert kept_since(datetime(2026, 3, 31, 1, 2, tzinfo=UTC), 30) == datetime(2026, 3, 1, tzinfo=UTC)
    assert months_kept_since(datetime(2026, 3, 31, 1, 2, tzinfo=UTC), 30) == datetime(2026, 3, 1, tzinfo=UTC)
    assert months_kept_since(datetime(2026, 3, 30, 23, 59, tzinfo=UTC), 30) == datetime(2026, 2, 1, tzinfo=UTC)
