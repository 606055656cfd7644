"""The hold's state machine, and the database that carries it out, against one model that is too plain to be wrong."""

import contextlib
import os
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
from services.ledger.postgres_keys import PostgresKeys
from services.ledger.postgres_prices import PostgresPrices
from services.local.stores import Postgres
from tests.integration.ledger.ledger_kit import HAIKU, SetClock, audit, fresh_database

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

    @property
    def left(self) -> int:
        return self.limit - self.spent - sum(self.open.values())

    def reserve(self, hold: str, amount: int) -> bool:
        if amount > self.left:
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


RUNS = int(os.environ.get("LEDGER_MODEL_RUNS", "40"))
"""Runs on the real database; `LEDGER_MODEL_RUNS=2000` is the full proof, of `make prove-ledger`, in which every run has all its steps."""
STEPS = 30
RUNS_PER_DATABASE = 25
"""After so many runs the next one gets fresh books, because each run ends with an audit of everything there is."""


class Shelf:
    """Prepared databases, one after the other."""

    def __init__(self, server: Postgres) -> None:
        self._server, self._runs = server, 0
        self._open = contextlib.AsyncExitStack()
        self._current: tuple[str, Database] | None = None

    async def books(self) -> tuple[str, Database]:
        """Where this run keeps its books."""
        if self._current is None or self._runs % RUNS_PER_DATABASE == 0:
            await self.close()
            url = await fresh_database(self._server)
            database = await self._open.enter_async_context(opened(url, connections_max=4, wait_s=10))
            await postgres_schema.prepare(database)
            self._current = url, database
        self._runs += 1
        return self._current

    async def close(self) -> None:
        await self._open.aclose()


@pytest.fixture(scope="session")
async def shelf(postgres: Postgres) -> AsyncIterator[Shelf]:
    """Databases of our own."""
    shelf = Shelf(postgres)
    yield shelf
    await shelf.close()


def amount_of(output_tokens: int) -> int:
    return 10 * 2 * INPUT + output_tokens * OUTPUT


actions = ["reserve", "reserve", "reserve_less", "settle", "settle", "void", "unsent", "wait", "expire"]
steps = st.lists(
    st.tuples(st.sampled_from(actions), st.integers(0, 4), st.integers(0, 12)), min_size=STEPS if RUNS > 40 else 1, max_size=STEPS
)
places = st.lists(st.tuples(st.sampled_from(["tenant", "user", "key"]), st.sampled_from(["day", "month"])), min_size=1, unique=True)
"""Which budgets there are; the first is the tightest."""


@settings(max_examples=RUNS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=steps, room=st.integers(0, 6 * amount_of(10)), places=places)
@pytest.mark.timeout(0 if RUNS > 40 else 120)
async def test_the_database_books_what_the_model_says(
    shelf: Shelf, steps: list[tuple[str, int, int]], room: int, places: list[tuple[str, str]]
) -> None:
    """Reserve, settle, void, expire and settle late in any order, on PostgreSQL and on the model: same admissions, same refusals, same
    money after every step, and books that the auditor finds whole."""
    url, database = await shelf.books()
    clock = SetClock(datetime(2026, 11, 23, 12, tzinfo=UTC))
    prices = PostgresPrices(database, clock)
    book, budgets, keys = PostgresHolds(database, prices, clock), PostgresBudgets(database, clock), PostgresKeys(database, clock)
    tenant = f"tenant-{secrets.token_hex(8)}"
    key, _ = await keys.create(tenant, "ann", "k", ["user"], [], None)
    ann = Principal(tenant, "ann", api_key_id=key.key_id)
    subjects = {"tenant": tenant, "user": "ann", "key": key.key_id}
    for number, (scope, period) in enumerate(places):
        await budgets.put(tenant, scope, subjects[scope], period, room + number)
    model = Model(limit=room)
    expires: dict[str, datetime] = {}
    for action, which, tokens in steps:
        outcome = expected = "ok"
        if action.startswith("reserve"):
            least = 1 + tokens % 10 if action == "reserve_less" else 0
            payable = [count for count in range(least or 10, 11) if amount_of(count) <= model.left]
            ttl_ms = (60_000, 600_000)[which % 2]
            try:
                held = await book.reserve(ann, Reservation(uuid4(), 1, *HAIKU, 10, 10, ttl_ms, least))
            except BudgetExhausted as refusal:
                assert not payable
                assert int(refusal.metadata["left_nanousd"]) == model.left
            else:
                assert (held.output_tokens_max, held.amount_nanousd) == (max(payable), amount_of(max(payable)))
                assert model.reserve(held.hold_id, held.amount_nanousd)
                expires[held.hold_id] = held.expires_at
        elif action == "wait":
            clock.moment += timedelta(seconds=10 * tokens)
        elif action == "expire":
            clock.moment += timedelta(seconds=20 * tokens)
            due = {hold_id for hold_id in model.open if expires[hold_id] <= clock.moment}
            while (hold_id := await book.expire_one(0)) is not None:
                if hold_id in expires:  # the sweeper works for all tenants; only this one's are compared
                    due.remove(hold_id)
                    model.expire(hold_id)
            assert due == set()
        elif expires:
            hold_id = list(expires)[which % len(expires)]
            cost = 0 if action == "unsent" else 5 * tokens * OUTPUT  # up to more than any hold
            expected = model.void(hold_id) if action == "void" else model.settle(hold_id, cost)
            try:
                if action == "void":
                    await book.void(ann, UUID(hold_id))
                else:
                    await book.settle(ann, UUID(hold_id), Usage(output_tokens=cost // OUTPUT), estimated=False)
            except DomainError as error:
                outcome = error.reason
        assert outcome == expected
        for scope, period in places:
            seen = next(budget for budget in await budgets.of(tenant, scope, subjects[scope]) if budget.period == period)
            assert (seen.spent_nanousd, seen.held_nanousd) == (model.spent, sum(model.open.values()))
    assert await audit(url) == {}
