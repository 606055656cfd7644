"""What the end of a provider call says about its model. What is made of that is decided in `health` and `router`."""

from services.chassis.errors import ModelFailed, ModelMisconfigured, ModelOverloaded, ModelRefused, ModelStalled
from services.orchestrator.domain import Candidate
from services.orchestrator.health import Health
from services.orchestrator.router import OTHER_KEY

LIMITED = "429"
LIMITED_PAUSE_S = 1.0
"""A model that is limited is left alone this long, and up to twice as long, if the provider does not say how long. That paces; it is no
failure."""


def is_the_models(failure: BaseException | None) -> bool:
    """Whether a call failed at its provider, and not at a bound of ours on what it wrote."""
    if not isinstance(failure, ModelOverloaded | ModelFailed | ModelStalled | ModelMisconfigured):
        return False
    return "provider" in failure.metadata


def tell(health: Health, candidate: Candidate, failure: BaseException | None) -> None:
    """Let `health` know how a call ended. What belongs to a key, to the question or to whoever stopped it says nothing."""
    if failure is None or isinstance(failure, ModelRefused):
        health.succeeded(candidate)
    elif not is_the_models(failure) or OTHER_KEY in getattr(failure, "metadata", {}):
        return
    elif isinstance(failure, ModelOverloaded) and failure.retry_after_ms is not None:
        health.pause(candidate, failure.retry_after_ms / 1000)
    elif isinstance(failure, ModelOverloaded) and failure.metadata.get("status") == LIMITED:
        health.pause(candidate, LIMITED_PAUSE_S * (1 + health.jitter()))
    else:
        health.failed(candidate)
