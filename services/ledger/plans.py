"""The plans that come with the project. Pure; which plan a user is on is kept in the store."""

import tomllib
from importlib import resources

from services.ledger.domain import Limits, Plan
from services.ledger.prices import nanousd

FREE = "free"
"""The plan of everybody who has no subscription; it always exists."""


def listed_plans() -> list[Plan]:
    """The plans of plans.toml."""
    return parse_plans(resources.files(__package__).joinpath("plans.toml").read_text())


def parse_plans(text: str) -> list[Plan]:
    """Read plans. Raises KeyError for a missing figure, TypeError for an unknown limit, ValueError without a free plan."""
    found = [
        Plan(
            name=name,
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
            concurrent_answers=row["concurrent_answers"],
            monthly_budget_nanousd=nanousd(row["monthly_budget_usd"]),
            tiers=tuple(row["tiers"]),
            tenant_limits=Limits(**row.get("tenant_limits", {})),
            key_limits=Limits(**row.get("key_limits", {})),
            answer_deadline_ms=row.get("answer_deadline_ms", 0),
            tools=tuple(row.get("tools", ())),
            cache_scope=row.get("cache_scope", ""),
        )
        for name, row in tomllib.loads(text).items()
    ]
    if FREE not in {plan.name for plan in found}:
        raise ValueError("there must be a plan named free")
    return found
