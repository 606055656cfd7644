"""The books agree with the only witness: what the provider says it sent and would bill. To the token, whatever happened to the stream."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from bench.script import Behaviour, Record
from tests.suite import Streamed, Suite, ask, events, until

STOPPED_WITHIN_S = 1.0
"""From the wish to stop to the provider's socket being closed."""


async def attempts_of(suite: Suite, answer_id: str) -> list[Any]:
    """The booked attempts of an answer, once there are any."""
    return await until(lambda: suite.rows("SELECT * FROM attempts WHERE operation_id = $1::uuid ORDER BY attempt", answer_id))


async def operation_of(suite: Suite, answer_id: str) -> Any:
    return (await until(lambda: suite.rows("SELECT * FROM operations WHERE operation_id = $1::uuid", answer_id)))[0]


async def ended_record(suite: Suite) -> Record:
    """The provider's only record, once its request is over."""

    async def probe() -> Record | None:
        (record,) = await suite.provider.records()
        return None if record.state == "running" else record

    return await until(probe)


async def no_hold_is_open(suite: Suite) -> bool:
    return not await suite.rows("SELECT 1 FROM holds WHERE state = 'reserved' AND price_id IS NOT NULL")


async def books_balance(suite: Suite) -> None:
    """Every posting sums to zero, and the running totals equal the entries they are made of."""
    assert await suite.rows("SELECT 1 FROM entries GROUP BY posting_id HAVING sum(amount_nanousd) <> 0") == []
    (totals,) = await suite.rows(
        "SELECT (SELECT coalesce(sum(spent_nanousd), 0) FROM spending WHERE scope = 'tenant' AND period = 'month') AS kept,"
        " (SELECT coalesce(sum(amount_nanousd), 0) FROM entries WHERE account = 'spent') AS booked"
    )
    assert totals["kept"] == totals["booked"]


async def begin(client: httpx.AsyncClient, question: str, upto: str = "delta", **body: Any) -> tuple[Streamed, Any, Any]:
    """Ask, and read until the first event of a kind. Returns what was read, the response and its open context."""
    context = client.stream("POST", "/v1/answers", json={"question": question, "cache": "off", **body})
    response = await context.__aenter__()
    assert response.status_code == 200, (await response.aread()).decode()
    read = Streamed()
    stream = events(response)
    async for event in stream:
        read.events.append(event)
        if event.name == upto:
            break
    return read, stream, context


async def test_every_booked_attempt_agrees_with_what_the_provider_billed(suite: Suite, client: httpx.AsyncClient) -> None:
    """Twenty answers side by side: one attempt each, matched by the provider's request id, equal to the token."""
    await suite.provider.behave(Behaviour(tokens=40, tokens_per_s=400))
    questions = [f"Which part of the mill has the letter {chr(97 + n)}?" for n in range(20)]

    answers = await asyncio.gather(*(ask(client, question, cache="off") for question in questions))
    records = {record.request_id: record for record in await suite.provider.records()}
    booked = [(await attempts_of(suite, answer.answer_id)) for answer in answers]

    assert [len(rows) for rows in booked] == [1] * len(questions)
    assert {row["provider_request_id"] for (row,) in booked} == records.keys()
    for answer, (row,) in zip(answers, booked, strict=True):
        record = records[row["provider_request_id"]]
        assert (row["input_tokens"], row["output_tokens"]) == (record.input_tokens, record.output_tokens)
        assert str(row["cost_nanousd"]) == answer.done["cost_nanousd"]
        assert not row["estimated"]
    assert await until(lambda: no_hold_is_open(suite))
    await books_balance(suite)


