"""What leaves in one write, and what never waits for another."""

import asyncio

from services.gateway.http_listener import OneWrite

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Transport:
    """Keeps every write, and the end."""

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.said.append(data)

    def close(self) -> None:
        self.said.append(b"<closed>")


async def test_a_head_leaves_with_what_follows_it_and_nothing_else_waits() -> None:
    transport = Transport()
    one = OneWrite(transport, asyncio.get_running_loop())
    one.write(HEAD)
    one.write(b"{}")
    one.write(b"more")
    assert transport.said == [HEAD + b"{}", b"more"]
    await asyncio.sleep(0)
    assert transport.said == [HEAD + b"{}", b"more"]


async def test_a_head_that_nothing_follows_leaves_in_the_same_turn() -> None:
    transport = Transport()
    one = OneWrite(transport, asyncio.get_running_loop())
    one.write(HEAD)
    await asyncio.sleep(0)
    one.write(b"late")
    assert transport.said == [HEAD, b"late"]


async def test_a_head_is_not_lost_by_a_close() -> None:
    transport = Transport()
    one = OneWrite(transport, asyncio.get_running_loop())
    one.write(HEAD)
    one.close()
    await asyncio.sleep(0)
    assert transport.said == [HEAD, b"<closed>"]


async def test_a_head_is_dropped_with_a_connection_that_is_lost_before_it_leaves() -> None:
    """A closed transport takes no write: it would end as an error of the loop that nobody asked about."""
    transport = Transport()
    one = OneWrite(transport, asyncio.get_running_loop())
    one.write(HEAD)
    transport.closing = True
    await asyncio.sleep(0)
    assert transport.said == []
