"""What goes wrong around an answer, and how it ends each time: one typed end, true books, a closed socket, no hold left open.

Tests that are named after a failure, as `upstream_not_closed`, show that it does not happen here; more of them are in
tests/integration/orchestrator/test_orchestrator_regressions.py.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.chassis.errors import (
    AnswerCancelled,
    AnswerLogGone,
    DeadlineTooShort,
    DomainError,
    IdempotencyConflict,
    ModelFailed,
    ModelMisconfigured,
    ModelOverloaded,
    ModelRefused,
    ModelStalled,
    NotFound,
    Overloaded,
    RequestInvalid,
)
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, BOB, MALLORY, Reply, World, until, world

QUESTION = "Which port does the gateway listen on?"


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator at the simulated provider, impatient. Whatever a test does, no hold is left open after it."""
    impatient = {
        "TAILRACE_MODEL_FIRST_TOKEN_S": "1",
        "TAILRACE_MODEL_STALL_S": "0.3",
        "TAILRACE_ORCHESTRATOR_DETACH_GRACE_S": "0.3",
        "TAILRACE_ORCHESTRATOR_HEARTBEAT_S": "0.1",
    }
    async with world(tmp_path, valkey.url, **impatient) as running:
        yield running
        await until(lambda: not running.ledger.open_holds)


@pytest.mark.parametrize(
    ("behaviour", "failure", "attempts"),
    [
        ({"fault": "status", "status": 429, "retry_after_s": 0.05}, ModelOverloaded, 3),
        ({"fault": "status", "status": 529}, ModelOverloaded, 3),
        ({"fault": "status", "status": 500}, ModelFailed, 3),
        ({"fault": "status", "status": 400}, ModelRefused, 1),
        ({"fault": "status", "status": 401}, ModelMisconfigured, 1),
        ({"fault": "status", "status": 403}, ModelMisconfigured, 1),
        ({"fault": "cut_before_first"}, ModelFailed, 3),
        ({"fault": "error_in_200", "fault_at": 0}, ModelOverloaded, 3),
        ({"fault": "malformed", "fault_at": 0}, ModelFailed, 3),
        ({"fault": "hang"}, ModelStalled, 1),
        ({"fault": "stall_after", "fault_at": 0}, ModelStalled, 1),
    ],
)
async def test_failure_before_the_first_token_is_retried_by_kind_and_reported_by_type(
    claude: World, behaviour: dict[str, object], failure: type[DomainError], attempts: int
) -> None:
    """Only what another try can heal is tried again, three times in all, each with a hold of its own."""
    claude.behave(**behaviour)
    reply = Reply()
    with pytest.raises(failure) as ended:
        await claude.ask(QUESTION, into=reply)
    operation = await claude.booked(reply.answer_id)

    assert ended.value.metadata["provider"] == "anthropic"
    assert len(await claude.records()) == attempts == len(operation.attempts) == len(claude.ledger.holds)
    assert (operation.status, operation.error_reason) == ("failed", failure.reason)
    assert "delta" not in reply.kinds
    assert [event.sequence for event in reply.events if not event.HasField("heartbeat")] == list(
        range(1, 1 + sum(not event.HasField("heartbeat") for event in reply.events))
    )


async def test_overload_that_passes_is_survived(claude: World) -> None:
    """Two overloads, then an answer: the reader sees one answer, the books see three attempts."""
    claude.behave(fault="status", status=529, fail_first=2)
    reply = await claude.ask(QUESTION)
    operation = await claude.booked(reply.answer_id)

    assert reply.done.verdict == "passed"
    assert [attempt.error_reason for attempt in operation.attempts] == ["MODEL_OVERLOADED", "MODEL_OVERLOADED", ""]
    assert claude.ledger.billed() == (sum(r.input_tokens for r in await claude.records()), 20)


async def test_retry_after_is_obeyed(claude: World) -> None:
    """Never sooner than the provider asks."""
    claude.behave(fault="status", status=429, retry_after_s=0.4, fail_first=1)
    began = time.monotonic()
    await claude.ask(QUESTION)

    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        ({"fault": "cut_after"}, ModelFailed),
        ({"fault": "end_after"}, ModelFailed),
        ({"fault": "malformed"}, ModelFailed),
        ({"fault": "stall_after"}, ModelStalled),
        ({"fault": "error_in_200"}, ModelOverloaded),
    ],
)
async def test_upstream_failure_mid_stream_not_logged(claude: World, behaviour: dict[str, object], failure: type[DomainError]) -> None:
    """What was shown cannot be unsaid: no second try, no `done`; what was used is booked as an estimate that covers it."""
    claude.behave(fault_at=7, tokens=20, **behaviour)
    reply = Reply()
    with pytest.raises(failure):
        await claude.ask(QUESTION, into=reply)
    operation = await claude.booked(reply.answer_id)
    (record,) = await claude.records()

    assert len(reply.text.split()) == 7
    assert "done" not in reply.kinds
    assert operation.usage.input_tokens == record.input_tokens
    assert operation.usage.output_tokens >= record.output_tokens == 7
    assert operation.estimated
    assert how_steps_ended(operation)["generate"] == ("failed", failure.reason)
    assert claude.ledger.turns[operation.session_id][0].complete is False


