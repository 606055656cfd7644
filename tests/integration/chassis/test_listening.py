"""A port that only a connection holds is waited for; one that a server listens on is refused at once."""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from services.chassis import listening
from services.chassis.server import Server, nobody
from services.gateway.http_listener import HttpListener
from services.local.stores import free_port

HOST = "127.0.0.1"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
HOUR_S = 3600.0

Stop = Callable[[], Awaitable[None]]


async def start_grpc(port: int) -> Stop:
    server = Server(nobody, reflect=False)
    await server.start(HOST, port)
    return lambda: server.stop(0, 0)


async def start_http(port: int) -> Stop:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError

    listener = HttpListener(app)
    await listener.start(HOST, port)
    return lambda: listener.stop(0)


STARTS = pytest.mark.parametrize("start", [start_grpc, start_http])


@pytest.fixture
def passing() -> Iterator[socket.socket]:
    """A connection to somewhere else; closed, it leaves nothing on its port, which no other connection of this machine shares."""
    with (
        socket.create_server((HOST, 0)) as elsewhere,
        socket.create_connection(elsewhere.getsockname(), source_address=(HOST, free_port())) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        accepted, _ = elsewhere.accept()
        with accepted:
            yield connection


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server."""
    with socket.create_server((HOST, 0)) as listener:
        yield int(listener.getsockname()[1])


class Told:
    """Stands for the log: what was said, and when something was."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []
        self.something = asyncio.Event()

    def warning(self, event: str, *, port: int, tried_for_s: float) -> None:
        self.lines.append((event, port))
        self.something.set()


@STARTS
async def test_a_server_waits_for_a_connection_to_leave_its_port(
    start: Callable[[int], Awaitable[Stop]], passing: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and serves as soon as the connection is gone."""
    monkeypatch.setattr(listening.claimed, "__defaults__", (HOUR_S,))
    told = Told()
    monkeypatch.setattr(listening, "log", told)
    port = passing.getsockname()[1]
    starting = asyncio.create_task(start(port))
    async with asyncio.timeout(30):
        await told.something.wait()
        passing.close()
        stop = await starting
    serving = listening.listeners(port)
    await stop()

    assert told.lines == [("port_held_by_a_connection", port)]
    assert serving == [os.getpid()]


@STARTS
async def test_a_port_of_another_server_is_refused_at_once(
    start: Callable[[int], Awaitable[Stop]], server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting would not help, and its number is in the message."""
    monkeypatch.setattr(listening.claimed, "__defaults__", (HOUR_S,))

    with pytest.raises(OSError, match=f"cannot listen on {HOST}:{server}.*: Address already in use"):
        await asyncio.wait_for(start(server), 30)


async def test_a_connection_that_stays_is_waited_for_no_longer_than_is_said(passing: socket.socket) -> None:
    """Then it is said what holds the port."""
    with pytest.raises(OSError, match=r"held for 0\.3 s by connections, no server listens there") as refused:
        await listening.claimed(HOST, passing.getsockname()[1], patience_s=0.3)

    assert refused.value.errno == errno.EADDRINUSE


async def test_an_address_that_is_not_ours_is_refused_at_once() -> None:
    """Nothing passes that would make it ours."""
    with pytest.raises(OSError) as refused:
        await asyncio.wait_for(listening.claimed("203.0.113.1", 50_051, patience_s=HOUR_S), 30)

    assert refused.value.errno == errno.EADDRNOTAVAIL
