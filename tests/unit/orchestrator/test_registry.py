"""Which answers are kept, for whom, and for how long."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import pytest

from services.chassis.errors import (
    AnswerAbandoned,
    AnswerCancelled,
    AnswerInterrupted,
    AnswerLogGone,
    DomainError,
    IdempotencyConflict,
    ModelRefused,
    ModelStalled,
    NotFound,
    Overloaded,
    Unavailable,
)
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.orchestrator import registry
from services.orchestrator.domain import (
    BookedAnswer,
    CacheReceipt,
    Candidate,
    Claim,
    Done,
    Image,
    Priority,
    Question,
    SharedAnswer,
    TextDelta,
    Turn,
)
from services.orchestrator.log import Entry, EventLog
from services.orchestrator.mirrors import Mirrors
from services.orchestrator.publisher import Publisher
from services.orchestrator.registry import Bounds, Elsewhere, Kept, Produce, Registry, Retold
from services.orchestrator.rpc import new_answer_id
from tests.fakes.shared_logs import MemoryLogs

T = TypeVar("T")
Make = Callable[..., "Replica"]
ALICE, BOB = Principal("acme", "alice"), Principal("acme", "bob")


def question(
    answer_id: str, principal: Principal = ALICE, key: str = "", on_disconnect: bool = False, priority: Priority = "interactive"
) -> Question:
    candidates = (Candidate("p", "m", 1, 1),)
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return Question(answer_id, "q", principal, "s", True, "fast", candidates, 10, "default", "use", created, key, on_disconnect, priority)


def receipt() -> Done:
    return Done("a", "", Usage(), 5, "m", "p", "fast", "end_turn", CacheReceipt("miss"), "t", False, "passed", 1.0, 2.0)


class Producer:
    """Produces when it is told to, and ends as it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.failure: DomainError | None = AnswerCancelled()
        self.asked: list[str] = []

    async def __call__(self, asked: Question, events: EventLog) -> None:
        self.asked.append(asked.answer_id)
        events.append(TextDelta("x"))
        try:
            await self.go.wait()
        finally:
            if events.stopping is None and self.failure is None:
                events.append(receipt())
            events.end(events.stopping or self.failure)


class Replica:
    """A registry with all that belongs to it."""

    def __init__(self, producer: Produce, logs: MemoryLogs, name: str = "r1", known: set[tuple[str, str]] | None = None, **bounds: float):
        values = {"answers_max": 10, "answers_per_user_max": 10, "kept_max": 10, "kept_s": 60.0, "detach_grace_s": 60.0, **bounds}
        booked = known if known is not None else set()

        async def knows(principal: Principal, answer_id: str) -> bool:
            return (principal.user, answer_id) in booked

        async def look_up(principal: Principal, answer_id: str) -> BookedAnswer | None:
            return self.books.get(answer_id) if await knows(principal, answer_id) else None

        self.books: dict[str, BookedAnswer] = {}
        self.name, self.logs = name, logs
        self.publisher = Publisher(logs, name, lambda _, entry: _payload(entry), kept_s=60, bytes_max=2**20, intervals_s=(0.001, 0.001))
        self.mirrors = Mirrors(logs, 5, wait_s=0.01)

        async def is_followed(answer_id: str) -> bool:
            return answer_id in self.followed

        self.followed: set[str] = set()
        """Answers that others are told again."""
        given = Bounds(**values)  # type: ignore[arg-type]
        self.answers = Registry(producer, logs, self.publisher, self.mirrors, knows, look_up, name, given, is_followed)
        self.tasks = [asyncio.create_task(work) for work in (self.publisher.run_forever(), self.answers.listen_forever())]
        logs.alive.add(name)

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()


def _payload(entry: Entry) -> bytes:
    return repr(entry.event).encode()


@pytest.fixture
async def producer() -> AsyncIterator[Producer]:
    made = Producer()
    yield made
    made.go.set()


@pytest.fixture
async def replicas(producer: Producer) -> AsyncIterator[list[Replica]]:
    """Those that a test makes by `replica`."""
    made: list[Replica] = []
    yield made
    producer.go.set()
    await asyncio.sleep(0)
    for one in made:
        one.close()


@pytest.fixture
def replica(producer: Producer, replicas: list[Replica]) -> Make:
    logs = MemoryLogs()

    def make(name: str = "r1", known: set[tuple[str, str]] | None = None, **bounds: float) -> Replica:
        replicas.append(Replica(producer, logs, name, known, **bounds))
        return replicas[-1]

    return make


