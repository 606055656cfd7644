"""`make bench`: measures what Tailrace adds to a provider call, as figures beside calling the provider directly in the same run.

It runs a suite of its own on free ports in a temporary folder, so that nothing that runs or is stored is touched.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from typing import Any

import orjson

from bench import corpus, report
from bench.floor import floor
from bench.measure import Bench
from bench.start import cold_starts
from tests.suite import running


async def measure(chunks: int) -> dict[str, Any]:
    """Every figure, in the order that disturbs them least."""
    began = time.perf_counter()
    starts = await cold_starts()
    async with running() as suite:
        bench = Bench(suite, corpus.load(chunks))
        prepared = await bench.prepare()
        idle = await bench.idle()
        one = await bench.one_stream()
        many, cpu = await bench.many_streams()
        bare = await floor()  # beside the suite and right after it, so that both met the same host
        exact, semantic = await bench.hits()
        return {
            "machine": {
                "cpus": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "platform": platform.platform(terse=True),
                "python": platform.python_version(),
            },
            "corpus": prepared,
            "start": starts,
            "first_token": [one, many],
            "cpu": cpu,
            "floor": bare,
            "idle": idle,
            "hits": {"exact": exact, "semantic": semantic},
            "memory": bench.memory(),
            "took_s": round(time.perf_counter() - began, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--documents", type=int, default=620, metavar="N", help="documents to ingest, about 1.6 chunks each (620)")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.documents))
    text = orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode() if options.json else report.table(figures)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
