"""The edge as an ASGI application: every route with its rule on one screen, and what happens to a request before and after its endpoint.

One request: id and span, route, credential, rule, limit, endpoint; every error becomes one problem document.
"""

import contextlib
import functools
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote

import structlog
from opentelemetry.trace import SpanKind

from services.chassis import telemetry
from services.chassis.errors import DomainError, NotAllowed, NotFound, Overloaded
from services.chassis.principal import Principal, set_current
from services.chassis.status import unexpected
from services.gateway import admin, answers, documents, infrastructure, records, websocket
from services.gateway.exchange import ClientLeft, Exchange, Receive, Send
from services.gateway.identity import credential_in
from services.gateway.kit import Kit
from services.gateway.limits import LimitReached
from services.gateway.page import Page
from services.gateway.problems import MethodNotAllowed, status_of

log = structlog.get_logger(__name__)

Endpoint = Callable[[Exchange, Kit], Awaitable[None]]


class Rule(Enum):
    """Who may call a route."""

    OPEN = "anybody"
    MEMBER = "whoever has a role"
    LIMITED = "whoever has a role, within the plan's request limit"
    ANSWER = "whoever has a role, within all limits of the plan, which the endpoint asks, since it knows how much is wanted"
    ADMIN = "role admin"


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path; `{name}` stands for one segment."""

    method: str
    path: str
    rule: Rule
    endpoint: Endpoint


ROUTES = (
    Route("POST", "/v1/answers", Rule.ANSWER, answers.ask),
    Route("GET", "/v1/answers/{id}", Rule.MEMBER, answers.show),
    Route("GET", "/v1/answers/{id}/events", Rule.MEMBER, answers.resume),
    Route("POST", "/v1/answers/{id}/cancel", Rule.MEMBER, answers.cancel),
    Route("GET", "/v1/models", Rule.MEMBER, answers.models),
    Route("POST", "/v1/documents", Rule.LIMITED, documents.upload),
    Route("POST", "/v1/documents:bulk", Rule.LIMITED, documents.upload_lines),
    Route("GET", "/v1/documents", Rule.MEMBER, documents.listed),
    Route("GET", "/v1/documents/{id}", Rule.MEMBER, documents.show),
    Route("DELETE", "/v1/documents/{id}", Rule.MEMBER, documents.delete),
    Route("GET", "/v1/jobs/{id}", Rule.MEMBER, documents.job),
    Route("POST", "/v1/search", Rule.LIMITED, documents.search),
    Route("GET", "/v1/operations", Rule.MEMBER, records.operations),
    Route("GET", "/v1/operations:watch", Rule.MEMBER, records.watch),
    Route("GET", "/v1/operations/{id}", Rule.MEMBER, records.operation),
    Route("GET", "/v1/usage", Rule.MEMBER, records.usage),
    Route("GET", "/v1/sessions", Rule.MEMBER, records.sessions),
    Route("GET", "/v1/sessions/{id}", Rule.MEMBER, records.session),
    Route("GET", "/v1/infrastructure", Rule.MEMBER, infrastructure.infrastructure),
    Route("GET", "/v1/admin/plans", Rule.ADMIN, admin.plans),
    Route("POST", "/v1/admin/plans", Rule.ADMIN, admin.put_plan),
    Route("PUT", "/v1/admin/plans/{name}", Rule.ADMIN, admin.put_plan),
    Route("GET", "/v1/admin/subscriptions/{user}", Rule.ADMIN, admin.subscription),
    Route("PUT", "/v1/admin/subscriptions/{user}", Rule.ADMIN, admin.put_subscription),
    Route("DELETE", "/v1/admin/subscriptions/{user}", Rule.ADMIN, admin.delete_subscription),
    Route("GET", "/v1/admin/budgets/{scope}/{id}", Rule.ADMIN, admin.budgets),
    Route("PUT", "/v1/admin/budgets/{scope}/{id}", Rule.ADMIN, admin.put_budget),
    Route("DELETE", "/v1/admin/budgets/{scope}/{id}", Rule.ADMIN, admin.delete_budget),
    Route("GET", "/v1/admin/prices", Rule.ADMIN, admin.prices),
    Route("PUT", "/v1/admin/prices", Rule.ADMIN, admin.put_price),
    Route("POST", "/v1/admin/prices", Rule.ADMIN, admin.put_price),
    Route("GET", "/v1/admin/api-keys", Rule.ADMIN, admin.api_keys),
    Route("POST", "/v1/admin/api-keys", Rule.ADMIN, admin.create_api_key),
    Route("DELETE", "/v1/admin/api-keys/{id}", Rule.ADMIN, admin.revoke_api_key),
    Route("GET", "/v1/admin/users", Rule.ADMIN, admin.users),
    Route("POST", "/v1/admin/users", Rule.ADMIN, admin.put_user),
    Route("PUT", "/v1/admin/users/{user}", Rule.ADMIN, admin.put_user),
)
OPERATIONS = (
    Route("GET", "/healthz", Rule.OPEN, infrastructure.healthz),
    Route("GET", "/readyz", Rule.OPEN, infrastructure.readyz),
    Route("GET", "/metrics", Rule.OPEN, infrastructure.metrics),
)
"""What only operators need; strangers get `PROBES` instead."""
PROBES = (
    Route("GET", "/healthz", Rule.OPEN, infrastructure.healthz),
    Route("GET", "/readyz", Rule.OPEN, infrastructure.readyz_briefly),
)
SOCKETS = (Route("GET", "/v1/answers/ws", Rule.MEMBER, websocket.converse),)
"""Handshakes of WebSockets, with the rule of the handshake; each message follows the rule of its own route above."""

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
PARAM_BYTES_MAX = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


class Router:
    """Finds the route of a request by the segments of its path."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._by_length: dict[int, list[tuple[tuple[str, ...], Route]]] = {}
        for route in routes:
            segments = tuple(route.path.split("/"))
            self._by_length.setdefault(len(segments), []).append((segments, route))

    def find(self, method: str, raw_path: bytes) -> tuple[Route, dict[str, str]]:
        """The route and the values of its placeholders. Raises NotFound, MethodNotAllowed.

        The path is cut before it is decoded, so that an encoded slash stays inside its segment.
        """
        try:
            segments = [unquote(segment, errors="strict") for segment in raw_path.decode("ascii").split("/")]
        except UnicodeDecodeError:
            raise NotFound("there is nothing here", kind="route") from None
        others = set()
        for pattern, route in self._by_length.get(len(segments), ()):
            params = _match(pattern, segments)
            if params is None:
                continue
            # A HEAD is a GET whose body the server leaves out; of a stream it would be a silence without end.
            if route.method == ("GET" if method == "HEAD" and route.rule is Rule.OPEN else method):
                return route, params
            others.add(route.method)
        if others:
            raise MethodNotAllowed(f"{method[:16]} is not offered here", allow=", ".join(sorted(others)))
        raise NotFound("there is nothing here", kind="route")


