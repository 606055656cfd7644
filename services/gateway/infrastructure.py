"""The routes that tell how the suite is doing: liveness, readiness, metrics, and the live map of components and hops."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson

from services.gateway import sse
from services.gateway.bridge import Bridge
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit

INTERVAL_S = 2.0


async def healthz(exchange: Exchange, kit: Kit) -> None:
    """GET /healthz: the process runs."""
    await exchange.respond(200, b"ok\n", b"text/plain; charset=utf-8", [(b"cache-control", b"no-store")])


async def readyz(exchange: Exchange, kit: Kit) -> None:
    """GET /readyz: every dependency, and those of the services behind us."""
    ready = _is_ready(kit)
    services = {peer.name: {"ready": kit.readiness.get(peer.name, False), "dependencies": peer.dependencies} for peer in kit.backends.all}
    state = {"ready": ready, "draining": kit.draining.is_set(), "dependencies": kit.readiness, "services": services}
    await exchange.respond_json(state, 200 if ready else 503)


async def readyz_briefly(exchange: Exchange, kit: Kit) -> None:
    """GET /readyz for strangers: whether, and not why."""
    ready = _is_ready(kit)
    await exchange.respond_json({"ready": ready}, 200 if ready else 503)


async def metrics(exchange: Exchange, kit: Kit) -> None:
    """GET /metrics"""
    await exchange.respond(200, kit.metrics.exposition(), b"text/plain; version=0.0.4; charset=utf-8", [(b"cache-control", b"no-store")])


async def infrastructure(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/infrastructure"""
    exchange.query(())
    if not exchange.accepts("text/event-stream"):
        await exchange.respond_json(picture(kit))
        return

    async def pictures() -> AsyncIterator[dict[str, Any]]:
        while True:
            yield picture(kit)
            await asyncio.sleep(INTERVAL_S)

    bridge: Bridge[dict[str, Any]] = Bridge(exchange, _block, lambda _: False, kit.timing, kit.draining, lasting=True)
    with kit.watching(), kit.counted(bridge, "infrastructure"):
        await bridge.run(pictures())


def picture(kit: Kit) -> dict[str, Any]:
    """Every component with its readiness, and every way between two that was gone, with live figures."""
    stores: dict[str, bool] = {}
    for name, state in kit.readiness.items():
        if name not in {peer.name for peer in kit.backends.all}:
            stores[name] = state
    components = [{"name": "gateway", "kind": "service", "ready": _is_ready(kit), "needs": sorted(kit.readiness)}]
    for peer in kit.backends.all:
        ready = kit.readiness.get(peer.name, False)
        components.append({"name": peer.name, "kind": "service", "ready": ready, "needs": sorted(peer.dependencies)})
        for name, state in peer.dependencies.items():
            stores[name] = stores.get(name, True) and state
    known = {component["name"] for component in components}
    components += [{"name": name, "kind": "dependency", "ready": stores[name], "needs": []} for name in sorted(stores) if name not in known]
    hops = []
    for hop in kit.metrics.hops():
        p50, p95 = hop.percentiles()
        hops.append(
            {
                "from": hop.source,
                "to": hop.target,
                "requests": hop.requests,
                "errors": hop.errors,
                "in_flight": hop.in_flight,
                "p50_ms": None if p50 is None else round(p50, 3),
                "p95_ms": None if p95 is None else round(p95, 3),
            }
        )
    return {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "ready": _is_ready(kit), "components": components, "hops": hops}


def _is_ready(kit: Kit) -> bool:
    return bool(kit.readiness) and all(kit.readiness.values()) and not kit.draining.is_set()


def _block(value: dict[str, Any]) -> bytes:
    return sse.block(orjson.dumps(value), event=b"infrastructure")
