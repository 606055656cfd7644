"""The life of a hold: every legal move books what it should, every other one is refused by name."""

import pytest

from services.chassis.errors import DomainError, HoldAlreadyExpired, HoldAlreadySettled, HoldAlreadyVoided
from services.chassis.money import Price, Usage
from services.ledger import holds
from services.ledger.holds import Hold, HoldState, Move

PRICE = Price("p", "m", input=1_000_000, output=2_000_000)
"""One nano-USD for a token in, two for one out."""
RESERVED = Hold("h", 100, PRICE)
USED = Usage(input_tokens=10, output_tokens=5)


def after(move: Move | None) -> Hold:
    assert move is not None
    return move.hold


SETTLED = after(holds.settle(RESERVED, USED, estimated=False))
VOIDED = after(holds.void(RESERVED))
EXPIRED = after(holds.expire(RESERVED))
RECONCILED = after(holds.settle(EXPIRED, USED, estimated=False))


def test_settling_moves_the_whole_amount_out_and_what_was_used_into_spent() -> None:
    """What is left goes back to what is available."""
    move = holds.settle(RESERVED, USED, estimated=True)

    assert move is not None
    assert (move.kind, move.held_nanousd, move.spent_nanousd, move.available_nanousd) == ("settle", -100, 20, 80)
    assert (move.hold.state, move.hold.cost_nanousd, move.hold.estimated) == (HoldState.SETTLED, 20, True)


def test_using_more_than_was_held_is_booked_in_full() -> None:
    """The overage is taken from what is available, even if that goes below nothing."""
    move = holds.settle(RESERVED, Usage(input_tokens=150), estimated=False)

    assert move is not None
    assert (move.spent_nanousd, move.available_nanousd, move.hold.overage_nanousd) == (150, -50, 50)


def test_voiding_gives_everything_back() -> None:
    """Nothing was sent, so nothing is spent."""
    move = holds.void(RESERVED)

    assert (move.held_nanousd, move.spent_nanousd, move.available_nanousd) == (-100, 0, 100)


def test_expiring_books_everything_as_an_estimate() -> None:
    """A crash does not make tokens free."""
    move = holds.expire(RESERVED)

    assert (move.held_nanousd, move.spent_nanousd, move.available_nanousd) == (-100, 100, 0)
    assert move.hold.estimated


@pytest.mark.parametrize(("usage", "difference"), [(USED, -80), (Usage(output_tokens=50), 0), (Usage(output_tokens=60), 20)])
def test_what_is_learned_after_the_expiry_is_booked_as_the_difference(usage: Usage, difference: int) -> None:
    """The correction goes both ways, and the hold ends up at its true cost."""
    move = holds.settle(EXPIRED, usage, estimated=False)

    assert move is not None
    assert (move.kind, move.held_nanousd, move.spent_nanousd) == ("correct", 0, difference)
    assert (move.hold.state, move.hold.cost_nanousd) == (HoldState.RECONCILED, PRICE.cost_nanousd(usage))


@pytest.mark.parametrize("hold", [SETTLED, RECONCILED])
def test_the_same_settle_again_books_nothing(hold: Hold) -> None:
    """A retried settle is answered as the first was."""
    assert holds.settle(hold, USED, estimated=False) is None


@pytest.mark.parametrize(
    ("hold", "error"),
    [
        (SETTLED, HoldAlreadySettled),
        (RECONCILED, HoldAlreadySettled),
        (VOIDED, HoldAlreadyVoided),
        (EXPIRED, HoldAlreadyExpired),
    ],
)
def test_a_resolved_hold_refuses_void_and_expiry_by_name(hold: Hold, error: type[DomainError]) -> None:
    """The error says which move came first, and names the hold."""
    for move in (holds.void, holds.expire):
        with pytest.raises(error) as refused:
            move(hold)

        assert refused.value.metadata == {"hold_id": "h"}


@pytest.mark.parametrize(("hold", "error"), [(SETTLED, HoldAlreadySettled), (RECONCILED, HoldAlreadySettled), (VOIDED, HoldAlreadyVoided)])
def test_another_settle_is_refused(hold: Hold, error: type[DomainError]) -> None:
    """What was booked stays booked, also if only the estimate's mark differs."""
    for usage, estimated in ((Usage(), False), (USED, True)):
        with pytest.raises(error):
            holds.settle(hold, usage, estimated=estimated)


def test_a_call_that_was_never_sent_costs_nothing_however_late_that_is_told() -> None:
    """Void while reserved, nothing when voided, a correction to zero when expired, a refusal when settled."""
    late = holds.not_sent(EXPIRED)

    assert holds.not_sent(RESERVED) == holds.void(RESERVED)
    assert holds.not_sent(VOIDED) is None
    assert late is not None
    assert (late.kind, late.spent_nanousd, late.hold.cost_nanousd) == ("correct", -100, 0)
    assert holds.not_sent(late.hold) is None
    with pytest.raises(HoldAlreadySettled):
        holds.not_sent(SETTLED)