async def test_a_cancelled_answer_closes_the_provider_at_once_and_is_booked(suite: Suite, client: httpx.AsyncClient) -> None:
    """Stop reaches the provider's socket within a second; the stream ends with one error, and what was used is on the books."""
    await suite.provider.behave(Behaviour(tokens=2000, tokens_per_s=50))

    read, stream, context = await begin(client, "What is told of the turbine hall in every detail?", max_output_tokens=4000)
    asked_at = time.monotonic()
    response = await client.post(f"/v1/answers/{read.answer_id}/cancel")
    read.events += [event async for event in stream]
    await context.__aexit__(None, None, None)
    record = await ended_record(suite)
    (row,) = await attempts_of(suite, read.answer_id)
    operation = await operation_of(suite, read.answer_id)

    assert time.monotonic() - asked_at < STOPPED_WITHIN_S
    assert response.status_code == 202
    assert read.cancelled["reason"] == "ANSWER_CANCELLED"
    assert (record.state, operation["status"]) == ("client_closed", "cancelled")
    assert (row["input_tokens"], row["estimated"]) == (record.input_tokens, True)
    assert abs(row["output_tokens"] - record.output_tokens) <= max(2, 0.02 * record.output_tokens)
    assert row["cost_nanousd"] > 0
    assert await until(lambda: no_hold_is_open(suite))


async def test_leaving_a_whole_document_is_a_cancel(suite: Suite, client: httpx.AsyncClient) -> None:
    """Nobody can resume a JSON answer, so its provider call ends when its client goes, and is booked."""
    await suite.provider.behave(Behaviour(tokens=2000, tokens_per_s=50))

    body = {"question": "What is told of the eel ladder in every detail?", "cache": "off", "stream": False, "max_output_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/answers", json=body, timeout=0.5)
    left_at = time.monotonic()
    record = await ended_record(suite)
    (row,) = await until(lambda: suite.rows("SELECT * FROM attempts WHERE provider_request_id = $1", record.request_id))

    assert time.monotonic() - left_at < STOPPED_WITHIN_S + 1
    assert record.state == "client_closed"
    assert record.ended_s is not None
    assert record.ended_s < 0.5 + STOPPED_WITHIN_S
    assert row["input_tokens"] == record.input_tokens


async def test_leaving_a_stream_is_no_cancel_until_the_grace_is_over(suite: Suite, client: httpx.AsyncClient) -> None:
    """The answer goes on for the grace time, can be taken up again within it, and ends after it when nobody came back."""
    await suite.provider.behave(Behaviour(tokens=2000, tokens_per_s=50))

    read, stream, context = await begin(client, "What is told of the heron gate in every detail?", max_output_tokens=4000)
    await stream.aclose()
    await context.__aexit__(None, None, None)
    left_at = time.monotonic()
    record = await ended_record(suite)
    lasted_s = time.monotonic() - left_at
    operation = await operation_of(suite, read.answer_id)

    assert 0.9 <= lasted_s <= 1 + STOPPED_WITHIN_S
    assert (record.state, operation["status"]) == ("client_closed", "cancelled")


async def test_a_reader_that_comes_back_misses_nothing(suite: Suite, client: httpx.AsyncClient) -> None:
    """A stream cut in the middle and resumed is the stream that was not cut, byte for byte."""
    behaviour = Behaviour(tokens=60, tokens_per_s=100)
    await suite.provider.behave(behaviour)

    read, stream, context = await begin(client, "What do the eels of the upper pond do?")
    await stream.aclose()
    await context.__aexit__(None, None, None)
    path, headers = f"/v1/answers/{read.answer_id}/events", {"last-event-id": read.events[-1].id}
    async with client.stream("GET", path, headers=headers) as response:
        read.events += [event async for event in events(response)]

    assert read.done["usage"]["output_tokens"] == "60"
    assert (await ended_record(suite)).state == "finished"
    async with client.stream("GET", path, headers={"last-event-id": "0"}) as response:
        whole = [event async for event in events(response)]
    assert whole == read.events


