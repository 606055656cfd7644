"""`make bench-money`: what the books must survive, as scenarios that tests run short and this command runs in full.

Each scenario drives a suite with replicas while something dies or is away, and then compares two witnesses: what the provider says it
made, and what the ledger says was used.
"""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.ground import TENANTS, Bar, Ground, Outcome, side_by_side, untyped
from bench.reader import Read, read_answer
from bench.script import Behaviour, Record
from services.ledger.verify import verify
from tests.suite import until

USERS_AT_ONCE = 16
"""Who ask without a pause while the ledger is away: as many as two CPUs carry, provider and readers included."""
STREAMS_AT_A_KILL = 20
DRAINED_WITHIN_S = 30.0
ESTIMATE_SHARE = 2.0
"""By how many per cent all that was estimated may differ from what the provider made."""
LAWS = "laws of the books broken"
POOR_USD = "0.05"
"""What the last tenant may spend, so that its leases and its budget run out."""


@dataclass
class Books:
    """The provider's records beside the ledger's attempts."""

    lost: int = 0
    """Calls of the provider that no attempt tells of."""
    doubled: int = 0
    """Calls that more than one does."""
    wrong: int = 0
    """Calls booked as exact that differ."""
    exact: int = 0
    estimated: int = 0
    made: int = 0
    """Tokens of the estimated calls as the provider counts them."""
    booked: int = 0
    """The same as the ledger does."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def off_percent(self) -> float:
        return round(100 * abs(self.booked - self.made) / self.made, 2) if self.made else 0.0

    def bars(self) -> list[Bar]:
        return [
            Bar("provider calls lost", self.lost, 0),
            Bar("provider calls booked twice", self.doubled, 0),
            Bar("exact figures that are not", self.wrong, 0),
            Bar("all estimates beside what was made", self.off_percent, ESTIMATE_SHARE, "%"),
        ]


async def away(ground: Ground, n: int) -> Outcome:
    """Every ledger is gone for `n` seconds while users ask and ask; new questions go on, paid from what was lent."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=40, tokens_per_s=100))
    ledgers = [name for name in ground.suite.own if name.startswith("ledger")]
    poor = TENANTS[-1]
    async with ground.suite.client("admin", poor, ("user", "admin")) as admin:
        put = await admin.put(f"/v1/admin/budgets/tenant/{poor}", json={"period": "month", "limit_usd": POOR_USD})
        put.raise_for_status()
    reads: list[tuple[str, str, Read]] = []
    """Tenant, when it was asked, and the answer."""
    moment, ending = "before", asyncio.Event()

    async def user(number: int) -> None:
        tenant = TENANTS[number % len(TENANTS)]
        while not ending.is_set():
            asked = moment
            mark, body = ground.question(tenant)
            read = await read_answer(ground.turned(number), ground.token(tenant), body, key=mark)
            reads.append((tenant, asked, read))
            if not read.answer_id or read.end != "done":
                await asyncio.sleep(0.2)  # refused; the load stays a load and no flood

    async with asyncio.TaskGroup() as group:
        for number in range(USERS_AT_ONCE):
            group.create_task(user(number))
        try:
            await asyncio.sleep(3)
            await _until_lent(ground, 2 * (len(TENANTS) - 1))
            for name in ledgers:
                await ground.suite.kill(name)
            moment = "away"
            await asyncio.sleep(n)
            moment = "after"
            for name in ledgers:
                await ground.suite.start(name)
            back_at = time.monotonic()
            await ground.suite.until_all_ready()
        finally:
            ending.set()
    done = [read.answer_id for _, _, read in reads if read.end == "done"]
    unbooked = await ground.unbooked(done, DRAINED_WITHIN_S)
    drained_s = time.monotonic() - back_at
    left = await ground.holds_left()
    books = await compare(ground)
    during = [(tenant, read) for tenant, asked, read in reads if asked == "away"]
    rich = [read for tenant, read in during if tenant != poor]
    (over,) = await ground.suite.rows(
        "SELECT count(*) AS n FROM spending s JOIN budgets b USING (tenant, scope, subject, period) WHERE s.spent_nanousd > b.limit_nanousd"
    )
    failed = [
        read for _, _, read in reads if read.answer_id and read.end != "done" and read.reason not in ("BUDGET_EXHAUSTED", "UNAVAILABLE")
    ]
    return Outcome(
        "ledger away",
        n,
        ground.seed,
        [
            Bar("answers done while it was away", sum(read.end == "done" for read in rich), n, at_least=True),
            Bar("users with money who were turned away", sum(read.end != "done" for read in rich), 0),
            Bar("other failures", len(failed), 0),
            Bar("answers lost after done", unbooked, 0),
            Bar("booked after it was back", round(drained_s, 1), DRAINED_WITHIN_S, "s"),
            Bar("budgets overspent", over["n"], 0),
            Bar("holds left open", left, 0),
            Bar(LAWS, await broken_laws(ground), 0),
            *books.bars(),
        ],
        {
            "asked": len(reads),
            "while away": len(during),
            "of the poor tenant": collections.Counter(read.end or read.reason for tenant, read in during if tenant == poor),
            "drawn on leases": (await ground.suite.rows("SELECT count(*) AS n FROM holds WHERE lease_id IS NOT NULL"))[0]["n"],
            **books.notes,
        },
    )


