"""`make bench-streams` and `make bench-money`: run scenarios in full and print every figure beside its bar.

What a scenario does lives in `bench.streams`, `bench.crowd`, `bench.rotation`, `bench.standstill`, `bench.model_faults`, `bench.money`,
`bench.budgets` and `bench.full_disk`. It runs a suite of its own on free ports in a temporary folder, so that nothing that runs or is
stored is touched.
"""

import argparse
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import uvloop

from bench import budgets, crowd, full_disk, model_faults, money, rotation, standstill, streams
from bench.ground import Bar, Ground, Outcome, ground, seed_of_run

Scenarios = Mapping[str, tuple[Callable[[Ground, int], Awaitable[Outcome]], int]]
"""Scenarios by the name they are asked for, with the full n."""


def rows(outcome: Outcome, took_s: float) -> list[str]:
    """One scenario as lines for people."""
    lines = [f"{outcome.name} (n={outcome.n:,}, {took_s:.0f} s)"]
    for bar in outcome.bars:
        sign, verdict = (">=", "ok" if bar.ok else "BELOW") if bar.at_least else ("<=", "ok" if bar.ok else "ABOVE")
        lines.append(f"  {bar.what:<50}{bar.figure:>10g} {bar.unit:<4} {sign} {bar.limit:<8g} {verdict}")
    lines.append(f"  {', '.join(f'{name}: {value}' for name, value in outcome.notes.items())}")
    return lines


async def run(command: str, scenarios: Scenarios, names: list[str], n: int | None, seed: str, replicas: int) -> bool:
    """Run scenarios one after the other, each on a suite of its own, and print them. Return whether every bar was reached."""
    good = True
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    _say(f"seed {seed} (replay: {command} SEED={seed}), {replicas} gateways, orchestrators and ledgers, {machine}")
    for name in names:
        scenario, full = scenarios[name]
        async with ground(seed, replicas=replicas) as made:
            began = time.monotonic()
            outcome = await scenario(made, n or full)
            if not any(bar.what == money.LAWS for bar in outcome.bars):  # whatever was done to the streams, the books are whole
                outcome.bars.append(Bar(money.LAWS, await money.broken_laws(made), 0))
        _say(*rows(outcome, time.monotonic() - began))
        good &= not outcome.failed
    return good


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main() -> None:
    kind = sys.argv[1] if sys.argv[1:2] == ["money"] else "streams"
    command, scenarios = (
        f"make bench-{kind}",
        {**money.SCENARIOS, **budgets.SCENARIOS, **full_disk.SCENARIOS}
        if kind == "money"
        else {**streams.SCENARIOS, **crowd.SCENARIOS, **rotation.SCENARIOS, **standstill.SCENARIOS, **model_faults.SCENARIOS},
    )
    parser = argparse.ArgumentParser(prog=command, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"which ones; without any, all of: {', '.join(scenarios)}")
    parser.add_argument("--n", type=int, help="how many instead of the full number")
    parser.add_argument("--replicas", type=int, default=2, help="gateways, orchestrators and ledgers each (2)")
    options = parser.parse_args(sys.argv[2:] if kind == "money" else None)
    if unknown := set(options.scenarios) - set(scenarios):
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(scenarios)}")
    if (options.n is not None and options.n < 1) or options.replicas < 1:
        parser.error("--n and --replicas are at least 1")
    # As fast a loop as the services have: what a reader waits for its own is no figure of theirs.
    good = uvloop.run(run(command, scenarios, options.scenarios or list(scenarios), options.n, seed_of_run(), options.replicas))
    sys.exit(not good)


if __name__ == "__main__":
    main()
