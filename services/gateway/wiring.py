"""How the gateway is put together: what is opened reads downwards, what is closed goes back up. No decision is made here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import redis.asyncio as redis

from services.chassis.lifecycle import Service
from services.chassis.passport import Passport
from services.chassis.server import Identify, Server
from services.gateway.app import Edge
from services.gateway.bridge import Timing
from services.gateway.browser import Browser
from services.gateway.clients import Backends, connected
from services.gateway.config import Settings
from services.gateway.http_listener import HttpListener
from services.gateway.identity import AllKeys, Identity, Keys, PublishedKeys, SharedSecret, Tokens, keys_at_url, keys_in_file
from services.gateway.kit import Kit
from services.gateway.limits import WINDOW_US, Limits
from services.gateway.metrics import Metrics
from services.gateway.page import Page
from services.gateway.redis_window import RedisWindow
from services.gateway.revocations import Revocations
from services.gateway.rpc import GatewayService, token_identity
from tailrace.gateway.v1 import gateway_service_pb2
from tailrace.gateway.v1.gateway_service_pb2_grpc import add_GatewayServiceServicer_to_server

# Its messages are those of other packages, so nothing else imports its own file; without that, reflection has nothing to show.
SERVICE_NAME = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name


class EdgeServer(Server):
    """Both fronts of the edge, which start and drain as one."""

    def __init__(self, identify: Identify, http: HttpListener, http_port: int, draining: asyncio.Event, *, reflect: bool) -> None:
        super().__init__(identify, reflect=reflect)
        self.http = http
        self._http_port = http_port
        self.draining = draining

    async def start(self, host: str, port: int) -> int:
        await self.http.start(host, self._http_port)
        return await super().start(host, port)

    async def stop(self, notice_s: float, grace_s: float) -> None:
        self.draining.set()
        await asyncio.gather(self._stop_http(notice_s, grace_s), super().stop(notice_s, grace_s))

    async def _stop_http(self, notice_s: float, grace_s: float) -> None:
        await asyncio.sleep(notice_s)
        await self.http.stop(grace_s)


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Service]:
    """The gateway. Nothing behind it needs to be there yet: readiness says what is missing."""
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        backends = await stack.enter_async_context(_backends(settings, metrics))
        # A pool that makes callers wait: one that refuses them in a rush would send them to the local limit instead.
        pool = redis.BlockingConnectionPool.from_url(
            settings.redis_url, max_connections=32, timeout=1.0, socket_timeout=1.0, socket_connect_timeout=1.0
        )
        store = redis.Redis.from_pool(pool)
        stack.push_async_callback(store.aclose)
        windows = RedisWindow(store, WINDOW_US)
        keys = await stack.enter_async_context(_keys(settings))
        tokens = Tokens(
            keys,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            leeway_s=settings.jwt_leeway_s,
            lifetime_max_s=settings.jwt_lifetime_max_s,
        )
        revocations = Revocations(store, lifetime_max_s=settings.jwt_lifetime_max_s, on_stale=metrics.revocations_stale.inc)
        await stack.enter_async_context(_running(revocations.watch(), "revocations"))
        identity = Identity(tokens, backends.ledger.resolve_api_key, revocations)
        kit = Kit(
            backends=backends,
            identity=identity,
            revocations=revocations,
            browser=Browser(secure=settings.environment == "production", origins=settings.allowed_origins),
            limits=Limits(
                windows, backends.ledger.requests_per_minute, settings.requests_per_minute_default, on_fallback=metrics.limits_local.inc
            ),
            metrics=metrics,
            timing=Timing(settings.heartbeat_s, settings.write_stall_s),
            answer_timeout_s=settings.answer_deadline_s,
            body_stall_s=settings.body_stall_s,
        )
        http = HttpListener(Edge(kit, Page()))
        reflect = settings.environment == "development"
        server = EdgeServer(token_identity(identity), http, settings.http_port, kit.draining, reflect=reflect)
        server.add(add_GatewayServiceServicer_to_server, GatewayService(kit), SERVICE_NAME)
        probes = {peer.name: peer.probe for peer in backends.all}
        yield Service(
            server=server,
            port=settings.grpc_port,
            probes={**probes, "redis": windows.ping, "jwks": keys.probe},
            ready=kit.readiness.update,
        )


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _backends(settings: Settings, metrics: Metrics) -> contextlib.AbstractAsyncContextManager[Backends]:
    targets = {
        "orchestrator": settings.orchestrator_target,
        "retrieval": settings.retrieval_target,
        "ledger": settings.ledger_target,
    }
    return connected(targets, Passport(settings.internal_key.get_secret_value().encode()), metrics)


@contextlib.asynccontextmanager
async def _keys(settings: Settings) -> AsyncIterator[Keys]:
    sources: list[Keys] = []
    if secret := settings.jwt_hs256_secret.get_secret_value():
        sources.append(SharedSecret(secret.encode()))
    if settings.jwks_file is not None:
        sources.append(PublishedKeys(keys_in_file(settings.jwks_file)))
    async with httpx.AsyncClient(timeout=5.0, follow_redirects=False) as client:
        if settings.jwks_url:
            sources.append(PublishedKeys(keys_at_url(client, settings.jwks_url)))
        yield AllKeys(sources)
