"""DomainError to google.rpc.Status and back: the one mapping between our errors and gRPC. The only module that imports grpc_status."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.chassis.errors import (
    DeadlineTooShort,
    DomainError,
    Internal,
    NotAuthenticated,
    Overloaded,
    RequestInvalid,
    Unavailable,
    restore,
)

DOMAIN = "tailrace"


def to_status(error: DomainError) -> status_pb2.Status:
    """Render `error` with ErrorInfo always, RetryInfo and BadRequest where they apply."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, RequestInvalid) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.detail)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    packed = []
    for detail in details:
        any_message = any_pb2.Any()
        any_message.Pack(detail)
        packed.append(any_message)
    return status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.detail, details=packed)


async def abort(context: grpc.aio.ServicerContext, error: DomainError) -> None:
    """End the call with `error`, beside what it was given as trailing metadata before. Never returns normally."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, (*(context.trailing_metadata() or ()), *status.trailing_metadata))


def from_rpc_error(error: grpc.aio.AioRpcError, target: str) -> DomainError:
    """Rebuild the error that `target` raised; a status made by gRPC itself becomes the nearest class of ours."""
    status = rpc_status.from_call(error)
    if status is not None:
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                return restore(info.reason, status.message, dict(info.metadata), error.code().name)
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"{target} cannot be reached", dependency=target)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineTooShort(f"{target} did not answer in time", step=target, left_ms=0)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"{target} has too much to do, or a message was too large", retry_after_ms=1000)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return NotAuthenticated("", cause="remote")
    return restore("", f"{target} answered {code.name}", {}, code.name)


def unexpected(trace_id: str) -> Internal:
    """What a caller is told about our bug: nothing but where to look."""
    return Internal("", trace_id=trace_id)
