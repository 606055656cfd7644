"""How the gateway is put together: what is opened reads downwards, what is closed goes back up. No decision is made here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.chassis.ending import ended
from services.chassis.lifecycle import Service
from services.chassis.passport import Passport
from services.chassis.redis_pool import PatientPool
from services.chassis.server import Identify, Server
from services.chassis.tls import MutualTls
from services.gateway.app import OPERATIONS, PROBES, ROUTES, Edge
from services.gateway.bridge import Timing
from services.gateway.browser import Browser
from services.gateway.clients import Backends, connected
from services.gateway.config import Settings
from services.gateway.grpc_peers import GrpcPeers
from services.gateway.guesses import Guesses
from services.gateway.http_listener import HttpListener
from services.gateway.identity import FILE_PAUSE_S, AllKeys, Identity, Keys, PublishedKeys, SharedSecret, Tokens, keys_at_url, keys_in_file
from services.gateway.kit import Kit
from services.gateway.limits import Fallback, Limits, ReservedTokens
from services.gateway.metrics import Metrics
from services.gateway.page import Page
from services.gateway.places import Places
from services.gateway.redis_limiter import RedisLimiter
from services.gateway.redis_line import RedisLine
from services.gateway.revocations import Revocations
from services.gateway.rpc import SERVICE, GatewayService, token_identity
from services.gateway.shedding import LoopLag, Shedding
from tailrace.gateway.v1.gateway_service_pb2_grpc import add_GatewayServiceServicer_to_server

RESUMES_PER_USER_MAX = 200
"""Streams that a user may resume at the same time whose plan does not bound answers."""
WATCHES_PER_USER_MAX = 16
"""The page has two a window. The ledger has room for 500 of all users, and retrieval for 128."""
SOCKETS_PER_USER_MAX = 16
"""Each carries 16 answers, and may hold 24 MiB of what was asked."""
SETTLE_S = 3.0
"""How long the end waits for what streams leave to be settled."""


class EdgeServer(Server):
    """Both fronts of the edge, which start and drain as one."""

    def __init__(
        self,
        identify: Identify,
        http: HttpListener,
        http_port: int,
        operations: HttpListener | None,
        operations_port: int,
        draining: asyncio.Event,
        *,
        reflect: bool,
        tls: MutualTls | None,
        tells_dependencies: bool,
        connections_per_peer_max: int,
    ) -> None:
        # Callers from outside have no certificate of ours: their token says who they are.
        super().__init__(identify, reflect=reflect, tls=tls, verify_clients=False, tells_dependencies=tells_dependencies)
        self.http = http
        self._http_port = http_port
        self.operations = operations
        self._operations_port = operations_port
        self.draining = draining
        self._peers = GrpcPeers(connections_per_peer_max) if connections_per_peer_max else None
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        await self.http.start(host, self._http_port)
        if self.operations is not None:
            await self.operations.start(host, self._operations_port)
        await super().start(host, port)
        if self._peers is not None:
            self._sweeping = asyncio.create_task(self._peers.watch(self.port), name="grpc-sweep")
        return self.port

    async def stop(self, notice_s: float, grace_s: float) -> None:
        self.draining.set()
        await asyncio.gather(self._stop_http(notice_s, grace_s), super().stop(notice_s, grace_s))
        if self._sweeping is not None:
            await ended(self._sweeping)

    async def _stop_http(self, notice_s: float, grace_s: float) -> None:
        await asyncio.sleep(notice_s)
        await self.http.stop(grace_s)
        if self.operations is not None:
            await self.operations.stop(0)  # last: how it drains can be watched


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Service]:
    """The gateway. Nothing behind it needs to be there yet: readiness says what is missing."""
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        backends = await stack.enter_async_context(_backends(settings, metrics))
        pool = PatientPool.from_url(
            settings.redis_url,
            max_connections=32,
            timeout=1.0,
            socket_timeout=1.0,
            socket_connect_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
        )
        store = redis.Redis.from_pool(pool)
        stack.push_async_callback(store.aclose)
        line = RedisLine(redis.ConnectionPool.from_url(settings.redis_url, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)))
        stack.push_async_callback(line.aclose)
        limiter = RedisLimiter(line)
        limits = await stack.enter_async_context(_limits(settings, limiter, backends, metrics))
        lag = LoopLag()
        stack.callback(lag.stop)
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
        guesses = Guesses(by_source=settings.http_connections_per_peer_max > 0)
        identity = Identity(tokens, backends.ledger.resolve_api_key, revocations, guesses)
        kit = Kit(
            backends=backends,
            identity=identity,
            revocations=revocations,
            browser=Browser(secure=settings.is_https, origins=settings.allowed_origins),
            limits=limits,
            shedding=Shedding(
                settings.streams_max,
                settings.loop_lag_max_s,
                lambda: lag.seconds,
                lambda cause: metrics.shed.labels(cause).inc(),
                settings.preparing_max,
                settings.preparing_standing_max,
            ),
            resumes=Places("resumes", RESUMES_PER_USER_MAX),
            watches=Places("watches", WATCHES_PER_USER_MAX),
            sockets=Places("sockets", SOCKETS_PER_USER_MAX),
            metrics=metrics,
            timing=Timing(settings.heartbeat_s, settings.write_stall_s),
            answer_timeout_s=settings.answer_deadline_s,
            reserved_tokens=ReservedTokens(settings.prompt_tokens_reserved, settings.output_tokens_reserved),
            body_stall_s=settings.body_stall_s,
        )
        page, apart = Page(), bool(settings.operations_port) or settings.environment == "production"
        http = HttpListener(
            Edge(kit, page, (*ROUTES, *(PROBES if apart else OPERATIONS))),
            connections_per_peer_max=settings.http_connections_per_peer_max,
            certificate=settings.http_certificate,
        )
        operations = None
        if settings.operations_port:
            operations = HttpListener(Edge(kit, page, OPERATIONS), port_setting="TAILRACE_GATEWAY_OPERATIONS_PORT")
        reflect = settings.environment == "development"
        server = EdgeServer(
            token_identity(identity),
            http,
            settings.http_port,
            operations,
            settings.operations_port,
            kit.draining,
            reflect=reflect,
            tls=settings.mutual_tls(),
            tells_dependencies=not apart,
            connections_per_peer_max=settings.grpc_connections_per_peer_max,
        )
        server.add(add_GatewayServiceServicer_to_server, GatewayService(kit), SERVICE.full_name)
        probes = {peer.name: peer.probe for peer in backends.all}
        yield Service(
            server=server,
            port=settings.grpc_port,
            probes={**probes, "redis": limiter.ping, "jwks": keys.probe},
            ready=kit.readiness.update,
        )


@contextlib.asynccontextmanager
async def _limits(settings: Settings, limiter: RedisLimiter, backends: Backends, metrics: Metrics) -> AsyncIterator[Limits]:
    """The limits, whose leases are renewed meanwhile and whose corrections are sent before the end."""
    fallback = Fallback(settings.replicas, metrics.limits_local.inc, metrics.limits_away.set)
    limits = Limits(
        limiter,
        backends.ledger.entitlements,
        settings.requests_per_minute_default,
        fallback,
        booked=backends.ledger.ending_booked,
        detached_s=settings.detach_grace_s,
    )
    async with _running(limits.renew_forever(), "renew-leases"):
        yield limits
    await limits.drain(SETTLE_S)


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        await ended(task)


def _backends(settings: Settings, metrics: Metrics) -> contextlib.AbstractAsyncContextManager[Backends]:
    targets = {
        "orchestrator": settings.orchestrator_target,
        "retrieval": settings.retrieval_target,
        "ledger": settings.ledger_target,
    }
    return connected(targets, Passport(settings.internal_key.get_secret_value().encode()), metrics, settings.mutual_tls())


@contextlib.asynccontextmanager
async def _keys(settings: Settings) -> AsyncIterator[Keys]:
    secrets: list[Keys] = []
    if secret := settings.jwt_hs256_secret.get_secret_value():
        secrets.append(SharedSecret(secret.encode()))
    async with contextlib.AsyncExitStack() as stack:
        published = []
        if settings.jwks_file is not None:
            published.append(PublishedKeys(keys_in_file(settings.jwks_file), pause_s=FILE_PAUSE_S, refresh_s=settings.jwks_refresh_s))
        if settings.jwks_url:
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=5.0))
            read = keys_at_url(client, settings.jwks_url)
            published.append(PublishedKeys(read, pause_s=settings.jwks_pause_s, refresh_s=settings.jwks_refresh_s))
        for keys in published:
            stack.push_async_callback(keys.close)
        yield AllKeys([*secrets, *published])