async def began(answers: Registry, asked: Question, fingerprint: bytes = b"1") -> Kept:
    found = await answers.begin(asked, fingerprint)
    assert isinstance(found, Kept)
    await asyncio.sleep(0)
    return found


async def read(one: Replica, principal: Principal, answer_id: str) -> tuple[int, DomainError | None]:
    """Read to the end: how many events, and the failure."""
    async with one.answers.reading(await one.answers.find(principal, answer_id), 0) as (events, reader):
        async with asyncio.timeout(5):
            while not events.ended or await reader.next(1):
                await reader.next(1)
        return len(events), events.failure


async def test_foreign_and_unknown_answers_look_the_same(replica: Make) -> None:
    """Also to a user of the same tenant, here and at another replica, whether somebody asks to read or to stop."""
    here, there = replica("r1"), replica("r2")
    await began(here.answers, question("a"))
    await until(lambda: "a" in here.logs.answers)
    for one in (here, there):
        for principal, answer_id in ((BOB, "a"), (ALICE, "b")):
            with pytest.raises(NotFound, match="there is no such answer"):
                await one.answers.find(principal, answer_id)
            with pytest.raises(NotFound, match="there is no such answer"):
                await one.answers.cancel(principal, answer_id)

        assert await one.answers.find(ALICE, "a")


async def test_answer_that_has_only_just_begun_is_found_elsewhere(replica: Make) -> None:
    """Before its replica has made it known; an old id that nobody knows is not waited for."""
    here, there = replica("r1"), replica("r2")
    young, old = new_answer_id(), "01900000-0000-7000-8000-000000000000"
    finding = asyncio.create_task(there.answers.find(ALICE, young))
    await asyncio.sleep(0)
    await began(here.answers, question(young))
    assert isinstance(await finding, Elsewhere)

    began_at = asyncio.get_running_loop().time()
    with pytest.raises(NotFound):
        await there.answers.find(ALICE, old)
    assert asyncio.get_running_loop().time() - began_at < 0.2


