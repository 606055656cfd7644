"""Credit leases at the orchestrator: who is known goes on being answered while the ledger is out of reach, within what was lent."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.chassis.errors import BudgetExhausted, DomainError, Unavailable
from services.chassis.money import Usage
from services.local.stores import Valkey
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import BOB, PRICES, Reply, World, replica, until, world

QUESTION = "Which port does the gateway listen on?"
HURRIED = {"TAILRACE_ORCHESTRATOR_RESTART_PATIENCE_S": "0.2"}


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator at the simulated provider. Whatever a test does, no hold and no lease is left open after it."""
    async with world(tmp_path, valkey.url, **HURRIED) as running:
        yield running
        running.ledger.away = False
    assert running.ledger.open_holds == set()
    assert running.ledger.leases == {}


async def ask(world: World, **fields: object) -> Reply:
    return await world.ask(QUESTION, cache=pb.CACHE_MODE_OFF, **fields)


async def leased(world: World) -> None:
    """Let the ledger have lent to ALICE, and go away."""
    await ask(world)
    await until(lambda: world.ledger.leases)
    world.ledger.away = True


async def test_a_known_user_is_answered_while_the_ledger_is_away(claude: World) -> None:
    """A new question is paid from the lease, and once the ledger is back its record says so; then another lease takes its place."""
    await leased(claude)
    (first,) = claude.ledger.leases
    reply = await ask(claude)
    assert len(claude.ledger.operations) == 1
    claude.ledger.away = False
    operation = await claude.booked(reply.answer_id)
    (attempt,) = operation.attempts
    await until(lambda: claude.ledger.leases and first not in claude.ledger.leases, 15)

    assert reply.done.verdict == "passed"
    assert (attempt.lease_id, attempt.hold_id, attempt.price_version) == (first, "", 1)
    usage = Usage(attempt.usage.input_tokens, attempt.usage.output_tokens)
    assert attempt.drawn_nanousd > PRICES["claude-haiku-5-5"].cost_nanousd(usage) > 0


async def test_a_call_that_still_runs_is_told_when_its_lease_ends(claude: World) -> None:
    """The ledger makes a hold of it, so that what is given back is not what it needs."""
    claude.behave(tokens=20)
    await leased(claude)
    claude.behave(tokens=400, tokens_per_s=50)
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, into=reply))
    await until(lambda: "delta" in reply.kinds)
    claude.ledger.away = False
    await until(lambda: claude.ledger.returned, 15)
    (draw,) = claude.ledger.returned[0].draws
    await claude.cancel(reply.answer_id)
    with pytest.raises(DomainError):
        await asking

    assert (draw.operation_id, draw.attempt, draw.model, draw.price_version) == (reply.answer_id, 1, "claude-haiku-5-5", 1)
    assert draw.amount_nanousd > 0


async def test_a_user_without_a_lease_is_refused_and_told_when_to_come_again(claude: World) -> None:
    """As ever: no provider call is made that nobody has set money aside for."""
    await leased(claude)
    with pytest.raises(Unavailable) as refused:
        await ask(claude, principal=BOB)

    assert refused.value.retry_after_ms == 1000
    assert len(await claude.records()) == 1


async def test_what_is_drawn_never_passes_what_was_lent(claude: World) -> None:
    """Forty questions at once on a lease that pays for three: three provider calls."""
    worst = PRICES["claude-haiku-5-5"]
    await ask(claude)
    await until(lambda: claude.ledger.leases)
    held = next(iter(claude.ledger.holds.values()))
    amount = worst.worst_case_nanousd(held.input_tokens_max, held.output_tokens_max)
    claude.ledger.credit_nanousd = 3 * amount + amount // 2
    async with replica(claude, claude.spool_path.parents[1] / "two") as poor:
        await ask(poor)
        await until(lambda: len(claude.ledger.leases) == 2)
        known = len(await claude.records())
        claude.ledger.away = True
        claude.behave(tokens=20, tokens_per_s=20)
        replies = await asyncio.gather(*(ask(poor) for _ in range(40)), return_exceptions=True)
        claude.ledger.away = False

    assert sum(isinstance(reply, Reply) for reply in replies) == 3
    assert all(isinstance(reply, (Reply, Unavailable)) for reply in replies)
    assert len(await claude.records()) - known == 3


