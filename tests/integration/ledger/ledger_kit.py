"""A real ledger on a real database, seen through a real channel, and the auditor who checks its books."""

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.chassis.channel import Caller, open_channel
from services.chassis.clock import Clock
from services.chassis.lifecycle import started
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger.config import Settings
from services.ledger.verify import verify
from services.ledger.wiring import build
from services.local.stores import Postgres
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc

INTERNAL_KEY = "an internal key for tests"
RECORDER = Principal("tailrace", "orchestrator", frozenset({"service"}))
HAIKU = ("anthropic", "claude-haiku-4-5")
"""1 USD in, 5 USD out: a token costs 1000 and 5000 nano-USD."""


async def fresh_database(server: Postgres) -> str:
    """Create an empty database and return its address."""
    name = f"ledger_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(server.url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return server.url.rsplit("/", 1)[0] + f"/{name}"


def settings(url: str, **more: str) -> Settings:
    """Settings on a free port, with a sweeper that comes only when called."""
    environ = {
        "DATABASE_URL": url,
        "TAILRACE_INTERNAL_KEY": INTERNAL_KEY,
        "TAILRACE_LEDGER_PORT": "0",
        "TAILRACE_LEDGER_SWEEP_INTERVAL_MS": "600000",
        "TAILRACE_LEDGER_SWEEP_GRACE_MS": "0",
    }
    return Settings.load({**environ, **more})


@dataclass
class Ledger:
    """A running ledger."""

    url: str
    stub: Any
    caller: Caller
    stop: Callable[[], None]
    """Ends the endless calls, as a stop signal would."""
    port: int = 0

    async def ask(self, method: str, request: Any, principal: Principal) -> Any:
        return await self.caller.unary(getattr(self.stub, method), request, principal=principal, timeout_s=20)

    async def rows(self, method: str, request: Any, principal: Principal) -> list[Any]:
        """Everything a server stream has to say."""
        async with self.caller.stream(getattr(self.stub, method), request, timeout_s=20, principal=principal) as messages:
            return [message async for message in messages]

    async def record(self, *operations: pb.Operation, principal: Principal = RECORDER) -> list[Any]:
        """Record operations on one stream; return the acks."""

        async def requests() -> AsyncIterator[pb.RecordOperationsRequest]:
            for number, operation in enumerate(operations, 1):
                yield pb.RecordOperationsRequest(record_id=number, operation=operation)

        async with self.caller.stream(self.stub.RecordOperations, requests(), timeout_s=20, principal=principal) as acks:
            return [ack async for ack in acks]

    async def reserve(self, principal: Principal, operation_id: str = "", **changes: Any) -> Any:
        """Reserve 1000 tokens in and 1000 out: 7,000,000 nano-USD, as every prompt token might be written to the one-hour cache."""
        provider, model = HAIKU
        fields = {
            "operation_id": operation_id or str(uuid.uuid4()),
            "attempt": 1,
            "provider": provider,
            "model": model,
            "input_tokens_max": 1000,
            "output_tokens_max": 1000,
            "ttl_ms": 60_000,
        }
        return await self.ask("Reserve", pb.ReserveRequest(**{**fields, **changes}), principal)


@contextlib.asynccontextmanager
async def running(url: str, clock: Clock | None = None, **more: str) -> AsyncIterator[Ledger]:
    """A ledger on `url`, in this process, on a free port."""
    given = settings(url, **more)
    async with build(given, clock) as service:
        async with started(service, given.bind_host) as port:
            assert service.stopping is not None
            channel = open_channel(f"127.0.0.1:{port}")
            try:
                caller = Caller("ledger", Passport(INTERNAL_KEY.encode()))
                yield Ledger(url, ledger_service_pb2_grpc.LedgerServiceStub(channel), caller, service.stopping, port)
            finally:
                await channel.close()
        service.stopping()
        await service.server.stop(0, 10)


def operation(principal: Principal, operation_id: str = "", **changes: Any) -> pb.Operation:
    """A finished operation with two steps and no provider call."""
    fields: dict[str, Any] = {
        "operation_id": operation_id or str(uuid.uuid4()),
        "tenant": principal.tenant,
        "user": principal.user,
        "session_id": "s1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "status": "done",
        "tier": "fast",
        "provider": HAIKU[0],
        "model": HAIKU[1],
        "finish_reason": "end_turn",
        "cache": common_pb2.CacheReceipt(verdict="miss", reason="no_candidate"),
        "created_at": timestamp(datetime.now(UTC)),
        "first_token_ms": 20.0,
        "duration_ms": 100.0,
        "collection": "default",
        "steps": [
            common_pb2.StepTiming(name="recall", status="done", started_ms=0, duration_ms=10, facts={"verdict": "miss"}),
            common_pb2.StepTiming(name="generate", status="done", started_ms=10, duration_ms=80),
        ],
    }
    return pb.Operation(**{**fields, **changes})


def attempt(number: int = 1, input_tokens: int = 100, output_tokens: int = 10, **changes: Any) -> pb.Attempt:
    """A provider call that used what is said."""
    usage = common_pb2.Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    fields: dict[str, Any] = {"attempt": number, "provider": HAIKU[0], "model": HAIKU[1], "usage": usage, "finish_reason": "end_turn"}
    return pb.Attempt(**{**fields, **changes})


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait until a coroutine function returns something true."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.02)


class SetClock:
    """A clock that shows what it is set to."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.moment.timestamp()


async def value(url: str, query: str, *arguments: object) -> object:
    """What one query says, on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def audit(url: str) -> dict[str, str]:
    """The laws that the books break, each with its first bad row and what is wrong there."""
    return {finding.law: f"{finding.at}: {finding.wrong}" for finding in await verify(url) if finding.broken}
