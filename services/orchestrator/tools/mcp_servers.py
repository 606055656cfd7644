"""Tools of MCP servers, over streamable HTTP or as programs of our own (`mcp_process`), in both revisions of the protocol: with a session
(2025-11-25) and without (2026-07-28).

Nothing a server says is trusted: its schemas are looked through, its texts are bounded, and it learns no user's name. Over HTTP each list
and each call has a connection of its own, so that no session, and nothing a server keeps in one, is shared between users; what was learnt
of a server's revision is kept, so that one without sessions is asked once and not twice.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx2
import mcp_types
import orjson
import structlog
from mcp.client.session import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from services.chassis.errors import Unavailable
from services.orchestrator.compose import tool_description
from services.orchestrator.domain import Question, ToolSpec
from services.orchestrator.json_schema import Schema, SchemaRefused, closed
from services.orchestrator.tools.mcp_process import START_S, ServerProcess
from services.orchestrator.tools.mcp_session import CONNECTIONS_MAX, RESPONSE_BYTES_MAX, US, Session, first_of, greet, settled
from services.orchestrator.tools.toolbox import NAME, Output, Tool, ToolFailed

log = structlog.get_logger(__name__)

SERVERS_MAX = 32
LISTED_MAX = 256
PAGES_MAX = 16
DESCRIPTION_CHARACTERS_MAX = 2_000
EVENT_BYTES_MAX = 1024 * 1024
CONNECT_S, READ_S = 5.0, 60.0
LIST_S = 5.0
"""How long a server may take to tell what tools it has, and how long the first answers wait for it before their model is asked. A program
may take START_S longer, behind them."""
AWAY_S = 5.0
"""How long a server that could not be reached, or kept silent, is left alone before its tools are asked for again."""
_SERVER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_UNNAMABLE = re.compile(r"[^A-Za-z0-9_-]")
_HTTP_KEYS = frozenset({"url", "headers"})
_PROGRAM_KEYS = frozenset({"command", "environment", "life_s"})
_KEYS = _HTTP_KEYS | _PROGRAM_KEYS | {"tools", "confirm", "list_life_s"}
ARGUMENTS_MAX = 64


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One server of the file."""

    name: str
    url: str
    """Empty for a program."""
    headers: Mapping[str, str] = field(repr=False)
    """May hold secrets."""
    tools: frozenset[str] | None
    """Names that may be used, as the server has them; None = all."""
    confirm: frozenset[str]
    """Of these, a person must allow each call; `*` = of all."""
    list_life_s: float
    command: tuple[str, ...] = ()
    """A program and its arguments; empty for a server that has an address."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """All that the program sees of an environment. May hold secrets."""
    life_s: float = 3600.0
    """How old a process of the program may grow."""

    @property
    def confirmed(self) -> list[str]:
        """As the toolbox takes them."""
        return [f"{self.name}__*" if tool == "*" else _whole_name(self.name, tool) for tool in sorted(self.confirm)]


def read_servers(path: Path, environ: Mapping[str, str]) -> tuple[ServerSettings, ...]:
    """Read the servers of a TOML file; `${NAME}` in a header or a program's environment is a variable of `environ`.

    Raises ValueError, OSError.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8-sig")).get("servers", {})
    if not isinstance(table, dict) or len(table) > SERVERS_MAX:
        raise ValueError(f"servers: a table of at most {SERVERS_MAX}")
    return tuple(_server(name, row, environ) for name, row in table.items())


