"""The provider simulator speaks Anthropic's format to the real SDK, fails as told, and keeps true books."""

import asyncio
import time
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic import AsyncAnthropic

from bench.provider import Simulator
from bench.script import Behaviour, Record, answer_text, count_input_tokens
from tests.suite import until

PASSAGES = '<passage number="1">[1] A tailrace carries water away.</passage>\n\nWhat is a tailrace?'


def asked(question: str = PASSAGES, **extra: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-5-5", "max_tokens": 1000, "messages": [{"role": "user", "content": question}], **extra}


async def streamed(client: AsyncAnthropic, question: str = PASSAGES, **extra: Any) -> tuple[str, Any]:
    async with client.messages.stream(**asked(question, **extra)) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        return text, await stream.get_final_message()


async def only_record(provider: Simulator, state: str) -> Record:
    """The one record, once it has reached `state`."""
    async with asyncio.timeout(5):
        while True:
            records = await provider.records()
            if len(records) == 1 and records[0].state == state:
                return records[0]
            await asyncio.sleep(0.005)


async def test_the_sdk_streams_the_scripted_text_and_the_books_agree_with_its_usage(provider: Simulator, client: AsyncAnthropic) -> None:
    """What the client was told it used is what the simulator says it billed."""
    await provider.behave(Behaviour(tokens=30))

    text, final = await streamed(client, system="Be short.")
    record = await only_record(provider, "finished")

    assert text == answer_text(Behaviour(tokens=30), cites=True)
    assert "[1]" in text
    assert (final.usage.input_tokens, final.usage.output_tokens) == (record.input_tokens, record.output_tokens)
    assert (record.output_tokens, final.stop_reason, final.model) == (30, "end_turn", "claude-haiku-5-5")
    assert record.input_tokens == count_input_tokens(asked(system="Be short."))


async def test_the_sdk_reads_a_whole_message(provider: Simulator, client: AsyncAnthropic) -> None:
    """Without `stream` the same answer comes as one document."""
    await provider.behave(Behaviour(tokens=12))

    whole = await client.messages.create(**asked("No documents here."), system="Cite like [1].")

    assert whole.content[0].text == answer_text(Behaviour(tokens=12), cites=False)
    assert "[1]" not in whole.content[0].text
    assert (whole.usage.output_tokens, whole._request_id) == (12, (await provider.records())[0].request_id)


async def test_tokens_are_counted_by_the_same_rule(provider: Simulator, client: AsyncAnthropic) -> None:
    """count_tokens and the bill never differ."""
    counted = await client.messages.count_tokens(model="claude-haiku-5-5", messages=asked()["messages"], system="Be short.")

    assert counted.input_tokens == count_input_tokens(asked(system="Be short."))


async def test_max_tokens_of_the_request_cut_the_answer(provider: Simulator, client: AsyncAnthropic) -> None:
    """The answer ends at the limit and says so."""
    await provider.behave(Behaviour(tokens=50))

    _, final = await streamed(client, max_tokens=7)

    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 7)


async def test_time_to_first_token_and_pace_are_kept(provider: Simulator, client: AsyncAnthropic) -> None:
    """The first token comes at its time and the last one when the pace says."""
    await provider.behave(Behaviour(ttft_ms=80, tokens=21, tokens_per_s=200))
    began = time.perf_counter()

    async with client.messages.stream(**asked()) as stream:
        arrivals = [time.perf_counter() - began async for _ in stream.text_stream]

    assert arrivals[0] >= 0.08
    assert arrivals[-1] >= 0.18


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.APIStatusError),
    ],
)
async def test_a_refusal_by_status_reaches_the_sdk_by_type(
    provider: Simulator, client: AsyncAnthropic, status: int, error: type[anthropic.APIStatusError]
) -> None:
    """Error bodies have the provider's shape, and a refused request bills nothing."""
    await provider.behave(Behaviour(fault="status", status=status, retry_after_s=2))

    with pytest.raises(error) as raised:
        await streamed(client)
    record = await only_record(provider, "refused")

    assert (raised.value.status_code, raised.value.response.headers["retry-after"]) == (status, "2")
    assert raised.value.body["request_id"] == record.request_id  # type: ignore[index, call-overload]
    assert (record.input_tokens, record.output_tokens) == (0, 0)


async def test_a_fault_can_strike_only_the_first_requests(provider: Simulator, client: AsyncAnthropic) -> None:
    """So that a retry succeeds."""
    await provider.behave(Behaviour(fault="status", status=529, retry_after_s=0, fail_first=2, tokens=5))

    await streamed(client.with_options(max_retries=2))

    assert [record.state for record in await provider.records()] == ["refused", "refused", "finished"]


