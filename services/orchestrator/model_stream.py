"""What all adapters of the Model port share: limits on silence and size, reading a stream into a draft, and a provider's refusals as ours.

No vendor's format or package is known here; a subclass of `Reading` understands the events of one.
"""

import asyncio
import contextlib
import email.utils
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any

import aiohttp
import httpx2
import msgspec
import orjson

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded, ModelRefused, ModelStalled
from services.orchestrator.domain import Draft, ToolCall
from services.orchestrator.event_bytes import EventBytes

RENEWAL = 0.1
"""The limit on silence is renewed this often, as a share of itself, and longer by as much: a timer per token costs more than its text."""
CONNECTIONS_MAX = 1000
"""One connection a running answer; above it calls would wait for each other without saying so."""
OUTPUT_CHARACTERS_MAX = 8 * 1024 * 1024
"""Text, reasoning and arguments of one call together. Ten times what the largest model writes: only a broken provider sends more."""
RESPONSE_ID_CHARACTERS_MAX = 256
CALLS_MAX = 128
"""Tool calls of one answer. Providers stop far below it."""
BRIEF_BELOW_TOKENS = 8192
"""Reasoning is paid from the same bound as the answer: below this one, the usual effort would leave a model nothing to answer with."""


UNREADABLE = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What the parser raises of bytes that are no event: no JSON or not of this form, no UTF-8, nested without end."""


class Silence:
    """How long a call may say nothing: `first_token_s` until its first output, `stall_s` between two pieces of it."""

    def __init__(self, timeout: asyncio.Timeout, stall_s: float) -> None:
        self._timeout, self._stall_s = timeout, stall_s
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._renew_at = 0.0
        self.finished = False
        """Whether the answer is whole and only the end of its stream is missing. Then silence is no failure."""

    def renew(self) -> None:
        """Output has come: count from now."""
        if (now := self._loop.time()) >= self._renew_at:
            self._timeout.reschedule(now + self._stall_s * (1 + RENEWAL))
            self._renew_at = now + self._stall_s * RENEWAL

    def hurry(self, left_s: float) -> None:
        """Nothing but the end of the stream is awaited, and that not for long."""
        self.finished = True
        self._timeout.reschedule(self._loop.time() + left_s)

    @property
    def over(self) -> bool:
        """Whether the limit has been passed."""
        return self._timeout.expired()

    @property
    def waited_ms(self) -> int:
        return int((self._stall_s if self._renew_at else self._loop.time() - self._began) * 1000)


@contextlib.asynccontextmanager
async def bounded_silence(provider: str, first_token_s: float, stall_s: float) -> AsyncIterator[Silence]:
    """Bound the silence of the block. Raises ModelStalled."""
    silence: Silence | None = None
    try:
        async with asyncio.timeout(first_token_s) as timeout:
            silence = Silence(timeout, stall_s)
            yield silence
    except TimeoutError as error:
        assert silence is not None
        if not silence.finished:
            raise ModelStalled("the provider sent nothing for too long", provider=provider, waited_ms=silence.waited_ms) from error


class Reading:
    """What the events of one stream make of a draft.

    A subclass turns each event into calls of the methods here. What arrived together is passed on together, in its order.
    """

    def __init__(self, provider: str, draft: Draft) -> None:
        self.provider, self.draft = provider, draft
        self.finished = False
        """Whether the answer is over. Some providers say more after that, so that the stream is read to its end if that comes soon."""
        self.whole = False
        """Whether the provider has said that nothing more comes."""
        self.progressed = False
        """Whether output has come since this was last set to False."""
        self.open_calls: dict[str | int, _OpenCall] = {}
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._argued = False
        self._characters = 0

    def read(self, data: bytes) -> None:
        """Take one event in. Raises what the event says, or ModelFailed if it cannot be read."""
        raise NotImplementedError

    @property
    def began(self) -> bool:
        """Whether the provider has produced anything that it may bill."""
        draft = self.draft
        return bool(draft.deltas or self._text or self._thoughts or draft.reasoned or draft.calls or self.open_calls) or (
            draft.input_tokens is not None
        )

    def named(self, model: str | None) -> None:
        """The provider has said which model it is. A snapshot of the one that was asked counts, a file or a deployment behind it does not.

        What is booked has to be found in the price list.
        """
        if model and model.startswith(self.draft.model):
            self.draft.model = model

    def identified(self, response_id: str | None) -> None:
        """The provider has said what it calls the answer; the first word counts."""
        if response_id and not self.draft.response_id:
            self.draft.response_id = response_id[:RESPONSE_ID_CHARACTERS_MAX]

    def write(self, text: str) -> None:
        if self._thoughts:
            self.flush()
        self._text.append(text)
        self.progressed = True

    def think(self, text: str) -> None:
        if self._text:
            self.flush()
        self._thoughts.append(text)
        self.progressed = True

    def begin_call(self, key: str | int, call_id: str, name: str) -> None:
        if len(self.open_calls) + len(self.draft.calls) >= CALLS_MAX:
            raise self._too_much()
        self.open_calls[key] = call = _OpenCall(call_id, name)
        self.draft.called += call.size
        self.progressed = self._argued = True

    def argue(self, key: str | int, piece: str) -> None:
        """More of a call's arguments."""
        if (call := self.open_calls.get(key)) is not None:
            size = len(piece.encode())
            call.pieces.append(piece)
            call.size += size
            self.draft.called += size
            self.progressed = self._argued = True
            self._bound(len(piece))

    def end_call(self, key: str | int, arguments: str | None = None, signature: bytes = b"") -> None:
        """A call is whole. `arguments` goes before what came in pieces."""
        if (call := self.open_calls.pop(key, None)) is not None:
            said = "".join(call.pieces) if arguments is None else arguments
            self.draft.call(ToolCall(call.call_id, call.name, said or "{}", signature), call.size)
            self.progressed = True

    def flush(self) -> None:
        """Pass on what has been taken in."""
        if self._thoughts:
            said, self._thoughts = "".join(self._thoughts), []
            self._bound(len(said))
            self.draft.reason(said)
        if self._text:
            said, deltas, self._text = "".join(self._text), len(self._text), []
            self._bound(len(said))
            self.draft.write(said, deltas)
        if self._argued:
            self._argued = False
            self.draft.on_progress()

    def _bound(self, characters: int) -> None:
        self._characters += characters
        if self._characters > OUTPUT_CHARACTERS_MAX:
            raise self._too_much()

    def _too_much(self) -> ModelFailed:
        return ModelFailed("the provider sent more than any answer may hold", provider=self.provider, cause="too_long")

    def malformed(self) -> ModelFailed:
        return ModelFailed("the provider broke its own format", provider=self.provider, cause="malformed")


