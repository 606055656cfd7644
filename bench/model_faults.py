"""Two scenarios of `make bench-streams`: a model that is out for a minute at load, and a provider that takes requests and says nothing.

Witnesses are what the readers got and what the provider saw.
"""

import asyncio
import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.ground import Bar, Ground, Outcome, side_by_side
from bench.reader import Reply, fetch, request
from bench.script import Behaviour

TIER, FIRST = "best", "claude-opus-5-5"
"""A tier with two candidates, and the first of them."""
PER_S = 12
"""Answers begun a second: so few that none is turned away while two CPUs prepare it."""
AFTER_S = 8.0
"""How long the load goes on when the outage is over."""
TURNED_AWAY = "OVERLOADED"
"""What the gateway says of requests that it does not take on. That is the machine's matter and no model's: `overload` looks at it."""
DEADLINE_S, LATE_S = 5, 0.1
WIDTH = 8


async def outage(ground: Ground, n: int) -> Outcome:
    """The first model of a tier answers 503 for `n` seconds at load: everybody is answered by the next, without a storm of retries."""
    await ground.begin()
    answered: list[tuple[float, str]] = []
    failed: collections.Counter[str] = collections.Counter()

    async def one(number: int) -> None:
        _, body = ground.question()
        began = time.monotonic()
        message = request("POST", "/v1/answers", ground.token(), {**body, "tier": TIER, "max_output_tokens": 200})
        reply = await fetch(ground.turned(number)[0], message)
        if reply.blocks and reply.blocks[-1].name == "done":
            answered.append((began, str(reply.blocks[-1].data["model"])))
        else:
            failed[_reason(reply)] += 1

    async def load(seconds: float) -> int:
        begins, tasks = time.monotonic(), []
        for number in range(round(seconds * PER_S)):
            await asyncio.sleep(max(0.0, begins + number / PER_S - time.monotonic()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
        return len(tasks)

    await load(2)
    warm = len(answered)
    await ground.suite.provider.reset()
    await ground.suite.provider.behave(Behaviour(fault="status", status=503), contains=FIRST)
    failed.clear()
    asked = await load(n)
    taken_on = asked - failed[TURNED_AWAY]
    calls = (await ground.suite.provider.totals())["requests"]
    during = answered[warm:]
    await ground.suite.provider.reset()
    restored_at = time.monotonic()
    await load(AFTER_S)
    late = [began - restored_at for began, model in answered[warm + len(during) :] if model != FIRST]
    left = await ground.holds_left()
    return Outcome(
        "outage of the first model",
        n,
        ground.seed,
        [
            Bar("answers that failed", sum(count for reason, count in failed.items() if reason != TURNED_AWAY), 0),
            Bar("provider calls for each request taken on", round(calls / taken_on, 3), 1.1),
            Bar("recovery", round(max(late, default=0.0), 2), 5, "s"),
            Bar("holds left open", left, 0),
        ],
        {
            "requests": asked,
            "turned away, as the CPUs had too much to do": failed[TURNED_AWAY],
            "calls": calls,
            "models": dict(collections.Counter(model for _, model in during)),
            "failed": dict(failed),
        },
    )


async def black_hole(ground: Ground, n: int) -> Outcome:
    """Every model takes the request and says nothing; the callers give five seconds. Each hears of it in time, and nothing is left."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(fault="hang"))
    took: list[float] = []
    ends: collections.Counter[str] = collections.Counter()

    async def one(number: int) -> None:
        _, body = ground.question()
        message = request("POST", "/v1/answers", ground.token(), body, request_timeout=str(DEADLINE_S))
        began = time.monotonic()
        reply = await fetch(ground.turned(number)[0], message)
        took.append(time.monotonic() - began)
        ends[_reason(reply)] += 1

    await side_by_side(n, WIDTH, one)
    left = await ground.holds_left()
    open_calls = sum(record.state == "running" for record in await ground.suite.provider.records())
    return Outcome(
        "black hole",
        n,
        ground.seed,
        [
            Bar("longest over the deadline", round(max(took) - DEADLINE_S, 3) * 1000, LATE_S * 1000, "ms"),
            Bar("ends without a type", n - sum(ends.values()) + ends[""], 0),
            Bar("provider calls left open", open_calls, 0),
            Bar("holds left open", left, 0),
        ],
        {"ends": dict(ends), "median over the deadline": f"{1000 * (statistics.median(took) - DEADLINE_S):.0f} ms"},
    )


def _reason(reply: Reply) -> str:
    """How it ended, by type."""
    return str(reply.blocks[-1].data.get("reason", "")) if reply.blocks else reply.reason


SCENARIOS: dict[str, tuple[Callable[[Ground, int], Any], int]] = {"outage": (outage, 60), "blackhole": (black_hole, 100)}
"""By the name they are asked for, with the full n."""
