"""How long the sweeper waits: for holds their own grace, for leases also the longest call that may have begun on one."""

import asyncio
import contextlib

from services.ledger.config import Settings
from services.ledger.sweeper import sweep_forever


class Noting:
    """Has nothing to sweep, and notes after which grace it was asked."""

    def __init__(self) -> None:
        self.graces: list[int] = []
        self.asked = asyncio.Event()

    async def expire_one(self, grace_ms: int) -> str | None:
        self.graces.append(grace_ms)
        self.asked.set()
        return None

    async def forget_deletions(self) -> None:
        """There are none."""


async def test_leases_wait_longer_than_holds() -> None:
    holds, credit = Noting(), Noting()
    sweeping = sweep_forever(holds, credit, Noting(), interval_ms=600_000, grace_ms=0, lease_grace_ms=300_000)  # type: ignore[arg-type]
    task = asyncio.create_task(sweeping)
    await credit.asked.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    assert (holds.graces, credit.graces) == ([0], [300_000])


def test_the_grace_of_leases_follows_the_longest_answer() -> None:
    environ = {"DATABASE_URL": "postgresql://ledger", "TAILRACE_INTERNAL_KEY": "an internal key for tests"}

    assert Settings.load(environ).lease_grace_ms == 360_000
    assert Settings.load({**environ, "TAILRACE_ANSWER_DEADLINE_S": "3000"}).lease_grace_ms == 3_060_000
