"""Who is put aside, who is taken back, and how many retries there are. Time is a number here."""

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.domain import Candidate
from services.orchestrator.health import (
    FAILURES_IN_A_ROW,
    OPEN_MAX_S,
    PAUSED_MAX_S,
    RETRIES_PER_S,
    RETRIES_SAVED_MAX,
    RETRY_SHARE,
    SHARE_CALLS_MIN,
    SHARE_WINDOW_S,
    Breaker,
    Health,
    RetryBudget,
)

MODEL, OTHER = Candidate("p", "m", 1, 1), Candidate("p", "n", 1, 1)


@dataclass
class Now:
    s: float = 1000.0

    def __call__(self) -> float:
        return self.s


def broken(now: float = 0.0) -> Breaker:
    breaker = Breaker(lambda: 0.0)
    for _ in range(FAILURES_IN_A_ROW):
        breaker.failed(now)
    return breaker


def test_failures_in_a_row_open_and_a_success_between_does_not() -> None:
    """Five in a row; four, a success and four more are bad luck."""
    breaker = Breaker(lambda: 0.0)
    for _ in range(2):
        for _ in range(FAILURES_IN_A_ROW - 1):
            breaker.failed(0.0)
        assert breaker.state == "closed"
        breaker.succeeded(0.0)

    assert broken().state == "open"


def test_large_share_of_failures_opens_without_a_row() -> None:
    """Two of three fail: no model to be relied on, though it answers now and then."""
    breaker, calls = Breaker(lambda: 0.0), 0
    while breaker.state == "closed":
        breaker.succeeded(0.0) if calls % 3 == 0 else breaker.failed(0.0)
        calls += 1

    assert calls == SHARE_CALLS_MIN


def test_share_forgets_what_is_past_its_window() -> None:
    """Failures of a former hour say nothing."""
    breaker = Breaker(lambda: 0.0)
    for _ in range(SHARE_CALLS_MIN * 2):
        breaker.failed(0.0)
        breaker.succeeded(0.0)
    later = SHARE_WINDOW_S + 1
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(later)

    assert breaker.state == "closed"


def test_open_breaker_lets_one_probe_through_for_each_pause() -> None:
    """Whatever becomes of the probe: one that hangs keeps nobody out for longer."""
    breaker = broken()
    let = [tenth for tenth in range(300) if breaker.lets_through(tenth / 10)]

    assert let[0] == 10
    assert all(10 < later - earlier <= OPEN_MAX_S * 10 for earlier, later in itertools.pairwise(let))


def test_first_content_takes_back_on_trial_and_the_next_failure_puts_aside_again() -> None:
    """A provider that begins well and breaks off is not well."""
    breaker = broken()
    breaker.began_well()
    assert breaker.state == "trial"
    assert breaker.lets_through(0.0)
    breaker.failed(0.0)

    assert breaker.state == "open"
    breaker.began_well()
    breaker.succeeded(0.0)
    assert breaker.state == "closed"


@given(st.lists(st.tuples(st.floats(0, 2), st.sampled_from(["ok", "fail", "ask", "began"])), max_size=200), st.floats(0, 0.999))
def test_whatever_happens_a_probe_is_due_within_the_longest_pause(history: list[tuple[float, str]], jitter: float) -> None:
    """Nobody is out for ever: recovery begins at the latest when the longest pause is over."""
    breaker, now = Breaker(lambda: jitter), 0.0
    for step, what in history:
        now += step
        {"ok": breaker.succeeded, "fail": breaker.failed, "ask": breaker.lets_through, "began": lambda _: breaker.began_well()}[what](now)

    assert breaker.lets_through(now) or breaker.lets_through(now + OPEN_MAX_S)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), max_size=300))
def test_retries_never_pass_a_tenth_of_the_requests_and_the_floor(requests: list[tuple[float, int]]) -> None:
    """However requests and retries fall: what was granted is earned."""
    now, granted = 0.0, 0
    budget = RetryBudget(now)
    for gap, wanted in requests:
        now += gap
        budget.request(now)
        granted += sum(budget.take(now) for _ in range(wanted))

    assert granted <= RETRIES_SAVED_MAX + RETRY_SHARE * len(requests) + RETRIES_PER_S * now + 1e-6


def test_lone_request_finds_its_retries() -> None:
    """After a storm and a quiet minute two retries are there again."""
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    budget.request(60.0)

    assert [budget.take(60.0) for _ in range(2)] == [True, True]


def test_models_fare_apart_and_a_pause_is_no_failure() -> None:
    """One model's trouble is not another's; a rate limit paces and ends by itself."""
    now = Now()
    health = Health(now, lambda: 0.0)
    for _ in range(FAILURES_IN_A_ROW):
        health.failed(MODEL)
    health.pause(OTHER, 1e9)

    assert (health.state(MODEL), health.state(OTHER)) == ("open", "closed")
    assert not health.lets_through(OTHER)
    now.s += PAUSED_MAX_S
    assert health.lets_through(OTHER)
