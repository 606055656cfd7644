"""What a call can raise, by what the caller can do about it; made from the google.rpc.ErrorInfo that every status of Tailrace carries.

TailraceError
├── RequestInvalid      change the request
├── NotAuthenticated    bring a valid token
├── NotAllowed          be somebody else
├── NotFound            there is no such thing, or not any more
├── Conflict            it was done before, or differently
├── RateLimited         wait `retry_after_s`
├── BudgetExhausted     the money is spent
├── ModelFailed         the model's provider failed or refused
├── Unavailable         a part is away; wait `retry_after_s`
├── DeadlineExceeded    it took too long
├── AnswerCancelled     somebody stopped the answer
├── Interrupted         the stream ended without its end; resume it
└── ServerFailed        our bug; the trace id leads to the log
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory

DOMAIN = "tailrace"
_DETAILS_KEY = "grpc-status-details-bin"


class TailraceError(Exception):
    """A call that failed. `str()` is the text for people."""

    reasons: ClassVar[tuple[str, ...]] = ()
    """ErrorReason names, without their prefix, that become this class."""
    codes: ClassVar[tuple[grpc.StatusCode, ...]] = ()
    """gRPC codes that become this class when no reason came along."""
    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later."""

    def __init__(self, detail: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        """ErrorReason name without its prefix; empty if the status was not made by Tailrace."""
        self.metadata = dict(metadata or {})
        """ErrorInfo metadata; the contract lists the keys of each reason."""

    @property
    def retry_after_s(self) -> float | None:
        """When to try again, if that is known."""
        value = self.metadata.get("retry_after_ms", "")
        return int(value) / 1000 if value.isdecimal() else None


class RequestInvalid(TailraceError):
    reasons = ("REQUEST_INVALID", "PAYLOAD_TOO_LARGE", "DOCUMENT_REJECTED", "MODEL_UNKNOWN")
    codes = (grpc.StatusCode.INVALID_ARGUMENT,)

    @property
    def field(self) -> str:
        """Field of the request that is wrong, if one is."""
        return self.metadata.get("field", "")

    @property
    def bound(self) -> str:
        """Bound it broke, if there is one."""
        return self.metadata.get("bound", "")


class NotAuthenticated(TailraceError):
    reasons = ("NOT_AUTHENTICATED",)
    codes = (grpc.StatusCode.UNAUTHENTICATED,)


class NotAllowed(TailraceError):
    reasons = ("NOT_ALLOWED",)
    codes = (grpc.StatusCode.PERMISSION_DENIED,)


class NotFound(TailraceError):
    reasons = ("NOT_FOUND", "ANSWER_LOG_GONE")
    codes = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE)


class Conflict(TailraceError):
    reasons = ("IDEMPOTENCY_CONFLICT", "HOLD_ALREADY_SETTLED", "HOLD_ALREADY_VOIDED", "HOLD_ALREADY_EXPIRED")
    codes = (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION)


class RateLimited(TailraceError):
    reasons, retryable = ("RATE_LIMITED",), True


class BudgetExhausted(TailraceError):
    reasons = ("BUDGET_EXHAUSTED",)

    @property
    def left_nanousd(self) -> int | None:
        """What is left of the budget."""
        value = self.metadata.get("left_nanousd", "")
        return int(value) if value.lstrip("-").isdecimal() else None


class ModelFailed(TailraceError):
    reasons = (
        "MODEL_OVERLOADED",
        "MODEL_REFUSED",
        "MODEL_FAILED",
        "MODEL_STALLED",
        "MODEL_MISCONFIGURED",
        "OUTPUT_INVALID",
        "PRICE_UNKNOWN",
    )


class Unavailable(TailraceError):
    reasons, codes, retryable = ("UNAVAILABLE", "OVERLOADED"), (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED), True


class DeadlineExceeded(TailraceError):
    reasons, codes, retryable = ("DEADLINE_TOO_SHORT",), (grpc.StatusCode.DEADLINE_EXCEEDED,), True


class AnswerCancelled(TailraceError):
    reasons, codes = ("ANSWER_CANCELLED",), (grpc.StatusCode.CANCELLED,)


class Interrupted(TailraceError):
    reasons, codes, retryable = ("ANSWER_INTERRUPTED", "ANSWER_ABANDONED"), (grpc.StatusCode.ABORTED,), True


class ServerFailed(TailraceError):
    reasons = ("INTERNAL",)

    @property
    def trace_id(self) -> str:
        """Where to look in the log."""
        return self.metadata.get("trace_id", "")


def from_rpc_error(error: grpc.RpcError) -> TailraceError:
    """The class for what a call failed with: by its reason if Tailrace gave one, else by its gRPC code."""
    code: grpc.StatusCode = error.code()
    detail: str = error.details() or code.name
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and (info := _error_info(value)) is not None:
            return _by_reason().get(info.reason, ServerFailed)(detail, reason=info.reason, metadata=info.metadata)
    for cls in TailraceError.__subclasses__():
        if code in cls.codes:
            return cls(detail)
    return ServerFailed(detail)


def _by_reason() -> dict[str, type[TailraceError]]:
    return {reason: cls for cls in TailraceError.__subclasses__() for reason in cls.reasons}


def _error_info(status_bytes: bytes) -> Any | None:
    """The ErrorInfo of our domain in a serialised google.rpc.Status."""
    for detail in _Status.FromString(status_bytes).details:
        if detail.type_url.endswith("/google.rpc.ErrorInfo"):
            info = _ErrorInfo.FromString(detail.value)
            if info.domain == DOMAIN:
                return info
    return None


def _rpc_messages() -> tuple[Any, Any]:
    """google.rpc.Status and ErrorInfo, which protobuf does not bring, in a pool of their own: the common one may have them already."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="tailrace/rpc_status.proto", package="google.rpc", syntax="proto3", dependency=["google/protobuf/any.proto"]
    )
    status = file.message_type.add(name="Status")
    status.field.add(name="code", number=1, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    status.field.add(name="message", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    status.field.add(name="details", number=3, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=".google.protobuf.Any")
    info = file.message_type.add(name="ErrorInfo")
    info.field.add(name="reason", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    info.field.add(name="domain", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry = info.nested_type.add(name="MetadataEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry_name = ".google.rpc.ErrorInfo.MetadataEntry"
    info.field.add(name="metadata", number=3, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=entry_name)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return message_factory.GetMessageClass(find("google.rpc.Status")), message_factory.GetMessageClass(find("google.rpc.ErrorInfo"))


_Status, _ErrorInfo = _rpc_messages()
