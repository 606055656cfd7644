"""Which model is asked, and what is tried next when one fails. Pure: it neither calls nor waits."""

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.chassis.errors import DomainError, ModelFailed, ModelMisconfigured, ModelOverloaded, ModelStalled, ModelUnknown
from services.orchestrator.domain import Candidate

MODELS_FILE = Path(__file__).parent / "models.toml"
EXTRACTIVE = "extractive"
ATTEMPTS_PER_MODEL_MAX = 3
BACKOFF_BASE_S = 0.4
BACKOFF_MAX_S = 8.0
RETRY_AFTER_MAX_S = 15.0
"""A provider that asks for more patience than this is as good as away: better say so now."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model with the tiers it serves."""

    candidate: Candidate
    tiers: tuple[str, ...]


class Router:
    """The capability table, reduced to the providers that are configured."""

    def __init__(self, models: Sequence[Candidate], tiers: dict[str, list[str]], providers: Collection[str], default_tier: str) -> None:
        known = {model.model: model for model in models}
        if missing := sorted({name for names in tiers.values() for name in names} - known.keys()):
            raise ValueError(f"tiers name models that do not exist: {', '.join(missing)}")
        if default_tier not in tiers:
            raise ValueError(f"the default tier {default_tier!r} does not exist; there are: {', '.join(sorted(tiers))}")
        self.default_tier = default_tier
        self._models = {name: model for name, model in known.items() if model.provider in providers}
        self._tiers = {
            tier: tuple(self._models[name] for name in names if name in self._models) or (known[EXTRACTIVE],)
            for tier, names in tiers.items()
        }

    def route(self, model: str, tier: str) -> tuple[str, tuple[Candidate, ...]]:
        """Return the tier and the models to ask, in order. A model that is named is the only one. Raises ModelUnknown."""
        tier = tier or self.default_tier
        if tier not in self._tiers:
            raise ModelUnknown(f"there is no tier of this name; there are: {', '.join(sorted(self._tiers))}", tier=tier[:64])
        if not model:
            return tier, self._tiers[tier]
        if model not in self._models:
            raise ModelUnknown("no model of this name is configured", model=model[:128])
        return tier, (self._models[model],)

    def offers(self) -> tuple[Offer, ...]:
        """Every model that can be asked for."""
        return tuple(
            Offer(candidate, tuple(tier for tier, candidates in self._tiers.items() if candidate in candidates))
            for candidate in self._models.values()
        )


def read_models(providers: Collection[str], default_tier: str, path: Path = MODELS_FILE) -> Router:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    models = [Candidate(**{**row, "capabilities": frozenset(row.get("capabilities", ()))}) for row in table["models"]]
    return Router(models, table["tiers"], providers, default_tier)


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask `candidate` after `delay_s`."""

    candidate: Candidate
    delay_s: float


def next_try(candidates: Sequence[Candidate], asked: Sequence[Candidate], failure: DomainError, jitter: float) -> Retry | None:
    """What to do after the last of `asked` failed before its first token; None = give up and report `failure`.

    `jitter` is a uniform random number in [0, 1). An overload or a failure is tried again with full jitter, never sooner than the
    provider asks. What another try cannot heal goes to the next model at once, and a refusal is the answer: no model shopping.
    """
    last = asked[-1]
    if not isinstance(failure, ModelOverloaded | ModelFailed | ModelStalled | ModelMisconfigured):
        return None
    if isinstance(failure, ModelOverloaded | ModelFailed) and (tries := asked.count(last)) < ATTEMPTS_PER_MODEL_MAX:
        wanted_s = (failure.retry_after_ms or 0) / 1000
        if wanted_s <= RETRY_AFTER_MAX_S:
            backoff_s = jitter * min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2 ** (tries - 1))
            return Retry(last, wanted_s + backoff_s)
    following = candidates.index(last) + 1
    return Retry(candidates[following], 0.0) if following < len(candidates) else None
