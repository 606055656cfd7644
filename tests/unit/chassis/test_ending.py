"""Tasks that go on for ever end when they are told to, also when what they wait in does not listen at once."""

import asyncio

import pytest

from services.chassis import ending


async def test_a_task_that_takes_a_cancellation_for_its_own_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library does whose time limit ends in the same moment. An ordinary task and one that has ended are no trouble."""
    monkeypatch.setattr(ending, "CANCEL_AGAIN_S", 0.01)
    swallowed = 0

    async def deaf() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 2:
                    raise

    async def failed() -> None:
        raise ValueError

    tasks = [asyncio.create_task(work) for work in (deaf(), asyncio.sleep(60), failed())]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await ending.ended(*tasks)

    assert swallowed == 3
    assert all(task.done() for task in tasks)
