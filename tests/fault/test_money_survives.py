"""The money scenarios, short: every bar they have holds on a suite with two gateways, two orchestrators and two ledgers.

`make bench-money` runs the same ones in full. A run prints its seed; SEED=… replays it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from bench.budgets import budget
from bench.full_disk import NotMounted, full, small_disk
from bench.ground import PLAN, TENANTS, Ground, Outcome, ground, seed_of_run
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


async def test_a_budget_for_k_of_many_at_once_admits_exactly_k_at_two_orchestrators(made: Ground) -> None:
    """Of a user who holds leases at both, of one never seen before, and of as many such as there are questions."""
    holds(await budget(made, 60))


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


async def test_full_disks_of_the_spools_refuse_what_is_new_and_lose_nothing(made: Ground, tmp_path: Path) -> None:
    """What was running when they filled up is done once there is room, and every provider call is booked."""
    try:
        with small_disk(tmp_path / "tried"):
            pass
    except NotMounted as error:
        pytest.skip(f"no file system of its own size can be mounted here: {error}")
    outcome = await full(made, 3)
    holds(outcome)
    assert outcome.notes["spools that were full"] == 2


async def test_a_changed_plan_is_seen_at_every_gateway_and_router_within_five_seconds(made: Ground) -> None:
    """Whoever was told the former plan a moment ago goes by the new one: by its limits, and by its tiers, at which the router looks."""
    tenant = TENANTS[0]
    await made.begin()

    async def told(gateway: str) -> tuple[int, int]:
        headers = {"authorization": f"Bearer {made.suite.token('mover', tenant)}"}
        async with httpx.AsyncClient(base_url=made.suite.url_of(gateway), headers=headers, timeout=30, trust_env=False) as http:
            reply = await http.post("/v1/answers", json={"question": "What moves?", "tier": "smart", "stream": False})
        return int(reply.headers["x-ratelimit-limit-requests"]), reply.status_code

    async with made.suite.client("admin", tenant, ("user", "admin")) as admin:
        plan = {**PLAN, "requests_per_minute": 777, "tiers": ["fast"]}
        (await admin.put("/v1/admin/plans/odd", json=plan)).raise_for_status()
        for gateway in made.suite.gateways:  # after what was done to them they take their time
            async with asyncio.timeout(60):
                while await told(gateway) != (600, 200):  # noqa: ASYNC110 - the services themselves are what is waited for
                    await asyncio.sleep(0.2)
        put = await admin.put("/v1/admin/subscriptions/mover", json={"plan": "odd", "when": "now"})
        began = time.monotonic()
        assert put.json()["plan"] == "odd"
        for gateway in made.suite.gateways:
            while await told(gateway) != (777, 403):
                assert time.monotonic() - began < 6  # five seconds, and the request itself
                await asyncio.sleep(0.2)
        cancelled = await admin.delete("/v1/admin/subscriptions/mover", params={"when": "period_end"})
        pending = (await admin.get("/v1/admin/subscriptions/mover")).json()

    assert cancelled.status_code == 204
    assert (pending["plan"], pending["next_plan"]) == ("odd", "free")
    assert pending["changes_at"]
