"""A model provider that speaks Anthropic's Messages format over HTTP/1.1, scripted from outside, and keeps books of what it really sent.

Run `python -m bench.simulator --port 0`; the first line it prints is its port. A bare asyncio protocol with ready-made bytes, so that it is
never what a benchmark measures. What is said lives in `bench.script`; nothing here knows Tailrace.

    POST   /v1/messages                  stream or whole
    POST   /v1/messages/count_tokens
    PUT    /control/default              Behaviour: how requests are answered that no rule names
    POST   /control/rules                Rule: for requests that contain a text; newest wins
    DELETE /control                      forget rules, default and records
    GET    /control/report               {"totals": …, "requests": [Record …]}, oldest first
    GET    /control/prompts              bodies of the latest requests
"""

import argparse
import asyncio
import collections
import contextlib
import time
from typing import Any

import httptools
import msgspec
import orjson
import uvloop

from bench import script
from bench.script import Behaviour, Record, Rule

REQUEST_BYTES_MAX = 32 * 1024 * 1024
RECORDS_MAX = 20_000
PROMPTS_MAX = 100
BURST_TOKENS_MAX = 64
"""Most tokens in one write when no pace is set."""

_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"request-id: %b\r\ntransfer-encoding: chunked\r\n\r\n"
)
DRIP_S = 0.002


class Provider:
    """The state all connections share: what to do next, and what was done."""

    def __init__(self, seed: str = "simulator") -> None:
        self._seed = seed
        self._numbers = 0
        self.clear()

    def clear(self) -> None:
        """Forget rules, default and records. Requests that still run keep their behaviour and are no longer reported."""
        self.default = Behaviour()
        self.rules: list[tuple[bytes, Behaviour]] = []
        self.records: collections.deque[Record] = collections.deque(maxlen=RECORDS_MAX)
        self.prompts: collections.deque[bytes] = collections.deque(maxlen=PROMPTS_MAX)
        self._failed: collections.Counter[Behaviour] = collections.Counter()

    def take(self, request: dict[str, Any], body: bytes) -> tuple[Behaviour, Record]:
        """Choose how to answer `request` and open its record."""
        behaviour = next((behaviour for text, behaviour in reversed(self.rules) if text in body), self.default)
        fault = behaviour.fault
        if behaviour.fail_first and fault != "none":
            self._failed[behaviour] += 1
            if self._failed[behaviour] > behaviour.fail_first:
                behaviour, fault = msgspec.structs.replace(behaviour, fault="none"), "none"
        self._numbers += 1
        record = Record(
            number=self._numbers,
            request_id=script.request_id(self._numbers, self._seed),
            model=request["model"],
            stream=bool(request.get("stream")),
            max_tokens=request["max_tokens"],
            fault=fault,
            mark=script.mark_of(body),
            received_at=time.monotonic(),
            input_tokens=script.count_input_tokens(request),
        )
        self.records.append(record)
        self.prompts.append(body)
        return behaviour, record

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

    def __init__(self, transport: asyncio.Transport, behaviour: Behaviour, record: Record, tokens: list[str]) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._behaviour = behaviour
        self._fault = behaviour.fault
        self._record = record
        self._tokens = tokens[: record.max_tokens]
        self._cut_by_limit = len(tokens) > record.max_tokens
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
        elif self._fault == "status":
            self._refuse()
        elif self._record.stream:
            self._head()
            self._at(self._first_at, self._stream)
        else:
            rate = self._behaviour.tokens_per_s
            self._at(self._first_at + (len(self._tokens) / rate if rate else 0), self._whole)

    def pause(self, paused: bool) -> None:
        """The client reads too slowly, or reads again."""
        self._paused = paused
        if not paused and not self.over and self._record.stream and self._timer is None and self._fault != "hang":
            self._at(self._loop.time(), self._stream)

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
        status = self._behaviour.status
        kind = script.ERROR_TYPES.get(status, "api_error")
        extra = b"" if self._behaviour.retry_after_s is None else b"retry-after: %g\r\n" % self._behaviour.retry_after_s
        self._record.input_tokens = 0
        respond(
            self._transport, status, script.error_body(kind, f"scripted {kind}", self._record.request_id), self._record.request_id, extra
        )
        self._end("refused")

    def _head(self) -> None:
        record = self._record
        self._record.head_s = self.since_s()
        begun = 0 if self._fault == "zero_usage" else 1
        start = script.event("message_start", {"message": script.message(record, "", None, self._usage(begun))})
        self._transport.write(_STREAM_HEAD % record.request_id.encode() + script.chunk(start) + script.BLOCK_START)

    def _usage(self, output_tokens: int) -> dict[str, Any]:
        if self._fault == "zero_usage":
            return script.usage(0, 0)
        return script.usage(self._record.input_tokens, output_tokens)

    def _stream(self) -> None:
        """Write what is due, then plan the next write."""
        self._timer = None
        if self._paused or self.over:
            return
        rate, sent = self._behaviour.tokens_per_s, self._record.output_tokens
        due = 1 + int((self._loop.time() - self._first_at) * rate + 1e-6) if rate else sent + BURST_TOKENS_MAX
        strikes = self._fault in ("cut_after", "end_after", "stall_after", "error_in_200", "malformed")
        last = min(len(self._tokens), self._behaviour.fault_at) if strikes else len(self._tokens)
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
        payload = b"".join(map(script.delta, self._tokens[sent:upto]))
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
        if self._fault == "error_in_200":
            data = {"error": {"type": "overloaded_error", "message": "Overloaded"}}
            self._transport.write(script.chunk(script.event("error", data)) + script.LAST_CHUNK)
        elif self._fault == "malformed":
            self._transport.write(script.HALF_AN_EVENT + script.LAST_CHUNK)
        elif self._fault == "end_after":
            self._transport.write(script.LAST_CHUNK)
        self._end("faulted", close=self._fault == "cut_after")

    def _stop_reason(self) -> str:
        if self._fault in ("refusal", "max_tokens"):
            return self._fault
        if self._fault == "context_window":
            return "model_context_window_exceeded"
        return "max_tokens" if self._cut_by_limit else "end_turn"

    def _finish(self) -> None:
        data: dict[str, Any] = {"delta": {"stop_reason": self._stop_reason(), "stop_sequence": None}}
        if self._fault != "late_usage_missing":
            data["usage"] = self._usage(self._record.output_tokens)
        if self._fault == "slow_drip":
            self._loop.call_later(2 * DRIP_S, self._close_stream, data)
        else:
            self._close_stream(data)

    def _close_stream(self, data: dict[str, Any]) -> None:
        self._transport.write(
            script.chunk(script.BLOCK_STOP + script.event("message_delta", data) + script.MESSAGE_STOP) + script.LAST_CHUNK
        )
        self._end("finished")

    def _whole(self) -> None:
        record = self._record
        record.output_tokens = len(self._tokens)
        record.head_s = record.first_token_s = record.last_token_s = self.since_s()
        spent = self._usage(record.output_tokens)
        if self._fault == "late_usage_missing":
            spent = {"input_tokens": record.input_tokens, "output_tokens": 0}
        body = orjson.dumps(script.message(record, "".join(self._tokens), self._stop_reason(), spent))
        respond(self._transport, 200, body, record.request_id)
        self._end("finished")


