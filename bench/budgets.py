"""`make bench-money ARGS=budget`: a budget for exactly k of many simultaneous answers, asked of two orchestrators by internal services.

The provider is silent until every question is decided, so no call ends and gives money back while others are being refused: how many get
through is a whole number known before, and not a matter of speed. Each question has the same length and a bound that is never lowered, so
each call holds the same amount.
"""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.ground import BOOKED_WITHIN_S, PLAN, TENANTS, Bar, Ground, Outcome
from bench.money import LAWS, Scenario, broken_laws, compare
from bench.script import Behaviour
from services.chassis.channel import Caller, open_channel
from services.chassis.errors import DomainError
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2_grpc as rpc
from tests.suite import until

MODEL = "claude-haiku-5-5"
OUTPUT_TOKENS = 200
"""Below `TAILRACE_ORCHESTRATOR_OUTPUT_TOKENS_MIN`, so an answer is admitted with this bound or not at all."""
DECIDED_WITHIN_S = 120.0
KNOWN, NEW, MANY = "known user", "user never seen", "users never seen"


@dataclass
class Burst:
    """What came of one burst of questions, by the question's mark."""

    done: set[str] = field(default_factory=set)
    answers: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """By reason."""
    again: Counter[str] = field(default_factory=Counter)
    """How often a question was told to come again, by reason: too many wait to be embedded, or at the ledger."""


class Services:
    """An internal service that calls every orchestrator over gRPC, signed as the gateway signs."""

    def __init__(self, callers: Sequence[tuple[Caller, Any]]) -> None:
        self._callers = callers

    async def ask(self, number: int, mark: str, principal: Principal, burst: Burst) -> None:
        """Ask the orchestrator whose turn it is, and read to the end; again where that is said to be worth it."""
        caller, stub = self._callers[number % len(self._callers)]
        request = pb.AnswerRequest(
            question=f"What does the river bring to {mark}?", model=MODEL, max_output_tokens=OUTPUT_TOKENS, cache=pb.CACHE_MODE_OFF
        )
        ends_at = time.monotonic() + DECIDED_WITHIN_S
        while True:
            try:
                async with caller.stream(stub.Answer, request, timeout_s=2 * DECIDED_WITHIN_S, principal=principal) as events:
                    async for event in events:
                        if event.WhichOneof("event") == "done":
                            burst.done.add(mark)
                            burst.answers.append(event.answer_id)
                return
            except DomainError as error:
                if not error.retryable or time.monotonic() > ends_at:
                    burst.refused[error.reason or error.code] += 1
                    return
                burst.again[error.reason] += 1
                await asyncio.sleep((error.retry_after_ms or 1000) / 1000)


@contextlib.asynccontextmanager
async def services(ground: Ground) -> AsyncIterator[Services]:
    """One channel to each orchestrator."""
    async with contextlib.AsyncExitStack() as stack:
        passport = Passport(ground.suite.environment["TAILRACE_INTERNAL_KEY"].encode())
        callers = []
        for name in ground.suite.own:
            if name.startswith("orchestrator"):
                channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{ground.suite.ports[name]}"))
                callers.append((Caller(name, passport), rpc.OrchestratorServiceStub(channel)))
        yield Services(callers)


