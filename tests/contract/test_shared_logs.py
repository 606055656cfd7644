"""What every adapter of the shared logs keeps to: the one in Redis on a real Valkey, and the one that tests of others stand on."""

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import redis.asyncio as redis

from services.chassis.errors import AnswerInterrupted, ModelStalled, Unavailable
from services.local.stores import Valkey
from services.orchestrator.domain import Claim, LogPart, SharedAnswer
from services.orchestrator.ports import SharedLogs
from services.orchestrator.redis_logs import KEY_LIFE_S, RedisLogs
from tests.fakes.shared_logs import MemoryLogs

OWNER = ("acme", "alice")
GONE = AnswerInterrupted("gone", answer_id="a")


def redis_logs(client: redis.Redis, *, lease_s: float = 10, ended_life_s: int = 60) -> RedisLogs:
    return RedisLogs(client, client, running_life_s=60, ended_life_s=ended_life_s, lease_s=lease_s, timeout_s=2)


@pytest.fixture
async def client(valkey: Valkey) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(valkey.url, socket_timeout=None, retry=None)
    yield client
    await client.aclose()


@pytest.fixture(params=["memory", "redis"])
def logs(request: pytest.FixtureRequest, client: redis.Redis) -> SharedLogs:
    return MemoryLogs() if request.param == "memory" else redis_logs(client)


@pytest.fixture
def answer_id() -> str:
    return str(uuid.uuid4())


async def append(logs: SharedLogs, answer_id: str, first: int, *payloads: bytes, replica: str = "r1", **end: object) -> str:
    (reply,) = await logs.append(replica, [LogPart(answer_id, OWNER, first, payloads, **end)])  # type: ignore[arg-type]
    return reply.word


async def test_what_was_appended_is_read_in_order_once_from_anywhere(logs: SharedLogs, answer_id: str) -> None:
    """From the beginning, from the middle, and nothing after the end."""
    await append(logs, answer_id, 1, b"one", b"two")
    await append(logs, answer_id, 3, b"three", ended=True)
    whole, rest, nothing = [await logs.read(answer_id, after, 0.5) for after in (0, 2, 3)]

    assert whole.events == ((1, b"one"), (2, b"two"), (3, b"three"))
    assert rest.events == ((3, b"three"),)
    assert nothing.events == ()
    assert [found.ended for found in (whole, rest, nothing)] == [True] * 3
    assert whole.failure is None


async def test_repeat_is_not_appended_again(logs: SharedLogs, answer_id: str) -> None:
    """A flush whose reply was lost is sent again, with more behind it."""
    await append(logs, answer_id, 1, b"one", b"two")
    word = await append(logs, answer_id, 1, b"one", b"two", b"three")

    assert word == "taken"
    assert [payload for _, payload in (await logs.read(answer_id, 0, 0.5)).events] == [b"one", b"two", b"three"]


async def test_gap_is_never_written(logs: SharedLogs, answer_id: str) -> None:
    """A store that has forgotten a log says so, and gets all of it."""
    assert await append(logs, answer_id, 5, b"five") == "unknown"
    assert await logs.look_up(answer_id) is None
    assert await append(logs, answer_id, 1, b"one") == "taken"


async def test_reader_that_waits_hears_at_once(logs: SharedLogs, answer_id: str) -> None:
    """And one for whom nothing comes is told so after its time."""
    await logs.register(answer_id, OWNER, "r1")
    waiting = asyncio.create_task(logs.read(answer_id, 0, 5))
    await asyncio.sleep(0.01)
    await append(logs, answer_id, 1, b"one")

    assert (await asyncio.wait_for(waiting, 2)).events == ((1, b"one"),)
    assert (await logs.read(answer_id, 1, 0.01)).events == ()


async def test_failure_comes_back_as_what_it_was(logs: SharedLogs, answer_id: str) -> None:
    """Class, words and facts; for readers and for whoever looks it up."""
    await append(logs, answer_id, 1, b"one", ended=True, failure=ModelStalled("silent", provider="p", waited_ms=20))
    failure = (await logs.read(answer_id, 1, 0.5)).failure
    known = await logs.look_up(answer_id)

    assert isinstance(failure, ModelStalled)
    assert (failure.detail, failure.metadata) == ("silent", {"provider": "p", "waited_ms": "20"})
    assert known is not None
    assert (known.owner, known.replica, known.ended) == (OWNER, "r1", True)
    assert isinstance(known.failure, ModelStalled)


