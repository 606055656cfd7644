"""An embedder that costs money, before a real ledger and a real HTTP service: nothing is sent that cannot be paid, and all is booked."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from services.chassis.afterwork import AfterWork
from services.chassis.channel import Caller, open_channel
from services.chassis.clock import SystemClock
from services.chassis.errors import BudgetExhausted, DomainError, ModelRefused, Overloaded, PriceUnknown, Unavailable
from services.chassis.passport import Passport
from services.chassis.principal import Principal, set_current
from services.chassis.wire import timestamp
from services.local.stores import Postgres
from services.retrieval.clients import LedgerBooks
from services.retrieval.config import Settings
from services.retrieval.embedders import payable
from services.retrieval.ports import Embedder, Unpayable
from services.retrieval.question_lane import QuestionLane
from services.retrieval.wiring import _opened
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.fakes.embedding_service import DIMENSION, EmbeddingService, embedding_service
from tests.integration.ledger.ledger_kit import INTERNAL_KEY, Ledger, audit, fresh_database, running
from tests.integration.retrieval.retrieval_kit import running as serving
from tests.suite import until

MODEL = "text-embedding-3-large"
TOKEN_NANOUSD = 130
"""0.13 USD a million."""


@dataclass
class World:
    """One who asks, and what is behind."""

    embedder: Embedder
    service: EmbeddingService
    ledger: Ledger
    afterwork: AfterWork
    payer: Principal

    async def booked(self) -> list[pb.Operation]:
        """What is recorded of the payer when nothing is under way any more, oldest first."""
        assert await self.afterwork.drain(20) == 0
        rows = await self.ledger.rows("ListOperations", pb.ListOperationsRequest(), self.payer)
        return [row.operation for row in rows][::-1]

    async def budget(self, tokens: int) -> None:
        """Let the payer afford so many tokens this month."""
        put = pb.PutBudgetRequest(scope="user", subject=self.payer.user, period="month", limit_nanousd=tokens * TOKEN_NANOUSD)
        await self.ledger.ask("PutBudget", put, Principal(self.payer.tenant, "boss", frozenset({"user", "admin"})))


def settings(folder: Path, url: str, **values: Any) -> Settings:
    given = {
        "state_dir": folder,
        "internal_key": INTERNAL_KEY,
        "embedder_url": url,
        "embedder_key": "k",
        "embedder_dimensions": DIMENSION,
        "embedder_billed": "yes",
    }
    return Settings.model_validate({**given, **values})


@pytest.fixture(scope="module")
async def ledger(postgres: Postgres) -> AsyncIterator[Ledger]:
    async with running(await fresh_database(postgres)) as made:
        yield made


@contextlib.asynccontextmanager
async def opened_world(ledger: Ledger, folder: Path, name: str = f"openai:{MODEL}", **values: Any) -> AsyncIterator[World]:
    afterwork = AfterWork()
    payer = Principal("acme", f"ann-{secrets.token_hex(4)}")
    set_current(payer)
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(embedding_service())
        channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{ledger.port}"))
        books = LedgerBooks(channel, Caller("ledger", Passport(INTERNAL_KEY.encode())))
        given = settings(folder, f"{service.url}/v1", **values)
        embedder = await stack.enter_async_context(_opened(given, books, SystemClock(), afterwork, name))
        yield World(embedder, service, ledger, afterwork, payer)
        await afterwork.drain(20)


@pytest.fixture
async def world(ledger: Ledger, state_dir: Path) -> AsyncIterator[World]:
    async with opened_world(ledger, state_dir) as made:
        yield made
    assert await audit(ledger.url) == {}


async def test_documents_are_booked_with_what_their_provider_counted(world: World) -> None:
    """A request is an operation of its own with one attempt, for whoever asked."""
    embedded = await world.embedder.embed_texts(["an otter", "a heron"])
    (operation,) = await world.booked()
    (attempt,) = operation.attempts

    assert embedded.tokens == 6
    assert (operation.purpose, operation.status, operation.provider, operation.model) == ("embed", "done", "openai", MODEL)
    assert (operation.usage.input_tokens, operation.cost_nanousd, operation.estimated) == (6, 6 * TOKEN_NANOUSD, False)
    assert (attempt.cost_nanousd, attempt.estimated, attempt.not_sent) == (6 * TOKEN_NANOUSD, False, False)


async def test_a_question_is_booked_by_our_own_count_and_says_so(world: World) -> None:
    """It may have shared its request with somebody else's."""
    await world.embedder.embed_question("Where does the otter sleep?")
    (operation,) = await world.booked()

    assert (operation.status, operation.estimated) == ("done", True)
    assert operation.usage.input_tokens == sum(world.embedder.count_tokens(["Where does the otter sleep?"]))


