"""What ingestion promises, proven against the real suite: no answer from an old version, and whole documents after kill -9.

`python -m bench.ingestion_faults versions --n 200` and `… kill --n 20`. The seed is printed; with it a run asks the same again.
"""

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson

from tests.suite import Suite, ask, ingest, running

ASKERS = 4
"""Callers that ask all the time while versions change, half of them the very question whose answer changes."""
TURNS_OF_A_USER = 40
"""So many stay below what one user may ask in a minute, however fast they go."""
JOB_TIMEOUT_S = 120.0
LEASE_S = "1"


async def versions(suite: Suite, n: int, seed: int) -> dict[str, Any]:
    """Ingest version 1, ask, ingest version 2 or delete, ask at once; n times. Counts answers that rest on what was replaced."""
    random_ = random.Random(seed)
    stale, cached, acknowledged = 0, 0, 0
    async with contextlib.AsyncExitStack() as opened:
        await opened.enter_async_context(_asked_all_the_time(suite, random_))
        for turn in range(n):
            if turn % TURNS_OF_A_USER == 0:
                client = await opened.enter_async_context(suite.client(f"tester-{turn // TURNS_OF_A_USER}"))
            title, question = f"Harbour {turn}", f"What is the code of harbour number {turn}?"
            old, new = (f"OLD{turn}X{random_.randrange(10**9)}", f"NEW{turn}X{random_.randrange(10**9)}")
            ids = await ingest(client, {title: f"The code of harbour number {turn} is {old}."})
            first = await ask(client, question)
            assert old in _material(first.data("passages")), f"turn {turn} (seed {seed}): the first version was not found"
            # One that is under way while the change is acknowledged may be made of the old version, but never kept for others.
            under_way = asyncio.create_task(ask(client, question, cache="refresh"))
            await asyncio.sleep(random_.random() * 0.05)
            if turn % 2:
                (await client.delete(f"/v1/documents/{ids[title]}")).raise_for_status()
            else:
                await ingest(client, {title: f"The code of harbour number {turn} is {new}."})
            acknowledged += 1
            answers = await asyncio.gather(*(ask(client, question) for _ in range(3)))
            await under_way
            answers.append(await ask(client, question))
            for answer in answers:
                cached += answer.done["cache"]["verdict"] in ("exact", "semantic")
                stale += old in _material(answer.data("passages")) + answer.text
    return {"n": acknowledged, "answers_from_the_old_version": stale, "answers_from_a_cache": cached, "seed": seed}


@contextlib.asynccontextmanager
async def _asked_all_the_time(suite: Suite, random_: random.Random) -> AsyncIterator[None]:
    """Load: callers that ask until the block is left."""

    async def asking(number: int) -> None:
        async with suite.client(f"asker-{number}") as client:
            while True:
                with contextlib.suppress(AssertionError, httpx.HTTPError):  # what they hear is not what is measured
                    await ask(client, f"What is the code of harbour number {random_.randrange(1000)}?", cache="off")

    tasks = [asyncio.create_task(asking(number)) for number in range(ASKERS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def kill(suite: Suite, n: int, seed: int) -> dict[str, Any]:
    """Ingest, kill -9 at a random moment, start again, wait for the job; n times. Compares with a clean ingestion, chunk by chunk."""
    random_ = random.Random(seed)
    documents = {f"Part {number}": _text(random_, number) for number in range(6)}
    ended, wrong, unanswered = 0, 0, 0
    async with suite.client() as client:
        await ingest(client, documents, "clean")
        clean = await _chunks(client, "clean")
        for turn in range(n):
            name = f"killed-{turn}"
            lines = b"\n".join(orjson.dumps({"title": title, "text": text, "collection": name}) for title, text in documents.items())
            headers = {"content-type": "application/x-ndjson"}
            sent = await client.post("/v1/documents:bulk?wait=false", content=lines, headers=headers)
            if sent.status_code != 202:
                unanswered += 1
                continue
            await asyncio.sleep(random_.random() * 1.5)
            await suite.kill("retrieval")
            await suite.start("retrieval")
            await suite.until_ready()
            ended += await _ended(client, sent.json()["job_id"])
            wrong += await _chunks(client, name) != clean
    return {"n": n, "jobs_that_ended": ended, "collections_that_differ": wrong, "not_accepted": unanswered, "seed": seed}


def _text(random_: random.Random, number: int) -> str:
    words = [f"word{random_.randrange(500)}" for _ in range(1500)]
    return f"# Part {number}\n\n" + "\n\n".join(" ".join(words[start : start + 60]) for start in range(0, len(words), 60))


async def _ended(client: httpx.AsyncClient, job_id: str) -> bool:
    """Whether the job comes to an end in time, with every document indexed."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(JOB_TIMEOUT_S):
            while True:
                shown = await client.get(f"/v1/jobs/{job_id}")
                if shown.status_code == 200 and shown.json()["status"] == "ended":
                    return {row["stage"] for row in shown.json()["documents"]} <= {"indexed", "unchanged"}
                await asyncio.sleep(0.1)
    return False


async def _chunks(client: httpx.AsyncClient, collection: str) -> dict[str, list[tuple[int, str]]]:
    """Every chunk of every document, by title."""
    listed = (await client.get("/v1/documents", params={"collection": collection})).json()["documents"]
    found = {}
    for document in listed:
        shown = (await client.get(f"/v1/documents/{document['document_id']}")).json()
        found[document["title"]] = [(chunk["ordinal"], chunk["text"]) for chunk in shown["chunks"]]
    return found


def _material(passages: list[Any]) -> str:
    return orjson.dumps(passages).decode()


async def main(what: str, n: int, seed: int) -> int:
    async with running(TAILRACE_RETRIEVAL_INGEST_LEASE_S=LEASE_S) as suite:
        figures = await (versions if what == "versions" else kill)(suite, n, seed)
    sys.stdout.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode() + "\n")
    broken = (
        figures.get("answers_from_the_old_version", 0) or figures.get("jobs_that_ended", n) < n or figures.get("collections_that_differ", 0)
    )
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("versions", "kill"))
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.what, arguments.n, arguments.seed)))
