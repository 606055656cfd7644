"""The database's own lock on holds: every move that holds.py does not know is refused, by whatever statement it is tried."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg
import pytest

from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.ledger.domain import Reservation
from services.ledger.holds import HoldState
from services.ledger.postgres_database import Connection, opened
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_prices import PostgresPrices
from tests.integration.ledger.ledger_kit import HAIKU, Ledger, SetClock

LEGAL = {("reserved", "settled"), ("reserved", "voided"), ("reserved", "expired"), ("expired", "reconciled")}
STATES = tuple(state.value for state in HoldState)
FIXED = {
    "hold_id": "gen_random_uuid()",
    "tenant": "'other'",
    "user_id": "'other'",
    "api_key_id": "'other'",
    "operation_id": "gen_random_uuid()",
    "attempt": "attempt + 1",
    "provider": "'other'",
    "model": "'other'",
    "price_id": "price_id + 1",
    "input_tokens_max": "input_tokens_max + 1",
    "output_tokens_max": "output_tokens_max + 1",
    "output_tokens_wanted": "output_tokens_max + 1",
    "amount_nanousd": "amount_nanousd - 1",
    "created_at": "created_at + interval '1 day'",
}
"""Columns that say what a hold is for, and another value for each."""


async def hold_in(state: str, url: str, principal: Principal) -> UUID:
    """A hold that the ledger has brought into `state`."""
    clock = SetClock(datetime.now(UTC))
    async with opened(url, connections_max=2, wait_s=10) as database:
        holds = PostgresHolds(database, PostgresPrices(database, clock), clock)
        hold_id = UUID((await holds.reserve(principal, Reservation(uuid4(), 1, *HAIKU, 1000, 1000, 1000))).hold_id)
        if state in ("expired", "reconciled"):
            await database.value("UPDATE holds SET expires_at = created_at - interval '1 year' WHERE hold_id = $1", hold_id)
            assert await holds.expire_one(0) == str(hold_id)
        if state in ("settled", "reconciled"):
            await holds.settle(principal, hold_id, Usage(10, 10), estimated=False)
        if state == "voided":
            await holds.void(principal, hold_id)
    return hold_id


@pytest.fixture
async def connection(ledger: Ledger) -> AsyncIterator[Connection]:
    """A connection on which nothing that a test does is kept."""
    connection = await asyncpg.connect(ledger.url)
    transaction = connection.transaction()
    await transaction.start()
    yield connection
    await transaction.rollback()
    await connection.close()


async def refused(connection: Connection, statement: str, *arguments: object) -> bool:
    """Whether the lock refuses `statement`; what is undone either way."""
    try:
        async with connection.transaction():
            await connection.execute(statement, *arguments)
            raise _Undone
    except asyncpg.RestrictViolationError:
        return True
    except _Undone:
        return False


class _Undone(Exception):
    """Ends the transaction of a statement that was let through."""


@pytest.mark.parametrize("before", STATES)
async def test_a_hold_leaves_its_state_only_as_documented(ledger: Ledger, ann: Principal, connection: Connection, before: str) -> None:
    """All pairs of states: the legal moves pass, every other one is refused."""
    hold_id = await hold_in(before, ledger.url, ann)
    passed = set()
    for after in STATES:
        resolved = "NULL" if after == "reserved" else "now()"
        cost = {"reserved": "0", "voided": "0", "expired": "amount_nanousd"}.get(after, "cost_nanousd + 1")
        statement = (
            f"UPDATE holds SET state = '{after}', resolved_at = {resolved}, cost_nanousd = {cost}, input_tokens = 0, output_tokens = 0"
        )
        if not await refused(connection, f"{statement} WHERE hold_id = $1", hold_id):
            passed.add((before, after))

    assert passed - {("reserved", "reserved")} == {move for move in LEGAL if move[0] == before}


@pytest.mark.parametrize("state", ["reserved", "settled"])
async def test_what_a_hold_is_for_never_changes(ledger: Ledger, ann: Principal, connection: Connection, state: str) -> None:
    """Owner, call, price, bounds and amount stay what they were, alone and together with a move."""
    hold_id = await hold_in(state, ledger.url, ann)
    for column, other in FIXED.items():
        for move in ("", ", state = 'settled', resolved_at = now()"):
            assert await refused(connection, f"UPDATE holds SET {column} = {other}{move} WHERE hold_id = $1", hold_id), column


@pytest.mark.parametrize("state", STATES)
async def test_what_a_hold_came_to_changes_by_a_move_only(ledger: Ledger, ann: Principal, connection: Connection, state: str) -> None:
    """The outcome is written once; a correction is a move of its own."""
    hold_id = await hold_in(state, ledger.url, ann)
    for change in (
        "cost_nanousd = cost_nanousd + 1",
        "output_tokens = output_tokens + 1",
        "estimated = NOT estimated",
        "resolved_at = 'epoch'",
    ):
        assert await refused(connection, f"UPDATE holds SET {change} WHERE hold_id = $1", hold_id), change


async def test_only_an_open_hold_can_be_given_more_time(ledger: Ledger, ann: Principal, connection: Connection) -> None:
    """When a resolved hold would have expired is history."""
    statement = "UPDATE holds SET expires_at = now() + interval '1 h' WHERE hold_id = $1"

    assert not await refused(connection, statement, await hold_in("reserved", ledger.url, ann))
    assert await refused(connection, statement, await hold_in("settled", ledger.url, ann))


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        ("voided", "cost_nanousd = 1"),
        ("voided", "output_tokens = 1"),
        ("expired", "cost_nanousd = amount_nanousd - 1"),
        ("expired", "cost_nanousd = amount_nanousd, input_tokens = 1"),
    ],
)
async def test_a_move_has_the_outcome_of_its_kind(ledger: Ledger, ann: Principal, connection: Connection, state: str, outcome: str) -> None:
    """A voided hold costs nothing, an expired one all of it, and nobody knows tokens of either."""
    hold_id = await hold_in("reserved", ledger.url, ann)

    assert await refused(connection, f"UPDATE holds SET state = '{state}', resolved_at = now(), {outcome} WHERE hold_id = $1", hold_id)


NOBODY = "'00000000-0000-4000-8000-000000000000'::uuid"
BORN = (
    "INSERT INTO holds (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id, input_tokens_max,"
    " output_tokens_max, amount_nanousd, created_at, expires_at, state, resolved_at, cost_nanousd, output_tokens)"
    " SELECT tenant, user_id, api_key_id, gen_random_uuid(), 1, {provider}, model, price_id, {lease}, 1, 1, {amount}, now(), now(),"
    " '{state}', now(), {cost}, {cost} FROM holds WHERE hold_id = $1"
)


@pytest.mark.parametrize(
    "birth",
    [
        {"amount": "1"},  # set aside by nobody: only what a lease has can be taken along
        {"state": "voided", "amount": "1"},
        {"state": "voided", "cost": "1"},
        {"state": "expired"},
        {"state": "expired", "lease": "hold_id"},
        {"state": "reconciled", "lease": "hold_id"},
        {"provider": "''", "lease": "hold_id"},  # a lease
    ],
)
async def test_only_a_call_that_is_over_is_born_resolved(
    ledger: Ledger, ann: Principal, connection: Connection, birth: dict[str, str]
) -> None:
    """It has cost something or was never sent, and what it takes along is of a lease; every other hold begins as reserved."""
    hold_id = await hold_in("settled", ledger.url, ann)
    legal = {"state": "settled", "provider": "provider", "lease": "NULL", "amount": "0", "cost": "0"}

    assert not await refused(connection, BORN.format(**legal), hold_id)
    assert not await refused(connection, BORN.format(**legal | {"lease": "hold_id", "amount": "1"}), hold_id)
    assert await refused(connection, BORN.format(**legal | birth), hold_id)


async def test_holds_are_never_deleted(ledger: Ledger, ann: Principal, connection: Connection) -> None:
    """Nothing goes away."""
    hold_id = await hold_in("settled", ledger.url, ann)

    assert await refused(connection, "DELETE FROM holds WHERE hold_id = $1", hold_id)
    assert await refused(connection, "TRUNCATE holds CASCADE")


async def test_an_entry_is_of_a_hold(ledger: Ledger, ann: Principal, connection: Connection) -> None:
    """One that is there, and of its tenant and operation."""
    hold_id = await hold_in("reserved", ledger.url, ann)
    entry = (
        "INSERT INTO entries SELECT 1000, a.account, {tenant}, {hold}, {operation}, 'correct', a.amount, now()"
        " FROM holds CROSS JOIN (VALUES ('available', -1), ('spent', 1)) AS a (account, amount) WHERE hold_id = $1"
    )
    own = {"tenant": "tenant", "hold": "hold_id", "operation": "operation_id"}

    for other in ({"hold": NOBODY}, {"tenant": "'other'"}, {"operation": NOBODY}):
        with pytest.raises(asyncpg.CheckViolationError, match="not of its hold"):
            async with connection.transaction():
                await connection.execute(entry.format(**own | other), hold_id)
    await connection.execute(entry.format(**own), hold_id)