async def test_cut_answer_is_not_remembered(claude: World) -> None:
    """Only a whole answer is kept."""
    claude.behave(fault="end_after", fault_at=5, fail_first=1)
    with pytest.raises(ModelFailed):
        await claude.ask(QUESTION)
    reply = await claude.ask(QUESTION)

    assert reply.done.cache.verdict == "miss"


async def test_explicit_zero_becomes_guess(claude: World) -> None:
    """An absent count is estimated and said to be; an explicit 0 is believed."""
    claude.behave(fault="late_usage_missing")
    absent = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    claude.behave(fault="zero_usage")
    zero = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)

    assert absent.done.estimated
    assert absent.done.usage.output_tokens >= 20
    assert not zero.done.estimated
    assert (zero.done.usage.input_tokens, zero.done.usage.output_tokens) == (0, 0)


async def test_events_cut_at_any_byte_are_read_whole(claude: World) -> None:
    """A provider that drips loses nothing."""
    claude.behave(fault="slow_drip", tokens=20)
    dripped = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    claude.behave(tokens=20)
    whole = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)

    assert dripped.text == whole.text


async def test_upstream_not_closed(claude: World) -> None:
    """CancelAnswer: the socket is closed within a second, the reader gets ANSWER_CANCELLED, the tokens sent are booked."""
    claude.behave(tokens=1000, tokens_per_s=100)
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, into=reply))
    await until(lambda: len(reply.text.split()) >= 5)
    began = time.monotonic()
    assert await claude.cancel(reply.answer_id)
    with pytest.raises(AnswerCancelled):
        await asking
    (record,) = await claude.records()
    operation = await claude.booked(reply.answer_id)

    assert time.monotonic() - began < 1
    assert record.state == "client_closed"
    assert (operation.status, operation.error_reason, operation.estimated) == ("cancelled", "ANSWER_CANCELLED", True)
    assert how_steps_ended(operation)["generate"] == ("failed", "cut_short")
    assert how_steps_ended(operation)["record"][0] == "done"
    assert operation.usage.input_tokens == record.input_tokens
    assert abs(operation.usage.output_tokens - record.output_tokens) <= 2
    assert not await claude.cancel(reply.answer_id)


def how_steps_ended(operation: Any) -> dict[str, tuple[str, str]]:
    """Status and reason of each step of a booked answer."""
    return {step.name: (step.status, step.facts.get("reason", "")) for step in operation.steps}


async def _ask_and_leave(claude: World, **fields: object) -> Reply:
    """Read a little, then go away."""
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, into=reply, **fields))
    await until(lambda: reply.text)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return reply


async def test_disconnect_is_no_cancel_and_resume_is_identical(claude: World) -> None:
    """The answer goes on within the grace time; a resumed reader gets the same events under the same numbers."""
    claude.behave(tokens=30, tokens_per_s=100)
    left = await _ask_and_leave(claude)
    rest = await claude.resume(left.answer_id, left.events[-1].sequence)
    again = await claude.resume(left.answer_id)
    seen = [event for event in left.events + rest.events if not event.HasField("heartbeat")]

    assert [event.SerializeToString(deterministic=True) for event in seen] == [
        event.SerializeToString(deterministic=True) for event in again.events
    ]
    assert again.done.verdict == "passed"
    assert [record.state for record in await claude.records()] == ["finished"]


async def test_answer_nobody_comes_back_to_is_stopped_after_the_grace(claude: World) -> None:
    """After the grace time the provider is closed and what was used is booked."""
    claude.behave(tokens=1000, tokens_per_s=100)
    left = await _ask_and_leave(claude)
    operation = await claude.booked(left.answer_id)
    (record,) = await claude.records()

    assert operation.status == "cancelled"
    assert record.state == "client_closed"
    assert record.ended_s is not None
    assert record.ended_s >= 0.25


