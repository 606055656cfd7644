"""Which models are asked, and what comes after a failure."""

import dataclasses
from collections import Counter
from pathlib import Path

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
    NotAllowed,
    RequestInvalid,
)
from services.orchestrator.domain import Candidate, Capability, Route
from services.orchestrator.health import FAILURES_IN_A_ROW, RETRIES_SAVED_MAX, Health
from services.orchestrator.models_file import ModelsFileInvalid, read_table, table_of
from services.orchestrator.router import Retry, Router, Table, Tier, Wish, first_choice, next_try

HAIKU = Candidate("anthropic", "haiku", 200_000, 64_000)
SONNET = Candidate("anthropic", "sonnet", 200_000, 64_000, frozenset({"images", "tools"}))
EXTRACTIVE = Candidate("extractive", "extractive", 1_000_000, 64_000)
TIERS = {
    "fast": Tier((("haiku", 0.0),), escalate_to="smart"),
    "smart": Tier((("sonnet", 0.0), ("haiku", 0.0)), cheaper="fast"),
    "auto": Tier(easy="fast", hard="smart", difficulty=0.3),
    "royal": Tier((("sonnet", 0.0),), plans=frozenset({"enterprise"})),
}
HARD = "Compare the two proposals, explain why the second costs more, and write a plan for how to move from one to the other."


def router(*providers: str, tiers: dict[str, Tier] | None = None) -> Router:
    return Router(Table((HAIKU, SONNET, EXTRACTIVE), tiers or TIERS), {"extractive", *providers}, "fast", lambda: 0.5)


def health() -> Health:
    """Of models that never failed, at a time that stands still."""
    return Health(lambda: 100.0, lambda: 0.0)


def out(*candidates: Candidate) -> Health:
    """Of models of which `candidates` have just been put aside."""
    made = health()
    for candidate in candidates:
        for _ in range(FAILURES_IN_A_ROW):
            made.failed(candidate)
    return made


def chosen(route: Route) -> tuple[str, tuple[Candidate, ...]]:
    return route.tier, route.candidates


def test_tier_gives_its_candidates_and_a_model_itself() -> None:
    """A model that is named is the only one asked."""
    assert chosen(router("anthropic").route(Wish())) == ("fast", (HAIKU,))
    assert chosen(router("anthropic").route(Wish(tier="smart"))) == ("smart", (SONNET, HAIKU))
    assert chosen(router("anthropic").route(Wish(model="sonnet"))) == ("fast", (SONNET,))


def test_without_a_provider_every_tier_is_extractive() -> None:
    """The suite answers without any account, and nowhere is there another tier to go to."""
    route = router().route(Wish(tier="smart"))

    assert chosen(route) == ("smart", (EXTRACTIVE,))
    assert (route.escalation, route.cheaper) == (None, None)
    assert [offer.candidate for offer in router().offers()] == [EXTRACTIVE]


@pytest.mark.parametrize(("model", "tier"), [("haiku", ""), ("", "imperial"), ("nope", "fast")])
def test_what_is_not_configured_is_unknown(model: str, tier: str) -> None:
    """Also a model whose provider has no key."""
    with pytest.raises(ModelUnknown):
        router().route(Wish(model, tier))


def test_shipped_table_is_sound() -> None:
    """Both tiers have a Claude model with a key and the extractive one without."""
    shipped = read_table()
    with_key, without = (Router(shipped, {"extractive", *found}, "fast", lambda: 0.5) for found in (["anthropic"], []))

    assert with_key.route(Wish(tier="smart")).candidates[0].model == "claude-sonnet-5-5"
    assert without.route(Wish(tier="fast")).candidates[0].model == "extractive"


def test_question_chooses_its_tier_by_how_hard_it_looks() -> None:
    """The reason and the measure go with the choice; it stays booked under the tier that was asked for."""
    easy, hard = (router("anthropic").route(Wish(tier="auto", text=text)) for text in ("Which port is open?", HARD))

    assert (easy.asked, easy.tier, easy.reason) == ("auto", "fast", "easy")
    assert (hard.asked, hard.tier, hard.reason) == ("auto", "smart", "hard")
    assert easy.difficulty is not None
    assert hard.difficulty is not None
    assert easy.difficulty < 0.3 <= hard.difficulty


