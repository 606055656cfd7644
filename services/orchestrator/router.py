"""Which models are asked for a question and why, and what is tried next when one fails. Pure: it neither calls nor waits."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.chassis.errors import (
    DomainError,
    ModelFailed,
    ModelMisconfigured,
    ModelOverloaded,
    ModelStalled,
    ModelUnknown,
    NotAllowed,
    RequestInvalid,
)
from services.orchestrator.difficulty import difficulty_of
from services.orchestrator.domain import Candidate, Capability, Route
from services.orchestrator.health import Health

EXTRACTIVE = "extractive"
ATTEMPTS_PER_MODEL_MAX = 3
BACKOFF_BASE_S = 0.4
BACKOFF_MAX_S = 8.0
RETRY_AFTER_MAX_S = 15.0
"""A provider that asks for more patience than this is as good as away: better say so now."""
RETRY_AFTER_NEXT_MAX_S = 1.0
"""The same where another model could answer meanwhile."""
OTHER_KEY = "other_key"
"""Metadata of a failure that belongs to one key of several: the adapter has put it aside, and the same call goes on with another."""
PROMPT_TOKENS_LEAST = 4_096
"""Of a prompt besides its question: instructions and at least one passage."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A model with the tiers it serves."""

    candidate: Candidate
    tiers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier as it is configured; the models file explains each field. Either `models` or `easy` and `hard` are given."""

    models: tuple[tuple[str, float], ...] = ()
    """Names with their weights; all weights 0 = asked in this order."""
    plans: frozenset[str] = frozenset()
    prompt_tokens_max: int | None = None
    output_tokens_max: int | None = None
    escalate_to: str = ""
    cheaper: str = ""
    continues: bool = False
    holds_back: bool = False
    shadow: str = ""
    shadow_share: float = 0.0
    easy: str = ""
    hard: str = ""
    difficulty: float = 0.5


@dataclass(frozen=True, slots=True)
class Table:
    """Models and tiers, in the order of the file. Checked: every name in it is there."""

    models: tuple[Candidate, ...]
    tiers: Mapping[str, Tier]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is known of a question when its models are chosen."""

    model: str = ""
    tier: str = ""
    text: str = ""
    needs: Mapping[Capability, str] = field(default_factory=dict)
    """What a model must be able to do, each with the field of the request that asks for it."""
    plan: str = ""
    """Name of the asker's plan; empty = not known here, and then tiers that name plans are closed."""
    plan_tiers: frozenset[str] = frozenset()
    """Tiers the plan may use; empty = all."""
    output_tokens_max: int = 0

    def fits(self, candidate: Candidate) -> bool:
        """Whether a prompt with the question, counted as bytes, leaves a model room for the answer."""
        output = min(self.output_tokens_max, candidate.output_tokens_max)
        return candidate.context_tokens_max - output >= len(self.text.encode()) + PROMPT_TOKENS_LEAST