async def test_usage_lost_on_disconnect(claude: World) -> None:
    """`cancel_on_disconnect` knows no grace; what was made until then is booked."""
    claude.behave(tokens=1000, tokens_per_s=50)
    left = await _ask_and_leave(claude, cancel_on_disconnect=True)
    operation = await claude.booked(left.answer_id)
    (record,) = await claude.records()

    assert operation.status == "cancelled"
    assert record.ended_s is not None
    assert record.ended_s < 0.3
    assert operation.usage.input_tokens == record.input_tokens
    assert abs(operation.usage.output_tokens - record.output_tokens) <= 2


@pytest.mark.parametrize("whole", [False, True])
async def test_key_is_asked_again_after_its_line_was_lost(claude: World, whole: bool) -> None:
    """Within the grace it is the same answer, also for who waits for one whole document; after it the key runs again. Nobody cancelled."""
    claude.behave(tokens=30, tokens_per_s=100)
    fields = {"idempotency_key": f"lost-{whole}", "cancel_on_disconnect": whole, "cache": pb.CACHE_MODE_OFF}
    left = await _ask_and_leave(claude, **fields)
    assert (await claude.ask(QUESTION, **fields)).answer_id == left.answer_id

    claude.behave(tokens=1000, tokens_per_s=100)
    fields["idempotency_key"] = f"left-{whole}"
    left = await _ask_and_leave(claude, **fields)
    operation = await claude.booked(left.answer_id)
    claude.behave(tokens=30)
    again = await claude.ask(QUESTION, **fields)

    assert (operation.status, operation.error_reason) == ("cancelled", "ANSWER_ABANDONED")
    assert again.answer_id != left.answer_id
    assert again.done.verdict == "passed"


async def test_silence_is_filled_with_heartbeats_that_take_no_number(claude: World) -> None:
    """A heartbeat repeats the last number."""
    claude.behave(ttft_ms=400)
    reply = await claude.ask(QUESTION)
    numbers = [event.sequence for event in reply.events if not event.HasField("heartbeat")]

    assert reply.kinds.count("heartbeat") >= 2
    assert numbers == list(range(1, len(numbers) + 1))


async def test_only_the_owner_resumes_or_cancels(claude: World) -> None:
    """A foreign answer and an unknown one look the same."""
    reply = await claude.ask(QUESTION)
    details = set()
    for principal, answer_id in ((BOB, reply.answer_id), (MALLORY, reply.answer_id), (ALICE, "no-such-answer")):
        for call in (claude.resume(answer_id, principal=principal), claude.cancel(answer_id, principal=principal)):
            with pytest.raises(NotFound) as refused:
                await call
            details.add((refused.value.detail, tuple(refused.value.metadata.items())))

    assert len(details) == 1


async def test_resume_beyond_the_end_is_refused(claude: World) -> None:
    """A number that no event has is the caller's mistake."""
    reply = await claude.ask(QUESTION)
    with pytest.raises(RequestInvalid) as refused:
        await claude.resume(reply.answer_id, 10_000)

    assert refused.value.field == "after_sequence"


async def test_log_that_was_forgotten_is_gone_and_not_unknown(tmp_path: Path, valkey: Valkey) -> None:
    """After its time the owner is told that it was there."""
    async with world(tmp_path, valkey.url, with_key=False, TAILRACE_ORCHESTRATOR_LOGS_KEPT_S="0") as running:
        reply = await running.ask(QUESTION)
        with pytest.raises(AnswerLogGone):
            while True:  # here it goes at once, in Redis with the next flush
                await running.resume(reply.answer_id)
        with pytest.raises(NotFound):
            await running.resume(reply.answer_id, principal=BOB)


@pytest.mark.parametrize("fields", [{}, {"server_tools": ["calculator"]}])
async def test_key_gets_its_answer_again_when_the_log_is_gone(tmp_path: Path, valkey: Valkey, fields: dict[str, Any]) -> None:
    """Text, cited passages, citations and receipt, from the books; no provider is asked. The events themselves stay gone."""
    asked = {"idempotency_key": f"gone-{len(fields)}", "cache": pb.CACHE_MODE_OFF, **fields}
    async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_LOGS_KEPT_S="0") as running:
        first = await running.ask(QUESTION, **asked)
        await running.booked(first.answer_id)
        with pytest.raises(AnswerLogGone):
            while True:  # here it goes at once, in Redis with the next flush
                await running.resume(first.answer_id)
        again = await running.ask(QUESTION, **asked)
        records = await running.records()
        with pytest.raises(IdempotencyConflict):
            await running.ask("How long do holds live?", **asked)
    kept, was = again.done, pb.Done()
    was.CopyFrom(first.done)
    was.ClearField("choices")
    citations = [event.citation for event in first.events if event.HasField("citation")]
    if fields:
        was.ClearField("groundedness")
        was.ClearField("sentences_judged")
        for citation in citations:
            citation.ClearField("support")
    duration_ms, kept.duration_ms = kept.duration_ms, was.duration_ms  # what is booked was taken a moment before

    assert (again.answer_id, again.text) == (first.answer_id, first.text)
    assert [event.citation for event in again.events if event.HasField("citation")] == citations != []
    assert kept == was
    assert 0 < duration_ms <= was.duration_ms
    assert len(records) == 1


