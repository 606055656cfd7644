"""One vocabulary of errors: the contract's, the services' and the client's are the same."""

import grpc
import pytest
from google.rpc import error_details_pb2

import tailrace
from services.chassis import errors
from services.chassis.errors import DomainError, Internal, RequestInvalid, Unavailable
from services.chassis.status import from_rpc_error, to_status
from tailrace.common.v1 import error_reason_pb2
from tailrace.errors import from_rpc_error as to_client_error

PREFIX = "ERROR_REASON_"
REASONS = [name.removeprefix(PREFIX) for name, number in error_reason_pb2.ErrorReason.items() if number]
LEAVES = {reason: leaf for reason, leaf in errors.leaves().items() if leaf.__module__ == errors.__name__}


class Status(grpc.aio.AioRpcError):
    """What a caller catches when a service ended with `error`."""

    def __init__(self, error: DomainError) -> None:
        status = to_status(error)
        trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
        super().__init__(getattr(grpc.StatusCode, error.code), grpc.aio.Metadata(), trailing, details=status.message)


def sample(cls: type[DomainError]) -> DomainError:
    if cls is RequestInvalid:
        return RequestInvalid("too long", field="question", bound="32768 bytes")
    if cls is Unavailable:
        return Unavailable("gone", dependency="postgres", retry_after_ms=1500)
    return cls("what happened", retry_after_ms=1500, kind="thing")


def test_every_error_class_is_a_reason_of_the_contract_and_the_other_way_round() -> None:
    """No class without a reason, no reason without a class."""
    assert sorted(LEAVES) == sorted(REASONS)


def test_every_error_class_is_drawn_in_the_tree() -> None:
    """The module's docstring shows the whole tree."""
    classes = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, DomainError)}

    assert {name for name in classes if name not in (errors.__doc__ or "")} == set()


@pytest.mark.parametrize("reason", REASONS)
def test_an_error_survives_the_wire_between_services(reason: str) -> None:
    """Class, text, metadata and code come out as they went in."""
    error = sample(LEAVES[reason])
    back = from_rpc_error(Status(error), "ledger")

    assert type(back) is type(error)
    assert (back.detail, back.metadata, back.code) == (error.detail, error.metadata, error.code)


@pytest.mark.parametrize("reason", REASONS)
def test_an_error_reaches_a_client_as_one_of_its_exceptions(reason: str) -> None:
    """Every reason has one exception, with the reason's text and metadata."""
    error = sample(LEAVES[reason])
    seen = to_client_error(Status(error))

    assert reason in type(seen).reasons
    assert (str(seen), seen.reason, seen.metadata) == (error.detail, reason, error.metadata)


def test_a_client_exception_is_retryable_only_if_every_error_behind_it_may_be_tried_again() -> None:
    """Nobody retries what cannot succeed."""
    for cls in tailrace.TailraceError.__subclasses__():
        if cls.retryable:
            assert [reason for reason in cls.reasons if not LEAVES[reason].retryable] == []


def test_a_status_that_is_not_ours_is_read_by_its_code() -> None:
    """A server that cannot be reached is Unavailable, not a mystery."""
    bare = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="connection refused")
    seen = to_client_error(bare)

    assert type(seen) is tailrace.Unavailable
    assert seen.reason == ""


def test_every_status_says_reason_and_domain_and_retry_where_it_is_known() -> None:
    """ErrorInfo always; RetryInfo with the time; BadRequest with the field."""
    status = to_status(sample(RequestInvalid))
    info, violation = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[-1].Unpack(violation)
    retry = error_details_pb2.RetryInfo()
    assert to_status(sample(Unavailable)).details[1].Unpack(retry)

    assert (info.reason, info.domain) == ("REQUEST_INVALID", "tailrace")
    assert violation.field_violations[0].field == "question"
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_our_own_bug_says_nothing_but_where_to_look() -> None:
    """INTERNAL carries a trace id and its title."""
    status = to_status(Internal("", trace_id="ab" * 16))

    assert status.message == Internal.title
