"""`make bench-ledger`: how many pairs of reserve and settle the ledger carries through gRPC, how fast a spool drains, and what that leaves
in memory.

It runs a PostgreSQL and a ledger of its own on free ports in a temporary folder; the clients are this process, on the same CPUs.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from bench.ground import Bar, Outcome, p99
from bench.provider import ROOT
from bench.scenarios_command import rows
from services.chassis.channel import Caller, open_channel
from services.chassis.errors import Overloaded
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.local.child import leashed
from services.local.stores import Postgres, free_port
from services.orchestrator import spool
from services.orchestrator.clients import RemoteLedger
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc as pb_grpc
from tests.suite import load_of

PAIRS_PER_S_MIN, PAIR_MS_MAX, DRAIN_PER_S_MIN, GROWN_MIB_MAX = 400.0, 60.0, 3_000.0, 32.0
TENANTS, USERS = 4, 8
"""Every call locks its tenant's rows, so how many there are is part of the question."""
WIDTH = 24
READY_WITHIN_S = 60.0
PRICED = {"provider": "anthropic", "model": "claude-haiku-4-5"}
STEPS = ("history", "recall", "passages", "compose", "hold", "generate", "validate", "record")


@dataclass
class Running:
    """A ledger to measure."""

    pid: int
    store_pid: int
    stub: Any
    caller: Caller
    remote: RemoteLedger

    @property
    def rss_mib(self) -> float:
        return psutil.Process(self.pid).memory_info().rss / 2**20

    def cpu_s(self) -> dict[str, float]:
        """What each process has used."""
        return {"client": time.process_time(), "ledger": load_of(self.pid).cpu_s, "postgres": load_of(self.store_pid).cpu_s}

    async def pair(self, principal: Principal) -> float | None:
        """Reserve and settle one call; return how long both took, milliseconds, or None if the ledger refused."""
        try:
            return await self._pair(principal)
        except Overloaded:
            return None

    async def _pair(self, principal: Principal) -> float:
        began = time.perf_counter()
        wanted = pb.ReserveRequest(
            operation_id=str(uuid4()), attempt=1, input_tokens_max=2_000, output_tokens_max=1_000, ttl_ms=60_000, **PRICED
        )
        held = await self.caller.unary(self.stub.Reserve, wanted, principal=principal)
        used = common_pb2.Usage(input_tokens=500, output_tokens=200)
        await self.caller.unary(self.stub.Settle, pb.SettleRequest(hold_id=held.hold_id, usage=used), principal=principal)
        return (time.perf_counter() - began) * 1000


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Running]:
    """PostgreSQL and a ledger on it."""
    store, port, key = Postgres(folder / "postgres"), free_port(), secrets.token_urlsafe(32)
    await store.start()
    environment = {
        **os.environ,
        "DATABASE_URL": store.url,
        "TAILRACE_INTERNAL_KEY": key,
        "TAILRACE_LEDGER_PORT": str(port),
        "TAILRACE_LOG_LEVEL": "error",
    }
    ledger = await asyncio.create_subprocess_exec(*leashed([sys.executable, "-m", "services.ledger"]), cwd=ROOT, env=environment)
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            async with asyncio.timeout(READY_WITHIN_S):
                await channel.channel_ready()
            caller = Caller("ledger", Passport(key.encode()))
            assert store.process is not None
            yield Running(ledger.pid, store.process.pid, pb_grpc.LedgerServiceStub(channel), caller, RemoteLedger(channel, caller, 10))
    finally:
        with contextlib.suppress(ProcessLookupError):
            ledger.terminate()
        await ledger.wait()
        await store.stop()


async def pairs(ledger: Running, seconds: float) -> Outcome:
    """As many pairs as go, then half of what must go, evenly spaced; and what the ledger's memory did meanwhile."""
    payers = itertools.cycle([Principal(f"tenant{number % TENANTS}", f"user{number}") for number in range(TENANTS * USERS)])
    await _closed(ledger, payers, seconds / 4)  # plans, connections and caches are warm from here on
    before, used = ledger.rss_mib, ledger.cpu_s()
    took = await _closed(ledger, payers, seconds)
    cpu_ms = {name: round((cpu_s - used[name]) / len(took) * 1000, 2) for name, cpu_s in ledger.cpu_s().items()}
    paced = await _paced(ledger, payers, PAIRS_PER_S_MIN / 2, seconds)
    return Outcome(
        "reserve and settle",
        len(took),
        "-",
        [
            Bar("pairs a second", round(len(took) / seconds), PAIRS_PER_S_MIN, "/s", at_least=True),
            Bar(
                f"p99 of a pair at {PAIRS_PER_S_MIN / 2:g}/s",
                round(p99([each for each in paced if each is not None]), 1),
                PAIR_MS_MAX,
                "ms",
            ),
            Bar("pairs refused", sum(each is None for each in (*took, *paced)), 0),
            Bar("memory of the ledger grew", round(ledger.rss_mib - before, 1), GROWN_MIB_MAX, "MiB"),
        ],
        {"paced": len(paced), "rss_mib": round(ledger.rss_mib), "cpu_ms a pair": cpu_ms},
    )


