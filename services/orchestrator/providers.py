"""Which providers there are, with their keys and addresses, and the adapter that speaks to each: from the settings and `[[providers]]`.

What their models are good for is the capability table's matter, not this module's. An adapter is imported only if its provider is
configured: each brings its vendor's package, which takes most of a second and tens of megabytes.
"""

import contextlib
import tomllib
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.ports import Model
from services.orchestrator.provider_keys import split_keys
from services.orchestrator.router import EXTRACTIVE

Kind = Literal["anthropic", "gemini", "openai_chat", "openai_responses"]

ANTHROPIC, OPENAI, GEMINI = "anthropic", "openai", "gemini"
TAKEN = frozenset({ANTHROPIC, OPENAI, GEMINI, EXTRACTIVE})
"""Names that are set up by variables alone, or need no setting up."""
OPENAI_HOST = "api.openai.com"
PROVIDERS_MAX = 100


class ClosableModel(Model, Protocol):
    """An adapter with connections of its own."""

    async def aclose(self) -> None:
        """Close them."""
        ...


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider that is configured."""

    name: str
    """As in the capability table, in prices, in errors and in spans."""
    kind: Kind
    base_url: str
    keys: Sequence[str] = field(repr=False)
    """Tried as `ProviderKeys` says. Empty = none is sent, or one that means nothing."""


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `[[providers]]`."""

    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
    kind: Kind
    base_url: Annotated[str, Meta(pattern=r"\Ahttps?://[^\s/]+\S*\Z", max_length=2048)]
    key_variable: Annotated[str, Meta(pattern=r"\A([A-Za-z_][A-Za-z0-9_]*)?\Z", max_length=128)] = ""


class _File(msgspec.Struct):
    """The part of the models file that is read here."""

    providers: Annotated[list[_Row], Meta(max_length=PROVIDERS_MAX)] = []


class ProvidersInvalid(ValueError):
    """`[[providers]]` cannot be used. The text names the file, the place in it and the bound."""


def configured(settings: OrchestratorSettings, path: Path) -> tuple[Provider, ...]:
    """Every provider that can be asked, each name once.

    A provider of the table whose `key_variable` is not set is left out, like one of the settings without a key. Raises ProvidersInvalid,
    SettingsError.
    """
    found = []
    if keys := split_keys(settings.anthropic_api_key.get_secret_value()):
        found.append(Provider(ANTHROPIC, "anthropic", settings.anthropic_base_url, keys))
    keys = split_keys(settings.openai_api_key.get_secret_value())
    if keys or not _is_openai(settings.openai_base_url):  # a server of one's own may want no key
        found.append(Provider(OPENAI, _openai_kind(settings), settings.openai_base_url, keys))
    if keys := split_keys(settings.gemini_api_key.get_secret_value()):
        found.append(Provider(GEMINI, "gemini", settings.gemini_base_url, keys))
    for row in _rows(path):
        keys = split_keys(settings.secret_named(row.key_variable).get_secret_value()) if row.key_variable else ()
        if keys or not row.key_variable:
            found.append(Provider(row.name, row.kind, row.base_url, keys))
    return tuple(found)


def names_in(path: Path) -> frozenset[str]:
    """The providers that the file names, configured or not. Raises ProvidersInvalid."""
    return frozenset(row.name for row in _rows(path))


@contextlib.asynccontextmanager
async def opened(settings: OrchestratorSettings, path: Path) -> AsyncIterator[dict[str, Model]]:
    """Adapters of all configured providers, by name, and closed when the block is left. Raises ProvidersInvalid, SettingsError."""
    async with contextlib.AsyncExitStack() as stack:
        models: dict[str, Model] = {}
        for provider in configured(settings, path):
            model = _adapter(
                provider,
                connect_s=settings.model_connect_s,
                first_token_s=settings.model_first_token_s,
                stall_s=settings.model_stall_s,
            )
            stack.push_async_callback(model.aclose)
            models[provider.name] = model
        yield models


def _adapter(provider: Provider, **limits: float) -> ClosableModel:
    common: dict[str, Any] = {"provider": provider.name, **limits}
    match provider.kind:
        case "anthropic":
            from services.orchestrator.claude_model import ClaudeModel

            return ClaudeModel(provider.keys or ("none",), provider.base_url, **common)
        case "gemini":
            from services.orchestrator.gemini_model import GeminiModel

            return GeminiModel(provider.keys or ("none",), provider.base_url, **common)
        case "openai_chat":
            from services.orchestrator.openai_chat_model import OpenAiChatModel

            return OpenAiChatModel(provider.keys, provider.base_url, **common)
        case "openai_responses":
            from services.orchestrator.openai_responses_model import OpenAiResponsesModel

            return OpenAiResponsesModel(provider.keys, provider.base_url, **common)


def _openai_kind(settings: OrchestratorSettings) -> Kind:
    if settings.openai_api == "auto":
        return "openai_responses" if _is_openai(settings.openai_base_url) else "openai_chat"
    return "openai_responses" if settings.openai_api == "responses" else "openai_chat"


def _is_openai(base_url: str) -> bool:
    """Whether this is OpenAI itself, in whichever region."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    return host == OPENAI_HOST or host.endswith("." + OPENAI_HOST)


def _rows(path: Path) -> list[_Row]:
    try:
        rows = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8-sig")), _File).providers
    except msgspec.ValidationError as error:
        raise ProvidersInvalid(f"{path.name}: {str(error).replace('`$.', '`')}") from error
    names = [row.name for row in rows]
    if bad := sorted({name for name in names if name in TAKEN or names.count(name) > 1}):
        raise ProvidersInvalid(f"{path.name}: providers: the name {', '.join(bad)} is taken")
    return rows
