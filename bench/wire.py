"""A bare HTTP/1.1 client that stamps when things arrive: the same one for the provider and for Tailrace. It retries nothing."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Self

import orjson

READ_BYTES = 65536
REFUSAL_S = 0.5
"""How long the words of a refusal are waited for."""


class BadAnswer(Exception):
    """An answer that must not be counted: the text holds its head or its end."""


@dataclass(frozen=True)
class Timing:
    """One streamed answer. Milliseconds since the request was written."""

    first_ms: float
    done_ms: float
    body: bytes


@dataclass(frozen=True)
class Call:
    """A request whose answer is a stream, ready to be sent again and again."""

    request: bytes
    first: bytes
    """Bytes that begin the first piece of text."""
    last: bytes
    """Bytes without which the answer did not end well."""


class Line:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def stream(self, call: Call) -> Timing:
        """Send `call` and read its answer to the end. Raises BadAnswer for anything but a whole, good stream."""
        began = time.perf_counter()
        self._writer.write(call.request)
        body, first_ms = b"", 0.0
        while not body.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(READ_BYTES)
            body += data
            if not first_ms and call.first in body:
                first_ms = (time.perf_counter() - began) * 1000
            if not data or not body.startswith(b"HTTP/1.1 200"):
                raise BadAnswer((body + await self._rest()).decode(errors="replace"))
        done_ms = (time.perf_counter() - began) * 1000
        if not first_ms or call.last not in body:
            raise BadAnswer(body[-1000:].decode(errors="replace"))
        return Timing(first_ms, done_ms, body)

    async def _rest(self) -> bytes:
        """What is said of a refusal behind its head."""
        said = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFUSAL_S):
                while data := await self._reader.read(READ_BYTES):
                    said += data
        return said

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


def post(path: str, body: dict[str, object], **headers: str) -> bytes:
    """A whole POST request as bytes. Underscores in header names become hyphens."""
    payload = orjson.dumps(body)
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", f"content-length: {len(payload)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


@dataclass(frozen=True)
class Vendor:
    """One way to a provider: a model that is reached by it, and how the provider itself is asked for a stream."""

    model: str
    path: str
    headers: dict[str, str]
    first: bytes
    last: bytes


VENDORS = {
    "anthropic": Vendor(
        "claude-haiku-5-5",
        "/v1/messages",
        {"x_api_key": "simulated", "anthropic_version": "2023-06-01"},
        b"content_block_delta",
        b"message_stop",
    ),
    "openai_responses": Vendor(
        "gpt-6-luna", "/v1/responses", {"authorization": "Bearer simulated"}, b"response.output_text.delta", b"response.completed"
    ),
    "openai_chat": Vendor("bench-chat", "/v1/chat/completions", {"authorization": "Bearer simulated"}, b'"delta":{"content":"', b"[DONE]"),
    "gemini": Vendor(
        "gemini-3.8-flash",
        "/v1beta/models/gemini-3.8-flash:streamGenerateContent?alt=sse",
        {"x_goog_api_key": "simulated"},
        b'"text":"',
        b"finishReason",
    ),
}
"""By the name of the format."""


def ask_tailrace(token: str, question: str, *, collection: str, cache: str, model: str = "") -> Call:
    body = {
        "question": question,
        "collection": collection,
        "cache": cache,
        "max_output_tokens": 2000,
        **({"model": model} if model else {}),
    }
    request = post("/v1/answers", body, authorization=f"Bearer {token}", accept="text/event-stream")
    return Call(request, b"event: delta", b"event: done")


def ask_provider(vendor: Vendor, prompt: dict[str, object]) -> Call:
    """`prompt` is a request body that was sent to it before."""
    return Call(post(vendor.path, prompt, **vendor.headers), vendor.first, vendor.last)