async def test_a_young_answer_of_somebody_else_is_waited_for_like_one_that_is_not_known_yet(
    replica: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its 404 came at once, and the other one half a second later. The owner does not wait."""
    here, there = replica("r1"), replica("r2")
    # Their age is never near a bound that the looks at it go by.
    young = time.time() + registry.YOUNG_S / 8
    foreign, unknown = new_answer_id(), new_answer_id()
    await began(here.answers, question(foreign))
    await until(lambda: foreign in here.logs.answers)
    now, asked = young, list[str]()
    look_up = MemoryLogs.look_up
    for one in (here, there):
        monkeypatch.setattr(one.answers, "_now", lambda: now)

    async def counted(logs: MemoryLogs, answer_id: str) -> SharedAnswer | None:
        nonlocal now
        asked.append(answer_id)
        now += registry.YOUNG_S / 4
        return await look_up(logs, answer_id)

    monkeypatch.setattr(MemoryLogs, "look_up", counted)
    for one in (here, there):
        for answer_id in (foreign, unknown):
            now = young
            with pytest.raises(NotFound):
                await one.answers.find(BOB, answer_id)
        assert asked.count(foreign) == asked.count(unknown) > 1
        asked.clear()
    now = time.time()
    await there.answers.find(ALICE, foreign)

    assert asked == [foreign]


async def test_answer_of_another_replica_is_read_whole_and_stopped(replica: Make) -> None:
    """The reader there sees the same end; the maker hears of the wish."""
    here, there = replica("r1"), replica("r2")
    await began(here.answers, question("a"))
    await until(lambda: "a" in here.logs.answers)
    reading = asyncio.create_task(read(there, ALICE, "a"))
    await asyncio.sleep(0.02)
    assert await there.answers.cancel(ALICE, "a")
    length, failure = await reading

    assert length == 1
    assert isinstance(failure, AnswerCancelled)
    assert here.answers.running == 0
    assert not await there.answers.cancel(ALICE, "a")


async def test_readers_of_an_answer_whose_replica_is_gone_are_told(replica: Make) -> None:
    """Once for all: the log ends as interrupted, and the replica that wakes up again must stop."""
    here, there = replica("r1"), replica("r2")
    kept = await began(here.answers, question("a"))
    await until(lambda: len(here.logs.answers["a"].events) == 1 if "a" in here.logs.answers else False)
    here.logs.alive.discard("r1")
    _, failure = await read(there, ALICE, "a")
    assert isinstance(failure, AnswerInterrupted)

    kept.events.append(TextDelta("y"))
    await until(lambda: kept.task.done())
    assert isinstance(kept.events.failure, AnswerInterrupted)


async def test_stop_that_the_maker_did_not_hear_reaches_it_with_its_next_words(replica: Make) -> None:
    """A lost message is no lost wish."""
    here, there = replica("r1"), replica("r2")
    here.tasks[1].cancel()  # nobody listens
    await asyncio.sleep(0)
    kept = await began(here.answers, question("a"))
    await until(lambda: "a" in here.logs.answers)
    assert await there.answers.cancel(ALICE, "a")
    kept.events.append(TextDelta("y"))
    await until(lambda: kept.task.done())

    assert isinstance(kept.events.failure, AnswerCancelled)


async def test_stop_that_the_maker_did_not_hear_reaches_it_though_it_has_no_words(monkeypatch: pytest.MonkeyPatch, replica: Make) -> None:
    """A model that has said nothing yet, or a tool that takes its time, is stopped all the same."""
    monkeypatch.setattr(registry, "RENEW_S", 0.02)
    here, there = replica("r1"), replica("r2")
    here.tasks[1].cancel()  # nobody listens
    here.tasks.append(asyncio.create_task(here.answers.live_forever()))
    kept = await began(here.answers, question("a"))
    await until(lambda: "a" in here.logs.answers)
    assert await there.answers.cancel(ALICE, "a")
    await until(lambda: kept.task.done())

    assert isinstance(kept.events.failure, AnswerCancelled)


async def told(one: Replica, answer_id: str) -> tuple[int, DomainError | None]:
    """What the owner is told there, from the beginning to the end: how many events, and the failure."""
    count = 0
    async with one.answers.reading(await one.answers.find(ALICE, answer_id), 0) as (_, reader):
        async with asyncio.timeout(5):
            while (entries := await reader.next(1)) or not reader.ended:
                count += len(entries)
        return count, reader.failure


async def test_who_stops_an_answer_that_others_follow_reads_no_more_of_it_anywhere(producer: Producer, replica: Make) -> None:
    """While it goes on for them and when it has ended: the same events at every replica, then `cancelled`. They are told all of it."""
    maker, other, third = replica("r1"), replica("r2"), replica("r3")
    asked = question(new_answer_id(), key="k")
    kept = await began(maker.answers, asked)
    maker.followed.add(asked.answer_id)
    reading = asyncio.create_task(told(third, asked.answer_id))
    async with third.mirrors.reading(asked.answer_id, await known(third, asked.answer_id), 0, is_follower=True) as (mirrored, follower):
        async with asyncio.timeout(5):
            while not await follower.next(1):
                pass
        assert await other.answers.cancel(ALICE, asked.answer_id)
        ended = await reading
        for _ in range(3):
            kept.events.append(TextDelta("more"))
        later = [await told(one, asked.answer_id) for one in (maker, other, third)]
        stopped_again = [await one.answers.cancel(ALICE, asked.answer_id) for one in (maker, other, third)]
        async with asyncio.timeout(5):
            while len(mirrored) < len(kept.events):
                await follower.next(1)
        assert not follower.ended
    producer.failure = AnswerInterrupted("its replica stops", answer_id=asked.answer_id)
    producer.go.set()
    await asyncio.wait([kept.task])
    later += [await told(one, asked.answer_id) for one in (maker, other, third)]
    again = [await one.answers.begin(replace(asked, answer_id=new_answer_id()), b"1") for one in (maker, third)]
    maker.logs.lose_events(asked.answer_id)
    gone = await third.answers.begin(replace(asked, answer_id=new_answer_id()), b"1")

    assert [(count, type(failure)) for count, failure in [ended, *later]] == [(1, AnswerCancelled)] * 7
    assert stopped_again == [False] * 3
    assert [type(found) for found in again] == [Kept, Elsewhere]
    assert isinstance(gone, Retold)
    assert isinstance(gone.events.failure, AnswerCancelled)
    assert producer.asked == [asked.answer_id]


async def known(one: Replica, answer_id: str) -> SharedAnswer:
    found = await one.logs.look_up(answer_id)
    assert found is not None
    return found


async def test_oldest_ended_answers_go_first_when_there_are_too_many(producer: Producer, replica: Make) -> None:
    """By number, by events and by bytes; what only the books know is told to its owner as gone, and to nobody else at all."""
    producer.go.set()
    for bounds in ({"kept_max": 2}, {"ended_events_max": 2}, {"ended_bytes_max": 2}):
        one = replica("r1", {("alice", "a")}, **bounds)
        for answer_id in ("a", "b", "c"):
            await asyncio.gather((await began(one.answers, question(answer_id))).task)
            await asyncio.sleep(0)
        assert await one.publisher.flushed(5) == 0
        assert isinstance(await one.answers.find(ALICE, "a"), Elsewhere)
        one.logs.answers.clear()
        with pytest.raises(AnswerLogGone):
            await one.answers.find(ALICE, "a")
        with pytest.raises(NotFound):
            await one.answers.find(BOB, "a")

        assert isinstance(await one.answers.find(ALICE, "c"), Kept)


async def test_key_is_the_same_answer_at_every_replica(producer: Producer, replica: Make) -> None:
    """Asked at once at both, one of them makes it and both have it; another body is refused at both; other owners have other keys."""
    here, there = replica("r1"), replica("r2")
    found = await asyncio.gather(
        *(one.answers.begin(question(f"a-{one.name}-{n}", key="k"), b"1") for one in (here, there) for n in range(5))
    )
    await asyncio.sleep(0)
    ids = {one.question.answer_id if isinstance(one, Kept) else one.answer_id for one in found}
    assert len(ids) == len(producer.asked) == 1
    for one in (here, there):
        with pytest.raises(IdempotencyConflict):
            await one.answers.begin(question("c", key="k"), b"2")

    assert isinstance(await here.answers.begin(question("d", BOB, key="k"), b"2"), Kept)


@pytest.mark.parametrize(
    ("failure", "again"), [(ModelStalled(), True), (AnswerInterrupted(), True), (ModelRefused(), False), (AnswerCancelled(), False)]
)
async def test_key_begins_anew_only_what_another_try_may_heal(producer: Producer, replica: Make, failure: DomainError, again: bool) -> None:
    """At the replica that failed and at another."""
    producer.failure = failure
    producer.go.set()
    here, there = replica("r1"), replica("r2")
    await asyncio.gather((await began(here.answers, question("a", key="k"))).task)
    assert await here.publisher.flushed(5) == 0
    for number, one in enumerate((there, here)):
        found = await one.answers.begin(question(f"b{number}", key="k"), b"1")
        if isinstance(found, Kept):
            await asyncio.gather(found.task)
            assert await one.publisher.flushed(5) == 0

    assert producer.asked == (["a", "b0", "b1"] if again else ["a"])


def booked(status: Literal["done", "failed", "cancelled"], reason: str = "", text: str = "") -> BookedAnswer:
    created = datetime(2026, 1, 1, tzinfo=UTC)
    return BookedAnswer(status, reason, "s", created, receipt(), Turn("a", "q", text, (), created, True) if text else None)


@pytest.mark.parametrize(
    ("kept", "again", "failure"),
    [
        (booked("failed", "MODEL_STALLED"), True, None),
        (booked("cancelled", "ANSWER_ABANDONED"), True, None),
        (booked("done", text="forty two"), False, None),
        (booked("done"), False, AnswerLogGone),
        (booked("failed", "MODEL_REFUSED"), False, ModelRefused),
        (booked("cancelled", "ANSWER_CANCELLED"), False, AnswerCancelled),
    ],
)
async def test_key_stands_for_its_answer_when_the_log_is_gone(
    producer: Producer, replica: Make, kept: BookedAnswer, again: bool, failure: type[DomainError] | None
) -> None:
    """By what is booked: it begins anew what another try may heal, and is told again what there was, whatever that was."""
    one = replica("r1", {("alice", "a")})
    one.books["a"] = kept
    await one.logs.claim(("acme", "alice"), "k", Claim("a", b"1"))
    found = await one.answers.begin(question("b", key="k"), b"1")
    await asyncio.sleep(0)
    assert producer.asked == (["b"] if again else [])
    assert isinstance(found, Kept) is again
    if again:
        return
    async with one.answers.reading(found, 0) as (events, reader):
        told = [entry.event for entry in await reader.next(1)]

    assert events.ended
    assert failure is type(events.failure) if failure else events.failure is None
    assert [event.text for event in told if isinstance(event, TextDelta)] == (["forty two"] if failure is None else [])
    if failure:
        assert events.failure is not None
        assert events.failure.metadata == ({"answer_id": "a", "outcome": "done"} if failure is AnswerLogGone else {"answer_id": "a"})


async def test_key_of_an_answer_that_ended_and_is_not_booked_yet_begins_no_second_one(producer: Producer, replica: Make) -> None:
    """Its record may wait in a spool, of any replica, for longer than its events are kept. Once it is booked it is told again."""
    producer.go.set()
    producer.failure = None
    booked_by_now: set[tuple[str, str]] = set()
    here, there = replica("r1", booked_by_now), replica("r2", booked_by_now)
    await asyncio.gather((await began(here.answers, question("a", key="k"))).task)
    assert await here.publisher.flushed(5) == 0
    here.logs.lose_events("a")
    with pytest.raises(Unavailable) as refused:
        await there.answers.begin(question("b", key="k"), b"1")
    booked_by_now.add(("alice", "a"))
    there.books["a"] = booked("done", text="forty two")

    assert isinstance(await there.answers.begin(question("c", key="k"), b"1"), Retold)
    assert (producer.asked, refused.value.metadata["dependency"]) == (["a"], "ledger")


async def test_key_of_an_erased_user_begins_anew(producer: Producer, replica: Make) -> None:
    """Whatever was asked with it before, and although the books have nothing of its answer; what it stood for is not found again."""
    producer.failure = None
    producer.go.set()
    here, there = replica("r1"), replica("r2")
    await asyncio.gather((await began(here.answers, question("a", key="k"))).task)
    assert await here.publisher.flushed(5) == 0
    assert await here.answers.forget(ALICE.tenant, ALICE.user) == 1
    for one in (here, there):
        with pytest.raises(NotFound):
            await one.answers.find(ALICE, "a")
    anew = await there.answers.begin(question("b", key="k"), b"2")

    assert isinstance(anew, Kept)
    assert anew.question.answer_id == "b"


@pytest.mark.parametrize(("failure", "again"), [(ModelStalled(), True), (ModelRefused(), False)])
async def test_key_of_an_answer_that_failed_unbooked_means_what_it_failed_of(
    producer: Producer, replica: Make, failure: DomainError, again: bool
) -> None:
    """Also when its events are gone: another try is begun only if it may heal."""
    producer.failure = failure
    producer.go.set()
    here, there = replica("r1"), replica("r2")
    await asyncio.gather((await began(here.answers, question("a", key="k"))).task)
    assert await here.publisher.flushed(5) == 0
    here.logs.lose_events("a")
    found = await there.answers.begin(question("b", key="k"), b"1")
    await asyncio.sleep(0)

    assert producer.asked == (["a", "b"] if again else ["a"])
    assert again or (isinstance(found, Retold) and type(found.events.failure) is type(failure))


async def test_reader_whose_events_run_out_before_it_has_read_any_is_told(producer: Producer, replica: Make) -> None:
    """Although how the answer ended is still known."""
    producer.go.set()
    here, there = replica("r1"), replica("r2")
    await asyncio.gather((await began(here.answers, question("a", key="k"))).task)
    assert await here.publisher.flushed(5) == 0
    found = await there.answers.find(ALICE, "a")
    here.logs.lose_events("a")
    async with asyncio.timeout(5), there.answers.reading(found, 0) as (events, reader):
        while not events.ended:
            await reader.next(1)

    assert isinstance(events.failure, AnswerLogGone)


async def test_only_an_answer_with_a_key_is_known_for_longer_than_its_events(producer: Producer, replica: Make) -> None:
    producer.go.set()
    one = replica()
    await asyncio.gather((await began(one.answers, question("a"))).task)
    assert await one.publisher.flushed(5) == 0
    one.logs.lose_events("a")

    assert await one.logs.look_up("a") is None


async def test_key_of_a_replica_that_is_gone_begins_anew(producer: Producer, replica: Make) -> None:
    """Not before: while its maker lives, the same key waits for the same answer."""
    here, there = replica("r1"), replica("r2")
    await began(here.answers, question("a", key="k"))
    assert isinstance(await there.answers.begin(question("b", key="k"), b"1"), Elsewhere)
    here.logs.alive.discard("r1")

    assert isinstance(await there.answers.begin(question("c", key="k"), b"1"), Kept)
    assert isinstance(here.logs.answers["a"].failure, AnswerInterrupted)


async def test_key_whose_answer_never_came_to_be_begins_anew(replica: Make) -> None:
    """Its replica died between the claim and the first step, and what it had made known has run out."""
    one = replica()
    await one.logs.claim(("acme", "alice"), "k", Claim("never", b"1"))

    assert isinstance(await one.answers.begin(question("a", key="k"), b"1"), Kept)


class SlowLogs(MemoryLogs):
    """Waits in the first call of one name until it is let go: before the call is done, or when it is done and not told yet."""

    def __init__(self, call: str, *, done: bool) -> None:
        super().__init__()
        self.call, self.done = call, done
        self.arrived, self.go = asyncio.Event(), asyncio.Event()

    async def _slowly(self, call: str, work: Awaitable[T]) -> T:
        if call != self.call or self.arrived.is_set():
            return await work
        result = await work if self.done else None
        self.arrived.set()
        await self.go.wait()
        return result if self.done else await work  # type: ignore[return-value]

    async def register(self, *args: Any) -> None:
        await self._slowly("register", super().register(*args))

    async def claim(self, *args: Any) -> Claim | None:
        return await self._slowly("claim", super().claim(*args))

    async def claim_again(self, *args: Any) -> bool:
        return await self._slowly("claim_again", super().claim_again(*args))

    async def look_up(self, answer_id: str) -> SharedAnswer | None:
        return await self._slowly("look_up", super().look_up(answer_id))

    async def is_alive(self, replica: str) -> bool:
        return await self._slowly("is_alive", super().is_alive(replica))

    async def interrupt(self, *args: Any) -> bool:
        return await self._slowly("interrupt", super().interrupt(*args))


@pytest.mark.parametrize("call", ["register", "claim", "look_up", "is_alive", "interrupt", "claim_again"])
@pytest.mark.parametrize("done", [False, True])
async def test_key_whose_asker_leaves_in_the_middle_of_beginning_has_an_answer(producer: Producer, call: str, done: bool) -> None:
    """At whatever step: whoever asks again with the key, at whatever replica, has something to read, and only one answer is made."""
    owner = ("acme", "alice")
    logs = SlowLogs(call, done=done)
    await MemoryLogs.register(logs, "old", owner, "gone")
    await MemoryLogs.claim(logs, owner, "k", Claim("old", b"1"))
    here, there = Replica(producer, logs, "r1"), Replica(producer, logs, "r2")
    try:
        asking = asyncio.create_task(here.answers.begin(question("a", key="k"), b"1"))
        await logs.arrived.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        logs.go.set()
        await until(lambda: producer.asked == ["a"])
        for one in (there, here):
            found = await one.answers.begin(question(f"b-{one.name}", key="k"), b"1")
            async with one.answers.reading(found, 0) as (_, reader):
                assert await reader.next(2)

        assert producer.asked == ["a"]
    finally:
        here.close()
        there.close()


async def test_answer_whose_asker_left_before_it_began_is_stopped_after_the_grace(producer: Producer) -> None:
    """Nobody has ever read it, so nobody could leave it."""
    logs = SlowLogs("claim", done=True)
    here = Replica(producer, logs, "r1", detach_grace_s=0.02)
    try:
        asking = asyncio.create_task(here.answers.begin(question("a", key="k"), b"1"))
        await logs.arrived.wait()
        asking.cancel()
        logs.go.set()
        await until(lambda: producer.asked == ["a"])
        await until(lambda: here.answers.running == 0)
    finally:
        here.close()


class UnsureLogs(MemoryLogs):
    """Lets a key stand for an answer, and does not live to say so."""

    unsure = True

    async def claim(self, *args: Any) -> Claim | None:
        return await self._unsurely(super().claim(*args))

    async def claim_again(self, *args: Any) -> bool:
        return await self._unsurely(super().claim_again(*args))

    async def _unsurely(self, work: Awaitable[T]) -> T:
        done = await work
        if self.unsure and done in (None, True):
            self.away = True
            self._ask()
        return done


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("again_at", [0, 1])
async def test_key_begins_anew_after_nobody_could_say_what_it_stands_for(producer: Producer, earlier: bool, again_at: int) -> None:
    """The asker was told that it failed: what the key may stand for was never begun, and never will be."""
    owner, logs = ("acme", "alice"), UnsureLogs()
    if earlier:
        await MemoryLogs.register(logs, "old", owner, "gone")
        await MemoryLogs.claim(logs, owner, "k", Claim("old", b"1"))
    replicas = [Replica(producer, logs, name) for name in ("r1", "r2")]
    try:
        with pytest.raises(Unavailable):
            await replicas[0].answers.begin(question("a", key="k"), b"1")
        logs.away = logs.unsure = False
        assert logs.claims[owner, "k"].answer_id == "a"
        assert await replicas[0].publisher.flushed(5) == 0

        assert isinstance(await replicas[again_at].answers.begin(question("b", key="k"), b"1"), Kept)
        await until(lambda: producer.asked == ["b"])
    finally:
        for one in replicas:
            one.close()


async def test_drain_waits_for_what_is_only_just_beginning(producer: Producer) -> None:
    """It ends as interrupted, and is not left without an end."""
    logs = SlowLogs("claim", done=True)
    here = Replica(producer, logs, "r1")
    try:
        asking = asyncio.create_task(here.answers.begin(question("a", key="k"), b"1"))
        await logs.arrived.wait()
        draining = asyncio.create_task(here.answers.drain(0.2))
        await asyncio.sleep(0)
        logs.go.set()
        found = await asking
        assert isinstance(found, Kept)

        assert await draining == 1
        assert isinstance(found.events.failure, AnswerInterrupted)
    finally:
        here.close()


async def test_without_the_shared_logs_a_key_is_refused_and_all_else_goes_on(replica: Make) -> None:
    """Nobody can say what the key stands for; an answer without one needs nobody."""
    one = replica()
    one.logs.away = True
    with pytest.raises(Unavailable):
        await one.answers.begin(question("a", key="k"), b"1")
    kept = await began(one.answers, question("b"))
    assert await one.answers.find(ALICE, "b") is kept
    assert await one.answers.cancel(ALICE, "b")
    await asyncio.gather(kept.task, return_exceptions=True)
    one.logs.away = False

    assert await one.publisher.flushed(5) == 0
    assert one.logs.answers["b"].ended


async def test_what_nobody_waits_for_makes_room(replica: Make) -> None:
    """Batch stops at four fifths, others at all; and one user does not take everybody's place."""
    one = replica(answers_max=5, answers_per_user_max=4)
    for n in range(4):
        await began(one.answers, question(f"a{n}", priority="batch"))
    with pytest.raises(Overloaded, match="too many answers are being made for this user"):
        await one.answers.begin(question("b"), b"1")
    with pytest.raises(Overloaded, match=r"too many answers are being made$"):
        await one.answers.begin(question("c", BOB, priority="batch"), b"1")
    await began(one.answers, question("d", BOB))
    with pytest.raises(Overloaded, match=r"too many answers are being made$"):
        await one.answers.begin(question("e", BOB), b"1")
    assert await one.answers.cancel(ALICE, "a0")
    await until(lambda: one.answers.running == 4)

    assert await began(one.answers, question("f"))


@pytest.mark.parametrize(("bounds", "admitted"), [({"answers_per_user_max": 3}, 3), ({"answers_max": 4}, 4), ({}, 2)])
async def test_bounds_hold_while_many_begin_at_once_with_keys(
    producer: Producer, replica: Make, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int], admitted: int
) -> None:
    """Of one user, of all, and of pictures: what is about to begin has its place already."""
    monkeypatch.setattr("services.orchestrator.registry.PICTURE_BYTES_MAX", 250)
    one, images = replica("r1", **bounds), (Image("image/png", bytes(100)),) if not bounds else ()
    asked = [replace(question(f"a{n}", key=f"k{n}"), images=images) for n in range(8)]
    found = await asyncio.gather(*(one.answers.begin(this, b"1") for this in asked), return_exceptions=True)

    assert [type(this) for this in found] == [Kept] * admitted + [Overloaded] * (8 - admitted)


