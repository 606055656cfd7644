"""Answers over a WebSocket: several at once, the same events, admission and problems as over HTTP, as JSON texts.

It decides nothing that a route does not decide: each message is admitted by the rule of its HTTP twin and becomes the same call.

A client says `{"type": "ask" | "resume" | "cancel" | "confirm" | "ping", "request_id"?, …}`. Every text it gets has `type`, `request_id`
and, once it is known, `answer_id`. An ask or resume ends with exactly one `done`, `error`, `cancelled` or, where nothing was left to
resume, `end`.
Leaving is not cancelling: an answer goes on and can be resumed on any connection.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import structlog
from opentelemetry.trace import SpanKind

from services.chassis import telemetry
from services.chassis.errors import AnswerInterrupted, DomainError, NotAllowed, Overloaded, RequestInvalid, Unavailable
from services.chassis.principal import current_principal
from services.chassis.status import unexpected
from services.gateway import bodies, problems, render
from services.gateway.answer_stream import AnswerStream
from services.gateway.bodies import AskFrame, CancelFrame, ConfirmFrame, PingFrame, ResumeFrame
from services.gateway.exchange import JSON_BYTES_MAX, ClientLeft, Exchange, Receive, Send, too_large
from services.gateway.kit import Kit
from services.gateway.limits import LimitReached, Metered
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator

log = structlog.get_logger(__name__)

Word = CancelFrame | ConfirmFrame

CALLS_MAX = 16
"""Asks and resumes under way on one socket. Words about them, `cancel` and `confirm`, have as much room again: else nobody could end what
fills the socket."""
BYTES_MAX = 24 * 1024 * 1024
"""Of all messages under way on one socket: room for one as large as any may be, and for small ones beside it."""
LAST_WORDS_S = 1.0
"""How long the end of a socket may take that is closed from our side."""
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013


def as_request(scope: dict[str, Any], send: Send) -> tuple[dict[str, Any], Send]:
    """A handshake as the GET that it is: what is sent as an HTTP response refuses it (ASGI extension `websocket.http.response`)."""

    async def sent(message: Any) -> None:
        kind: str = message["type"]
        await send({**message, "type": f"websocket.{kind}"} if kind.startswith("http.") else message)

    return {**scope, "method": "GET"}, sent


async def converse(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/answers/ws"""
    exchange.query(())
    refuse_foreign_page(exchange)
    if kit.draining.is_set():
        raise Unavailable("the server is stopping; connect again", dependency="gateway")
    with kit.sockets.held(current_principal()):
        receive, send = await exchange.upgrade()
        await _Conversation(exchange, kit, receive, send).run()


def refuse_foreign_page(exchange: Exchange) -> None:
    """A browser sends its cookie from any page: then the page must be one of ours. Raises NotAllowed.

    A credential in a header was put there on purpose, which no page of others can do.
    """
    if exchange.header("authorization") or exchange.header("x-api-key"):
        return
    if urlsplit(exchange.header("origin")).netloc.lower() != exchange.header("host").lower():
        raise NotAllowed("a WebSocket with a cookie must come from a page of this server", needs="same origin")


