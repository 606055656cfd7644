"""Subscriptions over time: changed and ended at once or with the calendar month, without anything that has to run then."""

from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger


def next_month(now: datetime) -> datetime:
    return datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)


async def subscribe(ledger: Ledger, boss: Principal, plan: str, when: str = "") -> Any:
    return (await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan=plan, when=when), boss)).subscription


async def cancel(ledger: Ledger, boss: Principal, when: str) -> None:
    await ledger.ask("DeleteSubscription", pb.DeleteSubscriptionRequest(user="ann", when=when), boss)


async def seen(ledger: Ledger, ann: Principal) -> tuple[str, str]:
    """The plan in force, which entitlements must agree with, and the one that follows."""
    subscription = (await ledger.ask("GetSubscription", pb.GetSubscriptionRequest(), ann)).subscription
    plan = (await ledger.ask("GetEntitlements", pb.GetEntitlementsRequest(), ann)).plan.name
    assert plan == subscription.plan
    assert subscription.HasField("changes_at") == bool(subscription.next_plan)
    return subscription.plan, subscription.next_plan


async def let_a_month_pass(ledger: Ledger, tenant: str) -> None:
    """The same rows, seen a month later."""
    connection = await asyncpg.connect(ledger.url)
    try:
        back = "started_at - interval '32 days', ended_at = ended_at - interval '32 days'"
        await connection.execute(f"UPDATE subscriptions SET started_at = {back} WHERE tenant = $1", tenant)
    finally:
        await connection.close()


async def test_a_change_at_the_period_end_is_shown_and_comes_by_itself(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    await subscribe(ledger, boss, "enterprise")
    changed = await subscribe(ledger, boss, "pro", "period_end")
    assert changed.changes_at.ToDatetime(tzinfo=UTC) == next_month(datetime.now(UTC))
    assert await seen(ledger, ann) == ("enterprise", "pro")
    await let_a_month_pass(ledger, ann.tenant)

    assert await seen(ledger, ann) == ("pro", "")


async def test_the_first_subscription_may_begin_with_the_next_period(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    await subscribe(ledger, boss, "pro", "period_end")
    assert await seen(ledger, ann) == ("free", "pro")
    await let_a_month_pass(ledger, ann.tenant)

    assert await seen(ledger, ann) == ("pro", "")


async def test_a_cancel_at_the_period_end_leaves_what_was_paid_for(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    await subscribe(ledger, boss, "pro")
    await cancel(ledger, boss, "period_end")
    assert await seen(ledger, ann) == ("pro", "free")
    await let_a_month_pass(ledger, ann.tenant)

    assert await seen(ledger, ann) == ("free", "")


async def test_a_cancel_at_once_takes_what_was_to_come_along(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    await subscribe(ledger, boss, "pro")
    await subscribe(ledger, boss, "enterprise", "period_end")
    await cancel(ledger, boss, "now")
    assert await seen(ledger, ann) == ("free", "")
    await let_a_month_pass(ledger, ann.tenant)

    assert await seen(ledger, ann) == ("free", "")


async def test_whoever_is_free_again_is_so_since_the_cancel(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Not since they were first seen."""
    paid = await subscribe(ledger, boss, "pro")
    await cancel(ledger, boss, "now")
    free = (await ledger.ask("GetSubscription", pb.GetSubscriptionRequest(), ann)).subscription

    assert free.plan == "free"
    assert free.started_at.ToDatetime() > paid.started_at.ToDatetime()


async def test_the_last_word_counts(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """A pending change is replaced by another, and taken back by naming the plan that is in force."""
    await subscribe(ledger, boss, "pro")
    await subscribe(ledger, boss, "enterprise", "period_end")
    await cancel(ledger, boss, "period_end")
    assert await seen(ledger, ann) == ("pro", "free")
    await subscribe(ledger, boss, "pro", "period_end")
    assert await seen(ledger, ann) == ("pro", "")
    await subscribe(ledger, boss, "enterprise", "period_end")
    await subscribe(ledger, boss, "enterprise", "now")

    assert await seen(ledger, ann) == ("enterprise", "")


async def test_any_other_moment_is_refused(ledger: Ledger, boss: Principal) -> None:
    with pytest.raises(RequestInvalid) as refused:
        await subscribe(ledger, boss, "pro", "tomorrow")

    assert refused.value.field == "when"
