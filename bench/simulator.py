"""A model provider that speaks the formats of Anthropic, OpenAI and Gemini over HTTP/1.1, scripted from outside, with true books.

Run `python -m bench.simulator --port 0`; the first line it prints is its port. A bare asyncio protocol with ready-made bytes, so that it is
never what a benchmark measures. What is said lives in `bench.script`, and how each vendor writes it in `bench.dialect_*`; nothing here
knows Tailrace.

    POST   /v1/messages                  Anthropic, stream or whole
    POST   /v1/messages/count_tokens
    POST   /v1/chat/completions          OpenAI, stream or whole
    POST   /v1/responses
    POST   /v1/models/MODEL:streamGenerateContent?alt=sse, :generateContent     Gemini
    PUT    /control/default              Behaviour: how requests are answered that no rule names
    POST   /control/rules                Rule: for requests that contain a text; newest wins
    POST   /control/release              let answers begin that wait for it, those to come too
    DELETE /control                      forget rules, default and records; release what waits
    GET    /control/report               {"totals": …, "requests": [Record …]}, oldest first
    GET    /control/prompts              bodies of the latest requests
"""

import argparse
import asyncio
import collections
import contextlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import httptools
import msgspec
import orjson
import uvloop

from bench import script
from bench.dialect import LAST_CHUNK, Asked, Counts, Dialect, Reason, Refused
from bench.dialect_anthropic import Anthropic
from bench.dialect_gemini import Gemini
from bench.dialect_openai import ChatCompletions, Responses
from bench.script import Behaviour, Piece, Record, Rule

REQUEST_BYTES_MAX = 32 * 1024 * 1024
RECORDS_MAX = 20_000
PROMPTS_MAX = 100
MARKS_MAX, LOOK_BACK = 4, 20
"""Marks a request may have of what is to be kept of its prompt, and how many blocks before one are looked at too."""
BURST_TOKENS_MAX = 64
"""Most tokens in one write when no pace is set."""

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"%b: %b\r\ntransfer-encoding: chunked\r\n\r\n"
)
ANTHROPIC: Dialect = Anthropic()
DIALECTS: tuple[Dialect, ...] = (ANTHROPIC, ChatCompletions(), Responses(), Gemini())
DRIP_S = 0.002


class Provider:
    """The state all connections share: what to do next, and what was done."""

    def __init__(self, seed: str = "simulator") -> None:
        self._seed = seed
        self._numbers = 0
        self._waiting: list[Callable[[], None]] = []
        self.clear()

    def clear(self) -> None:
        """Forget rules, default and records. Requests that still run keep their behaviour and are no longer reported."""
        self.release()
        self._released = False
        self.default = Behaviour()
        self.rules: list[tuple[bytes, Behaviour]] = []
        self.records: collections.deque[Record] = collections.deque(maxlen=RECORDS_MAX)
        self.prompts: collections.deque[bytes] = collections.deque(maxlen=PROMPTS_MAX)
        self._kept: set[bytes] = set()
        self._failed: collections.Counter[Behaviour] = collections.Counter()

    def take(self, dialect: Dialect, asked: Asked, request: dict[str, Any], body: bytes, key: str) -> tuple[Behaviour, Record]:
        """Choose how to answer `request` and open its record."""
        searched = b"%b\n%b\n%b" % (body, key.encode(), asked.model.encode()) if self.rules else b""
        behaviour = next((behaviour for text, behaviour in reversed(self.rules) if text in searched), self.default)
        fault = behaviour.fault
        if behaviour.fail_first and fault != "none":
            self._failed[behaviour] += 1
            if self._failed[behaviour] > behaviour.fail_first:
                behaviour, fault = msgspec.structs.replace(behaviour, fault="none"), "none"
        self._numbers += 1
        record = Record(
            number=self._numbers,
            request_id=script.request_id(self._numbers, self._seed),
            model=asked.model,
            format=dialect.name,
            stream=asked.stream,
            max_tokens=asked.max_tokens,
            fault=fault,
            mark=script.mark_of(body),
            received_at=time.monotonic(),
            input_tokens=script.count_input_tokens(request),
            images=script.count_images(request),
        )
        if behaviour.keeps_above_tokens is not None and fault != "status":
            self._keep(record, dialect.beginnings(request), behaviour.keeps_above_tokens)
        self.records.append(record)
        self.prompts.append(body)
        return behaviour, record

    def _keep(self, record: Record, beginnings: Sequence[tuple[dict[str, Any], bool]], tokens_min: int) -> None:
        """Read as far as something is kept that ends at a mark or LOOK_BACK blocks before it, and write up to the last mark."""
        kept = [orjson.dumps([record.model, beginning]) for beginning, _ in beginnings]
        sizes = [script.count_input_tokens(beginning) for beginning, _ in beginnings]
        marks = [place for place, (_, marked) in enumerate(beginnings) if marked]
        if len(marks) > MARKS_MAX:
            raise Refused(400, f"A maximum of {MARKS_MAX} blocks with cache_control may be provided")
        marks = [place for place in marks if sizes[place] >= tokens_min]
        seen = (back for place in marks for back in range(max(0, place - LOOK_BACK), place + 1) if kept[back] in self._kept)
        record.cached_tokens = max((sizes[place] for place in seen), default=0)
        record.cache_write_tokens = max(0, max((sizes[place] for place in marks), default=0) - record.cached_tokens)
        self._kept.update(kept[place] for place in marks)

    def once_released(self, work: Callable[[], None]) -> None:
        """Do `work` when the answers that wait are let go; at once if they were since the last `clear`."""
        if self._released:
            work()
        else:
            self._waiting.append(work)

    def release(self) -> None:
        """Let go what waits, and what will."""
        self._released, waiting, self._waiting = True, self._waiting, []
        for work in waiting:
            work()

    def report(self) -> dict[str, Any]:
        """Totals and every record."""
        records = list(self.records)
        states = collections.Counter(record.state for record in records)
        return {
            "totals": {
                "requests": len(records),
                "input_tokens": sum(record.input_tokens for record in records),
                "output_tokens": sum(record.output_tokens for record in records),
                **states,
            },
            "requests": [msgspec.to_builtins(record) for record in records],
        }


