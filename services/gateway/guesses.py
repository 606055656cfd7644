"""How many API keys that never opened anything may be looked up: those from one address, and all together. It knows no key.

Whoever makes up keys has each of them looked up in the ledger, so there are few of them at a time. A key that is found good gives its
guess back, and is none any more afterwards.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.chassis.errors import RateLimited

EACH_MAX, EACH_PER_S = 60, 1.0
"""In a burst, and lasting. Of a whole network of IPv6, which one household has."""
ALL_MAX, ALL_PER_S = 600, 100.0
SOURCES_MAX = 10_000


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Guesses:
    """`by_source` is off where a proxy is in front, which is one address for everybody."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, by_source: bool = True) -> None:
        self._clock = clock
        self._by_source = by_source
        self._all = _Bucket(ALL_MAX, clock())
        self._each: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> Callable[[], None]:
        """Take one guess; return how to give it back. Raises RateLimited."""
        buckets = [(self._all, ALL_MAX, ALL_PER_S)]
        if self._by_source:
            buckets.append((self._bucket(_network(address)), EACH_MAX, EACH_PER_S))
        now = self._clock()
        for bucket, most, per_s in buckets:
            bucket.left, bucket.at = min(most, bucket.left + (now - bucket.at) * per_s), now
        short_s = max((1 - bucket.left) / per_s for bucket, _, per_s in buckets)
        if short_s > 0:
            raise RateLimited(
                "too many API keys that are not known", limit_kind="api_keys", limit_scope="address", retry_after_ms=1 + int(short_s * 1000)
            )
        for bucket, _, _ in buckets:
            bucket.left -= 1

        def give_back() -> None:
            for bucket, _, _ in buckets:
                bucket.left += 1

        return give_back

    def _bucket(self, source: str) -> _Bucket:
        bucket = self._each.setdefault(source, _Bucket(EACH_MAX, self._clock()))
        self._each.move_to_end(source)
        if len(self._each) > SOURCES_MAX:
            self._each.popitem(last=False)
        return bucket


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