async def test_more_texts_than_fit_into_a_request_are_paid_a_request_at_a_time(ledger: Ledger, state_dir: Path) -> None:
    """What the first ones cost is known when a later one fails."""
    async with opened_world(ledger, state_dir, embedder_batch=2) as world:
        await world.embedder.embed_texts([f"text {number}" for number in range(5)])
        booked = await world.booked()

    assert [operation.usage.input_tokens for operation in booked] == [6, 6, 3]


async def test_what_cannot_be_paid_is_not_sent(world: World) -> None:
    """With what is left and what was needed."""
    await world.budget(10)
    with pytest.raises(BudgetExhausted) as refused:
        await world.embedder.embed_texts(["a text of more than ten bytes"])

    assert refused.value.metadata["left_nanousd"] == str(10 * TOKEN_NANOUSD)
    assert (world.service.asked, await world.booked()) == ([], [])


async def test_parallel_requests_never_pass_a_budget(world: World) -> None:
    """Each text has 8 bytes, and 16 tokens are allowed for what a provider puts around it: five can be under way."""
    world.service.held = asyncio.Event()
    await world.budget(5 * 24)
    asking = [asyncio.create_task(world.embedder.embed_texts([f"otter {number:02}"])) for number in range(20)]

    async def decided() -> bool:
        return sum(task.done() for task in asking) == 15 and world.service.busy == 4  # so many requests are made at a time

    await until(decided)
    world.service.held.set()
    ends = await asyncio.gather(*asking, return_exceptions=True)

    assert [type(end) for end in ends if isinstance(end, BaseException)] == [BudgetExhausted] * 15
    assert len(await world.booked()) == 5


async def test_an_embedder_without_a_price_is_refused(ledger: Ledger, state_dir: Path) -> None:
    """Nothing is given away."""
    async with opened_world(ledger, state_dir, "openai:nobody-knows-it") as world:
        with pytest.raises(PriceUnknown):
            await world.embedder.embed_question("Where?")

        assert world.service.asked == []


@pytest.mark.parametrize(
    ("failure", "error", "tokens", "estimated"),
    [
        (JSONResponse({}, 400), ModelRefused, 0, False),
        (JSONResponse({}, 503), Unavailable, 0, False),
        (None, Unavailable, "counted", True),
    ],
    ids=["refused", "overloaded", "silent"],
)
async def test_a_failure_costs_nothing_unless_nobody_knows(
    ledger: Ledger, state_dir: Path, failure: Any, error: type[DomainError], tokens: Any, estimated: bool
) -> None:
    """A provider that was sent it and said nothing may bill for it."""
    async with opened_world(ledger, state_dir, embedder_timeout_s=30 if failure else 0.5) as world:
        world.service.held, world.service.failures = asyncio.Event(), [failure, failure]
        if failure:
            world.service.held.set()
        with pytest.raises(error):
            await world.embedder.embed_texts(["an otter and a heron"])
        world.service.held.set()
        (operation,) = await world.booked()
        counted = sum(world.embedder.count_tokens(["an otter and a heron"]))

    assert (operation.status, operation.error_reason) == ("failed", error.reason)
    assert (operation.usage.input_tokens, operation.estimated) == (counted if tokens == "counted" else tokens, estimated)


