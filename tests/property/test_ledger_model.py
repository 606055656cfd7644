"""The hold's state machine, and the database that carries it out, against one model that is too plain to be wrong."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.chassis.errors import BudgetExhausted, DomainError
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal
from services.ledger import holds, postgres_schema
from services.ledger.domain import Reservation
from services.ledger.holds import Hold
from services.ledger.postgres_budgets import PostgresBudgets
from services.ledger.postgres_database import Database, opened
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_prices import PostgresPrices
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import HAIKU, audit, fresh_database

INPUT, OUTPUT = 1_000, 5_000
"""nano-USD a token."""


@dataclass
class Model:
    """What a budget with holds should do, in the plainest words."""

    limit: int
    spent: int = 0
    open: dict[str, int] = field(default_factory=dict)
    done: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Hold to how it was resolved and what was booked."""

    def reserve(self, hold: str, amount: int) -> bool:
        if self.spent + sum(self.open.values()) + amount > self.limit:
            return False
        self.open[hold] = amount
        return True

    def settle(self, hold: str, cost: int) -> str:
        if hold in self.open:
            del self.open[hold]
            self.spent += cost
            self.done[hold] = ("settled", cost)
            return "ok"
        how, booked = self.done[hold]
        if how == "expired":
            self.spent += cost - booked
            self.done[hold] = ("settled", cost)
            return "ok"
        return "ok" if (how, booked) == ("settled", cost) else f"HOLD_ALREADY_{how.upper()}"

    def void(self, hold: str) -> str:
        if hold not in self.open:
            return f"HOLD_ALREADY_{self.done[hold][0].upper()}"
        del self.open[hold]
        self.done[hold] = ("voided", 0)
        return "ok"

    def expire(self, hold: str) -> None:
        amount = self.open.pop(hold)
        self.spent += amount
        self.done[hold] = ("expired", amount)


class HoldsFollowTheModel(RuleBasedStateMachine):
    """Reserve, settle, void, expire and late settle in any order: the pure machine books what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(limit=10**12)
        self.holds: dict[str, Hold] = {}
        self.posted: dict[str, tuple[int, int]] = {}

    def _post(self, hold_id: str, held: int, spent: int) -> None:
        before = self.posted[hold_id]
        self.posted[hold_id] = (before[0] + held, before[1] + spent)

    @rule(amount=st.integers(0, 10**9))
    def reserve(self, amount: int) -> None:
        hold_id = str(len(self.holds))
        assert self.model.reserve(hold_id, amount)
        self.holds[hold_id] = Hold(hold_id, amount, Price("p", "m", input=10**6, output=10**6))
        self.posted[hold_id] = (amount, 0)

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), move=st.sampled_from(["settle", "void", "expire"]), tokens=st.integers(0, 3))
    def resolve(self, data: st.DataObject, move: str, tokens: int) -> None:
        hold_id = data.draw(st.sampled_from(sorted(self.holds)))
        hold = self.holds[hold_id]
        if move == "expire":
            if hold_id not in self.model.open:
                with pytest.raises(DomainError):
                    holds.expire(hold)
                return
            self.model.expire(hold_id)
            expected = "ok"
        else:
            expected = self.model.settle(hold_id, tokens) if move == "settle" else self.model.void(hold_id)
        try:
            usage = Usage(input_tokens=tokens)
            made = {
                "settle": lambda: holds.settle(hold, usage, estimated=False),
                "void": lambda: holds.void(hold),
                "expire": lambda: holds.expire(hold),
            }[move]()
        except DomainError as error:
            assert error.reason == expected
            return
        assert expected == "ok"
        if made is not None:
            assert made.held_nanousd + made.spent_nanousd + made.available_nanousd == 0
            self.holds[hold_id] = made.hold
            self._post(hold_id, made.held_nanousd, made.spent_nanousd)

    @invariant()
    def the_postings_tell_what_is_held_and_spent(self) -> None:
        assert sum(spent for _, spent in self.posted.values()) == self.model.spent
        assert {hold_id: held for hold_id, (held, _) in self.posted.items() if held} == {k: v for k, v in self.model.open.items() if v}


TestHoldsFollowTheModel = HoldsFollowTheModel.TestCase
TestHoldsFollowTheModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


class StillClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 11, 23, 12, tzinfo=UTC)

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.moment.timestamp()


@pytest.fixture(scope="session")
async def books(postgres: Postgres) -> AsyncIterator[tuple[str, Database]]:
    """A prepared database of its own."""
    url = await fresh_database(postgres)
    async with opened(url, connections_max=4, wait_s=10) as database:
        await postgres_schema.prepare(database)
        yield url, database


steps = st.lists(
    st.tuples(st.sampled_from(["reserve", "reserve", "settle", "void", "expire"]), st.integers(0, 4), st.integers(0, 3)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=steps, room=st.integers(0, 6))
async def test_the_database_books_what_the_model_says(books: tuple[str, Database], steps: list[tuple[str, int, int]], room: int) -> None:
    """The same operations on PostgreSQL and on the model: same admissions, same refusals, same money, and books that balance."""
    url, database = books
    clock = StillClock()
    prices = PostgresPrices(database, clock)
    book, budgets = PostgresHolds(database, prices, clock), PostgresBudgets(database, clock)
    ann = Principal(f"tenant-{secrets.token_hex(8)}", "ann")
    amount = 10 * 2 * INPUT + 10 * OUTPUT
    await budgets.put(ann.tenant, "user", "ann", "day", room * amount)
    model = Model(limit=room * amount)
    known: list[str] = []
    for action, which, tokens in steps:
        if action == "reserve":
            wanted = Reservation(uuid4(), 1, *HAIKU, 10, 10, 60_000)
            try:
                held = await book.reserve(ann, wanted)
            except BudgetExhausted as refusal:
                assert not model.reserve("refused", amount)
                assert int(refusal.metadata["left_nanousd"]) == model.limit - model.spent - sum(model.open.values())
            else:
                assert model.reserve(held.hold_id, held.amount_nanousd)
                known.append(held.hold_id)
        elif action == "expire":
            clock.moment += timedelta(minutes=2)
            while (hold_id := await book.expire_one(0)) is not None:
                if hold_id in model.open:  # the sweeper works for all tenants; only this one's are compared
                    model.expire(hold_id)
            assert not model.open
        elif known:
            hold_id = known[which % len(known)]
            expected = model.settle(hold_id, tokens * OUTPUT) if action == "settle" else model.void(hold_id)
            try:
                if action == "settle":
                    await book.settle(ann, UUID(hold_id), Usage(output_tokens=tokens), estimated=False)
                else:
                    await book.void(ann, UUID(hold_id))
                outcome = "ok"
            except DomainError as error:
                outcome = error.reason
            assert outcome == expected
        [budget] = await budgets.of(ann.tenant, "user", "ann")
        assert (budget.spent_nanousd, budget.held_nanousd) == (model.spent, sum(model.open.values()))
    assert await audit(url) == {}