async def test_a_lease_is_not_used_when_the_ledger_refuses(claude: World) -> None:
    """An exhausted budget gets the lease back, is asked once more, and then that is the answer."""
    await ask(claude)
    await until(lambda: claude.ledger.leases)
    claude.ledger.broke = True
    replies = await asyncio.gather(*(ask(claude) for _ in range(5)), return_exceptions=True)

    assert all(isinstance(reply, BudgetExhausted) for reply in replies)
    assert (len(claude.ledger.returned), claude.ledger.leases) == (1, {})
    assert len(await claude.records()) == 1


async def test_the_intent_is_on_disk_before_the_provider_is_asked(claude: World, tmp_path: Path) -> None:
    """While the call hangs, the spool already says what to book for it, and on whose lease."""
    await leased(claude)
    claude.behave(fault="hang")
    reply = Reply()
    asking = asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, into=reply))
    await until(lambda: len(claude.provider.records) == 2)
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes(claude.spool_path.with_name(claude.spool_path.name + suffix).read_bytes())
    with contextlib.closing(sqlite3.connect(copy)) as database:
        kept = database.execute("SELECT payload FROM running WHERE operation_id = ?", (reply.answer_id,)).fetchone()
    (attempt,) = ledger_pb.Operation.FromString(kept[0]).attempts
    await claude.cancel(reply.answer_id)
    with pytest.raises(DomainError):
        await asking

    assert attempt.lease_id in claude.ledger.leases
    assert (attempt.estimated, attempt.not_sent) == (True, False)
    assert attempt.drawn_nanousd > 0


async def test_without_leases_nothing_is_lent_and_nothing_drawn(tmp_path: Path, valkey: Valkey) -> None:
    """The setting 0 turns them off."""
    async with world(tmp_path, valkey.url, **HURRIED, TAILRACE_ORCHESTRATOR_CREDIT_LEASES_MAX="0") as running:
        await ask(running)
        running.ledger.away = True
        with pytest.raises(Unavailable):
            await ask(running)
        running.ledger.away = False

    assert running.ledger.returned == []


async def test_what_is_lent_to_others_is_waited_for(claude: World) -> None:
    """A budget that could pay if leases came back is asked again; one that could not is not."""
    claude.ledger.lent_elsewhere = 3
    reply = await ask(claude)
    claude.ledger.broke = True
    with pytest.raises(BudgetExhausted):
        await ask(claude)

    assert reply.done.verdict == "passed"
    assert claude.ledger.lent_elsewhere == 0


async def test_what_does_not_come_back_in_time_is_refused(claude: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the lease may be gone: then it is the budget's word that counts, with what is lent."""
    monkeypatch.setattr("services.orchestrator.attempts.RETURNED_WITHIN_S", 0.3)
    claude.ledger.lent_elsewhere = 1_000
    with pytest.raises(BudgetExhausted) as refused:
        await ask(claude)
    claude.ledger.lent_elsewhere = 0

    assert refused.value.metadata["lent_nanousd"] == "3"
    assert await claude.records() == []


async def test_a_recalled_lease_is_given_back_and_not_taken_again(claude: World) -> None:
    """Within a second, though its user asks on."""
    await ask(claude)
    await until(lambda: claude.ledger.leases)
    (lease_id,) = claude.ledger.recalled = set(claude.ledger.leases)
    await until(lambda: claude.ledger.returned)
    await ask(claude)

    assert [returned.lease_id for returned in claude.ledger.returned] == [lease_id]
    assert claude.ledger.leases == {}


async def test_a_ledger_in_a_rush_is_asked_again(claude: World) -> None:
    """It has not begun what it refused, whether a lease could have paid or not."""
    claude.ledger.busy = 2
    await ask(claude)
    await until(lambda: claude.ledger.leases)
    claude.ledger.busy = 2
    reply = await ask(claude)

    assert reply.done.verdict == "passed"
    assert claude.ledger.busy == 0
