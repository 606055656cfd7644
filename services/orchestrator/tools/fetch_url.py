"""The tool `fetch_url`: a page of an allow-listed host as text. No address inside is ever reached, whatever a name or a redirect says."""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from selectolax.lexbor import LexborHTMLParser
from yarl import URL

from services.orchestrator.domain import Question, ToolSpec
from services.orchestrator.tools.addresses import AllowedHost, is_public
from services.orchestrator.tools.toolbox import Output, ToolFailed

URL_CHARACTERS_MAX = 2_048
BODY_BYTES_MAX = 1024 * 1024
HOPS_MAX = 4
ADDRESSES_MAX = 16
CONNECT_S = 5.0
READ_S = 10.0
FETCHES_MAX = 32
"""At the same time, in this process."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HTML = frozenset({"text/html", "application/xhtml+xml"})
_TEXT = frozenset({"text/plain", "text/markdown", "text/csv", "application/json", "application/xml", "text/xml"})
_UNREAD = ["script", "style", "noscript", "template", "svg", "iframe", "object", "form", "head"]
_BLOCKS = "p,div,section,article,li,tr,br,h1,h2,h3,h4,h5,h6,pre,blockquote,table,ul,ol,dl,dt,dd,header,footer,main,aside,nav"
_SPACES, _LINES = re.compile(r"[^\S\n]+"), re.compile(r"\s*\n\s*(?:\n\s*)*")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve_by_system(host: str, port: int) -> Sequence[str]:
    """Every address the system's resolver knows of a name."""
    rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


class _Pinned(AbstractResolver):
    """Answers with the addresses that were looked at, so that a name cannot mean something else a moment later."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        return None


class FetchUrl:
    """The tool. `permitted` says which addresses may be connected to."""

    output_schema: Mapping[str, Any] | None = None

    def __init__(
        self, hosts: Iterable[AllowedHost], resolve: Resolve = resolve_by_system, permitted: Callable[[str], bool] = is_public
    ) -> None:
        self._hosts, self._resolve, self._permitted = tuple(hosts), resolve, permitted
        self._turns = asyncio.Semaphore(FETCHES_MAX)
        names = ", ".join(f"{'*.' if host.below else ''}{host.host}" for host in self._hosts)
        self.spec = ToolSpec(
            "fetch_url",
            f"Fetches a web page or text file and returns its text. Only from: {names[:1_000]}.",
            {
                "type": "object",
                "properties": {
                    "url": {"type": "string", "minLength": 8, "maxLength": URL_CHARACTERS_MAX, "description": "The whole address."}
                },
                "required": ["url"],
                "additionalProperties": False,
            },
        )

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        url = self._checked(arguments["url"])
        async with self._turns:
            for _ in range(HOPS_MAX):
                found = await self._hop(url)
                if isinstance(found, Output):
                    return found
                url = self._checked(str(found))
        raise ToolFailed("the page redirects too often")

    def _checked(self, text: str) -> URL:
        """The address, if it may be fetched. Raises ToolFailed."""
        try:
            url = URL(text)
        except ValueError:
            raise ToolFailed("not a web address") from None
        if len(text) > URL_CHARACTERS_MAX or url.scheme not in ("http", "https") or not url.host or url.user is not None or url.password:
            raise ToolFailed("not a web address that can be fetched: http or https, a host, no user name")
        if not any(host.covers(url.scheme, url.host, url.port) for host in self._hosts):
            raise ToolFailed("this host may not be fetched from")
        return url.with_fragment(None)

    async def _addresses(self, url: URL) -> Sequence[str]:
        """Where the host is, looked up once. Raises ToolFailed unless every address is one to go to."""
        assert url.host is not None and url.port is not None
        try:
            addresses = await self._resolve(url.host, url.port)
        except (OSError, UnicodeError):
            raise ToolFailed("the host cannot be found") from None
        if not addresses or len(addresses) > ADDRESSES_MAX or not all(map(self._permitted, addresses)):
            raise ToolFailed("the host has an address that may not be fetched from")
        return addresses

    async def _hop(self, url: URL) -> Output | URL:
        """One request; the text, or where it redirects to."""
        addresses = await self._addresses(url)
        connector = aiohttp.TCPConnector(resolver=_Pinned(addresses), use_dns_cache=False, limit=1, force_close=True)
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=READ_S)
        headers = {"Accept": "text/html, text/plain;q=0.9, */*;q=0.1", "Accept-Encoding": "identity", "User-Agent": "Tailrace/1"}
        jar = aiohttp.DummyCookieJar()
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, cookie_jar=jar, auto_decompress=False, trust_env=False
                ) as session,
                session.get(url, headers=headers, allow_redirects=False) as response,
            ):
                if response.status in REDIRECTS and (place := response.headers.get("Location")):
                    return url.join(URL(place))
                if response.status != 200:
                    raise ToolFailed(f"the host answered with status {response.status}")
                kind = response.content_type
                if kind not in _HTML | _TEXT:
                    raise ToolFailed("not text: only HTML, plain text, Markdown, CSV, JSON and XML can be read")
                if response.headers.get("Content-Encoding", "identity") != "identity":  # what is packed may be larger than it looks
                    raise ToolFailed("the host sent packed data although it was asked not to")
                body, whole = await _read(response.content)
                charset = response.charset or "utf-8"
        except (aiohttp.ClientError, ValueError, OSError):
            raise ToolFailed("the host could not be reached, or its answer not be read") from None
        try:
            text = body.decode(charset, errors="replace")
        except LookupError:
            text = body.decode(errors="replace")
        if kind in _HTML:
            text = await asyncio.to_thread(readable, text)
        return Output(text if whole else f"{text}\n(cut: the page is larger than {BODY_BYTES_MAX} bytes)")


async def _read(content: aiohttp.StreamReader) -> tuple[bytes, bool]:
    """At most BODY_BYTES_MAX of a body, and whether that was all."""
    parts, left = [], BODY_BYTES_MAX
    async for part in content.iter_chunked(65_536):
        parts.append(part[:left])
        left -= len(part)
        if left < 0:
            return b"".join(parts), False
    return b"".join(parts), True


def readable(html: str) -> str:
    """The title and the text of a page, one block a line."""
    tree = LexborHTMLParser(html)
    titles = tree.css("title")
    title = _SPACES.sub(" ", titles[0].text(deep=True)).strip() if titles else ""
    tree.strip_tags(_UNREAD)
    for block in tree.css(_BLOCKS):
        block.insert_before("\n")
        block.insert_after("\n")
    text = tree.body.text(deep=True, separator="") if tree.body is not None else ""
    text = _LINES.sub("\n", _SPACES.sub(" ", text)).strip()
    return f"{title}\n\n{text}" if title else text