@pytest.mark.parametrize("fault", ["cut_after", "end_after", "malformed", "error_in_200"])
async def test_a_fault_in_the_middle_keeps_what_was_sent(provider: Simulator, client: AsyncAnthropic, fault: Any) -> None:
    """The tokens before the fault arrive and are billed; the answer never looks whole."""
    await provider.behave(Behaviour(fault=fault, fault_at=4, tokens=10))
    got: list[str] = []

    stopped = None
    try:
        async with client.messages.stream(**asked()) as stream:
            async for event in stream:
                if event.type == "text":
                    got.append(event.text)
            stopped = stream.current_message_snapshot.stop_reason
    except (anthropic.APIError, httpx2.RemoteProtocolError, ValueError):
        pass  # `end_after` is the one the SDK does not notice by itself
    record = await only_record(provider, "faulted")

    assert (len(got), stopped) == (4, None)
    assert record.output_tokens == 4


@pytest.mark.parametrize("fault", ["cut_before_first", "hang", "stall_after"])
async def test_silence_and_a_closed_door_are_errors_of_the_connection(provider: Simulator, client: AsyncAnthropic, fault: Any) -> None:
    """Nothing arrives, and nothing is billed for the answer."""
    await provider.behave(Behaviour(fault=fault))

    with pytest.raises((anthropic.APIConnectionError, httpx2.ReadTimeout)):
        await streamed(client.with_options(timeout=0.2))

    assert [record.output_tokens for record in await provider.records()] == [0]


async def test_every_pause_inside_an_event_is_survived(provider: Simulator, client: AsyncAnthropic) -> None:
    """A line that drips changes no text."""
    await provider.behave(Behaviour(fault="slow_drip", tokens=8))

    text, final = await streamed(client)

    assert (text, final.usage.output_tokens) == (answer_text(Behaviour(tokens=8), cites=True), 8)


@pytest.mark.parametrize(("fault", "reason"), [("refusal", "refusal"), ("context_window", "model_context_window_exceeded")])
async def test_other_ends_are_said(provider: Simulator, client: AsyncAnthropic, fault: Any, reason: str) -> None:
    """The stop reason is the scripted one."""
    await provider.behave(Behaviour(fault=fault))

    assert (await streamed(client))[1].stop_reason == reason


async def test_a_client_that_leaves_is_seen_at_once_and_billed_for_what_was_made(provider: Simulator, client: AsyncAnthropic) -> None:
    """The record says who closed, when, and how many tokens had been made by then."""
    await provider.behave(Behaviour(tokens=1000, tokens_per_s=100))

    async with client.messages.stream(**asked()) as stream:
        async for _ in stream.text_stream:
            break

    async def closed() -> bool:  # its side of the line is heard of first
        return (await only_record(provider, "client_closed")).closed_s is not None

    await until(closed, 5)
    record = await only_record(provider, "client_closed")

    assert 1 <= record.output_tokens < 100
    assert record.closed_s is not None
    assert record.last_token_s is not None
    assert record.closed_s >= record.last_token_s


async def test_a_rule_answers_only_requests_that_contain_its_text(provider: Simulator, client: AsyncAnthropic) -> None:
    """So that tests can run side by side on one simulator."""
    await provider.behave(Behaviour(text="plain"))
    await provider.behave(Behaviour(text="special [1]"), contains="heron")

    texts = [(await streamed(client, question))[0] for question in ("a heron?", "a duck?")]

    assert texts == ["special [1]", "plain"]


async def test_what_the_provider_would_refuse_is_refused(provider: Simulator) -> None:
    """Missing headers, broken JSON and missing fields are errors of the provider's shape."""
    good = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    async with httpx.AsyncClient(base_url=provider.url, trust_env=False) as http:
        answers = [
            await http.post("/v1/messages", json=asked()),
            await http.post("/v1/messages", json=asked(), headers={"x-api-key": "k"}),
            await http.post("/v1/messages", content=b"{", headers=good),
            await http.post("/v1/messages", json={**asked(), "messages": []}, headers=good),
            await http.post("/v1/other", json=asked(), headers=good),
            await http.put("/control/default", json={"tokkens": 3}),
        ]

    assert [answer.status_code for answer in answers] == [401, 400, 400, 400, 404, 400]
    assert {answer.json()["type"] for answer in answers} == {"error"}
    assert await provider.records() == []


async def test_answers_that_wait_are_let_go_together(provider: Simulator, client: AsyncAnthropic) -> None:
    """Streamed and whole ones, and those that come later; after a reset others wait again."""
    waiting = Behaviour(waits=True, tokens=3)
    await provider.behave(waiting)
    asking = asyncio.gather(streamed(client), client.messages.create(**asked()))

    async def both_wait() -> bool:
        return len(await provider.records()) == 2

    await until(both_wait, 5)
    silent = [record.head_s for record in await provider.records()]
    await provider.release()
    (text, _), whole = await asking
    later, _ = await streamed(client)
    await provider.reset()
    await provider.behave(waiting)
    with pytest.raises((anthropic.APIConnectionError, httpx2.ReadTimeout)):
        await streamed(client.with_options(timeout=0.2))

    assert silent == [None, None]
    assert text == whole.content[0].text == later == answer_text(waiting, cites=True)
