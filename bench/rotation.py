"""`make bench-streams ARGS=rotation`: the issuer's keys change again and again under load, beside strangers who make up key ids.

The issuer is ours: its key set is served over HTTP, to each gateway under a path of its own, so that who read it how often is seen here.
"""

import asyncio
import base64
import collections
import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from bench.ground import TENANTS, USER, Bar, Ground, Outcome
from bench.reader import fetch, request
from bench.script import Behaviour
from services.gateway.identity import READ_PAUSE_S, READ_TIMEOUT_S
from services.local.issuer import Issuer

USERS, STRANGERS = 4, 4
STRANGER_PAUSE_S, REFUSED_PAUSE_S = 0.01, 0.05
ENOUGH = 2 * USERS
"""Requests of good tokens in each phase of a rotation: the users turn from gateway to gateway."""
REFRESH_S = 60.0
"""Shorter than by default, so that every withdrawn key is seen to end."""
LATE_S = READ_TIMEOUT_S + 2.0
"""A withdrawn key may go on for the refresh, until the readiness poll notices that it is due, and for the reading itself."""


class Signer:
    """One of the issuer's keys, and a token that it signed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.token = Issuer(folder).mint(USER, TENANTS[0], ["user"])
        self.public = public_keys(folder)
        self.in_flight = 0


def public_keys(folder: Path) -> list[dict[str, Any]]:
    """The key set of the development issuer that lives in `folder`."""
    return list(json.loads((folder / "dev-jwks.json").read_text())["keys"])


class KeySet:
    """What the issuer publishes, and when it was read by whom."""

    def __init__(self, always: list[dict[str, Any]]) -> None:
        self._always = always
        self._document = b""
        self.read_at: dict[str, list[float]] = collections.defaultdict(list)
        """By the path that was asked for."""

    def publish(self, *signers: Signer) -> None:
        """Replace the set by the keys of these, beside those that are always there."""
        self._document = json.dumps({"keys": [*self._always, *(key for signer in signers for key in signer.public)]}).encode()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    def url(self, reader: str) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/{reader}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.read_at[head.split(b" ", 2)[1].decode().removeprefix("/")].append(time.monotonic())
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(self._document), self._document))
            await writer.drain()
        writer.close()


async def key_rotations(ground: Ground, n: int, pause_s: float = READ_PAUSE_S, refresh_s: float = REFRESH_S) -> Outcome:
    """`n` rotations as docs/identity.md tells an operator, `pause_s` after each publication; users and strangers never stop meanwhile."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(ttft_ms=5, tokens=8, tokens_per_s=400))
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailrace-keys-")))
        keys = await stack.enter_async_context(KeySet(public_keys(ground.suite.folder)))
        signers = (Signer(folder / str(number)) for number in itertools.count())
        old = next(signers)
        keys.publish(old)
        times = {"TAILRACE_JWKS_PAUSE_S": str(pause_s), "TAILRACE_JWKS_REFRESH_S": str(refresh_s)}
        sources = {gateway: {"TAILRACE_JWKS_FILE": "", "TAILRACE_JWKS_URL": keys.url(gateway)} for gateway in ground.suite.gateways}
        await stack.enter_async_context(ground.gateways_with(lambda gateway: {**sources[gateway], **times}))
        load = _Load(ground, old)
        withdrawn: list[asyncio.Task[int]] = []
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(load.user(number)) for number in range(USERS)]
            workers += [group.create_task(load.stranger(number)) for number in range(STRANGERS)]
            for _ in range(n):
                new = next(signers)
                keys.publish(old, new)
                await asyncio.sleep(pause_s)
                load.good = [old, new]
                await load.go_on()
                load.good = [new]
                await load.go_on()
                await load.ended(old)
                keys.publish(new)
                withdrawn.append(group.create_task(_accepted(ground, old, refresh_s + LATE_S)))
                old = new
            ended = time.monotonic()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            # Without strangers nobody asks for a reading but the refresh.
            last_good = await _accepted(ground, old, 0.0)
            keys.publish(next(signers))
            withdrawn.append(group.create_task(_accepted(ground, old, refresh_s + LATE_S)))
    readings = {gateway: [at for at in keys.read_at[gateway] if began <= at <= ended] for gateway in ground.suite.gateways}
    # One at each end, and one that was begun before and came here late.
    allowed = 2 + int((ended - began) / pause_s)
    gaps = [later - earlier for at in readings.values() for earlier, later in itertools.pairwise(at)]
    return Outcome(
        "key rotation",
        n,
        ground.seed,
        [
            Bar("good tokens refused with 401", load.answered[401], 0),
            Bar("good tokens served", load.answered[200], 2 * n * ENOUGH, at_least=True),
            Bar("withdrawn keys' tokens accepted", sum(task.result() for task in withdrawn), 0),
            Bar("gateways that knew the key withdrawn last", last_good, len(readings), at_least=True),
            Bar("made-up key ids not refused with 401", load.strangers.total() - load.strangers[401], 0),
            Bar(f"most readings of a gateway in {ended - began:.0f} s", max(len(at) for at in readings.values()), allowed),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {
            "answers": dict(load.answered),
            "made-up key ids": load.strangers.total(),
            "readings": {gateway: len(at) for gateway, at in readings.items()},
            "least time between two": f"{min(gaps, default=0.0):.2f} s",
        },
    )


async def _accepted(ground: Ground, signer: Signer, after_s: float) -> int:
    """How many gateways still accept a token of this key then."""
    await asyncio.sleep(after_s)
    return sum([(await fetch(port, request("GET", "/v1/models", signer.token))).status == 200 for port in ground.ports])


def _header(kid: str) -> str:
    """The first part of a token that names this key."""
    return base64.urlsafe_b64encode(json.dumps({"alg": "EdDSA", "typ": "JWT", "kid": kid}).encode()).rstrip(b"=").decode()


class _Load:
    """Users whose tokens are good, and strangers whose tokens name keys that nobody has."""

    def __init__(self, ground: Ground, first: Signer) -> None:
        self._ground = ground
        self._numbers = itertools.count()
        self.good = [first]
        self.answered: collections.Counter[int] = collections.Counter()
        """Questions by the status of their reply."""
        self.strangers: collections.Counter[int] = collections.Counter()

    async def user(self, number: int) -> None:
        for turn in itertools.count(number):
            signer = self.good[next(self._numbers) % len(self.good)]
            _, body = self._ground.question()
            signer.in_flight += 1
            try:
                reply = await fetch(self._ground.turned(turn)[0], request("POST", "/v1/answers", signer.token, body))
            finally:
                signer.in_flight -= 1
            self.answered[reply.status] += 1
            if reply.status != 200:
                await asyncio.sleep(REFUSED_PAUSE_S)

    async def stranger(self, number: int) -> None:
        with tempfile.TemporaryDirectory(prefix="tailrace-stranger-") as folder:
            claims = Issuer(Path(folder)).mint(USER, TENANTS[0], ["user"]).partition(".")[2]
        for turn in itertools.count(number):
            token = f"{_header(f'made-up-{number}-{turn}')}.{claims}"
            self.strangers[(await fetch(self._ground.turned(turn)[0], request("GET", "/v1/models", token))).status] += 1
            await asyncio.sleep(STRANGER_PAUSE_S)

    async def go_on(self) -> None:
        """Return when good tokens were served some more at every gateway."""
        enough = self.answered[200] + self.answered[401] + ENOUGH
        while self.answered[200] + self.answered[401] < enough:  # noqa: ASYNC110 - the users themselves are what is waited for
            await asyncio.sleep(0.01)

    async def ended(self, signer: Signer) -> None:
        """Return when no request with this key's token is under way."""
        while signer.in_flight:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


SCENARIOS: dict[str, tuple[Callable[[Ground, int], Any], int]] = {"rotation": (key_rotations, 50)}
"""By the name it is asked for, with the full n."""
