"""uvicorn inside our own lifecycle: it takes no signals, its port is ours to report, and who sends headers without end is cut off.

What it refuses before there is a request is a problem document with ids, as everywhere else.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from opentelemetry.trace import SpanKind
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from services.chassis import listening, telemetry
from services.chassis.errors import DomainError, Overloaded, RateLimited, RequestInvalid
from services.gateway import problems
from services.gateway.bodies import ANSWER_BYTES_MAX
from services.gateway.exchange import BODY_BYTES_PER_S_MIN
from services.gateway.request_ids import id_headers, request_id_of

log = structlog.get_logger(__name__)

HEADERS_TIMEOUT_S = 10.0
"""From the connection, or from a request's first byte, to the end of its headers; with TLS, as long for the handshake before them."""
HEADERS_BYTES_MAX = 64 * 1024
HEADER_OVERHEAD_BYTES = 32
"""What a header counts besides its text, so that many empty ones are not free (after HPACK)."""
KEEP_ALIVE_S = 75
"""Longer than the 60 s that proxies commonly keep an idle connection, so that they are never the ones surprised."""

LINGER_S = 10.0
"""How long a closed connection may take to take what was written to it; then it is cut, and its memory freed."""
SOCKET_PING_S = 20.0
"""Between two pings of an idle WebSocket, and how long each may stay unanswered by a client that sends nothing else."""
CONNECTIONS_MAX = 10_000
"""Open at the same time, whoever they come from: each costs some memory before a word was said."""
RETRY_AFTER_MS = 1000


def _refused(error: DomainError) -> bytes:
    """`error` as a whole response on a connection that will be closed."""
    request_id = request_id_of("")
    status = problems.status_of(error)
    with telemetry.span("unreadable request", kind=SpanKind.SERVER) as span:
        span.set_attribute(telemetry.HTTP_STATUS, status)
        trace_id = telemetry.current_trace_id()
    body = problems.body_of(error, trace_id=trace_id, request_id=request_id)
    headers = [
        (b"content-type", problems.MEDIA_TYPE),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
        *id_headers(request_id, trace_id),
        *problems.headers_of(error),
    ]
    head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode() + head + b"\r\n" + body


class _Peers:
    """Open connections by peer address, at most `peer_max` each, 0 = no bound, and `total_max` of all together."""

    def __init__(self, peer_max: int, total_max: int) -> None:
        self._peer_max, self._total_max = peer_max, total_max
        self._open: Counter[str] = Counter()

    def enter(self, transport: Any) -> DomainError | None:
        """Count a connection. Return why it is one too many, if it is; it is counted all the same until it leaves."""
        address = _address(transport)
        self._open[address] += 1
        if self._peer_max and self._open[address] > self._peer_max:
            return RateLimited(f"at most {self._peer_max} connections from one address", retry_after_ms=RETRY_AFTER_MS)
        if self._open.total() > self._total_max:
            return Overloaded("the gateway has as many connections as it can", dependency="gateway", retry_after_ms=RETRY_AFTER_MS)
        return None

    def leave(self, transport: Any) -> None:
        address = _address(transport)
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def _address(transport: Any) -> str:
    return str((transport.get_extra_info("peername") or ("",))[0])


class OneWrite:
    """A transport that keeps the head of a response for what follows it in the same turn of the loop, so that both leave in one write.

    Two writes are two calls of the kernel here, and two awakenings of the client. Everything else passes at once.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):  # of a body that begins like this the same is true
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            if not self._transport.is_closing():  # lost or aborted meanwhile: it takes nothing any more
                self._transport.write(head)


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 with bounds on connections and on the time and size of headers, which uvicorn leaves open."""

    def __init__(self, *args: Any, peers: _Peers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers = peers

    def connection_made(self, transport: Any) -> None:
        transport = OneWrite(transport, self.loop)
        super().connection_made(transport)
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._head_ended = False
        if (refusal := self._peers.enter(transport)) is None:
            self._expect_headers()
        else:
            transport.write(_refused(refusal))
            transport.close()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_refused(RequestInvalid("this is not HTTP that can be read", bound=self._bound())))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        self._peers.leave(self.transport)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._between_requests():
            # uvicorn has taken back the end of the idle connection, and would set it anew only after another response.
            self._expect_headers()

    def _between_requests(self) -> bool:
        """Whether everything is answered that was asked, and this is still HTTP."""
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and not self.transport.is_closing() and self.transport.get_protocol() is self

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._head_ended = False
        self._expect_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_OVERHEAD_BYTES)
        if not self._head_ended:  # a trailer must not be taken for a header (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._headers_came()
        self._head_ended = True
        _require_one_reading(self.parser.get_http_version(), self.headers)
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADERS_BYTES_MAX:
            raise ValueError("the headers are too large")  # the parser turns it into a 400 and the connection ends

    def _bound(self) -> str:
        return f"{HEADERS_BYTES_MAX} bytes of headers" if self._header_bytes > HEADERS_BYTES_MAX else ""

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._too_slow)

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()