async def test_same_idempotency_key_is_the_same_answer(claude: World) -> None:
    """The same body gives the same events and one provider call; another body is refused; another user's key is another key."""
    first = await claude.ask(QUESTION, idempotency_key="k1", cache=pb.CACHE_MODE_OFF)
    again = await claude.ask(QUESTION, idempotency_key="k1", cache=pb.CACHE_MODE_OFF)
    other = await claude.ask(QUESTION, idempotency_key="k1", cache=pb.CACHE_MODE_OFF, principal=BOB)
    with pytest.raises(IdempotencyConflict):
        await claude.ask("How long do holds live?", idempotency_key="k1")

    assert again.events == first.events
    assert other.answer_id != first.answer_id
    assert len(await claude.records()) == 2


async def test_what_refuses_a_new_answer_does_not_refuse_the_same_request_again(tmp_path: Path, valkey: Valkey) -> None:
    """Who has no place for one more still gets what the key stands for. Another body, and what was never begun, are refused as ever."""
    async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_ANSWERS_PER_USER_MAX="1") as running:
        running.behave(tokens=100, tokens_per_s=100)
        reply, fields = Reply(), {"idempotency_key": "again", "cache": pb.CACHE_MODE_OFF}
        asking = asyncio.create_task(running.ask(QUESTION, into=reply, **fields))
        await until(lambda: reply.text)
        again = await running.ask(QUESTION, **fields)
        first = await asking
        other = Reply()
        asking = asyncio.create_task(running.ask(QUESTION, into=other, cache=pb.CACHE_MODE_OFF))
        await until(lambda: other.text)
        for refused in ({"idempotency_key": "never begun"}, {**fields, "collection": "another"}):
            with pytest.raises((Overloaded, IdempotencyConflict)) as failed:
                await running.ask(QUESTION, **refused)
            assert isinstance(failed.value, IdempotencyConflict if "collection" in refused else Overloaded)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    assert again.events == first.events


async def test_too_many_answers_are_refused_and_the_rest_go_on(tmp_path: Path, valkey: Valkey) -> None:
    """The bound on running answers sheds load with a time to come back."""
    async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_ANSWERS_MAX="1") as running:
        running.behave(tokens=1000, tokens_per_s=50)
        reply = Reply()
        asking = asyncio.create_task(running.ask(QUESTION, into=reply))
        await until(lambda: reply.text)
        with pytest.raises(Overloaded) as refused:
            await running.ask(QUESTION)
        await running.cancel(reply.answer_id)
        with pytest.raises(AnswerCancelled):
            await asking

        assert refused.value.retry_after_ms == 1000


async def test_deadline_ends_an_answer_that_is_never_silent(tmp_path: Path, valkey: Valkey) -> None:
    """One deadline over all: a stream that never stalls ends too, by type, booked."""
    async with world(tmp_path, valkey.url, TAILRACE_ANSWER_DEADLINE_S="2") as running:
        running.behave(tokens=1000, tokens_per_s=100)
        reply = Reply()
        with pytest.raises(DeadlineTooShort) as ended:
            await running.ask(QUESTION, into=reply)
        operation = await running.booked(reply.answer_id)

        assert ended.value.metadata["step"] == "generate"
        assert how_steps_ended(operation)["generate"] == ("failed", "cut_short")
        assert operation.usage.output_tokens > 0
        assert (await running.records())[0].state == "client_closed"


async def test_deadline_of_the_request_reaches_every_hop(claude: World) -> None:
    """Whether it comes as a field or as the call's own: retrieval gets less than it, the provider is cut at it, and the reader is told."""
    claude.behave(tokens=1000, tokens_per_s=100)
    for fields, call_s in (({"deadline_ms": 1300}, 60.0), ({}, 1.5)):
        reply, began = Reply(), time.monotonic()
        request = pb.AnswerRequest(question=QUESTION, cache=pb.CACHE_MODE_OFF, **fields)
        with pytest.raises(DeadlineTooShort) as ended:
            async with claude.caller.stream(claude.stub.Answer, request, timeout_s=call_s, principal=ALICE) as events:
                async for event in events:
                    reply.events.append(event)
        assert ended.value.metadata["step"] == "generate"
        assert 1.1 < time.monotonic() - began < 2.5
        assert claude.retrieval.time_left_s[-1] < 1.3
        assert (await claude.booked(reply.answer_id)).usage.output_tokens > 0
    assert [record.state for record in await claude.records()] == ["client_closed"] * 2


