"""Recording operations and seeing them again: once each, priced here, in one piece."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from services.chassis.errors import NotAllowed, NotFound, RequestInvalid, Unavailable
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger.histograms import ERROR_MAX
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import HAIKU, RECORDER, Ledger, attempt, audit, operation, until

COST = 100 * 1000 + 10 * 5000


async def budget_of_ann(ledger: Ledger, boss: Principal) -> tuple[int, int]:
    request = pb.PutBudgetRequest(scope="user", subject="ann", period="month", limit_nanousd=10**9)
    budget = (await ledger.ask("PutBudget", request, boss)).budget
    return budget.spent_nanousd, budget.held_nanousd


async def test_a_record_settles_its_hold_and_shows_every_figure(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """One record books operation, attempts, steps and money; cost and usage of the whole are summed here, not believed."""
    held = await ledger.reserve(ann)
    told = operation(ann, cost_nanousd=999, usage=common_pb2.Usage(input_tokens=999), attempts=[attempt(hold_id=held.hold_id)])
    connection = await asyncpg.connect(ledger.url)
    try:
        told.operation_id = str(await connection.fetchval("SELECT operation_id FROM holds WHERE hold_id = $1", uuid.UUID(held.hold_id)))
    finally:
        await connection.close()
    acks = await ledger.record(told)
    kept = (await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=told.operation_id), ann)).operation

    assert [(ack.record_id, ack.duplicate, ack.cost_nanousd, ack.rejected_reason) for ack in acks] == [(1, False, COST, "")]
    assert await budget_of_ann(ledger, boss) == (COST, 0)
    assert (kept.cost_nanousd, kept.usage.input_tokens, kept.usage.output_tokens) == (COST, 100, 10)
    assert [(a.cost_nanousd, a.price_version, a.hold_id) for a in kept.attempts] == [(COST, 1, held.hold_id)]
    told.cost_nanousd, told.attempts[0].cost_nanousd, told.attempts[0].price_version = COST, COST, 1
    told.usage.CopyFrom(common_pb2.Usage(input_tokens=100, output_tokens=10))
    told.created_at.FromMicroseconds(told.created_at.ToMicroseconds())  # PostgreSQL keeps microseconds
    assert kept == told


async def test_a_record_sent_often_is_booked_once(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Twenty senders of the same twenty records, in any order: one row each, one booking each, every ack with the cost."""
    records = [operation(ann, attempts=[attempt()]) for _ in range(20)]
    streams = await asyncio.gather(*(ledger.record(*(records if number % 2 else reversed(records))) for number in range(20)))
    listed = await ledger.rows("ListOperations", pb.ListOperationsRequest(page_size=1000), ann)

    assert {ack.cost_nanousd for acks in streams for ack in acks} == {COST}
    assert {ack.rejected_reason for acks in streams for ack in acks} == {""}
    assert sum(not ack.duplicate for acks in streams for ack in acks) == 20
    assert len(listed) == 20
    assert await budget_of_ann(ledger, boss) == (20 * COST, 0)


