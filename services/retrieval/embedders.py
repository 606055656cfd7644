"""From an embedder's name to an open embedder. The only place that knows which adapters there are."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator

from services.retrieval.config import Settings
from services.retrieval.fastembed_embedder import FastembedEmbedder
from services.retrieval.gemini_embedder import BATCH_MAX as GEMINI_BATCH_MAX
from services.retrieval.gemini_embedder import GeminiDialect
from services.retrieval.minilm_embedder import MiniLmEmbedder
from services.retrieval.openai_embedder import OpenAiDialect
from services.retrieval.ports import Embedder
from services.retrieval.remote_embedding import Dialect, Remote, RemoteEmbedder
from services.retrieval.word_pieces import WordPieces

MINILM = {"minilm-int8": "int8", "minilm": "fp32"}
"""Names by which stores remember their embedders: whatever the default. What a name gives may change with a version, and its id with it."""
ADDRESSES = {
    "openai": "https://api.openai.com/v1",
    "voyage": "https://api.voyageai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com",
}
DIMENSIONS = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
    "gemini-embedding-001": 3072,
    "voyage-3.5": 1024,
    "voyage-3.5-lite": 1024,
    "voyage-3-large": 1024,
}
"""Of models by their vendors' documentation; others are told by TAILRACE_RETRIEVAL_EMBEDDER_DIMENSIONS."""


class EmbedderUnknown(OSError):
    """The name opens no embedder, or not with these settings."""


@contextlib.asynccontextmanager
async def opened(name: str, settings: Settings) -> AsyncIterator[Embedder]:
    """The embedder called `name`, until left. Nothing is asked of a remote one yet.

    Raises EmbedderUnknown, or OSError for a local model that cannot be opened.
    """
    kind, _, model = name.partition(":")
    if name in MINILM:
        minilm = await asyncio.to_thread(MiniLmEmbedder.load, settings.models_folder, MINILM[name])
        try:
            yield minilm
        finally:
            minilm.close()
        return
    if not model or kind not in ("fastembed", *ADDRESSES):
        raise EmbedderUnknown(
            f"{name!r} is no embedder: {', '.join(MINILM)}, openai:MODEL, voyage:MODEL, gemini:MODEL and fastembed:MODEL are there"
        )
    pieces = await asyncio.to_thread(WordPieces.published)
    if kind == "fastembed":
        folder, dimensions = settings.embedder_folder, settings.embedder_dimensions
        local = await asyncio.to_thread(FastembedEmbedder.load, model, folder, dimensions, pieces)
        try:
            yield local
        finally:
            await local.close()
        return
    remote = _remote(kind, model, settings)
    distant = RemoteEmbedder(_id(kind, model, remote.dimension, settings), _dialect(kind, model, settings), remote, pieces)
    try:
        yield distant
    finally:
        await distant.close()


def payable(name: str, settings: Settings) -> tuple[str, str] | None:
    """Provider and model in the price book of the embedder called `name`; None if its calls cost nothing.

    They do where the vendor's own service is asked, unless the settings say otherwise: what else speaks a vendor's format is one's own.
    """
    kind, _, model = name.partition(":")
    if kind not in ADDRESSES or settings.embedder_billed == "no":
        return None
    if settings.embedder_billed == "auto" and _remote(kind, model, settings).base_url.rstrip("/") != ADDRESSES[kind]:
        return None
    return kind, model


def _remote(kind: str, model: str, settings: Settings) -> Remote:
    own_url, own_key = {
        "openai": (settings.openai_base_url, settings.openai_api_key),
        "voyage": ("", settings.voyage_api_key),
        "gemini": (settings.gemini_base_url, settings.gemini_api_key),
    }[kind]
    keys = (settings.embedder_key.get_secret_value() or own_key.get_secret_value()).split(",")
    url = settings.embedder_url or own_url or ADDRESSES[kind]
    keys = [key.strip() for key in keys if key.strip()]
    if not keys and url == ADDRESSES[kind]:
        raise EmbedderUnknown(f"{kind}:{model} needs a key: set TAILRACE_RETRIEVAL_EMBEDDER_KEY or {kind.upper()}_API_KEY")
    dimension = settings.embedder_dimensions or DIMENSIONS.get(model, 0)
    if not dimension:
        raise EmbedderUnknown(f"how long the vectors of {model!r} are is not known here: set TAILRACE_RETRIEVAL_EMBEDDER_DIMENSIONS")
    batch_max = min(settings.embedder_batch, GEMINI_BATCH_MAX) if kind == "gemini" else settings.embedder_batch
    return Remote(url, tuple(keys), dimension, batch_max, settings.embedder_timeout_s)


def _dialect(kind: str, model: str, settings: Settings) -> Dialect:
    asked = settings.embedder_dimensions if settings.embedder_cut else 0
    if kind == "gemini":
        return GeminiDialect(model, asked)
    return OpenAiDialect(
        model,
        asked,
        settings.embedder_encoding,
        settings.embedder_question_prefix,
        settings.embedder_document_prefix,
        voyage=kind == "voyage",
    )


def _id(kind: str, model: str, dimension: int, settings: Settings) -> str:
    """Names all that decides about the vectors. The address is not part of it: the same model may move."""
    prefixes = f"{settings.embedder_question_prefix}\0{settings.embedder_document_prefix}"
    prefixed = "" if prefixes == "\0" else "-" + hashlib.sha256(prefixes.encode()).hexdigest()[:8]
    return f"{kind}-{model.replace(' ', '_')}-{dimension}{prefixed}"