async def test_no_work_starts_when_what_is_left_cannot_suffice(claude: World) -> None:
    """A call that is too short is refused at once; one whose time ran out on the way asks no provider."""
    with pytest.raises(DeadlineTooShort):
        async with claude.caller.stream(claude.stub.Answer, pb.AnswerRequest(question=QUESTION), timeout_s=0.2, principal=ALICE) as events:
            async for _ in events:
                pass
    with pytest.raises(DeadlineTooShort) as ended:
        await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, deadline_ms=90)

    assert ended.value.metadata["step"] in ("generate", "recall", "passages")
    assert await claude.records() == []
    assert not claude.ledger.holds


async def test_record_waits_on_disk_while_the_ledger_is_away(claude: World) -> None:
    """The answer ends well, its record is durable, and the ledger has it once when it is back."""
    claude.behave(tokens=30, tokens_per_s=100)
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, into=reply))
    await until(lambda: reply.text)
    claude.ledger.away = True
    await asking
    assert reply.done.cost_nanousd > 0
    assert reply.answer_id not in claude.ledger.operations
    claude.ledger.away = False
    operation = await claude.booked(reply.answer_id)
    await until(lambda: claude.ledger.turns.get(operation.session_id))

    assert operation.cost_nanousd == reply.done.cost_nanousd


async def test_record_the_ledger_can_never_book_is_put_aside_and_blocks_nothing(claude: World) -> None:
    """A dead letter is kept with its reason; the next record goes through."""
    claude.ledger.reject = "REQUEST_INVALID"
    rejected = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    await until(lambda: claude.ledger.records)
    claude.ledger.reject = ""
    booked = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    await claude.booked(booked.answer_id)
    claude.ledger.open_holds = {hold for hold in claude.ledger.open_holds if rejected.answer_id not in hold}

    assert rejected.answer_id not in claude.ledger.operations


async def test_what_was_not_acknowledged_is_sent_by_the_next_process(tmp_path: Path, valkey: Valkey) -> None:
    """The spool outlives the process: a record that nobody acknowledged is there at the next start and is sent."""
    async with world(tmp_path, valkey.url) as first:
        first.ledger.recording = False
        reply = await first.ask(QUESTION)
        assert reply.done.verdict == "passed"
    with sqlite3.connect(tmp_path / "orchestrator" / "spool.db") as database:
        assert database.execute("SELECT count(*) FROM outbox").fetchone() == (1,)
    database.close()
    async with world(tmp_path, valkey.url) as second:
        operation = await second.booked(reply.answer_id)

    assert operation.cost_nanousd == reply.done.cost_nanousd


async def test_answers_go_on_without_redis(tmp_path: Path) -> None:
    """The exact cache is a convenience: without it answers are made."""
    async with world(tmp_path, "redis://127.0.0.1:1/0") as running:
        first = await running.ask(QUESTION)
        second = await running.ask(QUESTION)

        assert (first.done.verdict, second.done.cache.verdict) == ("passed", "miss")


async def test_drain_lets_a_running_answer_end(tmp_path: Path, valkey: Valkey) -> None:
    """SIGTERM's way: an answer without a reader may end, is booked, and only then the process goes."""
    async with world(tmp_path, valkey.url) as running:
        running.behave(tokens=30, tokens_per_s=100)
        left = await _ask_and_leave(running)
    operation = running.ledger.operations[left.answer_id]

    assert operation.status == "done"
    assert not running.ledger.open_holds


async def test_cancel_storm_leaves_nothing_behind(claude: World) -> None:
    """Many answers cancelled at random moments: every hold resolved, every socket closed, each reply its own."""
    claude.behave(tokens=50, tokens_per_s=500)

    async def one(number: int) -> None:
        asking = asyncio.create_task(claude.ask(f"Which port does gateway number {number} listen on?", cancel_on_disconnect=True))
        await asyncio.sleep(number % 13 / 100)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    await asyncio.gather(*(one(number) for number in range(60)))
    await until(lambda: not claude.ledger.open_holds)
    records = await claude.records()

    assert all(record.state in ("client_closed", "finished") for record in records)
    assert all(attempt.hold_id for operation in claude.ledger.operations.values() for attempt in operation.attempts)
    reply = await claude.ask(QUESTION)
    assert reply.done.verdict == "passed"