class _Conversation:
    """One open socket."""

    def __init__(self, exchange: Exchange, kit: Kit, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._kit = kit
        self._receive = receive
        self._raw_send = send
        self._calls: set[asyncio.Task[None]] = set()
        self._bytes = 0
        """Of the messages under way."""
        self._turn = asyncio.Lock()
        self._stalled = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Serve until the client leaves, takes nothing for too long, or the process has drained."""
        reading = asyncio.create_task(self._read(), name="socket-reader")
        stalled = asyncio.create_task(self._stalled.wait(), name="socket-stall")
        drained = asyncio.create_task(self._drained(), name="socket-drain")
        code = 0
        try:
            await asyncio.wait([reading, stalled, drained], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                code = TRY_AGAIN_LATER if stalled.done() else SERVICE_RESTART
        except asyncio.CancelledError:
            self._stopping, code = True, SERVICE_RESTART  # the grace is over: each call says so with its last word
            raise
        finally:
            tasks = [reading, stalled, drained, *self._calls]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if code:
                reason = "service restart" if code == SERVICE_RESTART else "too slow"
                with contextlib.suppress(Exception):
                    await self._raw_send({"type": "websocket.close", "code": code, "reason": reason})

    async def _read(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            await self._take(message.pop("text", None))  # while the next is waited for, nothing here keeps this one

    async def _take(self, text: str | None) -> None:
        """Begin what a message asks for, or say why not."""
        try:
            async with self._kit.counting_unreadable():
                if text is None:
                    raise RequestInvalid("a message is binary", field="message", bound="JSON as text")
                frame, size = _frame_in(text)
        except DomainError as error:
            await self._say_error(error, _tags(_request_id_in(text)))
            return
        if isinstance(frame, PingFrame):
            await self._say("pong", _tags(frame.request_id))
        elif len(self._calls) >= (2 * CALLS_MAX if isinstance(frame, Word) else CALLS_MAX):
            refusal = Overloaded(f"at most {CALLS_MAX} calls at once on a socket", bound=CALLS_MAX, retry_after_ms=1000)
            await self._say_error(refusal, _tags(frame.request_id))
        elif self._bytes + size > BYTES_MAX:
            refusal = Overloaded(f"at most {BYTES_MAX} bytes of asks at once on a socket", bound_bytes=BYTES_MAX, retry_after_ms=1000)
            await self._say_error(refusal, _tags(frame.request_id))
        else:
            self._begin(frame, size)

    def _begin(self, frame: AskFrame | ResumeFrame | Word, size: int) -> None:
        def ended(call: asyncio.Task[None]) -> None:
            self._calls.discard(call)
            self._bytes -= size

        self._bytes += size
        call = asyncio.create_task(self._serve(frame), name="socket-call")
        self._calls.add(call)
        call.add_done_callback(ended)

    async def _drained(self) -> None:
        """Say that the end is near, then let what is under way end."""
        await self._kit.draining.wait()
        await self._say("draining", _tags(""), {"detail": "the server is stopping; connect again and resume"})
        while self._calls:
            await asyncio.wait(self._calls)

    async def _serve(self, frame: AskFrame | ResumeFrame | Word) -> None:
        """Answer one message. Whatever happens, its last word is said exactly once while somebody listens."""
        name = type(frame).__struct_config__.tag
        tags = [_tags(frame.request_id, "" if isinstance(frame, AskFrame) else frame.answer_id)]
        gauge = self._kit.metrics.streams.labels("socket")
        gauge.inc()
        end = "left"
        try:
            with telemetry.span(f"WEBSOCKET {name}", kind=SpanKind.SERVER):
                try:
                    await self._act(frame, tags)
                    end = "done"
                except ClientLeft:
                    return
                except asyncio.CancelledError:
                    if self._stopping:
                        end = "error"
                        with contextlib.suppress(ClientLeft, TimeoutError):
                            async with asyncio.timeout(LAST_WORDS_S):
                                await self._say_error(AnswerInterrupted("the server is stopping; resume the stream"), tags[0])
                    raise
                except DomainError as error:
                    end = "error"
                    await self._say_error(error, tags[0])
                except Exception as error:
                    end = "error"
                    log.exception("socket_call_failed_unexpectedly", error=type(error).__name__, request_id=self._exchange.request_id)
                    await self._say_error(unexpected(telemetry.current_trace_id()), tags[0])
        except ClientLeft:
            end = "left"
        finally:
            gauge.dec()
            self._kit.metrics.stream_ends.labels("socket", end).inc()

    async def _act(self, frame: AskFrame | ResumeFrame | Word, tags: list[bytes]) -> None:
        """`tags[0]` is kept up to date with the answer's id."""
        kit, admit = self._kit, self._exchange.admit
        peer, arrived_at_s = kit.backends.orchestrator, time.monotonic()
        if kit.draining.is_set() and not isinstance(frame, Word):
            raise Unavailable("the server is stopping; connect again", dependency="gateway")
        match frame:
            case AskFrame():
                with kit.shedding.entered() as prepared:
                    await admit("POST", b"/v1/answers")
                    async with kit.counting_unreadable():
                        if not frame.stream:
                            raise RequestInvalid("over a WebSocket every answer is streamed", field="stream", bound="true")
                        request = frame.message(frame.idempotency_key)
                    async with kit.answering(request, frame.deadline_ms, arrived_at_s) as (admission, timeout_s):
                        async with AnswerStream(peer, request, timeout_s=timeout_s) as events:
                            if not await self._relay(Metered(events, admission, prepared), frame.request_id, tags, admission.headers):
                                raise AnswerInterrupted("the stream ended before it was done")
            case ResumeFrame():
                await admit("GET", b"/v1/answers/-/events")
                resume = orchestrator.ResumeAnswerRequest(answer_id=frame.answer_id, after_sequence=frame.after)
                async with kit.resuming(resume) as events:
                    if not await self._relay(events, frame.request_id, tags):
                        await self._say("end", tags[0])
            case CancelFrame():
                await admit("POST", b"/v1/answers/-/cancel")
                reply = await kit.cancel(orchestrator.CancelAnswerRequest(answer_id=frame.answer_id))
                await self._say("cancel", tags[0], {"was_running": reply.was_running})
            case ConfirmFrame():
                await admit("POST", b"/v1/answers/-/tool-calls/-")
                word = orchestrator.ConfirmToolCallRequest(answer_id=frame.answer_id, call_id=frame.call_id, allowed=frame.allowed)
                said = await peer.unary(peer.stub.ConfirmToolCall, word, idempotent=False)
                await self._say("confirm", tags[0], {"call_id": frame.call_id, "was_waiting": said.was_waiting})

    async def _relay(
        self, events: AsyncIterator[Any], request_id: str, tags: list[bytes], limits: Sequence[tuple[bytes, bytes]] = ()
    ) -> bool:
        """Send events up to the receipt, the first with `limits`. False if there were none at all.

        Raises AnswerInterrupted if they stop before the receipt.
        """
        any_came = False
        async for event in events:
            first = b""
            if not any_came:
                any_came, tags[0], first = True, _tags(request_id, event.answer_id), _limits(limits)
            await self._send(render.answer_frame(event, tags[0] + first))
            if render.is_done(event):
                return True
        if any_came:
            raise AnswerInterrupted("the stream ended before it was done")
        return False

    async def _say(self, kind: str, tags: bytes, data: dict[str, Any] | None = None) -> None:
        rest = b"" if data is None else b',"data":%s' % orjson.dumps(data)
        await self._send((b'{"type":"%s",%s%s}' % (kind.encode(), tags, rest)).decode())

    async def _say_error(self, error: DomainError, tags: bytes) -> None:
        self._kit.metrics.refusals.labels(error.reason or error.code).inc()
        problem = problems.document(error, trace_id=telemetry.current_trace_id(), request_id=self._exchange.request_id)
        if isinstance(error, LimitReached):
            tags += _limits(error.headers)
        await self._say("cancelled" if error.code == "CANCELLED" else "error", tags, problem)

    async def _send(self, text: str) -> None:
        """Send one text, in turn. Raises ClientLeft if the client is gone or takes nothing for the stall time, which ends the socket."""
        if not text:
            return
        async with self._turn:
            if self._stalled.is_set():
                raise ClientLeft
            try:
                async with asyncio.timeout(self._kit.timing.write_stall_s):
                    await self._raw_send({"type": "websocket.send", "text": text})
            except TimeoutError:
                self._stalled.set()
                raise ClientLeft from None
            except OSError:
                raise ClientLeft from None


def _tags(request_id: str, answer_id: str = "") -> bytes:
    """The members that say what a text belongs to."""
    answer = b'"answer_id":%s,' % orjson.dumps(answer_id) if answer_id else b""
    return answer + b'"request_id":%s' % orjson.dumps(request_id)


def _limits(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The member that says how the limits stand, by the names that headers have over HTTP; nothing if no limit was asked."""
    return b',"limits":%s' % orjson.dumps({name.decode(): value.decode() for name, value in headers}) if headers else b""


def _frame_in(text: str) -> tuple[bodies.Frame, int]:
    """A message and its size. Raises RequestInvalid, or PayloadTooLarge as an ask over HTTP: only pictures make one large."""
    content = text.encode()
    if len(content) > JSON_BYTES_MAX and b'"images"' not in content[:JSON_BYTES_MAX]:
        raise too_large(JSON_BYTES_MAX, "message")
    return cast(bodies.Frame, bodies.parse(content, cast(type[bodies.Body], bodies.Frame))), len(content)


def _request_id_in(text: str | None) -> str:
    """The `request_id` of a message that could not be read as what it should be; empty if there is none that can be given back."""
    try:
        message = orjson.loads(text if text and len(text) <= JSON_BYTES_MAX else "")
    except ValueError:
        return ""
    found = message.get("request_id") if isinstance(message, dict) else None
    return found if isinstance(found, str) and len(found) <= bodies.FRAME_ID_LENGTH_MAX else ""
