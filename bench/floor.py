"""What a bare gRPC stream costs on this host: no code of Tailrace, as many streams, messages and bytes as its answers have.

Two processes of their own, a server and a client, which count their own CPU. It judges nothing.
"""

import asyncio
import json
import sys
import time

import grpc
import uvloop

from bench.provider import ROOT
from services.chassis.channel import CHANNEL_OPTIONS
from services.chassis.server import SERVER_OPTIONS

STREAMS = 20
PACE_PER_S = 50
MESSAGES = 250
"""Of each stream."""
MESSAGE = b"x" * 90
"""As large as an event with a token."""
TIMEOUT_S = 60.0

_STREAM, _CPU = "Stream", "Cpu"
_SERVICE = "tailrace.bench.Floor"


async def floor(messages: int = MESSAGES) -> dict[str, float]:
    """Microseconds of CPU a message costs the server and the client, with so many on each stream.

    Raises RuntimeError, TimeoutError if they do not end well.
    """
    server = await _process("server")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert server.stdout is not None
            port = (await server.stdout.readline()).decode().strip()
            client = await _process("client", port, str(messages))
            try:
                said, _ = await client.communicate()
            finally:
                if client.returncode is None:
                    client.kill()
            if client.returncode:
                raise RuntimeError(f"the bare client ended with {client.returncode}")
    finally:
        server.kill()
        await server.wait()
    figures: dict[str, float] = json.loads(said)
    return figures


async def _process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.floor", *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE)


async def _serve() -> None:
    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(int(request)):
            due += 1 / PACE_PER_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            await context.write(MESSAGE)

    async def cpu(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return b"%.6f" % time.process_time()

    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {_STREAM: grpc.unary_stream_rpc_method_handler(stream), _CPU: grpc.unary_unary_rpc_method_handler(cpu)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


async def _read(port: str, messages: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stream, cpu = channel.unary_stream(f"/{_SERVICE}/{_STREAM}"), channel.unary_unary(f"/{_SERVICE}/{_CPU}")

        async def read(count: int, after_s: float) -> int:
            await asyncio.sleep(after_s)
            return len([message async for message in stream(b"%d" % count)])

        async def spent() -> tuple[float, float]:
            return float(await cpu(b"")), time.process_time()

        await asyncio.gather(*(read(5, 0) for _ in range(STREAMS)))  # the connection, and code that runs for the first time
        before = await spent()
        # They begin evenly spread, so that their messages do not come in step.
        counts = await asyncio.gather(*(read(messages, number / PACE_PER_S / STREAMS) for number in range(STREAMS)))
        after = await spent()
    if counts != [messages] * STREAMS:
        raise RuntimeError("messages were lost")
    server_us, client_us = (round((end - begin) / sum(counts) * 1e6, 1) for begin, end in zip(before, after, strict=True))
    return {"server_us": server_us, "client_us": client_us}


if __name__ == "__main__":
    if sys.argv[1] == "server":
        uvloop.run(_serve())
    else:
        sys.stdout.write(json.dumps(uvloop.run(_read(sys.argv[2], int(sys.argv[3])))))
