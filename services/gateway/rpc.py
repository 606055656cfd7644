"""The same calls over gRPC, for internal services that hold a token. It admits and passes on; messages go through as they are."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from services.chassis import telemetry
from services.chassis.calls import stopped_as
from services.chassis.deadline import current_deadline
from services.chassis.errors import AnswerInterrupted
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Identify
from services.gateway.answer_stream import AnswerStream
from services.gateway.clients import Peer
from services.gateway.deadlines import of_call_ms
from services.gateway.documents import INGEST_TIMEOUT_S
from services.gateway.identity import Identity, credential_in
from services.gateway.kit import Kit
from services.gateway.limits import LimitReached, Metered
from services.gateway.request_ids import id_headers, request_id_of
from services.gateway.rules import ANY_MEMBER, RPC_RULES, Rule
from tailrace.gateway.v1 import gateway_service_pb2, gateway_service_pb2_grpc

SERVICE = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
ROWS_TIMEOUT_S = 30.0


def token_identity(identity: Identity) -> Identify:
    """Identify callers by the credential in their metadata. Whatever else they send of a principal is not looked at."""

    async def identify(context: grpc.aio.ServicerContext) -> Principal:
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]
        # First, so that whatever is refused says which call it was.
        _tell(context, id_headers(request_id_of(dict(metadata).get("x-request-id", "")), telemetry.current_trace_id()))
        principal = await identity.principal(credential_in(metadata), address_in(context.peer()))
        ANY_MEMBER.check(principal)
        return principal

    return identify


def address_in(peer: str) -> str:
    """The address in what gRPC calls a peer: `ipv4:192.0.2.1:4711`, `ipv6:%5B2001:db8::1%5D:4711`."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


