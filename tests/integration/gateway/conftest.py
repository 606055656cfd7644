"""A whole gateway in this process, in front of scripted services and a real Valkey."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.chassis.lifecycle import started
from services.gateway.config import Settings
from services.gateway.wiring import EdgeServer, build
from services.local.issuer import Issuer
from services.local.stores import Valkey
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tests.integration.gateway.backends import ANSWER, KEY, Behind, running_behind


@dataclass
class Front:
    """The gateway under test and what is behind it."""

    behind: Behind
    issuer: Issuer
    http_port: int
    grpc_port: int
    jwks: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def token(self, user: str = "ada", tenant: str = "acme", roles: tuple[str, ...] = ("user",)) -> str:
        return self.issuer.mint(user, tenant, roles)

    def client(self, user: str = "ada", tenant: str = "acme", roles: tuple[str, ...] = ("user",)) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.token(user, tenant, roles)}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, timeout=10)


def settings_for(behind: Behind, state_dir: Path, redis_url: str, **environment: str) -> Settings:
    """Settings of a gateway on free ports in front of `behind`."""
    targets = {f"TAILRACE_{name.upper()}_TARGET": f"127.0.0.1:{port}" for name, port in behind.ports.items()}
    fixed = {
        "TAILRACE_INTERNAL_KEY": KEY.decode(),
        "TAILRACE_STATE_DIR": str(state_dir),
        "TAILRACE_HTTP_PORT": "0",
        "TAILRACE_GATEWAY_PORT": "0",
        "REDIS_URL": redis_url,
    }
    return Settings.load({**fixed, **targets, **environment})


@pytest.fixture(scope="session")
async def shared_front(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    """One gateway for all tests of this folder."""
    state_dir = tmp_path_factory.mktemp("gateway")
    issuer = Issuer(state_dir)
    async with running_behind() as behind:
        # This loop stands still between two tests, which looks like lag.
        timing = {"TAILRACE_HEARTBEAT_S": "0.2", "TAILRACE_BODY_STALL_S": "0.5", "TAILRACE_GATEWAY_LOOP_LAG_MAX_S": "60"}
        settings = settings_for(behind, state_dir, valkey.url, **timing)
        async with build(settings) as service, started(service, "127.0.0.1") as grpc_port:
            assert isinstance(service.server, EdgeServer)
            yield Front(behind, issuer, service.server.http.port, grpc_port, state_dir / "dev-jwks.json")
            await service.server.stop(0, 0.2)


@pytest.fixture
def front(shared_front: Front) -> Front:
    """The gateway, with everything behind it forgotten."""
    behind = shared_front.behind
    behind.seen.calls.clear()
    behind.seen.cancelled.clear()
    behind.ledger.tells_operations.set()
    behind.orchestrator.script, behind.orchestrator.resumed = [], []
    behind.retrieval.hits, behind.retrieval.documents, behind.retrieval.broken_off = [], [], 0
    behind.ledger.watched, behind.ledger.usage, behind.ledger.keys = [], [], {}
    behind.ledger.requests_per_minute = 1_000_000
    behind.ledger.plan.Clear()
    behind.ledger.booked = ledger.Operation(operation_id=ANSWER, cost_nanousd=7_500_000)
    return shared_front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """A user of the tenant acme."""
    async with front.client() as http:
        yield http


@pytest.fixture
async def admin(front: Front) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator of the tenant acme."""
    async with front.client("root", roles=("user", "admin")) as http:
        yield http


def problem_of(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """The problem document of `response`; fails unless it is exactly that."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["reason"]) == (status, reason)
    assert problem["request_id"] == response.headers["x-request-id"] == response.headers["request-id"]
    assert problem["trace_id"] == response.headers["x-trace-id"]
    return problem


async def until(probe: Callable[[], Awaitable[Any]], timeout_s: float = 10.0) -> Any:
    """What `probe` finds, as soon as it finds something true."""
    async with asyncio.timeout(timeout_s):
        while True:
            if found := await probe():
                return found
            await asyncio.sleep(0.01)


def unique_user() -> str:
    """A user nobody has counted yet."""
    return f"user-{time.monotonic_ns()}"