async def test_attempts_without_a_hold_are_booked_late_at_the_price_of_their_day(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """No call goes unbooked: a dated model costs what its family does, at the price that was in force then."""
    october, september = datetime(2026, 10, 8, tzinfo=UTC), datetime(2026, 9, 8, tzinfo=UTC)
    usage = common_pb2.Usage(cache_read_tokens=1_000_000)
    costs = []
    for day in (september, october):
        late = attempt(model="claude-sonnet-5-5-20260901", usage=usage)
        [ack] = await ledger.record(operation(ann, created_at=timestamp(day), attempts=[late]))
        costs.append(ack.cost_nanousd)

    assert costs == [200_000_000, 100_000_000]


async def test_a_hold_that_is_made_while_its_call_is_told_of_late_is_the_one_that_is_settled(
    ledger: Ledger, ann: Principal, boss: Principal
) -> None:
    """The record waits for whom it met, looks again, and books the other calls of its answer all the same."""
    told = operation(ann, attempts=[attempt(1), attempt(2)])
    connection = await asyncpg.connect(ledger.url)
    try:
        async with connection.transaction():
            hold_id = await hold_made(connection, ann, told.operation_id)
            recording = asyncio.create_task(ledger.record(told))
            await until_waiting(ledger.url)
        (ack,) = await recording
        holds = await connection.fetch(
            "SELECT hold_id, attempt, state FROM holds WHERE operation_id = $1 ORDER BY attempt", told.operation_id
        )
    finally:
        await connection.close()

    assert (ack.rejected_reason, ack.duplicate, ack.cost_nanousd) == ("", False, 2 * COST)
    assert [(hold["attempt"], hold["state"]) for hold in holds] == [(1, "settled"), (2, "settled")]
    assert holds[0]["hold_id"] == hold_id
    assert await audit(ledger.url) == {}


async def test_a_late_call_of_anothers_operation_is_refused(ledger: Ledger, ann: Principal, bob: Principal) -> None:
    """For good, and what was told with it is booked."""
    told, other = operation(ann, attempts=[attempt(1)]), operation(ann, attempts=[attempt(1)])
    connection = await asyncpg.connect(ledger.url)
    try:
        await hold_made(connection, bob, told.operation_id)
    finally:
        await connection.close()
    acks = await ledger.record(told, other)

    assert [ack.rejected_reason for ack in acks] == ["IDEMPOTENCY_CONFLICT", ""]
    assert await audit(ledger.url) == {}


async def hold_made(connection: Any, principal: Principal, operation_id: str) -> UUID:
    """Money set aside for an operation's first attempt, in whatever transaction the connection is in."""
    price_id = await connection.fetchval("SELECT price_id FROM prices WHERE (provider, model) = ($1, $2)", *HAIKU)
    reserve = "SELECT hold_id FROM reserve_hold($1, $2, '', $3, 1, $4, $5, $6, 0, 0, 1, 1, 1, '1 hour', NULL)"
    made = await connection.fetchval(reserve, principal.tenant, principal.user, UUID(operation_id), *HAIKU, price_id)
    assert isinstance(made, UUID)
    await connection.execute("SELECT leave_tenant()")
    return made


async def until_waiting(url: str) -> None:
    """Until somebody waits for a lock."""
    connection = await asyncpg.connect(url)
    try:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        await until(lambda: connection.fetchval(waiting))
    finally:
        await connection.close()


async def test_every_attempt_is_booked_and_only_an_unsent_one_is_free(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A failed call that used tokens is paid like the one that followed it; one that was never sent gives its hold back."""
    operation_id = str(uuid.uuid4())
    for number in (1, 2, 3):
        await ledger.reserve(ann, operation_id, attempt=number)
    failed = attempt(1, output_tokens=4, error_reason="MODEL_FAILED", finish_reason="", estimated=True)
    unsent = attempt(2, 0, 0, not_sent=True, error_reason="MODEL_OVERLOADED")
    [ack] = await ledger.record(operation(ann, operation_id, attempts=[failed, unsent, attempt(3)]))
    kept = (await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=operation_id), ann)).operation

    assert ack.cost_nanousd == 100 * 1000 + 4 * 5000 + COST
    assert [(a.cost_nanousd, a.not_sent, bool(a.hold_id)) for a in kept.attempts] == [
        (120_000, False, True),
        (0, True, True),
        (COST, False, True),
    ]
    assert kept.estimated
    assert await budget_of_ann(ledger, boss) == (120_000 + COST, 0)


async def test_a_record_that_can_never_be_booked_does_not_stop_the_others(ledger: Ledger, ann: Principal, bob: Principal) -> None:
    """Each poison record is answered with its reason, leaves nothing behind, and the stream goes on, in order."""
    settled = operation(ann, attempts=[attempt()])
    conflicting = operation(ann, settled.operation_id, attempts=[attempt(output_tokens=11)])
    more = operation(ann, settled.operation_id, attempts=[attempt(), attempt(2)])
    poison = {
        "PRICE_UNKNOWN": operation(ann, attempts=[attempt(), attempt(2, model="nobody")]),
        "HOLD_ALREADY_SETTLED": conflicting,
        "IDEMPOTENCY_CONFLICT": operation(bob, settled.operation_id),
        "REQUEST_INVALID": operation(ann, status="running"),
    }
    records = [settled, *poison.values(), more, operation(ann, attempts=[attempt(1, 1, 0, not_sent=True)]), operation(ann)]
    await ledger.record(settled)
    acks = await ledger.record(*records)
    listed = await ledger.rows("ListOperations", pb.ListOperationsRequest(), ann)

    assert [ack.record_id for ack in acks] == list(range(1, len(records) + 1))
    assert [ack.rejected_reason for ack in acks] == ["", *poison, "IDEMPOTENCY_CONFLICT", "REQUEST_INVALID", ""]
    assert len(listed) == 2


@pytest.mark.parametrize("code", ["53100", "53200", "53400", "57014", "58030", "XX000", "XX001", "XX002", "25006"])
async def test_trouble_of_the_store_is_no_fault_of_a_record(ledger: Ledger, ann: Principal, code: str) -> None:
    """A full disk, a file that cannot be read, a damaged page, a server that became a standby: the records are neither booked nor refused,
    and booked once it is over. A server raises the very error where rows are written."""
    records = [operation(ann, attempts=[attempt()]) for _ in range(3)]
    connection = await asyncpg.connect(ledger.url)
    try:
        await connection.execute(
            "CREATE FUNCTION in_trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF NEW.tenant = '{ann.tenant}' THEN RAISE EXCEPTION 'in row 4711' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER a_trouble BEFORE INSERT ON steps FOR EACH ROW EXECUTE FUNCTION in_trouble()"
        )
        try:
            for _ in range(2):
                with pytest.raises(Unavailable) as refused:
                    await ledger.record(*records)
                assert "4711" not in refused.value.detail  # what a server says may hold rows
        finally:
            await connection.execute("DROP TRIGGER a_trouble ON steps; DROP FUNCTION in_trouble()")
    finally:
        await connection.close()
    acks = await ledger.record(*records)

    assert [(ack.rejected_reason, ack.duplicate, ack.cost_nanousd) for ack in acks] == [("", False, COST)] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"operation_id": "7"},
        {"tenant": ""},
        {"user": "u" * 257},
        {"trace_id": "xyz"},
        {"duration_ms": float("nan")},
        {"first_token_ms": float("inf")},
        {"duration_ms": -1.0},
        {"session_id": "a\x00b"},
        {"created_at": timestamp(datetime(2126, 1, 1, tzinfo=UTC))},
        {"cache": common_pb2.CacheReceipt(verdict="perhaps")},
        {"cache": common_pb2.CacheReceipt(verdict="semantic", similarity=float("nan"))},
        {"cache": common_pb2.CacheReceipt(verdict="exact", saved_nanousd=-1)},
        {"steps": [common_pb2.StepTiming(name="recall", status="running")]},
        {"steps": [common_pb2.StepTiming(name="recall", status="done", facts={str(n): "" for n in range(17)})]},
        {"attempts": [attempt(), attempt()]},
        {"attempts": [attempt(hold_id=str(uuid.uuid4()))]},
        {"attempts": [attempt(0)]},
        {"attempts": [attempt(-5)]},
        {"attempts": [attempt(input_tokens=-5)]},
        {"attempts": [attempt(input_tokens=2**62)]},
    ],
    ids=lambda changes: f"{next(iter(changes))}-{str(next(iter(changes.values())))[:24]!r}",
)
async def test_a_malformed_record_is_rejected_by_name(ledger: Ledger, ann: Principal, changes: dict[str, object]) -> None:
    """Nonsense is never stored and never an internal error."""
    record = operation(ann, **changes)
    [ack] = await ledger.record(record)

    assert ack.rejected_reason == "REQUEST_INVALID"
    assert ack.rejected_detail


async def test_only_services_may_record(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Tenant and user of a record are the recorder's word, so not everybody may be one."""
    for caller in (ann, boss):
        with pytest.raises(NotAllowed):
            await ledger.record(operation(ann), principal=caller)


async def test_a_user_sees_their_own_operations_an_admin_the_tenants_a_stranger_none(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal, stranger: Principal
) -> None:
    """Foreign and unknown are the same not-found, and no list ever crosses."""
    mine, his = operation(ann), operation(bob, session_id="s2")
    await ledger.record(mine, his)
    seen = {}
    for name, caller in (("ann", ann), ("bob", bob), ("boss", boss), ("stranger", stranger)):
        rows = await ledger.rows("ListOperations", pb.ListOperationsRequest(), caller)
        seen[name] = {row.operation.operation_id for row in rows}
        for record in (mine, his):
            request = pb.GetOperationRequest(operation_id=record.operation_id)
            if record.operation_id in seen[name]:
                assert (await ledger.ask("GetOperation", request, caller)).operation.operation_id == record.operation_id
            else:
                with pytest.raises(NotFound) as refused:
                    await ledger.ask("GetOperation", request, caller)
                assert refused.value.metadata == {"kind": "operation"}

    assert seen == {
        "ann": {mine.operation_id},
        "bob": {his.operation_id},
        "boss": {mine.operation_id, his.operation_id},
        "stranger": set(),
    }
    of_bob = await ledger.rows("ListOperations", pb.ListOperationsRequest(user="bob"), boss)
    of_session = await ledger.rows("ListOperations", pb.ListOperationsRequest(session_id="s2"), boss)
    assert [row.operation.operation_id for row in (*of_bob, *of_session)] == [his.operation_id] * 2
    assert await ledger.rows("ListOperations", pb.ListOperationsRequest(user="bob"), ann) == []


async def test_pages_lead_through_the_whole_list_newest_first(ledger: Ledger, ann: Principal) -> None:
    """Following the tokens shows every row once, in order, also when many share a moment; a foreign token is refused."""
    moment = datetime.now(UTC)
    await ledger.record(*(operation(ann, created_at=timestamp(moment - timedelta(seconds=n // 3))) for n in range(11)))
    seen, token = [], ""
    while True:
        rows = await ledger.rows("ListOperations", pb.ListOperationsRequest(page_size=4, page_token=token), ann)
        seen += [row.operation for row in rows]
        assert all(not row.next_page_token for row in rows[:-1])
        if not (token := rows[-1].next_page_token):
            break

    assert len({row.operation_id for row in seen}) == len(seen) == 11
    assert [row.created_at.ToMicroseconds() for row in seen] == sorted((row.created_at.ToMicroseconds() for row in seen), reverse=True)
    for wrong in ("?", "W10", "WyJ4IiwieSJd", "x" * 2000):
        with pytest.raises(RequestInvalid) as refused:
            await ledger.rows("ListOperations", pb.ListOperationsRequest(page_token=wrong), ann)
        assert refused.value.field == "page_token"
    with pytest.raises(RequestInvalid):
        await ledger.rows("ListOperations", pb.ListOperationsRequest(page_size=1001), ann)


async def test_a_watcher_sees_what_is_recorded_and_nothing_foreign(
    ledger: Ledger, ann: Principal, bob: Principal, boss: Principal, stranger: Principal
) -> None:
    """Each operation reaches every watcher that may see it, once, in the order of recording."""
    mine, his, theirs = operation(ann, attempts=[attempt()]), operation(bob), operation(stranger)
    expected = {ann: [mine], bob: [his], boss: [mine, his], stranger: [theirs]}
    on = asyncio.Barrier(len(expected) + 1)

    async def watch(caller: Principal, count: int) -> list[str]:
        async with ledger.caller.stream(ledger.stub.WatchOperations, pb.WatchOperationsRequest(), timeout_s=20, principal=caller) as feed:
            assert not (await anext(feed)).HasField("operation")
            await on.wait()
            return [(await anext(feed)).operation.operation_id for _ in range(count)]

    watching = [asyncio.create_task(watch(caller, len(records))) for caller, records in expected.items()]
    await on.wait()
    for record in (mine, mine, his, theirs):
        await ledger.record(record)

    assert await asyncio.gather(*watching) == [[record.operation_id for record in records] for records in expected.values()]


async def test_who_sees_only_themselves_asks_by_hour_as_of_one_user(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """No sums are kept by hour of a user: the range is the shorter one, and the refusal says why. An administrator's is not."""
    year = pb.QueryUsageRequest(group_by=["hour"], **{"from": timestamp(datetime.now(UTC) - timedelta(days=300))})
    with pytest.raises(RequestInvalid) as refused:
        await ledger.rows("QueryUsage", year, ann)

    assert refused.value.metadata["bound"] == "31 days by session, step or purpose, or by hour of a user or key"
    assert await ledger.rows("QueryUsage", year, boss) == []


async def test_usage_adds_up_however_it_is_grouped(ledger: Ledger, ann: Principal, bob: Principal, boss: Principal) -> None:
    """Every grouping tells the same totals; times are percentiles; a hit counts as a hit and saves."""
    hit = common_pb2.CacheReceipt(verdict="semantic", similarity=0.97, source_answer_id=str(uuid.uuid4()), age_s=5, saved_nanousd=COST)
    skipped = common_pb2.StepTiming(name="generate", status="skipped", started_ms=10)
    recall = common_pb2.StepTiming(name="recall", status="done", duration_ms=4)
    await ledger.record(
        *(operation(ann, attempts=[attempt()], duration_ms=float(n)) for n in range(1, 10)),
        operation(ann, cache=hit, duration_ms=10.0, first_token_ms=0.0, steps=[recall, skipped]),
        operation(bob, status="failed", finish_reason="", error_reason="MODEL_FAILED", attempts=[attempt(output_tokens=0)]),
    )
    [total] = await ledger.rows("QueryUsage", pb.QueryUsageRequest(), ann)

    assert (total.operations, total.failed, total.cache_hits) == (10, 0, 1)
    assert (total.usage.input_tokens, total.usage.output_tokens) == (900, 90)
    assert (total.cost_nanousd, total.saved_nanousd) == (9 * COST, COST)
    assert total.attempts == 9
    assert total.duration_ms_p50 == pytest.approx(5.0, rel=ERROR_MAX)
    assert total.duration_ms_p90 == pytest.approx(9.0, rel=ERROR_MAX)
    assert total.first_token_ms_p50 == pytest.approx(20.0, rel=ERROR_MAX)
    for group_by in (
        ["day"],
        ["hour", "model"],
        ["user"],
        ["tenant", "key"],
        ["hour", "user"],
        ["session", "tier"],
        ["cache"],
        ["step"],
        ["step", "day", "user", "cache"],
    ):
        rows = await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=group_by), boss)
        assert sum(row.cost_nanousd for row in rows) == 9 * COST + 100_000, group_by
        assert sum(row.saved_nanousd for row in rows) == COST, group_by
        assert sum(row.usage.input_tokens for row in rows) == 1000, group_by
        assert all(set(row.group) == set(group_by) for row in rows)
    by_step = {row.group["step"]: row for row in await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=["step"]), ann)}
    assert by_step["recall"].duration_ms_p99 == pytest.approx(10.0, rel=ERROR_MAX)
    assert (by_step["generate"].operations, by_step["generate"].cost_nanousd, by_step["recall"].saved_nanousd) == (9, 9 * COST, COST)


async def test_a_usage_query_out_of_bounds_is_refused(ledger: Ledger, ann: Principal) -> None:
    """Unknown columns, too many of them, and endless ranges are typed problems."""
    early, late = timestamp(datetime(2024, 1, 1, tzinfo=UTC)), timestamp(datetime(2026, 1, 1, tzinfo=UTC))
    for request, field in (
        (pb.QueryUsageRequest(group_by=["colour"]), "group_by"),
        (pb.QueryUsageRequest(group_by=["day", "hour", "user", "model", "tier"]), "group_by"),
        (pb.QueryUsageRequest(**{"from": early, "to": late}), "from"),
        (pb.QueryUsageRequest(**{"from": late, "to": early}), "from"),
        (pb.QueryUsageRequest(group_by=["step"], **{"from": timestamp(datetime(2025, 11, 30, tzinfo=UTC)), "to": late}), "from"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            await ledger.rows("QueryUsage", request, ann)
        assert refused.value.field == field


async def test_a_recorder_that_vanishes_leaves_whole_records_or_none(ledger: Ledger, ann: Principal) -> None:
    """Streams cut at any point leave no half-written operation, and sending again completes the set."""
    records = [operation(ann, attempts=[attempt()]) for _ in range(60)]

    async def cut(after_acks: int) -> None:
        sending = asyncio.Event()

        async def requests():  # type: ignore[no-untyped-def]
            for number, record in enumerate(records, 1):
                yield pb.RecordOperationsRequest(record_id=number, operation=record)
            await sending.wait()

        async with ledger.caller.stream(ledger.stub.RecordOperations, requests(), timeout_s=20, principal=RECORDER) as acks:
            for _ in range(after_acks):
                await anext(acks)

    for after_acks in (0, 1, 5, 17):
        await cut(after_acks)
    acks = await ledger.record(*records)

    async def all_there() -> bool:
        return len(await ledger.rows("ListOperations", pb.ListOperationsRequest(page_size=1000), ann)) == 60

    await until(all_there)
    assert {ack.rejected_reason for ack in acks} == {""}
    assert {ack.cost_nanousd for ack in acks} == {COST}
