"""Claude through the `anthropic` package: its client for auth, transport and errors, our own reading of the stream's bytes.

Typed objects per token would cost three times as much as all the rest of the token's way (DESIGN 13). Nothing is retried here.
"""

import asyncio
import email.utils
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import anthropic
import httpx2
import msgspec

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded, ModelRefused, ModelStalled
from services.orchestrator.domain import Candidate, Draft, Prompt

PROVIDER = "anthropic"
EVENT_BYTES_MAX = 1024 * 1024
RENEWAL = 0.1
"""The limit on silence is renewed this often, as a share of itself, and longer by as much: a timer per token costs more than its text."""
CONNECTIONS_MAX = 1000
"""One connection a running answer; above it calls would wait for each other without saying so."""

FINISH_REASONS = {
    "end_turn": "end_turn",
    "max_tokens": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_use": "tool_use",
    "refusal": "refusal",
    "model_context_window_exceeded": "context_window",
}
"""Claude's stop reasons as ours. Any other, `pause_turn` among them, means that the answer is not whole."""


class _CacheCreation(msgspec.Struct):
    ephemeral_1h_input_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None


class _Message(msgspec.Struct):
    model: str = ""
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    stop_reason: str | None = None


class _Error(msgspec.Struct):
    type: str = ""


class _Event(msgspec.Struct):
    """Every event of the stream; only what is read of it. Unknown types and fields pass by."""

    type: str
    delta: _Delta | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


