"""The edge as an ASGI application: every route on one screen, and what happens to a request before and after its endpoint.

One request: id and span, route, credential, rule, limit, endpoint; every error becomes one problem document.
"""

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import structlog
from opentelemetry.trace import SpanKind

from services.chassis import telemetry
from services.chassis.deadline import current_deadline
from services.chassis.errors import DomainError, NotFound, Overloaded, Unavailable
from services.chassis.principal import set_current
from services.chassis.status import unexpected
from services.gateway import admin, answers, conversations, deadlines, documents, infrastructure, records, sessions, websocket
from services.gateway.browser import API_POLICY, is_preflight
from services.gateway.exchange import ClientLeft, Exchange, Receive, Send
from services.gateway.identity import credential_in, has_credential
from services.gateway.kit import Kit
from services.gateway.limits import LimitReached
from services.gateway.page import Page
from services.gateway.problems import MethodNotAllowed, status_of
from services.gateway.rules import ROUTE_RULES, Rule

log = structlog.get_logger(__name__)

Endpoint = Callable[[Exchange, Kit], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path; `{name}` stands for one segment."""

    method: str
    path: str
    endpoint: Endpoint
    rule: Rule = field(init=False)
    """Who may call it. A route that the table does not have cannot be made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", ROUTE_RULES[f"{self.method} {self.path}"])


ROUTES = (
    Route("POST", "/v1/answers", answers.ask),
    Route("GET", "/v1/answers/{id}", answers.show),
    Route("GET", "/v1/answers/{id}/events", answers.resume),
    Route("POST", "/v1/answers/{id}/cancel", answers.cancel),
    Route("POST", "/v1/answers/{id}/tool-calls/{call_id}", answers.confirm),
    Route("GET", "/v1/answers/{id}/prompts", answers.prompts),
    Route("GET", "/v1/models", answers.models),
    Route("POST", "/v1/documents", documents.upload),
    Route("POST", "/v1/documents:bulk", documents.upload_lines),
    Route("GET", "/v1/documents", documents.listed),
    Route("GET", "/v1/collections", documents.collections),
    Route("GET", "/v1/documents/{id}", documents.show),
    Route("DELETE", "/v1/documents/{id}", documents.delete),
    Route("GET", "/v1/jobs", documents.jobs),
    Route("GET", "/v1/jobs/{id}", documents.job),
    Route("POST", "/v1/jobs/{id}/cancel", documents.cancel_job),
    Route("POST", "/v1/jobs/{id}/retry", documents.retry_job),
    Route("POST", "/v1/search", documents.search),
    Route("GET", "/v1/operations", records.operations),
    Route("GET", "/v1/operations:watch", records.watch),
    Route("GET", "/v1/operations/{id}", records.operation),
    Route("GET", "/v1/usage", records.usage),
    Route("GET", "/v1/sessions", conversations.listed),
    Route("GET", "/v1/sessions:export", conversations.export_all),
    Route("GET", "/v1/sessions/{id}", conversations.show),
    Route("PATCH", "/v1/sessions/{id}", conversations.update),
    Route("DELETE", "/v1/sessions/{id}", conversations.delete),
    Route("GET", "/v1/sessions/{id}/export", conversations.export),
    Route("GET", "/v1/infrastructure", infrastructure.infrastructure),
    Route("POST", "/v1/session", sessions.open_session),
    Route("GET", "/v1/session", sessions.show),
    Route("DELETE", "/v1/session", sessions.close),
    Route("GET", "/v1/admin/plans", admin.plans),
    Route("POST", "/v1/admin/plans", admin.put_plan),
    Route("PUT", "/v1/admin/plans/{name}", admin.put_plan),
    Route("GET", "/v1/admin/subscriptions/{user}", admin.subscription),
    Route("PUT", "/v1/admin/subscriptions/{user}", admin.put_subscription),
    Route("DELETE", "/v1/admin/subscriptions/{user}", admin.delete_subscription),
    Route("GET", "/v1/admin/budgets/{scope}/{id}", admin.budgets),
    Route("PUT", "/v1/admin/budgets/{scope}/{id}", admin.put_budget),
    Route("DELETE", "/v1/admin/budgets/{scope}/{id}", admin.delete_budget),
    Route("GET", "/v1/admin/prices", admin.prices),
    Route("PUT", "/v1/admin/prices", admin.put_price),
    Route("POST", "/v1/admin/prices", admin.put_price),
    Route("GET", "/v1/admin/api-keys", admin.api_keys),
    Route("POST", "/v1/admin/api-keys", admin.create_api_key),
    Route("DELETE", "/v1/admin/api-keys/{id}", admin.revoke_api_key),
    Route("POST", "/v1/admin/revocations", admin.revoke),
    Route("DELETE", "/v1/admin/revocations/{kind}/{id}", admin.restore),
    Route("GET", "/v1/admin/users", admin.users),
    Route("POST", "/v1/admin/users", admin.put_user),
    Route("PUT", "/v1/admin/users/{user}", admin.put_user),
    Route("DELETE", "/v1/admin/users/{user}", admin.erase_user),
    Route("GET", "/v1/admin/users/{user}/export", admin.export_user),
)
OPERATIONS = (
    Route("GET", "/healthz", infrastructure.healthz),
    Route("GET", "/readyz", infrastructure.readyz),
    Route("GET", "/metrics", infrastructure.metrics),
)
"""What only operators need; strangers get `PROBES` instead."""
PROBES = (
    Route("GET", "/healthz", infrastructure.healthz),
    Route("GET", "/readyz", infrastructure.readyz_briefly),
)
SOCKETS = (Route("GET", "/v1/answers/ws", websocket.converse),)
"""Handshakes of WebSockets, with the rule of the handshake; each message follows the rule of its own route above."""

PARAM_BYTES_MAX = 256
_TIMED_OTHERWISE = (answers.ask, answers.resume, websocket.converse)
"""An answer's time is the orchestrator's to keep, which ends it by a typed error; who reads one again has no say in it."""
GOODBYE_S = 0.5
"""How long the end of the process waits for a client to take the word that it is."""


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
            if route.method == ("GET" if method == "HEAD" and route.rule.open else method):
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
        current_deadline.set(None)
        exchange = Exchange(scope, receive, send, body_stall_s=self._kit.body_stall_s, write_stall_s=self._kit.timing.write_stall_s)
        method, path = exchange.method, scope["path"]
        route: Route | None = None
        failure: DomainError | None = None
        if router is self._sockets or not (method in ("GET", "HEAD") and self._page.has(path)):
            try:
                route, exchange.params = router.find(method, scope["raw_path"])
            except DomainError as error:
                failure = error
        exchange.extra_headers += [*self._kit.browser.security_headers, *self._kit.browser.cross_origin_headers(exchange.headers)]
        if route is not None or failure is not None:
            exchange.extra_headers.append(API_POLICY)
        # Unknown paths share one name, so that no stranger decides how many names there are.
        name = route.path if route else "/" if failure is None else "unknown"
        method_name = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE") else "other"
        self._hop.in_flight += 1
        try:
            if route is not None and route.rule.answers and (full := self._kit.shedding.full()):
                await self._turn_away(exchange, full)
            else:
                await self._traced(exchange, route, failure, path, method_name, name)
        finally:
            elapsed_s = time.perf_counter() - began
            self._hop.in_flight -= 1
            self._hop.observe(elapsed_s * 1000, failed=exchange.status >= 500)
            self._kit.metrics.requests.labels(method_name, name, str(exchange.status or "left")).inc()
            self._kit.metrics.seconds.labels(method_name, name).observe(elapsed_s)

    async def _turn_away(self, exchange: Exchange, error: Overloaded) -> None:
        """Refuse before anything is done: that is what makes it cheap. It has a trace's id to be named by, but no span: who has no time
        for an answer has none to record that."""
        exchange.tell_ids(telemetry.trace_id_in(exchange.headers) or secrets.token_hex(16))
        await self._refuse(exchange, error)

    async def _traced(
        self, exchange: Exchange, route: Route | None, failure: DomainError | None, path: str, method_name: str, name: str
    ) -> None:
        attributes: dict[str, Any] = {telemetry.HTTP_METHOD: method_name, telemetry.HTTP_ROUTE: name}
        parent = telemetry.incoming(exchange.headers)
        with telemetry.span(f"{method_name} {name}", kind=SpanKind.SERVER, parent=parent, **attributes) as span:
            exchange.tell_ids(telemetry.current_trace_id())
            exchange.admit = functools.partial(self._admit_as, exchange)
            await self._answer(exchange, route, path, failure)
            span.set_attribute(telemetry.HTTP_STATUS, exchange.status)
            if exchange.status >= 500:
                span.set_attribute(telemetry.ERROR_TYPE, str(exchange.status))

    async def _answer(self, exchange: Exchange, route: Route | None, path: str, failure: DomainError | None) -> None:
        """Run the endpoint; whatever goes wrong before the first byte becomes a problem document."""
        try:
            if failure is not None:
                if isinstance(failure, MethodNotAllowed) and is_preflight(exchange.method, exchange.headers):
                    methods = failure.metadata["allow"].split(", ")
                    await exchange.respond(204, b"", b"", self._kit.browser.preflight_headers(exchange.headers, methods))
                    return
                raise failure
            if route is None:
                await self._page.serve(exchange, path)
                return
            # Turned away before anything is done for it: that is what makes it cheap.
            with self._kit.shedding.entered() if route.rule.answers else contextlib.nullcontext() as prepared:
                exchange.prepared = prepared or exchange.prepared
                await self._admit(exchange, route.rule)
                if route.endpoint not in _TIMED_OTHERWISE:
                    current_deadline.set(deadlines.requested(exchange.header("request-timeout"), exchange.arrived_at_s))
                await route.endpoint(exchange, self._kit)
        except ClientLeft:
            return
        except asyncio.CancelledError:  # only the process's own end cancels a request: who has heard nothing yet is told to come back
            if not exchange.status:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(GOODBYE_S):
                        await self._refuse(exchange, Unavailable("the server is stopping; ask again", dependency="gateway"))
            raise
        except DomainError as error:
            await self._refuse(exchange, error)
        except Exception as error:
            log.exception("request_failed_unexpectedly", error=type(error).__name__, request_id=exchange.request_id)
            if exchange.status:
                raise  # the connection is cut: half a response must not look like a whole one
            await self._refuse(exchange, unexpected(exchange.trace_id))

    async def _admit(self, exchange: Exchange, rule: Rule) -> None:
        if rule.open:
            return
        principal = await self._kit.identity.principal(self._credential(exchange), exchange.address)
        rule.check(principal)
        exchange.principal = principal
        set_current(principal)
        if (kind := rule.counts) is not None:
            exchange.extra_headers += (await self._kit.limits.admit(principal, kind)).headers

    async def _admit_as(self, exchange: Exchange, method: str, raw_path: bytes) -> None:
        """Admit what came in a message as if it had come over the route; the credential is looked at again, as it may have ended."""
        route, _ = self._router.find(method, raw_path)
        await self._admit(exchange, route.rule)
        exchange.extra_headers.clear()  # there is no response any more that could carry them

    def _credential(self, exchange: Exchange) -> str:
        """What the request names in a header, else the session of our own page."""
        if not has_credential(exchange.headers) and (token := self._kit.browser.token_in(exchange.headers)):
            self._kit.browser.check_own(exchange.method, exchange.headers)
            return token
        return credential_in(exchange.headers)

    async def _refuse(self, exchange: Exchange, error: DomainError) -> None:
        if exchange.status:
            log.error("failed_after_the_response_began", reason=error.reason, request_id=exchange.request_id)
            raise error
        self._kit.metrics.refusals.labels(error.reason or error.code).inc()
        # What is shed is counted: a line for each would be the very work that there is no time for.
        if status_of(error) >= 500 and not isinstance(error, Overloaded):
            log.warning("request_failed", reason=error.reason, request_id=exchange.request_id, **_dependency(error))
        with contextlib.suppress(ClientLeft):
            await exchange.respond_problem(error, error.headers if isinstance(error, LimitReached) else ())


def _dependency(error: DomainError) -> dict[str, str]:
    name = error.metadata.get("dependency")
    return {"dependency": name} if name else {}
