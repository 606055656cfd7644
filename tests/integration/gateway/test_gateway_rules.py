"""Who may call what: every route and every RPC of the edge, by every kind of caller, through the real gateway."""

import contextlib
import re
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message_factory import GetMessageClass

from services.chassis.principal import SCOPES, Principal
from services.gateway import infrastructure, rpc
from services.gateway.app import OPERATIONS, PROBES, ROUTES, SOCKETS, Route
from services.gateway.limiter import Kind
from services.gateway.rules import ADMIN, ROUTE_RULES, RPC_RULES, Rule
from tailrace.gateway.v1 import gateway_service_pb2
from tailrace.gateway.v1.gateway_service_pb2_grpc import GatewayServiceStub
from tests.fakes.api_keys import key_named
from tests.integration.gateway.backends import ANSWER, accepted, done
from tests.integration.gateway.conftest import Front, problem_of, unique_user

VALUES = {"{id}": "x", "{scope}": "user", "{user}": "ada", "{name}": "free", "{kind}": "users"}
METHODS = list(gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods)
ROLES: dict[str, frozenset[str]] = {
    "user": frozenset({"user"}),
    "service": frozenset({"service"}),
    "admin": frozenset({"user", "admin"}),
}
CALLERS = [*((role, frozenset[str]()) for role in ROLES), *(("admin", frozenset({scope})) for scope in sorted(SCOPES))]


def concrete(path: str) -> str:
    for name, value in VALUES.items():
        path = path.replace(name, value)
    return path


def key_of(front: Front, role: str, scopes: frozenset[str]) -> dict[str, str]:
    """The header of an API key with a role, narrowed to scopes."""
    secret = key_named(f"{role} {sorted(scopes)}")
    front.behind.ledger.keys[secret] = Principal("acme", "robot", ROLES[role], "k-1", scopes)
    return {"x-api-key": secret}


def may(rule: Rule, role: str, scopes: frozenset[str]) -> bool:
    """The rule in other words."""
    return (not rule.role or rule.role in ROLES[role]) and (not scopes or not rule.scope or rule.scope in scopes)


def reached(front: Front, role: str, scopes: frozenset[str]) -> bool:
    """Whether a caller got through to anything. A call of the caller before, who did not wait for its end, may still be on its way."""
    return any(
        name not in ("ResolveApiKey", "GetEntitlements") and (caller.roles, caller.scopes) == (ROLES[role], scopes)
        for name, _, caller in front.behind.seen.calls
    )


def test_the_table_names_exactly_what_is_served() -> None:
    """A route or RPC without a rule, or a rule without either, is a mistake."""
    assert set(ROUTE_RULES) == {f"{route.method} {route.path}" for route in (*ROUTES, *OPERATIONS, *PROBES, *SOCKETS)}
    assert set(RPC_RULES) == {method.name for method in METHODS}


