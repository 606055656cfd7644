"""The stream scenarios, short: every bar they have holds on a suite with two gateways, two orchestrators and two ledgers.

`make bench-streams` runs the same ones in full. A run prints its seed; SEED=… replays it.
"""

from collections.abc import AsyncIterator

import pytest

from bench.crowd import crowd
from bench.ground import Ground, Outcome, ground, seed_of_run
from bench.rotation import key_rotations
from bench.streams import (
    cancel_storm,
    cancels,
    cut_and_resume,
    disconnects,
    kills,
    limits,
    overload,
    rolling_restarts,
    single_flight,
    slow_readers,
)
from tests.integration.ledger.ledger_kit import audit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
async def made() -> AsyncIterator[Ground]:
    """One suite for all scenarios: each waits until the one before has left nothing open. The books are whole after all."""
    async with ground(seed_of_run()) as made:
        yield made
        assert await audit(made.suite.postgres.url) == {}


@pytest.fixture(autouse=True)
def _seed(made: Ground) -> None:
    print(f"SEED={made.seed}")  # shown when a test fails


BUSY = 4
"""How much slower than its bar a figure may be that is a time, or tokens made in it: twenty samples on a machine that does other things are
no p99."""
TIMES = ("ms", "tokens")


def holds(outcome: Outcome) -> None:
    missed = [bar for bar in outcome.bars if not bar.ok and (bar.unit not in TIMES or bar.figure > BUSY * bar.limit)]
    assert missed == [], f"seed {outcome.seed}: {outcome.notes}"


async def test_a_stream_that_is_cut_anywhere_is_read_on_at_another_replica_as_if_it_had_not_been(made: Ground) -> None:
    """Cut at every boundary and inside events: same bytes as the finished log, one provider call and one charge an answer."""
    outcome = await cut_and_resume(made, 60)
    holds(outcome)
    assert outcome.notes["cuts"] >= 60


async def test_a_cancel_closes_the_providers_socket_at_once(made: Ground) -> None:
    outcome = await cancels(made, 20)
    holds(outcome)
    assert outcome.notes["sockets closed"] >= 5


async def test_a_reader_who_leaves_at_any_byte_leaves_true_books(made: Ground) -> None:
    outcome = await disconnects(made, 20, pace=15)
    holds(outcome)
    assert outcome.notes["closed by us"] >= 5


async def test_requests_that_are_dropped_at_any_moment_mix_up_nobody(made: Ground) -> None:
    holds(await cancel_storm(made, 120))


async def test_a_limit_is_one_limit_however_many_gateways_there_are(made: Ground) -> None:
    """Two hundred at once at two gateways: exactly a hundred pass."""
    outcome = await limits(made, 200, seconds=0)
    holds(outcome)
    assert outcome.notes["statuses"] == {200: 100, 429: 100}


async def test_slow_readers_cost_little_and_disturb_nobody(made: Ground) -> None:
    holds(await slow_readers(made, 12, tokens=20))


async def test_a_killed_gateway_or_orchestrator_loses_no_reader_and_no_answer(made: Ground) -> None:
    holds(await kills(made, 1))


async def test_the_same_question_at_once_is_one_call_whoever_leaves_or_dies(made: Ground) -> None:
    """Two calls at most when a replica is killed in the middle; everybody else is told all of it."""
    holds(await single_flight(made, 1))


async def test_a_rolling_restart_fails_no_accepted_request(made: Ground) -> None:
    outcome = await rolling_restarts(made, 1, ("retrieval", "ledger-2", "orchestrator-2", "gateway-2"))
    holds(outcome)
    assert outcome.notes["accepted"] >= 20


async def test_keys_rotate_under_load_beside_made_up_key_ids_and_no_good_token_is_refused(made: Ground) -> None:
    """With short times: the key set is read no more often than once a pause, and a withdrawn key ends when the refresh is over."""
    holds(await key_rotations(made, 3, pause_s=1, refresh_s=2))


async def test_a_crowd_is_turned_away_by_type_batch_first_and_who_was_let_in_is_answered(made: Ground) -> None:
    """The provider answers nobody meanwhile, so that no figure depends on how fast the machine is."""
    holds(await crowd(made, 5))


async def test_five_times_what_can_be_carried_is_answered_or_refused_and_stops_nothing(made: Ground) -> None:
    """All are answered or refused, who is refused hears so soon, and the answers do not stop. What is made in
    seconds, beside whatever else the machine does, says no more; `make bench-streams` holds it against the peak and the bars."""
    outcome = await overload(made, 3)
    delivered, refused, lost = outcome.bars
    assert lost.ok, outcome.notes
    assert outcome.notes["refused"] > 0
    assert refused.figure <= 1000, outcome.notes
    assert delivered.figure > 0, outcome.notes
