"""`make bench-streams`: what streams must survive, as scenarios that tests run short and this command runs in full.

Each scenario drives a suite with replicas and returns figures with their bars. None of them looks into a service: witnesses are the
bytes a reader got, what the provider saw, and the rows of the ledger.
"""

import asyncio
import collections
import contextlib
import itertools
import math
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from bench.faulty_proxy import PASS, FaultyProxy, Rule
from bench.ground import PLAN, TENANTS, Bar, Ground, Outcome, p99, side_by_side, untyped
from bench.reader import Read, Reply, fetch, read_answer, request
from bench.script import Behaviour

WIDTH = 16
DISCONNECTS_WIDTH = 8
"""So few that tokens are read as soon as they come: what is under way when we leave is billed, and unknown to us."""
RECONNECTS_MAX = 5
CLOSED_WITHIN_MS = 250
SOCKETS_GONE_AFTER_S = 5.0
INEXACT_SHARE = 0.02
STREAMS_AT_A_KILL = 20
NORMAL_TOKENS, NORMAL_PACE = 100, 5.0
"""A hundred of them are half of what two CPUs carry, so that what a neighbour adds is seen as what it is."""
SLUGGISH_TOKENS, SLUGGISH_MADE_S = 1000, 600.0
"""More than the buffers between us and the reader hold."""
BEGUN_PER_S = 12
"""So slowly that none is turned away while two CPUs prepare it."""
SAME_AT_ONCE = 40
"""So few that the gateways turn none away."""
OVERLOAD_FACTOR = 5
TURNED_AWAY_PAUSE_S = 0.2
LIMIT, LIMIT_WINDOW_S, LIMIT_PAUSE_S = 100, 60.0, 2.0
NAMELESS = """
SELECT count(*) AS n FROM attempts a JOIN operations o USING (tenant, operation_id)
WHERE a.provider_request_id = '' AND NOT a.not_sent AND o.created_at >= $1
"""
LIMIT_SETTLES_S = 10.0
"""How long after the beginning of a window all of it must be used."""


async def cut_and_resume(ground: Ground, n: int) -> Outcome:
    """Every answer is cut one to five times, at every boundary in turn and in the middle of events, and resumed at the other gateway."""
    await ground.begin()
    chance = ground.random("cut")
    await ground.suite.provider.behave(Behaviour(ttft_ms=5, tokens=24, tokens_per_s=400))
    rules: dict[bytes, Rule] = {}

    def choose(_: int, head: bytes) -> Rule:
        return rules.pop(head.partition(b"x-rule: ")[2].partition(b"\r\n")[0], PASS)

    _, body = ground.question()
    events = len((await read_answer(ground.ports, ground.token(), body, key="uncut")).blocks)
    plans: list[list[Rule]] = []
    for number in range(n):
        first = Rule(
            cut_after_events=number % events, cut_extra_bytes=chance.choice((0, chance.randint(1, 120))), reset=chance.random() < 0.5
        )
        more = [
            Rule(cut_after_events=chance.randint(0, 6), cut_extra_bytes=chance.randint(0, 120), reset=chance.random() < 0.5)
            for _ in range(chance.randint(0, RECONNECTS_MAX - 1))
        ]
        plans.append([first, *more])

    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultyProxy(port, choose)) for port in ground.ports]

        async def one(number: int) -> tuple[Read, bool]:
            _, body = ground.question()

            def headers(connection: int) -> dict[str, str]:
                if connection >= len(plans[number]):
                    return {}
                name = f"{number}.{connection}"
                rules[name.encode()] = plans[number][connection]
                return {"x_rule": name}

            turned = [proxies[(number + turn) % len(proxies)].port for turn in range(len(proxies))]
            read = await read_answer(turned, ground.token(), body, key=f"cut-{ground.seed}-{number}", headers=headers)
            same = False
            if read.end == "done":
                replay = await fetch(ground.ports[(number + 1) % len(ground.ports)], _events(ground, read.answer_id))
                same = b"\n\n".join(block.raw for block in replay.blocks) == read.joined
            return read, same

        results = await side_by_side(n, WIDTH, one)
        cuts = sum(proxy.cuts for proxy in proxies)
    reads = [read for read, _ in results]
    done = [read for read in reads if read.end == "done"]
    numbering = [read.gaps_and_repeats() for read in reads]
    calls = (await ground.suite.provider.totals())["requests"] - 1  # the uncut one
    left = await ground.holds_left()
    unbooked = await ground.unbooked(read.answer_id for read in done)
    ids = [read.answer_id for read in done]
    charged = (await ground.suite.rows("SELECT count(*) AS n FROM attempts WHERE operation_id = ANY($1::uuid[])", ids))[0]["n"]
    held = (await ground.suite.rows("SELECT count(*) AS n FROM holds WHERE operation_id = ANY($1::uuid[])", ids))[0]["n"]
    return Outcome(
        "cut and resume",
        n,
        ground.seed,
        [
            Bar("answers not done", n - len(done), 0),
            Bar("differ from the uncut replay", sum(not same for _, same in results), 0),
            Bar("gaps", sum(gaps for gaps, _ in numbering), 0),
            Bar("repeats", sum(repeats for _, repeats in numbering), 0),
            Bar("provider calls beside answers", abs(calls - n), 0),
            Bar("charges beside answers", abs(charged - len(done)) + abs(held - len(done)), 0),
            Bar("answers not booked", unbooked, 0),
            Bar("holds left open", left, 0),
        ],
        {"cuts": cuts, "connections": sum(read.connections for read in reads), "events": events, "ends": _ends(reads)},
    )


