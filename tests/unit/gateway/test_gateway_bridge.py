"""A stream carried to a client whose pace and end a test decides: what is written, in which pieces, and what ends it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from services.chassis.errors import ModelStalled, Unavailable
from services.gateway import sse
from services.gateway.bridge import Bridge, Timing
from services.gateway.exchange import ClientLeft, Exchange

LAST = 9


class Client:
    """One that takes what is sent only while `takes` is set, and leaves when it is told to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended = False
        self.sending = self.sending_most = 0
        """Sends that wait at the same time."""
        self.takes = asyncio.Event()
        self.takes.set()
        self.begun = asyncio.Event()
        """Something was sent, or waits to be."""
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.begun.set()
        self.sending += 1
        self.sending_most = max(self.sending_most, self.sending)
        await self.takes.wait()
        self.sending -= 1
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])
            self.ended = not message["more_body"]


class Source:
    """Messages that a test hands over; those of one call of `give` come together."""

    def __init__(self) -> None:
        self._given: asyncio.Queue[list[int] | Exception] = asyncio.Queue()
        self._rest: deque[int] = deque()
        self.taken = 0

    def give(self, *messages: int | Exception) -> None:
        for message in messages:
            if isinstance(message, Exception):
                self._given.put_nowait(message)
                return
        self._given.put_nowait([message for message in messages if isinstance(message, int)])

    def at_hand(self) -> int | None:
        return self._rest.popleft() if self._rest else None

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        given = await self._given.get()
        if isinstance(given, Exception):
            raise given
        self.taken += 1
        self._rest.extend(given)
        return self._rest.popleft()


class Carried:
    """A bridge under way."""

    def __init__(self, *, heartbeat_s: float = 60, write_stall_s: float = 60, lasting: bool = False) -> None:
        self.client, self.source, self.draining = Client(), Source(), asyncio.Event()
        scope = {"method": "GET", "headers": []}
        exchange = Exchange(scope, self.client.receive, self.client.send, body_stall_s=1, write_stall_s=1)
        timing = Timing(heartbeat_s, write_stall_s)
        self.bridge: Bridge[int] = Bridge(
            exchange, lambda number: b"%d" % number, lambda number: number == LAST, timing, self.draining,
            at_hand=self.source.at_hand, lasting=lasting,
        )  # fmt: skip
        self.running = asyncio.create_task(self.bridge.run(self.source))

    async def over(self) -> bool:
        done, _ = await asyncio.wait({self.running}, timeout=10)  # a cancellation would itself end it
        assert done
        return self.running.result()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def test_each_message_leaves_at_once_and_those_that_came_together_leave_together() -> None:
    """Nothing waits for what has not come; nothing that is there waits for another write."""
    carried = Carried()
    carried.source.give(1)
    await until(lambda: carried.client.sent == [b"1"])
    carried.source.give(2, 3, 4)
    await until(lambda: carried.client.sent[1:] == [b"234"])
    carried.source.give(5, LAST, 7)

    assert await carried.over()
    assert (carried.client.sent, carried.client.ended, carried.bridge.end) == ([b"1", b"234", b"59"], True, "done")


async def test_nothing_is_taken_from_the_source_while_the_client_takes_nothing() -> None:
    """So nothing piles up here, and the stream behind is held by its own flow control."""
    carried = Carried()
    carried.client.takes.clear()
    for number in (1, 2, 3, LAST):
        carried.source.give(number)
    await carried.client.begun.wait()
    await asyncio.sleep(0.01)
    assert carried.source.taken == 1

    carried.client.takes.set()
    assert await carried.over()
    assert carried.client.sent == [b"1", b"2", b"3", b"9"]


async def test_a_heartbeat_breaks_a_silence_and_never_comes_into_a_write() -> None:
    """What is written while a heartbeat waits for the client comes after it, whole."""
    carried = Carried(heartbeat_s=0.02)
    await until(lambda: carried.client.sent == [sse.HEARTBEAT])
    carried.client.takes.clear()
    carried.client.begun.clear()
    await carried.client.begun.wait()  # the next heartbeat waits now
    carried.source.give(1, 2)
    await until(lambda: carried.source.taken == 1)
    await asyncio.sleep(0.06)  # room for more heartbeats, if they did not wait for each other
    assert carried.client.sent == [sse.HEARTBEAT]
    carried.client.takes.set()
    await until(lambda: b"12" in carried.client.sent)

    assert carried.client.sent[:3] == [sse.HEARTBEAT, sse.HEARTBEAT, b"12"]
    assert carried.client.sending_most == 1
    carried.source.give(LAST)
    assert await carried.over()


async def test_a_client_that_leaves_or_takes_nothing_for_too_long_ends_the_stream() -> None:
    """Whatever is waited for: the source, or the client itself."""
    waiting = Carried()
    waiting.source.give(1)
    await until(lambda: waiting.client.sent == [b"1"])
    waiting.client.left.set()
    stalled = Carried(write_stall_s=0.02)
    stalled.client.takes.clear()
    stalled.source.give(1)
    for carried in (waiting, stalled):
        with pytest.raises(ClientLeft):
            await carried.over()
        assert (carried.bridge.end, carried.client.ended) == ("left", False)


async def test_a_lasting_stream_is_ended_by_the_drain_after_what_was_being_written() -> None:
    """A message that was taken is written, then the error; a source that is silent is not waited for."""
    silent, writing = Carried(lasting=True), Carried(lasting=True)
    silent.source.give(1)
    await until(lambda: silent.client.sent == [b"1"])
    writing.client.takes.clear()
    writing.source.give(1)
    await writing.client.begun.wait()
    for carried in (silent, writing):
        carried.draining.set()
    await asyncio.sleep(0.01)
    writing.client.takes.set()
    for carried in (silent, writing):
        assert await carried.over()
        assert carried.client.sent[0] == b"1"
        assert carried.client.sent[1].startswith(b"event: error\n") and b"UNAVAILABLE" in carried.client.sent[1]
        assert (len(carried.client.sent), carried.client.ended, carried.bridge.end) == (2, True, "error")


async def test_a_source_that_fails_is_an_error_of_the_request_before_the_first_byte_and_of_the_stream_after_it() -> None:
    """Exactly one of the two."""
    early, late = Carried(), Carried()
    early.source.give(Unavailable("away", dependency="orchestrator"))
    late.source.give(1)
    late.source.give(ModelStalled("silent", provider="p"))
    with pytest.raises(Unavailable):
        await early.over()

    assert await late.over()
    assert early.client.sent == []
    assert late.client.sent[0] == b"1"
    assert b"event: error\n" in late.client.sent[1]
    assert (early.bridge.end, late.bridge.end) == ("error", "error")


async def test_the_end_of_the_process_is_said_to_a_client_that_still_reads() -> None:
    """It is told to come back; the cancellation goes on."""
    carried = Carried()
    carried.source.give(1)
    await until(lambda: carried.client.sent == [b"1"])
    carried.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await carried.over()

    assert b"resume" in carried.client.sent[1]
    assert carried.client.ended
