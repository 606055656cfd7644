"""Which model is asked, and what comes after a failure."""

import pytest

from services.chassis.errors import (
    BudgetExhausted,
    DomainError,
    ModelFailed,
    ModelMisconfigured,
    ModelOverloaded,
    ModelRefused,
    ModelStalled,
    ModelUnknown,
)
from services.orchestrator.domain import Candidate
from services.orchestrator.router import Retry, Router, next_try, read_models

HAIKU = Candidate("anthropic", "haiku", 200_000, 64_000)
SONNET = Candidate("anthropic", "sonnet", 200_000, 64_000)
EXTRACTIVE = Candidate("extractive", "extractive", 1_000_000, 64_000)


def router(*providers: str) -> Router:
    return Router([HAIKU, SONNET, EXTRACTIVE], {"fast": ["haiku"], "smart": ["sonnet", "haiku"]}, {"extractive", *providers}, "fast")


def test_tier_gives_its_candidates_and_a_model_itself() -> None:
    """A model that is named is the only one asked."""
    assert router("anthropic").route("", "") == ("fast", (HAIKU,))
    assert router("anthropic").route("", "smart") == ("smart", (SONNET, HAIKU))
    assert router("anthropic").route("sonnet", "") == ("fast", (SONNET,))


def test_without_a_provider_every_tier_is_extractive() -> None:
    """The suite answers without any account."""
    assert router().route("", "smart") == ("smart", (EXTRACTIVE,))
    assert [offer.candidate for offer in router().offers()] == [EXTRACTIVE]


@pytest.mark.parametrize(("model", "tier"), [("haiku", ""), ("", "royal"), ("nope", "fast")])
def test_what_is_not_configured_is_unknown(model: str, tier: str) -> None:
    """Also a model whose provider has no key."""
    with pytest.raises(ModelUnknown):
        router().route(model, tier)


def test_table_that_contradicts_itself_is_refused_at_start() -> None:
    """A tier cannot name a model that is not there, nor the default a tier that is not."""
    with pytest.raises(ValueError, match="ghost"):
        Router([EXTRACTIVE], {"fast": ["ghost"]}, {"extractive"}, "fast")
    with pytest.raises(ValueError, match="slow"):
        Router([EXTRACTIVE], {"fast": ["extractive"]}, {"extractive"}, "slow")


def test_shipped_table_is_sound() -> None:
    """Both tiers have a Claude model with a key and the extractive one without."""
    assert read_models({"anthropic", "extractive"}, "fast").route("", "smart")[1][0].model == "claude-sonnet-5-5"
    assert read_models({"extractive"}, "fast").route("", "fast")[1][0].model == "extractive"


def test_overload_is_tried_three_times_with_growing_jitter_and_never_too_early() -> None:
    """Full jitter over a doubling bound, on top of what the provider asks for."""
    overloaded = ModelOverloaded("", retry_after_ms=1000)

    assert next_try([HAIKU], [HAIKU], ModelOverloaded(), 0.5) == Retry(HAIKU, 0.2)
    assert next_try([HAIKU], [HAIKU, HAIKU], ModelFailed(), 0.5) == Retry(HAIKU, 0.4)
    assert next_try([HAIKU], [HAIKU], overloaded, 0.0) == Retry(HAIKU, 1.0)
    assert next_try([HAIKU], [HAIKU] * 3, ModelOverloaded(), 0.5) is None


def test_provider_that_asks_for_too_much_patience_is_left_at_once() -> None:
    """Better the next model, or the truth, than a minute of silence."""
    slow = ModelOverloaded("", retry_after_ms=60_000)

    assert next_try([HAIKU], [HAIKU], slow, 0.5) is None
    assert next_try([SONNET, HAIKU], [SONNET], slow, 0.5) == Retry(HAIKU, 0.0)


@pytest.mark.parametrize("failure", [ModelStalled(), ModelMisconfigured()])
def test_what_another_try_cannot_heal_goes_to_the_next_model(failure: DomainError) -> None:
    """A stalled or misconfigured provider is not asked twice."""
    assert next_try([SONNET, HAIKU], [SONNET], failure, 0.5) == Retry(HAIKU, 0.0)
    assert next_try([SONNET, HAIKU], [SONNET, HAIKU], failure, 0.5) is None


@pytest.mark.parametrize("failure", [ModelRefused(), BudgetExhausted()])
def test_refusal_is_an_answer(failure: DomainError) -> None:
    """No other model is asked until one says yes."""
    assert next_try([SONNET, HAIKU], [SONNET], failure, 0.5) is None
