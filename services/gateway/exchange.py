"""One HTTP request and its response in the making: bounded reading of the body, one writer, response headers. It knows no route."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

import orjson

from services.chassis.errors import DomainError, PayloadTooLarge, RequestInvalid
from services.chassis.principal import Principal
from services.gateway import problems
from services.gateway.problems import MediaTypeUnsupported, RequestTimeout
from services.gateway.request_ids import id_headers, request_id_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON_BYTES_MAX = 1024 * 1024
QUERY_FIELDS_MAX = 32
BODY_BYTES_PER_S_MIN = 8 * 1024
"""What a body must bring on average, once the stall time is used up: drop by drop nobody keeps a request open."""
DISCARD_BYTES_MAX = 64 * 1024 * 1024
DISCARD_S = 10.0
"""How much of a refused body, and for how long, is thrown away before the connection is closed over it."""
ARRIVED_BYTES_MAX = 64 * 1024
"""How much of one that is there already is taken, so that the connection need not be closed."""


_WEIGHT = re.compile(r";\s*q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII | re.IGNORECASE)


class ClientLeft(Exception):
    """The client closed the connection; nobody reads what we would write."""


class Exchange:
    """A request that is being answered."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send, *, body_stall_s: float, write_stall_s: float) -> None:
        self._receive = receive
        self._send = send
        self._body_stall_s = body_stall_s
        self._write_stall_s = write_stall_s
        self._body_ended = False
        self.arrived_at_s = time.monotonic()
        """When its headers had come."""
        self.method: str = scope["method"]
        self.headers: list[tuple[str, str]] = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        self.address: str = (scope.get("client") or ("",))[0]
        """Of the other end of the connection."""
        self._query_string: bytes = scope.get("query_string", b"")
        self.request_id = request_id_of(next((value for name, value in self.headers if name == "x-request-id"), ""))
        self.trace_id = ""
        """Empty until the edge tells it."""
        self.params: dict[str, str] = {}
        """Values of the path's placeholders."""
        self.admit: Callable[[str, bytes], Awaitable[None]]
        """Set by the edge: admit the principal once more, by the rule of the route with this method and raw path."""
        self.principal: Principal | None = None
        """Set by the edge before an endpoint with a rule runs."""
        self.extra_headers: list[tuple[bytes, bytes]] = []
        """Sent with whatever response there will be."""
        self.prepared: Callable[[], None] = lambda: None
        """To be called by an answer once its model is asked; see `shedding`."""
        self.status = 0
        """Status sent, 0 before that."""

    # --- the request ---

    def header(self, name: str) -> str:
        """The only value of header `name` (in lower case), empty if it is missing. Raises RequestInvalid if it came more than once."""
        values = [value for key, value in self.headers if key == name]
        if len(values) > 1:
            raise RequestInvalid(f"the header {name} came more than once", field=name)
        return values[0].strip() if values else ""

    def media_type(self) -> str:
        """Type of the body without its parameters, in lower case."""
        return self.header("content-type").partition(";")[0].strip().lower()

    def accepts(self, media_type: str) -> bool:
        """Whether the client names `media_type` in Accept, and nothing that it would rather have. A wildcard is no name."""
        weights = dict(map(_weighted, self.header("accept").split(",")))
        return 0 < weights.get(media_type, 0.0) >= max(weights.values())

    def query(self, allowed: Iterable[str]) -> dict[str, str]:
        """The query's fields, each of which must be `allowed` and come once."""
        try:
            pairs = parse_qsl(
                self._query_string.decode("ascii"),
                keep_blank_values=True,
                strict_parsing=bool(self._query_string),
                errors="strict",
                max_num_fields=QUERY_FIELDS_MAX,
            )
        except ValueError as error:
            raise RequestInvalid("the query cannot be read", field="query", bound=f"at most {QUERY_FIELDS_MAX} fields of UTF-8") from error
        fields: dict[str, str] = {}
        names = set(allowed)
        for name, value in pairs:
            if name not in names:
                raise RequestInvalid(
                    "the query has an unknown field", field=name[:64], bound="one of " + ", ".join(sorted(names)) if names else "none"
                )
            if name in fields:
                raise RequestInvalid("the query has a field twice", field=name)
            fields[name] = value
        return fields

    async def chunks(self, bytes_max: int, field: str = "body") -> AsyncIterator[bytes]:
        """The body, piece by piece. Raises PayloadTooLarge, RequestTimeout (for a silence, or less than the least rate), ClientLeft."""
        declared = self.header("content-length")
        if declared.isdecimal() and len(declared) <= 18 and int(declared) > bytes_max:
            raise too_large(bytes_max, field)
        # Only waiting for the client counts: what we take to work on a piece is not its fault.
        total, waited_s, loop = 0, 0.0, asyncio.get_running_loop()
        while not self._body_ended:
            began = loop.time()
            try:
                async with asyncio.timeout(min(self._body_stall_s, self._body_stall_s + total / BODY_BYTES_PER_S_MIN - waited_s)):
                    message = await self._receive()
            except TimeoutError:
                waited_s += loop.time() - began
                raise RequestTimeout(f"{total} bytes came in {waited_s:.1f} s", waited_ms=int(waited_s * 1000)) from None
            waited_s += loop.time() - began
            if message["type"] == "http.disconnect":
                raise ClientLeft
            self._body_ended = not message.get("more_body", False)
            if body := message.get("body", b""):
                total += len(body)
                if total > bytes_max:
                    raise too_large(bytes_max, field)
                yield body

    async def body(self, bytes_max: int = JSON_BYTES_MAX, field: str = "body") -> bytes:
        """The whole body. Raises as `chunks`."""
        return b"".join([chunk async for chunk in self.chunks(bytes_max, field)])

    async def json(self, bytes_max: int = JSON_BYTES_MAX, *, larger_with: bytes = b"", larger_bytes_max: int = 0) -> bytes:
        """The whole body, which the client calls JSON or does not name. Raises MediaTypeUnsupported.

        It may have `larger_bytes_max` if `larger_with` stands in the first `bytes_max` of it.
        """
        if self.media_type() not in ("application/json", ""):
            raise MediaTypeUnsupported("send application/json", accepts="application/json")
        if not larger_with:
            return await self.body(bytes_max)
        body = bytearray()
        async for chunk in self.chunks(larger_bytes_max):
            small = len(body) <= bytes_max
            body += chunk
            if small and len(body) > bytes_max and larger_with not in body:
                raise too_large(bytes_max, "body")
        return bytes(body)

    async def until_client_leaves(self) -> None:
        """Return when the client is gone. What it still sends is thrown away."""
        while (await self._receive())["type"] != "http.disconnect":
            self._body_ended = True

    async def upgrade(self) -> tuple[Receive, Send]:
        """Accept the handshake of a WebSocket and hand over its messages; no response can be sent any more. Status 101."""
        if (await self._receive())["type"] != "websocket.connect":
            raise ClientLeft
        self.status = 101
        await self._send({"type": "websocket.accept", "headers": self.extra_headers})
        return self._receive, self._send

    # --- the response ---

    def tell_ids(self, trace_id: str) -> None:
        """Have the response say which request and which trace it belongs to."""
        self.trace_id = trace_id
        self.extra_headers += id_headers(self.request_id, trace_id)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send status and headers. Raises as `write`: what the connection carried before may not have been taken."""
        async with self._stall():
            await self._start(status, headers)

    async def write(self, body: bytes, *, last: bool = False) -> None:
        """Send a piece of the body. Raises ClientLeft if the client takes nothing for the stall time: then the connection is cut."""
        async with self._stall():
            await self.write_watched(body, last=last)

    async def write_watched(self, body: bytes, *, last: bool = False) -> None:
        """As `write`, for who watches by itself how long it takes: a timer for each piece is too much on the way of every token."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.extra_headers]})

    async def _start_with(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes, *, last: bool) -> None:
        """Send status and headers and the first piece of the body, or all of it, under one timer."""
        async with self._stall():
            await self._start(status, headers)
            await self.write_watched(body, last=last)

    @contextlib.asynccontextmanager
    async def _stall(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._write_stall_s):
                yield
        except TimeoutError:
            raise ClientLeft from None

    async def respond(self, status: int, body: bytes, media_type: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole response."""
        framing = [] if status in (204, 304) else [(b"content-type", media_type), (b"content-length", str(len(body)).encode())]
        await self._start_with(status, [*framing, *headers], b"" if status in (204, 304) else body, last=True)

    async def respond_json(self, value: object, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send `value` as JSON that no cache keeps."""
        await self.respond(status, orjson.dumps(value), b"application/json", [(b"cache-control", b"no-store"), *headers])

    async def respond_problem(self, error: DomainError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send `error` as a problem document, then close the connection if the request's body was not read to its end.

        A client that is still sending would see a broken connection instead of the problem, so for a while what it sends is thrown away.
        """
        if self.method not in ("GET", "HEAD"):
            await self._take_what_came()
        unread = not self._body_ended and self.method not in ("GET", "HEAD")
        closing = [(b"connection", b"close")] if unread else []
        body = problems.body_of(error, trace_id=self.trace_id, request_id=self.request_id)
        length = (b"content-length", str(len(body)).encode())
        sent = [
            (b"content-type", problems.MEDIA_TYPE),
            length,
            (b"cache-control", b"no-store"),
            *problems.headers_of(error),
            *closing,
            *headers,
        ]
        await self._start_with(problems.status_of(error), sent, body, last=not unread)
        if unread:
            await self._discard()
            await self.write(b"", last=True)

    async def _take_what_came(self) -> None:
        """Take a small body that is there already, so that its connection can go on: a new one costs more than most refusals.

        Not of a client that waits to be told that it may send: to ask for the body would tell it so.
        """
        if any(name == "expect" for name, _ in self.headers):
            return
        total = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):  # what must be waited for does not come in time
                while not self._body_ended and total <= ARRIVED_BYTES_MAX:
                    message = await self._receive()
                    total += len(message.get("body", b""))
                    self._body_ended = not message.get("more_body", False)

    async def _discard(self) -> None:
        """Take the rest of the body, or as much of it as is reasonable."""
        total = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                while not self._body_ended and total < DISCARD_BYTES_MAX:
                    message = await self._receive()
                    total += len(message.get("body", b""))
                    self._body_ended = message["type"] == "http.disconnect" or not message.get("more_body", False)


def too_large(bytes_max: int, field: str) -> PayloadTooLarge:
    """Of what has more than `bytes_max`."""
    return PayloadTooLarge(f"at most {bytes_max} bytes are accepted", field=field, bound_bytes=bytes_max)


def _weighted(part: str) -> tuple[str, float]:
    """One media type of Accept, and how much it is wanted."""
    weight = _WEIGHT.search(part)
    return part.partition(";")[0].strip().lower(), float(weight[1]) if weight else 1.0
