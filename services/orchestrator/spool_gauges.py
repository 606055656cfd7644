"""The spool's figures as gauges, for whoever watches from outside. It measures and tells; what is done about it is decided nowhere here."""

import asyncio

from services.chassis.errors import Unavailable
from services.chassis.telemetry import gauge
from services.orchestrator.spool import Figures, Spool

INTERVAL_S = 5.0
"""How often the figures are measured: one read of one row each time."""

RECORDS = gauge("tailrace.spool.records", "{record}", "Records that wait for the ledger")
OLDEST = gauge("tailrace.spool.oldest", "s", "How long the oldest of them has waited")
SIZE = gauge("tailrace.spool.size", "By", "What the spool takes on disk")
DEAD_LETTERS = gauge("tailrace.spool.dead_letters", "{record}", "Records put aside because the ledger can never book them")
FULL = gauge("tailrace.spool.full", "1", "1 while the spool's disk is full")
BROKEN = gauge("tailrace.spool.broken", "1", "1 once the spool's disk has failed")


async def figures_of(spool: Spool) -> Figures:
    """What can be told of the spool now, also of one whose disk has failed."""
    try:
        return await spool.figures()
    except Unavailable:
        return Figures(spool.depth, 0.0, 0, spool.dead_letters, full=False, broken=True)


def tell(figures: Figures) -> None:
    """Set the gauges."""
    for instrument, measured in (
        (RECORDS, figures.depth),
        (OLDEST, figures.oldest_s),
        (SIZE, figures.size_bytes),
        (DEAD_LETTERS, figures.dead_letters),
        (FULL, int(figures.full)),
        (BROKEN, int(figures.broken)),
    ):
        instrument.set(measured)


async def tell_forever(spool: Spool, interval_s: float = INTERVAL_S) -> None:
    """Measure and tell until cancelled."""
    while True:
        tell(await figures_of(spool))
        await asyncio.sleep(interval_s)
