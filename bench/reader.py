"""A strict reader of answers over bare sockets that resumes what breaks: what a careful client does, with every byte kept for comparison.

It judges nothing but the format; what an answer should have been, the scenarios decide.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import orjson

from tests.suite import TERMINALS

READ_BYTES = 65_536
RESUMES_MAX = 200
STUCK_MAX = 3
"""How often in a row an interrupted answer is asked for again without getting anything new."""
RESUME_PAUSE_S = 0.05
AWAY_MAX, AWAY_PAUSE_S = 30, 0.2
"""How often an accepted answer is asked for again while a part is away. 503 may also be how the answer ended, which no wait heals."""


@dataclass(frozen=True, slots=True)
class Block:
    """One event as its bytes."""

    raw: bytes
    name: str
    id: int | None
    at: float
    """When it arrived, monotonic seconds."""

    @property
    def data(self) -> Any:
        return orjson.loads(next(line[6:] for line in self.raw.split(b"\n") if line.startswith(b"data: ")))


class Reply:
    """One response while it arrives: its status, and the events whose last byte is here."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        """What was not read as an event: a document, or the beginning of an event that was cut."""
        self.blocks: list[Block] = []
        self.whole = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        self.whole = True

    def on_body(self, body: bytes) -> None:
        self.body += body
        if self.headers.get("content-type") == "text/event-stream":
            *ended, rest = bytes(self.body).split(b"\n\n")
            self.body = bytearray(rest)
            now = time.monotonic()
            self.blocks.extend(_block(raw, now) for raw in ended if not raw.startswith(b":"))

    @property
    def reason(self) -> str:
        """The reason of the problem this is. Empty for anything else."""
        with contextlib.suppress(orjson.JSONDecodeError):
            found = orjson.loads(bytes(self.body))
            return str(found.get("reason", "")) if isinstance(found, dict) else ""
        return ""


def _block(raw: bytes, now: float) -> Block:
    lines = dict(line.partition(b": ")[::2] for line in raw.split(b"\n"))
    assert b"data" in lines, f"a block without data: {raw!r}"
    number = lines.get(b"id")
    return Block(raw, lines.get(b"event", b"message").decode(), None if number is None else int(number), now)


def request(method: str, path: str, token: str, body: dict[str, Any] | None = None, **headers: str) -> bytes:
    """A whole request as bytes. Underscores in header names become hyphens."""
    payload = b"" if body is None else orjson.dumps(body)
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {token}", f"content-length: {len(payload)}"]
    if payload:
        lines.append("content-type: application/json")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


async def fetch(
    port: int, message: bytes, *, on_blocks: Callable[[Reply], None] | None = None, bytes_max: int | None = None, timeout_s: float = 60.0
) -> Reply:
    """Send one request on a connection of its own and read what comes back, until it is whole or the connection ends.

    With `bytes_max` the reader itself leaves after so many bytes. Raises OSError if nobody listens; a broken response is returned as far as
    it came. Cancelled, it leaves by RST.
    """
    reply = Reply()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    read_bytes = 0
    try:
        writer.write(message)
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                while not reply.whole and (bytes_max is None or read_bytes < bytes_max):
                    left = READ_BYTES if bytes_max is None else min(READ_BYTES, bytes_max - read_bytes)
                    data = await reader.read(left)
                    if not data:
                        break
                    read_bytes += len(data)
                    known = len(reply.blocks)
                    reply.feed(data)
                    if on_blocks and len(reply.blocks) > known:
                        on_blocks(reply)
    finally:
        writer.transport.abort()
    return reply


@dataclass
class Read:
    """One answer, joined over as many connections as it took."""

    blocks: list[Block] = field(default_factory=list)
    connections: int = 0
    refusal: Reply | None = None
    """The reply that was no stream and cannot be tried again, if that is how it ended."""
    torn: bool = False
    """It was given up without a terminal event."""

    @property
    def answer_id(self) -> str:
        return str(self.blocks[0].data["answer_id"]) if self.blocks and self.blocks[0].name == "accepted" else ""

    @property
    def end(self) -> str:
        """The terminal event's name. Empty if there is none."""
        return self.blocks[-1].name if self.blocks and self.blocks[-1].name in TERMINALS else ""

    @property
    def reason(self) -> str:
        """Why it failed, as its problem says."""
        if self.refusal is not None:
            return self.refusal.reason
        return str(self.blocks[-1].data.get("reason", "")) if self.end in ("error", "cancelled") else ""

    @property
    def last_id(self) -> int:
        return max((block.id for block in self.blocks if block.id is not None), default=0)

    @property
    def text(self) -> str:
        return "".join(block.data["text"] for block in self.blocks if block.name == "delta")

    @property
    def joined(self) -> bytes:
        return b"\n\n".join(block.raw for block in self.blocks)

    def gaps_and_repeats(self) -> tuple[int, int]:
        """Numbers that are missing, and numbers that came more than once."""
        numbers = [block.id for block in self.blocks if block.id is not None]
        return len(set(range(1, max(numbers, default=0) + 1)) - set(numbers)), len(numbers) - len(set(numbers))


Headers = Callable[[int], dict[str, str]]
"""Headers of a connection, by its number within one answer from 0."""


def no_headers(_: int) -> dict[str, str]:
    return {}


async def read_answer(
    ports: Sequence[int],
    token: str,
    body: dict[str, Any],
    *,
    key: str,
    headers: Headers = no_headers,
    on_blocks: Callable[[Reply], None] | None = None,
    resumes_max: int = RESUMES_MAX,
    read: Read | None = None,
) -> Read:
    """Ask, and come back after every break at the next of `ports`, until a terminal event.

    Before the answer's id is known it asks again with the same Idempotency-Key, if there is one. An `error` that says the connection was
    what broke (ANSWER_INTERRUPTED, UNAVAILABLE) is resumed; if resuming keeps saying so, that is the end. `read` can be given to look at
    what is there so far.
    """
    read = read if read is not None else Read()
    tried = stuck = away = 0
    while tried <= resumes_max:
        port = ports[tried % len(ports)]
        extra = headers(tried)
        tried += 1
        known = read.last_id
        if read.answer_id:
            message = request("GET", f"/v1/answers/{read.answer_id}/events", token, last_event_id=str(known), **extra)
        else:
            message = request("POST", "/v1/answers", token, body, **({"idempotency_key": key} if key else {}), **extra)
        try:
            reply = await fetch(port, message, on_blocks=on_blocks)
        except (OSError, TimeoutError):
            await asyncio.sleep(RESUME_PAUSE_S)
            continue
        read.connections += 1
        if reply.status == 0:
            await asyncio.sleep(RESUME_PAUSE_S)
            continue
        if reply.status != 200:
            away += reply.status == 503
            if reply.status == 503 and read.answer_id and away < AWAY_MAX:
                await asyncio.sleep(AWAY_PAUSE_S)
                continue
            if reply.status != 204:
                read.refusal = reply
            return read
        read.blocks.extend(reply.blocks)
        if read.end == "error" and read.answer_id and read.reason in ("ANSWER_INTERRUPTED", "UNAVAILABLE"):
            # What broke may have been the stream, not the answer. If coming back brings nothing new, it was the answer.
            stuck = 0 if len(reply.blocks) > 1 else stuck + 1
            if stuck < STUCK_MAX:
                read.blocks.pop()
                await asyncio.sleep(RESUME_PAUSE_S)
                continue
        if read.end:
            return read
    read.torn = True
    return read
