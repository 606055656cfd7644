"""May you: plans, their age, and what holds while Redis or the ledger is away."""

import asyncio

import pytest

from services.chassis.errors import RateLimited, Unavailable
from services.chassis.principal import Principal
from services.gateway import limits
from services.gateway.limits import Limits, LocalWindows
from services.gateway.memo import Memo
from services.gateway.window import Decision

ADA, BOB = Principal("acme", "ada"), Principal("acme", "bob")


class Away:
    """Windows that cannot be reached."""

    async def admit(self, key: str, limit: int) -> Decision:
        raise Unavailable("away", dependency="redis")


class Plans:
    """A ledger that knows one number."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.asked = 0
        self.away = False

    async def __call__(self, principal: Principal) -> int:
        self.asked += 1
        if self.away:
            raise Unavailable("away", dependency="ledger")
        return self.per_minute


async def test_the_plan_decides_and_users_do_not_share() -> None:
    """As many as the plan says, for each user alone; the refusal says when to come back."""
    guard = Limits(LocalWindows(clock_us=lambda: 5), Plans(2), 60)
    remaining = [(await guard.admit(ADA)).remaining for _ in range(2)]
    with pytest.raises(RateLimited) as caught:
        await guard.admit(ADA)

    assert remaining == [1, 0]
    assert caught.value.retry_after_ms == 60_000
    assert dict(limits.headers_of_refusal(caught.value))[b"x-ratelimit-remaining-requests"] == b"0"
    assert (await guard.admit(BOB)).allowed


async def test_without_redis_a_limit_holds_in_this_process() -> None:
    """Counted, and never unlimited."""
    fallbacks: list[int] = []
    guard = Limits(Away(), Plans(3), 60, on_fallback=lambda: fallbacks.append(1))
    for _ in range(3):
        await guard.admit(ADA)
    with pytest.raises(RateLimited):
        await guard.admit(ADA)

    assert len(fallbacks) == 4


async def test_without_the_ledger_the_last_known_plan_holds_else_the_default() -> None:
    """A ledger that restarts turns no search away."""
    plans = Plans(7)
    guard = Limits(LocalWindows(), plans, 2)
    assert (await guard.admit(ADA)).limit == 7
    plans.away = True
    guard.forget(BOB)

    assert (await guard.admit(ADA)).limit == 7
    assert (await guard.admit(BOB)).limit == 2


async def test_a_changed_plan_is_asked_for_again() -> None:
    """At once by the replica that changed it, within seconds by the others."""
    plans = Plans(7)
    guard = Limits(LocalWindows(), plans, 2)
    await guard.admit(ADA)
    plans.per_minute = 9
    assert (await guard.admit(ADA)).limit == 7
    guard.forget(ADA)

    assert (await guard.admit(ADA)).limit == 9
    assert plans.asked == 2


def test_no_two_subjects_share_a_key() -> None:
    """Names may hold what separates them elsewhere."""
    odd = [("a", "b:c"), ("a:b", "c"), ("", "a:b:c"), ("1:a", "b"), ("a", "b"), ("A", "b")]

    assert len({limits._key(Principal(tenant, user)) for tenant, user in odd}) == len(odd)


async def test_those_who_ask_at_once_share_one_question() -> None:
    """And one who gives up does not take the others along."""
    memo: Memo[str, int] = Memo(10, 60)
    gate, asked = asyncio.Event(), 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await gate.wait()
        return 42

    first, *others = [asyncio.create_task(memo.get("k", ask)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    gate.set()

    assert await asyncio.gather(*others) == [42] * 4
    assert asked == 2


async def test_the_memory_is_bounded_and_forgets() -> None:
    """In number and in age; what is being asked when all is forgotten is not kept either."""
    now = 0.0
    memo: Memo[int, int] = Memo(2, 5, clock=lambda: now)
    asked: list[int] = []

    async def ask(key: int) -> int:
        asked.append(key)
        if key == 9:
            memo.clear()
        return key

    for key in (1, 2, 3, 1, 9, 9):
        await memo.get(key, lambda key=key: ask(key))  # type: ignore[misc]
    now = 5.0
    await memo.get(9, lambda: ask(9))

    assert asked == [1, 2, 3, 1, 9, 9, 9]