def test_plan_bounds_what_may_be_asked_by_tier_and_by_model() -> None:
    """A tier that the plan has not is refused, a model of it too; a tier that names plans is for those alone."""
    made, poor = router("anthropic"), frozenset({"fast"})
    with pytest.raises(NotAllowed):
        made.route(Wish(tier="smart", plan="free", plan_tiers=poor))
    with pytest.raises(NotAllowed):
        made.route(Wish(model="sonnet", plan="free", plan_tiers=poor))
    with pytest.raises(NotAllowed):
        made.route(Wish(tier="royal", plan="free"))

    assert made.route(Wish(tier="royal", plan="enterprise")).candidates == (SONNET,)
    assert made.route(Wish(model="haiku", plan="free", plan_tiers=poor)).candidates == (HAIKU,)
    assert made.route(Wish(plan="free", plan_tiers=frozenset({"smart"}))).tier == "smart"
    assert made.route(Wish(tier="fast", plan="free", plan_tiers=poor)).escalation is None
    assert made.route(Wish(tier="auto", text=HARD, plan="free", plan_tiers=poor)).reason == "plan"


def test_what_a_question_needs_bounds_who_is_asked() -> None:
    """Who cannot see pictures is not shown any; if nobody can, the field is named."""
    needs: dict[Capability, str] = {"images": "images"}
    tiers = {"fast": Tier((("haiku", 0.0),)), "any": Tier((("haiku", 0.0), ("sonnet", 0.0)))}
    made = router("anthropic", tiers=tiers)  # type: ignore[arg-type]
    route = made.route(Wish(tier="any", needs=needs))
    with pytest.raises(RequestInvalid) as refused:
        made.route(Wish(tier="fast", needs=needs))

    assert (route.candidates, route.reason) == ((SONNET,), "capability")
    assert refused.value.field == "images"


def test_question_that_does_not_fit_goes_to_a_model_with_more_room() -> None:
    """Counted as bytes, with room for the answer; where it fits nowhere the order stays, and the prompt's own bound is told."""
    small = Candidate("anthropic", "small", 20_000, 8_000)
    made = Router(Table((small, HAIKU, EXTRACTIVE), {"fast": Tier((("small", 0.0), ("haiku", 0.0)))}), {"anthropic"}, "fast", lambda: 0.5)
    short, long, longest = (made.route(Wish(text="x" * size, output_tokens_max=8_000)) for size in (7_000, 9_000, 300_000))

    assert (short.candidates, short.reason) == ((small, HAIKU), "first")
    assert (long.candidates, long.reason) == ((HAIKU,), "context")
    assert longest.candidates == (small, HAIKU)


def test_weights_draw_the_order() -> None:
    """Three to one means about three in four, and the other is the next."""
    draws = iter([0.9, 0.2, 0.1, 0.8] * 2)
    weighted = Table((HAIKU, SONNET, EXTRACTIVE), {"fast": Tier((("haiku", 3.0), ("sonnet", 1.0)))})
    made = Router(weighted, {"anthropic"}, "fast", lambda: next(draws))

    assert [made.route(Wish()).candidates for _ in range(2)] == [(HAIKU, SONNET), (SONNET, HAIKU)]
    assert Router(weighted, {"anthropic"}, "fast", lambda: 0.5).route(Wish()).reason == "weighted"


def test_weights_are_kept_over_many_draws() -> None:
    """The first is drawn as often as its weight says, within four standard deviations."""
    import random

    weighted = Table((HAIKU, SONNET, EXTRACTIVE), {"fast": Tier((("haiku", 3.0), ("sonnet", 1.0)))})
    made = Router(weighted, {"anthropic"}, "fast", random.Random(7).random)
    first = Counter(made.route(Wish()).candidates[0].model for _ in range(4_000))

    assert abs(first["haiku"] - 3_000) <= 4 * 28