def _tell(context: Any, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Let the call end with `headers`, which are those that a response over HTTP has, as trailing metadata."""
    told = [(name.decode(), value.decode()) for name, value in headers]
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), *told))


@contextlib.contextmanager
def _telling_refusals(context: Any) -> Iterator[None]:
    """Let a refusal by a limit say how that limit stands."""
    try:
        yield
    except LimitReached as error:
        _tell(context, error.headers)
        raise


def rules_of(service: ServiceDescriptor) -> dict[str, Rule]:
    """Who may call each of a service's methods. Raises KeyError for one that the table does not have."""
    return {method.name: RPC_RULES[method.name] for method in service.methods}


class GatewayService(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Passes calls on with a newly signed principal."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._backends = kit.backends
        self._rules = rules_of(SERVICE)

    async def Answer(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("Answer", context)
        with self._kit.shedding.entered() as prepared, _telling_refusals(context):
            async with self._kit.answering(request, of_call_ms(current_deadline.get()), time.monotonic()) as (admission, timeout_s):
                _tell(context, admission.headers)
                stopped_as(_stopping())
                async with AnswerStream(self._backends.orchestrator, request, timeout_s=timeout_s) as events:
                    await self._write_on(Metered(events, admission, prepared), context)

    async def ResumeAnswer(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("ResumeAnswer", context)
        stopped_as(_stopping())
        async with self._kit.resuming(request) as events:
            await self._write_on(events, context)

    async def CancelAnswer(self, request: Any, context: Any) -> Any:
        await self._admit("CancelAnswer", context)
        return await self._kit.cancel(request)

    async def ConfirmToolCall(self, request: Any, context: Any) -> Any:
        await self._admit("ConfirmToolCall", context)
        return await self._backends.orchestrator.unary(self._backends.orchestrator.stub.ConfirmToolCall, request)

    async def GetPrompts(self, request: Any, context: Any) -> Any:
        await self._admit("GetPrompts", context)
        return await self._backends.orchestrator.unary(self._backends.orchestrator.stub.GetPrompts, request)

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self._admit("ListModels", context)
        return await self._backends.orchestrator.unary(self._backends.orchestrator.stub.ListModels, request)

    async def Search(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("Search", context)
        await self._relay(self._backends.retrieval, self._backends.retrieval.stub.Search, request, context, ROWS_TIMEOUT_S)

    async def IngestDocuments(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("IngestDocuments", context)
        retrieval = self._backends.retrieval
        await self._relay(retrieval, retrieval.stub.IngestDocuments, request_iterator, context, INGEST_TIMEOUT_S)

    async def GetIngestionJob(self, request: Any, context: Any) -> Any:
        await self._admit("GetIngestionJob", context)
        return await self._backends.retrieval.unary(self._backends.retrieval.stub.GetIngestionJob, request)

    async def WatchIngestionJob(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("WatchIngestionJob", context)
        retrieval = self._backends.retrieval
        with self._kit.watching():
            await self._relay(retrieval, retrieval.stub.WatchIngestionJob, request, context, INGEST_TIMEOUT_S)

    async def ListIngestionJobs(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("ListIngestionJobs", context)
        await self._relay(self._backends.retrieval, self._backends.retrieval.stub.ListIngestionJobs, request, context, ROWS_TIMEOUT_S)

    async def CancelIngestionJob(self, request: Any, context: Any) -> Any:
        await self._admit("CancelIngestionJob", context)
        return await self._backends.retrieval.unary(self._backends.retrieval.stub.CancelIngestionJob, request, idempotent=False)

    async def RetryIngestionJob(self, request: Any, context: Any) -> Any:
        await self._admit("RetryIngestionJob", context)
        return await self._backends.retrieval.unary(self._backends.retrieval.stub.RetryIngestionJob, request, idempotent=False)

    async def ListDocuments(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("ListDocuments", context)
        await self._relay(self._backends.retrieval, self._backends.retrieval.stub.ListDocuments, request, context, ROWS_TIMEOUT_S)

    async def ListCollections(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("ListCollections", context)
        await self._relay(self._backends.retrieval, self._backends.retrieval.stub.ListCollections, request, context, ROWS_TIMEOUT_S)

    async def DeleteDocument(self, request: Any, context: Any) -> Any:
        await self._admit("DeleteDocument", context)
        retrieval = self._backends.retrieval
        return await retrieval.unary(retrieval.stub.DeleteDocument, request, timeout_s=ROWS_TIMEOUT_S, idempotent=False)

    async def GetOperation(self, request: Any, context: Any) -> Any:
        await self._admit("GetOperation", context)
        return await self._backends.ledger.unary(self._backends.ledger.stub.GetOperation, request)

    async def ListOperations(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("ListOperations", context)
        await self._relay(self._backends.ledger, self._backends.ledger.stub.ListOperations, request, context, ROWS_TIMEOUT_S)

    async def QueryUsage(self, request: Any, context: Any) -> None:  # type: ignore[override]
        await self._admit("QueryUsage", context)
        await self._relay(self._backends.ledger, self._backends.ledger.stub.QueryUsage, request, context, ROWS_TIMEOUT_S)

    async def _admit(self, rpc: str, context: Any) -> None:
        principal, rule = current_principal(), self._rules[rpc]
        rule.check(principal)
        if (kind := rule.counts) is not None:
            with _telling_refusals(context):
                _tell(context, (await self._kit.limits.admit(principal, kind)).headers)

    async def _relay(self, peer: Peer, method: Any, request: Any, context: Any, timeout_s: float) -> None:
        """Write on what comes. When the caller leaves, this is cancelled, and leaving the block cancels the call behind it."""
        async with peer.stream(method, request, timeout_s=timeout_s) as messages:
            await self._write_on(messages, context)

    async def _write_on(self, messages: AsyncIterator[Any], context: Any) -> None:
        """Write messages as the caller takes them. Raises AnswerInterrupted if it takes none for the stall time."""
        stall_s = self._kit.timing.write_stall_s
        async for message in messages:
            try:
                async with asyncio.timeout(stall_s):
                    await context.write(message)
            except TimeoutError:
                raise AnswerInterrupted(
                    "the stream was not read; an answer goes on and can be resumed", stall_ms=int(stall_s * 1000)
                ) from None


def _stopping() -> AnswerInterrupted:
    return AnswerInterrupted("the server is stopping; resume the answer, or ask again if it has not begun")
