"""May you: plans, their age, whose limits count, and what holds while Redis or the ledger is away."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.chassis.errors import AnswerInterrupted, ModelFailed, Unavailable
from services.chassis.principal import Principal
from services.gateway import limits
from services.gateway.limiter import Charge, Kind, LocalLimiter, Outcome, Settlement
from services.gateway.limits import Allowance, Ending, Entitlements, Fallback, LimitReached, Limits, Metered, ReservedTokens, grant_of
from services.gateway.memo import Memo
from tailrace.common.v1 import common_pb2
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

ADA, BOB = Principal("acme", "ada"), Principal("acme", "bob")


class Store:
    """A Redis in this process, with a clock that stands still; away while `away`."""

    def __init__(self) -> None:
        self.limiter = LocalLimiter()
        self.now_us = 1_000_000
        self.away = False
        self.asked = 0
        self.renewed: list[tuple[str, str]] = []

    async def admit(self, charges: Sequence[Charge], lease: str = "", grant: str = "") -> Outcome:
        self._reach()
        return self.limiter.admit(self.now_us, charges, lease, grant)

    async def settle(self, settlement: Settlement) -> int:
        self._reach()
        self.limiter.settle(self.now_us, settlement)
        return self.now_us

    async def renew(self, leases: Sequence[tuple[str, str]]) -> None:
        self._reach()
        self.renewed += leases
        self.limiter.hold(self.now_us, leases)

    def _reach(self) -> None:
        self.asked += 1
        if self.away:
            raise Unavailable("away", dependency="redis")


class Plans:
    """A ledger that knows one plan."""

    def __init__(self, per_minute: int = 1_000_000, **given: Any) -> None:
        self.given = Entitlements(given.pop("user", Allowance(requests=per_minute)), **given)
        self.asked = 0
        self.away = False

    async def __call__(self, principal: Principal) -> Entitlements:
        self.asked += 1
        if self.away:
            raise Unavailable("away", dependency="ledger")
        return self.given


async def refusal_of(guard: Limits, principal: Principal, tokens: int = 1) -> dict[str, str]:
    """What an answer that is refused is told."""
    with pytest.raises(LimitReached) as caught:
        async with guard.answering(principal, tokens):
            pass
    return caught.value.metadata


async def test_the_plan_decides_and_users_do_not_share() -> None:
    """As many as the plan says, for each user alone; the refusal says when to come back."""
    guard = Limits(Store(), Plans(2), 60)
    remaining = [dict((await guard.admit(ADA)).headers)[b"x-ratelimit-remaining-requests"] for _ in range(2)]
    with pytest.raises(LimitReached) as caught:
        await guard.admit(ADA)

    assert remaining == [b"1", b"0"]
    assert caught.value.retry_after_ms == 60_000
    assert (caught.value.metadata["limit_kind"], caught.value.metadata["limit_scope"]) == ("requests", "user")
    assert dict(caught.value.headers) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"0",
        b"x-ratelimit-reset-requests": b"60000ms",
    }
    assert (await guard.admit(BOB)).headers


async def test_a_tenant_and_a_key_have_limits_of_their_own() -> None:
    """Users share those of the tenant, keys of one user do not share; who is refused by one is charged by none."""
    guard = Limits(Store(), Plans(9, tenant=Allowance(requests=4), key=Allowance(requests=2)), 60)
    first, second = replace(ADA, api_key_id="key-one"), replace(ADA, api_key_id="key-two")
    for _ in range(2):
        await guard.admit(first)
    with pytest.raises(LimitReached) as of_key:
        await guard.admit(first)
    await guard.admit(second)
    remaining = dict((await guard.admit(BOB)).headers)
    with pytest.raises(LimitReached) as of_tenant:
        await guard.admit(BOB)

    assert (of_key.value.metadata["limit_scope"], of_key.value.metadata["limit"]) == ("key", "2")
    assert (of_tenant.value.metadata["limit_scope"], of_tenant.value.metadata["limit"]) == ("tenant", "4")
    assert (remaining[b"x-ratelimit-limit-requests"], remaining[b"x-ratelimit-remaining-requests"]) == (b"4", b"0")


async def test_tokens_are_reserved_and_corrected_by_what_was_used() -> None:
    """Downwards and upwards; an answer whose end nobody saw keeps its reservation; requests alone need no tokens."""
    guard = Limits(Store(), Plans(user=Allowance(requests=100, tokens=100)), 60)
    async with guard.answering(ADA, 60) as admission:
        assert (await refusal_of(guard, ADA, 41))["limit_kind"] == "tokens"
        admission.tokens_used = 10
    await guard.drain(1)
    async with guard.answering(ADA, 50) as admission:
        assert dict(admission.headers)[b"x-ratelimit-remaining-tokens"] == b"40"
        admission.tokens_used = 85
    await guard.drain(1)
    async with guard.answering(ADA, 5):
        pass
    await guard.drain(1)

    assert (await refusal_of(guard, ADA, 1))["limit_kind"] == "tokens"
    await guard.admit(ADA)


async def test_an_answer_larger_than_the_limit_waits_for_an_empty_window() -> None:
    """Instead of for ever."""
    guard = Limits(Store(), Plans(user=Allowance(tokens=100)), 60)
    async with guard.answering(ADA, 1_000) as admission:
        admission.tokens_used = 50
    await guard.drain(1)

    assert (await refusal_of(guard, ADA, 1_000))["limit"] == "100"


async def test_answers_at_the_same_time_are_counted_while_they_run() -> None:
    """By whatever door one ends, the next may begin; and one that runs is renewed."""
    store = Store()
    guard = Limits(store, Plans(user=Allowance(answers=1)), 60)
    with pytest.raises(ModelFailed):
        async with guard.answering(ADA, 1):
            refused = await refusal_of(guard, ADA)
            store.now_us += 20_000_000
            await guard.renew()
            store.now_us += 20_000_000
            assert (await refusal_of(guard, ADA))["limit_kind"] == "concurrency"
            raise ModelFailed("gone")
    await guard.drain(1)
    await guard.renew()

    assert (refused["limit_kind"], refused["limit"], refused["retry_after_ms"]) == ("concurrency", "1", "1000")
    assert "window_ms" not in refused
    assert len(store.renewed) == 1
    async with guard.answering(ADA, 1):
        pass
    await guard.drain(1)


class Books:
    """Books in which answers are entered as a test says."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.lasts = True

    async def __call__(self, principal: Principal, answer_id: str) -> Ending | None:
        self.asked.append((principal.user, answer_id))
        used = self.used.get(answer_id)
        return None if used is None else Ending(used, self.lasts)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if true():
                return
            await asyncio.sleep(0)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The books are looked at without a pause that a test would feel."""
    monkeypatch.setattr(limits, "LOOK_PAUSES_S", (0.001,))


async def test_an_answer_that_was_left_counts_until_the_books_say_that_it_ended(quick_looks: None) -> None:
    """Leaving makes no room: it runs on. Its lease is renewed meanwhile, and what it used is charged in the end."""
    store, books = Store(), Books()
    guard = Limits(store, Plans(user=Allowance(answers=1, tokens=100)), 60, booked=books)
    async with guard.answering(ADA, 60, lasts_s=300) as admission:
        admission.answer_id = "a-1"
    await until(lambda: len(books.asked) > 2)
    store.now_us += 20_000_000
    await guard.renew()
    store.now_us += 20_000_000
    while_it_runs = await refusal_of(guard, ADA)
    books.used["a-1"] = 10
    await until(lambda: not guard.followed)
    async with guard.answering(ADA, 90) as admission:
        admission.tokens_used, admission.ended = 90, True
    await guard.drain(1)

    assert while_it_runs["limit_kind"] == "concurrency"
    assert set(books.asked) == {("ada", "a-1")}


async def test_a_reader_that_takes_nothing_makes_no_room_either(quick_looks: None) -> None:
    """It is let go by an error of ours, which ends its stream and not its answer."""
    books = Books()
    guard = Limits(Store(), Plans(user=Allowance(answers=1)), 60, booked=books)
    with pytest.raises(AnswerInterrupted):
        async with guard.answering(ADA, 1, lasts_s=300) as admission:
            admission.answer_id = "a-1"
            raise AnswerInterrupted("the stream was not read")
    await until(lambda: len(books.asked) > 2)
    assert (await refusal_of(guard, ADA))["limit_kind"] == "concurrency"
    books.used["a-1"] = 0
    await until(lambda: not guard.followed)
    await guard.drain(1)

    async with guard.answering(ADA, 1):
        pass


async def test_what_may_have_ended_an_answer_makes_the_books_be_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel, or a resumed stream that is over, need not wait for the next look."""
    monkeypatch.setattr(limits, "LOOK_PAUSES_S", (0.0, 3600.0))
    books = Books()
    guard = Limits(Store(), Plans(user=Allowance(answers=1)), 60, booked=books)
    async with guard.answering(ADA, 1, lasts_s=300) as admission:
        admission.answer_id = "a-1"
    await until(lambda: len(books.asked) == 1)
    books.used["a-1"] = 0
    guard.look_at("a-2")
    guard.look_at("a-1")
    await until(lambda: not guard.followed)
    await guard.drain(1)

    async with guard.answering(ADA, 1):
        pass


