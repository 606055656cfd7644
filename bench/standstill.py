"""`make bench-streams ARGS="standstill redis"`: what all replicas share or count on goes away without a word, under load.

A replica stops as under SIGSTOP, with every connection open, and wakes up again later: nothing is broken off, so nobody is told, and what
wakes up must not undo what was done meanwhile. Or Redis is killed: limits, logs and caches have to do without it.
"""

import asyncio
import collections
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from bench.ground import Bar, Ground, Outcome, untyped
from bench.reader import Read, read_answer
from bench.script import Behaviour

USERS = 8
FOUND_OUT_S = 10.0
"""So long calls may still run into the replica that stands still."""
ON_ITS_OWN_S = 10.0
"""How long the others are watched doing without it."""
FAILED_MAX = 1.0
REFUSED_PAUSE_S = 0.05
ALL_WELL = "all well"


async def standstill(ground: Ground, n: int, victims: Sequence[str] = ()) -> Outcome:
    """One orchestrator and one ledger, or those named, stand still `n` times each in turn, while eight users keep asking."""
    await ground.begin()
    moment = ALL_WELL
    async with _asked_meanwhile(ground, lambda: moment) as reads:
        for _ in range(n):
            for name in victims or ("orchestrator-2", "ledger-2"):
                process = ground.suite.processes[name]
                process.send_signal(signal.SIGSTOP)
                try:
                    moment = f"{name} stands still"
                    await asyncio.sleep(FOUND_OUT_S)
                    moment = f"{name} found out"
                    await asyncio.sleep(ON_ITS_OWN_S)
                finally:
                    moment = ALL_WELL
                    process.send_signal(signal.SIGCONT)
                await ground.suite.until_all_ready()
    without = [read for when, read in reads if when.endswith("found out")]
    return await _outcome("standstill", n, ground, reads, "failed of what was asked 10 s later", without)


async def redis_away(ground: Ground, n: int) -> Outcome:
    """Redis is killed and comes back after `n` seconds, while eight users keep asking, without keys, for which it is needed."""
    await ground.begin()
    moment = ALL_WELL
    async with _asked_meanwhile(ground, lambda: moment, keyed=False) as reads:
        await asyncio.sleep(1)
        ground.suite.valkey.kill()
        await ground.suite.valkey.stop()  # waits for its end
        try:
            moment = "redis is away"
            await asyncio.sleep(n)
        finally:
            await ground.suite.valkey.start()
            moment = "redis is back"
        await ground.suite.until_all_ready()
        await asyncio.sleep(1)
    return await _outcome(
        "redis away", n, ground, reads, "failed of what was asked meanwhile", [r for w, r in reads if w == "redis is away"]
    )


@contextlib.asynccontextmanager
async def _asked_meanwhile(ground: Ground, moment: Callable[[], str], *, keyed: bool = True) -> AsyncIterator[list[tuple[str, Read]]]:
    """Users ask and ask until the block is left; what they got, each with the moment it was asked in."""
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=60, tokens_per_s=100))
    reads: list[tuple[str, Read]] = []
    ending = asyncio.Event()

    async def user(number: int) -> None:
        while not ending.is_set():
            mark, body = ground.question()
            begun = moment()
            read = await read_answer(ground.turned(number), ground.token(), body, key=mark if keyed else "")
            reads.append((begun, read))
            if not read.answer_id:
                await asyncio.sleep(REFUSED_PAUSE_S)  # the load stays a load and no flood

    async with asyncio.TaskGroup() as group:
        for number in range(USERS):
            group.create_task(user(number))
        try:
            yield reads
        finally:
            ending.set()


async def _outcome(name: str, n: int, ground: Ground, asked: Iterable[tuple[str, Read]], what: str, judged: Sequence[Read]) -> Outcome:
    """Nearly all of those `judged` are whole; all that were asked ended by type, and nothing is lost."""
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for when, read in asked:
        ends[when][f"{read.end or 'refused'} {read.reason}".strip()] += 1
    reads = [read for _, read in asked]
    done = [read.answer_id for read in reads if read.end == "done"]
    numbering = [read.gaps_and_repeats() for read in reads]
    failed = sum(read.end != "done" for read in judged)
    return Outcome(
        name,
        n,
        ground.seed,
        [
            Bar(what, round(100 * failed / max(1, len(judged)), 2), FAILED_MAX, "%"),
            Bar("of those, answered", len(judged) - failed, 1, at_least=True),
            Bar("ends without a type", untyped(reads), 0),
            Bar("gaps and repeats", sum(gaps + repeats for gaps, repeats in numbering), 0),
            Bar("answers lost after done", await ground.unbooked(done), 0),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {"answers": len(reads), **{when: dict(ended) for when, ended in ends.items()}},
    )


SCENARIOS = {"standstill": (standstill, 5), "redis": (redis_away, 60)}
