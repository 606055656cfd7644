"""DomainError to problem document (RFC 9457), as a response and as the data of an SSE error. HTTP statuses are decided here alone.

The status follows from the gRPC code alone, but for the few reasons that HTTP has a finer word for.
"""

import math
from typing import Any

import orjson

from services.chassis.errors import DomainError

MEDIA_TYPE = b"application/problem+json"

STATUS_BY_CODE = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
    "UNAUTHENTICATED": 401,
}
STATUS_BY_REASON = {
    "PAYLOAD_TOO_LARGE": 413,
    "ANSWER_LOG_GONE": 410,
    "METHOD_NOT_ALLOWED": 405,
    "MEDIA_TYPE_UNSUPPORTED": 415,
    "REQUEST_TIMEOUT": 408,
    "MODEL_REFUSED": 422,
    "MODEL_FAILED": 502,
    "OUTPUT_INVALID": 502,
    "MODEL_STALLED": 504,
}
_OWN_MEMBERS = frozenset({"type", "title", "status", "detail", "instance", "reason", "retryable", "trace_id", "request_id"})


class MethodNotAllowed(DomainError):
    """The path is known, but not with this method. Metadata: `allow`."""

    reason, code, title = "METHOD_NOT_ALLOWED", "UNIMPLEMENTED", "The method is not allowed here"


class MediaTypeUnsupported(DomainError):
    """The body's media type is not one this route reads. Metadata: `accepts`."""

    reason, code, title = "MEDIA_TYPE_UNSUPPORTED", "INVALID_ARGUMENT", "The media type is not supported here"


class RequestTimeout(DomainError):
    """The client began a body and went silent."""

    reason, code, title, retryable = "REQUEST_TIMEOUT", "DEADLINE_EXCEEDED", "The request did not arrive in time", True


def status_of(error: DomainError) -> int:
    """HTTP status of `error`."""
    return STATUS_BY_REASON.get(error.reason) or STATUS_BY_CODE.get(error.code, 500)


def document(error: DomainError, *, trace_id: str, request_id: str) -> dict[str, Any]:
    """The problem document of `error`. An internal error says nothing but where to look."""
    reason = error.reason or error.code
    members: dict[str, Any] = {
        "type": f"/problems/{reason.lower().replace('_', '-')}",
        "title": error.title,
        "status": status_of(error),
        "detail": error.detail,
        "instance": f"urn:tailrace:request:{request_id}",
        "reason": reason,
        "retryable": error.retryable,
        "trace_id": trace_id,
        "request_id": request_id,
    }
    members.update({key: value for key, value in error.metadata.items() if key not in _OWN_MEMBERS})
    return members


def headers_of(error: DomainError) -> list[tuple[bytes, bytes]]:
    """What a response with `error` says besides its body: when to come back, which methods there are, how to sign in."""
    headers = []
    status = status_of(error)
    if error.retryable and status in (429, 503):
        after_ms = error.retry_after_ms
        after_s = 1 if after_ms is None else max(1, math.ceil(after_ms / 1000))
        headers.append((b"retry-after", str(after_s).encode()))
    elif status == 429:
        headers.append((b"x-should-retry", b"false"))
    if status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="tailrace"'))
    if allow := error.metadata.get("allow"):
        headers.append((b"allow", allow.encode()))
    return headers


def body_of(error: DomainError, *, trace_id: str, request_id: str) -> bytes:
    """The problem document as JSON."""
    return orjson.dumps(document(error, trace_id=trace_id, request_id=request_id))