async def cancels(ground: Ground, n: int) -> Outcome:
    """An answer is cancelled through the other gateway at a random moment; the provider's socket must close at once.

    Every other moment is counted from the first text on, so that there are calls to stop on the slowest machine too.
    """
    await ground.begin()
    chance = ground.random("cancel")
    rate = 100.0
    await ground.suite.provider.behave(Behaviour(ttft_ms=30, tokens=600, tokens_per_s=rate))
    delays = [chance.uniform(0, 0.6) for _ in range(n)]
    sent: dict[str, tuple[float, float]] = {}
    """When the cancel was sent and when it was acknowledged, by mark."""

    async def one(number: int) -> Read:
        mark, body = ground.question()
        wanted = "delta" if number % 2 else "accepted"
        known: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def look(reply: Reply) -> None:
            if not known.done() and any(block.name == wanted for block in reply.blocks):
                known.set_result(reply.blocks[0].data["answer_id"])

        ports = ground.turned(number)
        task = asyncio.create_task(read_answer(ports, ground.token(), body, key=mark, on_blocks=look))
        try:
            async with asyncio.timeout(30):
                answer_id = await known
                await asyncio.sleep(delays[number])
                began = time.monotonic()
                reply = await fetch(ports[-1], ground.cancel(answer_id))
                assert reply.status == 202, reply.body
                sent[mark] = (began, time.monotonic())
                return await task
        finally:
            task.cancel()

    reads = await side_by_side(n, 10, one)
    await asyncio.sleep(SOCKETS_GONE_AFTER_S)
    records = await ground.records()
    took, after_sent, after_reply, alive = [], list[float](), [0], 0
    for mark, (began, acknowledged) in sent.items():
        record = records.get(mark)
        if record is None or record.state == "finished":
            continue  # cancelled before its provider call, or too late
        if record.closed_s is None:
            alive += 1
            continue
        took.append((record.received_at + record.closed_s - began) * 1000)
        if record.first_token_s is not None:
            # What was due by then counts as made: a provider that is late writes it together with the next.
            first = record.received_at + record.first_token_s
            made = [max(0, math.floor((moment - first) * rate) + 1) for moment in (began, acknowledged)]
            after_sent.append(max(0, record.output_tokens - made[0]))
            after_reply.append(max(0, record.output_tokens - made[1]))
    return Outcome(
        "cancel",
        n,
        ground.seed,
        [
            Bar("cancel to provider socket closed, p99", round(p99(took), 1), CLOSED_WITHIN_MS, "ms"),
            Bar("sockets alive 5 s later", alive, 0),
            # The one that is being written, and as many as the pace has until the socket is closed.
            Bar("tokens after the cancel was sent, p99", p99(after_sent), 1 + rate * CLOSED_WITHIN_MS / 1000, "tokens"),
            Bar("tokens after the cancel was acknowledged", max(after_reply), 1),
            Bar("ends without a type", untyped(reads), 0),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {
            "sockets closed": len(took),
            "p50_ms": round(statistics.median(took), 1) if took else None,
            "p50_tokens": statistics.median(after_sent) if after_sent else None,
            "ends": _ends(reads),
        },
    )


async def disconnects(ground: Ground, n: int, pace: float = 50.0) -> Outcome:
    """Readers leave for good after a random byte, or out of a request for a whole document: all that was used must be booked.

    What the provider makes until it notices that we leave is billed and has to be read; `pace` says how much that can be, in tokens a
    second.
    """
    await ground.begin()
    chance = ground.random("disconnect")
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=2000, tokens_per_s=pace))
    known = await _count(ground, "operations")
    began = (await ground.suite.rows("SELECT now() AS began"))[0]["began"]
    leaves = [(chance.random() < 1 / 3, chance.randint(1, 8000), chance.uniform(0.0, 1.0)) for _ in range(n)]

    async def one(number: int) -> str:
        whole, after_bytes, after_s = leaves[number]
        mark, body = ground.question()
        message = request("POST", "/v1/answers", ground.token(), {**body, "stream": not whole})
        port = ground.turned(number)[0]
        with contextlib.suppress(TimeoutError):
            if whole:
                await fetch(port, message, timeout_s=after_s)
            else:
                await fetch(port, message, bytes_max=after_bytes)
        return mark

    await side_by_side(n, DISCONNECTS_WIDTH, one)
    await asyncio.sleep(3)  # the grace for those who may come back, and the calls that are about to begin
    left = await ground.holds_left()
    records = [record for record in await ground.suite.provider.records() if record.state != "refused"]
    rows = {
        row["provider_request_id"]: row
        for row in await ground.suite.rows("SELECT * FROM attempts WHERE provider_request_id = ANY($1)", [r.request_id for r in records])
    }
    nameless = (await ground.suite.rows(NAMELESS, began))[0]["n"]
    missing = [record for record in records if record.request_id not in rows]
    inexact, exact, far = 0, 0, list[str]()
    for record in records:
        if row := rows.get(record.request_id):
            off = abs(row["output_tokens"] - record.output_tokens)
            exact += off == 0
            inexact += not row["estimated"] and (off > 0 or row["input_tokens"] != record.input_tokens)
            if row["estimated"] and off > INEXACT_SHARE * record.output_tokens:
                far.append(f"{row['output_tokens']} of {record.output_tokens}")
    calls = len(records)
    return Outcome(
        "disconnect at a random byte",
        n,
        ground.seed,
        [
            # A call that was left before the provider's first byte has no name yet, but a row.
            Bar("provider calls not booked", max(0, len(missing) - nameless), 0),
            Bar("exact figures that are not", inexact, 0),
            Bar("estimates off by more than 2 %", len(far), 0),
            Bar("holds left open", left, 0),
        ],
        {
            "provider calls": calls,
            "exact": exact,
            "closed by us": sum(record.state == "client_closed" for record in records),
            "far": far[:10],
            "estimated": sum(bool(row["estimated"]) for row in rows.values()),
            "operations": await _count(ground, "operations") - known,
        },
    )


