"""The adapters of the Model port that speak to a vendor, with a model of each and the path where the simulator speaks its format."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from services.orchestrator.claude_model import ClaudeModel
from services.orchestrator.domain import Candidate, Capability
from services.orchestrator.gemini_model import GeminiModel
from services.orchestrator.openai_chat_model import OpenAiChatModel
from services.orchestrator.openai_responses_model import OpenAiResponsesModel
from services.orchestrator.ports import Model

EVERYTHING: frozenset[Capability] = frozenset({"images", "reasoning", "schema", "tools"})
SUBJECTS: dict[str, tuple[type[Any], str, str]] = {
    "claude": (ClaudeModel, "", "claude-sonnet-5-5"),
    "openai_chat": (OpenAiChatModel, "/v1", "my-own-model"),
    "openai_responses": (OpenAiResponsesModel, "/v1", "gpt-6.2-sol"),
    "gemini": (GeminiModel, "", "gemini-3.8-flash"),
}
"""Adapter, path of its interface below the provider's address, and a model."""
FORMATS = {"claude": "anthropic", "openai_chat": "openai_chat", "openai_responses": "openai_responses", "gemini": "gemini"}


@dataclass
class Subject:
    """A model under test."""

    model: Model
    candidate: Candidate
    name: str = "extractive"


@contextlib.asynccontextmanager
async def subject_of(
    name: str, url: str, *, keys: Sequence[str] = ("key",), connect_s: float = 2, first_token_s: float = 10, stall_s: float = 10
) -> AsyncIterator[Subject]:
    """The adapter `name`, speaking to the provider at `url`."""
    made, path, model = SUBJECTS[name]
    adapter = made(keys, url + path, connect_s=connect_s, first_token_s=first_token_s, stall_s=stall_s, provider=name)
    try:
        yield Subject(adapter, Candidate(name, model, 200_000, 64_000, EVERYTHING), name)
    finally:
        await adapter.aclose()
