"""What is believed of a dependency by how it answers when it is asked again and again."""

import asyncio

import pytest

from services.chassis import lifecycle
from services.chassis.errors import Unavailable
from services.chassis.lifecycle import SILENT_MAX, Readiness


class Dependency:
    """Answers, refuses, says nothing, or gives its own probe up."""

    def __init__(self) -> None:
        self.does = "answers"

    async def probe(self) -> None:
        if self.does == "hangs":
            await asyncio.Event().wait()
        if self.does == "is silent":
            raise TimeoutError
        if self.does == "has no line":  # as a pool says whose connections are all in use
            raise ConnectionError from TimeoutError()
        if self.does == "refuses":
            raise Unavailable("not ready", dependency="store")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "PROBE_TIMEOUT_S", 0.02)


async def believed(does: list[str]) -> list[bool]:
    store = Dependency()
    readiness, states = Readiness({"store": store.probe}), list[bool]()
    for store.does in does:
        states.append((await readiness.ask())["store"])
    return states


@pytest.mark.parametrize("silence", ["hangs", "is silent", "has no line"])
async def test_a_ready_dependency_may_miss_a_probe_but_not_three_in_a_row(silence: str) -> None:
    """On a crowded machine one answer is late; whoever is gone answers none."""
    assert SILENT_MAX == 3
    assert await believed(["answers", silence, silence, "answers", silence, silence, silence, silence]) == [
        *[True] * 6,
        False,
        False,
    ]


async def test_a_refusal_counts_at_once_and_so_does_an_answer() -> None:
    assert await believed(["answers", "refuses", "answers", "hangs", "refuses", "answers"]) == [True, False, True, True, False, True]


async def test_a_dependency_that_never_answered_or_refused_last_is_given_no_credit() -> None:
    assert await believed(["hangs", "refuses", "hangs", "answers"]) == [False, False, False, True]