def test_a_route_or_rpc_without_a_rule_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not found out by the first who calls."""
    with pytest.raises(KeyError):
        Route("GET", "/v1/forgotten", infrastructure.healthz)
    monkeypatch.delitem(RPC_RULES, "QueryUsage")
    with pytest.raises(KeyError):
        rpc.rules_of(rpc.SERVICE)


def test_only_health_and_signing_in_are_open_and_everything_that_costs_is_limited() -> None:
    """The table, said once more by hand."""
    opened = {name for name, rule in ROUTE_RULES.items() if rule.open}
    assert opened == {"GET /healthz", "GET /readyz", "GET /metrics", "POST /v1/session", "DELETE /v1/session"}
    limited = {name for name, rule in ROUTE_RULES.items() if rule.limited}
    assert limited == {"POST /v1/documents", "POST /v1/documents:bulk", "POST /v1/search"}
    assert {name for name, rule in RPC_RULES.items() if rule.limited} == {"Search", "IngestDocuments"}
    assert [name for name, rule in (ROUTE_RULES | RPC_RULES).items() if rule.answers] == ["POST /v1/answers", "Answer"]
    assert {rule for name, rule in ROUTE_RULES.items() if " /v1/admin/" in name} == {ADMIN}
    assert {rule.scope for rule in (*ROUTE_RULES.values(), *RPC_RULES.values())} - {""} == SCOPES
    assert not any(rule.open for rule in RPC_RULES.values())


@pytest.mark.parametrize("route", [route for route in ROUTES if not route.rule.open], ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_asks_every_caller_for_what_its_rule_says(front: Front, route: Any) -> None:
    """Without a credential 401; without the role, or with a key for something else, 403, and nothing behind is asked."""
    async with httpx.AsyncClient(base_url=front.url, trust_env=False) as client, front.client(roles=()) as roleless:
        problem_of(await client.request(route.method, concrete(route.path)), 401, "NOT_AUTHENTICATED")
        problem_of(await roleless.request(route.method, concrete(route.path)), 403, "NOT_ALLOWED")
        for role, scopes in CALLERS:
            headers = key_of(front, role, scopes)
            front.behind.seen.calls.clear()
            async with client.stream(route.method, concrete(route.path), headers=headers) as response:
                allowed = response.status_code not in (401, 403)
            assert allowed == may(route.rule, role, scopes), (role, scopes, response.status_code)
            assert allowed or not reached(front, role, scopes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_every_rpc_asks_every_caller_for_what_its_rule_says(front: Front, method: Any) -> None:
    """The same over gRPC."""
    front.behind.orchestrator.script = front.behind.orchestrator.resumed = [accepted(), done(2)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        call, request = getattr(GatewayServiceStub(channel), method.name), request_of(method)

        async def code(metadata: Any) -> grpc.StatusCode:
            made = call(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=10)
            try:
                if method.server_streaming:
                    async for _ in made:
                        pass
                else:
                    await made
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert await code(()) is grpc.StatusCode.UNAUTHENTICATED
        assert await code((("authorization", f"Bearer {front.token(roles=())}"),)) is grpc.StatusCode.PERMISSION_DENIED
        for role, scopes in CALLERS:
            metadata = tuple(key_of(front, role, scopes).items())
            front.behind.seen.calls.clear()
            refused = await code(metadata) is grpc.StatusCode.PERMISSION_DENIED
            assert refused != may(RPC_RULES[method.name], role, scopes), (role, scopes)
            assert not (refused and reached(front, role, scopes))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_every_rpc_ends_with_its_ids_and_with_the_limits_that_were_asked(front: Front, method: Any) -> None:
    """As responses over HTTP begin with them; also what is refused, by whom- or whatever."""
    front.behind.orchestrator.script = front.behind.orchestrator.resumed = [accepted(), done(2)]
    token = front.token(unique_user(), roles=("user", "admin"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        call = getattr(GatewayServiceStub(channel), method.name)

        async def ending(request: Any, *metadata: tuple[str, str]) -> dict[str, Any]:
            made = call(iter([request]) if method.client_streaming else request, metadata=metadata, timeout=10)
            with contextlib.suppress(grpc.aio.AioRpcError):
                if method.server_streaming:
                    async for _ in made:
                        pass
            assert await made.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            return dict(await made.trailing_metadata())

        refused = await ending(request_of(method), ("x-request-id", "mine-1"))
        good = await ending(request_of(method), ("authorization", f"Bearer {token}"), ("x-request-id", "not fit for a log"))
        front.behind.ledger.requests_per_minute = 1
        async with front.client(unique_user()) as limited:
            token = limited.headers["authorization"].removeprefix("Bearer ")
            await limited.post("/v1/search", json={"query": "q"})
            over = await ending(request_of(method), ("authorization", f"Bearer {token}"))

    for told in (refused, good, over):
        assert told["x-request-id"] == told["request-id"]
        assert "x-trace-id" in told
    assert refused["x-request-id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", good["x-request-id"])
    rule = RPC_RULES[method.name]
    if rule.limited or rule.answers:
        assert int(good["x-ratelimit-remaining-requests"]) == 999_999
        assert (over["x-ratelimit-limit-requests"], over["x-ratelimit-remaining-requests"]) == ("1", "0")
        assert "grpc-status-details-bin" in over


async def test_everything_that_somebody_asks_for_counts_and_is_refused_beyond_its_limit(front: Front) -> None:
    """Ten reads for each request of the plan, over both fronts; what is refused reaches nothing behind the gateway."""
    front.behind.ledger.requests_per_minute = 1
    used_up: dict[Kind, str] = {}
    for kind, times, path in ((Kind.READS, 10, "/v1/session"), (Kind.REQUESTS, 1, "/v1/search")):
        used_up[kind] = front.token(unique_user(), roles=("user", "admin"))
        async with httpx.AsyncClient(base_url=front.url, headers=bearer(used_up[kind]), trust_env=False) as client:
            for left in reversed(range(times)):
                response = await (client.get(path) if kind is Kind.READS else client.post(path, json={"query": "q"}))
                assert (response.status_code, response.headers[f"x-ratelimit-remaining-{kind}"]) == (200, str(left))
    front.behind.seen.calls.clear()
    refused = {}

    async with httpx.AsyncClient(base_url=front.url, trust_env=False) as client:
        for route in (*ROUTES, *SOCKETS):
            if not route.rule.open:
                token = used_up[route.rule.counts or Kind.REQUESTS]
                asked = {"question": "?"} if route.rule.answers else None
                response = await client.request(route.method, concrete(route.path), json=asked, headers=bearer(token) | upgrade(route))
                refused[f"{route.method} {route.path}"] = problem_of(response, 429, "RATE_LIMITED")["limit_kind"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.grpc_port}") as channel:
        for method in METHODS:
            token = used_up[RPC_RULES[method.name].counts or Kind.REQUESTS]
            request = request_of(method)
            made = getattr(GatewayServiceStub(channel), method.name)(
                iter([request]) if method.client_streaming else request, metadata=tuple(bearer(token).items()), timeout=10
            )
            assert await made.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            refused[method.name] = dict(await made.trailing_metadata()).keys() & {f"x-ratelimit-limit-{kind}" for kind in Kind}

    assert {name for name, _, _ in front.behind.seen.calls} <= {"GetEntitlements"}
    expected = {name: rule.counts or Kind.REQUESTS for name, rule in ROUTE_RULES.items() if not rule.open}
    assert refused == expected | {name: {f"x-ratelimit-limit-{rule.counts or Kind.REQUESTS}"} for name, rule in RPC_RULES.items()}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def upgrade(route: Any) -> dict[str, str]:
    """What makes a request the handshake that a socket's route wants."""
    if route not in SOCKETS:
        return {}
    return {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}


