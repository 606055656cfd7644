"""The life of a hold: which moves are legal, and what each one books. Pure; what is stored and how it is locked is decided elsewhere.

    reserved ──settle──▶ settled
        ├─────void────▶ voided        only if no byte was sent to a provider
        └────expire───▶ expired ──settle, void──▶ reconciled

A hold leaves `reserved` once. An expired hold was booked in full, because a crash must not make tokens free; what is learned
later is booked as one correction. The same settle again is answered as the first was; any other second move is a named error.
"""

from dataclasses import dataclass
from enum import StrEnum

from services.chassis.errors import DomainError, HoldAlreadyExpired, HoldAlreadySettled, HoldAlreadyVoided
from services.chassis.money import Price, Usage

NO_USAGE = Usage()


class HoldState(StrEnum):
    """Where a hold is in its life."""

    RESERVED = "reserved"
    SETTLED = "settled"
    VOIDED = "voided"
    EXPIRED = "expired"
    RECONCILED = "reconciled"


@dataclass(frozen=True, slots=True)
class Hold:
    """Money set aside for one provider call, at the price it was counted with. Usage, cost and `estimated` mean nothing while reserved."""

    hold_id: str
    amount_nanousd: int
    price: Price
    state: HoldState = HoldState.RESERVED
    usage: Usage = NO_USAGE
    cost_nanousd: int = 0
    estimated: bool = False

    @property
    def overage_nanousd(self) -> int:
        """Booked above what was held."""
        return max(0, self.cost_nanousd - self.amount_nanousd)


@dataclass(frozen=True, slots=True)
class Move:
    """A transition and its posting.

    What leaves `held` and enters `spent` comes from or goes back to `available`, so every posting sums to zero.
    """

    hold: Hold
    """The hold as it is after the move."""
    kind: str
    """`settle`, `void`, `expire` or `correct`."""
    held_nanousd: int
    spent_nanousd: int

    @property
    def available_nanousd(self) -> int:
        return -self.held_nanousd - self.spent_nanousd


def settle(hold: Hold, usage: Usage, *, estimated: bool) -> Move | None:
    """Book what was used, above the amount too: the money is gone. None if exactly this was booked before.

    Raises HoldAlreadySettled if something else was, HoldAlreadyVoided if the hold was given back.
    """
    if hold.state in (HoldState.SETTLED, HoldState.RECONCILED):
        if (hold.usage, hold.estimated) == (usage, estimated):
            return None
        raise HoldAlreadySettled("the hold was settled with another usage", hold_id=hold.hold_id)
    if hold.state is HoldState.VOIDED:
        raise refusal(hold)
    cost = hold.price.cost_nanousd(usage)
    if hold.state is HoldState.EXPIRED:
        after = _moved(hold, HoldState.RECONCILED, usage, cost, estimated)
        return Move(after, "correct", held_nanousd=0, spent_nanousd=cost - hold.cost_nanousd)
    after = _moved(hold, HoldState.SETTLED, usage, cost, estimated)
    return Move(after, "settle", held_nanousd=-hold.amount_nanousd, spent_nanousd=cost)


def void(hold: Hold) -> Move:
    """Give the hold back because nothing was sent. Raises the named error of the move that came first."""
    if hold.state is not HoldState.RESERVED:
        raise refusal(hold)
    return Move(_moved(hold, HoldState.VOIDED, NO_USAGE, 0, False), "void", held_nanousd=-hold.amount_nanousd, spent_nanousd=0)


def expire(hold: Hold) -> Move:
    """Book the whole amount as an estimate. Raises the named error of the move that came first."""
    if hold.state is not HoldState.RESERVED:
        raise refusal(hold)
    after = _moved(hold, HoldState.EXPIRED, NO_USAGE, hold.amount_nanousd, True)
    return Move(after, "expire", held_nanousd=-hold.amount_nanousd, spent_nanousd=hold.amount_nanousd)


def not_sent(hold: Hold) -> Move | None:
    """What a record says of a call that never reached its provider: void, or, after the expiry, a correction down to nothing.

    None if it was given back before. Raises HoldAlreadySettled if it was settled as sent.
    """
    if hold.state is HoldState.VOIDED:
        return None
    if hold.state in (HoldState.EXPIRED, HoldState.SETTLED, HoldState.RECONCILED):
        return settle(hold, NO_USAGE, estimated=False)
    return void(hold)


def refusal(hold: Hold) -> DomainError:
    """The error that names how `hold` was resolved."""
    if hold.state is HoldState.VOIDED:
        return HoldAlreadyVoided("the hold was given back", hold_id=hold.hold_id)
    if hold.state is HoldState.EXPIRED:
        return HoldAlreadyExpired("the hold has expired and was booked in full", hold_id=hold.hold_id)
    return HoldAlreadySettled("the hold was settled", hold_id=hold.hold_id)


def _moved(hold: Hold, state: HoldState, usage: Usage, cost: int, estimated: bool) -> Hold:
    return Hold(hold.hold_id, hold.amount_nanousd, hold.price, state, usage, cost, estimated)
