"""Keys that rotate under load and strangers who make up key ids: no good token is refused, and the issuer is left in peace."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from services.chassis.errors import NotAuthenticated, Unavailable
from services.gateway import identity
from services.gateway.identity import PublishedKeys, Tokens, keys_at_url, keys_in_file
from tests.unit.gateway.test_gateway_identity import CLAIMS, Clock, Published, b64, document, jwk_of, signed

ROTATIONS = 50
WORKERS = 4
FLOOD = 10_000

Publish = Callable[[bytes], None]
Read = Callable[[], Awaitable[bytes]]


class Signer:
    """One of the issuer's keys, and a token that it signed."""

    def __init__(self, number: int) -> None:
        self.kid = f"key-{number}"
        self._key = ed25519.Ed25519PrivateKey.generate()
        self.public = jwk_of(self._key, self.kid)
        self.token = jwt.encode({**CLAIMS, "sub": self.kid}, self._key, algorithm="EdDSA", headers={"kid": self.kid})


def tokens_by(read: Read, clock: Clock) -> Tokens:
    return Tokens(PublishedKeys(read, clock), issuer="issuer", audience="tailrace", leeway_s=30)


@contextlib.asynccontextmanager
async def published(where: str, folder: Path) -> AsyncIterator[tuple[Publish, Read]]:
    """A place where an issuer publishes its keys: a file that is replaced, or an address."""
    path = folder / "jwks.json"

    def publish(content: bytes) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)

    if where == "file":
        yield publish, keys_in_file(path)
        return

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        content = path.read_bytes()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, httpx.AsyncClient(trust_env=False) as client:
        yield publish, keys_at_url(client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json")


class Load:
    """Workers that go on verifying the tokens that are good at the time."""

    def __init__(self, tokens: Tokens, good: list[Signer]) -> None:
        self.good = good
        self.verified = 0
        self.refused: list[str] = []
        self._tokens = tokens

    async def work(self, number: int) -> None:
        while True:
            signer = self.good[(self.verified + number) % len(self.good)]
            try:
                assert (await self._tokens.principal(signer.token)).user == signer.kid
            except NotAuthenticated as error:
                self.refused.append(f"{signer.kid}: {error.metadata['cause']}")
            self.verified += 1
            await asyncio.sleep(0)

    async def go_on(self) -> None:
        """Return when the workers have verified some more; they take turns, so each of them has."""
        enough = self.verified + 4 * WORKERS
        while self.verified < enough:  # noqa: ASYNC110 - the workers themselves are what is waited for
            await asyncio.sleep(0)


@pytest.mark.parametrize("where", ["file", "url"])
async def test_keys_rotate_fifty_times_under_load_and_no_good_token_is_refused(where: str, tmp_path: Path) -> None:
    """The new key is published one pause before it signs, and the old one goes when its tokens have ended."""
    clock, old = Clock(), Signer(0)
    async with published(where, tmp_path) as (publish, read):
        publish(document(old.public))
        load = Load(tokens_by(read, clock), [old])
        workers = [asyncio.create_task(load.work(number)) for number in range(WORKERS)]
        for number in range(1, ROTATIONS + 1):
            new = Signer(number)
            publish(document(old.public, new.public))
            await load.go_on()
            clock.now += identity.READ_PAUSE_S
            load.good = [old, new]
            await load.go_on()
            load.good = [new]
            await load.go_on()
            publish(document(new.public))
            old = new
        for worker in workers:
            worker.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)

    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    assert load.refused == []
    assert load.verified >= ROTATIONS * 3 * 4 * WORKERS


async def test_the_first_tokens_of_a_new_key_wait_for_the_reading_that_one_of_them_began() -> None:
    """Many at once: who comes while the keys are being read is not refused by what was known before."""
    clock, old, new = Clock(), Signer(1), Signer(2)
    content, gate, reads = [document(old.public)], asyncio.Event(), 0
    gate.set()

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        await gate.wait()
        return content[0]

    tokens = tokens_by(read, clock)
    await tokens.principal(old.token)
    content[0] = document(old.public, new.public)
    gate.clear()
    clock.now += identity.READ_PAUSE_S
    asked = []
    for _ in range(20):
        asked.append(asyncio.create_task(tokens.principal(new.token)))
        await asyncio.sleep(0)
    gate.set()

    assert {principal.user for principal in await asyncio.gather(*asked)} == {new.kid}
    assert reads == 2