BEFORE_THE_FIRST_TOKEN = [
    (Behaviour(fault="status", status=400), "MODEL_REFUSED", "failed"),
    (Behaviour(fault="status", status=401), "MODEL_MISCONFIGURED", "failed"),
    (Behaviour(fault="status", status=429, retry_after_s=0), "MODEL_OVERLOADED", "failed"),
    (Behaviour(fault="status", status=529, retry_after_s=0), "MODEL_OVERLOADED", "failed"),
    (Behaviour(fault="status", status=500), "MODEL_FAILED", "failed"),
    (Behaviour(fault="cut_before_first"), "MODEL_FAILED", "failed"),
    (Behaviour(fault="stall_after", fault_at=0), "MODEL_STALLED", "failed"),
]
AFTER_THE_FIRST_TOKEN = [
    (Behaviour(fault="cut_after", fault_at=10), {"MODEL_FAILED", "ANSWER_INTERRUPTED"}),
    (Behaviour(fault="end_after", fault_at=10), {"MODEL_FAILED", "ANSWER_INTERRUPTED"}),
    (Behaviour(fault="malformed", fault_at=10), {"MODEL_FAILED"}),
    (Behaviour(fault="error_in_200", fault_at=10), {"MODEL_OVERLOADED"}),
    (Behaviour(fault="stall_after", fault_at=10), {"MODEL_STALLED"}),
]


@pytest.mark.parametrize(("behaviour", "reason", "status"), BEFORE_THE_FIRST_TOKEN)
async def test_a_provider_that_fails_before_the_first_token_is_reported_by_type(
    suite: Suite, client: httpx.AsyncClient, behaviour: Behaviour, reason: str, status: str
) -> None:
    """One typed error, no text, no cost for what was refused, and no hold left open."""
    await suite.provider.behave(behaviour)

    answer = await ask(client, f"What did the miller say of the {behaviour.fault} {behaviour.status} flood?", cache="off")

    assert answer.error["reason"] == reason
    assert answer.text == ""
    operation = await operation_of(suite, answer.answer_id)
    assert (operation["status"], operation["error_reason"]) == (status, reason)
    assert await until(lambda: no_hold_is_open(suite))
    if behaviour.fault == "status":
        assert operation["cost_nanousd"] == 0


async def test_an_overloaded_provider_is_asked_again_and_every_attempt_is_on_the_books(suite: Suite, client: httpx.AsyncClient) -> None:
    """A retry before the first token is invisible to the reader; the books show what really happened."""
    await suite.provider.behave(Behaviour(fault="status", status=529, retry_after_s=0, fail_first=1, tokens=15))

    # Another tier: the retries of this one's model may be used up by what other tests made fail.
    answer = await ask(client, "What does the guild clean in spring by the weir?", cache="off", tier="smart")
    records = await suite.provider.records()
    rows = await attempts_of(suite, answer.answer_id)

    assert answer.done["usage"]["output_tokens"] == "15"
    assert [record.state for record in records] == ["refused", "finished"]
    assert sum(row["output_tokens"] for row in rows) == sum(record.output_tokens for record in records)
    assert sum(row["input_tokens"] for row in rows) == sum(record.input_tokens for record in records)


@pytest.mark.parametrize(("behaviour", "reasons"), AFTER_THE_FIRST_TOKEN)
async def test_a_provider_that_fails_after_the_first_token_ends_the_stream_in_one_typed_error(
    suite: Suite, client: httpx.AsyncClient, behaviour: Behaviour, reasons: set[str]
) -> None:
    """The text so far stays, the end is one error, and what was generated is booked though the provider never reported it."""
    await suite.provider.behave(behaviour)

    answer = await ask(client, f"What was said of the {behaviour.fault} wheel?")
    again = await ask(client, f"What was said of the {behaviour.fault} wheel?")
    record = (await suite.provider.records())[0]
    (row,) = await attempts_of(suite, answer.answer_id)

    assert answer.error["reason"] in reasons
    assert len(answer.text) > 0
    assert "done" not in again.names, "a cut answer was remembered"
    assert (row["input_tokens"], row["estimated"]) == (record.input_tokens, True)
    assert abs(row["output_tokens"] - record.output_tokens) <= 2
    assert await until(lambda: no_hold_is_open(suite))