def _require_one_reading(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise ValueError for what a proxy before us might take for another request, or for one to somebody else (RFC 9112, 3.2 and 6.1)."""
    hosts = sum(name == b"host" for name, _ in headers)
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if hosts > 1 or (version == "1.1" and not hosts):
        raise ValueError("one host is needed")
    if version not in ("1.0", "1.1") or (codings and (version, codings) != ("1.1", [b"chunked"])):
        raise ValueError("its length could be read in more than one way")


class _SocketProtocol(WebSocketsSansIOProtocol):
    """A WebSocket that is counted as the connection it came from, and that ends by the application's word, not in the middle of one."""

    def __init__(self, *args: Any, peers: _Peers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers = peers
        self._came = 0
        """Bytes since the latest ping."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.leave(self.transport)
        super().connection_lost(exc)

    def send_keepalive_ping(self) -> None:
        self._came = 0
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """End a client that is silent. One that sends a long message answers only after it; it must be as quick as a body."""
        if self._came < SOCKET_PING_S * BODY_BYTES_PER_S_MIN:
            super().keepalive_timeout()
            return
        self.pong_timer = self.pending_ping_payload = None
        self.schedule_ping()

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(
                _refused(RequestInvalid("this is no handshake of a WebSocket"))
            )  # uvicorn would leave it open and say nothing
            self.transport.close()

    def handle_connect(self, event: Any) -> None:
        if self.conn.accept(event).status_code == 101:
            super().handle_connect(event)
        else:
            self.handshake_initiated = self.handshake_complete = self.close_sent = True
            self.transport.write(_refused(RequestInvalid("this is no handshake of a WebSocket")))
            self.transport.close()

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.close":
            self.writable.set()  # a goodbye does not wait for a peer that takes nothing
        await super().send(message)

    def shutdown(self) -> None:
        """Leave it to the application, which hears of the drain itself, or is cancelled when the grace is over."""


class _Listening(uvicorn.Server):
    """Listens on one socket with a bound on the time of a TLS handshake, which uvicorn leaves at asyncio's minute."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        config = self.config
        protocol: Any = config.http_protocol_class
        self.servers = [
            await asyncio.get_running_loop().create_server(
                functools.partial(protocol, config=config, server_state=self.server_state, app_state=self.lifespan.state),
                sock=claim,
                ssl=config.ssl,
                ssl_handshake_timeout=HEADERS_TIMEOUT_S if config.ssl else None,
                backlog=config.backlog,
            )
            for claim in sockets
        ]
        self.started = True


class HttpListener:
    """An HTTP server for one application."""

    def __init__(
        self,
        app: Any,
        *,
        connections_max: int = CONNECTIONS_MAX,
        connections_per_peer_max: int = 0,
        certificate: tuple[Path, Path] | None = None,
        port_setting: str = "TAILRACE_HTTP_PORT",
    ) -> None:
        """`connections_per_peer_max` counts by address, 0 = no bound. `certificate` is a certificate and its key: with it TLS is spoken."""
        self._port_setting = port_setting
        peers = _Peers(connections_per_peer_max, connections_max)
        # Its words are ours to say: the edge logs what fails, and strangers' broken requests are not news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            http=functools.partial(_Protocol, peers=peers),  # type: ignore[arg-type]
            ws=functools.partial(_SocketProtocol, peers=peers),  # type: ignore[arg-type]
            ws_max_size=ANSWER_BYTES_MAX,
            ws_ping_interval=SOCKET_PING_S,
            ws_ping_timeout=SOCKET_PING_S,
            # What is a kilobyte on the wire is a kilobyte in memory.
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_certfile=certificate[0] if certificate else None,
            ssl_keyfile=str(certificate[1]) if certificate else None,
        )
        config.load()
        self._server = _Listening(config)
        self._server.lifespan = config.lifespan_class(config)
        self._ticking: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self.port = 0
        """The port listened on, once started."""

    async def start(self, host: str, port: int) -> int:
        """Listen on `host:port` (0 = any free one) and return the port. Raises OSError that names the port, as `listening.claimed` does."""
        try:
            claim = await listening.claimed(host, port)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({self._port_setting}): {error.strerror}") from error
        claim.setblocking(False)
        self.port = int(claim.getsockname()[1])
        self._socket = claim
        await self._server.startup(sockets=[claim])
        self._ticking = asyncio.create_task(self._server.main_loop(), name="http-tick")
        self._sweeping = asyncio.create_task(self._sweep(), name="http-sweep")
        log.info("serving_http", port=self.port)
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, let running requests end within `grace_s`, then cancel the rest and wait for them."""
        if self._ticking is None or self._sweeping is None:
            return
        self._server.should_exit = True
        await self._ticking
        state = self._server.server_state
        for server in self._server.servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(list(state.tasks), timeout=grace_s)
        late = list(state.tasks)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self._sweeping.cancel()
        await asyncio.gather(self._sweeping, return_exceptions=True)
        for connection in list(state.connections):
            with contextlib.suppress(Exception):
                connection.transport.close()
        if self._socket is not None:
            self._socket.close()

    async def _sweep(self) -> None:
        """Cut what was closed a round ago and is still there: its peer takes nothing, and a closed transport waits for it for ever."""
        closing: set[Any] = set()
        while True:
            await asyncio.sleep(LINGER_S)
            found = {connection for connection in self._server.server_state.connections if connection.transport.is_closing()}
            for connection in found & closing:
                connection.transport.abort()
            closing = found - closing
