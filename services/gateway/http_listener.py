"""uvicorn inside our own lifecycle: it takes no signals, its port is ours to report, and who sends headers without end is cut off."""

import asyncio
import contextlib
import logging
import socket
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = structlog.get_logger(__name__)

HEADERS_TIMEOUT_S = 10.0
"""From the connection, or from a request's first byte, to the end of its headers."""
HEADERS_BYTES_MAX = 64 * 1024
HEADER_OVERHEAD_BYTES = 32
"""What a header counts besides its text, so that many empty ones are not free (after HPACK)."""
KEEP_ALIVE_S = 75
"""Longer than the 60 s that proxies commonly keep an idle connection, so that they are never the ones surprised."""


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 with bounds on the time and size of headers, which uvicorn leaves open."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._expect_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_OVERHEAD_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._headers_came()
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADERS_BYTES_MAX:
            raise ValueError("the headers are too large")  # the parser turns it into a 400 and the connection ends

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


class HttpListener:
    """An HTTP server for one application."""

    def __init__(self, app: Any, tasks_max: int = 10_000) -> None:
        # Its words are ours to say: the edge logs what fails, and strangers' broken requests are not news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=tasks_max,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._ticking: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self.port = 0
        """The port listened on, once started."""

    async def start(self, host: str, port: int) -> int:
        """Listen on `host:port` (0 = any free one) and return the port. Raises OSError that names the port if it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A port in TIME_WAIT after a restart is free; one that somebody listens on is not.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.setblocking(False)
        except OSError as error:
            listening.close()
            raise OSError(f"cannot listen on {host}:{port} (TAILRACE_HTTP_PORT): {error.strerror}") from error
        self.port = int(listening.getsockname()[1])
        self._socket = listening
        await self._server.startup(sockets=[listening])
        self._ticking = asyncio.create_task(self._server.main_loop(), name="http-tick")
        log.info("serving_http", port=self.port)
        return self.port

    async def stop(self, grace_s: float) -> None:
        """Take no new connections, let running requests end within `grace_s`, then cancel the rest and wait for them."""
        if self._ticking is None:
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
        for connection in list(state.connections):
            with contextlib.suppress(Exception):
                connection.transport.close()
        if self._socket is not None:
            self._socket.close()
