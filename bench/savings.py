"""`make bench-savings DATA=…`: what the model bill of a stream of real questions is with tiers and answer cache, beside its bill without.

DATA is a folder with `cache/qqp_clusters.jsonl.gz` (real questions, and which of them people say ask the same) and
`retrieval/xquad` (the documents that prompts are made of). The provider is simulated, so this says nothing about
how good a cheap model's answers are: `tailrace regret` does. How often questions come again differs from product to product, and no public
data tells: so it is an axis of the table. Nothing of DATA is kept.
"""

import argparse
import asyncio
import gzip
import itertools
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson

from bench.cache_quality import wilson_upper
from bench.ground import PLAN, seed_of_run, side_by_side
from bench.script import Behaviour
from tests.suite import Suite, ingest, running, until

AGAIN = (0.3, 0.5, 0.7)
"""Shares of questions that ask what was asked before."""
JUDGED, SAVED_MIN = 0.5, 0.4
"""At which of them the bill is held against a bar, and the bar."""
QUESTIONS = 400
ANSWER_TOKENS = 211
"""The mean of the 19,366 answers in `traffic/azure_llm_2023_conv.csv.gz`."""
DOCUMENTS = 120
AT_ONCE = 4
BOOKED_WITHIN_S = 30.0
COLLECTION, USER = "bench", "bench"
WAYS = {
    "neither": {"tier": "smart", "cache": "off"},
    "tiers alone": {"tier": "auto", "cache": "off"},
    "cache alone": {"tier": "smart", "cache": "use"},
    "both": {"tier": "auto", "cache": "use"},
}
"""Ways to answer one stream; the first is what the others are compared with."""
_MEANING, _TEXT = attrgetter("meaning"), attrgetter("text")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a stream, and what it asks: questions with the same `meaning` ask the same."""

    meaning: str
    text: str


@dataclass(frozen=True, slots=True)
class Bill:
    """What one way of answering a stream came to."""

    nanousd: int
    calls: int
    exact: int
    similar: int
    """Questions that got the answer to the same words, and to others."""
    wrong: list[tuple[str, str]]
    """Those of them that got the answer to something else: what was asked, and what had been."""


def stream_of(clusters: Mapping[str, Sequence[str]], n: int, again: float, chance: random.Random) -> list[Asked]:
    """`n` questions, of which a share `again` asks what an earlier one asked, in one of the wordings that people found for it.

    Which one comes again is drawn among all earlier questions, so that what was asked often is asked more often still. Raises StopIteration
    if there are too few clusters.
    """
    fresh = iter(chance.sample(sorted(clusters), len(clusters)))
    asked: list[Asked] = []
    for _ in range(n):
        meaning = chance.choice(asked).meaning if asked and chance.random() < again else next(fresh)
        asked.append(Asked(meaning, chance.choice(clusters[meaning])))
    return asked


async def bill_of(suite: Suite, tenant: str, asked: Sequence[Asked], documents: dict[str, str], way: dict[str, str]) -> Bill:
    """Ask all of them one way, in a tenant of its own, and read in the books what that came to.

    Raises RuntimeError if the books say anything else than the provider.
    """
    async with suite.client("admin", tenant, ("user", "admin")) as admin:
        (await admin.put("/v1/admin/plans/wide", json=PLAN)).raise_for_status()
        (await admin.put(f"/v1/admin/subscriptions/{USER}", json={"plan": "wide"})).raise_for_status()
    await suite.provider.reset()
    await suite.provider.behave(Behaviour(tokens=ANSWER_TOKENS))
    by_id: dict[str, Asked] = {}
    async with suite.client(USER, tenant) as http:
        await ingest(http, documents, COLLECTION)

        async def one(number: int) -> None:
            body = {"question": asked[number].text, "collection": COLLECTION, "stream": False, **way}
            response = await http.post("/v1/answers", json=body)
            response.raise_for_status()
            by_id[response.json()["answer_id"]] = asked[number]

        await side_by_side(len(asked), AT_ONCE, one)

    async def booked() -> list[Any]:
        return await suite.rows(
            "SELECT operation_id::text AS id, cost_nanousd, input_tokens + output_tokens AS tokens, cache_verdict, cache_source_id"
            " FROM operations WHERE tenant = $1 AND user_id = $2",
            tenant,
            USER,
        )

    await until(lambda: _are(len(asked), booked), BOOKED_WITHIN_S)
    rows, calls = await booked(), await suite.provider.records()
    billed, told = sum(call.input_tokens + call.output_tokens for call in calls), sum(row["tokens"] for row in rows)
    if billed != told:
        raise RuntimeError(f"{tenant}: the provider billed {billed} tokens, and the books say {told}")
    served = [(by_id[row["id"]], by_id[row["cache_source_id"]]) for row in rows if row["cache_source_id"]]
    wrong = [(question.text, source.text) for question, source in served if question.meaning != source.meaning]
    exact = sum(row["cache_verdict"] == "exact" for row in rows)
    return Bill(sum(row["cost_nanousd"] for row in rows), len(calls), exact, len(served) - exact, wrong)


async def _are(count: int, rows: Callable[[], Awaitable[list[Any]]]) -> bool:
    return len(await rows()) == count


def _lines(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rb") as file:
        yield from map(orjson.loads, file)


def clusters_of(data: Path) -> dict[str, list[str]]:
    """Wordings by what they ask, without those about which people disagree."""
    rows = _lines(data / "cache/qqp_clusters.jsonl.gz")
    return {row["cluster"]: [text.strip() for text in row["questions"]] for row in rows if not row["conflicting"]}


def documents_of(data: Path) -> dict[str, str]:
    rows = (row for row in _lines(data / "retrieval/xquad/contexts.jsonl.gz") if row["lang"] == "en")
    return {f"{row['title']} {row['_id']}": row["text"] for row in itertools.islice(rows, DOCUMENTS)}


async def measure(data: Path, n: int, seed: str) -> bool:
    """Ask every stream in every way and print the bills; return whether the bars are reached."""
    clusters, documents = clusters_of(data), documents_of(data)
    good = True
    _say(f"seed {seed} (replay: make bench-savings SEED={seed}); {n} questions a stream; answers of {ANSWER_TOKENS} tokens")
    _say(f"{'':<16}{'calls':>7}{'bill, USD':>11}{'saved':>10}{'exact':>8}{'similar':>9}{'of those wrong (95 % upper)':>29}")
    async with running() as suite:
        for again in AGAIN:
            asked = stream_of(clusters, n, again, random.Random(f"{seed}:{again}"))
            repeated, verbatim = (len(asked) - len({key(question) for question in asked}) for key in (_MEANING, _TEXT))
            _say(f"{100 * repeated / n:.0f} % ask what was asked before, {100 * verbatim / n:.0f} % in the same words")
            whole = 0
            for number, (name, way) in enumerate(WAYS.items()):
                bill = await bill_of(suite, f"again{round(100 * again)}-{number}", asked, documents, way)
                whole = whole or bill.nanousd
                saved = 1 - bill.nanousd / whole
                served = bill.exact + bill.similar
                wrong = f"{len(bill.wrong)} ({100 * wilson_upper(len(bill.wrong), served):.1f} %)" if served else ""
                money = f"{bill.nanousd / 1e9:>11.3f}{100 * saved:>8.1f} %"
                _say(f"  {name:<14}{bill.calls:>7}{money}{bill.exact:>8}{bill.similar:>9}{wrong:>29}")
                for question, source in bill.wrong:
                    _say(f"    {question!r} got the answer to {source!r}")
            if again == JUDGED:
                good = saved >= SAVED_MIN
                _say(f"  saved by both: {100 * saved:.1f} %, at least {100 * SAVED_MIN:.0f} %: {'ok' if good else 'BELOW'}")
    return good


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-savings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--n", type=int, default=QUESTIONS, help=f"questions in each stream ({QUESTIONS})")
    options = parser.parse_args()
    sys.exit(not asyncio.run(measure(options.data, options.n, seed_of_run())))


if __name__ == "__main__":
    main()