async def kills(ground: Ground, n: int) -> Outcome:
    """Gateways and orchestrators are killed `n` times each in turn while twenty streams are open; readers come back by themselves."""
    await ground.begin()
    chance = ground.random("kill")
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=150, tokens_per_s=100))
    kinds = [[name for name in ground.suite.own if name.startswith(kind)] for kind in ("gateway", "orchestrator")]
    reads: list[Read] = []
    for turn in range(2 * n):
        victims = kinds[turn % 2]
        victim, moment = victims[(turn // 2) % len(victims)], chance.uniform(0.1, 1.2)

        async def one(number: int, turn: int = turn) -> Read:
            mark, body = ground.question()
            return await read_answer(ground.turned(number), ground.token(), body, key=f"{mark}-{turn}")

        streams = asyncio.create_task(side_by_side(STREAMS_AT_A_KILL, STREAMS_AT_A_KILL, one))
        try:
            await asyncio.sleep(moment)
            await ground.suite.kill(victim)
            await ground.suite.start(victim)
            reads += await streams
        finally:
            streams.cancel()
        await ground.suite.until_all_ready()
    done = [read.answer_id for read in reads if read.end == "done"]
    numbering = [read.gaps_and_repeats() for read in reads]
    return Outcome(
        "kill -9",
        n,
        ground.seed,
        [
            Bar("readers without a typed end", untyped(reads), 0),
            Bar("answers lost after done", await ground.unbooked(done), 0),
            Bar("holds left open", await ground.holds_left(), 0),
            Bar("gaps and repeats", sum(gaps + repeats for gaps, repeats in numbering), 0),
        ],
        {"streams": len(reads), "ends": _ends(reads)},
    )


async def single_flight(ground: Ground, n: int) -> Outcome:
    """Forty ask the same at once: `n` times undisturbed, `n` times the first one leaves, `n` times a replica is killed meanwhile."""
    await ground.begin()
    chance = ground.random("flight")
    await ground.suite.provider.behave(Behaviour(ttft_ms=300, tokens=60, tokens_per_s=60))
    orchestrators = [name for name in ground.suite.own if name.startswith("orchestrator")]
    calls: dict[str, list[int]] = {"undisturbed": [], "first leaves": [], "killed": []}
    all_reads: list[Read] = []
    texts_beside = without = 0
    for turn, kind in enumerate([kind for _ in range(n) for kind in calls]):
        mark, body = ground.question()
        del body["cache"]
        known: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def look(reply: Reply, known: "asyncio.Future[str]" = known) -> None:
            if not known.done() and reply.blocks[0].name == "accepted":
                known.set_result(reply.blocks[0].data["answer_id"])

        async def asked(number: int, body: dict[str, Any] = body, mark: str = mark, look: Any = look) -> Read:
            return await read_answer(
                ground.turned(number), ground.token(), body, key=f"{mark}-{number}", on_blocks=None if number else look
            )

        first = asyncio.create_task(asked(0))
        others = None
        try:
            async with asyncio.timeout(30):
                answer_id = await known
            others = asyncio.gather(*(asked(number) for number in range(1, SAME_AT_ONCE)))
            await asyncio.sleep(chance.uniform(0.4, 1.2))
            if kind == "first leaves":
                assert (await fetch(ground.turned(turn)[0], ground.cancel(answer_id))).status == 202
            elif kind == "killed":
                victim = orchestrators[chance.randrange(len(orchestrators))]
                await ground.suite.kill(victim)
                await ground.suite.start(victim)
            reads = [await first, *await others]
        finally:
            first.cancel()
            if others is not None:
                others.cancel()
        await ground.suite.until_all_ready()
        calls[kind].append(sum(record.mark == mark for record in await ground.suite.provider.records()))
        told = [read for read in reads if read.end == "done"]
        texts_beside += max(0, len({read.text for read in told}) - (2 if kind == "killed" else 1))
        without += len(reads) - len(told) - (kind == "first leaves") if kind != "killed" else 0
        all_reads += reads
    done = [read.answer_id for read in all_reads if read.end == "done"]
    return Outcome(
        "single flight",
        n,
        ground.seed,
        [
            Bar("most provider calls of the same question", max(calls["undisturbed"] + calls["first leaves"]), 1),
            Bar("most provider calls when a replica was killed", max(calls["killed"]), 2),
            Bar("readers without the whole answer, of those not killed", without, 0),
            Bar("texts beside the one that was made", texts_beside, 0),
            Bar("ends without a type", untyped(all_reads), 0),
            Bar("answers not booked", await ground.unbooked(done), 0),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {"questions": len(all_reads), "calls": calls, "ends": _ends(all_reads)},
    )


async def rolling_restarts(ground: Ground, n: int, names: Sequence[str] = ()) -> Outcome:
    """Every replica of every service, or those named, is stopped by SIGTERM and started again, `n` times, while eight users keep asking."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=60, tokens_per_s=100))
    reads: list[Read] = []
    codes: collections.Counter[int] = collections.Counter()
    blamed: collections.Counter[str] = collections.Counter()
    stopping = ""
    ending = asyncio.Event()

    async def user(number: int) -> None:
        while not ending.is_set():
            mark, body = ground.question()
            during = stopping
            reads.append(await read_answer(ground.turned(number), ground.token(), body, key=mark))
            if reads[-1].answer_id and reads[-1].end != "done":
                blamed[f"{during} or {stopping}"] += 1
            if not reads[-1].answer_id:
                await asyncio.sleep(0.05)  # it was refused; the load stays a load and no flood

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(user(number))
        try:
            for _ in range(n):
                for name in names or ground.suite.own:
                    stopping = name
                    codes[await ground.suite.stop(name)] += 1
                    await ground.suite.start(name)
                    await ground.suite.until_all_ready()
                    await asyncio.sleep(0.3)
        finally:
            ending.set()
    accepted = [read for read in reads if read.answer_id]
    failed = [read for read in accepted if read.end != "done"]
    return Outcome(
        "rolling restart",
        n,
        ground.seed,
        [
            Bar("accepted requests that failed", len(failed), 0),
            Bar("lost operations", await ground.unbooked(read.answer_id for read in accepted), 0),
            Bar("holds left open", await ground.holds_left(), 0),
            Bar("processes that ended badly", sum(count for code, count in codes.items() if code), 0),
        ],
        {"accepted": len(accepted), "ends": _ends(reads), "exit codes": dict(codes), "failed while stopping": dict(blamed)},
    )


async def slow_readers(ground: Ground, n: int, tokens: int = NORMAL_TOKENS) -> Outcome:
    """`n` readers take one byte a second beside half as many normal ones, which must not notice; those read `tokens` each.

    What they read was made by then: its making is work that has nothing to do with how slowly it is read.
    """
    await ground.begin()
    provider = ground.suite.provider
    await provider.behave(Behaviour(ttft_ms=20, tokens=tokens, tokens_per_s=NORMAL_PACE))
    await provider.behave(Behaviour(ttft_ms=20, tokens=SLUGGISH_TOKENS), contains="sluggish")
    normal = max(1, n // 2)

    async def gaps() -> list[float]:
        async def one(number: int) -> list[float]:
            await asyncio.sleep(number / BEGUN_PER_S)
            mark, body = ground.question()
            read = await read_answer(ground.turned(number), ground.token(), body, key=mark)
            assert read.end == "done", read.blocks[-1:]
            at = [block.at for block in read.blocks if block.name == "delta"]
            return [(later - earlier) * 1000 for earlier, later in itertools.pairwise(at)]

        return [gap for found in await side_by_side(normal, normal, one) for gap in found]

    await gaps()  # warm
    alone = p99(await gaps())
    before = _resident(ground)
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _resident(ground) - before)
            await asyncio.sleep(0.5)

    async def sluggish(number: int) -> None:
        await asyncio.sleep(number / BEGUN_PER_S)
        _, body = ground.question(words="Tell the sluggish story of")
        await _one_byte_a_second(ground.turned(number)[0], request("POST", "/v1/answers", ground.token(), body))

    tasks = [asyncio.create_task(sluggish(number)) for number in range(n)] + [asyncio.create_task(watch())]
    try:
        await asyncio.sleep(n / BEGUN_PER_S + 2)  # all of them have begun
        unmade = await ground.holds_left(SLUGGISH_MADE_S)
        beside = p99(await gaps())
        still = sum(not task.done() for task in tasks) - 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Outcome(
        "slow readers",
        n,
        ground.seed,
        [
            Bar("memory of gateways and orchestrators grew by", round(peak / 2**20, 1), 64, "MB"),
            Bar("inter-token p99 beside them", round(beside, 1), round(1.2 * alone, 1), "ms"),
            Bar("slow readers that were served", still, n, at_least=True),
            Bar("answers that were not made though nobody waited", unmade, 0),
        ],
        {"normal streams": normal, "p99 alone": round(alone, 1)},
    )


async def cancel_storm(ground: Ground, n: int) -> Outcome:
    """Half of `n` requests of four tenants are dropped at a random moment; nobody may ever see another one's mark."""
    await ground.begin()
    chance = ground.random("storm")
    await ground.suite.provider.behave(Behaviour(ttft_ms=5, tokens=24, tokens_per_s=200, echoes_mark=True))
    drops = [chance.uniform(0, 0.3) if chance.random() < 0.5 else None for _ in range(n)]
    foreign = whole = marked = turned_away = 0

    async def one(number: int) -> None:
        nonlocal whole, marked, turned_away
        tenant = TENANTS[number % len(TENANTS)]
        mark, body = ground.question(tenant)
        message = request("POST", "/v1/answers", ground.token(tenant), body)

        def look(reply: Reply) -> None:
            nonlocal foreign
            foreign += any(word.startswith("mark-") and word != mark for word in _words(reply))

        task = asyncio.create_task(fetch(ground.turned(number)[0], message, on_blocks=look))
        if (after := drops[number]) is not None:
            await asyncio.wait([task], timeout=after)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return
        reply = await task
        while reply.status == 503:  # too much at once is said, and heals
            turned_away += 1
            await asyncio.sleep(TURNED_AWAY_PAUSE_S)
            reply = await fetch(ground.turned(number)[0], message, on_blocks=look)
        whole += bool(reply.blocks) and reply.blocks[-1].name == "done"
        marked += mark in _words(reply)

    await side_by_side(n, 32, one)
    kept = drops.count(None)
    left = await ground.holds_left()
    idle = (await ground.suite.rows("SELECT count(*) AS n FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"))[0]["n"]
    again = await side_by_side(64, 64, lambda number: _plain(ground, number))
    return Outcome(
        "cancel storm",
        n,
        ground.seed,
        [
            Bar("foreign marks", foreign, 0),
            Bar("undisturbed answers that were not done", kept - whole, 0),
            Bar("undisturbed answers without their own mark", kept - marked, 0),
            Bar("connections idle in transaction", idle, 0),
            Bar("holds left open", left, 0),
            Bar("64 at once afterwards that were not done", sum(read.end != "done" for read in again), 0),
        ],
        {"dropped": n - kept, "whole": whole, "turned away once": turned_away},
    )


async def overload(ground: Ground, n: int) -> Outcome:
    """Five times as many requests a second as can be answered, for `n` seconds: most of the peak must still be delivered."""
    await ground.begin()
    chance = ground.random("overload")
    await ground.suite.provider.behave(Behaviour(ttft_ms=50, tokens=20))
    peak = 0.0
    for width in (8, 32):
        peak = max(peak, await _rate(ground, width, n))
    good = refused = broken = 0
    shed: list[float] = []
    reasons: collections.Counter[str] = collections.Counter()
    ends_at = 0.0

    async def one(number: int) -> None:
        nonlocal good, refused, broken
        _, body = ground.question()
        began = time.monotonic()
        try:
            reply = await fetch(ground.turned(number)[0], request("POST", "/v1/answers", ground.token(), body), timeout_s=30)
        except (OSError, TimeoutError):
            broken += 1
            return
        took = time.monotonic() - began
        if reply.status in (429, 503):
            refused += 1
            shed.append(took * 1000)
            reasons[reply.reason] += 1
        elif reply.blocks and reply.blocks[-1].name == "done":
            good += time.monotonic() <= ends_at
        else:
            reasons[str(reply.blocks[-1].data.get("reason")) if reply.blocks else "nothing"] += 1
            broken += 1

    wanted = round(peak * OVERLOAD_FACTOR * n)
    began = time.monotonic()
    ends_at = began + n
    tasks: set[asyncio.Task[None]] = set()
    arrival = began
    for number in range(wanted):
        arrival += chance.expovariate(peak * OVERLOAD_FACTOR)
        await asyncio.sleep(max(0.0, arrival - time.monotonic()))
        tasks.add(task := asyncio.create_task(one(number)))
        task.add_done_callback(tasks.discard)
    sent_in = time.monotonic() - began
    await asyncio.gather(*tasks)
    goodput = good / n
    return Outcome(
        "overload",
        n,
        ground.seed,
        [
            Bar("goodput, share of the peak", round(100 * goodput / peak, 1), 80, "%", at_least=True),
            Bar("refused answers, p99", round(p99(shed), 1), 50, "ms"),
            Bar("neither answered nor refused", broken, 0),
        ],
        {
            "peak": f"{peak:.1f}/s",
            "offered": f"{wanted / sent_in:.1f}/s",
            "goodput": f"{goodput:.1f}/s",
            "refused": refused,
            "reasons": dict(reasons),
        },
    )


async def limits(ground: Ground, n: int, seconds: float = 2 * LIMIT_WINDOW_S + LIMIT_SETTLES_S) -> Outcome:
    """`n` tasks of one user share a limit of 100 requests in any minute, at every gateway at once; 0 `seconds` = each asks once."""
    await ground.begin()
    chance = ground.random("limits")
    user = f"limited-{ground.seed}"
    async with ground.suite.client("admin", TENANTS[0], ("user", "admin")) as admin:
        plan = {**PLAN, "requests_per_minute": LIMIT}
        (await admin.put("/v1/admin/plans/hundred", json=plan)).raise_for_status()
        (await admin.put(f"/v1/admin/subscriptions/{user}", json={"plan": "hundred"})).raise_for_status()
    message = request("POST", "/v1/search", ground.suite.token(user, TENANTS[0], lifetime_s=86_400), {"query": "the river"})
    admitted: list[tuple[float, float]] = []
    statuses: collections.Counter[int] = collections.Counter()
    ends_at = time.monotonic() + seconds

    async def one(number: int) -> None:
        while True:
            sent = time.monotonic()
            reply = await fetch(ground.turned(number)[0], message)
            statuses[reply.status] += 1
            if reply.status == 200:
                admitted.append((sent, time.monotonic()))
            await asyncio.sleep(min(chance.expovariate(1 / LIMIT_PAUSE_S), max(0.0, ends_at - time.monotonic())))
            if time.monotonic() >= ends_at:
                return

    await side_by_side(n, n, one)
    by_reply = sorted(replied for _, replied in admitted)
    by_sending = sorted(sent for sent, _ in admitted)
    # The first of a hundred and one was let in after it was sent, and the last before it was answered.
    over = sum(later - earlier < LIMIT_WINDOW_S for earlier, later in zip(by_sending, by_reply[LIMIT:], strict=False))
    allowed = LIMIT * (1 + int((seconds - LIMIT_SETTLES_S) // LIMIT_WINDOW_S if seconds else 0))
    return Outcome(
        "limits",
        n,
        ground.seed,
        [
            Bar("windows of a minute with more than the limit", over, 0),
            Bar("used of what was allowed", round(100 * len(admitted) / allowed, 1), 99, "%", at_least=True),
            Bar("neither admitted nor 429", statuses.total() - statuses[200] - statuses[429], 0),
        ],
        {"statuses": dict(statuses), "allowed": allowed},
    )


SCENARIOS: dict[str, tuple[Callable[[Ground, int], Any], int]] = {
    "cut": (cut_and_resume, 2_000),
    "cancel": (cancels, 500),
    "disconnect": (disconnects, 500),
    "kill": (kills, 50),
    "flight": (single_flight, 20),
    "rolling": (rolling_restarts, 5),
    "slow": (slow_readers, 200),
    "storm": (cancel_storm, 5_000),
    "overload": (overload, 20),
    "limits": (limits, 200),
}
"""By the name they are asked for, with the full n."""


def _words(reply: Reply) -> list[str]:
    return "".join(block.data["text"] for block in reply.blocks if block.name == "delta").split()


def _events(ground: Ground, answer_id: str) -> bytes:
    return request("GET", f"/v1/answers/{answer_id}/events?after=0", ground.token())


def _ends(reads: list[Read]) -> dict[str, int]:
    """How they ended: terminal event and reason."""
    return dict(collections.Counter(f"{read.end or 'refused'} {read.reason}".strip() for read in reads))


async def _count(ground: Ground, table: str) -> int:
    return int((await ground.suite.rows(f"SELECT count(*) AS n FROM {table}"))[0]["n"])


async def _plain(ground: Ground, number: int) -> Read:
    mark, body = ground.question()
    return await read_answer(ground.turned(number), ground.token(), body, key=mark)


async def _rate(ground: Ground, width: int, seconds: float) -> float:
    """Answers a second when `width` users ask one after the other."""
    until = time.monotonic() + seconds
    done = 0

    async def user(number: int) -> None:
        nonlocal done
        while time.monotonic() < until:
            _, body = ground.question()
            reply = await fetch(ground.turned(number)[0], request("POST", "/v1/answers", ground.token(), body))
            done += bool(reply.blocks) and reply.blocks[-1].name == "done"

    await asyncio.gather(*(user(number) for number in range(width)))
    return done / seconds


def _resident(ground: Ground) -> int:
    """Read so that it costs next to nothing: what is proportional in memory takes the kernel tens of milliseconds to say."""
    processes = ground.suite.processes.items()
    return sum(psutil.Process(process.pid).memory_info().rss for name, process in processes if name.startswith(("gateway", "orchestrator")))


async def _one_byte_a_second(port: int, message: bytes) -> None:
    """Ask and read as slowly as a hostile client can, with next to no buffer of its own. Until cancelled or let go."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, message)
        with contextlib.suppress(ConnectionError):
            while True:
                if not await loop.sock_recv(sock, 1):
                    return
                await asyncio.sleep(1)
