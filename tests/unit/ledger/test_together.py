"""Who goes together: what comes while their like is at work, never who has to be waited for."""

import asyncio
from collections.abc import Sequence

import pytest

from services.chassis.errors import Overloaded, Unavailable
from services.ledger.together import TOGETHER_MAX, WAITING_MAX, Together


class Work:
    """Does what it is asked once it is told to go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.batches: list[tuple[str, list[int]]] = []
        self.fails: Exception | None = None

    async def __call__(self, key: str, asked: Sequence[int]) -> list[int | Exception]:
        self.batches.append((key, list(asked)))
        await self.go.wait()
        if self.fails is not None:
            raise self.fails
        return [ValueError(f"not {number}") if number < 0 else number * 10 for number in asked]


async def started(together: Together[str, int, int], *numbers: int, key: str = "k") -> list["asyncio.Task[int]"]:
    """The first is under way when the others come."""
    tasks = []
    for number in numbers:
        tasks.append(asyncio.create_task(together.do(key, number)))
        await asyncio.sleep(0.01 if len(tasks) == 1 else 0)
    await asyncio.sleep(0.01)
    return tasks


async def test_the_first_goes_at_once_and_those_that_come_meanwhile_go_together() -> None:
    """In the order they came, each told its own outcome, also a bad one."""
    work = Work()
    together = Together[str, int, int](work)
    tasks = await started(together, 1, 2, -3, 4)
    assert work.batches == [("k", [1])]
    work.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert work.batches == [("k", [1]), ("k", [2, -3, 4])]
    assert [outcomes[0], outcomes[1], outcomes[3]] == [10, 20, 40]
    assert isinstance(outcomes[2], ValueError)
    assert await together.do("k", 5) == 50
    assert work.batches[-1] == ("k", [5])


async def test_keys_do_not_wait_for_each_other() -> None:
    """One that hangs holds up its own alone."""
    work = Work()
    together = Together[str, int, int](work)
    tasks = [*await started(together, 1, 2, key="a"), *await started(together, 3, key="b")]
    assert work.batches == [("a", [1]), ("b", [3])]
    work.go.set()
    assert await asyncio.gather(*tasks) == [10, 20, 30]


async def test_no_batch_is_larger_than_its_bound_and_no_queue_longer() -> None:
    """What would wait too long is told so."""
    work = Work()
    together = Together[str, int, int](work)
    tasks = await started(together, *range(WAITING_MAX + 1))
    with pytest.raises(Overloaded):
        await together.do("k", 0)
    work.go.set()
    assert await asyncio.gather(*tasks) == [number * 10 for number in range(WAITING_MAX + 1)]
    assert max(len(asked) for _, asked in work.batches) == TOGETHER_MAX


async def test_what_befalls_the_work_befalls_all_of_it() -> None:
    """Each gets an error of its own; those that come later try anew."""
    work = Work()
    together = Together[str, int, int](work)
    tasks = await started(together, 1, 2, 3)
    work.fails = Unavailable("away", dependency="postgres")
    work.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 3
    work.fails = None
    assert await together.do("k", 4) == 40


async def test_who_leaves_is_not_waited_for() -> None:
    """What waited is not begun; what had begun ends for the others."""
    work = Work()
    together = Together[str, int, int](work)
    first, second, third = await started(together, 1, 2, 3)
    first.cancel()
    second.cancel()
    work.go.set()

    assert await third == 30
    assert work.batches == [("k", [1]), ("k", [3])]
    for task in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await together.do("k", 4) == 40
