"""Stores that go away and services that are killed: what is asked meanwhile fails by type; afterwards all works and nothing is lost."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from bench.script import Behaviour
from services.orchestrator.attempts import MARK_TOKENS_MAX
from tests.integration.ledger.ledger_kit import audit
from tests.suite import SERVICES, Streamed, Suite, ask, events, ingest, running, until

RECOVERED_WITHIN_S = 20.0
DOCUMENTS = {"The ferry": "The ferry over the Lahn is pulled along a chain. The ferryman is called Anselm."}


@pytest.fixture(scope="module")
async def suite() -> AsyncIterator[Suite]:
    """A suite of its own, because it is taken apart. Whatever is done to it, its books are whole at the end."""
    # What is kept is asked about here, not how fast: a busy machine must not make a slow cache a forgetful one.
    patient = {"TAILRACE_ORCHESTRATOR_CACHE_TIMEOUT_S": "5"}
    async with running(TAILRACE_LEDGER_SWEEP_INTERVAL_MS="200", TAILRACE_LEDGER_SWEEP_GRACE_MS="0", **patient) as suite:
        async with suite.client() as client:
            await ingest(client, DOCUMENTS)
        yield suite
        assert await audit(suite.postgres.url) == {}


@pytest.fixture
async def client(suite: Suite) -> AsyncIterator[httpx.AsyncClient]:
    """A user, a ready suite, and a provider that has forgotten everything."""
    await suite.until_ready()
    await suite.provider.reset()
    async with suite.client() as client:
        yield client


async def until_answered(client: httpx.AsyncClient, question: str) -> Any:
    """The first answer that ends well. Until then every failure must be a typed problem that may be tried again."""

    async def probe() -> Any:
        try:
            async with client.stream("POST", "/v1/answers", json={"question": question, "cache": "off"}) as response:
                body = (await response.aread()).decode()
        except httpx.TransportError:
            return None  # nobody listens while the gateway itself is down
        if response.status_code != 200:
            assert response.status_code == 503, body
            assert int(response.headers["retry-after"]) >= 1
            return None
        return body if "event: done" in body else None

    return await until(probe, RECOVERED_WITHIN_S)


@pytest.mark.parametrize("store", ["postgres", "valkey"])
async def test_a_store_that_is_away_is_named_and_comes_back_by_itself(suite: Suite, client: httpx.AsyncClient, store: str) -> None:
    """Readiness says which; requests that need it get 503 with Retry-After; nothing has to be restarted when it returns."""
    before = {name: process.pid for name, process in suite.processes.items()}
    server = suite.postgres if store == "postgres" else suite.valkey
    await server.stop()
    try:
        said = await suite.until_ready(ready=False)
        response = await client.post("/v1/answers", json={"question": "Who is the ferryman?", "cache": "off", "stream": False})
    finally:
        await server.start()

    assert said.status_code == 503
    assert {"postgres": "postgres", "valkey": "redis"}[store] in said.text
    if store == "postgres":  # money fails closed; limits and the cache may go on without their store
        assert response.status_code == 503, response.text
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["reason"] == "UNAVAILABLE"
    else:
        assert response.status_code in (200, 503), response.text
    await until_answered(client, "Who is the ferryman on the Lahn?")
    await suite.until_ready()
    assert {name: process.pid for name, process in suite.processes.items()} == before


@pytest.mark.parametrize("service", SERVICES)
async def test_a_killed_service_loses_nothing(suite: Suite, client: httpx.AsyncClient, service: str) -> None:
    """kill -9 and a start: the next request works, and documents, answers, cached answers, sessions and books are as they were."""
    question = f"What is pulled along a chain, asks the {service}?"
    asked = await ask(client, question, session_id=f"before-{service}")
    documents = (await client.get("/v1/documents")).json()
    records = await suite.rows("SELECT count(*) AS n FROM operations")

    await suite.kill(service)
    if service != "gateway":  # who else would say so
        await suite.until_ready(ready=False)
    await suite.start(service)
    await suite.until_ready()
    await until_answered(client, f"What is the {service} called?")
    again = await ask(client, question, session_id=f"before-{service}")

    assert (await client.get("/v1/documents")).json() == documents
    assert again.done["cache"]["verdict"] == "exact"
    assert again.text == asked.text
    record = (await client.get(f"/v1/answers/{asked.answer_id}")).raise_for_status().json()
    assert record["text"] == asked.text

    async def all_kept() -> bool:
        """Both answers in the conversation and in the books, where the spool brings them once it has found the ledger again."""
        turns = (await client.get(f"/v1/sessions/before-{service}")).raise_for_status().json()
        after = await suite.rows("SELECT count(*) AS n FROM operations")
        return len(turns["turns"]) == 2 and after[0]["n"] >= records[0]["n"] + 2

    await until(all_kept, RECOVERED_WITHIN_S)


async def test_answers_that_end_while_the_ledger_is_away_are_booked_when_it_returns(suite: Suite, client: httpx.AsyncClient) -> None:
    """The ledger dies in the middle of answers; each still ends with its receipt, and afterwards each is on the books, once."""
    await suite.provider.behave(Behaviour(tokens=60, tokens_per_s=60))
    async with client.stream("POST", "/v1/answers", json={"question": "What does Anselm pull all day?", "cache": "off"}) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if line == "event: delta":
                break
        await suite.kill("ledger")
        rest = [line async for line in lines]
    (record,) = await suite.provider.records()
    assert "event: done" in rest
    await suite.start("ledger")

    rows = await until(lambda: suite.rows("SELECT * FROM attempts WHERE provider_request_id = $1", record.request_id), RECOVERED_WITHIN_S)

    assert [(row["input_tokens"], row["output_tokens"]) for row in rows] == [(record.input_tokens, 60)]


@pytest.mark.parametrize(
    ("kind", "behaviour"),
    [("delta", Behaviour(tokens=2000, tokens_per_s=100)), ("reasoning", Behaviour(reasoning="hmm " * 2000, tokens_per_s=100))],
)
async def test_an_answer_whose_orchestrator_is_killed_is_interrupted_and_paid(
    suite: Suite, client: httpx.AsyncClient, kind: str, behaviour: Behaviour
) -> None:
    """kill -9 in the middle of a stream: the reader is told so by type, what was used is booked from the last mark, what was shown can be
    read again, and the same key begins anew."""
    await suite.provider.behave(behaviour)
    body = {"question": "What does Anselm tell of the ferry and its chain?", "cache": "off", "max_output_tokens": 4000, "reasoning": True}
    key = {"idempotency-key": f"killed-in-the-middle-of-{kind}"}
    read = Streamed()
    async with client.stream("POST", "/v1/answers", json=body, headers=key) as response:
        async for event in events(response):
            read.events.append(event)
            if len(read.data(kind)) > 100 and "orchestrator" in suite.processes:
                await suite.kill("orchestrator")
                await suite.start("orchestrator")
    (record,) = await suite.provider.records()
    assert read.error["reason"] == "ANSWER_INTERRUPTED"
    assert record.state == "client_closed"

    async def probe() -> Any:
        return await suite.rows("SELECT * FROM holds WHERE operation_id = $1::uuid AND state = 'settled'", read.answer_id)

    (hold,) = await until(probe)
    (operation,) = await suite.rows("SELECT * FROM operations WHERE operation_id = $1::uuid", read.answer_id)
    assert (operation["status"], operation["error_reason"], operation["estimated"]) == ("failed", "ANSWER_INTERRUPTED", True)
    steps = (await client.get(f"/v1/answers/{read.answer_id}")).json()["steps"]
    assert [(step["status"], step["facts"]["reason"]) for step in steps if step["name"] == "generate"] == [("failed", "cut_short")]
    over = hold["output_tokens"] - record.output_tokens
    assert -MARK_TOKENS_MAX - 10 <= over <= MARK_TOKENS_MAX // 2  # what no mark has told of is expected at half
    assert hold["input_tokens"] > 0

    again = Streamed()
    async with client.stream("GET", f"/v1/answers/{read.answer_id}/events") as response:
        again.events = [event async for event in events(response)]
    assert again.error["reason"] == "ANSWER_INTERRUPTED"
    assert again.events[:-1] == read.events[: len(again.events) - 1]
    assert len(again.data(kind)) >= len(read.data(kind)) - 64

    await suite.provider.behave(Behaviour(tokens=5))
    async with client.stream("POST", "/v1/answers", json=body, headers=key) as response:
        anew = Streamed([event async for event in events(response)])
    assert anew.done["answer_id"] != read.answer_id


async def test_an_orchestrator_that_must_stop_tells_its_readers_and_exits_in_order(suite: Suite, client: httpx.AsyncClient) -> None:
    """SIGTERM: a short answer ends well, one that outlives the grace is interrupted by type while its reader is still connected, both
    are booked, and the exit code is 0."""
    await suite.stop("orchestrator")
    await suite.until_ready(ready=False)
    await suite.start("orchestrator", TAILRACE_DRAIN_GRACE_MS="3000")
    await suite.until_ready()
    await suite.provider.behave(Behaviour(tokens=30, tokens_per_s=30), contains="the short one")
    await suite.provider.behave(Behaviour(tokens=2000, tokens_per_s=50), contains="the long one")

    async def read(question: str, began: asyncio.Event) -> Streamed:
        answer = Streamed()
        body = {"question": question, "cache": "off", "max_output_tokens": 4000}
        async with client.stream("POST", "/v1/answers", json=body) as response:
            async for event in events(response):
                answer.events.append(event)
                if event.name == "delta":
                    began.set()
        return answer

    begun = [asyncio.Event(), asyncio.Event()]
    readers = [
        asyncio.create_task(read(f"Who is on the ferry, {name}?", event))
        for name, event in zip(("the short one", "the long one"), begun, strict=True)
    ]
    for event in begun:
        await event.wait()
    code = await suite.stop("orchestrator")
    await suite.start("orchestrator")
    ended, interrupted = [await reader for reader in readers]

    assert code == 0
    assert ended.done["usage"]["output_tokens"] == "30"
    assert interrupted.error["reason"] == "ANSWER_INTERRUPTED"
    for answer, status in ((ended, "done"), (interrupted, "failed")):
        rows = await until(lambda: suite.rows("SELECT status FROM operations WHERE operation_id = $1::uuid", answer.answer_id))  # noqa: B023
        assert [row["status"] for row in rows] == [status]

    async def none_held() -> bool:
        return await suite.rows("SELECT 1 FROM holds WHERE state = 'reserved' AND price_id IS NOT NULL") == []

    await until(none_held)
