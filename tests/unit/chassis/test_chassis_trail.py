"""Steps, after-work and deadlines: every step is timed whatever happens in it, and nothing outlives its bound."""

import asyncio

import pytest

from services.chassis.afterwork import AfterWork
from services.chassis.deadline import Deadline, budget_s, current_deadline
from services.chassis.errors import DeadlineTooShort, Overloaded
from services.chassis.telemetry import CUT_SHORT, StepRecord, Trail


async def test_a_step_is_heard_of_when_it_begins_and_when_it_ends() -> None:
    """Two changes a step that lasts: running, then done with its facts."""
    heard: list[tuple[str, str]] = []
    trail = Trail("test", lambda record: heard.append((record.name, record.status)))

    with trail.step("recall") as step:
        await asyncio.sleep(0)
        assert heard == [("recall", "running")]
        step.note(tokens=12)

    assert heard == [("recall", "running"), ("recall", "done")]
    assert trail.steps[0].facts == {"tokens": "12"}
    assert trail.steps[0].duration_ms > 0


async def test_a_step_that_ends_at_once_is_heard_of_once() -> None:
    """Nobody could have watched it run; and its beginning is not told after its end either."""
    heard: list[tuple[str, str]] = []
    trail = Trail("test", lambda record: heard.append((record.name, record.status)))

    with trail.step("compose"):
        pass
    await asyncio.sleep(0)

    assert heard == [("compose", "done")]


async def test_a_beginning_is_told_before_what_it_brings_forth() -> None:
    """A model may write before anything else could run: its step is not told after its text, nor twice."""
    heard: list[str] = []
    trail = Trail("test", lambda record: heard.append(record.status))

    with trail.step("generate"):
        trail.tell()
        heard.append("text")
        await asyncio.sleep(0)

    assert heard == ["running", "text", "done"]


async def test_a_step_that_raises_is_failed_and_timed() -> None:
    """The error goes on; the record stays."""
    trail = Trail("test")

    with pytest.raises(ValueError, match="x"), trail.step("generate"):
        raise ValueError("x")

    assert trail.steps[0].status == "failed"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Overloaded("full"), "OVERLOADED"), (asyncio.CancelledError(), CUT_SHORT), (ValueError("x"), "INTERNAL")],
)
async def test_a_failed_step_says_of_what(error: BaseException, reason: str) -> None:
    """Its own failure, or that what it was part of was stopped or had no more time; an unexpected error by no words of its own."""
    trail = Trail("test")

    with pytest.raises(type(error)), trail.step("generate") as step:
        step.note(tokens=12)
        raise error

    assert (trail.steps[0].status, trail.steps[0].facts) == ("failed", {"tokens": "12", "reason": reason})


async def test_a_skipped_step_says_why() -> None:
    """Skipped is not done."""
    trail = Trail("test")

    with trail.step("history") as step:
        step.skip("new_session")

    assert (trail.steps[0].status, trail.steps[0].facts) == ("skipped", {"reason": "new_session"})
    assert isinstance(trail.steps[0], StepRecord)


async def test_afterwork_refuses_more_than_its_bound() -> None:
    """A full supervisor says so at once and leaves nothing running."""
    work, gate = AfterWork(tasks_max=1), asyncio.Event()
    work.spawn(_wait(gate), "first")

    with pytest.raises(Overloaded):
        work.spawn(_wait(gate), "second")

    gate.set()
    assert await work.drain(1) == 0
    assert len(work) == 0


async def test_afterwork_cancels_what_does_not_end_in_time() -> None:
    """Drain returns how much it had to abandon."""
    work = AfterWork()
    task = work.spawn(_wait(asyncio.Event()), "endless")

    assert await work.drain(0.01) == 1
    assert task.cancelled()


async def test_afterwork_counts_failures() -> None:
    """A failed task is counted, not lost."""
    work = AfterWork()

    async def fails() -> None:
        raise ValueError("x")

    work.spawn(fails(), "fails")
    await work.drain(1)

    assert work.failed == 1


async def test_an_outgoing_call_never_has_more_time_than_the_request() -> None:
    """Default without a deadline; what is left, shaved, with one."""
    assert budget_s(5) == 5
    token = current_deadline.set(Deadline.after(1))
    assert 0.9 < budget_s(5) < 1
    current_deadline.reset(token)


def test_work_that_cannot_end_in_time_is_not_begun() -> None:
    """require() names the step and what was left."""
    with pytest.raises(DeadlineTooShort) as caught:
        Deadline.after(0.01).require("generate", 1)

    assert caught.value.metadata["step"] == "generate"


async def _wait(gate: asyncio.Event) -> None:
    await gate.wait()
