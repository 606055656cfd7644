"""Calls to the three services behind the gateway, each counted and timed as one hop. What is asked of them, the routes decide."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import Caller, open_channel
from services.chassis.errors import DomainError, Internal, NotFound, Overloaded, Unavailable
from services.chassis.passport import Passport
from services.chassis.principal import Principal
from services.chassis.tls import MutualTls
from services.gateway.limits import Allowance, Ending, Entitlements, tokens_in
from services.gateway.metrics import Metrics
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.ledger.v1.ledger_service_pb2_grpc import LedgerServiceStub
from tailrace.orchestrator.v1.orchestrator_service_pb2_grpc import OrchestratorServiceStub
from tailrace.retrieval.v1.retrieval_service_pb2_grpc import RetrievalServiceStub

GATEWAY = Principal("tailrace", "gateway", frozenset({"service"}))
"""The gateway itself, where it asks on nobody's behalf."""
HEALTH_TIMEOUT_S = 0.8
ROWS_MAX = 10_000
STREAMS_MAX = 1500
"""Calls in flight on one channel; beyond it new ones are refused here instead of failing anywhere."""


class Peer:
    """One service, by name, over one long-lived channel."""

    def __init__(self, name: str, channel: grpc.aio.Channel, caller: Caller, metrics: Metrics) -> None:
        self.name = name
        self.dependencies: dict[str, bool] = {}
        """What its health said of its own dependencies, at the latest probe."""
        self._channel = channel
        self._caller = caller
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self._hop = metrics.hop("gateway", name)
        self._seconds = metrics.hop_seconds.labels(name)
        self._errors = metrics.hop_errors.labels(name)

    async def unary(
        self, method: Any, request: Any, *, timeout_s: float = 5.0, principal: Principal | None = None, idempotent: bool = True
    ) -> Any:
        """One call. See Caller.unary."""
        began = time.perf_counter()
        self._enter()
        try:
            reply = await self._caller.unary(method, request, timeout_s=timeout_s, principal=principal, idempotent=idempotent)
        except DomainError as error:
            self.observe(began, error)
            raise
        finally:
            self._hop.in_flight -= 1
        self.observe(began, None)
        return reply

    @contextlib.asynccontextmanager
    async def stream(self, method: Any, request: Any, *, timeout_s: float, principal: Principal | None = None) -> AsyncIterator[Any]:
        """Open a stream. Leaving the block cancels what is left of it. See Caller.stream."""
        began = time.perf_counter()
        self._enter()
        try:
            async with self._caller.stream(method, request, timeout_s=timeout_s, principal=principal) as messages:
                yield _Timed(messages, self, began)
        finally:
            self._hop.in_flight -= 1

    async def rows(self, method: Any, request: Any, *, timeout_s: float = 10.0, principal: Principal | None = None) -> list[Any]:
        """Every message of a short stream. Raises Internal if it is none: what has more than ROWS_MAX must be asked for by pages."""
        rows: list[Any] = []
        async with self.stream(method, request, timeout_s=timeout_s, principal=principal) as messages:
            async for message in messages:
                if len(rows) == ROWS_MAX:
                    raise Internal(f"{self.name} sent more than {ROWS_MAX} rows")
                rows.append(message)
        return rows

    def observe(self, began: float, error: DomainError | None) -> None:
        """Count one call that began at `began`. Only trouble of the other side is an error of the hop."""
        elapsed_s = time.perf_counter() - began
        failed = error is not None and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN")
        self._hop.observe(elapsed_s * 1000, failed=failed)
        self._seconds.observe(elapsed_s)
        if failed:
            self._errors.inc()

    async def probe(self) -> None:
        """Ask for its health; `dependencies` says what it lacks.

        Raises Unavailable if it is away or not ready, TimeoutError if it is silent.
        """
        try:
            reply = await self._health.List(health_pb2.HealthListRequest(), timeout=HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"{self.name} does not answer") from error
            self.dependencies = {}
            raise Unavailable(f"{self.name} cannot be reached", dependency=self.name) from error
        serving = {name: status.status == health_pb2.HealthCheckResponse.SERVING for name, status in reply.statuses.items()}
        self.dependencies = {name.removeprefix("dependency."): state for name, state in serving.items() if name.startswith("dependency.")}
        if not serving.get("", False):
            raise Unavailable(f"{self.name} is not ready", dependency=self.name)

    async def close(self) -> None:
        await self._channel.close()

    def _enter(self) -> None:
        if self._hop.in_flight >= STREAMS_MAX:
            raise Overloaded(f"too many calls to {self.name} are under way", retry_after_ms=1000)
        self._hop.in_flight += 1