class _OpenCall:
    """A call whose arguments are still coming. One that the stream cuts is no call, but what came of it was generated, and is billed."""

    __slots__ = ("call_id", "name", "pieces", "size")

    def __init__(self, call_id: str, name: str) -> None:
        self.call_id, self.name = call_id, name
        self.pieces: list[str] = []
        self.size = len(name.encode())
        """Bytes that came of it."""


CLOSING_S = 0.5
"""How long the end of the stream is waited for after the end of the answer: only then can the connection be used again, and it is there at
once, as a rule."""


PARTING_S = 0.1
"""How long a provider is heard out once it was told that nobody listens: what it has written by then is billed."""


class Incoming:
    """The body of one response while it comes, and our side of its connection."""

    def __init__(self, chunks: AsyncIterable[bytes], response: aiohttp.ClientResponse | None) -> None:
        self._chunks, self._response = chunks, response

    @classmethod
    def of(cls, response: httpx2.Response) -> "Incoming":
        """Of a response of one of the vendors' packages, without the layer that cuts its bytes into equal pieces."""
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return cls(response.stream, _beneath(response.stream))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._chunks)

    def hang_up(self) -> AsyncIterable[bytes] | None:
        """Say that we leave, and return what comes still. None where that cannot be said on one side alone, as through TLS."""
        connection = self._response.connection if self._response is not None else None
        if connection is None or (transport := connection.transport) is None or transport.is_closing() or not transport.can_write_eof():
            return None
        transport.write_eof()
        return self._response.content.iter_any() if self._response is not None else None


def _beneath(stream: Any) -> aiohttp.ClientResponse | None:
    """The response that the vendors' packages wrap, once for reading and once more where they trace; None if one does it otherwise."""
    while stream is not None:
        if isinstance(found := getattr(stream, "_aiohttp_response", None), aiohttp.ClientResponse):
            return found
        stream = getattr(stream, "_async_body", None) or getattr(stream, "_stream", None)
    return None


async def follow(incoming: Incoming, reading: Reading, silence: Silence) -> None:
    """Read a stream to the end of its answer. Raises ModelFailed if it ends before that.

    Cancelled, it closes our side at once, and reads for at most PARTING_S what the provider writes until it closes its own.
    """
    events = EventBytes(reading.provider)
    try:
        try:
            await _listen(incoming, events, reading, silence)
        except asyncio.CancelledError:
            if not (reading.finished or silence.over) and (rest := incoming.hang_up()) is not None:
                with contextlib.suppress(TimeoutError, DomainError, aiohttp.ClientError, OSError):
                    async with asyncio.timeout(PARTING_S):
                        await _listen(rest, events, reading, None)
            raise
        if not reading.finished:
            raise ModelFailed("the provider ended the stream before its end", provider=reading.provider, cause="cut")
    except (aiohttp.ClientError, httpx2.HTTPError, OSError):
        if not reading.finished:  # else there is an answer, whatever becomes of the connection
            raise


