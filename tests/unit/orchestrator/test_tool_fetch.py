"""Fetching for somebody else: nothing inside is ever reached, whatever a name, a redirect or a spelling says."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from services.orchestrator.tools.addresses import is_public, parse_hosts
from services.orchestrator.tools.fetch_url import BODY_BYTES_MAX, FetchUrl, readable
from services.orchestrator.tools.toolbox import ToolFailed
from tests.fakes.scripted_model import question

INSIDE = [
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "169.254.1.1"),
    *("100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::ffff:0:127.0.0.1", "::127.0.0.1", "::10.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "64:ff9b:1::8.8.8.8"),
    *("2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "5f00::1", "4000::1"),
    *("", "localhost", "0x7f000001", "2130706433", "127.1", "0177.0.0.1", "1.2.3.4.5", "[::1]", "8.8.8.8/0"),
]
OUTSIDE = [
    *("8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "192.0.1.1"),
    *("2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_refused(address: str) -> None:
    """Private, loopback, link-local, metadata, documentation, multicast, and IPv4 of these kinds inside IPv6."""
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_public_addresses_are_not(address: str) -> None:
    """Also IPv4 ones inside IPv6."""
    assert is_public(address)


Handler = Callable[[str], bytes]


@contextlib.asynccontextmanager
async def site(pages: dict[str, bytes], asked: list[str] | None = None) -> AsyncIterator[int]:
    """A server with whole responses by path; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        if asked is not None:
            asked.append(head)
        with contextlib.suppress(ConnectionError):
            writer.write(pages.get(path, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def response(body: bytes, kind: str = "text/plain", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def fetched(
    url: str,
    hosts: str,
    addresses: Sequence[str] | Exception = ("127.0.0.1",),
    permitted: Callable[[str], bool] = lambda address: address == "127.0.0.1",
    resolved: list[str] | None = None,
) -> str:
    """What the tool returns, or why it refused. The one address it may go to is our own."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        if resolved is not None:
            resolved.append(host)
        if isinstance(addresses, Exception):
            raise addresses
        return addresses

    try:
        return (await FetchUrl(parse_hosts(hosts), resolve, permitted).call({"url": url}, question())).text
    except ToolFailed as error:
        return f"refused: {error}"


async def test_a_page_is_fetched_as_text() -> None:
    """The name is looked up once, the request goes to that address and names the host, without a cookie or a referrer."""
    asked: list[str] = []
    resolved: list[str] = []
    page = b"<html><head><title>News</title><script>evil()</script></head><body><h1>Hi</h1><p>A <b>bo</b>ld word</p></body></html>"
    async with site({"/a?b=1": response(page, "text/html; charset=utf-8")}, asked) as port:
        text = await fetched(f"http://news.test:{port}/a?b=1#part", f"http://news.test:{port}", resolved=resolved)

    assert text == "News\n\nHi\nA bold word" and resolved == ["news.test"]
    assert f"host: news.test:{port}" in asked[0].lower() and "cookie" not in asked[0].lower()


@pytest.mark.parametrize("address", INSIDE)
async def test_a_name_that_points_inside_is_never_connected_to(address: str) -> None:
    """Not even if another of its addresses is public."""
    for addresses in ([address], ["8.8.8.8", address]):
        text = await fetched("https://example.com/", "example.com", addresses, permitted=is_public)

        assert text == "refused: the host has an address that may not be fetched from"


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.com/", "https://example.com:8443/", "https://evil.test/", "https://example.com.evil.test/", "ftp://example.com/"),
        *("https://user@example.com/", "https://user:secret@example.com/", "https://evil.test#@example.com/", "file:///etc/passwd"),
        *("https://evil.test\\@example.com/", "https://127.0.0.1/", "https://[::1]/", "https://0x7f000001/", "https://localhost/"),
        *("https:///example.com", "example.com", "https://", "https://sub.example.com/", "https://example.com\n.evil.test/", "gopher://x"),
        "https://" + "a" * 3_000,
    ],
)
async def test_what_is_not_listed_is_not_even_looked_up(url: str) -> None:
    """Scheme, host and port are all part of what is allowed; no spelling gets around that."""
    resolved: list[str] = []
    text = await fetched(url, "example.com", resolved=resolved)

    assert text.startswith("refused: ") and resolved == []


async def test_every_hop_of_a_redirect_is_looked_at_again() -> None:
    """A listed host may send elsewhere only within the list, and not inside."""
    asked: list[str] = []
    hops = {
        "/out": "http://evil.test/",
        "/meta": "http://169.254.169.254/latest/meta-data",
        "/file": "file:///etc/passwd",
        "/on": "/end",
        "/loop": "/loop",
    }
    pages = {path: response(b"", status="302 Found", location=place) for path, place in hops.items()}
    pages["/end"] = response(b"here")
    async with site(pages, asked) as port:
        listed, base = f"http://a.test:{port}", f"http://a.test:{port}"
        found = {path: await fetched(base + path, listed) for path in hops}

    assert found["/out"] == found["/meta"] == "refused: this host may not be fetched from"
    assert found["/file"].startswith("refused: not a web address")
    assert found["/on"] == "here" and found["/loop"] == "refused: the page redirects too often"
    assert len(asked) == 3 + 2 + 4


async def test_a_name_that_changes_its_address_between_hops_is_caught() -> None:
    """Each hop is looked up and judged by itself, and connected to by what was judged."""
    answers = [["127.0.0.1"], ["127.0.0.2"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    async with site({"/": response(b"", status="302 Found", location="/next"), "/next": response(b"secret")}) as port:
        tool = FetchUrl(parse_hosts(f"http://a.test:{port}"), resolve, lambda address: address == "127.0.0.1")
        with pytest.raises(ToolFailed, match="may not be fetched from"):
            await tool.call({"url": f"http://a.test:{port}/"}, question())


async def test_bodies_have_a_bound_a_kind_and_no_packing() -> None:
    """What is large is cut, what is no text or packed is refused, and a broken answer is an error and no crash."""
    pages = {
        "/big": response(b"x" * (BODY_BYTES_MAX + 10)),
        "/image": response(b"\x89PNG", "image/png"),
        "/packed": response(gzip.compress(b"x" * 100), "text/plain", content_encoding="gzip"),
        "/broken": b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 100\r\n\r\nshort",
        "/noise": b"\x00\x01\x02 not http\r\n\r\n",
        "/odd": response("é".encode("latin-1"), "text/plain; charset=latin-1"),
        "/madeup": response("é".encode(), "text/plain; charset=made-up"),
    }
    async with site(pages) as port:
        listed = f"http://a.test:{port}"
        found = {path: await fetched(listed + path, listed) for path in (*pages, "/gone")}

    assert found["/big"].endswith(f"(cut: the page is larger than {BODY_BYTES_MAX} bytes)") and len(found["/big"]) < BODY_BYTES_MAX + 100
    assert found["/image"].startswith("refused: not text") and found["/packed"].startswith("refused: the host sent packed data")
    assert found["/broken"].startswith("refused: ") and found["/noise"].startswith("refused: ")
    assert found["/odd"] == "é" == found["/madeup"] and found["/gone"] == "refused: the host answered with status 404"


async def test_a_host_that_cannot_be_found_is_a_failed_call() -> None:
    """Not an error of ours."""
    assert await fetched("https://example.com/", "example.com", OSError()) == "refused: the host cannot be found"
    assert (await fetched("https://example.com/", "example.com", [])).startswith("refused: ")


async def test_the_systems_resolver_finds_this_machine_and_the_tool_refuses_it() -> None:
    """The real thing, end to end: a listed name that is loopback is not connected to."""
    with pytest.raises(ToolFailed, match="may not be fetched from"):
        await FetchUrl(parse_hosts("https://localhost")).call({"url": "https://localhost/"}, question())


def test_hosts_are_read_with_scheme_and_port() -> None:
    """https alone unless it is said; `*.` stands for the names below, not for the name itself."""
    plain, below, port = parse_hosts("Example.com, *.example.org, http://intra.test:8080")

    assert plain.covers("https", "example.com", 443) and not plain.covers("http", "example.com", 80)
    assert below.covers("https", "a.b.example.org", 443) and not below.covers("https", "example.org", 443)
    assert not below.covers("https", "badexample.org", 443)
    assert port.covers("http", "intra.test", 8080) and not port.covers("http", "intra.test", 80)
    assert parse_hosts("") == parse_hosts(" , ") == ()


@pytest.mark.parametrize(
    "text", ["*", "*.com", "https://", "a b", "example.com/path", "example.com:99999", "user@example.com", "*.*.com", "[::1]"]
)
def test_hosts_that_cannot_be_meant_stop_the_start(text: str) -> None:
    """A mistake in an allow-list must not become a hole."""
    with pytest.raises(ValueError, match="not a host to fetch from"):
        parse_hosts(text)


def test_a_page_without_a_body_is_empty() -> None:
    """And hostile nesting is no trouble."""
    assert readable("") == "" and "x" in readable("<div>" * 5_000 + "x")
