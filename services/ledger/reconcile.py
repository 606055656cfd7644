"""What a provider says was used, beside what the books say: drift by day and model, and in all. Pure; the caller reads both sides."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from fractions import Fraction
from itertools import pairwise

from services.chassis.errors import RequestInvalid
from services.chassis.money import Price, Usage
from services.ledger.provider_exports import ExportRow

CELLS_MAX = 100_000
"""Periods, and days times models, that are held at once: eleven years of hours."""
REQUESTS_MAX = 1_000_000
"""Requests that are told by id: each is remembered, some 200 bytes of it, for the books have it once however often it is told."""
NO_USAGE = Usage()
_DATED = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")


def family(model: str) -> str:
    """A model without the date of its snapshot: providers name the snapshot, we may have asked for the family."""
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
class Drift:
    """One day of one model, as the provider and as the books have it."""

    day: date
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


def _share(pairs: Iterable[tuple[int, int]]) -> Fraction:
    told, differing = 0, 0
    for theirs, ours in pairs:
        told += theirs
        differing += abs(theirs - ours)
    return Fraction(differing, told) if told else Fraction(1 if differing else 0)


class Reconciliation:
    """Takes both sides in any order of rows."""

    def __init__(self) -> None:
        self._provider: defaultdict[tuple[date, str], Side] = defaultdict(Side)
        self._ledger: defaultdict[tuple[date, str], Side] = defaultdict(Side)
        self._periods: set[tuple[datetime, datetime]] = set()
        self._requests: dict[str, datetime | None] = {}
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
            self._provider[row.start.date(), model].add(row.usage, cost)
        if not row.request_id:
            self._periods.add((row.start, row.end))
        if len(self._periods) + len(self._provider) > CELLS_MAX:
            raise RequestInvalid(f"line {row.line} is one period or model too many", field=f"line {row.line}", bound=str(CELLS_MAX))

    def matched(self, row: ExportRow, booked: Mapping[str, tuple[datetime, Usage, int]]) -> None:
        """A row with a request id, beside what the books have by request id: since when, and what, counted at its first row only.

        Raises RequestInvalid for too many requests.
        """
        if row.request_id in self._requests:
            return
        if len(self._requests) >= REQUESTS_MAX:
            raise RequestInvalid(f"line {row.line} is one request too many", field=f"line {row.line}", bound=str(REQUESTS_MAX))
        if (found := booked.get(row.request_id)) is None:
            self._requests[row.request_id] = None
            return
        since, usage, cost_nanousd = found
        self._requests[row.request_id] = since
        self._ledger[row.start.date(), family(row.model)].add(usage, cost_nanousd)

    def taken(self) -> list[tuple[datetime, str]]:
        """The requests that the books have, by time: they are no part of what a period without ids has."""
        return sorted((since, request_id) for request_id, since in self._requests.items() if since is not None)

    def booked(self, start: datetime, model: str, usage: Usage, cost_nanousd: int) -> None:
        """What the books have of one period and model."""
        self._ledger[start.date(), family(model)].add(usage, cost_nanousd)

    def report(self) -> Report:
        keys = sorted(self._provider.keys() | self._ledger.keys())
        drifts = [Drift(day, model, self._provider[day, model], self._ledger[day, model]) for day, model in keys]
        unknown = sum(since is None for since in self._requests.values())
        return Report(drifts, unknown, sorted(self._unpriced))


def short_context(price: Price) -> Price:
    """The price without its step for long prompts: a sum over many calls is no long prompt."""
    return replace(price, long_context_above_tokens=0)