def respond(transport: asyncio.Transport, status: int, body: bytes, request_id: str = "", extra: bytes = b"") -> None:
    """Write a whole response."""
    if request_id:
        extra += b"request-id: %b\r\n" % request_id.encode()
    head = b"HTTP/1.1 %d Status\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n" % (status, extra, len(body))
    transport.write(head + body)


class Refused(Exception):
    """A request the provider does not accept."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


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
        self._header_names = set[bytes]()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_names.add(name.lower())

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= REQUEST_BYTES_MAX:
            self._body.append(body)

    def on_message_complete(self) -> None:
        method, path = self._parser.get_method(), self._url.partition(b"?")[0]
        body = b"".join(self._body)
        try:
            if path.startswith(b"/control"):
                respond(self._transport, 200, orjson.dumps(self._control(method, path, body)))
            elif (method, path) == (b"POST", b"/v1/messages"):
                request = self._request(body)
                behaviour, record = self._provider.take(request, body)
                self._answer = Answer(self._transport, behaviour, record, script.tokens_of(behaviour, body))
                self._answer.begin()
            elif (method, path) == (b"POST", b"/v1/messages/count_tokens"):
                counted = script.count_input_tokens(self._request(body, limit=False))
                respond(self._transport, 200, orjson.dumps({"input_tokens": counted}), script.request_id(0, "count"))
            else:
                raise Refused(404, "there is no such path")
        except Refused as refused:
            kind = script.ERROR_TYPES[refused.status]
            name = script.request_id(0, str(refused))
            respond(self._transport, refused.status, script.error_body(kind, str(refused), name), name)

    def _request(self, body: bytes, *, limit: bool = True) -> dict[str, Any]:
        if not self._header_names & {b"x-api-key", b"authorization"}:
            raise Refused(401, "x-api-key header is required")
        if b"anthropic-version" not in self._header_names:
            raise Refused(400, "anthropic-version: header is required")
        if self._body_bytes > REQUEST_BYTES_MAX:
            raise Refused(413, "Request exceeds the maximum size")
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise Refused(400, "The request body is not valid JSON") from None
        if not isinstance(request, dict):
            raise Refused(400, "The request body is not an object")
        wanted = {"model": str, "messages": list, **({"max_tokens": int} if limit else {})}
        for field, kind in wanted.items():
            if not isinstance(request.get(field), kind) or not request[field]:
                raise Refused(400, f"{field}: Field required")
        return request

    def _control(self, method: bytes, path: bytes, body: bytes) -> Any:
        provider = self._provider
        try:
            if (method, path) == (b"PUT", b"/control/default"):
                provider.default = msgspec.json.decode(body, type=Behaviour)
            elif (method, path) == (b"POST", b"/control/rules"):
                rule = msgspec.json.decode(body, type=Rule)
                provider.rules.append((rule.contains.encode(), rule.behaviour))
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