async def budget(ground: Ground, n: int) -> Outcome:
    """Several budgets, each for exactly k of `n` simultaneous questions, of a user who holds leases, of one never seen, and of n such."""
    await ground.begin()
    chance = ground.random("budget")
    totals: Counter[str] = Counter()
    notes: dict[str, Any] = {}
    again: Counter[str] = Counter()
    async with services(ground) as line:
        amount = await _amount(ground, line)
        for number, (k, case) in enumerate(itertools.product((1, chance.randrange(2, max(3, n // 8)), n // 2), (KNOWN, NEW, MANY))):
            room = k * amount + chance.randrange(amount)
            figures, burst = await _burst(ground, line, f"budget{number}", case, n, k, room, amount)
            totals += figures
            notes[f"{case}, k={k}"] = f"{len(burst.done)} admitted, {dict(burst.refused)} refused"
            again += burst.again
    return Outcome(
        "budget for k at once",
        n,
        ground.seed,
        [
            Bar("admitted beyond k", totals["beyond"], 0),
            Bar("short of k", totals["short"], 0),
            Bar("provider calls beside those admitted", totals["astray"], 0),
            Bar("refusals that do not say BUDGET_EXHAUSTED", totals["other"], 0),
            Bar("holds of another amount", totals["odd"], 0),
            Bar("budgets ever passed, spent and held", totals["passed"], 0),
            Bar("new users who were known", totals["known"], 0),
            Bar("answers lost after done", totals["unbooked"], 0),
            Bar("holds left open", await ground.holds_left(), 0),
            Bar(LAWS, await broken_laws(ground), 0),
            Bar("provider calls lost", totals["lost"], 0),
            Bar("provider calls booked twice", totals["doubled"], 0),
            Bar("provider calls not booked exactly", totals["inexact"], 0),
        ],
        {"held each": amount, **notes, "told to come again": dict(again)},
    )


async def _amount(ground: Ground, line: Services) -> int:
    """What one such call holds, as somebody without a budget learns it."""
    burst = Burst()
    await line.ask(0, _mark(TENANTS[0], 0), Principal(TENANTS[0], "gauge"), burst)
    (row,) = await ground.suite.rows("SELECT amount_nanousd FROM holds WHERE user_id = 'gauge' AND provider <> ''")
    return int(row["amount_nanousd"])


def _mark(tenant: str, number: int) -> str:
    """Always as long as any other: the worst case of a prompt is counted by its bytes."""
    return f"mark-{tenant[-9:]:x>9}-{number:06}"


async def _burst(
    ground: Ground, line: Services, tenant: str, case: str, n: int, k: int, room: int, amount: int
) -> tuple[Counter[str], Burst]:
    """One budget that has `room` left, and `n` questions at once."""
    users = [f"new-{number}" for number in range(n)] if case == MANY else ["ann"]
    await ground.suite.provider.reset()
    async with ground.suite.client("admin", tenant, ("user", "admin")) as admin:
        limit = room
        if case == KNOWN:
            before = {"period": "month", "limit_usd": _usd(room + 2 * amount)}
            (await admin.put("/v1/admin/budgets/user/ann", json=before)).raise_for_status()
            limit += await _made_known(ground, line, tenant)
        usd = _usd(limit)
        if case == NEW:
            put = await admin.put("/v1/admin/plans/free", json={**PLAN, "monthly_budget_usd": usd})
        else:
            subject = ("tenant", tenant) if case == MANY else ("user", "ann")
            put = await admin.put(f"/v1/admin/budgets/{'/'.join(subject)}", json={"period": "month", "limit_usd": usd})
        put.raise_for_status()
    (since,) = await ground.suite.rows("SELECT coalesce(max(commit_number), 0) AS commit FROM chain_links WHERE tenant = $1", tenant)
    seen = await ground.suite.rows("SELECT user_id FROM users WHERE tenant = $1 AND user_id = ANY($2)", tenant, users)

    await ground.suite.provider.behave(Behaviour(waits=True, tokens=30), contains=_mark(tenant, 0)[:-6])
    burst = Burst()
    marks = {_mark(tenant, number) for number in range(1, n + 1)}
    async with asyncio.TaskGroup() as group:
        for number, mark in enumerate(sorted(marks)):
            group.create_task(line.ask(number, mark, Principal(tenant, users[number % len(users)]), burst))

        async def decided() -> bool:
            return burst.refused.total() + sum(record.mark in marks for record in await ground.suite.provider.records()) >= n

        with contextlib.suppress(TimeoutError):  # then the bars say what is missing
            await until(decided, DECIDED_WITHIN_S)
        await ground.suite.provider.release()
    called = [record.mark for record in await ground.suite.provider.records() if record.mark in marks]
    unbooked = await ground.unbooked(burst.answers, BOOKED_WITHIN_S)
    await ground.holds_left()
    books = await compare(ground, [tenant])
    odd = await ground.suite.rows("SELECT 1 FROM holds WHERE tenant = $1 AND provider <> '' AND amount_nanousd <> $2", tenant, amount)
    figures = Counter(
        beyond=max(0, len(called) - k),
        short=max(0, k - len(called)),
        astray=sum((Counter(called) - Counter(burst.done)).values()) + len(burst.done - set(called)),
        other=burst.refused.total() - burst.refused["BUDGET_EXHAUSTED"],
        odd=len(odd),
        passed=int(await _most_used(ground, tenant, since["commit"]) > limit),
        known=0 if case == KNOWN else len(seen),
        unbooked=unbooked,
        lost=books.lost,
        doubled=books.doubled,
        inexact=books.wrong + books.estimated,
    )
    return figures, burst


async def _made_known(ground: Ground, line: Services, tenant: str) -> int:
    """Have `ann` asked both orchestrators before, so that each holds a lease of hers; return what she has spent."""
    warm = Burst()
    for number in range(2):
        await line.ask(number, _mark(tenant, 900_000 + number), Principal(tenant, "ann"), warm)

    async def lent() -> bool:
        rows = await ground.suite.rows("SELECT count(*) AS n FROM leases WHERE tenant = $1 AND ended_at IS NULL", tenant)
        return bool(rows[0]["n"] == 2)

    await until(lent, 20)
    await ground.unbooked(warm.answers)
    (row,) = await ground.suite.rows("SELECT sum(cost_nanousd)::bigint AS spent FROM holds WHERE tenant = $1", tenant)
    return int(row["spent"])


def _usd(nanousd: int) -> str:
    return f"{nanousd // 10**9}.{nanousd % 10**9:09}"


async def _most_used(ground: Ground, tenant: str, since: int) -> int:
    """The most the tenant had spent and held together after any commit since one, leases included, as the chain remembers it."""
    (row,) = await ground.suite.rows(
        "SELECT max(used)::bigint AS most FROM (SELECT l.commit_number, sum(-e.amount_nanousd) OVER (ORDER BY l.commit_number) AS used"
        " FROM chain_links l JOIN entries e USING (posting_id) WHERE l.tenant = $1 AND e.account = 'available') u WHERE commit_number > $2",
        tenant,
        since,
    )
    return int(row["most"] or 0)


SCENARIOS: dict[str, tuple[Scenario, int]] = {"budget": (budget, 500)}
"""What can be asked for, with the full number of questions at once."""
