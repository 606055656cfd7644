"""Connections over gRPC are bounded by address, although gRPC shows none of them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.server import Server, nobody
from services.gateway.grpc_peers import GrpcPeers, connections


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server(nobody, reflect=False)
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.stop(0, 0)


@contextlib.contextmanager
def crowd(port: int, address: str, number: int) -> Iterator[list[socket.socket]]:
    """Connections from one address that say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=(address, 0))) for _ in range(number)]


def is_cut(connection: socket.socket) -> bool:
    """Whether the server has closed it; it may have said something before."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


async def cut_in(connections: list[socket.socket], number: int) -> list[bool]:
    """Which are cut, once so many are."""
    async with asyncio.timeout(20):
        while True:
            found = await asyncio.to_thread(lambda: [is_cut(connection) for connection in connections])
            if sum(found) == number:
                return found
            await asyncio.sleep(0.01)


async def test_one_address_cannot_take_every_connection() -> None:
    """The newest go. Those of other addresses and who was there before stay, with the calls on them."""
    async with serving() as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        peers = GrpcPeers(6)
        with crowd(server.port, "127.0.0.1", 5) as first, crowd(server.port, "127.0.0.2", 5) as others:
            await accepted(server.port, 11)
            assert await asyncio.to_thread(peers.sweep, server.port) == 0
            with crowd(server.port, "127.0.0.1", 20) as late, crowd(server.port, "127.0.0.2", 1) as more:
                await accepted(server.port, 32)
                assert await asyncio.to_thread(peers.sweep, server.port) == 20
                assert await cut_in(late, 20) == [True] * 20
                assert await asyncio.to_thread(lambda: [is_cut(one) for one in (*first, *others, *more)]) == [False] * 11
                assert await asyncio.to_thread(peers.sweep, server.port) == 0
        await server.report({"": True})
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def accepted(port: int, number: int) -> None:
    """Wait until so many connections have reached the server."""

    def count() -> int:
        found = list(connections(port))
        for one in found:
            one.close()
        return len(found)

    async with asyncio.timeout(20):
        while True:
            if await asyncio.to_thread(count) == number:
                return
            await asyncio.sleep(0.01)


async def test_the_watch_sweeps_and_ends() -> None:
    """By itself, now and then."""
    async with serving() as server:
        with crowd(server.port, "127.0.0.1", 9) as connections:
            watching = asyncio.create_task(GrpcPeers(4).watch(server.port))
            assert sum(await cut_in(connections, 5)) == 5
            watching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watching
