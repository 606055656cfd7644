"""What every stream scenario stands on: a suite with replicas, users without narrow limits, a seed, and bars to compare figures with.

No scenario is here.
"""

import asyncio
import contextlib
import os
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.reader import Read, request
from bench.script import Record
from tests.suite import Suite, running, until

TENANTS = tuple(f"mill{number}" for number in range(4))
USER = "miller"
PLAN = {
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 1_000_000_000,
    "concurrent_answers": 10_000,
    "monthly_budget_usd": "0",
    "tiers": ["fast", "smart", "best"],
}
"""So wide that no scenario measures a limit by accident."""
SETTINGS = {
    "TAILRACE_ORCHESTRATOR_DETACH_GRACE_S": "2",
    "TAILRACE_ORCHESTRATOR_ANSWERS_PER_USER_MAX": "10000",
    "TAILRACE_ORCHESTRATOR_LEASE_S": "4",
    "TAILRACE_LEDGER_SWEEP_INTERVAL_MS": "500",
}
BOOKED_WITHIN_S = 30.0


@dataclass(frozen=True)
class Bar:
    """A figure and what it must be."""

    what: str
    figure: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def ok(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


@dataclass(frozen=True)
class Outcome:
    """What one scenario found."""

    name: str
    n: int
    seed: str
    bars: list[Bar]
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts without a bar, which show that the scenario did what its name says."""

    @property
    def failed(self) -> list[str]:
        """Bars that were missed, for people."""
        return [f"{bar.what}: {bar.figure:g} {bar.unit} (bar {bar.limit:g})" for bar in self.bars if not bar.ok]


class Ground:
    """A running suite with a seed."""

    def __init__(self, suite: Suite, seed: str) -> None:
        self.suite = suite
        self.seed = seed
        self._numbers = 0
        self._tokens: dict[str, str] = {}

    def random(self, scenario: str) -> random.Random:
        """The scenario's own source of chance: the same for the same seed, whatever ran before it."""
        return random.Random(f"{self.seed}:{scenario}")

    @property
    def ports(self) -> list[int]:
        """HTTP ports of all gateways."""
        return [self.suite.port_of(gateway) for gateway in self.suite.gateways]

    def turned(self, number: int) -> list[int]:
        """The gateways' ports, beginning with another one for the next number."""
        return [self.ports[(number + turn) % len(self.ports)] for turn in range(len(self.ports))]

    def token(self, tenant: str = TENANTS[0]) -> str:
        return self._tokens.setdefault(tenant, self.suite.token(USER, tenant, lifetime_s=86_400))

    def question(self, tenant: str = TENANTS[0], words: str = "What does the river bring to") -> tuple[str, dict[str, Any]]:
        """A mark nobody has used yet, and the body of a question that carries it."""
        self._numbers += 1
        mark = f"mark-{tenant}-{self._numbers}"
        return mark, {"question": f"{words} {mark}?", "cache": "off", "max_output_tokens": 4000}

    async def widen(self) -> None:
        """Put the user of every tenant on a plan with wide limits."""
        for tenant in TENANTS:
            async with self.suite.client("admin", tenant, ("user", "admin")) as admin:
                (await admin.put("/v1/admin/plans/wide", json=PLAN)).raise_for_status()
                (await admin.put(f"/v1/admin/subscriptions/{USER}", json={"plan": "wide"})).raise_for_status()

    async def begin(self) -> None:
        """Everything runs and serves, the provider has forgotten everything, and no hold of an earlier scenario is open."""
        await self.suite.until_all_ready()
        await self.holds_left()
        await self.suite.provider.reset()

    @contextlib.asynccontextmanager
    async def gateways_with(self, settings: Callable[[str], Mapping[str, str]]) -> AsyncIterator[None]:
        """Every gateway runs with `settings` of its name over its own until the block is left."""
        try:
            await self._restart_gateways(settings)
            yield
        finally:
            await self._restart_gateways(lambda _: {})

    async def _restart_gateways(self, settings: Callable[[str], Mapping[str, str]]) -> None:
        for gateway in self.suite.gateways:
            if gateway in self.suite.processes:
                await self.suite.stop(gateway)
            await self.suite.start(gateway, **settings(gateway))
        await self.suite.until_all_ready()

    async def records(self) -> dict[str, Record]:
        """What the provider saw, by mark."""
        return {record.mark: record for record in await self.suite.provider.records()}

    async def holds_left(self, within_s: float = BOOKED_WITHIN_S) -> int:
        """Holds that are still open after `within_s`, or 0 as soon as there are none."""

        async def open_holds() -> int:
            return int((await self.suite.rows("SELECT count(*) AS n FROM holds WHERE state = 'reserved' AND price_id IS NOT NULL"))[0]["n"])

        async def none() -> bool:
            return await open_holds() == 0

        with contextlib.suppress(TimeoutError):
            await until(none, within_s)
        return await open_holds()

    async def unbooked(self, answers: Iterable[str], within_s: float = BOOKED_WITHIN_S) -> int:
        """How many of these answers have no operation in the ledger after `within_s`."""
        wanted = sorted(set(answers))

        async def missing() -> int:
            found = await self.suite.rows("SELECT count(*) AS n FROM operations WHERE operation_id = ANY($1::uuid[])", wanted)
            return len(wanted) - int(found[0]["n"])

        async def none() -> bool:
            return await missing() == 0

        with contextlib.suppress(TimeoutError):
            await until(none, within_s)
        return await missing()

    def cancel(self, answer_id: str, tenant: str = TENANTS[0]) -> bytes:
        """The request that cancels an answer."""
        return request("POST", f"/v1/answers/{answer_id}/cancel", self.token(tenant))


def seed_of_run() -> str:
    """SEED from the environment, to replay a run; else a new one."""
    return os.environ.get("SEED") or secrets.token_hex(4)


@contextlib.asynccontextmanager
async def ground(seed: str, *, replicas: int = 2, **extra: str) -> AsyncIterator[Ground]:
    """A suite with replicas, ready for any scenario. Retrieval has one: its embedded store belongs to one process."""
    async with running(ledgers=replicas, orchestrators=replicas, gateways=replicas, **{**SETTINGS, **extra}) as suite:
        made = Ground(suite, seed)
        await made.widen()
        yield made


async def side_by_side(n: int, width: int, work: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """The results of `work(0)` to `work(n - 1)`, at most `width` at the same time. The first failure ends all."""
    results: list[Any] = [None] * n
    numbers = iter(range(n))

    async def worker() -> None:
        for number in numbers:
            results[number] = await work(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(width, n)):
            group.create_task(worker())
    return results


def p99(values: list[float]) -> float:
    """0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0


def untyped(reads: Iterable[Read]) -> int:
    """Answers that ended neither in a terminal event nor in a problem with a reason."""
    return sum(1 for read in reads if read.torn or not (read.end or read.reason))
