"""An answer's stream when the replica behind it goes away: what goes on, what begins again, and what is told instead."""

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from services.chassis.errors import (
    AnswerInterrupted,
    AnswerLogGone,
    DeadlineTooShort,
    DomainError,
    ModelStalled,
    NotFound,
    Overloaded,
    RemoteError,
    Unavailable,
)
from services.gateway.answer_stream import AnswerStream
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb

LOST = Unavailable("the line was cut", dependency="orchestrator")
STOPPING = Overloaded("this replica is stopping", draining="true")


class Replicas:
    """An orchestrator whose calls go as scripted: numbers of events or whole messages, then an error or the end."""

    name = "orchestrator"
    stub = SimpleNamespace(Answer="Answer", ResumeAnswer="ResumeAnswer")

    def __init__(self, *scripts: list[Any]) -> None:
        self._scripts = list(scripts)
        self.calls: list[tuple[str, Any]] = []
        self.open = 0

    @contextlib.asynccontextmanager
    async def stream(self, method: str, request: Any, *, timeout_s: float) -> AsyncIterator[AsyncIterator[pb.AnswerEvent]]:
        self.calls.append((method, request))
        self.open += 1
        try:
            yield self._play(self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0])
        finally:
            self.open -= 1

    async def _play(self, script: list[Any]) -> AsyncIterator[pb.AnswerEvent]:
        for beat in script:
            if isinstance(beat, DomainError):
                raise beat
            yield beat if isinstance(beat, pb.AnswerEvent) else pb.AnswerEvent(answer_id="a", sequence=beat)


async def read(replicas: Replicas, request: Any = None, *, heal_s: float = 5.0) -> list[int]:
    asked = request or pb.AnswerRequest(question="q")
    async with AnswerStream(replicas, asked, timeout_s=10, heal_s=heal_s) as events:  # type: ignore[arg-type]
        numbers = [event.sequence async for event in events]
    assert replicas.open == 0
    return numbers


@pytest.mark.parametrize("loss", [LOST, RemoteError("cut", remote_code="CANCELLED")])
async def test_lost_replica_is_replaced_after_the_last_event(loss: DomainError) -> None:
    """Once, twice, and after a replica that is not there either: no gap and no repeat, and the answer is asked for once."""
    replicas = Replicas([1, 2, loss], [loss], [3, loss], [4, 5])

    assert await read(replicas) == [1, 2, 3, 4, 5]
    assert [method for method, _ in replicas.calls] == ["Answer", "ResumeAnswer", "ResumeAnswer", "ResumeAnswer"]
    assert [(request.answer_id, request.after_sequence) for _, request in replicas.calls[1:]] == [("a", 2), ("a", 2), ("a", 3)]


async def test_resumed_answer_heals_like_any_other() -> None:
    """Also before its first event."""
    replicas = Replicas([LOST], [8, LOST], [9])

    assert await read(replicas, pb.ResumeAnswerRequest(answer_id="a", after_sequence=7)) == [8, 9]
    assert [request.after_sequence for _, request in replicas.calls] == [7, 7, 8]


@pytest.mark.parametrize("failure", [ModelStalled(), Unavailable("", dependency="ledger")])
async def test_failure_of_the_answer_itself_is_told_as_it_is(failure: DomainError) -> None:
    """Nothing is tried again: it has ended."""
    replicas = Replicas([1, failure], [2])
    with pytest.raises(type(failure)):
        await read(replicas)

    assert len(replicas.calls) == 1


@pytest.mark.parametrize("word", [NotFound(""), AnswerLogGone(""), LOST])
async def test_answer_that_nobody_knows_any_more_is_interrupted(word: DomainError) -> None:
    """Whoever had read a part of it is not told that it never was."""
    with pytest.raises(AnswerInterrupted):
        await read(Replicas([1, LOST], [word]), heal_s=0.1)


async def test_unknown_answer_is_not_found() -> None:
    """What nobody had read is nobody's."""
    with pytest.raises(NotFound):
        await read(Replicas([NotFound("")]), pb.ResumeAnswerRequest(answer_id="b"))


async def test_a_call_that_is_cut_before_its_first_event_is_not_told_as_stopped_by_its_owner() -> None:
    """The server that ended says cancelled, but nobody has cancelled anything."""
    with pytest.raises(Unavailable) as told:
        await read(Replicas([RemoteError("cut", remote_code="CANCELLED")]))

    assert told.value.metadata["dependency"] == "orchestrator"


async def test_a_question_that_is_asked_again_has_the_time_that_is_left() -> None:
    """And is not asked again when there is none."""
    hurried, late = Replicas([LOST], [1]), Replicas([LOST], [1])
    first_ms = 5_000

    assert await read(hurried, pb.AnswerRequest(question="q", idempotency_key="k", deadline_ms=first_ms)) == [1]
    assert hurried.calls[-1][1].deadline_ms < first_ms
    with pytest.raises(DeadlineTooShort):
        await read(late, pb.AnswerRequest(question="q", idempotency_key="k", deadline_ms=50))
    assert len(late.calls) == 1


async def test_question_is_asked_twice_only_if_that_cannot_cost_twice() -> None:
    """Refused by a replica that stops, or under a key; a loss without a key is the asker's to judge."""
    refused, keyed, bare = Replicas([STOPPING], [1]), Replicas([LOST], [1]), Replicas([LOST], [1])

    assert await read(refused) == [1]
    assert await read(keyed, pb.AnswerRequest(question="q", idempotency_key="k")) == [1]
    with pytest.raises(Unavailable):
        await read(bare)
    assert [len(one.calls) for one in (refused, keyed, bare)] == [2, 2, 1]


async def test_replicas_that_all_stop_are_not_asked_for_ever() -> None:
    """Nor is one that is merely full asked again at once."""
    stopping, full = Replicas([STOPPING]), Replicas([Overloaded("full")])
    for replicas in (stopping, full):
        with pytest.raises(Overloaded):
            await read(replicas)

    assert (len(stopping.calls), len(full.calls)) == (3, 1)


async def test_events_that_came_in_one_message_are_told_one_by_one_and_resumed_after_the_last() -> None:
    class Together(Replicas):
        async def _play(self, script: list[int | DomainError]) -> AsyncIterator[pb.AnswerEvent]:
            for beat in script:
                if isinstance(beat, DomainError):
                    raise beat
                more = [pb.AnswerEvent(answer_id="a", sequence=number) for number in (beat + 1, beat + 2)]
                yield pb.AnswerEvent(answer_id="a", sequence=beat, more=more)

    replicas = Together([1, 4, LOST], [7])
    asked = pb.AnswerRequest(question="q")
    async with AnswerStream(replicas, asked, timeout_s=10) as events:  # type: ignore[arg-type]
        came = [event async for event in events]
    assert [event.sequence for event in came] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert not any(event.more for event in came)
    (_, began), (method, resumed) = replicas.calls
    assert began.batches
    assert method == "ResumeAnswer"
    assert resumed == pb.ResumeAnswerRequest(answer_id="a", after_sequence=6, batches=True)
