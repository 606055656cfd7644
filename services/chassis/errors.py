"""Every error that crosses a service boundary, as one tree; how it looks on a wire is decided in `status` and at the edge, not here.

DomainError
├── RequestInvalid, PayloadTooLarge, DocumentRejected          the caller must change the request
├── NotAuthenticated, NotAllowed                               the caller must be somebody else
├── NotFound, ModelUnknown, AnswerLogGone                      there is no such thing (any more), for this caller
├── HoldAlreadySettled, HoldAlreadyVoided, HoldAlreadyExpired  a hold resolves once
├── IdempotencyConflict                                        same key, other body
├── RateLimited, Overloaded, BudgetExhausted, PriceUnknown     not now, or not for this money
├── ModelOverloaded, ModelRefused, ModelFailed, ModelStalled, ModelMisconfigured   the provider
├── OutputInvalid                                              what the model wrote is not of the shape that was asked for
├── AnswerCancelled, AnswerInterrupted, AnswerAbandoned        the answer's own end
├── Unavailable, DeadlineTooShort                              a dependency, or time
├── Internal                                                   our bug: no text, only a trace id
└── RemoteError                                                a status that none of the above names
"""

from typing import ClassVar, Self


class DomainError(Exception):
    """An operating error with a fixed place in the contract.

    `detail` is for people and may reach the caller: it never holds secrets, prompts or answers. `metadata` holds the
    ErrorInfo metadata, units in the keys.
    """

    reason: ClassVar[str] = ""
    """Name of the ErrorReason without its prefix."""
    code: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code."""
    title: ClassVar[str] = "Something went wrong"
    """Short text for people, the same for every error of the class."""
    retryable: ClassVar[bool] = False
    """Whether the same request may succeed later."""

    def __init__(self, detail: str = "", **metadata: str | int | float) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def bare(self) -> Self:
        """The same error without its traceback and cause. What is kept, or raised by many, must not keep every frame it came through."""
        bare = type(self).__new__(type(self), *self.args)  # not by __init__: subclasses ask it for what they are made of
        bare.__dict__.update(self.__dict__)
        return bare

    @property
    def retry_after_ms(self) -> int | None:
        """When to try again, if that is known."""
        value = self.metadata.get("retry_after_ms")
        return int(value) if value is not None else None


class RequestInvalid(DomainError):
    """A field of the request is wrong; names the field and, where there is one, the bound."""

    reason, code, title = "REQUEST_INVALID", "INVALID_ARGUMENT", "The request is not valid"

    def __init__(self, detail: str = "", *, field: str = "", bound: str = "") -> None:
        super().__init__(detail, **{key: value for key, value in (("field", field), ("bound", bound)) if value})

    @property
    def field(self) -> str:
        return self.metadata.get("field", "")


class PayloadTooLarge(DomainError):
    reason, code, title = "PAYLOAD_TOO_LARGE", "INVALID_ARGUMENT", "The request is too large"


class DocumentRejected(DomainError):
    reason, code, title = "DOCUMENT_REJECTED", "INVALID_ARGUMENT", "The document cannot be read"


class NotAuthenticated(DomainError):
    reason, code, title = "NOT_AUTHENTICATED", "UNAUTHENTICATED", "A valid token is needed"


class NotAllowed(DomainError):
    reason, code, title = "NOT_ALLOWED", "PERMISSION_DENIED", "This is not allowed"


class NotFound(DomainError):
    """No such object for this principal; foreign and unknown look the same. Metadata: `kind`."""

    reason, code, title = "NOT_FOUND", "NOT_FOUND", "Not found"


class ModelUnknown(DomainError):
    reason, code, title = "MODEL_UNKNOWN", "INVALID_ARGUMENT", "The model is not available"


class AnswerLogGone(DomainError):
    reason, code, title = "ANSWER_LOG_GONE", "OUT_OF_RANGE", "The events of this answer are no longer kept"


class HoldAlreadySettled(DomainError):
    reason, code, title = "HOLD_ALREADY_SETTLED", "FAILED_PRECONDITION", "The hold was settled before"


class HoldAlreadyVoided(DomainError):
    reason, code, title = "HOLD_ALREADY_VOIDED", "FAILED_PRECONDITION", "The hold was voided before"


class HoldAlreadyExpired(DomainError):
    reason, code, title = "HOLD_ALREADY_EXPIRED", "FAILED_PRECONDITION", "The hold has expired"


class IdempotencyConflict(DomainError):
    reason, code, title = "IDEMPOTENCY_CONFLICT", "ALREADY_EXISTS", "The same idempotency key came with another body"


class RateLimited(DomainError):
    reason, code, title, retryable = "RATE_LIMITED", "RESOURCE_EXHAUSTED", "Too many requests", True


class BudgetExhausted(DomainError):
    reason, code, title = "BUDGET_EXHAUSTED", "RESOURCE_EXHAUSTED", "The budget cannot pay for this"


class PriceUnknown(DomainError):
    reason, code, title = "PRICE_UNKNOWN", "FAILED_PRECONDITION", "The model has no price"


class Overloaded(DomainError):
    reason, code, title, retryable = "OVERLOADED", "UNAVAILABLE", "The service has too much to do", True


class ModelOverloaded(DomainError):
    reason, code, title, retryable = "MODEL_OVERLOADED", "UNAVAILABLE", "The model is overloaded", True


class ModelRefused(DomainError):
    reason, code, title = "MODEL_REFUSED", "FAILED_PRECONDITION", "The model refused the request"


class ModelFailed(DomainError):
    reason, code, title, retryable = "MODEL_FAILED", "UNAVAILABLE", "The model failed", True


class ModelStalled(DomainError):
    reason, code, title, retryable = "MODEL_STALLED", "UNAVAILABLE", "The model went silent", True


class ModelMisconfigured(DomainError):
    reason, code, title = "MODEL_MISCONFIGURED", "FAILED_PRECONDITION", "The model's provider does not accept our key"


class OutputInvalid(DomainError):
    """The text does not satisfy the schema. Metadata: `keyword`, the place in the schema; never anything of the text."""

    reason, code, title, retryable = "OUTPUT_INVALID", "UNAVAILABLE", "The model's output does not satisfy the schema", True


class AnswerCancelled(DomainError):
    reason, code, title = "ANSWER_CANCELLED", "CANCELLED", "The answer was stopped"


class AnswerInterrupted(DomainError):
    reason, code, title, retryable = "ANSWER_INTERRUPTED", "ABORTED", "The answer was interrupted", True


class AnswerAbandoned(DomainError):
    """Nobody was reading the answer any more. Not its owner's word: its idempotency key may begin it again."""

    reason, code, title, retryable = "ANSWER_ABANDONED", "ABORTED", "Nobody was reading the answer any more", True


