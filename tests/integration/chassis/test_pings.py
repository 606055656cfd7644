"""A peer that stands still, as under SIGSTOP or behind a cable that was pulled, says nothing and breaks nothing off: only pings find it."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.provider import ROOT
from services.chassis.channel import STANDS_STILL_S, errors_of, open_channel
from services.chassis.errors import Unavailable
from services.chassis.pings import with_pings
from services.chassis.server import SERVER_OPTIONS
from tests.suite import until

SLACK_S = 4.0
"""What a crowded machine may add."""
PATIENCE_S = 30.0
REPLICA = """
import asyncio, sys
from services.chassis.server import Server, nobody

async def main():
    server = Server(nobody, reflect=False)
    port = await server.start("127.0.0.1", 0)
    await server.report({"": True})
    print(port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
WATCHING = """
import asyncio, sys
from grpc_health.v1 import health_pb2, health_pb2_grpc
from services.chassis.channel import open_channel

async def main():
    async with open_channel("127.0.0.1:" + sys.argv[1]) as channel:
        async for _ in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
            print("watching", flush=True)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def process(program: str, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A process of its own, with the first line it says."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'sdk'}"}
    )
    try:
        assert started.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            yield started, (await started.stdout.readline()).decode().strip()
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def silent(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamCall:
    """A stream that has said its first word and has nothing more to say."""
    call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    return call


async def test_a_silent_stream_ends_as_unavailable_when_its_server_stands_still() -> None:
    async with process(REPLICA) as (server, port), open_channel(f"127.0.0.1:{port}") as channel:
        call = await silent(channel)
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable), errors_of("replica"):
            async with asyncio.timeout(STANDS_STILL_S + SLACK_S):
                await call.read()
        assert time.monotonic() - began > 1, "it was not the silence that ended it"


async def test_a_server_that_only_says_nothing_is_left_alone() -> None:
    """However long: many pings are answered, none is taken for an attack."""
    async with process(REPLICA) as (_, port), open_channel(f"127.0.0.1:{port}") as channel:
        call = await silent(channel)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call.read(), 2 * STANDS_STILL_S)


async def test_of_three_replicas_the_one_that_stands_still_is_passed_over_and_taken_back() -> None:
    async with contextlib.AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(process(REPLICA)) for _ in range(3)]
        channel = await stack.enter_async_context(open_channel("ipv4:" + ",".join(f"127.0.0.1:{port}" for _, port in replicas)))
        stub, victim = health_pb2_grpc.HealthStub(channel), replicas[1][0]

        async def served(calls: int) -> bool:
            replies = (stub.Check(health_pb2.HealthCheckRequest(), timeout=2) for _ in range(calls))
            return not any(isinstance(one, BaseException) for one in await asyncio.gather(*replies, return_exceptions=True))

        assert await served(30)
        victim.send_signal(signal.SIGSTOP)
        assert not await served(30)
        await until(lambda: served(30), STANDS_STILL_S + SLACK_S)
        assert await served(300)
        victim.send_signal(signal.SIGCONT)
        for replica, _ in replicas:
            if replica is not victim:
                replica.kill()
                await replica.wait()
        await until(lambda: served(10), PATIENCE_S)


async def test_a_server_lets_go_of_a_client_that_stands_still() -> None:
    """With short times; the server's own add up to more than a minute."""
    called, let_go = asyncio.Event(), asyncio.Event()

    class Watched(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
        async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
            await context.write(health_pb2.HealthCheckResponse())
            called.set()
            try:
                await asyncio.Event().wait()
            finally:
                let_go.set()

    server = grpc.aio.server(options=with_pings(SERVER_OPTIONS, every_s=1, answer_within_s=1))
    health_pb2_grpc.add_HealthServicer_to_server(Watched(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with process(WATCHING, str(port)) as (client, word):
            assert word == "watching"
            client.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(2 + SLACK_S):
                await let_go.wait()
    finally:
        await server.stop(0)
