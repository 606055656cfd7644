"""Percentiles of times that were counted in buckets, so that parts can be added up before anybody asks. Pure.

Bucket n ends at 0.01 * 1.1^n ms (`time_bucket` in the schema); what is read from it is within 4.8 % of every time counted there.
"""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

SMALLEST_MS = 0.01
GROWTH = 1.1
ERROR_MAX = (GROWTH - 1) / (GROWTH + 1)
"""How far a percentile may be from the true one, as a share of it. Times under `SMALLEST_MS` are read as it."""
_COUNT_BITS = 40


def unpacked(pairs: Iterable[int]) -> dict[int, int]:
    """Bucket to count, of a histogram as the database keeps it."""
    return {pair >> _COUNT_BITS: pair & ((1 << _COUNT_BITS) - 1) for pair in pairs}


def value_of(bucket: int) -> float:
    """The time that stands for a bucket, in milliseconds: as far, in proportion, from its lower as from its upper bound."""
    return SMALLEST_MS * GROWTH**bucket * (2 / (1 + GROWTH)) if bucket else SMALLEST_MS


def percentile(counts: Mapping[int, int], percent: int) -> float:
    """The least time that at least `percent` of all do not exceed (nearest rank), in milliseconds; 0 if there are none."""
    total = sum(counts.values())
    rank = max(1, math.ceil(Fraction(total * percent, 100)))
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return value_of(bucket)
    return 0.0