async def test_who_stops_waiting_pays_for_what_was_sent(world: World) -> None:
    world.service.held = asyncio.Event()
    asking = asyncio.create_task(world.embedder.embed_texts(["an otter"]))
    await world.service.until_busy(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    world.service.held.set()
    (operation,) = await world.booked()

    assert (operation.status, operation.error_reason, operation.estimated) == ("cancelled", "ANSWER_CANCELLED", True)
    assert operation.usage.input_tokens == sum(world.embedder.count_tokens(["an otter"]))


async def test_what_never_left_is_given_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More questions wait than may: the hold is voided, not settled."""
    monkeypatch.setattr(QuestionLane.embed, "__defaults__", (0,))
    with pytest.raises(Overloaded):
        await world.embedder.embed_question("Where?")
    (operation,) = await world.booked()

    assert (operation.attempts[0].not_sent, operation.cost_nanousd) == (True, 0)


async def test_while_the_ledger_is_away_nothing_is_sent(state_dir: Path, postgres: Postgres) -> None:
    """What it costs could not be set aside."""
    async with contextlib.AsyncExitStack() as until_away:
        ledger = await until_away.enter_async_context(running(await fresh_database(postgres)))
        async with opened_world(ledger, state_dir) as world:
            await world.embedder.embed_question("Where?")
            await world.booked()
            await until_away.aclose()
            with pytest.raises(Unpayable):
                await world.embedder.embed_question("Where else?")

            assert len(world.service.asked) == 1


async def test_usage_tells_embeddings_apart(world: World) -> None:
    await world.embedder.embed_texts(["an otter"])
    await world.booked()
    request = pb.QueryUsageRequest(group_by=["purpose"], to=timestamp(datetime.now(UTC)))
    (row,) = await world.ledger.rows("QueryUsage", request, world.payer)

    assert (row.group["purpose"], row.cost_nanousd) == ("embed", 3 * TOKEN_NANOUSD)
    assert row.usage == common_pb2.Usage(input_tokens=3)


async def test_documents_are_paid_by_the_key_they_came_with(ledger: Ledger, tmp_path: Path) -> None:
    """Its budget as well as its user's, whichever replica works on them: a key that is spent takes in nothing that costs."""
    ann, boss = f"ann-{secrets.token_hex(4)}", Principal("acme", "boss", frozenset({"user", "admin"}))
    made = [
        await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(user=ann, roles=["user"], name=name), boss) for name in ("poor", "rich")
    ]
    poor, rich = (Principal("acme", ann, api_key_id=reply.key.key_id) for reply in made)
    put = pb.PutBudgetRequest(scope="key", subject=poor.api_key_id, period="month", limit_nanousd=TOKEN_NANOUSD)
    await ledger.ask("PutBudget", put, boss)
    files: dict[str, bytes | str] = {"otter.txt": "The otter sleeps afloat."}
    async with embedding_service() as service:
        given = settings(
            tmp_path, f"{service.url}/v1", embedder=f"openai:{MODEL}", port=0, ledger_target=f"127.0.0.1:{ledger.port}", ingest_workers=1
        )
        async with serving(given) as retrieval:
            retrieval.caller = Caller("retrieval", Passport(INTERNAL_KEY.encode()))
            refused = await retrieval.ingest(poor, files)
            asked = list(service.asked)
            taken = await retrieval.ingest(rich, files)
    rows = await ledger.rows("ListOperations", pb.ListOperationsRequest(), rich)

    assert ("failed", "BUDGET_EXHAUSTED", []) == (refused[-1].stage, refused[-1].error_reason, asked)
    assert ("indexed", 1) == (taken[-1].stage, len(service.asked))
    assert [rich.api_key_id] == [row.operation.api_key_id for row in rows]


@pytest.mark.parametrize(
    ("name", "url", "billed", "expected"),
    [
        ("openai:m", "", "auto", ("openai", "m")),
        ("openai:m", "https://api.openai.com/v1/", "auto", ("openai", "m")),
        ("voyage:m", "", "auto", ("voyage", "m")),
        ("gemini:m", "", "auto", ("gemini", "m")),
        ("openai:m", "http://tei:8080/v1", "auto", None),
        ("openai:m", "http://proxy/v1", "yes", ("openai", "m")),
        ("openai:m", "", "no", None),
        ("minilm-int8", "", "yes", None),
        ("fastembed:m", "", "yes", None),
    ],
)
def test_a_vendors_own_address_costs_money(name: str, url: str, billed: str, expected: tuple[str, str] | None, tmp_path: Path) -> None:
    """What else speaks its format is one's own, unless one says otherwise."""
    assert payable(name, settings(tmp_path, url, embedder_billed=billed)) == expected
