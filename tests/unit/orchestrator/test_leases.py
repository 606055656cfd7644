"""Leases by themselves: when they are taken, drawn on, replaced and given back, with a line of credit that obeys."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from services.chassis.errors import BudgetExhausted, HoldAlreadyExpired, NotFound, Unavailable
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal
from services.orchestrator.domain import Attempt, Candidate, Draw, Hold, LentCredit, Payer
from services.orchestrator.leases import IDLE_S, SHY_S, Leases

ANN = Principal("acme", "ann")
MODEL = Candidate("p", "m", 1000, 1000)
PRICES = {("p", "m"): Price("p", "m", 3, input=1_000_000, output=1_000_000)}
"""A token costs one nano-USD."""


@dataclass
class Line:
    """A ledger that lends a hundred nano-USD."""

    lent: dict[str, Payer] = field(default_factory=dict)
    returned: list[tuple[str, tuple[Draw, ...]]] = field(default_factory=list)
    wanted: set[str] = field(default_factory=set)
    away: bool = False
    empty: bool = False
    ended: bool = False

    async def lend(self, lease_id: str, payer: Payer) -> LentCredit:
        if self.away:
            raise Unavailable("", dependency="ledger")
        if self.empty:
            raise BudgetExhausted("")
        if self.ended and lease_id in self.lent:
            raise HoldAlreadyExpired("")
        self.lent[lease_id] = payer
        return LentCredit(100, 120.0, PRICES)

    async def take_back(self, lease_id: str, payer: Payer, draws: Sequence[Draw]) -> None:
        if self.away:
            raise Unavailable("", dependency="ledger")
        if self.lent.pop(lease_id, None) is None:
            raise NotFound("")
        self.returned.append((lease_id, tuple(draws)))

    async def recalled(self, held: Sequence[str]) -> set[str]:
        if self.away:
            raise Unavailable("", dependency="ledger")
        return self.wanted.intersection(held)


class World:
    """Leases with a clock that is moved by hand."""

    def __init__(self, leases_max: int = 10) -> None:
        self.now, self.line = 1000.0, Line()
        self.leases = Leases(self.line, leases_max, lambda: self.now)

    async def lent(self, principal: Principal = ANN) -> str:
        """The id of a fresh lease."""
        known = set(self.line.lent)
        self.leases.noted(principal)
        await self.leases._round()
        (lease_id,) = set(self.line.lent) - known
        return lease_id

    def draw(self, operation_id: str, tokens: int = 40, principal: Principal = ANN) -> Hold | None:
        return self.leases.draw(principal, operation_id, 1, MODEL, tokens // 2, tokens // 2)


@pytest.fixture
def world() -> World:
    return World()


def over(lease_id: str, cost: int, *, not_sent: bool = False) -> Attempt:
    return Attempt(1, "", "p", "m", "", Usage(), cost, "", "", 0, 0, False, 3, not_sent, lease_id, 40)


async def test_draws_stay_within_what_was_lent_and_what_is_not_used_may_be_drawn_again(world: World) -> None:
    lease_id = await world.lent()
    first, second = world.draw("a"), world.draw("b")
    assert first == second == Hold("", 40, PRICES["p", "m"], 20, lease_id)
    assert world.draw("c") is None
    assert world.draw("a") == first  # the same call is the same draw
    world.leases.ended("a", over(lease_id, 5))

    assert world.draw("c") == first
    assert world.draw("d") is None


async def test_nothing_is_drawn_without_a_lease_after_its_end_or_without_the_price(world: World) -> None:
    assert world.draw("a") is None
    await world.lent()
    assert world.leases.draw(ANN, "a", 1, replace(MODEL, model="other"), 1, 1) is None
    assert world.draw("a", principal=replace(ANN, api_key_id="k")) is None
    assert world.leases.covers(ANN)
    world.now += 120

    assert not world.leases.covers(ANN)
    assert world.draw("a") is None


async def test_a_lease_that_was_drawn_on_is_replaced_and_tells_of_what_is_not_booked(world: World) -> None:
    """A call that was booked meanwhile, or never sent, is not told of."""
    lease_id = await world.lent()
    for operation_id in "ab":
        world.draw(operation_id)
    booked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    world.leases.recorded("a", [over(lease_id, 40)], booked)
    booked.set_result(None)
    await asyncio.sleep(0)
    world.line.away = True
    with pytest.raises(Unavailable):
        await world.leases._round()
    assert world.leases.covers(ANN)
    world.line.away = False
    await world.leases._round()

    ((ended, draws),) = world.line.returned
    assert (ended, [draw.operation_id for draw in draws]) == (lease_id, ["b"])
    assert (draws[0].price_version, draws[0].amount_nanousd) == (3, 40)
    assert world.leases.covers(ANN)
    assert lease_id not in world.line.lent


async def test_a_call_that_was_never_sent_leaves_no_trace(world: World) -> None:
    lease_id = await world.lent()
    world.draw("a", 100)
    world.leases.ended("a", over(lease_id, 0, not_sent=True))
    assert world.draw("b", 100) is not None
    await world.leases._round()

    assert [draw.operation_id for _, draws in world.line.returned for draw in draws] == ["b"]


async def test_a_lease_is_prolonged_in_time_and_replaced_if_the_ledger_has_ended_it(world: World) -> None:
    lease_id = await world.lent()
    world.now += 31
    await world.leases._round()
    world.now += 100
    assert world.leases.covers(ANN)
    world.line.ended = True
    await world.leases._round()

    assert world.leases.covers(ANN)
    assert set(world.line.lent) - {lease_id}


async def test_who_asks_nothing_any_more_gives_back(world: World) -> None:
    await world.lent()
    world.now += IDLE_S + 1
    await world.leases._round()

    assert world.line.lent == {}


async def test_there_are_never_more_leases_than_are_allowed() -> None:
    world = World(leases_max=2)
    for user in ("a", "b", "c"):
        await world.lent(Principal("acme", user))
    await world.leases._round()

    assert sorted(payer.user for payer in world.line.lent.values()) == ["b", "c"]


async def test_an_exhausted_budget_gets_its_lease_back_once_and_none_is_taken_for_a_while(world: World) -> None:
    """All who were refused at the same time wait for the one return and may ask again; who comes later is refused at once."""
    await world.lent()
    began = world.now
    assert await asyncio.gather(*(world.leases.surrender(ANN, began) for _ in range(3))) == [True, True, True]
    assert len(world.line.returned) == 1
    world.now += 1
    assert not await world.leases.surrender(ANN, world.now)
    world.leases.noted(ANN)
    await world.leases._round()
    assert world.line.lent == {}
    world.now += SHY_S
    await world.leases._round()

    assert world.leases.covers(ANN)


async def test_everything_is_given_back_at_the_end_and_nothing_taken_after_it(world: World) -> None:
    await world.lent()
    assert await world.leases.give_back(1) == 0
    world.leases.noted(ANN)
    await world.leases._round()

    assert world.line.lent == {}


async def test_what_cannot_be_given_back_is_counted(world: World) -> None:
    await world.lent()
    world.line.away = True

    assert await world.leases.give_back(1) == 1


async def test_what_is_wanted_back_is_returned_at_once_and_not_asked_for_again_for_a_while(world: World) -> None:
    """Others keep theirs."""
    bob = replace(ANN, user="bob")
    lease_id, kept = await world.lent(), await world.lent(bob)
    world.line.wanted = {lease_id}
    await world.leases._round()
    await world.leases._round()
    assert (list(world.line.lent), world.leases.covers(ANN), world.leases.covers(bob)) == ([kept], False, True)
    world.now += SHY_S
    await world.leases._round()

    assert world.leases.covers(ANN)
