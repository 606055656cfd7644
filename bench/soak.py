"""`make soak`: mixed load with 30 % cancels for as long as wanted, and what grew meanwhile: memory, descriptors, threads, connections.

The books are proven again and again, under load and after it.

It runs a suite of its own, draws no conclusion from the warm-up, and knows the processes only from outside. Ended answers are kept for a
minute instead of ten: what is kept on purpose fills up early, and what grows afterwards is what it looks for.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from bench.ground import TENANTS, Ground, ground, seed_of_run
from bench.money import broken_laws
from bench.reader import fetch, read_answer, request
from bench.script import Behaviour

USERS = 8
CANCELLED_SHARE, LEFT_SHARE, WHOLE_SHARE = 0.3, 0.1, 0.1
SAMPLE_EVERY_S = 5.0
PROVE_PAUSE_S = 30.0
"""Between two proofs of the books, which read all of them."""
LOGS_KEPT_S = 60
WARM_UP_SHARE, WARM_UP_S = 0.1, 2 * LOGS_KEPT_S
"""Whichever is longer, but never more than half of the run."""
RSS_MB_PER_HOUR_MAX = 1.0
QUIET_S = 5.0


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    at: float
    rss_mb: float
    descriptors: int
    threads: int
    connections: int


class Samples:
    """What every service has used, over time."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.of: dict[str, list[Sample]] = {name: [] for name in pids}

    def take(self) -> None:
        for name, pid in self._pids.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                with process.oneshot():
                    connections = len(process.net_connections())
                    rss = process.memory_info().rss / 2**20
                    self.of[name].append(Sample(time.monotonic(), rss, process.num_fds(), process.num_threads(), connections))

    async def keep_taking(self, every_s: float) -> None:
        while True:
            self.take()
            await asyncio.sleep(every_s)


