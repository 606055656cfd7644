"""Gemini through the `google-genai` package: its client for auth, transport and errors, our own reading of the stream's bytes.

The package has no public door to those bytes: two calls that its own `generate_content_stream` is made of are used instead, which the
contract suite holds to the pinned version. Nothing is retried here.
"""

import base64
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from google import genai
from google.genai import errors, types

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelRefused
from services.orchestrator.domain import Candidate, Draft, Message, Prompt, ToolCall
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

PROVIDER = "gemini"

FINISH_REASONS = {
    "STOP": "end_turn",
    "MAX_TOKENS": "max_tokens",
    **dict.fromkeys(
        (
            "SAFETY",
            "RECITATION",
            "LANGUAGE",
            "BLOCKLIST",
            "PROHIBITED_CONTENT",
            "SPII",
            "IMAGE_SAFETY",
            "IMAGE_PROHIBITED_CONTENT",
            "IMAGE_RECITATION",
            "ESCALATION",
            "MODEL_ARMOR",
        ),
        "refusal",
    ),
}
"""Gemini's finish reasons as ours. Any other means that the answer is not whole."""
BROKEN_OUTPUT = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "TOO_MANY_TOOL_CALLS"})
"""The model has written what Gemini itself cannot read. Another try may go better."""
UNSEEN_TOKENS_PER_S = 100
"""A call comes only whole. How much of one was written when we left is told by the time alone, at about the pace of these models."""
NO_SIGNATURE = base64.b64encode(b"skip_thought_signature_validator").decode()
"""Stands with a call that another model has made: Gemini 3 refuses a call without a signature, and documents this one for the purpose."""


class _FunctionCall(msgspec.Struct):
    name: str = ""
    id: str | None = None
    args: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, rename="camel"):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: _FunctionCall | None = None


class _Content(msgspec.Struct):
    parts: list[_Part] | None = None


class _Answer(msgspec.Struct, rename="camel"):
    content: _Content | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, rename="camel"):
    prompt_token_count: int | None = None
    tool_use_prompt_token_count: int | None = None
    cached_content_token_count: int | None = None
    candidates_token_count: int | None = None
    thoughts_token_count: int | None = None
    total_token_count: int | None = None


class _Feedback(msgspec.Struct, rename="camel"):
    block_reason: str | None = None


class _Error(msgspec.Struct):
    code: int = 0
    status: str = ""