async def test_only_the_replica_that_began_a_log_appends_to_it(logs: SharedLogs, answer_id: str) -> None:
    """A second producer is fenced off, and so is the first once the log has ended."""
    await append(logs, answer_id, 1, b"one")
    assert await append(logs, answer_id, 2, b"other", replica="r2") == "fenced"
    assert await logs.interrupt(answer_id, "r1", GONE)
    assert await append(logs, answer_id, 2, b"late") == "fenced"

    found = await logs.read(answer_id, 0, 0.5)
    assert found.events == ((1, b"one"),)
    assert isinstance(found.failure, AnswerInterrupted)


async def test_log_is_interrupted_once_and_only_in_the_name_of_its_maker(logs: SharedLogs, answer_id: str) -> None:
    """Neither an ended log nor one that another has taken up is touched."""
    await append(logs, answer_id, 1, b"one")

    assert not await logs.interrupt(answer_id, "r2", GONE)
    assert await logs.interrupt(answer_id, "r1", GONE)
    assert not await logs.interrupt(answer_id, "r1", GONE)
    assert not await logs.interrupt(str(uuid.uuid4()), "r1", GONE)


async def test_key_stands_for_one_answer_until_that_is_replaced(logs: SharedLogs, answer_id: str) -> None:
    """Of many claims at once one wins; replacing needs the claim that is in force; other owners have keys of their own."""
    key = str(uuid.uuid4())
    claims = [Claim(f"{answer_id}-{n}", bytes([n, 10, 0])) for n in range(20)]
    replies = await asyncio.gather(*(logs.claim(OWNER, key, claim) for claim in claims))
    winners = [claim for claim, earlier in zip(claims, replies, strict=True) if earlier is None]
    assert len(winners) == 1
    assert {earlier for earlier in replies if earlier is not None} == {winners[0]}

    assert await logs.claimed(OWNER, key) == winners[0]
    assert await logs.claimed(("acme", "bob"), key) is None
    loser = next(claim for claim in claims if claim is not winners[0])
    assert not await logs.claim_again(OWNER, key, loser, claims[0])
    assert await logs.claim_again(OWNER, key, winners[0], loser)
    assert await logs.claim(OWNER, key, winners[0]) == loser
    assert await logs.claim(("acme", "bob"), key, winners[0]) is None


async def test_wish_to_cancel_reaches_the_maker_and_stays_with_the_log(logs: SharedLogs, answer_id: str) -> None:
    """At once for whoever listens, with the next append or when asked for whoever missed it."""
    replica = str(uuid.uuid4())
    await append(logs, answer_id, 1, b"one", replica=replica)
    heard = asyncio.create_task(anext(aiter(logs.cancels(replica))))
    async with asyncio.timeout(5):
        while not heard.done():
            await logs.ask_to_cancel(answer_id, replica)
            await asyncio.sleep(0.01)

    assert await heard == answer_id
    assert list(await logs.asked_to_cancel([answer_id, str(uuid.uuid4())])) == [answer_id]
    assert list(await logs.asked_to_cancel([])) == []
    (reply,) = await logs.append(replica, [LogPart(answer_id, OWNER, 2, (b"two",))])
    assert (reply.word, reply.cancel_asked) == ("taken", True)


async def test_where_the_owner_left_is_known_before_anything_that_came_after(logs: SharedLogs, answer_id: str) -> None:
    """To whoever reads on, begins to read or looks it up, also once the log has ended; later parts need not say it again."""
    await append(logs, answer_id, 1, b"one")
    before = [(await logs.read(answer_id, 0, 0.5)).left_at]
    await append(logs, answer_id, 2, b"two", b"three", left_at=2)
    found = await logs.read(answer_id, 1, 0.5)
    nothing = await logs.read(answer_id, 3, 0.01)
    known = await logs.look_up(answer_id)
    assert known is not None
    await append(logs, answer_id, 4, b"four", ended=True)
    after = [await logs.read(answer_id, 0, 0.5), await logs.look_up(answer_id)]

    assert before == [None]
    assert [found.left_at, nothing.left_at, known.left_at] == [2, 2, 2]
    assert [one.left_at for one in after if one is not None] == [2, 2]