def test_ways_beside_a_route_lead_no_further() -> None:
    """Escalation and thrift are one step each, so that no question goes round in circles."""
    fast, smart = (router("anthropic").route(Wish(tier=tier)) for tier in ("fast", "smart"))

    assert fast.escalation is not None
    assert smart.cheaper is not None
    assert (fast.escalation.tier, fast.escalation.reason, fast.escalation.escalation) == ("smart", "escalated", None)
    assert (smart.cheaper.tier, smart.cheaper.reason, smart.cheaper.cheaper) == ("fast", "budget", None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("[[models]]\nmodel = 'x'\nprovider = 'p'\ncontext_tokens_max = 0\noutput_tokens_max = 1", "models[1].context_tokens_max"),
        ("[tiers.t]\nmodels = ['ghost']", "tiers.t.models: there is no model ghost"),
        ("[tiers.t]\nmodels = ['extractive']\nescalate_to = 'nowhere'", "tiers.t.escalate_to: 'nowhere'"),
        ("[tiers.t]\nmodels = ['extractive']\ncheaper = 't'", "tiers.t.cheaper: 't'"),
        ("[tiers.t]\nmodels = ['extractive']\nspeed = 1", "unknown field `speed`"),
        ("[tiers.t]\nmodels = []", "length >= 1"),
        ("[tiers.t]\neasy = 'fast'", "needs either `models`, or `easy` and `hard`"),
        ("[tiers.t]\nmodels = [{model = 'extractive', weight = 0}]", "> 0"),
        ("[tiers.t]\nmodels = ['extractive', 'extractive']", "more than once"),
        ("[tiers.t]\nmodels = ['extractive']\nshadow = {tier = 'fast', share = 2}", "<= 1"),
        ("[tiers.fast]\nmodels = []", "line"),
        ("speed = \n", "line"),
    ],
)
def test_file_that_contradicts_itself_names_the_place_and_the_bound(change: str, told: str, tmp_path: Path) -> None:
    """The file's name, the key or the line, and what is allowed there."""
    sound = (
        "[tiers.fast]\nmodels = ['extractive']\n[[models]]\nmodel = 'extractive'\nprovider = 'extractive'\n"
        "context_tokens_max = 1\noutput_tokens_max = 1\n"
    )
    path = tmp_path / "models.toml"
    path.write_text(sound)
    read_table(path)
    path.write_text(sound + change)
    with pytest.raises(ModelsFileInvalid) as refused:
        read_table(path)

    assert str(refused.value).startswith("models.toml: ")
    assert told in str(refused.value)


def test_file_without_the_model_that_needs_no_account_is_refused() -> None:
    """It serves every tier that has nobody else."""
    row = {"model": "m", "provider": "p", "context_tokens_max": 1, "output_tokens_max": 1}
    with pytest.raises(ModelsFileInvalid, match="extractive"):
        table_of({"models": [row], "tiers": {"fast": {"models": ["m"]}}})


def test_default_tier_must_be_there_also_after_a_change() -> None:
    """A table without it is refused and what was before stays."""
    made = router("anthropic")
    with pytest.raises(ValueError, match="slow"):
        Router(Table((EXTRACTIVE,), {"fast": Tier((("extractive", 0.0),))}), {"extractive"}, "slow", lambda: 0.5)
    with pytest.raises(ValueError, match="fast"):
        made.adopt(Table((EXTRACTIVE,), {"other": Tier((("extractive", 0.0),))}))

    assert made.route(Wish()).candidates == (HAIKU,)


def test_overload_is_tried_three_times_with_growing_jitter_and_never_too_early() -> None:
    """Full jitter over a doubling bound, on top of what the provider asks for."""
    overloaded = ModelOverloaded("", retry_after_ms=1000)

    assert next_try([HAIKU], [HAIKU], ModelOverloaded(), 0.5, health()) == Retry(HAIKU, 0.2)
    assert next_try([HAIKU], [HAIKU, HAIKU], ModelFailed(), 0.5, health()) == Retry(HAIKU, 0.4)
    assert next_try([HAIKU], [HAIKU], overloaded, 0.0, health()) == Retry(HAIKU, 1.0)
    assert next_try([HAIKU], [HAIKU] * 3, ModelOverloaded(), 0.5, health()) is None


