"""`make bench-vendors`: what Tailrace adds to each way to a provider, beside calling the same simulated provider directly in the same run.

Whole answers through all four services; `make bench-adapters` has the adapters alone.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from bench import corpus
from bench.ground import PLAN
from bench.measure import TENANT, USER, Bench
from bench.provider import ROOT, simulator
from bench.wire import VENDORS
from tests.suite import Suite, running

TOKEN_US, ADDED_P50_MS = 150.0, 10.0
"""The marks, for two cores."""
DOCUMENTS = 620
UNSHED = {
    "TAILRACE_GATEWAY_PREPARING_MAX": "10000",
    "TAILRACE_GATEWAY_PREPARING_STANDING_MAX": "10000",
    "TAILRACE_GATEWAY_LOOP_LAG_MAX_S": "60",
}
"""A machine that others use too is slower, and not to be spared: an answer that is turned away cannot be measured."""
OWN = "bench"
"""The provider that is one's own server, speaking Chat Completions."""
MODELS = """
[[providers]]
name = "{name}"
kind = "openai_chat"
base_url = "{url}/v1"

[[models]]
model = "{model}"
provider = "{name}"
context_tokens_max = 200_000
output_tokens_max = 64_000
capabilities = ["tools"]

[tiers.own]
models = ["{model}"]
"""


async def measure(documents: int) -> dict[str, dict[str, Any]]:
    """By way: added time to the first token of one stream, and CPU a token."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="tailrace-vendors-") as name:
        async with simulator() as provider:
            models = Path(name) / "models.toml"
            usual = (ROOT / "services/orchestrator/models.toml").read_text()
            models.write_text(usual + MODELS.format(name=OWN, url=provider.url, model=VENDORS["openai_chat"].model))
            keys = {"ANTHROPIC_API_KEY": "k", "OPENAI_API_KEY": "k", "GEMINI_API_KEY": "k"}
            addresses = {
                "ANTHROPIC_BASE_URL": provider.url,
                "OPENAI_BASE_URL": f"{provider.url}/v1",
                "TAILRACE_ORCHESTRATOR_OPENAI_API": "responses",
                "GOOGLE_GEMINI_BASE_URL": provider.url,
            }
            async with running(provider=provider, TAILRACE_MODELS_FILE=str(models), **keys, **addresses, **UNSHED) as suite:
                await _price(suite)
                texts = corpus.load(documents)
                await Bench(suite, texts).prepare()
                await _admit(suite)
                for vendor, way in VENDORS.items():
                    _say(f"{vendor} …")
                    bench = Bench(suite, texts, way)
                    await bench.warm_up()
                    one = await bench.one_stream()
                    _, cpu = await bench.many_streams()
                    found[vendor] = {"one": one, "cpu": cpu}
    return found


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _admit(suite: Suite) -> None:
    """No plan that comes with the project has a tier of one's own."""
    async with suite.client("admin", TENANT, ("user", "admin")) as admin:
        plan = {**PLAN, "tiers": ["fast", "smart", "best", "own"]}
        (await admin.put("/v1/admin/plans/wide", json=plan)).raise_for_status()
        (await admin.put(f"/v1/admin/subscriptions/{USER}", json={"plan": "wide"})).raise_for_status()


async def _price(suite: Suite) -> None:
    """A model of one's own is refused until it has a price."""
    price = {"provider": OWN, "model": VENDORS["openai_chat"].model, "input_usd_per_mtok": "1", "output_usd_per_mtok": "1"}
    async with suite.client("admin", TENANT, ("user", "admin")) as admin:
        (await admin.put("/v1/admin/prices", json=price)).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-vendors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, metavar="N", help=f"documents to ingest ({DOCUMENTS})")
    found = uvloop.run(measure(parser.parse_args().documents))
    out = sys.stdout.write
    out(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; marks: {ADDED_P50_MS:g} ms added, {TOKEN_US:g} us a token\n")
    out(f"{'':<18}{'direct p50':>12}{'added p50':>12}{'gateway + orchestrator':>26}{'the provider':>16}\n")
    for vendor, figures in found.items():
        one, tokens = figures["one"], figures["cpu"]["per_token_us"]
        both = tokens["gateway"] + tokens["orchestrator"]
        added = one["added"]["p50"]
        marks = f"{'ok' if added <= ADDED_P50_MS else 'ABOVE'}, {'ok' if both <= TOKEN_US else 'ABOVE'}"
        own = f"{both:.0f} us/token"
        out(f"{vendor:<18}{one['direct']['p50']:>9.1f} ms{added:>9.1f} ms{own:>26}{tokens['provider']:>13.0f} us   {marks}\n")


if __name__ == "__main__":
    main()
