"""Books holds that nobody resolved in time. What that books is decided in `holds`; where it is written, in the store."""

import asyncio

import structlog

from services.chassis.errors import DomainError
from services.chassis.telemetry import span
from services.ledger.ports import HoldBook

log = structlog.get_logger(__name__)

SWEEP_MAX = 1_000
"""Holds booked in one go; the rest waits for the next."""


async def sweep(holds: HoldBook, grace_ms: int) -> int:
    """Book what has expired, each hold in a transaction of its own; return how many."""
    booked = 0
    while booked < SWEEP_MAX and (hold_id := await holds.expire_one(grace_ms)) is not None:
        log.warning("hold_expired", hold_id=hold_id)
        booked += 1
    return booked


async def sweep_forever(holds: HoldBook, *, interval_ms: int, grace_ms: int) -> None:
    """Sweep every `interval_ms`. A failure is logged and the next round tries again: money waits, it is not lost."""
    while True:
        try:
            with span("ledger.sweep"):
                await sweep(holds, grace_ms)
        except DomainError as error:
            log.warning("sweep_put_off", reason=error.reason)
        except Exception as error:
            log.exception("sweep_failed", error=type(error).__name__)
        await asyncio.sleep(interval_ms / 1000)