@pytest.mark.parametrize(
    ("behaviour", "finish_reason", "verdict"),
    [
        (Behaviour(fault="refusal"), "refusal", "refused"),
        (Behaviour(fault="max_tokens"), "max_tokens", "cut"),
        (Behaviour(fault="context_window"), "context_window", "context_overflow"),
        (Behaviour(text="It says so [31]."), "end_turn", "citation_unknown"),
    ],
)
async def test_an_answer_that_did_not_pass_is_shown_as_what_it_is_and_never_remembered(
    suite: Suite, client: httpx.AsyncClient, behaviour: Behaviour, finish_reason: str, verdict: str
) -> None:
    """A refusal, a cut or an invented source is served once, said in the receipt, and asked anew the next time."""
    await suite.provider.behave(behaviour)
    question = f"What is the {verdict} tale of the wheel?"

    answers = [await ask(client, question), await ask(client, question)]

    for answer in answers:
        receipt = answer.done
        assert (receipt["finish_reason"], receipt["verdict"], receipt["cache"]["verdict"]) == (finish_reason, verdict, "miss")


async def test_what_the_provider_does_not_report_is_estimated_and_a_zero_stays_a_zero(suite: Suite, client: httpx.AsyncClient) -> None:
    """A missing count is ours and marked so; a reported zero is the provider's word."""
    await suite.provider.behave(Behaviour(fault="late_usage_missing", tokens=40), contains="heron")
    await suite.provider.behave(Behaviour(fault="zero_usage", tokens=40), contains="turbine?")

    missing = (await ask(client, "Who guards the heron?", cache="off")).done
    zero = (await ask(client, "Who guards the turbine?", cache="off")).done

    assert missing["estimated"] is True
    assert abs(int(missing["usage"]["output_tokens"]) - 40) <= 2
    assert zero["estimated"] is False
    assert (zero["usage"]["input_tokens"], zero["usage"]["output_tokens"], zero["cost_nanousd"]) == ("0", "0", "0")


async def test_a_line_that_drips_changes_nothing(suite: Suite, client: httpx.AsyncClient) -> None:
    """Events that arrive in halves give the same text and the same bill."""
    await suite.provider.behave(Behaviour(fault="slow_drip", tokens=20))

    answer = await ask(client, "What drips from the wheel?", cache="off")

    assert answer.done["usage"]["output_tokens"] == "20"


async def test_a_user_who_has_just_asked_can_be_erased_at_once(suite: Suite) -> None:
    """Credit is held ready for them at the orchestrator; it is called back. What they cost stays, under another name."""
    async with suite.client("leaver") as leaver, suite.client("admin", roles=("user", "admin")) as admin:
        leaver.headers["idempotency-key"] = "of the leaver"
        answer_id = (await ask(leaver, "What is kept of me?", cache="off")).answer_id
        await operation_of(suite, answer_id)
        await until(
            lambda: suite.rows(
                "SELECT 1 FROM leases l JOIN holds h ON h.hold_id = l.lease_id WHERE h.user_id = 'leaver' AND l.ended_at IS NULL"
            )
        )
        erased = await admin.delete("/v1/admin/users/leaver")
        export = await admin.get("/v1/admin/users/leaver/export")
        anew = await ask(leaver, "Who was here before me?", cache="off")

    assert anew.answer_id != answer_id
    assert (erased.status_code, export.status_code) == (204, 404), erased.text
    assert (await operation_of(suite, answer_id))["user_id"].startswith("erased-")
    assert (await operation_of(suite, answer_id))["cost_nanousd"] > 0
    await books_balance(suite)