class _Timed:
    """The messages of a stream; the first one, or the error instead of it, is the hop's latency."""

    def __init__(self, messages: Any, peer: Peer, began: float) -> None:
        self._messages = messages
        self._peer = peer
        self._began = began
        self._observed = False

    def __aiter__(self) -> "_Timed":
        return self

    async def __anext__(self) -> Any:
        if self._observed:
            return await self._messages.__anext__()
        self._observed = True
        try:
            message = await self._messages.__anext__()
        except DomainError as error:
            self._peer.observe(self._began, error)
            raise
        except StopAsyncIteration:
            self._peer.observe(self._began, None)
            raise
        self._peer.observe(self._began, None)
        return message


class Orchestrator(Peer):
    """The orchestrator, with its methods."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller, metrics: Metrics) -> None:
        super().__init__("orchestrator", channel, caller, metrics)
        self.stub: Any = OrchestratorServiceStub(channel)


class Retrieval(Peer):
    """Retrieval, with its methods."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller, metrics: Metrics) -> None:
        super().__init__("retrieval", channel, caller, metrics)
        self.stub: Any = RetrievalServiceStub(channel)


class Ledger(Peer):
    """The ledger, with its methods and the two questions the edge itself asks."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller, metrics: Metrics) -> None:
        super().__init__("ledger", channel, caller, metrics)
        self.stub: Any = LedgerServiceStub(channel)

    async def entitlements(self, principal: Principal) -> Entitlements:
        """What the principal's plan gives."""
        reply = await self.unary(self.stub.GetEntitlements, ledger.GetEntitlementsRequest(), timeout_s=1.0, principal=principal)
        plan = reply.plan
        return Entitlements(
            _allowance(plan),
            _allowance(plan.tenant_limits),
            _allowance(plan.key_limits),
            plan.answer_deadline_ms,
            plan.name,
            frozenset(plan.tiers),
            tuple(plan.tools),
            plan.cache_scope,
        )

    async def ending_booked(self, principal: Principal, answer_id: str) -> Ending | None:
        """How an answer of `principal` ended; None as long as its end is not in the books."""
        request = ledger.GetOperationRequest(operation_id=answer_id)
        try:
            reply = await self.unary(self.stub.GetOperation, request, timeout_s=2.0, principal=principal)
        except NotFound:
            return None
        operation = reply.operation
        return Ending(tokens_in(operation.usage), lasts=operation.status == "done") if operation.status else None

    async def resolve_api_key(self, secret: str) -> Principal | None:
        """Whose key this is; None if it is nobody's."""
        reply = await self.unary(self.stub.ResolveApiKey, ledger.ResolveApiKeyRequest(secret=secret), timeout_s=2.0, principal=GATEWAY)
        if not reply.HasField("principal") or not reply.principal.tenant:
            return None
        owner = reply.principal
        return Principal(owner.tenant, owner.user, frozenset(owner.roles), owner.api_key_id, frozenset(owner.scopes))


def _allowance(limits: Any) -> Allowance:
    return Allowance(limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_answers)


class Backends:
    """The three services."""

    def __init__(self, orchestrator: Orchestrator, retrieval: Retrieval, ledger: Ledger) -> None:
        self.orchestrator = orchestrator
        self.retrieval = retrieval
        self.ledger = ledger

    @property
    def all(self) -> tuple[Peer, ...]:
        return self.orchestrator, self.retrieval, self.ledger


@contextlib.asynccontextmanager
async def connected(targets: dict[str, str], passport: Passport, metrics: Metrics, tls: MutualTls | None = None) -> AsyncIterator[Backends]:
    """Channels to the services at `targets`, by their names. Errors name the service, not its address."""

    async with contextlib.AsyncExitStack() as stack:

        async def channel_to(name: str) -> tuple[grpc.aio.Channel, Caller]:
            channel = open_channel(targets[name], tls)
            stack.push_async_callback(channel.close)
            return channel, Caller(name, passport)

        yield Backends(
            Orchestrator(*await channel_to("orchestrator"), metrics),
            Retrieval(*await channel_to("retrieval"), metrics),
            Ledger(*await channel_to("ledger"), metrics),
        )
