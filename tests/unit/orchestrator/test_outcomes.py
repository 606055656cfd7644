"""What is made of the end of a call for the model's health."""

import orjson
import pytest

from services.chassis.errors import (
    DomainError,
    ModelFailed,
    ModelMisconfigured,
    ModelOverloaded,
    ModelRefused,
    ModelStalled,
    OutputInvalid,
)
from services.orchestrator.claude_model import ClaudeReading
from services.orchestrator.domain import Candidate, Draft
from services.orchestrator.gemini_model import GeminiReading
from services.orchestrator.health import FAILURES_IN_A_ROW, Health
from services.orchestrator.model_stream import Reading, refused
from services.orchestrator.openai_chat_model import ChatReading
from services.orchestrator.outcomes import LIMITED_PAUSE_S, tell

MODEL = Candidate("p", "m", 1, 1)


class Now:
    s = 1000.0

    def __call__(self) -> float:
        return self.s


def told(failure: DomainError | None) -> Health:
    """After as many calls that ended so as would open the breaker."""
    health = Health(Now(), lambda: 0.5)
    for _ in range(FAILURES_IN_A_ROW):
        tell(health, MODEL, failure)
    return health


@pytest.mark.parametrize(
    "failure",
    [ModelFailed(provider="p"), ModelStalled(provider="p"), refused("p", 529), refused("p", 404), refused("p", 301)],
)
def test_failures_of_the_provider_put_the_model_aside(failure: DomainError) -> None:
    """Also one that is no longer where it was."""
    assert told(failure).state(MODEL) == "open"


@pytest.mark.parametrize(
    "failure",
    [None, ModelRefused(provider="p"), ModelFailed(cause="tool_calls"), OutputInvalid(), ModelMisconfigured(provider="p", other_key=True)],
)
def test_what_is_not_the_models_says_nothing_against_it(failure: DomainError | None) -> None:
    """A refusal is an answer; a bound of ours and a key are no matter of the model."""
    health = told(failure)

    assert health.state(MODEL) == "closed"
    assert health.lets_through(MODEL)


def said_in(reading: type[Reading], event: object) -> DomainError:
    """The error in a stream that began well."""
    with pytest.raises(DomainError) as raised:
        reading("p", Draft(lambda text: None)).read(orjson.dumps(event))
    return raised.value


LIMITS = [
    refused("p", 429),
    said_in(ClaudeReading, {"type": "error", "error": {"type": "rate_limit_error"}}),
    said_in(ChatReading, {"error": {"type": "requests", "code": "rate_limit_exceeded"}}),
    said_in(ChatReading, {"error": {"code": 429}}),
    said_in(GeminiReading, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}),
]


@pytest.mark.parametrize("failure", LIMITS)
def test_a_limit_paces_and_opens_nothing_also_where_nobody_says_how_long(failure: DomainError) -> None:
    """Before the stream or in it: the model is well, and is passed over for a moment."""
    health, now = Health(clock := Now(), lambda: 0.5), Now.s
    for _ in range(FAILURES_IN_A_ROW):
        tell(health, MODEL, failure)

    assert isinstance(failure, ModelOverloaded)
    assert health.state(MODEL) == "closed"
    assert not health.lets_through(MODEL)
    clock.s = now + 1.5 * LIMITED_PAUSE_S
    assert health.lets_through(MODEL)


@pytest.mark.parametrize(
    ("reading", "event"),
    [
        (ClaudeReading, {"type": "error", "error": {"type": "overloaded_error"}}),
        (ChatReading, {"error": {"type": "server_error", "code": "server_is_overloaded"}}),
        (GeminiReading, {"error": {"code": 503, "status": "UNAVAILABLE"}}),
    ],
)
def test_an_overload_in_a_stream_is_a_failure(reading: type[Reading], event: object) -> None:
    """It asks for nothing; whether the model is well is for the breaker to find out."""
    assert told(said_in(reading, event)).state(MODEL) == "open"
