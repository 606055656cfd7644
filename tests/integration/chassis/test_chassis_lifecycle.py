"""A whole process: how it starts, turns ready, drains and exits."""

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.local.stores import free_port

SERVICE = textwrap.dedent("""
    import asyncio, contextlib, os, pathlib, sys
    from services.chassis.config import ServiceSettings
    from services.chassis.lifecycle import Service, run
    from services.chassis.server import Server, nobody

    @contextlib.asynccontextmanager
    async def build(settings):
        server = Server(nobody, reflect=False)
        flag = pathlib.Path(os.environ["FLAG"])

        async def probe():
            flag.read_text()

        async def drain(timeout_s):
            print("drained", flush=True)
            return int(os.environ.get("ABANDON", "0"))

        yield Service(server, int(os.environ["PORT"]), {"flag": probe}, drain)
        print("closed", flush=True)

    run("example", ServiceSettings, build)
""")


@asynccontextmanager
async def process(tmp_path: Path, port: int, *arguments: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {
        **os.environ,
        "TAILRACE_INTERNAL_KEY": "a-key-of-enough-length",
        "PORT": str(port),
        "FLAG": str(tmp_path / "flag"),
        **environ,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, *arguments, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def until(stub: health_pb2_grpc.HealthStub, status: int) -> None:
    """Watch overall health until it is `status`."""
    async with asyncio.timeout(15):
        async for update in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
            if update.status == status:
                return


async def test_readiness_follows_the_dependency_and_a_stop_signal_drains(tmp_path: Path) -> None:
    """Not ready until the dependency answers, not ready again when it goes, exit 0 after drain and close."""
    port, flag = free_port(), tmp_path / "flag"
    async with process(tmp_path, port) as child, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await until(stub, health_pb2.HealthCheckResponse.NOT_SERVING)
        flag.write_text("here")
        await until(stub, health_pb2.HealthCheckResponse.SERVING)
        flag.unlink()
        await until(stub, health_pb2.HealthCheckResponse.NOT_SERVING)
        child.send_signal(signal.SIGTERM)
        out, _ = await asyncio.wait_for(child.communicate(), 15)

    assert (child.returncode, out.split()) == (0, [b"drained", b"closed"])


async def test_abandoned_work_shows_in_the_exit_code(tmp_path: Path) -> None:
    """Exit 1 says that something was lost on the way down."""
    port = free_port()
    async with process(tmp_path, port, ABANDON="1") as child, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await until(health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckResponse.NOT_SERVING)
        child.send_signal(signal.SIGINT)
        await asyncio.wait_for(child.communicate(), 15)

    assert child.returncode == 1


async def test_check_config_prints_masked_settings_and_exits(tmp_path: Path) -> None:
    """Nothing is started and no secret is shown."""
    async with process(tmp_path, 0, "--check-config") as child:
        out, _ = await asyncio.wait_for(child.communicate(), 15)

    assert child.returncode == 0
    assert b"TAILRACE_INTERNAL_KEY=****" in out
    assert b"a-key-of-enough-length" not in out


async def test_wrong_settings_are_listed_and_nothing_starts(tmp_path: Path) -> None:
    """Every mistake on its own line, exit code not 0."""
    async with process(tmp_path, 0, TAILRACE_INTERNAL_KEY="short", TAILRACE_LOG_LEVEL="loud") as child:
        _, err = await asyncio.wait_for(child.communicate(), 15)

    assert child.returncode == 1
    assert b"TAILRACE_INTERNAL_KEY" in err
    assert b"TAILRACE_LOG_LEVEL" in err


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """The process ends with the port in its last words."""
    port = free_port()
    async with process(tmp_path, port) as first, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await until(health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckResponse.NOT_SERVING)
        async with process(tmp_path, port) as second:
            _, err = await asyncio.wait_for(second.communicate(), 15)
        assert first.returncode is None

    assert second.returncode == 1
    assert str(port).encode() in err
