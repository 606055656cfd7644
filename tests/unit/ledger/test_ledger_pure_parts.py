"""Plans, page tokens, settings and the agreement between files that must list the same things."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest

from services.chassis.config import SettingsError
from services.chassis.errors import RequestInvalid
from services.ledger.config import Settings
from services.ledger.paging import key_of, moment_and_id, moment_and_uuid, token_of
from services.ledger.plans import listed_plans, parse_plans
from services.ledger.postgres_schema import migrations
from services.ledger.postgres_usage import GROUPINGS as COLUMNS
from services.ledger.rpc.records import GROUPINGS


def test_the_free_plan_carries_twenty_streams_and_five_dollars_a_month() -> None:
    """Enough to try in earnest, bounded by money."""
    plans = {plan.name: plan for plan in listed_plans()}

    assert set(plans) == {"free", "pro", "enterprise"}
    assert plans["free"].concurrent_answers >= 2 * 20
    assert plans["free"].requests_per_minute >= 20 * 30
    assert plans["free"].monthly_budget_nanousd == 5 * 10**9
    assert plans["enterprise"].monthly_budget_nanousd == 0


def test_there_is_always_a_free_plan() -> None:
    """Everybody without a subscription is on it."""
    with pytest.raises(ValueError, match="free"):
        parse_plans("")


def test_a_page_token_leads_back_to_its_key() -> None:
    """Opaque outside, exact inside, down to the microsecond."""
    moment, identity = datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=UTC), uuid4()

    assert moment_and_uuid(token_of((moment, str(identity)))) == (moment, identity)
    assert moment_and_id(token_of((moment, "séance"))) == (moment, "séance")
    assert key_of(token_of(("ann",)), 1) == ("ann",)
    assert (token_of(None), key_of("", 1)) == ("", None)


@pytest.mark.parametrize("token", ["!", "a", "e30", token_of(("x",)), token_of(("x", "y")), token_of(("2026-01-01", "y")), "A" * 1025, "é"])
def test_a_token_that_is_not_ours_is_refused(token: str) -> None:
    """Named, and never an internal error."""
    with pytest.raises(RequestInvalid) as refused:
        moment_and_uuid(token)

    assert refused.value.field == "page_token"


def test_usage_can_be_grouped_by_what_the_contract_says() -> None:
    """The names that are checked are the names that have a column."""
    assert set(GROUPINGS) == set(COLUMNS)


def test_migrations_have_numbers_of_their_own() -> None:
    """Each number once, in order, from 1."""
    found = migrations()
    numbers = [migration.number for migration in found]

    assert numbers[0] == 1
    assert numbers == sorted(set(numbers))
    assert len({migration.checksum for migration in found}) == len(found)


def test_settings_need_a_database_and_mask_its_password() -> None:
    """A missing address is named; a present one is never shown."""
    with pytest.raises(SettingsError, match="DATABASE_URL"):
        Settings.load({"TAILRACE_INTERNAL_KEY": "k" * 16})
    given = Settings.load(
        {"TAILRACE_INTERNAL_KEY": "k" * 16, "DATABASE_URL": "postgresql://u:hunter2@h/d", "TAILRACE_LEDGER_TARGET": "x:1"}
    )

    assert "hunter2" not in given.described() + repr(given)
