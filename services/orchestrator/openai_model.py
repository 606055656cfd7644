"""What the two interfaces of OpenAI have in common, through the `openai` package: client, keys, errors and the counting of tokens.

Its client does auth, transport and errors; the bytes of the stream are read by the adapters themselves, without a typed object per token.
Nothing is retried here.
"""

import base64
import re
from collections.abc import Sequence
from typing import Any

import aiohttp
import httpx2
import msgspec
import openai

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelRefused
from services.orchestrator.domain import Candidate, Draft, Image, Prompt
from services.orchestrator.model_stream import (
    CONNECTIONS_MAX,
    Incoming,
    Reading,
    bounded_silence,
    broken_off,
    follow,
    overloaded,
    refused,
    retry_after_ms,
    unreachable,
)
from services.orchestrator.provider_keys import ProviderKeys
from services.orchestrator.schema_subsets import is_closed, only

PROVIDER = "openai"
NO_KEY = "none"
"""Sent to servers of one's own that want no key; the package insists on one."""
_OWN_HOSTS = (".openai.com", ".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_GENERATION = re.compile(r"gpt-(\d+)(?:\.(\d+))?")
_LIMITED = frozenset({"rate_limit_exceeded", "rate_limit_error", "too_many_requests"})
_BUSY = _LIMITED | {"server_is_overloaded", "overloaded_error", "slow_down"}
_KEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "invalid_api_key", "authentication_error", "permission_denied"})
_OVERFLOW = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_REQUEST = re.compile(r"invalid|image_|_image|unsupported|_policy|data_residency")
"""Codes of a request that another try would not heal."""

