"""The money scenarios, short: every bar they have holds on a suite with two gateways, two orchestrators and two ledgers.

`make bench-money` runs the same ones in full. A run prints its seed; SEED=… replays it.
"""

from collections.abc import AsyncIterator

import pytest

from bench.ground import Ground, Outcome, ground, seed_of_run
from bench.money import away, ledgers, orchestrators, postgres

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
async def made() -> AsyncIterator[Ground]:
    """One suite for all scenarios: each waits until the one before has left nothing open."""
    async with ground(seed_of_run()) as made:
        yield made


@pytest.fixture(autouse=True)
def _seed(made: Ground) -> None:
    print(f"SEED={made.seed}")  # shown when a test fails


def holds(outcome: Outcome) -> None:
    """Every bar, but that of the mean of estimates: a few of them are no mean."""
    missed = [bar for bar in outcome.bars if not bar.ok and bar.unit != "%"]
    assert missed == [], f"seed {outcome.seed}: {outcome.notes}"


async def test_known_users_are_answered_while_every_ledger_is_away_and_all_of_it_is_booked(made: Ground) -> None:
    outcome = await away(made, 8)
    holds(outcome)
    assert outcome.notes["drawn on leases"] >= 8


async def test_a_killed_orchestrator_leaves_true_books(made: Ground) -> None:
    outcome = await orchestrators(made, 2)
    holds(outcome)
    assert outcome.notes["estimated"] >= 1


async def test_a_killed_ledger_leaves_true_books(made: Ground) -> None:
    outcome = await ledgers(made, 2)
    holds(outcome)
    assert outcome.notes["exact"] >= 20


async def test_a_killed_database_leaves_true_books(made: Ground) -> None:
    outcome = await postgres(made, 2)
    holds(outcome)
    assert outcome.notes["exact"] >= 20
