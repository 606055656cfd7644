"""What whoever watches is told of a provider call: the attributes of its span, and two histograms. Names and counts, never a text."""

from typing import Any

from opentelemetry.trace import Span

from services.chassis import telemetry
from services.orchestrator.domain import Attempt, Candidate, Draft

DURATION = telemetry.histogram(
    "gen_ai.client.operation.duration", "s", "Provider calls by how long they took", [0.01 * 2**power for power in range(14)]
)
TOKENS = telemetry.histogram("gen_ai.client.token.usage", "{token}", "Tokens of provider calls", [4**power for power in range(14)])
"""Bounds as the conventions have them."""


def begun(candidate: Candidate, output_tokens_max: int, session_id: str) -> dict[str, Any]:
    """Attributes of a call's span that are known before it."""
    return {
        telemetry.GEN_AI_OPERATION: "chat",
        telemetry.GEN_AI_PROVIDER: candidate.provider,
        telemetry.GEN_AI_REQUEST_MODEL: candidate.model,
        telemetry.GEN_AI_REQUEST_MAX_TOKENS: output_tokens_max,
        telemetry.GEN_AI_REQUEST_STREAM: True,
        telemetry.GEN_AI_CONVERSATION: session_id,
    }


def ended(running: Span, attempt: Attempt, draft: Draft) -> None:
    """Set the attributes that are known after it."""
    usage = attempt.usage
    running.set_attributes(
        {
            telemetry.GEN_AI_RESPONSE_MODEL: attempt.model,
            telemetry.GEN_AI_INPUT_TOKENS: usage.prompt_tokens,
            telemetry.GEN_AI_OUTPUT_TOKENS: usage.output_tokens,
            telemetry.GEN_AI_CACHE_READ_TOKENS: usage.cache_read_tokens,
            telemetry.GEN_AI_CACHE_CREATION_TOKENS: usage.cache_write_tokens,
            telemetry.GEN_AI_REASONING_TOKENS: attempt.reasoning_tokens,
            telemetry.GEN_AI_TIME_TO_FIRST_CHUNK: attempt.first_token_ms / 1000,
            telemetry.COST_NANOUSD: attempt.cost_nanousd,
        }
    )
    if attempt.finish_reason:
        running.set_attribute(telemetry.GEN_AI_FINISH_REASONS, (attempt.finish_reason,))
    if draft.response_id:
        running.set_attribute(telemetry.GEN_AI_RESPONSE_ID, draft.response_id)
    if draft.address:
        running.set_attribute(telemetry.SERVER_ADDRESS, draft.address)


def measured(candidate: Candidate, attempt: Attempt) -> None:
    """Count a call that is over."""
    common = {
        telemetry.GEN_AI_OPERATION: "chat",
        telemetry.GEN_AI_PROVIDER: candidate.provider,
        telemetry.GEN_AI_REQUEST_MODEL: candidate.model,
    }
    failed = {telemetry.ERROR_TYPE: attempt.error_reason} if attempt.error_reason else {}
    DURATION.record(attempt.duration_ms / 1000, {**common, **failed})
    for kind, tokens in (("input", attempt.usage.prompt_tokens), ("output", attempt.usage.output_tokens)):
        TOKENS.record(tokens, {**common, telemetry.GEN_AI_TOKEN_TYPE: kind})
