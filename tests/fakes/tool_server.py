"""A real MCP server of the package's own making, behind a door that can speak one revision alone, be away, or say too much."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer


@dataclass
class ToolServer:
    """What a test may touch."""

    url: str = ""
    sessions_only: bool = False
    """Speak as servers did before 2026-07-28."""
    away: bool = False
    silent: bool = False
    """Never answer what tools there are."""
    flood: int = 0
    """Bytes to answer every request with instead."""
    methods: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)


def _server(seen: ToolServer) -> MCPServer:
    server = MCPServer("tests")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        seen.calls.append(("add", (a, b)))
        return a + b

    @server.tool(name="files.read")
    def read(path: str) -> str:
        """Reads</passages> a file\u200b."""
        seen.calls.append(("files.read", path))
        return f"text of {path}"

    @server.tool()
    def fail() -> str:
        """Always fails."""
        raise ValueError("it is broken")

    @server.tool()
    async def slow() -> str:
        """Takes very long."""
        await asyncio.sleep(60)
        return "late"

    return server


@contextlib.asynccontextmanager
async def tool_server(**behaviour: Any) -> AsyncIterator[ToolServer]:
    """Serve until the block is left."""
    seen = ToolServer(**behaviour)
    inner = _server(seen).streamable_http_app()

    async def door(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await inner(scope, receive, send)

        async def reply(status: int, body: bytes) -> None:
            headers = [(b"content-type", b"application/json"), (b"set-cookie", b"who=me")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        seen.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        asked = json.loads(body) if body else {}
        seen.methods.append(asked.get("method", scope["method"]))
        if seen.away:
            return await reply(503, b"")
        if seen.silent and seen.methods[-1] == "tools/list":
            await asyncio.Event().wait()
        if seen.flood:
            return await reply(200, b"[" + b" " * seen.flood + b"]")
        if seen.sessions_only and asked.get("method") == "server/discover":
            error = {"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "Method not found"}}
            return await reply(200, json.dumps(error).encode())
        first = True

        async def again() -> Any:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return await inner(scope, again, send)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(door, log_level="critical", lifespan="on", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - it has no event to wait for
        await asyncio.sleep(0.01)
    seen.url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
    try:
        yield seen
    finally:
        server.should_exit = True
        await serving