class Unavailable(DomainError):
    """A dependency is away. Metadata: `dependency`, `retry_after_ms`."""

    reason, code, title, retryable = "UNAVAILABLE", "UNAVAILABLE", "A part of the service is not available", True

    def __init__(self, detail: str = "", *, dependency: str = "", retry_after_ms: int = 1000) -> None:
        super().__init__(detail, dependency=dependency, retry_after_ms=retry_after_ms)


class DeadlineTooShort(DomainError):
    reason, code, title, retryable = "DEADLINE_TOO_SHORT", "DEADLINE_EXCEEDED", "The time was too short", True


class Internal(DomainError):
    reason, code, title = "INTERNAL", "INTERNAL", "Something went wrong on our side"


class RemoteError(DomainError):
    """A status whose reason is unknown here, for instance one made by gRPC itself."""

    def __init__(self, detail: str = "", *, remote_code: str = "UNKNOWN") -> None:
        super().__init__(detail, remote_code=remote_code)
        self.code = remote_code  # type: ignore[misc]


def leaves() -> dict[str, type[DomainError]]:
    """Every error class by its reason."""
    return {cls.reason: cls for cls in DomainError.__subclasses__() if cls.reason}


def restore(reason: str, detail: str, metadata: dict[str, str], code: str) -> DomainError:
    """Rebuild the error that another service raised, as the same class with the same metadata."""
    cls = leaves().get(reason)
    if cls is None:
        return RemoteError(detail, remote_code=code)
    error = cls.__new__(cls)
    DomainError.__init__(error, detail, **metadata)
    return error
