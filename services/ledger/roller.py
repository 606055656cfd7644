"""Adds recorded operations to the sums of usage, has months ready for those to come, and lets go of those that were kept long enough.

How, the store knows.
"""

import asyncio
from datetime import UTC, datetime, timedelta

import structlog

from services.chassis.clock import Clock
from services.chassis.errors import DomainError
from services.chassis.telemetry import span
from services.ledger.ports import Months, UsageSums

log = structlog.get_logger(__name__)

BATCH = 2_000
"""Operations added in one transaction: some 0.1 s."""
PURGE_BATCH = 1_000
PURGE_BATCHES_MAX = 20
"""Batches removed in one round, so that removing many does not keep new operations out of the sums."""


async def roll_all(sums: UsageSums) -> int:
    """Add everything that waits; return how much."""
    added = 0
    while batch := await sums.roll(BATCH):
        added += batch
        if batch < BATCH:
            break
    return added


async def purge(sums: UsageSums, before: datetime) -> int:
    """Remove operations of before `before`, as many as one round may; return how many."""
    removed = 0
    for _ in range(PURGE_BATCHES_MAX):
        batch = await sums.purge(before, PURGE_BATCH)
        removed += batch
        if batch < PURGE_BATCH:
            break
    return removed


async def let_go(sums: UsageSums, months: Months, before: datetime) -> None:
    """Let go of operations of before `before`, the start of a month: whole months, and one by one what lies in none."""
    while (month := await months.drop(before)) is not None:
        log.info("month_dropped", month=month)
    await purge(sums, before)
    for _ in range(PURGE_BATCHES_MAX):
        if await months.forget(before, PURGE_BATCH) < PURGE_BATCH:
            break


def kept_since(now: datetime, retention_days: int) -> datetime:
    """The start of the day, in UTC, from which on operations are kept."""
    return (now.astimezone(UTC) - timedelta(days=retention_days)).replace(hour=0, minute=0, second=0, microsecond=0)


def months_kept_since(now: datetime, retention_days: int) -> datetime:
    """The start of the month, in UTC, of that day: a month goes when its last operation was kept long enough."""
    return kept_since(now, retention_days).replace(day=1)


async def roll_forever(sums: UsageSums, months: Months, clock: Clock, *, interval_ms: int, retention_days: int) -> None:
    """Roll every `interval_ms`; make months once in each, and let go of old ones if `retention_days` is not 0.

    A failure is logged and the next round tries again.
    """
    made_in: tuple[int, int] | None = None
    while True:
        try:
            with span("ledger.roll"):
                await roll_all(sums)
                now = clock.now().astimezone(UTC)
                if made_in != (now.year, now.month):
                    await months.make()
                    made_in = (now.year, now.month)
                if retention_days:
                    await let_go(sums, months, months_kept_since(now, retention_days))
        except DomainError as error:
            log.warning("roll_put_off", reason=error.reason)
        except Exception as error:
            log.exception("roll_failed", error=type(error).__name__)
        await asyncio.sleep(interval_ms / 1000)