class _Chunk(msgspec.Struct, rename="camel"):
    """Every chunk of the stream; only what is read of it. Unknown fields pass by."""

    candidates: list[_Answer] | None = None
    usage_metadata: _Usage | None = None
    prompt_feedback: _Feedback | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class GeminiReading(Reading):
    """The chunks of a stream. Nothing but the end of the stream follows the chunk with the finish reason, as a rule."""

    def __init__(self, provider: str, draft: Draft, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(provider, draft)
        self._clock = clock
        self._heard_at = clock()

    def left(self, output_tokens_max: int) -> None:
        """The stream was left, or cut, before the end of an answer that may call tools: estimate what had not been sent of it."""
        if not self.finished and not self.draft.rejected:
            known = self.draft.tokens_heard
            written = max(int((self._clock() - self._heard_at) * UNSEEN_TOKENS_PER_S), 0 if known else 1)
            self.draft.unseen = min(written, max(0, output_tokens_max - known))

    def read(self, data: bytes) -> None:
        chunk, draft = _decode(data), self.draft
        self._heard_at = self._clock()
        if chunk.error is not None:
            draft.rejected = not self.began
            raise _failed_midway(self.provider, chunk.error)
        if chunk.response_id and not draft.request_id:
            draft.request_id = chunk.response_id
        self.named(chunk.model_version)
        self.identified(chunk.response_id)
        broken = False
        for answer in chunk.candidates or ():
            if answer.content is not None:
                for part in answer.content.parts or ():
                    self._more(part)
            if answer.finish_reason:
                broken = broken or answer.finish_reason in BROKEN_OUTPUT
                self._finish(answer.finish_reason)
        if chunk.prompt_feedback is not None and chunk.prompt_feedback.block_reason:
            self.finished, draft.finish_reason = True, "refusal"
        if chunk.usage_metadata is not None:
            self._count(chunk.usage_metadata)
        if broken:  # only now: what it wrote is billed, and this chunk alone says how much
            raise ModelFailed("the model wrote a call that cannot be read", provider=self.provider, cause="malformed_call")

    def _more(self, part: _Part) -> None:
        if part.function_call is not None:
            called = part.function_call
            number = len(self.draft.calls)
            self.begin_call(number, called.id or f"{self.draft.request_id or 'call'}-{number}", called.name)
            signature = sealed(self.provider, (part.thought_signature or "").encode())
            arguments = bytes(called.args).decode()
            self.end_call(number, "" if arguments == "null" else arguments, signature)
        elif part.text:
            if part.thought:
                self.think(part.text)
            else:
                self.write(part.text)

    def _finish(self, reason: str) -> None:
        self.finished = True
        ours = FINISH_REASONS.get(reason, "")
        self.draft.finish_reason = "tool_use" if ours == "end_turn" and self.draft.calls else ours

    def _count(self, usage: _Usage) -> None:
        """Take over what is reported, always totals. Thoughts are output, cached tokens are part of the prompt's; zeros are left out."""
        draft = self.draft
        prompt = (usage.prompt_token_count or 0) + (usage.tool_use_prompt_token_count or 0)
        if usage.prompt_token_count is not None:
            cached = max(0, usage.cached_content_token_count or 0)
            draft.input_tokens, draft.cache_read_tokens = max(0, prompt - cached), cached
        spoken, thought = usage.candidates_token_count, usage.thoughts_token_count
        if spoken is None and thought is None and (draft.deltas or self._text or draft.calls):
            if usage.total_token_count is None:
                return  # left out, although it can hardly be zero
            spoken = usage.total_token_count - prompt
        draft.output_tokens = max(0, (spoken or 0) + (thought or 0))
        draft.reasoning_tokens = max(0, thought or 0)
        draft.usage_is_final = self.finished


class _Connector(aiohttp.TCPConnector):
    """Bounds the wait for a connection, for which the package has no setting of its own."""

    def __init__(self, connect_s: float) -> None:
        super().__init__(limit=CONNECTIONS_MAX, keepalive_timeout=30)
        self._connect_s = connect_s

    async def connect(self, req: Any, traces: Any, timeout: aiohttp.ClientTimeout) -> Any:
        bounded = aiohttp.ClientTimeout(timeout.total, self._connect_s, timeout.sock_read, self._connect_s)
        return await super().connect(req, traces, bounded)


class GeminiModel:
    """Calls `streamGenerateContent` of the Gemini API. One instance, one pool of connections. Close it with `aclose`.

    `keys` are tried in the order of `ProviderKeys`. `provider` is the name it goes by in errors, prices and the capability table. Must be
    made while an event loop runs.
    """

    def __init__(
        self, keys: Sequence[str], base_url: str, *, connect_s: float, first_token_s: float, stall_s: float, provider: str = PROVIDER
    ) -> None:
        self._provider, self._address = provider, urllib.parse.urlsplit(base_url).hostname or ""
        self._first_token_s, self._stall_s = first_token_s, stall_s
        self._session = aiohttp.ClientSession(connector=_Connector(connect_s), auto_decompress=False)
        self._keys = ProviderKeys(len(keys))
        self._clients = [
            genai.Client(
                vertexai=False,
                api_key=key,
                http_options=types.HttpOptions(
                    base_url=base_url,
                    aiohttp_client=self._session,
                    # The key goes to the address it was given for.
                    async_client_args={"allow_redirects": False},
                    # Named, or the package asks once more by itself, up to ten seconds after a connection that failed.
                    retry_options=types.HttpRetryOptions(attempts=1),
                    headers={"accept-encoding": "identity"},  # the bytes are read as they come
                ),
            )
            for key in keys
        ]

    async def aclose(self) -> None:
        await self._session.close()

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent, draft.model, draft.address = True, candidate.model, self._address
        key, answered = self._keys.take(), False
        try:
            async with bounded_silence(self._provider, self._first_token_s, self._stall_s) as silence:
                body = _request(self._provider, prompt, candidate, output_tokens_max, draft)
                client = self._clients[key]._api_client
                request = client._build_request("post", f"models/{candidate.model}:streamGenerateContent?alt=sse", body)
                response = (await client._async_request(request, stream=True)).response_stream
                assert isinstance(response, aiohttp.ClientResponse)
                answered = True
                async with response:
                    reading = GeminiReading(self._provider, draft)
                    try:
                        await follow(Incoming(response.content.iter_any(), response), reading, silence)
                    finally:
                        if prompt.tools and not silence.over:
                            reading.left(output_tokens_max)
        except DomainError as error:
            self._keys.note(key, error)
            raise
        except errors.APIError as error:
            draft.rejected = True
            failure = _refused(self._provider, error)
            self._keys.note(key, failure)
            raise failure from error
        except (aiohttp.ClientError, OSError) as error:
            raise (broken_off(self._provider) if answered else unreachable(self._provider, draft, error)) from error


def _request(provider: str, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> dict[str, Any]:
    settings: dict[str, Any] = {"maxOutputTokens": output_tokens_max}
    if prompt.output_schema is not None and "schema" in candidate.capabilities:
        settings |= {"responseMimeType": "application/json", "responseJsonSchema": dict(prompt.output_schema)}
    if "reasoning" in candidate.capabilities:
        thinking: dict[str, Any] = {"includeThoughts": draft.on_reasoning is not None}
        if output_tokens_max < BRIEF_BELOW_TOKENS:
            thinking["thinkingLevel"] = draft.effort = "low"
        settings["thinkingConfig"] = thinking
    request: dict[str, Any] = {
        # First and the same for every question: Gemini keeps such prefixes by itself.
        "systemInstruction": {"parts": [{"text": prompt.system}]},
        "contents": [made for message in prompt.messages if (made := _content(provider, message))["parts"]],
        "generationConfig": settings,
    }
    if prompt.tools:
        declarations = [
            {"name": tool.name, "description": tool.description, "parametersJsonSchema": dict(tool.input_schema)} for tool in prompt.tools
        ]
        request["tools"] = [{"functionDeclarations": declarations}]
    return request


def _content(provider: str, message: Message) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if message.role == "tool":
        for result in message.results:
            said = {"error" if result.failed else "result": result.text}
            parts.append({"functionResponse": {"id": result.call_id, "name": result.name, "response": said}})
        return {"role": "user", "parts": parts}
    parts += [{"inlineData": {"mimeType": image.media_type, "data": base64.b64encode(image.data).decode()}} for image in message.images]
    if message.text:
        parts.append({"text": message.text})
    parts += [_call_part(provider, call, number) for number, call in enumerate(message.calls)]
    return {"role": "model" if message.role == "assistant" else "user", "parts": parts}


def _call_part(provider: str, call: ToolCall, number: int) -> dict[str, Any]:
    part: dict[str, Any] = {"functionCall": {"id": call.call_id, "name": call.name, "args": arguments_object(call)}}
    if own := unsealed(provider, call.signature):
        part["thoughtSignature"] = own.decode()
    elif number == 0:  # of parallel calls only the first has one
        part["thoughtSignature"] = NO_SIGNATURE
    return part


def _failed_midway(provider: str, error: _Error) -> DomainError:
    """The error inside a stream that began well: its HTTP status was 200, so only the body tells."""
    if error.code in (401, 403) or error.status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return ModelMisconfigured("the provider does not accept our key", provider=provider)
    if error.code in (429, 503) or error.status in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        return overloaded(provider, limited=error.code == 429 or error.status == "RESOURCE_EXHAUSTED")
    if error.code == 400 or error.status == "INVALID_ARGUMENT":
        return ModelRefused("the provider refused the request", provider=provider)
    return ModelFailed("the provider failed", provider=provider, cause=(error.status or "error")[:64])


def _refused(provider: str, error: errors.APIError) -> DomainError:
    status = error.code if isinstance(error.code, int) else 500
    if status == 400 and _says(error, "reason", "API_KEY_INVALID"):  # the one key that is not refused with 401
        return ModelMisconfigured("the provider does not accept our key", provider=provider, status=status)
    headers = getattr(error.response, "headers", None) or {}
    waits_ms = retry_after_ms(headers)
    if waits_ms is None and (delay := _found(error, "retryDelay")) is not None:
        waits_ms = _milliseconds(delay)
    overflow = "token count" in (error.message or "") and "exceeds" in (error.message or "")
    # What Google calls unavailable is a model that is overloaded.
    return refused(provider, status, busy=error.status == "UNAVAILABLE", retry_after_ms=waits_ms, overflow=overflow)


def _found(error: errors.APIError, name: str) -> str | None:
    """A field of the error's details, wherever it stands in them."""
    body = error.details
    inner = body.get("error", body) if isinstance(body, dict) else {}
    details = inner.get("details") if isinstance(inner, dict) else None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and isinstance(detail.get(name), str):
            return str(detail[name])
    return None


def _says(error: errors.APIError, name: str, value: str) -> bool:
    return _found(error, name) == value


def _milliseconds(duration: str) -> int | None:
    """A protobuf duration such as `3.5s`."""
    try:
        return max(0, int(float(duration.removesuffix("s")) * 1000))
    except (ValueError, OverflowError):
        return None
