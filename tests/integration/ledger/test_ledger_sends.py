"""What at-least-once sending does to the books: nothing, however often, in whatever order and through however many streams it is done."""

import asyncio
import os
import random
import uuid
from collections import Counter
from collections.abc import Callable

import pytest

from services.chassis.errors import DomainError, HoldAlreadySettled, IdempotencyConflict
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger, attempt, operation, value

SENDS_BRIEF = 600
SENDS = int(os.environ.get("LEDGER_SENDS", SENDS_BRIEF))
"""How much is sent in all; `LEDGER_SENDS=10000` is the full proof, of `make prove-ledger`."""
SENDS_OF_EACH = 50
STREAMS = 8
KINDS = ("held", "unheld", "settled", "twice")


def changed(record: pb.Operation, change: Callable[[pb.Operation], object]) -> pb.Operation:
    """A copy with something else in it."""
    copy = pb.Operation()
    copy.CopyFrom(record)
    change(copy)
    return copy


CHANGES: dict[str, Callable[[pb.Operation], object]] = {
    "usage": lambda o: setattr(o.attempts[0].usage, "output_tokens", o.attempts[0].usage.output_tokens + 1),
    "an explicit zero": lambda o: o.attempts[0].usage.Clear(),
    "estimated": lambda o: setattr(o.attempts[0], "estimated", True),
    "a further attempt": lambda o: o.attempts.append(attempt(9)),
    "no attempts": lambda o: o.ClearField("attempts"),
    "a provider's request": lambda o: setattr(o.attempts[0], "provider_request_id", "another"),
    "user": lambda o: setattr(o, "user", "bob"),
    "status": lambda o: setattr(o, "status", "failed"),
    "session": lambda o: setattr(o, "session_id", "another"),
    "time": lambda o: setattr(o.created_at, "seconds", o.created_at.seconds - 1),
    "verdict": lambda o: setattr(o.cache, "verdict", "exact"),
    "a step": lambda o: setattr(o.steps[0], "duration_ms", 99.5),
    "no steps": lambda o: o.ClearField("steps"),
}


async def sent(ledger: Ledger, records: list[pb.Operation]) -> list[pb.RecordOperationsResponse]:
    """Send records through several streams at once; return the acks in the order of `records`."""
    shares = [records[start::STREAMS] for start in range(STREAMS)]
    answers = await asyncio.gather(*(ledger.record(*share) for share in shares if share))
    acks: list[pb.RecordOperationsResponse] = [pb.RecordOperationsResponse()] * len(records)
    for start, answer in enumerate(answers):
        acks[start::STREAMS] = answer
    return acks


@pytest.mark.slow
@pytest.mark.timeout(0 if SENDS > SENDS_BRIEF else 120)
async def test_each_operation_is_booked_once_whatever_is_sent(ledger: Ledger, ann: Principal, capsys: pytest.CaptureFixture[str]) -> None:
    """Duplicates, in any order, on streams side by side, and all again afterwards mixed with other bodies under the same ids: one row each,
    each charged once, every repetition acknowledged, every other body refused."""
    chance = random.Random(SENDS)
    records, holds, costs = [], {}, Counter[str]()
    for number in range(SENDS // SENDS_OF_EACH):
        tokens, kind = 1 + number, KINDS[number % len(KINDS)]
        attempts = [attempt(1, tokens, 10, provider_request_id=f"r{number}")]
        if kind == "twice":
            attempts.append(attempt(2, tokens, 0, error_reason="MODEL_FAILED"))
        record = operation(ann, attempts=attempts)
        records.append(record)
        costs[record.operation_id] = (tokens * 1000 + 50_000) + (tokens * 1000 if kind == "twice" else 0)
        if kind != "unheld":
            holds[record.operation_id] = await ledger.reserve(ann, record.operation_id)
        if kind == "settled":
            usage = common_pb2.Usage(input_tokens=tokens, output_tokens=10)
            await ledger.ask("Settle", pb.SettleRequest(hold_id=holds[record.operation_id].hold_id, usage=usage), ann)

    first = [record for record in records for _ in range(SENDS_OF_EACH // 2)]
    chance.shuffle(first)
    acks = await sent(ledger, first)
    assert Counter(ack.rejected_reason for ack in acks) == {"": len(first)}
    assert Counter(ack.duplicate for ack in acks) == {False: len(records), True: len(first) - len(records)}
    assert all(ack.cost_nanousd == costs[record.operation_id] for record, ack in zip(first, acks, strict=True))

    again = [(record, True) for record in records for _ in range(SENDS_OF_EACH // 2 - len(CHANGES))]
    again += [(changed(record, change), False) for record in records for change in CHANGES.values()]
    chance.shuffle(again)
    acks = await sent(ledger, [record for record, _ in again])
    taken = [not ack.rejected_reason for ack in acks]
    assert taken == [same for _, same in again]
    assert not any(ack.duplicate for ack, (_, same) in zip(acks, again, strict=True) if not same)

    assert await value(ledger.url, "SELECT count(*) FROM operations WHERE tenant = $1", ann.tenant) == len(records)
    spent = "SELECT spent_nanousd FROM spending WHERE tenant = $1 AND scope = 'tenant' AND period = 'month'"
    assert await value(ledger.url, spent, ann.tenant) == costs.total()
    if SENDS > SENDS_BRIEF:
        with capsys.disabled():
            altered, sent_in_all = taken.count(False), len(first) + len(again)
            print(f"\n{sent_in_all:,} records sent, {altered:,} altered ones refused, {len(records):,} operations booked")


OTHERS = (
    {"model": "claude-opus-5"},
    {"input_tokens_max": 999},
    {"output_tokens_max": 1001},
    {"provider": "extractive", "model": "extractive"},
)


@pytest.mark.parametrize("fields", OTHERS)
async def test_another_reserve_under_the_same_attempt_is_refused(ledger: Ledger, ann: Principal, fields: dict[str, object]) -> None:
    """Before and after it was settled, and by another user too."""
    operation_id = str(uuid.uuid4())
    held = await ledger.reserve(ann, operation_id)
    for principal, changes in ((ann, fields), (Principal(ann.tenant, "bob"), {})):
        with pytest.raises(IdempotencyConflict):
            await ledger.reserve(principal, operation_id, **changes)
    await ledger.ask("Settle", pb.SettleRequest(hold_id=held.hold_id), ann)
    for changes, refusal in ((fields, IdempotencyConflict), ({}, HoldAlreadySettled)):
        with pytest.raises(DomainError) as refused:
            await ledger.reserve(ann, operation_id, **changes)
        assert isinstance(refused.value, refusal)