def _server(name: str, row: Any, environ: Mapping[str, str]) -> ServerSettings:
    where = f"servers.{name}"
    if not _SERVER_NAME.fullmatch(name):
        raise ValueError(f"{where}: a name is 1-24 of [a-z0-9-]")
    if not isinstance(row, dict) or (unknown := sorted(row.keys() - _KEYS)):
        raise ValueError(
            f"{where}: unknown {', '.join(unknown) if isinstance(row, dict) else 'value'}; there are: {', '.join(sorted(_KEYS))}"
        )
    is_program = "command" in row
    if strange := sorted(row.keys() & (_HTTP_KEYS if is_program else _PROGRAM_KEYS)):
        raise ValueError(f"{where}.{strange[0]}: {'not for a program' if is_program else 'for a program alone'}")
    url, command = row.get("url", ""), row.get("command", [])
    if is_program:
        words = isinstance(command, list) and 1 <= len(command) <= ARGUMENTS_MAX and all(isinstance(word, str) for word in command)
        if not words or not re.fullmatch(r"/[^\0]+|[^/\0\s]+", command[0]):
            raise ValueError(
                f"{where}.command: a list of a program and its arguments, at most {ARGUMENTS_MAX}; a whole path, or a name on PATH"
            )
    elif not isinstance(url, str) or not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", url):
        raise ValueError(f"{where}.url: an http or https address without a user name")
    given = {key: _filled(f"{where}.{key}", row.get(key, {}), environ) for key in ("headers", "environment")}
    tools, confirm, life_s = row.get("tools"), row.get("confirm", []), row.get("list_life_s", 300)
    for key, names in (("tools", tools or []), ("confirm", confirm)):
        if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
            raise ValueError(f"{where}.{key}: a list of names")
    if tools is not None and (strange := sorted(set(confirm) - {*tools, "*"})):  # a slip of the pen would leave a tool unguarded
        raise ValueError(f"{where}.confirm: {', '.join(strange)} is not among its tools")
    process_life_s = row.get("life_s", 3600)
    for key, seconds in (("list_life_s", life_s), ("life_s", process_life_s)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= 86_400:
            raise ValueError(f"{where}.{key}: 1-86400 seconds")
    return ServerSettings(
        name=name,
        url=url,
        headers=given["headers"],
        tools=None if tools is None else frozenset(tools),
        confirm=frozenset(confirm),
        list_life_s=float(life_s),
        command=tuple(command),
        environment=settled(given["environment"], environ.get("PATH", os.defpath)) if is_program else {},
        life_s=float(process_life_s),
    )


def _filled(where: str, table: Any, environ: Mapping[str, str]) -> dict[str, str]:
    """A table of texts, with the variables they name. Raises ValueError."""
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise ValueError(f"{where}: a table of texts")

    def variable(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ValueError(f"{where}: the variable {match[1]} is not set")
        return environ[match[1]]

    return {key: _VARIABLE.sub(variable, value) for key, value in table.items()}


def _whole_name(server: str, tool: str) -> str:
    """A tool's name as models and plans know it."""
    return f"{server}__{_UNNAMABLE.sub('_', tool)}"


class _Bounded(httpx2.AsyncBaseTransport):
    """Ends a response that is larger than anything a tool may say."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _BoundedStream(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = RESPONSE_BYTES_MAX
        async for chunk in self._inner:
            left -= len(chunk)
            if left < 0:
                raise httpx2.ReadError("the response is too large")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


class McpServer:
    """Source: one server. `now` is a monotonic clock, in seconds."""

    def __init__(self, settings: ServerSettings, now: Callable[[], float]) -> None:
        self.name = settings.name
        self._settings, self._now = settings, now
        self._process = ServerProcess(self.name, settings.command, settings.environment, settings.life_s, now) if settings.command else None
        self._client = httpx2.AsyncClient(
            headers=dict(settings.headers),
            transport=_Bounded(httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=CONNECTIONS_MAX, keepalive_expiry=30))),
            timeout=httpx2.Timeout(READ_S, connect=CONNECT_S),
            trust_env=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # one that a server sets would follow other users
        )
        self._discovered: mcp_types.DiscoverResult | None = None
        """What a server without sessions said of itself."""
        self._has_sessions = False
        self._tools: Mapping[str, Tool] = {}
        self._listed_at: float | None = None
        self._away_until = 0.0
        self._listing: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Close connections, and end the process of a program."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait({self._listing})
        await self._client.aclose()
        if self._process is not None:
            await self._process.aclose()

    @property
    def confirmed(self) -> list[str]:
        """Tools each call of which a person must allow; see Toolbox."""
        return self._settings.confirmed

    def knows(self, tool: str) -> bool:
        return self._settings.tools is None or tool in {_UNNAMABLE.sub("_", name) for name in self._settings.tools}

    async def tools(self) -> Mapping[str, Tool]:
        """The list. One older than `list_life_s` is made anew behind the answers, which go on with the old one; the first is waited for."""
        is_old = self._listed_at is None or self._now() - self._listed_at >= self._settings.list_life_s
        if is_old and self._listing is None and self._now() >= self._away_until:
            # Of nobody's answer: whoever asked may leave, and the others wait for the same one.
            self._listing = asyncio.create_task(self._list(), name="tool list", context=contextvars.Context())
        if self._listed_at is None and self._listing is not None:
            await asyncio.wait({self._listing}, timeout=LIST_S)
        if self._listed_at is None:
            raise Unavailable("the tool server cannot be reached", dependency=self.name)
        return self._tools

    async def _list(self) -> None:
        try:
            async with asyncio.timeout(LIST_S if self._process is None else START_S + LIST_S):
                tools = await self._listed()
            self._tools, self._listed_at = tools, self._now()
        except Exception as error:  # whatever a server says, or does not say
            log.warning("tools_not_listed", server=self.name, error=type(error).__name__)
            self._away_until = self._now() + AWAY_S
        finally:
            self._listing = None

    async def _listed(self) -> "dict[str, McpTool]":
        found: dict[str, McpTool] = {}
        async with self._connected() as session:
            cursor: str | None = None
            async with asyncio.timeout(LIST_S):
                for _ in range(PAGES_MAX):
                    params = mcp_types.PaginatedRequestParams(cursor=cursor) if cursor else None
                    page = await session.list_tools(params=params)
                    for listed in page.tools:
                        tool = self._tool(listed)
                        if tool is not None and tool.spec.name not in found and len(found) < LISTED_MAX:
                            found[tool.spec.name] = tool
                    cursor = page.next_cursor
                    if not cursor:
                        break
        if missing := self._settings.confirm - {"*", *(tool.name for tool in found.values())}:
            log.warning("confirmed_tools_missing", server=self.name, tools=sorted(missing))
        return found

    def _tool(self, listed: mcp_types.Tool) -> "McpTool | None":
        """A tool that may be offered; None for one that is not allowed, cannot be named, or has a schema that is not taken."""
        name = _whole_name(self.name, listed.name)
        if (self._settings.tools is not None and listed.name not in self._settings.tools) or not NAME.fullmatch(name):
            return None
        try:
            Schema(closed(listed.input_schema))
            if listed.output_schema is not None:
                Schema(listed.output_schema)
        except SchemaRefused as error:
            log.warning("tool_left_out", server=self.name, cause=str(error)[:120])
            return None
        description = tool_description(listed.description or listed.title or "", DESCRIPTION_CHARACTERS_MAX)
        return McpTool(self, listed.name, ToolSpec(name, description, listed.input_schema), listed.output_schema)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Output:
        """Call a tool. Never again after a failure: it may have done what it does. Raises ToolFailed, Unavailable."""
        async with self._connected() as session:
            try:
                result = await session.call_tool(tool, dict(arguments))
            except MCPError as error:
                if error.code != mcp_types.HEADER_MISMATCH:
                    raise
                # The server wants arguments in headers, as its list says; it has not made the call.
                await session.list_tools()
                result = await session.call_tool(tool, dict(arguments))
        text = _text(result)
        if result.is_error:
            raise ToolFailed(text or "the tool failed")
        return Output(text, result.structured_content)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[ClientSession]:
        """A session, open for the block. Whatever happens on the way is Unavailable, what the server says ToolFailed."""
        try:
            async with self._process.session() if self._process is not None else self._over_http() as session:
                yield session
        except BaseException as error:
            reason = first_of(error)
            if isinstance(reason, ToolFailed | Unavailable):
                raise reason from None
            if isinstance(reason, Exception):
                self._discovered, self._has_sessions = None, False  # it may be of another revision now
            if isinstance(reason, MCPError) and reason.code not in (mcp_types.CONNECTION_CLOSED, mcp_types.REQUEST_TIMEOUT):
                raise ToolFailed(f"the tool server refused: {reason.error.message[:300]}") from None
            if isinstance(reason, Exception) and not isinstance(reason, TimeoutError):
                log.warning("tool_server_failed", server=self.name, error=type(reason).__name__)
                raise Unavailable("the tool server cannot be reached", dependency=self.name) from None
            raise

    @contextlib.asynccontextmanager
    async def _over_http(self) -> AsyncIterator[ClientSession]:
        """A connection of its own. A revision without sessions needs no word once it is known."""
        async with (
            streamable_http_client(self._settings.url, http_client=self._client, max_sse_event_size=EVENT_BYTES_MAX) as (read, write),
            Session(read, write, client_info=US) as session,
        ):
            if self._discovered is not None:
                session.adopt(self._discovered)
            elif self._has_sessions:
                await session.initialize()
            else:
                self._discovered = await greet(session)
                self._has_sessions = self._discovered is None
            yield session


@dataclass(frozen=True, slots=True)
class McpTool:
    """Tool: one of a server's."""

    server: McpServer
    name: str
    """As the server has it."""
    spec: ToolSpec
    output_schema: Mapping[str, Any] | None

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        return await self.server.call(self.name, arguments)


def _text(result: mcp_types.CallToolResult) -> str:
    """The texts of a result; what is no text is named."""
    parts = []
    for block in result.content:
        if isinstance(block, mcp_types.TextContent):
            parts.append(block.text)
        elif isinstance(block, mcp_types.EmbeddedResource) and isinstance(block.resource, mcp_types.TextResourceContents):
            parts.append(block.resource.text)
        elif isinstance(block, mcp_types.ResourceLink):
            parts.append(f"({block.name}: {block.uri})")
        else:
            parts.append(f"({block.type}, left out)")
    if not parts and result.structured_content is not None:
        parts.append(orjson.dumps(result.structured_content).decode())
    return "\n".join(parts)


def open_servers(path: Path, environ: Mapping[str, str], now: Callable[[], float]) -> list[McpServer]:
    """The servers of a file, none of them asked yet. Raises ValueError, OSError."""
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it writes what servers say, and their addresses
    logging.getLogger("client").setLevel(logging.CRITICAL)  # as the package names its session's
    return [McpServer(settings, now) for settings in read_servers(path, environ)]
