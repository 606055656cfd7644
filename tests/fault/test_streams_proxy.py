"""The faulty proxy breaks exactly what its rule says: otherwise what survives it proves nothing."""

import asyncio
import random

import pytest

from bench.faulty_proxy import PASS, Cutter, FaultyProxy, Rule
from bench.ground import seed_of_run

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
EVENTS = [b"id: %d\ndata: %s\n\n" % (number, b"x" * number) for number in range(1, 20)]
RESPONSE = HEAD + b"".join(EVENTS)


async def through(rule: Rule, *, request: bytes = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n") -> tuple[bytes, bytes, bool]:
    """What the client got, what the server got, and whether the connection was reset."""
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(RESPONSE)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        async with FaultyProxy(server.sockets[0].getsockname()[1], lambda number, head: rule) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(request)
            got, reset = bytearray(), False
            try:
                while data := await reader.read(1000):
                    got += data
            except ConnectionResetError:
                reset = True
            writer.transport.abort()
    return bytes(got), bytes(seen), reset


async def test_without_a_rule_everything_goes_through() -> None:
    got, seen, reset = await through(PASS)
    assert (got, reset) == (RESPONSE, False)
    assert seen == b"GET / HTTP/1.1\r\nconnection: close\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize("events", [0, 1, 7, 19])
@pytest.mark.parametrize("extra", [0, 1, 5])
async def test_a_cut_behind_an_event_keeps_that_event_and_the_bytes_asked_for(events: int, extra: int) -> None:
    got, _, _ = await through(Rule(cut_after_events=events, cut_extra_bytes=extra))
    whole = HEAD + b"".join(EVENTS[:events]) if events else b""
    assert got == RESPONSE[: len(whole) + extra]


def test_a_cut_is_found_however_the_bytes_are_split() -> None:
    """The end of an event may be split over two reads, and bytes of one event may look like the end of another."""
    seed = seed_of_run()
    print(f"SEED={seed}")
    chance = random.Random(seed)
    for _ in range(500):
        events, extra = chance.randint(1, len(EVENTS) - 1), chance.choice((0, 3))
        cutter, got, rest = Cutter(Rule(cut_after_events=events, cut_extra_bytes=extra)), b"", RESPONSE
        while rest and not cutter.struck:
            size = chance.randint(1, 9)
            got, rest = got + rest[: cutter.keep(rest[:size])], rest[size:]
        assert got == RESPONSE[: len(HEAD + b"".join(EVENTS[:events])) + extra]


async def test_bytes_are_counted_over_the_whole_response_and_a_reset_is_one() -> None:
    got, _, reset = await through(Rule(cut_after_bytes=30, reset=True))
    assert reset
    assert RESPONSE[:30].startswith(got)
    got, _, reset = await through(Rule(cut_after_bytes=30))
    assert (got, reset) == (RESPONSE[:30], False)


async def test_headers_are_put_into_the_request_and_the_connection_is_for_one() -> None:
    request = b"GET / HTTP/1.1\r\nhost: a\r\nConnection: keep-alive\r\n\r\n"
    _, seen, _ = await through(Rule(headers=(("authorization", "Bearer x"),)), request=request)
    assert seen == b"GET / HTTP/1.1\r\nauthorization: Bearer x\r\nconnection: close\r\nhost: a\r\n\r\n"


async def test_a_throttled_response_takes_its_time() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    got, _, _ = await through(Rule(bytes_per_s=1000))
    assert got == RESPONSE
    assert loop.time() - began >= 0.8 * len(RESPONSE) / 1000


async def test_a_stall_is_silent_before_the_cut() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    got, _, _ = await through(Rule(cut_after_events=2, stall_s=0.3))
    assert got == HEAD + b"".join(EVENTS[:2])
    assert loop.time() - began >= 0.3
