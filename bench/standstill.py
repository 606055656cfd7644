"""`make bench-streams ARGS=standstill`: replicas stop as under SIGSTOP, with every connection open, and wake up again later.

Nothing is broken off, so nobody is told: a caller has to find out by itself, and what wakes up must not undo what was done meanwhile.
"""

import asyncio
import collections
import signal
from collections.abc import Sequence

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


async def standstill(ground: Ground, n: int, victims: Sequence[str] = ()) -> Outcome:
    """One orchestrator and one ledger, or those named, stand still `n` times each in turn, while eight users keep asking."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=60, tokens_per_s=100))
    reads: list[Read] = []
    without: list[Read] = []
    ends: dict[str, collections.Counter[str]] = {}
    ending = asyncio.Event()
    standing, found_out = "", False

    async def user(number: int) -> None:
        while not ending.is_set():
            mark, body = ground.question()
            begun = standing, found_out
            read = await read_answer(ground.turned(number), ground.token(), body, key=mark)
            reads.append(read)
            name, late = begun
            ends.setdefault(f"{name} {'found out' if late else 'stands still'}" if name else "all well", collections.Counter())[
                f"{read.end or 'refused'} {read.reason}".strip()
            ] += 1
            if late:
                without.append(read)
            if not read.answer_id:
                await asyncio.sleep(REFUSED_PAUSE_S)  # the load stays a load and no flood

    async with asyncio.TaskGroup() as group:
        for number in range(USERS):
            group.create_task(user(number))
        try:
            for _ in range(n):
                for name in victims or ("orchestrator-2", "ledger-2"):
                    process = ground.suite.processes[name]
                    process.send_signal(signal.SIGSTOP)
                    try:
                        standing = name
                        await asyncio.sleep(FOUND_OUT_S)
                        found_out = True
                        await asyncio.sleep(ON_ITS_OWN_S)
                    finally:
                        standing, found_out = "", False
                        process.send_signal(signal.SIGCONT)
                    await ground.suite.until_all_ready()
        finally:
            ending.set()
    done = [read.answer_id for read in reads if read.end == "done"]
    numbering = [read.gaps_and_repeats() for read in reads]
    failed = sum(read.end != "done" for read in without)
    return Outcome(
        "standstill",
        n,
        ground.seed,
        [
            Bar("failed of what was asked 10 s later", round(100 * failed / max(1, len(without)), 2), FAILED_MAX, "%"),
            Bar("of those, answered", len(without) - failed, 1, at_least=True),
            Bar("ends without a type", untyped(reads), 0),
            Bar("gaps and repeats", sum(gaps + repeats for gaps, repeats in numbering), 0),
            Bar("answers lost after done", await ground.unbooked(done), 0),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {"answers": len(reads), "asked 10 s later": len(without), **{when: dict(ended) for when, ended in ends.items()}},
    )


SCENARIOS = {"standstill": (standstill, 5)}
