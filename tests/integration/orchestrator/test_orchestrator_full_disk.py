"""An orchestrator whose spool has no room left on its disk: nothing new begins, what runs is booked, and with room all goes on."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.chassis.errors import Overloaded
from services.local.stores import Valkey
from services.orchestrator.spool import FREE_BYTES_MIN, Spool
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import Reply, World, until, world

QUESTION = "Which port does the gateway listen on?"
TITLES = {"TAILRACE_ORCHESTRATOR_TITLES": "model"}


class Disk:
    """What the spool is told of its disk."""

    def __init__(self) -> None:
        self.free_bytes = FREE_BYTES_MIN


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(Spool, "_free_bytes", lambda _: disk.free_bytes)
    return disk


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey, disk: Disk) -> AsyncIterator[World]:
    """An orchestrator that has conversations titled by its model."""
    async with world(tmp_path, valkey.url, **TITLES) as running:
        yield running
        await until(lambda: not running.ledger.open_holds)


async def ask(world: World, session_id: str, into: Reply | None = None) -> Reply:
    return await world.ask(QUESTION, cache=pb.CACHE_MODE_OFF, session_id=session_id, into=into)


def titled(world: World) -> list[ledger_pb.Operation]:
    return [operation for operation in world.ledger.operations.values() if operation.purpose == "title"]


async def test_nothing_new_begins_while_what_runs_ends_and_is_booked(claude: World, disk: Disk) -> None:
    """A question is told to come again and never sent, a running answer is whole, and its errand is left out; then all goes on."""
    claude.behave(tokens=60, tokens_per_s=60)
    running = Reply()
    asking = asyncio.create_task(ask(claude, "before", running))
    await until(lambda: "delta" in running.kinds)
    disk.free_bytes = FREE_BYTES_MIN - 1
    with pytest.raises(Overloaded) as refused:
        await ask(claude, "refused")
    during = await asking
    booked_during = await claude.booked(during.answer_id)
    sent_during = len(await claude.records())
    disk.free_bytes = FREE_BYTES_MIN
    after = await ask(claude, "after")
    await claude.booked(after.answer_id)
    await until(lambda: titled(claude))

    assert refused.value.retry_after_ms == 5000
    assert during.done.verdict == after.done.verdict == "passed"
    assert booked_during.status == "done"
    assert sent_during == 1
    assert [operation.session_id for operation in titled(claude)] == ["after"]
    assert len(claude.ledger.operations) == len(await claude.records()) == 3
