"""A session with an MCP server, whatever carries it: how a revision is agreed on, and the bounds of what a server may send."""

from collections.abc import Mapping
from typing import Any

import mcp_types
from mcp.client.session import ClientSession
from mcp.shared.exceptions import MCPError

RESPONSE_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 32
"""Calls of one server at a time."""
US = mcp_types.Implementation(name="tailrace", version="1")


class Session(ClientSession):
    """A session that leaves the check of results to us: the package's own runs patterns of strangers without a bound."""

    async def validate_tool_result(self, name: str, result: mcp_types.CallToolResult) -> None:
        return None


async def greet(session: ClientSession) -> mcp_types.DiscoverResult | None:
    """Agree on a revision. Returns what a server without sessions says of itself, None of one that has them.

    Raises MCPError, RuntimeError, ValueError if there is no revision that both speak.
    """
    try:
        return await session.discover()
    except (MCPError, RuntimeError, ValueError):  # it knows no such question, or speaks no such revision
        await session.initialize()
        return None


def first_of(error: BaseException) -> BaseException:
    """The first thing that went wrong in a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def settled(environment: Mapping[str, Any], path: str) -> dict[str, str]:
    """The environment of a server that is a program: what the file gives it and nothing of ours, which holds keys and names proxies."""
    return {"PATH": path, "LC_ALL": "C.UTF-8", **environment}