async def _closed(ledger: Running, payers: "itertools.cycle[Principal]", seconds: float) -> list[float | None]:
    """Each of WIDTH clients begins its next pair when the last is over."""
    took: list[float | None] = []
    ends_at = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < ends_at:
            took.append(await ledger.pair(next(payers)))

    await asyncio.gather(*(client() for _ in range(WIDTH)))
    return took


async def _paced(ledger: Running, payers: "itertools.cycle[Principal]", per_s: float, seconds: float) -> list[float | None]:
    """Pairs begin at their own times, whether or not those before are over."""
    began, tasks = time.perf_counter(), []
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ledger.pair(next(payers))))
    return list(await asyncio.gather(*tasks))


async def drain(ledger: Running, folder: Path, n: int, *, calls: int) -> Outcome:
    """A spool with `n` records is drained; each tells of `calls` provider calls that the ledger has not heard of."""
    before, used = ledger.rss_mib, ledger.cpu_s()
    async with spool.opened(folder / f"spool-{calls}.db", 2 * n) as outbox:
        for number in range(0, n, 1000):
            records = [_record(number + more, calls) for more in range(min(1000, n - number))]
            await asyncio.gather(*(outbox.append(record.operation_id, record.SerializeToString()) for record in records))
        began = time.perf_counter()
        sender = asyncio.create_task(outbox.drain_forever(ledger.remote.recording))
        try:
            left = await outbox.flush(300)
            took = time.perf_counter() - began
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        rejected = outbox.dead_letters
    cpu_ms = {name: round((cpu_s - used[name]) / n * 1000, 3) for name, cpu_s in ledger.cpu_s().items()}
    return Outcome(
        "spool drain, " + ("one late provider call a record" if calls else "cache hits"),
        n,
        "-",
        [
            Bar("records a second", round((n - left) / took), DRAIN_PER_S_MIN, "/s", at_least=True),
            Bar("records left or rejected", left + rejected, 0),
            Bar("memory of the ledger grew", round(ledger.rss_mib - before, 1), GROWN_MIB_MAX, "MiB"),
        ],
        {"took_s": round(took, 2), "cpu_ms a record": cpu_ms},
    )


def _record(number: int, calls: int) -> pb.Operation:
    """What an answer leaves behind: eight steps, and a provider call unless it came from the cache."""
    usage = common_pb2.Usage(input_tokens=500, output_tokens=200)
    return pb.Operation(
        operation_id=str(uuid4()),
        tenant=f"tenant{number % TENANTS}",
        user=f"user{number % (TENANTS * USERS)}",
        session_id=f"s{number % 100}",
        trace_id=secrets.token_hex(16),
        status="done",
        tier="fast",
        finish_reason="end_turn",
        usage=usage if calls else None,
        cache=common_pb2.CacheReceipt(verdict="miss" if calls else "exact", reason="no_candidate" if calls else ""),
        created_at=timestamp(datetime.now(UTC)),
        first_token_ms=200.0,
        duration_ms=2000.0,
        collection="default",
        steps=[common_pb2.StepTiming(name=name, status="done", started_ms=1, duration_ms=2, facts={"found": "8"}) for name in STEPS],
        attempts=[
            pb.Attempt(attempt=1 + call, usage=usage, finish_reason="end_turn", provider_request_id=f"req_{number}", **PRICED)
            for call in range(calls)
        ],
        **PRICED,
    )


async def measure(seconds: float, records: int) -> bool:
    """Print every figure beside its bar; return whether all were reached."""
    good = True
    sys.stdout.write(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-ledger-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL does not run as root
        async with running(folder) as ledger:
            works: list[Callable[[], Awaitable[Outcome]]] = [
                lambda: pairs(ledger, seconds),
                lambda: drain(ledger, folder, records, calls=0),
                lambda: drain(ledger, folder, records, calls=1),
            ]
            for work in works:
                began = time.monotonic()
                outcome = await work()
                sys.stdout.write("".join(f"{line}\n" for line in rows(outcome, time.monotonic() - began)))
                sys.stdout.flush()
                good &= not outcome.failed
    return good


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long each way of asking is measured (20)")
    parser.add_argument("--records", type=int, default=20_000, help="records in each spool (20000)")
    options = parser.parse_args()
    sys.exit(not asyncio.run(measure(options.seconds, options.records)))


if __name__ == "__main__":
    main()