class Answer:
    """One response being written. Ends by itself, by its fault, or when the client leaves."""

    def __init__(
        self,
        transport: asyncio.Transport,
        dialect: Dialect,
        request: dict[str, Any],
        behaviour: Behaviour,
        record: Record,
        pieces: Sequence[Piece],
        provider: Provider,
    ) -> None:
        self._transport = transport
        self._provider = provider
        self._dialect = dialect
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._behaviour = behaviour
        self._fault = behaviour.fault
        self._record = record
        self._pieces = script.bounded(pieces, behaviour, record.max_tokens)
        self._cut_by_limit = len(self._pieces) < len(pieces)
        record.call_block = min((piece.block for piece in pieces if piece.call is not None), default=0)
        self._received = self._loop.time()
        self._first_at = self._received + behaviour.ttft_ms / 1000
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self.over = False

    @property
    def record(self) -> Record:
        return self._record

    def since_s(self) -> float:
        """Seconds since the request was received."""
        return round(self._loop.time() - self._received, 6)

    def begin(self) -> None:
        if self._fault == "hang":
            return
        if self._fault == "cut_before_first":
            self._end("faulted", close=True)
        elif self._fault == "reset_before_first":
            self._reset()
        elif self._fault == "status":
            self._refuse()
        elif self._behaviour.waits:
            self._provider.once_released(self._go)
        else:
            self._go()

    def _go(self) -> None:
        if self.over:
            return
        if self._record.stream:
            self._head()
            self._at(self._first_at, self._stream)
        else:
            rate = self._behaviour.tokens_per_s
            self._at(self._first_at + (len(self._pieces) / rate if rate else 0), self._whole)

    def pause(self, paused: bool) -> None:
        """The client reads too slowly, or reads again."""
        self._paused = paused
        if not paused and not self.over and self._record.stream and self._timer is None and self._record.head_s is not None:
            self._at(self._loop.time(), self._stream)

    def client_closes(self) -> bool:
        """The client has closed its side. Returns whether it is written to all the same."""
        under_way, sent = self._behaviour.under_way, self._record.output_tokens
        if not self.over and under_way < 0:
            return True
        if not self.over and sent < (upto := min(sent + under_way, len(self._pieces))):
            self._write_tokens(sent, upto)
        self.client_left()
        return False

    def client_left(self) -> None:
        if not self.over:
            self._end("client_closed")

    def _at(self, moment: float, work: Any) -> None:
        self._timer = self._loop.call_at(moment, work)

    def _end(self, state: Any, *, close: bool = False) -> None:
        self.over = True
        self._record.state = state
        self._record.ended_s = self.since_s()
        if self._timer:
            self._timer.cancel()
        if close:
            self._transport.close()

    def _refuse(self) -> None:
        status, record = self._behaviour.status, self._record
        extra = b"" if self._behaviour.retry_after_s is None else b"retry-after: %g\r\n" % self._behaviour.retry_after_s
        self._record.input_tokens = 0
        if self._behaviour.location:
            extra += b"location: %b\r\n" % self._behaviour.location.encode()
        body = self._dialect.refusal(status, f"scripted {status}", record.request_id)
        respond(self._transport, status, body, self._dialect, record.request_id, extra)
        self._end("refused")

    def _reset(self) -> None:
        """Close the socket as a process does that dies: without a goodbye, and with what is unread or unsent lost."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end("faulted")
        self._transport.abort()

    def _head(self) -> None:
        record, dialect = self._record, self._dialect
        record.head_s = self.since_s()
        head = _STREAM_HEAD % (dialect.request_id_header, record.request_id.encode())
        self._transport.write(head + dialect.opening(record, self._counts(), self._request))

    def _counts(self) -> Counts:
        """What is billed so far, as it is told."""
        record, behaviour = self._record, self._behaviour
        if self._fault == "zero_usage":
            return Counts(0, 0, 0, 0, 0)
        thoughts = sum(piece.kind == "thought" for piece in self._pieces[: record.output_tokens]) if behaviour.reasoning else 0
        cached, written = behaviour.cached_tokens + record.cached_tokens, behaviour.cache_write_tokens + record.cache_write_tokens
        return Counts(record.input_tokens, cached, written, record.output_tokens, thoughts)

    def _stream(self) -> None:
        """Write what is due, then plan the next write."""
        self._timer = None
        if self._paused or self.over:
            return
        rate, sent = self._behaviour.tokens_per_s, self._record.output_tokens
        due = 1 + int((self._loop.time() - self._first_at) * rate + 1e-6) if rate else sent + BURST_TOKENS_MAX
        strikes = self._fault in script.STRIKING
        last = min(len(self._pieces), self._behaviour.fault_at) if strikes else len(self._pieces)
        if self._fault == "slow_drip":
            due = sent + 1
        upto = min(max(due, sent), last)
        if upto > sent:
            self._write_tokens(sent, upto)
        if upto == last:
            if strikes:
                self._strike()
            else:
                self._finish()
        elif self._fault == "slow_drip":
            self._at(self._loop.time() + 2 * DRIP_S, self._stream)
        elif rate:
            self._at(self._first_at + upto / rate, self._stream)
        else:
            self._at(self._loop.time(), self._stream)

    def _write_tokens(self, sent: int, upto: int) -> None:
        record = self._record
        payload = b"".join([self._dialect.piece(record, piece) for piece in self._pieces[sent:upto]])
        if self._fault == "slow_drip":
            middle = len(payload) // 2
            self._transport.write(payload[:middle])
            self._loop.call_later(DRIP_S, self._transport.write, payload[middle:])
        else:
            self._transport.write(payload)
        record.output_tokens = upto
        record.last_token_s = self.since_s()
        if record.first_token_s is None:
            record.first_token_s = record.last_token_s

    def _strike(self) -> None:
        if self._fault == "stall_after":
            return
        if self._fault in ("error_in_200", "limit_in_200"):
            told = self._dialect.error_event(self._record, limited=self._fault == "limit_in_200")
            self._transport.write(told + LAST_CHUNK)
        elif self._fault == "malformed":
            self._transport.write(self._dialect.half_an_event + LAST_CHUNK)
        elif self._fault == "end_after":
            self._transport.write(LAST_CHUNK)
        elif self._fault == "reset_after":
            # What was sent has to be on its way first, or a reset takes it along.
            self._loop.call_later(DRIP_S, self._reset)
            return
        self._end("faulted", close=self._fault == "cut_after")

    def _reason(self) -> Reason:
        if self._fault == "refusal":
            return "refusal"
        if self._fault == "context_window":
            return "context_window"
        if self._fault == "max_tokens" or self._cut_by_limit:
            return "max_tokens"
        return "calls" if self._behaviour.calls else "end"

    def _finish(self) -> None:
        if self._fault == "slow_drip":
            self._loop.call_later(2 * DRIP_S, self._close_stream)
        else:
            self._close_stream()

    def _close_stream(self) -> None:
        counts = None if self._fault == "late_usage_missing" else self._counts()
        closing = self._dialect.closing(self._record, self._reason(), self._pieces, counts, self._request)
        if self._fault == "cut_at_end":
            self._transport.write(closing)
            self._end("finished", close=True)
        elif wait_ms := self._behaviour.end_after_ms:
            self._transport.write(closing)
            self._at(self._loop.time() + wait_ms / 1000, self._close_body)
        else:
            self._transport.write(closing + LAST_CHUNK)
            self._end("finished")

    def _close_body(self) -> None:
        if not self.over:
            self._transport.write(LAST_CHUNK)
            self._end("finished")

    def _whole(self) -> None:
        record = self._record
        record.output_tokens = len(self._pieces)
        record.head_s = record.first_token_s = record.last_token_s = self.since_s()
        counts = self._counts()
        if self._fault == "late_usage_missing":
            counts = counts._replace(output=0, thoughts=0)
        body = self._dialect.whole(record, self._reason(), self._pieces, counts)
        respond(self._transport, 200, body, self._dialect, record.request_id)
        self._end("finished")


def respond(
    transport: asyncio.Transport, status: int, body: bytes, dialect: Dialect = ANTHROPIC, request_id: str = "", extra: bytes = b""
) -> None:
    """Write a whole response."""
    if request_id:
        extra += b"%b: %b\r\n" % (dialect.request_id_header, request_id.encode())
    head = b"HTTP/1.1 %d Status\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n" % (status, extra, len(body))
    transport.write(head + body)


class Connection(asyncio.Protocol):
    """One socket of a client: parses requests and answers them one at a time."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer:
            self._answer.client_left()
            self._answer.record.closed_s = self._answer.since_s()

    def eof_received(self) -> bool:
        return bool(self._answer and self._answer.client_closes())

    def pause_writing(self) -> None:
        if self._answer:
            self._answer.pause(True)

    def resume_writing(self) -> None:
        if self._answer:
            self._answer.pause(False)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._url, self._body, self._body_bytes = b"", list[bytes](), 0
        self._headers = dict[bytes, bytes]()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= REQUEST_BYTES_MAX:
            self._body.append(body)

    def on_message_complete(self) -> None:
        method, path = self._parser.get_method(), self._url.partition(b"?")[0]
        body = b"".join(self._body)
        dialect = next((dialect for dialect in DIALECTS if dialect.path.match(path)), ANTHROPIC)
        try:
            if path.startswith(b"/control"):
                respond(self._transport, 200, orjson.dumps(self._control(method, path, body)))
            elif method == b"POST" and dialect.path.match(path):
                key, request = dialect.authorised(self._headers), self._read(body)
                behaviour, record = self._provider.take(dialect, dialect.asked(request, path), request, body, key)
                pieces = script.pieces_of(behaviour, body)
                self._answer = Answer(self._transport, dialect, request, behaviour, record, pieces, self._provider)
                self._answer.begin()
            elif (method, path) == (b"POST", b"/v1/messages/count_tokens"):
                ANTHROPIC.authorised(self._headers)
                counted = script.count_input_tokens(self._read(body))
                respond(self._transport, 200, orjson.dumps({"input_tokens": counted}), ANTHROPIC, script.request_id(0, "count"))
            else:
                raise Refused(404, "there is no such path")
        except Refused as refused:
            name = script.request_id(0, str(refused))
            respond(self._transport, refused.status, dialect.refusal(refused.status, str(refused), name), dialect, name)

    def _read(self, body: bytes) -> dict[str, Any]:
        if self._body_bytes > REQUEST_BYTES_MAX:
            raise Refused(413, "Request exceeds the maximum size")
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise Refused(400, "The request body is not valid JSON") from None
        if not isinstance(request, dict):
            raise Refused(400, "The request body is not an object")
        return request

    def _control(self, method: bytes, path: bytes, body: bytes) -> Any:
        provider = self._provider
        try:
            if (method, path) == (b"PUT", b"/control/default"):
                provider.default = msgspec.json.decode(body, type=Behaviour)
            elif (method, path) == (b"POST", b"/control/rules"):
                rule = msgspec.json.decode(body, type=Rule)
                provider.rules.append((rule.contains.encode(), rule.behaviour))
            elif (method, path) == (b"POST", b"/control/release"):
                provider.release()
            elif (method, path) == (b"DELETE", b"/control"):
                provider.clear()
            elif (method, path) == (b"GET", b"/control/report"):
                return provider.report()
            elif (method, path) == (b"GET", b"/control/prompts"):
                return [orjson.loads(prompt) for prompt in provider.prompts]
            else:
                raise Refused(404, "there is no such control")
        except msgspec.ValidationError as error:
            raise Refused(400, str(error)) from None
        return {}


async def serve(port: int) -> None:
    """Listen on loopback, print the port, and go on until cancelled."""
    provider = Provider()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(provider), "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 = any free one")
    port = parser.parse_args().port
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(port))


if __name__ == "__main__":
    main()