async def _listen(chunks: AsyncIterable[bytes], events: EventBytes, reading: Reading, silence: Silence | None) -> None:
    """Read until the provider ends the response. Without `silence` nothing is made of how long it takes."""
    async for chunk in chunks:
        if reading.whole:
            continue
        reading.progressed = False
        try:
            for data in events.feed(chunk):
                reading.read(data)
        except UNREADABLE as error:
            raise reading.malformed() from error
        finally:
            reading.flush()  # also what came just before a failure
        if reading.finished:
            if silence is not None and not silence.finished:
                silence.hurry(CLOSING_S)
            await asyncio.sleep(0)  # who reads along has the last words before they are judged
        elif reading.progressed and silence is not None:
            silence.renew()


# What a provider's refusal means to us.

BUSY_STATUSES = frozenset({429, 529})
KEY_STATUSES = frozenset({401, 402, 403})


def refused(provider: str, status: int, *, busy: bool = False, retry_after_ms: int | None = None, overflow: bool = False) -> DomainError:
    """An HTTP status as the error of ours. The provider's own words may quote the prompt, so they are not passed on.

    `busy` and `overflow` are what the body says besides: that the provider has no room, or the prompt none in the model's context.
    """
    if busy or status in BUSY_STATUSES:
        facts: dict[str, str | int] = {"provider": provider, "status": status}
        if retry_after_ms is not None:
            facts["retry_after_ms"] = retry_after_ms
        return ModelOverloaded("the provider is overloaded or limits us", **facts)
    if status in KEY_STATUSES:
        return ModelMisconfigured("the provider does not accept our key", provider=provider, status=status)
    if 300 <= status < 400:
        return ModelMisconfigured("the provider is at another address", provider=provider, status=status)
    if status == 404:
        return ModelMisconfigured("the provider has no such model for us", provider=provider, status=status)
    if status in (408, 409) or status >= 500:
        return ModelFailed("the provider failed", provider=provider, cause="status", status=status)
    if overflow:
        return ModelRefused("the prompt does not fit into the model's context", provider=provider, status=status, cause="context_window")
    return ModelRefused("the provider refused the request", provider=provider, status=status)


def overloaded(provider: str, *, limited: bool) -> ModelOverloaded:
    """An overload, or a limit of ours, that is told in a stream that began well. A limit has the status it would have had at the begin."""
    if limited:
        return ModelOverloaded("the provider limits us", provider=provider, status=429)
    return ModelOverloaded("the provider is overloaded", provider=provider)


def retry_after_ms(headers: Mapping[str, str]) -> int | None:
    """What the provider asks us to wait; see RFC 9110, section 10.2.3."""
    try:
        if (exact := headers.get("retry-after-ms")) is not None:
            return max(0, int(float(exact)))
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return int(float(value) * 1000)
        return max(0, int((email.utils.parsedate_to_datetime(value).timestamp() - time.time()) * 1000))
    except (ValueError, TypeError, OverflowError):
        return None


def unreachable(provider: str, draft: Draft, error: BaseException) -> ModelFailed:
    """A connection that failed before the response's head. Says in `draft` whether anything can have been sent."""
    draft.sent = not _never_connected(error)
    cause = "reset" if draft.sent else "connect"
    return ModelFailed("the provider cannot be reached", provider=provider, cause=cause)


def broken_off(provider: str) -> ModelFailed:
    """A connection that failed in the middle of the stream."""
    return ModelFailed("the provider broke the connection off", provider=provider, cause="reset")


def _never_connected(error: BaseException) -> bool:
    """Whether the failure came before a connection stood, so that certainly nothing was sent.

    The transport's own class alone tells: the vendors' clients call a server that hangs up a connection that was not made.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# What several vendors' requests have in common.


def arguments_object(call: ToolCall) -> dict[str, Any]:
    """A call's arguments for a format that knows them as an object only. What the model wrote wrong stays readable."""
    try:
        arguments = orjson.loads(call.arguments)
    except orjson.JSONDecodeError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"unreadable": call.arguments}


def sealed(provider: str, content: bytes) -> bytes:
    """What `provider` wants to see again, marked as its own: another one would refuse it."""
    return provider.encode() + b":" + content if content else b""


def unsealed(provider: str, signature: bytes) -> bytes:
    """What `sealed` was given, if it was by the same provider, else nothing."""
    mark = provider.encode() + b":"
    return signature.removeprefix(mark) if signature.startswith(mark) else b""
