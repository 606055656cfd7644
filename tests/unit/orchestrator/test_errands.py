"""Whom an errand is asked of: the cheapest of those there are now, that are well and quick enough."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from services.chassis.errors import DomainError, ModelFailed, Unavailable
from services.orchestrator.domain import Candidate, Draft, Message, Prompt
from services.orchestrator.errands import Errands
from services.orchestrator.health import FAILURES_IN_A_ROW, OPEN_MAX_S, Health
from services.orchestrator.tariff import Tariff
from tests.fakes.scripted_model import CANDIDATE, NOW, _Yes, question

CHEAP, DEAR = replace(CANDIDATE, model="cheap"), replace(CANDIDATE, model="dear")
PROMPT = Prompt("t", "s", (Message("user", "?"),), "?", (), 100)


class Moody:
    """Answers, unless a model is told to be out or to hang."""

    def __init__(self) -> None:
        self.out: set[str] = set()
        self.hangs: set[str] = set()
        self.asked: list[str] = []

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        self.asked.append(candidate.model)
        draft.sent, draft.model = True, candidate.model
        if candidate.model in self.hangs:
            await asyncio.Event().wait()
        if candidate.model in self.out:
            raise ModelFailed("", provider="scripted", cause="status")
        draft.write("Done.")
        draft.finish_reason = "end_turn"


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> Any:
        return NOW


class Books(_Yes):
    has_room = True


class Desk:
    """Errands with everything around them in memory."""

    def __init__(self) -> None:
        anything: Any = Books()
        self.model, self.clock, self.candidates = Moody(), Clock(), [CHEAP, DEAR]
        self.health = Health(lambda: self.clock.s, lambda: 0.0)
        self.errands = Errands(
            *(anything, anything, {"scripted": self.model}),
            *(lambda: self.candidates, Tariff(anything), self.health, self.clock, lambda: "errand"),
        )

    async def run(self, times: int = 1) -> str:
        """Who did the last of so many errands; empty if nobody did."""
        model = ""
        for _ in range(times):
            try:
                model = (await self.errands.run(question(), "rewrite", PROMPT, 10, 0.01)).model
            except DomainError:
                model = ""
        return model


async def test_a_model_that_is_out_is_passed_over_and_taken_back_by_the_errand_that_finds_it_well() -> None:
    """Found out by errands alone, or by answers: health is one."""
    desk = Desk()
    desk.model.out = {"cheap"}

    assert await desk.run(FAILURES_IN_A_ROW) == ""
    assert desk.health.state(CHEAP) == "open"
    assert await desk.run() == "dear"
    desk.model.out.clear()
    desk.clock.s += OPEN_MAX_S
    assert await desk.run() == "cheap"
    assert desk.health.state(CHEAP) == "closed"


async def test_a_model_that_hangs_is_left_alone_with_errands_but_not_with_answers() -> None:
    """A second and a half is little for a model that thinks; what waits for an answer waits longer."""
    desk = Desk()
    desk.model.hangs = {"cheap"}

    assert await desk.run(FAILURES_IN_A_ROW) == ""
    assert await desk.run() == "dear"
    assert desk.health.state(CHEAP) == "closed"


async def test_when_nobody_is_well_no_call_is_paid() -> None:
    """The rule does it at once."""
    desk = Desk()
    desk.model.out = {"cheap", "dear"}
    await desk.run(2 * FAILURES_IN_A_ROW)
    asked = len(desk.model.asked)

    with pytest.raises(Unavailable):
        await desk.errands.run(question(), "rewrite", PROMPT, 10, 0.01)
    assert len(desk.model.asked) == asked == 2 * FAILURES_IN_A_ROW


async def test_models_that_come_and_go_are_followed() -> None:
    """As the file says now, not as it said at start."""
    desk = Desk()
    desk.candidates = [DEAR]
    assert await desk.run() == "dear"
    desk.candidates = []

    assert not desk.errands.possible
    assert await desk.run() == ""
