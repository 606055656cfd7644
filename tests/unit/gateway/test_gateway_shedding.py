"""Not now: who is turned away at which bound, what counts as lag, and how long an answer may take."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import pytest

from services.chassis.deadline import Deadline
from services.chassis.errors import DeadlineTooShort, Overloaded, RequestInvalid
from services.gateway import deadlines
from services.gateway.shedding import STANDS_AFTER_S, TICK_S, TICKS, LoopLag, Shedding


def test_interactive_answers_are_turned_away_at_the_bound_and_batch_before() -> None:
    """80 % of the streams for batch; a stream that ends makes room."""
    causes: list[str] = []
    shedding = Shedding(10, 0.1, lambda: 0.0, causes.append)
    carried = [shedding.carried() for _ in range(8)]
    for block in carried[:7]:
        block.__enter__()
    with shedding.entered():
        shedding.require_room_for_batch()
    carried[7].__enter__()
    with shedding.entered(), pytest.raises(Overloaded):
        shedding.require_room_for_batch()
    with shedding.entered(), shedding.entered():
        with pytest.raises(Overloaded) as caught, shedding.entered():
            pass
        assert shedding.streams == 10

    assert (caught.value.retry_after_ms, caught.value.metadata["cause"], causes) == (1000, "streams", ["streams", "streams"])
    assert shedding.streams == 8


def test_answers_that_are_being_prepared_have_a_bound_of_their_own() -> None:
    """One whose model is asked makes room though its stream goes on; so does one that ends before; saying it twice counts once."""
    causes: list[str] = []
    shedding = Shedding(100, 0.1, lambda: 0.0, causes.append, preparing_max=2)
    with shedding.entered() as first, shedding.entered():
        with pytest.raises(Overloaded), shedding.entered():
            pass
        first()
        first()
        with shedding.entered():
            assert (shedding.preparing, shedding.streams) == (2, 3)
            with pytest.raises(Overloaded):
                shedding.require_room_for_batch()

    assert (shedding.preparing, shedding.streams, causes) == (0, 0, ["preparing", "preparing"])


def test_a_burst_may_be_large_but_a_queue_that_stands_is_short() -> None:
    """For a second the burst's bound holds; then the small one, until half of it was worked off."""
    now, kept = 0.0, contextlib.ExitStack()
    shedding = Shedding(1000, 0.1, lambda: 0.0, preparing_max=6, preparing_standing_max=4, clock=lambda: now)

    def let_in() -> Callable[[], None] | None:
        with contextlib.suppress(Overloaded):
            return kept.enter_context(shedding.entered())
        return None

    burst = [let_in() for _ in range(7)]
    admitted = [prepared for prepared in burst if prepared]
    now = STANDS_AFTER_S + 0.1
    for prepared in admitted[:2]:
        prepared()
    standing = let_in()
    admitted[2]()
    refilled, again = let_in(), let_in()
    for prepared in admitted[3:5]:
        prepared()
    calm = [let_in() for _ in range(5)]

    assert (len(admitted), burst[-1], standing) == (6, None, None)
    assert (refilled is not None, again) == (True, None)
    assert [prepared is not None for prepared in calm] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("lag_s", "interactive", "batch"), [(0.08, True, True), (0.081, True, False), (0.1, True, False), (0.101, False, False)]
)
def test_lag_turns_batch_away_before_interactive(lag_s: float, interactive: bool, batch: bool) -> None:
    """At 80 % of the bound, and at the bound."""
    shedding = Shedding(10, 0.1, lambda: lag_s)

    def allowed(check: str) -> bool:
        try:
            if check == "batch":
                shedding.require_room_for_batch()
            else:
                with shedding.entered():
                    pass
        except Overloaded:
            return False
        return True

    assert (allowed("interactive"), allowed("batch")) == (interactive, batch)


class Loop(asyncio.SelectorEventLoop):
    """A loop whose clock a test moves and whose one timer a test fires."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def fire(self, late_s: float) -> None:
        """Run the timer that is due, so much too late."""
        (timer,) = (handle for handle in self._scheduled if not handle.cancelled())  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.now = timer.when() + late_s
        timer._run()


def test_only_lag_that_lasts_counts() -> None:
    """One long callback is no overload; one prompt tick ends it."""
    loop = Loop()
    lag, seen = LoopLag(loop), list[float]()
    for late_s in (0.5, *[0.2] * TICKS, 0.0):
        loop.fire(late_s)
        seen.append(round(lag.seconds, 6))
    lag.stop()
    loop.close()

    assert seen == [0.0] * (TICKS - 1) + [0.2, 0.2, 0.0]


async def test_a_loop_that_is_blocked_lags() -> None:
    """Measured on a real loop: every tick finds it busy."""
    lag = LoopLag()
    for _ in range(2 * TICKS):
        time.sleep(3 * TICK_S)  # noqa: ASYNC251 - blocking the loop is the point
        await asyncio.sleep(0)
    blocked = lag.seconds
    lag.stop()

    assert blocked >= TICK_S


@pytest.mark.parametrize(
    ("header", "milliseconds"), [("", None), ("1", 1000), ("0.25", 250), ("2.005", 2005), ("0.001", 1), ("3000", 3_000_000)]
)
def test_a_request_timeout_is_read_exactly(header: str, milliseconds: int | None) -> None:
    """In seconds with up to three decimals."""
    assert deadlines.requested_ms(header) == milliseconds


@pytest.mark.parametrize("header", ["0", "0.000", "3000.001", "-1", "1e3", "soon", "1.0001", "inf", "99999", "1,5", " ", "٣"])
def test_a_request_timeout_out_of_bounds_is_named(header: str) -> None:
    """With field and bound."""
    with pytest.raises(RequestInvalid) as caught:
        deadlines.requested_ms(header)

    assert (caught.value.field, "3000" in caught.value.metadata["bound"]) == ("Request-Timeout", True)


@pytest.mark.parametrize(
    ("message", "asked", "plan", "result"),
    [
        (None, None, 0, None),
        (None, None, 500, 500),
        (None, 200, 500, 200),
        (None, 900, 500, 900),
        (700, None, 500, 700),
        (700, 200, 500, 200),
        (100, 200, 500, 100),
    ],
)
def test_whose_word_counts_on_an_answers_time(message: int | None, asked: int | None, plan: int, result: int | None) -> None:
    """The caller's before the plan's; of two words of the caller the shorter."""
    assert deadlines.answer_ms(message, asked, plan) == result


@pytest.mark.parametrize("milliseconds", [0, -1, 3_000_001])
def test_a_deadline_in_a_message_has_bounds(milliseconds: int) -> None:
    """As the contract says."""
    with pytest.raises(RequestInvalid, match="time"):
        deadlines.answer_ms(milliseconds, None, 0)


def test_a_calls_deadline_is_passed_on_less_a_hop() -> None:
    """Unless it is longer than any answer; and nothing is passed on with no time."""
    left = deadlines.of_call_ms(Deadline.after(10))

    assert left is not None
    assert 9_000 < left <= 10_000
    assert 9_000 < deadlines.passed_on_ms(Deadline.after(10)) <= 9_980
    assert deadlines.of_call_ms(Deadline.after(-1)) == 1
    assert deadlines.of_call_ms(Deadline.after(4_000)) is None
    assert deadlines.of_call_ms(None) is None
    with pytest.raises(DeadlineTooShort):
        deadlines.passed_on_ms(Deadline.after(0.015))
    assert deadlines.call_timeout_s(1_000, 300) == 11
    assert deadlines.call_timeout_s(1_000_000, 300) == deadlines.call_timeout_s(None, 300) == 310
