"""`make bench-routing`: what the regret report says, beside what was scripted, on a suite of its own with a simulated provider.

A cheap tier gets a share of its answers wrong in a way that the checks see; all its prompts are answered by a better tier as well. The
report must find that share, and what the cheap tier saves by its price. It says nothing about real models: for those, share prompts in
production and run `tailrace regret`.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

import tailrace
from bench.ground import side_by_side
from bench.script import Behaviour
from services.local.regret import pairs_of, regret_of, table
from tests.suite import running

FIRST, OTHER = "claude-haiku-5-5", "claude-sonnet-5-5"
WRONG = "wrongmark"
"""In every question that the cheap model answers wrong."""
PAIRS, WRONG_SHARE = 300, 0.2
PAUSE_S = 0.05
MODELS = f"""
[tiers.fast]
models = ["{FIRST}"]
shadow = {{ tier = "smart", share = 1.0 }}
[tiers.smart]
models = ["{OTHER}"]
""" + "".join(
    f'[[models]]\nmodel = "{model}"\nprovider = "{provider}"\ncontext_tokens_max = 200_000\noutput_tokens_max = 64_000\n'
    for model, provider in ((FIRST, "anthropic"), (OTHER, "anthropic"), ("extractive", "extractive"))
)


async def report(pairs: int) -> bool:
    """Ask, wait for the shadows, print report and script. Return whether the intervals hold what was scripted."""
    with tempfile.TemporaryDirectory(prefix="tailrace-routing-") as folder:
        path = Path(folder) / "models.toml"
        path.write_text(MODELS)
        Path(folder).chmod(0o755)
        async with running(TAILRACE_MODELS_FILE=str(path)) as suite:
            await suite.provider.behave(Behaviour(text="The wheel turns, and the channel carries the water away."))
            await suite.provider.behave(Behaviour(text="The wheel turns, says a passage that is not there [77]."), contains=WRONG)
            await suite.provider.behave(Behaviour(text="The wheel turns, and the channel carries the water away."), contains=OTHER)
            wrong = round(pairs * WRONG_SHARE)
            async with suite.client() as http:

                async def one(number: int) -> None:
                    mark = WRONG if number < wrong else "mark"
                    body = {"question": f"What does channel {number} {mark} carry?", "tier": "fast", "cache": "off", "stream": False}
                    (await http.post("/v1/answers", json=body)).raise_for_status()
                    await asyncio.sleep(PAUSE_S)  # or more would be drawn than the sample has room for

                await side_by_side(pairs, 2, one)
            token = suite.token("shadow", "shadow")
            async with tailrace.AsyncClient(f"127.0.0.1:{suite.ports['gateway']}", token=token) as client:
                found = pairs_of([row async for row in client.operations(limit=1000)])
    regrets = [regret_of(*tiers, seen) for tiers, seen in sorted(found.items())]
    _say(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", table(regrets))
    share = wrong / pairs
    _say(
        f"scripted: {share:.1%} wrong, seen by the checks; {pairs} prompts, of which {pairs - sum(r.pairs for r in regrets)} were not drawn"
    )
    return len(regrets) == 1 and regrets[0].lost.low <= share <= regrets[0].lost.high and regrets[0].saved.low > 0


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=PAIRS, help=f"prompts ({PAIRS}; at most 1000 are looked at)")
    options = parser.parse_args()
    if not 1 <= options.n <= 1000:
        parser.error("--n is 1 to 1000")
    sys.exit(not asyncio.run(report(options.n)))


if __name__ == "__main__":
    main()