async def test_what_does_not_begin_gives_its_place_back(producer: Producer, replica: Make) -> None:
    """A key that stands for another answer or another body, and a store that is away, take nobody's place."""
    one = replica("r1", answers_max=2, answers_per_user_max=2)
    first = await began(one.answers, question("a", key="k"))
    for n in range(3):
        assert await one.answers.begin(question(f"b{n}", key="k"), b"1") is first
        with pytest.raises(IdempotencyConflict):
            await one.answers.begin(question(f"c{n}", key="k"), b"2")
        one.logs.away = True
        with pytest.raises(Unavailable):
            await one.answers.begin(question(f"d{n}", key="k"), b"1")
        one.logs.away = False

    assert await began(one.answers, question("e"))


async def test_answer_stopped_before_its_first_step_still_has_an_end(replica: Make) -> None:
    """A reader of it is told, and does not wait for ever."""
    answers = replica().answers
    kept = await answers.begin(question("a"), b"1")
    assert isinstance(kept, Kept)
    assert await answers.cancel(ALICE, "a")
    await asyncio.gather(kept.task, return_exceptions=True)
    await asyncio.sleep(0)

    assert isinstance(kept.events.failure, AnswerCancelled)
    assert not await answers.cancel(ALICE, "a")


async def test_what_lies_in_the_provider_socket_is_counted_before_a_stop() -> None:
    """It was made and is billed, so an estimate that leaves it out is wrong by all that a lagging loop had not read."""
    ours, theirs = socket.socketpair()
    lines, answering = await asyncio.open_connection(sock=ours)
    counted = 0

    async def produce(asked: Question, events: EventLog) -> None:
        nonlocal counted
        try:
            events.append(TextDelta("x"))
            while await lines.readline():
                counted += 1
        finally:
            events.end(AnswerCancelled())

    one = Replica(produce, MemoryLogs(), "r1")
    try:
        kept = await began(one.answers, question("a"))
        theirs.sendall(b"token\n" * 7)  # nothing of this has been read when the stop is asked for
        await one.answers.cancel(ALICE, "a")
        await asyncio.gather(kept.task, return_exceptions=True)
    finally:
        one.close()
        answering.close()
        theirs.close()

    assert counted == 7


