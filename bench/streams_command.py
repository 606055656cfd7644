"""`make bench-streams`: runs the stream scenarios in full and prints every figure beside its bar. What a scenario does lives in
`bench.streams`.

It runs a suite of its own on free ports in a temporary folder, so that nothing that runs or is stored is touched.
"""

import argparse
import asyncio
import os
import sys
import time

from bench.ground import Outcome, ground, seed_of_run
from bench.streams import SCENARIOS


def rows(outcome: Outcome, took_s: float) -> list[str]:
    """One scenario as lines for people."""
    lines = [f"{outcome.name} (n={outcome.n:,}, {took_s:.0f} s)"]
    for bar in outcome.bars:
        sign, verdict = (">=", "ok" if bar.ok else "BELOW") if bar.at_least else ("<=", "ok" if bar.ok else "ABOVE")
        lines.append(f"  {bar.what:<50}{bar.figure:>10g} {bar.unit:<4} {sign} {bar.limit:<8g} {verdict}")
    lines.append(f"  {', '.join(f'{name}: {value}' for name, value in outcome.notes.items())}")
    return lines


async def run(names: list[str], n: int | None, seed: str, replicas: int) -> bool:
    """Run scenarios one after the other, each on a suite of its own, and print them. Return whether every bar was reached."""
    good = True
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    _say(f"seed {seed} (replay: make bench-streams SEED={seed}), {replicas} gateways, orchestrators and ledgers, {machine}")
    for name in names:
        scenario, full = SCENARIOS[name]
        async with ground(seed, replicas=replicas) as made:
            began = time.monotonic()
            outcome = await scenario(made, n or full)
        _say(*rows(outcome, time.monotonic() - began))
        good &= not outcome.failed
    return good


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-streams", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"which ones; without any, all of: {', '.join(SCENARIOS)}")
    parser.add_argument("--n", type=int, help="how many instead of the full number")
    parser.add_argument("--replicas", type=int, default=2, help="gateways, orchestrators and ledgers each (2)")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    if (options.n is not None and options.n < 1) or options.replicas < 1:
        parser.error("--n and --replicas are at least 1")
    good = asyncio.run(run(options.scenarios or list(SCENARIOS), options.n, seed_of_run(), options.replicas))
    sys.exit(not good)


if __name__ == "__main__":
    main()
