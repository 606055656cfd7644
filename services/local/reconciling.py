"""A usage export beside the books, for people: opens the file and the database and shows what differs. What differs, the ledger decides."""

import re
from fractions import Fraction
from pathlib import Path

from services.ledger.postgres_database import opened
from services.ledger.postgres_reconcile import reconcile
from services.ledger.provider_exports import csv_rows, json_rows
from services.ledger.reconcile import Report

DATABASE_WAIT_S = 5.0
_PERCENT = re.compile(r"(\d{1,3})(?:\.(\d{1,6}))?%", re.ASCII)


def percent(text: str) -> Fraction | None:
    """`1%` or `0.5%` as a share, None for anything else."""
    return Fraction(text[:-1]) / 100 if _PERCENT.fullmatch(text) else None


async def compared(file: Path, url: str) -> Report:
    """Compare the export in `file` with the books in the database. Raises DomainError, OSError, UnicodeError."""
    async with opened(url, connections_max=2, wait_s=DATABASE_WAIT_S) as database:
        with file.open(encoding="utf-8-sig", newline="") as opened_file:
            read = csv_rows if file.suffix.lower() == ".csv" else json_rows
            return await reconcile(database, read(opened_file))


def table(report: Report) -> str:
    """A line for each period and model, and one for all."""
    lines = [f"{'since (UTC)':<16}  {'model':<32}  {'tokens told':>14}  {'booked':>14}  {'USD told':>16}  {'booked':>16}"]
    for drift in report.drifts:
        theirs, ours = drift.provider, drift.ledger
        mark = "" if theirs.tokens == ours.tokens and theirs.cost_nanousd == ours.cost_nanousd else "  *"
        lines.append(
            f"{drift.start:%Y-%m-%d %H:%M}  {drift.model[:32]:<32}  {theirs.tokens:>14}  {ours.tokens:>14}  {_usd(theirs.cost_nanousd):>16}"
            f"  {_usd(ours.cost_nanousd):>16}{mark}"
        )
    lines.append(f"drift: tokens {_percent(report.tokens_drift)}, cost {_percent(report.cost_drift)}")
    return "\n".join(lines)


def alerts_of(report: Report, bound: Fraction, bound_text: str) -> list[str]:
    """What somebody has to look at; nothing if the books are within the bound of what the provider says."""
    alerts = []
    if report.worst > bound:
        alerts.append(f"tokens or cost drift past the bound of {bound_text}")
    if report.unknown_requests:
        alerts.append(f"{report.unknown_requests} requests of the provider are not in the books")
    if report.unpriced:
        alerts.append(f"without a price, and without a cost in the export: {', '.join(report.unpriced)}")
    return alerts


def _usd(nanousd: int) -> str:
    whole, rest = divmod(nanousd, 1_000_000_000)
    return f"{whole}.{rest:09d}"


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.3f} %"