class EventBytes:
    """Cuts a stream's bytes into the data of its events, whatever the chunks; see the HTML standard, server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of every event that `chunk` completes. Raises ModelFailed if one grows without end."""
        text = self._rest + chunk if self._rest else chunk
        if b"\r" in text:
            keep = b"\r" if text.endswith(b"\r") else b""  # its \n may be in the next chunk
            text = text[: len(text) - len(keep)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + keep
        *blocks, self._rest = text.split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise ModelFailed("the provider sent an event without end", provider=PROVIDER, cause="malformed")
        for block in blocks:
            data = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield data[0] if len(data) == 1 else b"\n".join(data)


class ClaudeModel:
    """Calls the Messages API. One instance, one pool of connections. Close it with `aclose`."""

    def __init__(self, api_key: str, base_url: str, *, connect_s: float, first_token_s: float, stall_s: float) -> None:
        self._first_token_s, self._stall_s = first_token_s, stall_s
        limits = httpx2.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=100, keepalive_expiry=30)
        # Silence is judged below, by text and not by bytes, so the transport's own read limit only has to be no shorter.
        timeout = httpx2.Timeout(connect=connect_s, read=max(first_token_s, stall_s) + 5, write=30, pool=connect_s)
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key,
            base_url=base_url,
            max_retries=0,
            timeout=timeout,
            http_client=anthropic.DefaultAioHttpClient(limits=limits, timeout=timeout),
        )

    async def aclose(self) -> None:
        await self._client.close()

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent, draft.model = True, candidate.model
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._first_token_s) as silence:
                await self._stream(prompt, candidate, output_tokens_max, draft, silence)
        except TimeoutError as error:
            waited_ms = int((time.monotonic() - began if not draft.deltas else self._stall_s) * 1000)
            raise ModelStalled("the provider sent nothing for too long", provider=PROVIDER, waited_ms=waited_ms) from error
        except anthropic.APIStatusError as error:
            draft.rejected = True
            draft.request_id = error.request_id or ""
            raise _refused(error) from error
        except anthropic.APIConnectionError as error:
            draft.sent = not _never_connected(error)
            cause = "connect" if not draft.sent else "reset"
            raise ModelFailed("the provider cannot be reached", provider=PROVIDER, cause=cause) from error
        except anthropic.AnthropicError as error:
            raise ModelFailed("the provider's client failed", provider=PROVIDER, cause=type(error).__name__) from error
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise ModelFailed("the provider broke the connection off", provider=PROVIDER, cause="reset") from error

    async def _stream(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft, silence: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        async with self._client.messages.with_streaming_response.create(**_request(prompt, candidate, output_tokens_max)) as answer:
            response = answer.http_response
            draft.request_id = answer.request_id or ""
            events, whole, renew_at = EventBytes(), False, 0.0
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            async for chunk in response.stream:  # what `aiter_raw` reads, without the layer that cuts it into equal pieces
                written: list[str] = []
                try:
                    for data in events.feed(chunk):
                        event = _read(data)
                        if event.type == "content_block_delta":
                            if event.delta is not None and event.delta.text:
                                written.append(event.delta.text)
                            if (now := loop.time()) >= renew_at:
                                silence.reschedule(now + self._stall_s * (1 + RENEWAL))
                                renew_at = now + self._stall_s * RENEWAL
                        elif event.type == "message_start":
                            _start(draft, event)
                        elif event.type == "message_delta":
                            _finish(draft, event)
                        elif event.type == "message_stop":
                            whole = True
                        elif event.type == "error":
                            draft.rejected = not (draft.deltas or written) and draft.input_tokens is None
                            raise _failed_midway(event)
                finally:
                    if written:  # what arrived together leaves together, also what came just before a failure
                        draft.write("".join(written), len(written))
                if whole:
                    break
            if not whole:
                raise ModelFailed("the provider ended the stream before its end", provider=PROVIDER, cause="cut")


def _request(prompt: Prompt, candidate: Candidate, output_tokens_max: int) -> dict[str, Any]:
    return {
        "model": candidate.model,
        "max_tokens": output_tokens_max,
        # The stable prefix, the same for every question: the provider may keep it.
        "system": [{"type": "text", "text": prompt.system, "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": message.role, "content": message.text} for message in prompt.messages],
        "stream": True,
        "extra_headers": {"accept-encoding": "identity"},  # the bytes are read as they come
    }


def _read(data: bytes) -> _Event:
    try:
        return _decode(data)
    except msgspec.MsgspecError as error:
        raise ModelFailed("the provider broke its own format", provider=PROVIDER, cause="malformed") from error


def _start(draft: Draft, event: _Event) -> None:
    if event.message is None:
        return
    draft.model = event.message.model or draft.model
    if event.message.usage is not None:
        _count(draft, event.message.usage)


def _finish(draft: Draft, event: _Event) -> None:
    if event.delta is not None and event.delta.stop_reason:
        draft.finish_reason = FINISH_REASONS.get(event.delta.stop_reason, "")
    if event.usage is not None:
        _count(draft, event.usage)
        draft.usage_is_final = event.usage.output_tokens is not None


def _count(draft: Draft, usage: _Usage) -> None:
    """Take over what is reported. Later counts replace earlier ones, as they are totals; an absent one changes nothing, a 0 is a 0."""
    if usage.input_tokens is not None:
        draft.input_tokens = max(0, usage.input_tokens)
    if usage.output_tokens is not None:
        draft.output_tokens = max(0, usage.output_tokens)
    if usage.cache_read_input_tokens is not None:
        draft.cache_read_tokens = max(0, usage.cache_read_input_tokens)
    if usage.cache_creation_input_tokens is not None:
        draft.cache_write_tokens = max(0, usage.cache_creation_input_tokens)
    if usage.cache_creation is not None and usage.cache_creation.ephemeral_1h_input_tokens is not None:
        draft.cache_write_1h_tokens = max(0, usage.cache_creation.ephemeral_1h_input_tokens)


def _failed_midway(event: _Event) -> DomainError:
    """The error inside a stream that began well: its HTTP status was 200, so only the body tells."""
    kind = event.error.type if event.error is not None else ""
    if kind in ("overloaded_error", "rate_limit_error"):
        return ModelOverloaded("the provider is overloaded", provider=PROVIDER)
    if kind in ("authentication_error", "permission_error", "billing_error"):
        return ModelMisconfigured("the provider does not accept our key", provider=PROVIDER)
    if kind == "invalid_request_error":
        return ModelRefused("the provider refused the request", provider=PROVIDER)
    return ModelFailed("the provider failed", provider=PROVIDER, cause=kind or "error")


def _refused(error: anthropic.APIStatusError) -> DomainError:
    """An HTTP status as the error of ours. The provider's own words may quote the prompt, so they are not passed on."""
    status: int = error.status_code
    if status in (429, 529) or error.type in ("overloaded_error", "rate_limit_error"):
        facts: dict[str, str | int] = {"provider": PROVIDER}
        if (wait_ms := _retry_after_ms(error.response.headers)) is not None:
            facts["retry_after_ms"] = wait_ms
        return ModelOverloaded("the provider is overloaded or limits us", **facts)
    if status in (401, 402, 403):
        return ModelMisconfigured("the provider does not accept our key", provider=PROVIDER, status=status)
    if status in (408, 409) or status >= 500:
        return ModelFailed("the provider failed", provider=PROVIDER, cause="status", status=status)
    return ModelRefused("the provider refused the request", provider=PROVIDER, status=status)


def _retry_after_ms(headers: Any) -> int | None:
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
    except (ValueError, TypeError):
        return None


def _never_connected(error: BaseException) -> bool:
    """Whether the failure came before a connection stood, so that certainly nothing was sent."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | httpx2.ConnectTimeout):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