class Proofs:
    """How often the books were proven, and how many laws did not hold."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.made = 0
        self.broken = 0

    async def make(self) -> None:
        self.broken += await broken_laws(self._ground)
        self.made += 1

    async def keep_making(self, pause_s: float) -> None:
        while True:
            await asyncio.sleep(pause_s)
            await self.make()


def slope_per_hour(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """Growth by least squares. 0 for fewer than three samples."""
    if len(samples) < 3:
        return 0.0
    return statistics.linear_regression([sample.at / 3600 for sample in samples], [value(sample) for sample in samples]).slope


async def load(made: Ground, ends_at: float) -> dict[str, int]:
    """Users who ask, cancel, leave and take whole documents until the moment has come. How often each happened."""
    chance = made.random("soak")
    happened = dict.fromkeys(("done", "cancelled", "left", "whole", "failed"), 0)

    async def user(number: int) -> None:
        tenant = TENANTS[number % len(TENANTS)]
        ports = made.ports[number % len(made.ports) :] + made.ports[: number % len(made.ports)]
        while time.monotonic() < ends_at:
            mark, body = made.question(tenant)
            dice, moment = chance.random(), chance.uniform(0.05, 0.6)
            if dice < CANCELLED_SHARE:
                task = asyncio.create_task(_cancelled(made, tenant, ports, body, mark, moment))
                happened["cancelled" if await task else "failed"] += 1
            elif dice < CANCELLED_SHARE + LEFT_SHARE:
                with contextlib.suppress(TimeoutError):
                    await fetch(ports[0], request("POST", "/v1/answers", made.token(tenant), body), timeout_s=moment)
                happened["left"] += 1
            elif dice < CANCELLED_SHARE + LEFT_SHARE + WHOLE_SHARE:
                reply = await fetch(ports[0], request("POST", "/v1/answers", made.token(tenant), {**body, "stream": False}))
                happened["whole" if reply.status == 200 else "failed"] += 1
            else:
                read = await read_answer(ports, made.token(tenant), body, key=mark)
                happened["done" if read.end == "done" else "failed"] += 1

    await asyncio.gather(*(user(number) for number in range(USERS)))
    return happened


async def _cancelled(made: Ground, tenant: str, ports: list[int], body: dict[str, object], mark: str, moment: float) -> bool:
    """Ask, and cancel after a moment. Whether it ended in a terminal event."""
    accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(
        read_answer(
            ports,
            made.token(tenant),
            body,
            key=mark,
            on_blocks=lambda reply: accepted.done() or accepted.set_result(reply.blocks[0].data["answer_id"]),
        )
    )
    try:
        await asyncio.wait([reading, accepted], return_when=asyncio.FIRST_COMPLETED)
        if accepted.done():
            await asyncio.sleep(moment)
            await fetch(ports[-1], made.cancel(accepted.result(), tenant))
        return bool((await reading).end)
    finally:
        reading.cancel()


async def soak(minutes: float, seed: str) -> bool:
    """Run and print. Return whether memory stayed within its bar and descriptors and connections came back."""
    _say(f"seed {seed}; {minutes:g} minutes, {USERS} users, {CANCELLED_SHARE:.0%} cancels")
    async with ground(seed, TAILRACE_ORCHESTRATOR_LOGS_KEPT_S=str(LOGS_KEPT_S)) as made:
        await made.suite.provider.behave(Behaviour(ttft_ms=20, tokens=60, tokens_per_s=100))
        pids = {name: process.pid for name, process in made.suite.processes.items()}
        began, ends_at = time.monotonic(), time.monotonic() + minutes * 60
        samples = Samples(pids)
        proofs = Proofs(made)
        async with asyncio.TaskGroup() as group:  # a proof that cannot be made ends the run
            beside = [group.create_task(samples.keep_taking(SAMPLE_EVERY_S)), group.create_task(proofs.keep_making(PROVE_PAUSE_S))]
            happened = await load(made, ends_at)
            for task in beside:
                task.cancel()
        left = await made.holds_left()
        await proofs.make()
        await asyncio.sleep(QUIET_S)
        samples.take()
    _say(", ".join(f"{name}: {count}" for name, count in happened.items()) + f", holds left open: {left}")
    _say(f"books proven {proofs.made} times, laws that did not hold: {proofs.broken}")
    _say(f"{'':<18}{'RSS MB':>8}{'slope MB/h':>12}{'descriptors':>20}{'threads':>16}{'connections':>20}")
    good = left == 0 and happened["failed"] == 0 and proofs.broken == 0
    warm_at = began + min(max(WARM_UP_SHARE * minutes * 60, WARM_UP_S), minutes * 60 / 2)
    for name, taken in samples.of.items():
        warm = [sample for sample in taken[:-1] if sample.at >= warm_at]
        slope = slope_per_hour(warm, lambda sample: sample.rss_mb)
        last = taken[-1]
        good &= slope <= RSS_MB_PER_HOUR_MAX
        _say(
            f"{name:<18}{last.rss_mb:>8.0f}{slope:>12.1f}"
            + "".join(
                f"{f'{value(taken[0])} .. {max(map(value, taken))} .. {value(last)}':>{width}}"
                for value, width in ((_descriptors, 20), (_threads, 16), (_connections, 20))
            )
            + ("   ok" if slope <= RSS_MB_PER_HOUR_MAX else f"   ABOVE (<= {RSS_MB_PER_HOUR_MAX:g} MB/h)")
        )
    _say("first .. most .. five seconds after the end; a slope of minutes is mostly warm-up, only hours tell")
    return good


def _descriptors(sample: Sample) -> int:
    return sample.descriptors


def _threads(sample: Sample) -> int:
    return sample.threads


def _connections(sample: Sample) -> int:
    return sample.connections


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10); 480 is a night")
    options = parser.parse_args()
    if not 0 < options.minutes <= 7 * 24 * 60:
        parser.error("--minutes is above 0 and at most a week")
    sys.exit(not asyncio.run(soak(options.minutes, seed_of_run())))


if __name__ == "__main__":
    main()
