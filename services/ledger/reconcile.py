"""What a provider says was used, beside what the books say: drift by hour and model, and in all. Pure; the caller reads both sides."""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from itertools import pairwise

from services.chassis.errors import RequestInvalid
from services.chassis.money import Price, Usage
from services.ledger.provider_exports import ExportRow

CELLS_MAX = 100_000
"""Periods, and hours times models, that are held at once: eleven years of one model."""
REQUESTS_MAX = 1_000_000
"""Requests that a file may name: each is remembered, so that none is compared twice."""
NO_USAGE = Usage()
_DATED = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


def family(model: str) -> str:
    """A model without the date of its snapshot, or `latest`: providers name the snapshot, we may have asked for the family."""
    return _DATED.sub("", model)


@dataclass(slots=True)
class Side:
    """Sums of one side."""

    usage: Usage = NO_USAGE
    cost_nanousd: int = 0

    def add(self, usage: Usage, cost_nanousd: int) -> None:
        self.usage += usage
        self.cost_nanousd += cost_nanousd

    @property
    def tokens(self) -> int:
        return self.usage.prompt_tokens + self.usage.output_tokens


@dataclass(frozen=True, slots=True)
class Call:
    """What the books have of one provider request."""

    usage: Usage
    cost_nanousd: int
    accepted: Sequence[datetime]
    """When the operations were accepted that it is booked for: one, unless a provider gives an id again."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One model in one hour, or in a longer period of the export that begins then, as the provider and as the books have it."""

    start: datetime
    model: str
    provider: Side
    ledger: Side


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was compared. Differences of opposite sign do not cancel out."""

    drifts: list[Drift]
    unknown_requests: int
    """Requests the provider names and the books do not have."""
    unpriced: list[str]
    """Models that the provider tells no cost of and we know no price of: their cost is missing on its side."""

    @property
    def tokens_drift(self) -> Fraction:
        """Differing tokens as a share of the provider's."""
        return _share((drift.provider.tokens, drift.ledger.tokens) for drift in self.drifts)

    @property
    def cost_drift(self) -> Fraction:
        """Differing money as a share of the provider's."""
        return _share((drift.provider.cost_nanousd, drift.ledger.cost_nanousd) for drift in self.drifts)

    @property
    def worst(self) -> Fraction:
        return max(self.tokens_drift, self.cost_drift)


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def _share(pairs: Iterable[tuple[int, int]]) -> Fraction:
    told, differing = 0, 0
    for theirs, ours in pairs:
        told += theirs
        differing += abs(theirs - ours)
    return Fraction(differing, told) if told else Fraction(1 if differing else 0)


class Reconciliation:
    """Takes both sides in any order of rows."""

    def __init__(self) -> None:
        self._provider: defaultdict[tuple[datetime, str], Side] = defaultdict(Side)
        self._ledger: defaultdict[tuple[datetime, str], Side] = defaultdict(Side)
        self._periods: set[tuple[datetime, datetime]] = set()
        self._requests: set[str] = set()
        self._accepted: list[tuple[datetime, str]] = []
        self._unknown_requests = 0
        self._unpriced: set[str] = set()

    def periods(self) -> list[tuple[datetime, datetime]]:
        """[start, end) of what the provider told without request ids: the books are asked for the same.

        Raises RequestInvalid if two overlap, for then the books' side would be counted twice.
        """
        ordered = sorted(self._periods)
        for one, other in pairwise(ordered):
            if other[0] < one[1]:
                raise RequestInvalid(f"the periods that begin at {one[0]} and {other[0]} overlap", field="file")
        return ordered

    def told(self, row: ExportRow, price: Price | None) -> None:
        """A row of the export; without a cost of its own it is priced by `price`, if there is one.

        Raises RequestInvalid for too many periods.
        """
        if row.model:
            model, cost = family(row.model), row.cost_nanousd
            if cost is None:
                cost = short_context(price).cost_nanousd(row.usage) if price else 0
                self._unpriced.update([] if price else [model])
            self._provider[_hour(row.start), model].add(row.usage, cost)
        if not row.request_id:
            self._periods.add((row.start, row.end))
        if len(self._periods) + len(self._provider) > CELLS_MAX:
            raise RequestInvalid(f"line {row.line} is one period or model too many", field=f"line {row.line}", bound=str(CELLS_MAX))

    def matched(self, row: ExportRow, booked: Mapping[str, Call]) -> None:
        """A row with a request id, beside what the books have by request id.

        Named again, the request adds to the provider's side alone: its rows together are what it was billed. Raises RequestInvalid for
        too many requests.
        """
        if row.request_id in self._requests:
            return
        if len(self._requests) == REQUESTS_MAX:
            raise RequestInvalid(f"line {row.line} is one request too many", field=f"line {row.line}", bound=str(REQUESTS_MAX))
        self._requests.add(row.request_id)
        if (found := booked.get(row.request_id)) is None:
            self._unknown_requests += 1
        else:
            self._ledger[_hour(row.start), family(row.model)].add(found.usage, found.cost_nanousd)
            self._accepted.extend((moment, row.request_id) for moment in found.accepted)

    def requests_in(self, start: datetime, end: datetime) -> list[str]:
        """Matched requests that were accepted in [start, end): they are no part of the rest of that time."""
        self._accepted.sort()  # a list that is sorted already costs one look
        return [request_id for _, request_id in self._accepted[self._place(start) : self._place(end)]]

    def _place(self, moment: datetime) -> int:
        return bisect_left(self._accepted, (moment, ""))

    def booked(self, start: datetime, model: str, usage: Usage, cost_nanousd: int) -> None:
        """What the books have of one period and model."""
        self._ledger[_hour(start), family(model)].add(usage, cost_nanousd)

    def report(self) -> Report:
        keys = sorted(self._provider.keys() | self._ledger.keys())
        drifts = [Drift(start, model, self._provider[start, model], self._ledger[start, model]) for start, model in keys]
        return Report(drifts, self._unknown_requests, sorted(self._unpriced))


def short_context(price: Price) -> Price:
    """The price without its step for long prompts: a sum over many calls is no long prompt."""
    return replace(price, long_context_above_tokens=0)
