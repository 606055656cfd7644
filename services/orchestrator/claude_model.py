"""Claude through the `anthropic` package: its client for auth, transport and errors, our own reading of the stream's bytes.

Typed objects per token would cost three times as much as all the rest of the token's way (DESIGN 13). Nothing is retried here.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import anthropic
import httpx2
import msgspec
import orjson

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelRefused
from services.orchestrator.domain import Candidate, Draft, Message, Prompt
from services.orchestrator.model_stream import (
    BRIEF_BELOW_TOKENS,
    CONNECTIONS_MAX,
    Incoming,
    Reading,
    arguments_object,
    bounded_silence,
    broken_off,
    follow,
    overloaded,
    refused,
    retry_after_ms,
    sealed,
    unreachable,
    unsealed,
)
from services.orchestrator.provider_keys import ProviderKeys
from services.orchestrator.schema_subsets import is_closed, one_type_each, references_end

PROVIDER = "anthropic"

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


class _OutputDetails(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens_details: _OutputDetails | None = None


class _Message(msgspec.Struct):
    id: str = ""
    model: str = ""
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    signature: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Block(msgspec.Struct):
    type: str = ""
    id: str = ""
    name: str = ""
    data: str = ""


class _Error(msgspec.Struct):
    type: str = ""


class _Event(msgspec.Struct):
    """Every event of the stream; only what is read of it. Unknown types and fields pass by."""

    type: str
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


class ClaudeReading(Reading):
    """The Messages API's events.

    Claude wants to see its own thinking again, word for word, with the calls that came of it: the blocks go into the signature of
    the first call after them.
    """

    def __init__(self, provider: str, draft: Draft) -> None:
        super().__init__(provider, draft)
        self._thinking: dict[int, dict[str, str]] = {}

    def read(self, data: bytes) -> None:
        event = _decode(data)
        if event.type == "content_block_delta":
            if event.delta is not None:
                self._more(event.index, event.delta)
        elif event.type == "content_block_start":
            self._begin(event)
        elif event.type == "content_block_stop":
            if event.index in self.open_calls:
                self.end_call(event.index, signature=self._thoughts_so_far())
        elif event.type == "message_start":
            self._start(event)
        elif event.type == "message_delta":
            self._finish(event)
        elif event.type == "message_stop":
            self.whole = self.finished = True
        elif event.type == "error":
            self.draft.rejected = not self.began
            raise _failed_midway(self.provider, event)

    def _more(self, index: int, delta: _Delta) -> None:
        if delta.text:
            self.write(delta.text)
        elif delta.partial_json:
            self.argue(index, delta.partial_json)
        elif delta.thinking:
            if (block := self._thinking.get(index)) is not None:
                block["thinking"] += delta.thinking
            self.think(delta.thinking)
        elif delta.signature and (block := self._thinking.get(index)) is not None:
            block["signature"] += delta.signature

    def _begin(self, event: _Event) -> None:
        block = event.content_block
        if block is None:
            return
        if block.type == "tool_use":
            self.begin_call(event.index, block.id, block.name)
        elif block.type == "thinking":
            self._thinking[event.index] = {"type": "thinking", "thinking": "", "signature": ""}
        elif block.type == "redacted_thinking":
            self._thinking[event.index] = {"type": "redacted_thinking", "data": block.data}

    def _thoughts_so_far(self) -> bytes:
        blocks, self._thinking = list(self._thinking.values()), {}
        return sealed(self.provider, orjson.dumps(blocks)) if blocks else b""

    def _start(self, event: _Event) -> None:
        if event.message is None:
            return
        self.named(event.message.model)
        self.identified(event.message.id)
        if event.message.usage is not None:
            self._count(event.message.usage)

    def _finish(self, event: _Event) -> None:
        if event.delta is not None and event.delta.stop_reason:
            self.draft.finish_reason = FINISH_REASONS.get(event.delta.stop_reason, "")
        if event.usage is not None:
            self._count(event.usage)
            self.draft.usage_is_final = event.usage.output_tokens is not None

    def _count(self, usage: _Usage) -> None:
        """Take over what is reported. Later counts replace earlier ones, as they are totals; an absent one changes nothing, a 0 is a 0."""
        draft = self.draft
        if usage.input_tokens is not None:
            draft.input_tokens = max(0, usage.input_tokens)
        if usage.output_tokens is not None:
            draft.output_tokens = max(0, usage.output_tokens)
        if usage.output_tokens_details is not None and usage.output_tokens_details.thinking_tokens is not None:
            draft.reasoning_tokens = max(0, usage.output_tokens_details.thinking_tokens)
        if usage.cache_read_input_tokens is not None:
            draft.cache_read_tokens = max(0, usage.cache_read_input_tokens)
        if usage.cache_creation_input_tokens is not None:
            draft.cache_write_tokens = max(0, usage.cache_creation_input_tokens)
        if usage.cache_creation is not None and usage.cache_creation.ephemeral_1h_input_tokens is not None:
            draft.cache_write_1h_tokens = max(0, usage.cache_creation.ephemeral_1h_input_tokens)


class ClaudeModel:
    """Calls the Messages API. One instance, one pool of connections. Close it with `aclose`.

    `keys` are tried in the order of `ProviderKeys`. `provider` is the name it goes by in errors, prices and the capability table.
    """

    def __init__(
        self, keys: Sequence[str], base_url: str, *, connect_s: float, first_token_s: float, stall_s: float, provider: str = PROVIDER
    ) -> None:
        self._provider, self._address = provider, httpx2.URL(base_url).host
        self._first_token_s, self._stall_s = first_token_s, stall_s
        limits = httpx2.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=100, keepalive_expiry=30)
        # Silence is judged by output and not by bytes, so the transport's own read limit only has to be no shorter.
        timeout = httpx2.Timeout(connect=connect_s, read=max(first_token_s, stall_s) + 5, write=30, pool=connect_s)
        # The key goes to the address it was given for: no redirect is followed.
        self._transport = anthropic.DefaultAioHttpClient(limits=limits, timeout=timeout, follow_redirects=False)
        self._keys = ProviderKeys(len(keys))
        self._clients = [
            anthropic.AsyncAnthropic(api_key=key, base_url=base_url, max_retries=0, timeout=timeout, http_client=self._transport)
            for key in keys
        ]

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent, draft.model, draft.address = True, candidate.model, self._address
        key = self._keys.take()
        try:
            async with bounded_silence(self._provider, self._first_token_s, self._stall_s) as silence:
                request = _request(self._provider, prompt, candidate, output_tokens_max, draft)
                async with self._clients[key].messages.with_streaming_response.create(**request) as answer:
                    draft.request_id = answer.request_id or ""
                    await follow(Incoming.of(answer.http_response), ClaudeReading(self._provider, draft), silence)
        except DomainError as error:
            self._keys.note(key, error)
            raise
        except anthropic.APIStatusError as error:
            draft.rejected = True
            draft.request_id = error.request_id or ""
            failure = _refused(self._provider, error)
            self._keys.note(key, failure)
            raise failure from error
        except anthropic.APIConnectionError as error:
            raise unreachable(self._provider, draft, error) from error
        except anthropic.AnthropicError as error:
            raise ModelFailed("the provider's client failed", provider=self._provider, cause=type(error).__name__) from error
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise broken_off(self._provider) from error


_KEPT = {"cache_control": {"type": "ephemeral"}}
"""Marks a block up to which the provider may keep the prompt. There may be four; a beginning that is too short is not kept, nor billed."""


def _ends_kept(prompt: Prompt) -> set[int]:
    """Messages that end a beginning which is asked again: the history, by the next question; all of it, by the next round of tools.

    A round is found by where the one before it ended, since the provider looks back 20 blocks only and a round may have more. Without
    tools nothing follows that would read the question again, and writing costs 1.25 times.
    """
    ends = {prompt.history_messages - 1} if prompt.history_messages else set()
    if prompt.tools:
        asked = [n for n in range(prompt.history_messages, len(prompt.messages)) if prompt.messages[n].role != "assistant"]
        ends.update(asked[-2:])
    return ends


def _request(provider: str, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": candidate.model,
        "max_tokens": output_tokens_max,
        # The same for every question, tools before it.
        "system": [{"type": "text", "text": prompt.system, **_KEPT}],
        "messages": _messages(provider, prompt),
        "stream": True,
        "extra_headers": {"accept-encoding": "identity"},  # the bytes are read as they come
    }
    if prompt.tools:
        request["tools"] = [
            {"name": tool.name, "description": tool.description, "input_schema": dict(tool.input_schema)} for tool in prompt.tools
        ]
    output: dict[str, Any] = {}
    if "schema" in candidate.capabilities and (schema := _bindable(prompt.output_schema)) is not None:
        output["format"] = {"type": "json_schema", "schema": schema}
    if draft.on_reasoning is not None and "reasoning" in candidate.capabilities:
        request["thinking"] = {"type": "adaptive", "display": "summarized"}
        if output_tokens_max < BRIEF_BELOW_TOKENS:
            output["effort"] = draft.effort = "low"
    if output:
        request["output_config"] = output
    return request


def _bindable(schema: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The schema as Claude can be bound to it: what the API does not know of it stands in descriptions. None if it has no such form."""
    if schema is None or not is_closed(schema, all_required=False):
        return None
    try:
        made = anthropic.transform_schema(one_type_each(schema))
    except (ValueError, TypeError, AttributeError, AssertionError):  # what the package raises of schemas that it cannot transform
        return None
    return made if references_end(made) else None


