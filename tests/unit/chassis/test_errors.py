"""Errors of the tree, as what they are: values that are raised, kept and raised again."""

import gc
import weakref

import pytest

from services.chassis import errors
from services.chassis.errors import DomainError, RequestInvalid

ALL = [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, DomainError)]


class Large:
    """Something that a frame holds."""


def fail(kind: type[DomainError], held: list[weakref.ref[Large]]) -> None:
    large = Large()
    held.append(weakref.ref(large))
    try:
        raise ValueError("within")
    except ValueError as cause:
        raise kind("said") from cause


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_bare_error_is_the_same_and_holds_no_frame(kind: type[DomainError]) -> None:
    """What an answer's log keeps for its readers must not keep the answer's every variable."""
    held: list[weakref.ref[Large]] = []
    gc.disable()
    try:
        try:
            fail(kind, held)
        except DomainError as error:
            error.metadata["unit_ms"] = "3"
            kept = error.bare()
            assert (type(kept), kept.args, kept.detail, kept.metadata) == (type(error), error.args, error.detail, error.metadata)
        assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)
        assert held[0]() is None
    finally:
        gc.enable()


def test_a_bare_error_keeps_its_field() -> None:
    assert RequestInvalid("no", field="question", bound="1-10").bare().field == "question"


class MadeOfOthers(DomainError):
    """As a limit's refusal: what makes it is not what its base is made of."""

    def __init__(self, limit: int, *, window_s: int) -> None:
        super().__init__(f"at most {limit} in {window_s} s", limit=limit)


def test_a_bare_error_is_not_made_anew() -> None:
    kept = MadeOfOthers(3, window_s=60).bare()
    assert (type(kept), str(kept), kept.metadata) == (MadeOfOthers, "at most 3 in 60 s", {"limit": "3"})
