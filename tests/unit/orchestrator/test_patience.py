"""What a recall does when retrieval goes away for a moment: it is begun again; what cannot heal by waiting is told at once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from services.chassis import channel
from services.chassis.channel import Caller
from services.chassis.deadline import Deadline, current_deadline
from services.chassis.errors import DomainError, RemoteError, Unavailable
from services.chassis.lifecycle import Readiness
from services.orchestrator.clients import RemoteLedger, RemoteRecall, ping
from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.domain import Edition
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb

STARTED = pb.RecallResponse(started=pb.RecallStarted(collection_epoch=7))
VERDICT = pb.RecallResponse(verdict=pb.RecallVerdict(reason="no_candidate"))
PASSAGES = pb.RecallResponse(passages=pb.RecallPassages())
AWAY = Unavailable("", dependency="127.0.0.1:50052")


class Retrieval:
    """Streams as scripted, the last script again and again."""

    def __init__(self, *scripts: list[pb.RecallResponse | DomainError]) -> None:
        self._scripts, self.begun, self.open = list(scripts), 0, 0

    @contextlib.asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncIterator[pb.RecallResponse]]:
        self.begun += 1
        self.open += 1
        try:
            yield self._play(self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0])
        finally:
            self.open -= 1

    async def _play(self, script: list[pb.RecallResponse | DomainError]) -> AsyncIterator[pb.RecallResponse]:
        for beat in script:
            if isinstance(beat, DomainError):
                raise beat
            yield beat


@pytest.mark.parametrize("loss", [AWAY, RemoteError("cut", remote_code="CANCELLED")])
async def test_recall_is_begun_again_while_retrieval_restarts(loss: DomainError) -> None:
    """Before its first part and between two; what was had already is not asked for again."""
    retrieval = Retrieval([loss], [loss], [STARTED, VERDICT, loss], [STARTED, VERDICT, PASSAGES])
    recall = RemoteRecall(retrieval.begin, 5)

    assert await recall.edition() == Edition(7)
    assert (await recall.verdict()).reason == "no_candidate"
    assert await recall.passages() == ()
    await recall.aclose()
    assert (retrieval.begun, retrieval.open) == (4, 0)


async def test_a_restart_that_takes_most_of_a_minute_fails_no_accepted_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, for a request that has the time: on a crowded machine a model takes so long to load."""
    now = 0.0

    async def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    @contextlib.asynccontextmanager
    async def begin() -> AsyncIterator[AsyncIterator[pb.RecallResponse]]:
        async with Retrieval([AWAY] if now < 50 else [STARTED]).begin() as messages:
            yield messages

    monkeypatch.setattr(channel, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(channel, "asyncio", SimpleNamespace(sleep=pause))
    recall = RemoteRecall(begin, OrchestratorSettings.model_fields["restart_patience_s"].default)

    assert await recall.edition() == Edition(7)


async def test_store_that_is_away_is_not_waited_for() -> None:
    """Retrieval itself said so."""
    retrieval = Retrieval([Unavailable("", dependency="qdrant")])
    with pytest.raises(Unavailable) as told:
        await RemoteRecall(retrieval.begin, 5).edition()

    assert (retrieval.begun, told.value.metadata["dependency"]) == (1, "qdrant")


async def test_patience_ends_with_its_time_and_with_the_answers() -> None:
    """Whichever is less."""
    for patience_s, deadline_s in ((0.3, 60.0), (60.0, 0.3)):
        retrieval, began = Retrieval([AWAY]), time.monotonic()
        current_deadline.set(Deadline.after(deadline_s))
        with pytest.raises(Unavailable) as told:
            await RemoteRecall(retrieval.begin, patience_s).edition()
        current_deadline.set(None)

        assert told.value.metadata["dependency"] == "retrieval"
        assert retrieval.begun > 2
        assert time.monotonic() - began < 1


class Turns:
    """A ledger as a caller of it sees it: it cannot be reached for some calls, then has a conversation of one turn."""

    def __init__(self, lost: int) -> None:
        self._lost, self.calls = lost, 0

    @contextlib.asynccontextmanager
    async def stream(self, method: Any, request: Any, *, timeout_s: float) -> AsyncIterator[AsyncIterator[ledger_pb.ListTurnsResponse]]:
        self.calls += 1
        yield self._rows(self.calls <= self._lost)

    async def _rows(self, lost: bool) -> AsyncIterator[ledger_pb.ListTurnsResponse]:
        yield ledger_pb.ListTurnsResponse(turn=ledger_pb.Turn(question="first?"))
        if lost:
            raise Unavailable("", dependency="127.0.0.1:50053")


@pytest.mark.parametrize(("patient", "calls"), [(True, 4), (False, 1)])
async def test_a_follow_up_waits_for_its_conversation_while_the_ledger_restarts(patient: bool, calls: int) -> None:
    """It is read from the beginning, so that no turn is there twice; work that nobody waits for does not wait either."""
    turns = Turns(lost=3)
    async with grpc.aio.insecure_channel("127.0.0.1:1") as unused:
        ledger = RemoteLedger(unused, cast("Caller", turns), 5)
        with contextlib.nullcontext() if patient else pytest.raises(Unavailable):
            history = await ledger.history("s-1", 10, patient=patient)
            assert [turn.question for turn in history.turns] == ["first?"]

    assert turns.calls == calls


async def test_a_service_whose_process_has_ended_is_not_ready_at_the_next_look() -> None:
    """Its machine refuses the connection; that is an answer, and not the silence that a ready service is allowed."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with channel.open_channel(f"127.0.0.1:{port}") as line:
        readiness = Readiness({"ledger": lambda: ping(line, "ledger")})
        before = await readiness.ask()
        await server.stop(0)
        async with asyncio.timeout(10):  # until the end of the connection has come here
            await line.wait_for_state_change(grpc.ChannelConnectivity.READY)

        assert (before, await readiness.ask()) == ({"ledger": True}, {"ledger": False})