async def orchestrators(ground: Ground, n: int) -> Outcome:
    """An orchestrator is killed `n` times, in turn, in the middle of twenty streams."""

    async def kill(turn: int) -> None:
        names = [name for name in ground.suite.own if name.startswith("orchestrator")]
        victim = names[turn % len(names)]
        await ground.suite.kill(victim)
        await ground.suite.start(victim)

    return await _killing(ground, n, "kill -9 of the orchestrator", kill)


async def ledgers(ground: Ground, n: int) -> Outcome:
    """A ledger is killed `n` times, in turn, while it books."""

    async def kill(turn: int) -> None:
        names = [name for name in ground.suite.own if name.startswith("ledger")]
        victim = names[turn % len(names)]
        await ground.suite.kill(victim)
        await ground.suite.start(victim)

    return await _killing(ground, n, "kill -9 of the ledger", kill)


async def postgres(ground: Ground, n: int) -> Outcome:
    """PostgreSQL is killed `n` times in the middle of its commits and recovers."""

    async def kill(_: int) -> None:
        ground.suite.postgres.kill()
        await ground.suite.postgres.start()

    return await _killing(ground, n, "kill -9 of PostgreSQL", kill)


async def _killing(ground: Ground, n: int, name: str, kill: Callable[[int], Awaitable[None]]) -> Outcome:
    """Twenty streams at a time, and a kill at a random moment of each round."""
    await ground.begin()
    chance = ground.random(name)
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=150, tokens_per_s=100))
    reads: list[Read] = []
    for turn in range(n):

        async def one(number: int, turn: int = turn) -> Read:
            mark, body = ground.question(TENANTS[number % len(TENANTS)])
            return await read_answer(ground.turned(number), ground.token(TENANTS[number % len(TENANTS)]), body, key=f"{mark}-{turn}")

        streams = asyncio.create_task(side_by_side(STREAMS_AT_A_KILL, STREAMS_AT_A_KILL, one))
        try:
            await asyncio.sleep(chance.uniform(0.1, 1.8))
            await kill(turn)
            reads += await streams
        finally:
            streams.cancel()
        await ground.suite.until_all_ready()
    done = [read.answer_id for read in reads if read.end == "done"]
    unbooked = await ground.unbooked(done)
    left = await ground.holds_left()
    books = await compare(ground)
    return Outcome(
        name,
        n,
        ground.seed,
        [
            Bar("readers without a typed end", untyped(reads), 0),
            Bar("answers lost after done", unbooked, 0),
            Bar("holds left open", left, 0),
            Bar(LAWS, await broken_laws(ground), 0),
            *books.bars(),
        ],
        {"streams": len(reads), "ends": collections.Counter(read.end or read.reason for read in reads), **books.notes},
    )


async def broken_laws(ground: Ground) -> int:
    """How many laws of the books do not hold: what `tailrace ledger verify` says."""
    return sum(finding.broken for finding in await verify(ground.suite.postgres.url))


async def compare(ground: Ground, tenants: Sequence[str] = TENANTS) -> Books:
    """What the provider made since the last reset beside what was booked for these tenants."""
    records = [record for record in await ground.suite.provider.records() if record.state != "refused"]
    rows = await ground.suite.rows(
        "SELECT a.* FROM attempts a JOIN operations o USING (tenant, operation_id) WHERE o.tenant = ANY($1) AND NOT a.not_sent", tenants
    )
    named = collections.defaultdict(list)
    for row in rows:
        named[row["provider_request_id"]].append(row)
    books = Books()
    nameless: list[Record] = []
    for record in records:
        found = named.get(record.request_id, [])
        books.doubled += len(found) > 1
        if not found:
            nameless.append(record)
        elif found[0]["estimated"]:
            _estimate(books, record, found[0])
        else:
            books.exact += 1
            books.wrong += (found[0]["input_tokens"], found[0]["output_tokens"]) != (record.input_tokens, record.output_tokens)
    # A call whose maker died before the provider's first byte was heard has no name yet, but a row.
    unnamed = [row for row in named.get("", []) if row["estimated"]]
    books.lost = max(0, len(nameless) - len(unnamed))
    for record, row in zip(nameless, unnamed, strict=False):
        _estimate(books, record, row)
    books.notes = {
        "provider calls": len(records),
        "exact": books.exact,
        "estimated": books.estimated,
        "without a name": len(nameless),
        "estimated tokens": f"{books.booked} of {books.made}",
    }
    return books


def _estimate(books: Books, record: Record, row: Any) -> None:
    books.estimated += 1
    books.made += record.input_tokens + record.output_tokens
    books.booked += row["input_tokens"] + row["output_tokens"]


async def _until_lent(ground: Ground, leases: int) -> None:
    """Wait until so many leases are open, so that whoever asks next has one."""

    async def enough() -> bool:
        return bool((await ground.suite.rows("SELECT count(*) AS n FROM leases WHERE ended_at IS NULL"))[0]["n"] >= leases)

    await until(enough, 20)


Scenario = Callable[[Ground, int], Awaitable[Outcome]]
SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "away": (away, 60),
    "orchestrators": (orchestrators, 200),
    "postgres": (postgres, 50),
    "ledgers": (ledgers, 50),
}
"""What can be asked for, with the full number: seconds for `away`, kills for the others."""
