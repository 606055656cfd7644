"""A range of time as whole days, whole hours and what is left over, so that sums kept by day and hour can answer for it. Pure."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
Grain = Literal["day", "hour", "row"]


@dataclass(frozen=True, slots=True)
class Span:
    """[start, end), to be read from the sums of `grain`, or from single rows."""

    grain: Grain
    start: datetime
    end: datetime


def needs_rows(group_by: Collection[str]) -> bool:
    """Whether only single operations can tell: no sums are kept by session, step or purpose, nor by hour of a user or key."""
    names = set(group_by)
    return bool(names & {"session", "step", "purpose"}) or ("hour" in names and bool(names & {"user", "key"}))


def spans(start: datetime, end: datetime, *, days: bool, hours: bool) -> list[Span]:
    """Cut [start, end) into the fewest spans: coarse ones inside, fine ones at the edges. Times are in UTC; `days`, `hours` = are there
    sums of that kind?"""
    grains: list[tuple[Grain, timedelta]] = []
    if days:
        grains.append(("day", DAY))
    if hours:
        grains.append(("hour", HOUR))
    return _cut(start, end, grains)


def _cut(start: datetime, end: datetime, grains: list[tuple[Grain, timedelta]]) -> list[Span]:
    if start >= end:
        return []
    if not grains:
        return [Span("row", start, end)]
    (grain, length), *finer = grains
    first, last = _floor(start + length - timedelta.resolution, length), _floor(end, length)
    if first >= last:
        return _cut(start, end, finer)
    return [*_cut(start, first, finer), Span(grain, first, last), *_cut(last, end, finer)]


def _floor(moment: datetime, length: timedelta) -> datetime:
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + (moment - midnight) // length * length
