"""The four services as child processes, and how each says that it is ready. What they do is not known here."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.tls import MutualTls
from services.local.child import Child

PROBE_TIMEOUT_S = 1.0
NICENESS = 10
"""Of what works behind the gateway. On a machine they share, whoever is turned away must hear so at once, and what was made must flow,
while the rest prepares as many answers as the processors can."""
Probe = Callable[[], Coroutine[Any, Any, bool]]


class ServiceProcess(Child):
    """`python -m services.<name>`, or another command that behaves like one."""

    # A service drains running answers first; the launcher sets its drain time to less than this.
    stop_timeout_s: ClassVar[float] = 15.0
    # Retrieval makes its model file once, at its first start.
    ready_timeout_s: ClassVar[float] = 120.0

    def __init__(
        self, name: str, environ: Callable[[], Mapping[str, str]], log: Path, probe: Probe, command: list[str] | None = None
    ) -> None:
        """`environ` is asked at each start: stores' addresses are known only once they run."""
        super().__init__(name, log)
        self._environ, self._probe = environ, probe
        self._command = command or [sys.executable, "-m", f"services.{name}"]
        self.niceness = niceness_of(name)

    async def start(self) -> None:
        await self._spawn(self._command, env=dict(self._environ()))
        await self.until_ready()

    async def answers(self) -> bool:
        return await self._probe()


def niceness_of(service: str) -> int:
    """How far this service stands back."""
    return 0 if service == "gateway" else NICENESS


def grpc_health(target: str, tls: MutualTls | None = None) -> Probe:
    """Asks the standard health service at `target`."""

    async def probe() -> bool:
        async with grpc.aio.secure_channel(target, tls.channel_credentials()) if tls else grpc.aio.insecure_channel(target) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
            try:
                response = await call
            except grpc.aio.AioRpcError:
                return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def http_ready(host: str, port: int) -> Probe:
    """Asks for /readyz. A 200 is ready."""

    async def probe() -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(f"GET /readyz HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
                    status = await reader.readline()
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, TimeoutError):
            return False
        return status.split(b" ")[1:2] == [b"200"]

    return probe