@pytest.mark.parametrize(("detached_s", "lasts_s", "goes_on"), [(0.001, 300, True), (300, 0.001, True), (300, 300, False)])
async def test_an_answer_that_was_left_counts_no_longer_than_it_can_run(detached_s: float, lasts_s: float, goes_on: bool) -> None:
    """One whose id nobody knows cannot be resumed; none outlives its deadline; one that leaving cancels is over."""
    guard = Limits(Store(), Plans(user=Allowance(answers=1)), 60, detached_s=detached_s)
    async with guard.answering(ADA, 1, lasts_s=lasts_s, goes_on=goes_on):
        pass
    await until(lambda: not guard.followed)
    await guard.drain(1)

    async with guard.answering(ADA, 1):
        pass


async def test_an_answer_that_leaving_cancels_counts_until_its_end_if_it_can_be_read_elsewhere(quick_looks: None) -> None:
    """Whoever knows its id may have resumed it."""
    books = Books()
    guard = Limits(Store(), Plans(user=Allowance(answers=1)), 60, booked=books)
    async with guard.answering(ADA, 1, lasts_s=300, goes_on=False) as admission:
        admission.answer_id = "a-1"
    await until(lambda: len(books.asked) > 2)
    await refusal_of(guard, ADA)
    books.used["a-1"] = 0
    await until(lambda: not guard.followed)

    async with guard.answering(ADA, 1):
        pass
    await guard.drain(1)