def test_provider_that_asks_for_too_much_patience_is_left_at_once() -> None:
    """Better the next model, or the truth, than a minute of silence; where another could answer, a few seconds are too much."""
    slow, slower = ModelOverloaded("", retry_after_ms=5_000), ModelOverloaded("", retry_after_ms=60_000)

    assert next_try([HAIKU], [HAIKU], slower, 0.5, health()) is None
    assert next_try([HAIKU], [HAIKU], slow, 0.0, health()) == Retry(HAIKU, 5.0)
    assert next_try([SONNET, HAIKU], [SONNET], slow, 0.5, health()) == Retry(HAIKU, 0.0)


@pytest.mark.parametrize("failure", [ModelStalled(), ModelMisconfigured()])
def test_what_another_try_cannot_heal_goes_to_the_next_model(failure: DomainError) -> None:
    """A stalled or misconfigured provider is not asked twice."""
    assert next_try([SONNET, HAIKU], [SONNET], failure, 0.5, health()) == Retry(HAIKU, 0.0)
    assert next_try([SONNET, HAIKU], [SONNET, HAIKU], failure, 0.5, health()) is None


@pytest.mark.parametrize("failure", [ModelRefused(), BudgetExhausted()])
def test_refusal_is_an_answer(failure: DomainError) -> None:
    """No other model is asked until one says yes."""
    assert next_try([SONNET, HAIKU], [SONNET], failure, 0.5, health()) is None


@pytest.mark.parametrize("failure", [ModelMisconfigured, ModelOverloaded])
def test_failure_of_one_key_is_tried_with_another_at_once_and_counts(failure: type[DomainError]) -> None:
    """No pause, no budget, but three calls in all."""
    failed = failure("", other_key=1, retry_after_ms=60_000)

    assert next_try([HAIKU], [HAIKU], failed, 0.9, out(HAIKU)) == Retry(HAIKU, 0.0)
    assert next_try([HAIKU], [HAIKU] * 3, failed, 0.9, health()) is None


def test_retries_end_with_the_budget_and_who_is_put_aside_gets_none() -> None:
    """Then the next model is asked, or the failure is told."""
    made = health()
    granted = sum(next_try([HAIKU], [HAIKU], ModelFailed(), 0.5, made) is not None for _ in range(50))

    assert granted == RETRIES_SAVED_MAX
    assert next_try([HAIKU, SONNET], [HAIKU], ModelFailed(), 0.5, made) == Retry(SONNET, 0.0)
    assert next_try([HAIKU], [HAIKU], ModelFailed(), 0.5, out(HAIKU)) is None


def test_who_is_put_aside_is_passed_over_unless_all_are() -> None:
    """Somebody is always asked."""
    assert first_choice([SONNET, HAIKU], out(SONNET)) == HAIKU
    assert first_choice([SONNET, HAIKU], out(SONNET, HAIKU)) == SONNET
    assert next_try([SONNET, HAIKU], [SONNET], ModelStalled(), 0.5, out(HAIKU)) is None


def test_route_says_all_that_its_tier_says() -> None:
    """No key of a tier is read and then forgotten."""
    tier = Tier((("haiku", 0.0),), frozenset(), 1000, 100, "smart", "smart", True, True, "smart", 0.5)
    route = router("anthropic", tiers={"fast": tier, "smart": TIERS["smart"]}).route(Wish())

    assert (route.prompt_tokens_max, route.output_tokens_max, route.continues, route.holds_back) == (1000, 100, True, True)
    assert all(getattr(route, way) is not None for way in ("escalation", "cheaper", "shadow"))
    assert route.shadow_share == 0.5
    assert {field.name for field in dataclasses.fields(Tier)} >= {"models", "plans"}