def _match(pattern: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    params = {}
    for expected, segment in zip(pattern, segments, strict=True):
        if expected.startswith("{"):
            if not segment or len(segment.encode()) > PARAM_BYTES_MAX or "\0" in segment:
                return None
            params[expected[1:-1]] = segment
        elif expected != segment:
            return None
    return params


class Edge:
    """The application."""

    def __init__(self, kit: Kit, page: Page, routes: tuple[Route, ...] = (*ROUTES, *OPERATIONS)) -> None:
        self._kit = kit
        self._page = page
        self._router = Router(routes)
        self._sockets = Router(SOCKETS)
        self._hop = kit.metrics.hop("client", "gateway")

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        router = self._router
        if scope["type"] == "websocket":
            router = self._sockets
            scope, send = websocket.as_request(scope, send)
        began = time.perf_counter()
        set_current(None)  # a request on a kept connection may start in the context of the one before
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else secrets.token_hex(16)
        method, path = scope["method"], scope["path"]
        route: Route | None = None
        failure: DomainError | None = None
        params: dict[str, str] = {}
        if router is self._sockets or not (method in ("GET", "HEAD") and self._page.has(path)):
            try:
                route, params = router.find(method, scope["raw_path"])
            except DomainError as error:
                failure = error
        # Unknown paths share one name, so that no stranger decides how many names there are.
        name = route.path if route else "/" if failure is None else "unknown"
        method_name = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE") else "other"
        attributes = {telemetry.HTTP_METHOD: method_name, telemetry.HTTP_ROUTE: name}
        parent = telemetry.incoming(headers)
        self._hop.in_flight += 1
        exchange: Exchange | None = None
        try:
            with telemetry.span(f"{method_name} {name}", kind=SpanKind.SERVER, parent=parent, **attributes) as span:
                exchange = Exchange(scope, receive, send, request_id=request_id, body_stall_s=self._kit.body_stall_s)
                exchange.params = params
                exchange.admit = functools.partial(self._admit_as, exchange)
                exchange.extra_headers += [
                    *SECURITY_HEADERS,
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),
                    (b"x-trace-id", exchange.trace_id.encode()),
                ]
                await self._answer(exchange, route, path, failure)
                span.set_attribute(telemetry.HTTP_STATUS, exchange.status)
                if exchange.status >= 500:
                    span.set_attribute(telemetry.ERROR_TYPE, str(exchange.status))
        finally:
            elapsed_s = time.perf_counter() - began
            status = exchange.status if exchange else 0
            self._hop.in_flight -= 1
            self._hop.observe(elapsed_s * 1000, failed=status >= 500)
            self._kit.metrics.requests.labels(method_name, name, str(status or "left")).inc()
            self._kit.metrics.seconds.labels(method_name, name).observe(elapsed_s)

    async def _answer(self, exchange: Exchange, route: Route | None, path: str, failure: DomainError | None) -> None:
        """Run the endpoint; whatever goes wrong before the first byte becomes a problem document."""
        try:
            if failure is not None:
                raise failure
            if route is None:
                await self._page.serve(exchange, path)
                return
            # Turned away before anything is done for it: that is what makes it cheap.
            with self._kit.shedding.entered() if route.rule is Rule.ANSWER else contextlib.nullcontext():
                await self._admit(exchange, route.rule)
                await route.endpoint(exchange, self._kit)
        except ClientLeft:
            return
        except DomainError as error:
            await self._refuse(exchange, error)
        except Exception as error:
            log.exception("request_failed_unexpectedly", error=type(error).__name__, request_id=exchange.request_id)
            if exchange.status:
                raise  # the connection is cut: half a response must not look like a whole one
            await self._refuse(exchange, unexpected(exchange.trace_id))

    async def _admit(self, exchange: Exchange, rule: Rule) -> None:
        if rule is Rule.OPEN:
            return
        principal = await self._kit.identity.principal(credential_in(exchange.headers))
        permit(principal, rule)
        exchange.principal = principal
        set_current(principal)
        if rule is Rule.LIMITED:
            exchange.extra_headers += (await self._kit.limits.admit(principal)).headers

    async def _admit_as(self, exchange: Exchange, method: str, raw_path: bytes) -> None:
        """Admit what came in a message as if it had come over the route; the credential is looked at again, as it may have ended."""
        route, _ = self._router.find(method, raw_path)
        await self._admit(exchange, route.rule)
        exchange.extra_headers.clear()  # there is no response any more that could carry them

    async def _refuse(self, exchange: Exchange, error: DomainError) -> None:
        if exchange.status:
            log.error("failed_after_the_response_began", reason=error.reason, request_id=exchange.request_id)
            raise error
        self._kit.metrics.refusals.labels(error.reason or error.code).inc()
        # What is shed is counted: a line for each would be the very work that there is no time for.
        if status_of(error) >= 500 and not isinstance(error, Overloaded):
            log.warning("request_failed", reason=error.reason, request_id=exchange.request_id, **_dependency(error))
        await exchange.respond_problem(error, error.headers if isinstance(error, LimitReached) else ())


def permit(principal: Principal, rule: Rule) -> None:
    """Raise NotAllowed unless `principal` may call a route with `rule`."""
    if rule is Rule.ADMIN:
        principal.require("admin")
    elif not principal.roles:
        raise NotAllowed("a role is needed", needs="user")


def _dependency(error: DomainError) -> dict[str, str]:
    name = error.metadata.get("dependency")
    return {"dependency": name} if name else {}