def _messages(provider: str, prompt: Prompt) -> list[dict[str, Any]]:
    ends, made = _ends_kept(prompt), []
    for number, message in enumerate(prompt.messages):
        one = _message(provider, message)
        if not one["content"]:
            continue
        if number in ends:
            blocks = [{"type": "text", "text": one["content"]}] if isinstance(one["content"], str) else one["content"]
            blocks[-1] |= _KEPT
            one["content"] = blocks
        made.append(one)
    return made


def _message(provider: str, message: Message) -> dict[str, Any]:
    if message.role == "tool":
        results = [
            {"type": "tool_result", "tool_use_id": result.call_id, "content": result.text, "is_error": result.failed}
            for result in message.results
        ]
        return {"role": "user", "content": results}
    if not (message.images or message.calls):
        return {"role": message.role, "content": message.text}
    blocks: list[dict[str, Any]] = [
        {"type": "image", "source": {"type": "base64", "media_type": image.media_type, "data": base64.b64encode(image.data).decode()}}
        for image in message.images
    ]
    said = [{"type": "text", "text": message.text}] if message.text else []
    for number, call in enumerate(message.calls):
        if own := unsealed(provider, call.signature):  # what it thought goes before all that came of it
            blocks += orjson.loads(own)
        if number == 0:
            blocks += said
        blocks.append({"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments_object(call)})
    if not message.calls:
        blocks += said
    return {"role": message.role, "content": blocks}


def _failed_midway(provider: str, event: _Event) -> DomainError:
    """The error inside a stream that began well: its HTTP status was 200, so only the body tells."""
    kind = event.error.type if event.error is not None else ""
    if kind in ("overloaded_error", "rate_limit_error"):
        return overloaded(provider, limited=kind == "rate_limit_error")
    if kind in ("authentication_error", "permission_error", "billing_error"):
        return ModelMisconfigured("the provider does not accept our key", provider=provider)
    if kind == "invalid_request_error":
        return ModelRefused("the provider refused the request", provider=provider)
    return ModelFailed("the provider failed", provider=provider, cause=kind or "error")


def _refused(provider: str, error: anthropic.APIStatusError) -> DomainError:
    return refused(
        provider,
        error.status_code,
        busy=error.type in ("overloaded_error", "rate_limit_error"),
        retry_after_ms=retry_after_ms(error.response.headers),
        overflow="prompt is too long" in error.message,
    )
