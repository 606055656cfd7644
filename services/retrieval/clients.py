"""The ledger as retrieval uses it, over gRPC: the EmbeddingBooks port. What a call costs and who may make it, the ledger says."""

import asyncio

import grpc
import structlog

from services.chassis.channel import Caller
from services.chassis.errors import AnswerCancelled, DomainError, Unavailable
from services.chassis.principal import Principal
from services.chassis.telemetry import current_trace_id
from services.chassis.wire import timestamp
from services.retrieval.ports import PaidCall, Spent, Unpayable
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc as rpc

log = structlog.get_logger(__name__)

PURPOSE = "embed"
HOLD_S = 600
"""Longer than any call of an embedder, and than the ledger is waited for."""
RESERVE_S, RECORD_S = 5.0, 10.0
PAUSES_S = (0.2, 1.0, 5.0, 15.0, 30.0, 60.0)
"""Between tries to book at a ledger that is away. After that the hold expires, and is booked in full."""
SERVICE = Principal("tailrace", "retrieval", frozenset({"service"}))


class LedgerBooks:
    """Holds and records of single embedding calls."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = rpc.LedgerServiceStub(channel)
        self._caller = caller

    async def reserve(self, payer: Principal, call: PaidCall) -> str:
        request = pb.ReserveRequest(
            operation_id=call.operation_id,
            attempt=1,
            provider=call.provider,
            model=call.model,
            input_tokens_max=call.tokens_max,
            output_tokens_max=1,  # it generates nothing, and a hold is of something
            ttl_ms=HOLD_S * 1000,
        )
        try:
            reply = await self._caller.unary(self._stub.Reserve, request, timeout_s=RESERVE_S, principal=payer)
        except Unavailable as error:
            raise Unpayable(error.detail, dependency="ledger", retry_after_ms=error.retry_after_ms or 1000) from error
        return str(reply.hold_id)

    async def record(self, payer: Principal, call: PaidCall, hold_id: str, spent: Spent) -> None:
        request = pb.RecordOperationsRequest(record_id=1, operation=_operation(payer, call, hold_id, spent))
        for pause_s in (*PAUSES_S, None):
            try:
                ack = await self._recorded(request)
            except DomainError as error:
                if pause_s is None or not (error.retryable or error.code == "CANCELLED"):
                    raise
                await asyncio.sleep(pause_s)
            else:
                break
        if ack.rejected_reason:
            log.error("embedding_not_booked", reason=ack.rejected_reason, operation_id=call.operation_id)

    async def _recorded(self, request: pb.RecordOperationsRequest) -> pb.RecordOperationsResponse:
        async with self._caller.stream(self._stub.RecordOperations, None, timeout_s=RECORD_S, principal=SERVICE) as acks:
            try:
                await acks.write(request)
                async for ack in acks:
                    return ack  # type: ignore[no-any-return]
            except asyncio.InvalidStateError:  # how grpc.aio says that the call is over
                pass
        raise Unavailable("the ledger ended the stream", dependency="ledger")


def _operation(payer: Principal, call: PaidCall, hold_id: str, spent: Spent) -> pb.Operation:
    usage = common_pb2.Usage(input_tokens=spent.tokens)
    attempt = pb.Attempt(
        attempt=1,
        hold_id=hold_id,
        provider=call.provider,
        model=call.model,
        usage=usage,
        error_reason=spent.error_reason,
        duration_ms=spent.duration_ms,
        estimated=spent.estimated,
        not_sent=spent.not_sent,
    )
    status = "done" if not spent.error_reason else "cancelled" if spent.error_reason == AnswerCancelled.reason else "failed"
    return pb.Operation(
        operation_id=call.operation_id,
        tenant=payer.tenant,
        user=payer.user,
        api_key_id=payer.api_key_id,
        trace_id=current_trace_id(),
        status=status,
        model=call.model,
        provider=call.provider,
        error_reason=spent.error_reason,
        estimated=spent.estimated,
        created_at=timestamp(call.began),
        duration_ms=spent.duration_ms,
        attempts=[attempt],
        purpose=PURPOSE,
    )