_STRICT: dict[str, Any] = {
    **dict.fromkeys(("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const")),
    **dict.fromkeys(("$ref", "$defs", "definitions", "title", "description", "pattern", "minItems", "maxItems")),
    **dict.fromkeys(("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "format": ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
}
"""Keywords that an answer can be bound to strictly. A request with another one is refused."""
_NARROWING = frozenset(
    {
        *("minLength", "maxLength", "uniqueItems", "minProperties", "maxProperties"),
        *("default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly"),
    }
)
"""Keywords without which a schema binds a little less, or says a little less."""


class Details(msgspec.Struct):
    """How a count of tokens is made up."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class OutputDetails(msgspec.Struct):
    """The same for the output."""

    reasoning_tokens: int | None = None


class ErrorBody(msgspec.Struct):
    """An error as it stands in a stream."""

    type: str | None = None
    code: str | int | None = None


def count(draft: Draft, prompt: int | None, output: int | None, details: Details | None, of_output: OutputDetails | None) -> None:
    """Take over what is reported. Cached tokens are counted inside the prompt's there, and reasoning inside the output."""
    if prompt is not None:
        cached = max(0, (details.cached_tokens if details else None) or 0)
        written = max(0, (details.cache_write_tokens if details else None) or 0)
        draft.input_tokens = max(0, prompt - cached - written)
        draft.cache_read_tokens, draft.cache_write_tokens = cached, written
    if output is not None:
        draft.output_tokens = max(0, output)
        draft.reasoning_tokens = max(0, (of_output.reasoning_tokens if of_output else None) or 0)
        draft.usage_is_final = True


def failed_midway(reading: Reading, error: ErrorBody) -> DomainError:
    """The error inside a stream that began well: its HTTP status was 200, so only the body tells."""
    reading.draft.rejected = not reading.began
    code, provider = str(error.code or ""), reading.provider
    kinds = {code, error.type or ""}
    if kinds & _KEY or code in ("401", "403"):
        return ModelMisconfigured("the provider does not accept our key", provider=provider)
    if kinds & _BUSY or code in ("429", "503", "529"):
        return overloaded(provider, limited=bool(kinds & _LIMITED) or code == "429")
    if kinds & _OVERFLOW:
        return ModelRefused("the prompt does not fit into the model's context", provider=provider, cause="context_window")
    if any(_REQUEST.search(kind) for kind in kinds) or code == "400":
        return ModelRefused("the provider refused the request", provider=provider)
    return ModelFailed("the provider failed", provider=provider, cause=(code or error.type or "error")[:64])


def data_url(image: Image) -> str:
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"


def bound_schema(prompt: Prompt, candidate: Candidate) -> dict[str, Any] | None:
    """The schema an answer is to be bound to, as both interfaces name it; None if there is none or the model cannot be bound."""
    if prompt.output_schema is None or "schema" not in candidate.capabilities:
        return None
    strict = only(prompt.output_schema, _STRICT, _NARROWING) if is_closed(prompt.output_schema, all_required=True) else None
    if strict is not None and strict.get("type") == "object":  # no other root is taken strictly
        return {"name": "answer", "schema": strict, "strict": True}
    return {"name": "answer", "schema": dict(prompt.output_schema), "strict": False}


class OpenAiModel:
    """Calls one of the two interfaces; which one, a subclass says. One instance, one pool of connections. Close it with `aclose`.

    `keys` are tried in the order of `ProviderKeys`. `provider` is the name it goes by in errors, prices and the capability table.
    """

    def __init__(
        self, keys: Sequence[str], base_url: str, *, connect_s: float, first_token_s: float, stall_s: float, provider: str = PROVIDER
    ) -> None:
        self._provider, self._address = provider, httpx2.URL(base_url).host
        self._first_token_s, self._stall_s = first_token_s, stall_s
        host = f".{self._address}"
        self.is_vendor = host.endswith(_OWN_HOSTS)
        """Whether OpenAI itself, or Azure for it, is at the other end, and not a server that has taken over its format."""
        self.is_openai = host.endswith(".openai.com")
        """Whether it is OpenAI itself, which knows what others have not taken over."""
        limits = httpx2.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=100, keepalive_expiry=30)
        # Silence is judged by output and not by bytes, so the transport's own read limit only has to be no shorter.
        timeout = httpx2.Timeout(connect=connect_s, read=max(first_token_s, stall_s) + 5, write=30, pool=connect_s)
        # The key goes to the address it was given for: no redirect is followed.
        self._transport = openai.DefaultAioHttpClient(limits=limits, timeout=timeout, follow_redirects=False)
        self._keys = ProviderKeys(max(1, len(keys)))
        self._clients = [
            openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=timeout, http_client=self._transport)
            for key in keys or (NO_KEY,)
        ]

    async def aclose(self) -> None:
        await self._transport.aclose()

    def marks_prefix(self, model: str) -> bool:
        """Whether this model knows marks of what is to be kept of a prompt. Others keep what they like, free before GPT-5.6."""
        generation = _GENERATION.match(model)
        return self.is_openai and generation is not None and (int(generation[1]), int(generation[2] or 0)) >= (5, 6)

    def request(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> dict[str, Any]:
        """Everything the call is made with."""
        raise NotImplementedError

    def opened(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Any:
        """The response with its body still to come, as an async context manager of the package."""
        raise NotImplementedError

    def reading(self, draft: Draft) -> Reading:
        """What understands the events of the response."""
        raise NotImplementedError

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        draft.sent, draft.model, draft.address = True, candidate.model, self._address
        key = self._keys.take()
        try:
            async with bounded_silence(self._provider, self._first_token_s, self._stall_s) as silence:
                request = self.request(prompt, candidate, output_tokens_max, draft)
                async with self.opened(self._clients[key], request) as answer:
                    draft.request_id = answer.headers.get("x-request-id", "")
                    await follow(Incoming.of(answer.http_response), self.reading(draft), silence)
        except DomainError as error:
            self._keys.note(key, error)
            raise
        except openai.APIStatusError as error:
            draft.rejected = True
            draft.request_id = error.request_id or ""
            failure = _refused(self._provider, error)
            self._keys.note(key, failure)
            raise failure from error
        except openai.APIConnectionError as error:
            raise unreachable(self._provider, draft, error) from error
        except openai.OpenAIError as error:
            raise ModelFailed("the provider's client failed", provider=self._provider, cause=type(error).__name__) from error
        except (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError) as error:
            raise broken_off(self._provider) from error


def _refused(provider: str, error: openai.APIStatusError) -> DomainError:
    kinds = {error.code or "", error.type or ""}
    if kinds & _KEY:  # an account without money answers 429 as well, but waiting does not fill it
        return ModelMisconfigured("the provider does not accept our key", provider=provider, status=error.status_code)
    return refused(
        provider,
        error.status_code,
        busy=bool(kinds & _BUSY),
        retry_after_ms=retry_after_ms(error.response.headers),
        overflow=bool(kinds & _OVERFLOW),
    )