async def test_drain_refuses_what_is_new_and_interrupts_what_does_not_end(replica: Make) -> None:
    """It says how many it had to interrupt, and readers can tell that from a cancel."""
    answers = replica().answers
    kept = await began(answers, question("a"))
    stopped = await answers.drain(0.01)
    with pytest.raises(Overloaded):
        await answers.begin(question("b"), b"1")

    assert stopped == 1
    assert answers.running == 0
    assert isinstance(kept.events.failure, AnswerInterrupted)


async def test_last_reader_that_leaves_ends_what_nobody_can_come_back_to(replica: Make) -> None:
    """The first of two may leave; with the second the answer goes, at once if so asked, else after the grace."""
    answers = replica(detach_grace_s=0.01).answers
    for on_disconnect in (True, False):
        kept = await began(answers, question(f"a{on_disconnect}", on_disconnect=on_disconnect))
        async with answers.reading(kept, 0):
            async with answers.reading(kept, 0):
                await asyncio.sleep(0)
            assert not kept.task.cancelling()
        async with asyncio.timeout(5):
            await asyncio.gather(kept.task, return_exceptions=True)

        assert kept.task.cancelled()


@pytest.mark.parametrize("on_disconnect", [True, False])
async def test_key_finds_its_answer_again_after_its_line_was_lost(replica: Make, producer: Producer, on_disconnect: bool) -> None:
    """Also the answer of a caller who waits for one whole document: that retry is what a key is for."""
    answers = replica().answers
    kept = await began(answers, question("a", key="k", on_disconnect=on_disconnect))
    async with answers.reading(kept, 0):
        pass
    await asyncio.sleep(0.02)

    assert await answers.begin(question("b", key="k", on_disconnect=on_disconnect), b"1") is kept
    assert not kept.task.done()


