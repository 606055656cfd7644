"""What the gateway believes of a service behind it by how its health answers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import Caller
from services.chassis.lifecycle import Readiness
from services.chassis.passport import Passport
from services.gateway import clients
from services.gateway.clients import Peer
from services.gateway.metrics import Metrics
from tests.integration.gateway.backends import KEY

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health_pb2_grpc.HealthServicer):
    """Says what it is told to, or nothing."""

    def __init__(self) -> None:
        self.says = {"": SERVING, "dependency.store": SERVING}
        self.silent = False

    async def List(self, request: Any, context: Any) -> Any:
        if self.silent:
            await asyncio.Event().wait()
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self.says.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Health, grpc.aio.Server, Peer]]:
    health, server = Health(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health, server, Peer("ledger", channel, Caller("ledger", Passport(KEY)), Metrics())
    await server.stop(0)


async def test_a_service_that_is_silent_once_stays_ready_with_what_it_said_before(
    server: tuple[Health, grpc.aio.Server, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence that lasts is no readiness, and the first answer is."""
    health, _, peer = server
    readiness = Readiness({"ledger": peer.probe})
    ready = [await readiness.ask()]
    with monkeypatch.context() as patched:
        patched.setattr(clients, "HEALTH_TIMEOUT_S", 0.1)
        health.silent = True
        ready += [await readiness.ask() for _ in range(3)]
    dependencies = dict(peer.dependencies)
    health.silent = False
    ready.append(await readiness.ask())

    assert [state["ledger"] for state in ready] == [True, True, True, False, True]
    assert dependencies == {"store": True}


async def test_a_service_that_says_no_or_is_gone_is_not_ready_at_once(server: tuple[Health, grpc.aio.Server, Peer]) -> None:
    health, process, peer = server
    readiness = Readiness({"ledger": peer.probe})
    ready = [await readiness.ask()]
    health.says = {"": NOT_SERVING, "dependency.store": NOT_SERVING}
    ready.append(await readiness.ask())
    said = dict(peer.dependencies)
    health.says = {"": SERVING}
    ready.append(await readiness.ask())
    await process.stop(0)
    ready.append(await readiness.ask())

    assert [state["ledger"] for state in ready] == [True, False, True, False]
    assert said == {"store": False}