async def test_the_lease_of_an_answer_that_nobody_can_look_after_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many were left, one more is not renewed for ever."""
    monkeypatch.setattr(limits, "FOLLOWED_MAX", 0)
    store = Store()
    guard = Limits(store, Plans(user=Allowance(answers=1)), 60)
    async with guard.answering(ADA, 1, lasts_s=300) as admission:
        admission.answer_id = "a-1"
    await guard.renew()

    assert store.renewed == []
    await refusal_of(guard, ADA)


async def test_of_an_answer_that_ended_without_a_receipt_the_books_say_what_it_used(quick_looks: None) -> None:
    """Cancelled, or failed midway: its place is free at once, its tokens when they are known."""
    store, books = Store(), Books()
    guard = Limits(store, Plans(user=Allowance(answers=1, tokens=100)), 60, booked=books)
    async with guard.answering(ADA, 60) as admission:
        admission.answer_id, admission.ended = "a-1", True
    await until(lambda: len(books.asked) > 2)
    async with guard.answering(ADA, 40) as admission:
        admission.tokens_used, admission.ended = 40, True
    before = await refusal_of(guard, ADA, 1)
    books.used["a-1"] = 7
    await until(lambda: not guard.followed)
    async with guard.answering(ADA, 53) as admission:
        admission.tokens_used, admission.ended = 53, True
    after = await refusal_of(guard, ADA, 1)
    await guard.drain(1)

    assert (before["limit_kind"], after["limit_kind"]) == ("tokens", "tokens")


SMALL = Allowance(requests=100, tokens=100, answers=1)
"""A plan with room for one answer."""


async def test_the_same_request_again_is_one_request_more_and_the_same_answer() -> None:
    """At whatever gateway, while it runs and after its end: one place and one reservation, which do not stand in its own way."""
    store = Store()
    first, second = Limits(store, Plans(user=SMALL), 60), Limits(store, Plans(user=SMALL), 60)
    async with first.answering(ADA, 60, grant="g") as begun, second.answering(ADA, 60, grant="g") as again:
        async with first.answering(ADA, 60, grant="g") as here:
            remaining = [dict(one.headers)[b"x-ratelimit-remaining-requests"] for one in (begun, again, here)]
            assert (await refusal_of(second, ADA, 1))["limit_kind"] == "concurrency"
            store.now_us += 20_000_000
            await second.renew()
            store.now_us += 20_000_000
            assert (await refusal_of(first, ADA, 1))["limit_kind"] == "concurrency"
            for one in (begun, again, here):
                one.answer_id, one.tokens_used, one.ended, one.lasts = "a-1", 70, True, True
    for guard in (first, second):
        await guard.drain(1)
    async with second.answering(ADA, 30) as full:
        async with first.answering(ADA, 60, grant="g") as told_again:
            pass
        full.tokens_used, full.ended = 30, True
    for guard in (first, second):
        await guard.drain(1)
        await guard.renew()

    assert remaining == [b"99", b"98", b"97"]
    assert (told_again.reserved, told_again.lease_keys) == ([], [])
    assert (await refusal_of(first, ADA, 1))["limit_kind"] == "tokens"  # 70 and 30, and nothing twice
    store.now_us += 61_000_000
    async with first.answering(ADA, 100):
        pass
    await first.drain(1)


async def test_requests_are_counted_as_often_as_they_come() -> None:
    """Also those that came before: each is work."""
    guard = Limits(Store(), Plans(user=Allowance(requests=2, answers=1)), 60)
    async with guard.answering(ADA, 1, grant="g"):
        async with guard.answering(ADA, 1, grant="g"):
            pass
        with pytest.raises(LimitReached) as caught:
            async with guard.answering(ADA, 1, grant="g"):
                pass
    await guard.drain(1)

    assert caught.value.metadata["limit_kind"] == "requests"


async def test_what_failed_so_that_it_may_run_again_is_admitted_like_any_other() -> None:
    """Its tokens are given back, so that another try has room; and it takes what it needs."""
    guard = Limits(Store(), Plans(user=SMALL), 60)
    with pytest.raises(ModelFailed):
        async with guard.answering(ADA, 60, grant="g") as admission:
            admission.tokens_used = 0
            raise ModelFailed("no")
    await guard.drain(1)
    async with guard.answering(ADA, 60, grant="g") as again:
        assert not again.again
        assert (await refusal_of(guard, ADA, 1))["limit_kind"] == "concurrency"
        again.answer_id, again.tokens_used, again.ended, again.lasts = "a-2", 100, True, True
    await guard.drain(1)

    assert (await refusal_of(guard, ADA, 1))["limit_kind"] == "tokens"


async def test_who_is_told_nothing_of_an_answer_takes_nothing_from_it() -> None:
    """Another replica that is full refuses the second sending; the first one goes on in its place, with its tokens."""
    store = Store()
    first, second = Limits(store, Plans(user=SMALL), 60), Limits(store, Plans(user=SMALL), 60)
    async with first.answering(ADA, 60, grant="g") as begun:
        with pytest.raises(ModelFailed):
            async with second.answering(ADA, 60, grant="g") as again:
                again.tokens_used = 0
                raise ModelFailed("full")
        await second.drain(1)
        assert (await refusal_of(second, ADA, 1))["limit_kind"] == "concurrency"
        begun.answer_id, begun.tokens_used, begun.ended = "a-1", 99, True
    await first.drain(1)
    await second.renew()

    assert (await refusal_of(second, ADA, 2))["limit_kind"] == "tokens"
    assert store.renewed == []


async def test_an_answer_that_began_although_its_first_sending_failed_is_charged_when_it_ends() -> None:
    """What was given back then is charged whole, so that two sendings at once are no way round the limit."""
    store = Store()
    first, second = Limits(store, Plans(user=SMALL), 60), Limits(store, Plans(user=SMALL), 60)
    async with contextlib.AsyncExitStack() as stack:
        begun = await stack.enter_async_context(first.answering(ADA, 60, grant="g"))
        async with second.answering(ADA, 60, grant="g") as again:
            begun.tokens_used, begun.ended = 0, True
            await stack.aclose()
            await first.drain(1)
            again.answer_id, again.tokens_used, again.ended, again.lasts = "a-1", 95, True, True
    await second.drain(1)

    assert (await refusal_of(first, ADA, 6))["limit_kind"] == "tokens"
    async with first.answering(ADA, 5):
        pass
    await first.drain(1)


async def test_the_same_request_takes_over_from_a_gateway_that_died(quick_looks: None) -> None:
    """Its place, once that would have ended, and its reservation, which it corrects."""
    store, books = Store(), Books()
    dead, alive = Limits(store, Plans(user=SMALL), 60), Limits(store, Plans(user=SMALL), 60, booked=books)
    async with dead.answering(ADA, 60, grant="g"):
        store.now_us += 31_000_000
        async with alive.answering(ADA, 60, lasts_s=300, grant="g") as again:
            assert (await refusal_of(dead, ADA, 1))["limit_kind"] == "concurrency"
            again.answer_id = "a-1"
        await until(lambda: len(books.asked) > 2)
        books.used["a-1"] = 10
        await until(lambda: not alive.followed)
        await alive.drain(1)
        async with alive.answering(ADA, 90) as other:
            other.tokens_used, other.ended = 90, True
        await alive.drain(1)

        assert (await refusal_of(alive, ADA, 1))["limit_kind"] == "tokens"
    await dead.drain(0)


async def test_one_answer_is_looked_after_once_however_often_it_was_asked_for_and_left(quick_looks: None) -> None:
    """And who reads it to its end ends its place, whoever had left before."""
    store, books = Store(), Books()
    guard = Limits(store, Plans(user=SMALL), 60, booked=books)
    async with guard.answering(ADA, 60, lasts_s=300, grant="g") as last:
        for _ in range(3):
            async with guard.answering(ADA, 60, lasts_s=300, grant="g") as left:
                left.answer_id = "a-1"
        assert guard.followed == 1
        last.answer_id, last.tokens_used, last.ended, last.lasts = "a-1", 10, True, True
        books.used["a-1"] = 10
    await until(lambda: not guard.followed)
    await guard.drain(1)
    await guard.renew()

    assert store.renewed == []
    async with guard.answering(ADA, 90):
        pass
    await guard.drain(1)


async def test_an_answer_left_before_it_said_its_id_leaves_its_grant_to_who_asks_again() -> None:
    """Its lease ends by itself unless that one holds it."""
    store = Store()
    first, second = Limits(store, Plans(user=SMALL), 60, detached_s=0), Limits(store, Plans(user=SMALL), 60)
    async with first.answering(ADA, 60, lasts_s=300, grant="g"):
        pass
    async with second.answering(ADA, 60, grant="g") as again:
        await until(lambda: not first.followed)
        await first.drain(1)
        assert again.again
        assert (await refusal_of(first, ADA, 1))["limit_kind"] == "concurrency"
        again.answer_id, again.tokens_used, again.ended, again.lasts = "a-1", 100, True, True
    await second.drain(1)

    assert (await refusal_of(first, ADA, 1))["limit_kind"] == "tokens"


async def test_the_same_request_has_its_place_also_while_redis_is_away() -> None:
    """The gateway that let it in remembers."""
    store = Store()
    guard = Limits(store, Plans(user=SMALL), 60)
    async with guard.answering(ADA, 60, grant="g"):
        store.away = True
        async with guard.answering(ADA, 60, grant="g") as again:
            pass
        assert (await refusal_of(guard, ADA, 1))["limit_kind"] == "concurrency"
    await guard.drain(1)

    assert (again.again, again.local) == (True, True)


def test_a_grant_is_of_one_user_one_key_and_one_body() -> None:
    """How a request is read and how long it is waited for makes no other of it, as at the orchestrator."""

    def asked(**changed: Any) -> orchestrator.AnswerRequest:
        return orchestrator.AnswerRequest(**{"question": "Why?", "idempotency_key": "k", **changed})

    name = grant_of(ADA, asked())
    others = [
        grant_of(BOB, asked()),
        grant_of(Principal("other", "ada"), asked()),
        grant_of(ADA, asked(idempotency_key="l")),
        grant_of(ADA, asked(question="Who?")),
        grant_of(ADA, asked(max_output_tokens=5)),
    ]
    same = [
        {"deadline_ms": 5},
        {"cancel_on_disconnect": True},
        {"priority": orchestrator.PRIORITY_BATCH},
        {"whole": True},
        {"batches": True},
    ]

    assert len({name, *others}) == len(others) + 1
    assert {grant_of(ADA, asked(**changed)) for changed in same} == {name}
    assert grant_of(ADA, asked(idempotency_key="")) == ""
    assert name.partition("}")[0] == limits._key("acme", "user", "ada", Kind.TOKENS).partition("}")[0]


async def test_the_end_does_not_wait_for_answers_that_were_left() -> None:
    """Their leases end by themselves: nobody renews them."""
    store, before = Store(), asyncio.all_tasks()
    guard = Limits(store, Plans(user=Allowance(answers=1)), 60)
    async with guard.answering(ADA, 1, lasts_s=300) as admission:
        admission.answer_id = "a-1"
    await refusal_of(guard, ADA)
    assert guard.followed == 1
    await guard.drain(60)
    await guard.renew()

    assert guard.followed == 0
    left = {task.get_name() for task in asyncio.all_tasks() - before}  # others of the same loop may have begun some meanwhile
    assert left.isdisjoint({"follow-answer", "settle-limits"})
    assert store.renewed == []


async def test_the_lease_of_a_gateway_that_died_ends() -> None:
    """Nobody renews it, so its place is free after a while."""
    store = Store()
    dead, alive = Limits(store, Plans(user=Allowance(answers=1)), 60), Limits(store, Plans(user=Allowance(answers=1)), 60)
    async with dead.answering(ADA, 1):
        store.now_us += 29_999_999
        await refusal_of(alive, ADA)
        store.now_us += 1
        async with alive.answering(ADA, 1):
            pass
    for guard in (dead, alive):
        await guard.drain(1)


async def test_without_redis_each_replica_holds_its_share_and_finds_it_again() -> None:
    """Counted, alarmed once, never unlimited; what runs already counts; while it is away it is asked once a second."""
    now, requests, changes, store = 100.0, list[int](), list[bool](), Store()
    fallback = Fallback(3, lambda: requests.append(1), changes.append)
    guard = Limits(store, Plans(user=Allowance(requests=7, tokens=100, answers=6)), 60, fallback, clock=lambda: now)
    async with guard.answering(ADA, 1):
        store.away = True
        async with guard.answering(ADA, 1):
            assert (await refusal_of(guard, ADA))["limit_kind"] == "concurrency"
            await guard.admit(ADA)
            with pytest.raises(LimitReached) as caught:
                await guard.admit(ADA)
            asked = store.asked

    assert caught.value.metadata["limit"] == "2"
    assert (asked, changes) == (2, [True])
    store.away, now = False, now + 1
    assert dict((await guard.admit(ADA)).headers)[b"x-ratelimit-limit-requests"] == b"7"
    assert (changes, len(requests)) == ([True, False], 4)
    await guard.drain(1)


async def test_a_share_is_never_nothing() -> None:
    """With more replicas than the limit has, each lets one in."""
    store = Store()
    store.away = True
    guard = Limits(store, Plans(2), 60, Fallback(5))

    assert (await guard.admit(ADA)).local
    with pytest.raises(LimitReached):
        await guard.admit(ADA)


async def test_without_the_ledger_the_last_known_plan_holds_else_the_default() -> None:
    """A ledger that restarts turns no search away."""
    plans = Plans(7)
    guard = Limits(Store(), plans, 2)
    assert (await guard.entitlements(ADA)).user.requests == 7
    plans.away = True
    guard.forget(BOB)

    assert (await guard.entitlements(ADA)).user.requests == 7
    assert (await guard.entitlements(BOB)).user.requests == 2


async def test_a_changed_plan_is_asked_for_again() -> None:
    """At once by the replica that changed it, within seconds by the others."""
    plans = Plans(7)
    guard = Limits(Store(), plans, 2)
    await guard.admit(ADA)
    plans.given = Entitlements(Allowance(requests=9))
    assert (await guard.entitlements(ADA)).user.requests == 7
    guard.forget(ADA)

    assert (await guard.entitlements(ADA)).user.requests == 9
    assert plans.asked == 2


def test_no_two_subjects_share_a_key_and_a_tenants_keys_share_a_slot() -> None:
    """Names may hold what separates them elsewhere."""
    odd = [("a", "b:c"), ("a:b", "c"), ("a}", "b"), ("a", "}b"), ("a", "b"), ("A", "b")]
    given = Entitlements(Allowance(1, 1, 1), Allowance(1, 1, 1), Allowance(1, 1, 1))
    principals = [Principal(tenant, user, api_key_id=user) for tenant, user in odd]
    keys = {charge.key for principal in principals for charge in limits._charges(principal, given, Kind.REQUESTS, 5)}
    keys |= {charge.key for principal in principals for charge in limits._charges(principal, given, Kind.READS)}
    tenants = {tenant for tenant, _ in odd}

    assert len(keys) == 2 * 4 * len(odd) + 4 * len(tenants)
    assert len({key.partition("}")[0] for key in keys}) == len(tenants)


def test_what_is_reserved_grows_with_all_that_is_read_and_with_the_bound_of_what_is_written() -> None:
    """The default output only where the request sets none. A picture counts as one, not by its bytes."""
    reserved = ReservedTokens(1000, 200)
    asked = orchestrator.AnswerRequest
    schema = {"type": "object", "description": "x" * 3000}
    tool = orchestrator.ToolDefinition(name="t", description="x" * 3000)
    result = orchestrator.ToolResult(call_id="c", text="x" * 3000)

    assert reserved.of(asked(question="a" * 30)) == 1210
    assert reserved.of(asked(max_output_tokens=7)) == 1007
    assert reserved.of(asked(max_output_tokens=-5)) == 1000
    assert reserved.of(asked(images=[orchestrator.Image(data=b"x" * 9_000_000)])) == 1200 + limits.IMAGE_TOKENS
    for part in ({"tools": [tool]}, {"tool_results": [result]}, {"output_schema": schema}):
        assert 2200 < reserved.of(asked(**part)) < 2300  # type: ignore[arg-type]


class Events:
    """Events of an answer, then an error if there is one."""

    def __init__(self, *events: orchestrator.AnswerEvent, error: Exception | None = None) -> None:
        self._events = list(events)
        self._error = error

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> orchestrator.AnswerEvent:
        if self._events:
            return self._events.pop(0)
        raise self._error or StopAsyncIteration


USAGE = common_pb2.Usage(input_tokens=1, output_tokens=20, cache_read_tokens=300, cache_write_tokens=4000)
ACCEPTED = orchestrator.AnswerEvent(answer_id="a-1", accepted=orchestrator.Accepted())


@pytest.mark.parametrize(
    ("events", "used"),
    [
        (Events(ACCEPTED, orchestrator.AnswerEvent(done=orchestrator.Done(usage=USAGE))), 4321),
        (Events(orchestrator.AnswerEvent(done=orchestrator.Done())), 0),
        (Events(error=ModelFailed("refused")), 0),
        (Events(ACCEPTED, error=ModelFailed("midway")), None),
    ],
)
async def test_the_receipt_says_what_was_used(events: Events, used: int | None) -> None:
    """An answer that was refused used nothing; of one that broke off midway nobody knows."""
    admission = limits.Admission([], [], "", [], local=False)
    with contextlib.suppress(ModelFailed):
        async for _ in Metered(events, admission, lambda: None):
            pass

    assert admission.tokens_used == used


async def test_an_answer_is_prepared_once_its_model_is_asked_or_its_text_comes_without_one() -> None:
    """Not before, and once."""
    step = [orchestrator.AnswerEvent(step=orchestrator.Step(name=name)) for name in ("recall", "hold", "generate", "validate")]
    text = orchestrator.AnswerEvent(delta=orchestrator.Delta(text="t"))
    counts = []
    for events in ((ACCEPTED, *step, text), (ACCEPTED, step[0], text, text)):
        prepared, seen = list[None](), list[int]()
        async for _ in Metered(Events(*events), limits.Admission([], [], "", [], local=False), lambda: prepared.append(None)):  # noqa: B023
            seen.append(len(prepared))
        counts.append(seen)

    assert counts == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1]]


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


@pytest.mark.parametrize("forget", [lambda memo: memo.clear(), lambda memo: memo.drop("k")], ids=["all", "one"])
async def test_who_asks_after_all_was_forgotten_shares_no_question_of_before(forget: Callable[[Memo[str, int]], None]) -> None:
    """An API key is revoked between the two: the first may still have it, the second must not."""
    memo: Memo[str, int] = Memo(10, 60)
    gates = [asyncio.Event(), asyncio.Event()]
    began: list[asyncio.Event] = []

    async def ask() -> int:
        number = len(began)
        began.append(gates[number])
        await gates[number].wait()
        return number

    first = asyncio.create_task(memo.get("k", ask))
    await asyncio.sleep(0)
    forget(memo)
    second = asyncio.create_task(memo.get("k", ask))
    await asyncio.sleep(0)
    gates[0].set()
    of_first = await first
    third = asyncio.create_task(memo.get("k", ask))
    await asyncio.sleep(0)
    gates[1].set()

    assert (of_first, await second, await third) == (0, 1, 1)
    assert len(began) == 2


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