async def test_answers_of_an_owner_are_forgotten_with_the_keys_that_stand_for_them(logs: SharedLogs) -> None:
    """Also one whose end is still on its way, and nothing of a namesake elsewhere or of a colleague."""
    name = str(uuid.uuid4())
    owners = [("acme", name), ("acme", f"{name}-too"), ("other", name), ("acme", name)]
    claims = [Claim(str(uuid.uuid4()), b"body") for _ in owners]
    for number, (owner, claim) in enumerate(zip(owners, claims, strict=True)):
        part = LogPart(claim.answer_id, owner, 1, (b"one",), ended=number != 3, keyed=True)
        assert await logs.claim(owner, f"k{number}", claim) is None
        await logs.append("r1", [part])
    forgotten = [await logs.forget(owners[0]) for _ in range(2)]

    assert forgotten == [2, 0]
    assert [await logs.look_up(claim.answer_id) is None for claim in claims] == [True, False, False, True]
    assert (await logs.read(claims[0].answer_id, 0, 0.01)).events == ()
    assert await append(logs, claims[3].answer_id, 2, b"two") == "fenced"
    assert await logs.look_up(claims[3].answer_id) is None
    held = [await logs.claim(owner, f"k{number}", Claim("new", b"other")) for number, owner in enumerate(owners)]
    assert held == [None, *claims[1:3], None]


async def test_signs_of_life_and_of_readers(logs: SharedLogs, answer_id: str) -> None:
    """Nobody is alive or read who did not say so."""
    replica = str(uuid.uuid4())
    assert not await logs.is_alive(replica)
    assert not await logs.is_followed(answer_id)
    await logs.renew(replica)
    await logs.follow(answer_id)

    assert await logs.is_alive(replica)
    assert await logs.is_followed(answer_id)


async def test_lease_runs_out_and_an_ended_log_goes(client: redis.Redis, answer_id: str) -> None:
    """In Redis by its own clock."""
    logs = redis_logs(client, lease_s=0.05, ended_life_s=1)
    await logs.renew(answer_id)
    await append(logs, answer_id, 1, b"one", ended=True)
    assert isinstance(await logs.look_up(answer_id), SharedAnswer)
    async with asyncio.timeout(5):
        while await logs.is_alive(answer_id) or await logs.look_up(answer_id):  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)


async def test_how_an_answer_with_a_key_ended_is_known_for_longer_than_its_events(client: redis.Redis, answer_id: str) -> None:
    """For as long as the key."""
    logs = redis_logs(client, ended_life_s=1)
    await append(logs, answer_id, 1, b"one", ended=True, failure=GONE, keyed=True)
    known = await logs.look_up(answer_id)
    assert known is not None
    assert (known.ended, known.events_gone) == (True, False)
    async with asyncio.timeout(5):
        while not known.events_gone:
            await asyncio.sleep(0.02)
            known = await logs.look_up(answer_id)
            assert known is not None

    assert (known.owner, known.ended, type(known.failure)) == (OWNER, True, AnswerInterrupted)
    assert (await logs.read(answer_id, 0, 0.01)).events == ()
    assert KEY_LIFE_S - 60 < await client.ttl(f"tailrace:answer:{{{answer_id}}}") <= KEY_LIFE_S


async def test_an_answer_without_events_that_runs_is_not_one_whose_events_are_gone(client: redis.Redis, answer_id: str) -> None:
    """Registered, and its first step is still to come."""
    logs = redis_logs(client)
    await logs.register(answer_id, OWNER, "r1")
    known = await logs.look_up(answer_id)

    assert known is not None
    assert (known.ended, known.events_gone) == (False, False)


async def test_forgotten_script_is_loaded_again(client: redis.Redis, answer_id: str) -> None:
    """As after a restart of the store."""
    logs = redis_logs(client)
    await client.script_flush()

    assert await append(logs, answer_id, 1, b"one") == "taken"


async def test_store_that_is_away_is_said_to_be(answer_id: str) -> None:
    """By name, and soon."""
    away = redis.Redis.from_url("redis://127.0.0.1:1", retry=None)
    logs = redis_logs(away)
    for call in (logs.look_up(answer_id), logs.read(answer_id, 0, 0.1), append(logs, answer_id, 1), logs.renew("r")):
        with pytest.raises(Unavailable) as refused:
            await call
        assert refused.value.metadata["dependency"] == "redis"
    with pytest.raises(Unavailable):
        await anext(aiter(logs.cancels("r")))
    await away.aclose()