async def test_a_flood_of_made_up_key_ids_costs_one_reading_in_ten_seconds() -> None:
    """10,000 of them over 100 s, with good tokens between them and a rotation in the middle."""
    clock, old, new = Clock(), Signer(1), Signer(2)
    source = Published(document(old.public))
    read_at: list[float] = []

    async def read() -> bytes:
        read_at.append(clock.now)
        return await source.read()

    tokens = tokens_by(read, clock)
    header = {"alg": "EdDSA", "typ": "JWT"}
    tail = signed().split(".", 1)[1]
    published_at = clock.now + 50
    good = refused = 0

    async def flood(number: int) -> None:
        nonlocal refused
        head = b64(json.dumps({**header, "kid": f"made-up-{number}"}).encode())
        with pytest.raises(NotAuthenticated):
            await tokens.principal(f"{head}.{tail}")
        refused += 1

    for batch in range(FLOOD // 50):
        await asyncio.gather(*(flood(batch * 50 + number) for number in range(50)))
        clock.now += 0.5
        if clock.now >= published_at:
            source.content = document(old.public, new.public)
        usable = [old, new] if clock.now >= published_at + identity.READ_PAUSE_S else [old]
        for signer in usable:
            assert (await tokens.principal(signer.token)).user == signer.kid
            good += 1

    assert refused == FLOOD
    assert good > 250
    gaps = [later - earlier for earlier, later in itertools.pairwise(read_at)]
    assert min(gaps) >= identity.READ_PAUSE_S
    assert len(read_at) <= 1 + 100 / identity.READ_PAUSE_S


async def test_a_source_that_hangs_holds_up_no_known_key_and_ends_with_the_process() -> None:
    """Who has one waits for nothing; who has none waits no longer than a reading may take."""

    def readings() -> "set[asyncio.Task[Any]]":
        """Of this key set: servers of other tests have tasks in the same loop."""
        frames = {task: getattr(task.get_coro(), "cr_frame", None) for task in asyncio.all_tasks()}
        return {task for task, frame in frames.items() if frame is not None and frame.f_locals.get("self") is keys}

    clock, key = Clock(), Signer(1)
    hangs = False

    async def read() -> bytes:
        if hangs:
            await asyncio.Event().wait()
        return document(key.public)

    keys = PublishedKeys(read, clock)
    tokens = Tokens(keys, issuer="issuer", audience="tailrace", leeway_s=30)
    await tokens.principal(key.token)
    hangs = True
    clock.now += identity.REFRESH_S
    for _ in range(3):
        async with asyncio.timeout(identity.READ_TIMEOUT_S / 5):
            assert (await tokens.principal(key.token)).user == key.kid
            await keys.probe()
    assert len(readings()) == 1
    await keys.close()
    assert readings() == set()


async def test_a_source_that_never_ends_its_reply_does_not_hold_those_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading has a bound in time."""
    monkeypatch.setattr(identity, "READ_TIMEOUT_S", 0.02)

    async def read() -> bytes:
        await asyncio.Event().wait()
        return b""

    async with asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await tokens_by(read, Clock()).principal(Signer(1).token)


ENDLESS = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("reply", ["another place", "no end of it", "one id twice", "an error", "nothing"])
async def test_an_address_that_gives_anything_but_a_good_key_set_changes_nothing(reply: str) -> None:
    """It is followed nowhere and read no further than its bound; the keys known so far go on, and no other comes to count."""
    known, planted = Signer(1), Signer(2)
    asked: list[str] = []
    sent = 0
    good = document(known.public)
    bad = document(known.public, planted.public)
    twice = document(known.public, {**planted.public, "kid": known.kid})
    hostile = False

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        asked.append((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        whole = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
        if not hostile:
            writer.write(whole % (len(good), good))
        elif asked[-1] == "/elsewhere":
            writer.write(whole % (len(bad), bad))
        elif reply == "another place":
            writer.write(
                b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(bad), bad)
            )
        elif reply == "one id twice":
            writer.write(whole % (len(twice), twice))
        elif reply == "an error":
            writer.write(b"HTTP/1.1 500 Oh\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(bad), bad))
        elif reply == "no end of it":
            writer.write(ENDLESS + bad[:-1])
            with contextlib.suppress(ConnectionError):
                while sent < 64 * identity.DOCUMENT_BYTES_MAX:
                    writer.write(b" " * 65_536)
                    await writer.drain()
                    sent += 65_536
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    clock = Clock()
    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        httpx.AsyncClient(trust_env=False, follow_redirects=True) as client,
    ):
        keys = PublishedKeys(keys_at_url(client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"), clock)
        tokens = Tokens(keys, issuer="issuer", audience="tailrace", leeway_s=30)
        await tokens.principal(known.token)
        hostile = True
        clock.now += identity.REFRESH_S
        with pytest.raises(NotAuthenticated) as refused:
            await tokens.principal(planted.token)
        still = await tokens.principal(known.token)

    assert refused.value.metadata["cause"] == "unknown_key"
    assert still.user == known.kid
    assert asked == ["/jwks.json", "/jwks.json"]
    assert sent < 64 * identity.DOCUMENT_BYTES_MAX
