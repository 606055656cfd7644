"""Books holds that nobody resolved in time, takes leases back, forgets deletions. What is booked, and where, is decided elsewhere."""

import asyncio
import time

import structlog

from services.chassis.errors import DomainError
from services.chassis.telemetry import span
from services.ledger.ports import Conversations, CreditLines, HoldBook

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


async def sweep_leases(credit: CreditLines, grace_ms: int) -> int:
    """Take back what has expired; return how many leases. Whoever held one is gone or cut off."""
    ended = 0
    while ended < SWEEP_MAX and (lease_id := await credit.expire_one(grace_ms)) is not None:
        log.warning("lease_expired", lease_id=lease_id)
        ended += 1
    return ended


async def sweep_forever(
    holds: HoldBook, credit: CreditLines, conversations: Conversations, *, interval_ms: int, grace_ms: int, lease_grace_ms: int
) -> None:
    """Sweep every `interval_ms`. A failure is logged and the next round tries again: money waits, it is not lost.

    Leases are taken back `lease_grace_ms` after their expiry, which is longer: a call may have begun on one at its last moment. They are
    left alone for `grace_ms` after the store was away: those who drew on them meanwhile may tell of it first.
    """
    well_since = time.monotonic()
    while True:
        try:
            with span("ledger.sweep"):
                await sweep(holds, grace_ms)
                if time.monotonic() - well_since >= grace_ms / 1000:
                    await sweep_leases(credit, lease_grace_ms)
                await conversations.forget_deletions()
        except DomainError as error:
            well_since = time.monotonic()
            log.warning("sweep_put_off", reason=error.reason)
        except Exception as error:
            log.exception("sweep_failed", error=type(error).__name__)
        await asyncio.sleep(interval_ms / 1000)