@pytest.mark.parametrize("on_disconnect", [True, False])
async def test_key_of_an_answer_that_nobody_came_back_to_begins_anew(replica: Make, producer: Producer, on_disconnect: bool) -> None:
    """It was stopped because nobody read it, not because its owner said so; what its owner stopped stays stopped."""
    here, there = replica("r1", detach_grace_s=0.01), replica("r2")
    kept = await began(here.answers, question("a", key="k", on_disconnect=on_disconnect))
    async with here.answers.reading(kept, 0):
        pass
    await until(kept.task.done)
    assert isinstance(kept.events.failure, AnswerAbandoned)
    assert await here.publisher.flushed(5) == 0
    again = await there.answers.begin(question("b", key="k", on_disconnect=on_disconnect), b"1")
    assert isinstance(again, Kept)
    assert await there.answers.cancel(ALICE, "b")

    assert await there.answers.begin(question("c", key="k", on_disconnect=on_disconnect), b"1") is again
    assert producer.asked == ["a", "b"]


@pytest.mark.parametrize("on_disconnect", [True, False])
async def test_answer_that_is_read_elsewhere_goes_on(replica: Make, on_disconnect: bool) -> None:
    """The grace is over only when nobody reads it anywhere; where there is none, a reader elsewhere is not cut either."""
    here, there = replica("r1", detach_grace_s=0.02), replica("r2")
    kept = await began(here.answers, question("a", on_disconnect=on_disconnect))
    await until(lambda: "a" in here.logs.answers)
    async with there.answers.reading(await there.answers.find(ALICE, "a"), 0):
        async with here.answers.reading(kept, 0):
            pass
        await asyncio.sleep(0.1)
        assert not kept.task.done()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - tasks of the registry make it true
            await asyncio.sleep(0.001)


async def test_pictures_are_kept_while_an_answer_runs_and_no_longer(
    replica: Make, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a bound together, and what has ended holds none of them, though its events are kept for minutes."""
    monkeypatch.setattr("services.orchestrator.registry.PICTURE_BYTES_MAX", 250)
    one, picture = replica(), (Image("image/png", bytes(100)),)
    kept = [await one.answers.begin(replace(question(new_answer_id()), images=picture), b"") for _ in range(2)]
    with pytest.raises(Overloaded):
        await one.answers.begin(replace(question(new_answer_id()), images=picture), b"")
    await one.answers.begin(question(new_answer_id()), b"")
    producer.go.set()
    await until(lambda: one.answers.running == 0)

    assert all(isinstance(found, Kept) and found.question.images == () for found in kept)
    await one.answers.begin(replace(question(new_answer_id()), images=picture * 2), b"")