def request_of(method: Any) -> Any:
    """An empty request, but for the id of what is there."""
    request = GetMessageClass(method.input_type)()
    for name in ("answer_id", "operation_id"):
        if name in method.input_type.fields_by_name:
            setattr(request, name, ANSWER)
    return request


async def test_a_key_that_is_made_carries_its_scopes(front: Front, admin: httpx.AsyncClient) -> None:
    """From the body to the ledger, by the words of the contract alone."""
    body = {"name": "bot", "user": "robot", "roles": ["user"], "scopes": ["search", "documents:read"]}
    made = await admin.post("/v1/admin/api-keys", json=body)
    wrong = await admin.post("/v1/admin/api-keys", json={**body, "scopes": ["everything"]})

    assert made.status_code == 201
    request, _ = front.behind.seen.last("CreateApiKey")
    assert list(request.scopes) == ["search", "documents:read"]
    assert problem_of(wrong, 400, "REQUEST_INVALID")["field"].startswith("scopes")


async def test_a_narrowed_principal_reaches_the_services_as_narrow_as_it_came(front: Front) -> None:
    """The signed principal names the scopes."""
    async with httpx.AsyncClient(base_url=front.url, headers=key_of(front, "user", frozenset({"search"})), trust_env=False) as client:
        assert (await client.post("/v1/search", json={"query": "q"})).status_code == 200

    assert front.behind.seen.last("Search")[1].scopes == frozenset({"search"})