class Router:
    """The capability table, reduced to the providers that are configured. `adopt` replaces it at once for all questions to come."""

    def __init__(self, table: Table, providers: Collection[str], default_tier: str, random: Callable[[], float]) -> None:
        """`random` gives uniform numbers in [0, 1). Raises ValueError if the default tier does not exist."""
        self._providers, self.default_tier, self._random = frozenset(providers), default_tier, random
        self.adopt(table)

    def adopt(self, table: Table) -> None:
        """Use `table` from now on. Raises ValueError, and changes nothing, if the default tier is not in it."""
        if self.default_tier not in table.tiers:
            raise ValueError(f"the default tier {self.default_tier!r} does not exist; there are: {', '.join(sorted(table.tiers))}")
        known = {model.model: model for model in table.models}
        self._models = {name: model for name, model in known.items() if model.provider in self._providers}
        self.left_out = tuple(model for model in table.models if model.provider not in self._providers)
        """Models of the table that nobody can be asked for, since their provider is not configured."""
        self._fallback = known[EXTRACTIVE]
        self._tiers = table.tiers

    def route(self, wish: Wish) -> Route:
        """Choose the models to ask, in order. A model that is named is the only one.

        Raises ModelUnknown, NotAllowed if the plan has no such tier or model, RequestInvalid if no model of the tier can do what is needed.
        """
        if wish.tier and wish.tier not in self._tiers:
            raise ModelUnknown(f"there is no tier of this name; there are: {', '.join(sorted(self._tiers))}", tier=wish.tier[:64])
        if wish.model:
            return self._named(wish)
        if wish.tier:
            return self._of_tier(wish.tier, wish)
        if not self._open(self.default_tier, wish):
            for tier in self._tiers:
                if self._open(tier, wish):
                    return self._of_tier(tier, wish)
        return self._of_tier(self.default_tier, wish)

    def offers(self) -> tuple[Offer, ...]:
        """Every model that can be asked for."""
        return tuple(
            Offer(candidate, tuple(name for name, tier in self._tiers.items() if candidate in self._reachable(name, tier)))
            for candidate in self._models.values()
        )

    def _reachable(self, name: str, tier: Tier) -> tuple[Candidate, ...]:
        """The models that a question may be sent to that asks for the tier."""
        return self._candidates(tier.easy) + self._candidates(tier.hard) if tier.easy else self._candidates(name)

    def _named(self, wish: Wish) -> Route:
        model = self._models.get(wish.model)
        if model is None:
            raise ModelUnknown("no model of this name is configured", model=wish.model[:128])
        holders = [tier for tier in self._tiers if model in self._candidates(tier)]
        limited = wish.plan_tiers or any(self._tiers[tier].plans for tier in holders)
        if limited and model.provider != EXTRACTIVE and not any(self._open(tier, wish) for tier in holders):
            raise NotAllowed("the plan does not include this model", needs="plan", model=wish.model)
        self._require([model], wish.needs, "this model")
        tier = wish.tier or self.default_tier
        return Route(tier, (model,), "asked", tier)

    def _of_tier(self, name: str, wish: Wish) -> Route:
        """The route of a tier, with where it leads when it does not go well. Those ways lead no further: nothing goes round."""
        if not self._open(name, wish):
            raise NotAllowed("the plan does not include this tier", needs="plan", tier=name)
        chosen, reason, difficulty = self._chosen(name, wish)
        route = replace(self._plain(chosen, wish), difficulty=difficulty)
        tier = self._tiers[chosen]
        return replace(
            route,
            asked=name,
            reason=reason or route.reason,
            escalation=self._beside(tier.escalate_to, wish, "escalated"),
            cheaper=self._beside(tier.cheaper, wish, "budget"),
            shadow=self._beside(tier.shadow, replace(wish, plan_tiers=frozenset(), plan=""), "asked"),
            shadow_share=tier.shadow_share,
        )

    def _chosen(self, name: str, wish: Wish) -> tuple[str, str, float | None]:
        """The tier that answers, why it and no other, and how hard the question looked if that was asked."""
        tier = self._tiers[name]
        if not tier.easy:
            return name, "", None
        difficulty = difficulty_of(wish.text)
        hard = difficulty >= tier.difficulty
        wanted, other = (tier.hard, tier.easy) if hard else (tier.easy, tier.hard)
        if self._open(wanted, wish):
            return wanted, "hard" if hard else "easy", difficulty
        return other, "plan", difficulty

    def _plain(self, name: str, wish: Wish) -> Route:
        """The models of a tier that can do what is needed."""
        tier, candidates = self._tiers[name], self._candidates(name)
        able = [candidate for candidate in candidates if wish.needs.keys() <= candidate.capabilities]
        if not able:
            self._require(candidates, wish.needs, "the tier")
        reason = "first" if able[0] is candidates[0] else "capability"
        roomy = [candidate for candidate in able if wish.fits(candidate)]
        if roomy and roomy[0] is not able[0]:
            reason = "context"
        able = roomy or able  # if it fits nowhere, whoever writes the prompt says so
        if any(weight for _, weight in tier.models) and len(able) > 1:
            weights = dict(tier.models)
            # Each order as likely as if drawn one after the other by weight (Efraimidis and Spirakis).
            able.sort(key=lambda candidate: self._random() ** (1 / weights[candidate.model]), reverse=True)
            reason = "weighted"
        return Route(
            name,
            tuple(able),
            reason,
            prompt_tokens_max=tier.prompt_tokens_max,
            output_tokens_max=tier.output_tokens_max,
            continues=tier.continues,
            holds_back=tier.holds_back,
        )

    def _beside(self, name: str, wish: Wish, reason: str) -> Route | None:
        """The route of a tier that another one names, if there is a real model on it, the plan has it and it can do what is needed."""
        if not name or not self._open(name, wish) or self._candidates(name) == (self._fallback,):
            return None
        try:
            return replace(self._plain(name, wish), reason=reason)
        except RequestInvalid:
            return None

    def _open(self, name: str, wish: Wish) -> bool:
        """Whether the plan may use a tier. One that chooses between two is open if either is."""
        tier = self._tiers[name]
        if tier.easy:
            return self._open(tier.easy, wish) or self._open(tier.hard, wish)
        return (not wish.plan_tiers or name in wish.plan_tiers) and (not tier.plans or wish.plan in tier.plans)

    def _candidates(self, name: str) -> tuple[Candidate, ...]:
        tier = self._tiers[name]
        if tier.easy:
            return ()
        return tuple(self._models[model] for model, _ in tier.models if model in self._models) or (self._fallback,)

    def _require(self, candidates: Sequence[Candidate], needs: Mapping[Capability, str], whose: str) -> None:
        """Raise RequestInvalid that names the first thing that none of `candidates` can do."""
        for need in sorted(needs):
            if not any(need in candidate.capabilities for candidate in candidates):
                raise RequestInvalid(f"no model of {whose} can do this: {need}", field=needs[need])
        if needs and not any(needs.keys() <= candidate.capabilities for candidate in candidates):
            raise RequestInvalid(f"no model of {whose} can do all of this at once: {', '.join(sorted(needs))}", field="model")


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask `candidate` after `delay_s`."""

    candidate: Candidate
    delay_s: float


def first_choice(candidates: Sequence[Candidate], health: Health) -> Candidate:
    """The first that is not put aside. If all are, the first of all: somebody has to be asked, and it is a probe."""
    return next((candidate for candidate in candidates if health.lets_through(candidate)), candidates[0])


def next_try(
    candidates: Sequence[Candidate], asked: Sequence[Candidate], failure: DomainError, jitter: float, health: Health
) -> Retry | None:
    """What to do after the last of `asked` failed before its first token; None = give up and report `failure`.

    `jitter` is a uniform random number in [0, 1). An overload or a failure is tried again with full jitter, never sooner than the
    provider asks, and only as far as the model's retry budget goes. What another try cannot heal goes to the next model at once, and a
    refusal is the answer: no model shopping.
    """
    last = asked[-1]
    if not isinstance(failure, ModelOverloaded | ModelFailed | ModelStalled | ModelMisconfigured):
        return None
    tries = asked.count(last)
    if OTHER_KEY in failure.metadata and tries < ATTEMPTS_PER_MODEL_MAX:
        return Retry(last, 0.0)
    following = candidates[candidates.index(last) + 1 :]
    if isinstance(failure, ModelOverloaded | ModelFailed) and tries < ATTEMPTS_PER_MODEL_MAX:
        wanted_s = (failure.retry_after_ms or 0) / 1000
        if wanted_s <= (RETRY_AFTER_NEXT_MAX_S if following else RETRY_AFTER_MAX_S) and health.may_retry(last):
            backoff_s = jitter * min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2 ** (tries - 1))
            return Retry(last, wanted_s + backoff_s)
    return next((Retry(candidate, 0.0) for candidate in following if health.lets_through(candidate)), None)


def writing(route: Route) -> Route | None:
    """The same way with models alone that write what they are asked for; None if there is none. The extractive one quotes."""
    candidates = tuple(candidate for candidate in route.candidates if candidate.provider != EXTRACTIVE)
    if not candidates:
        return None
    return replace(
        route,
        candidates=candidates,
        escalation=route.escalation and writing(route.escalation),
        cheaper=route.cheaper and writing(route.cheaper),
        shadow=route.shadow and writing(route.shadow),
    )
