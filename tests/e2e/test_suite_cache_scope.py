"""Whom a plan shares cached answers with, in the whole suite: two users of one tenant, and a plan that is changed under them."""

import time

import httpx

from tests.suite import Suite, ask, ingest

CHANGED_WITHIN_S = 5.0
PLAN = {"requests_per_minute": 1000, "tokens_per_minute": 100_000_000, "concurrent_answers": 9, "tiers": ["fast", "smart"]}
PASSAGE = {"The ferry": "The ferry at Upper Mill crosses twice a day and is rowed by Ida Winter."}


async def verdicts(clients: list[httpx.AsyncClient], question: str) -> list[str]:
    """What the cache said to each in turn."""
    return [(await ask(client, question)).done["cache"]["verdict"] for client in clients]


async def test_a_plan_says_whom_cached_answers_are_shared_with(suite: Suite) -> None:
    """With the tenant, with oneself, with nobody: in force within five seconds, and what was kept for one is not shared later."""
    await suite.provider.reset()
    async with (
        suite.client("boss", "ferry", ("user", "admin")) as admin,
        suite.client("ann", "ferry") as ann,
        suite.client("bob", "ferry") as bob,
    ):
        await ingest(ann, PASSAGE)

        async def put(scope: str) -> None:
            (await admin.put("/v1/admin/plans/crossing", json={**PLAN, "cache_scope": scope})).raise_for_status()

        async def within_bound(question: str, wanted: list[str]) -> list[str]:
            """Ask until they are told what is wanted, at most as long as a change may take; return what they were told last."""
            ends_at = time.monotonic() + CHANGED_WITHIN_S
            number = 0
            while True:
                number += 1
                last = time.monotonic() > ends_at
                told = await verdicts([ann, bob, ann], f"{question} In year {number}?")
                if told == wanted or last:
                    return told

        await put("tenant")
        for user in ("ann", "bob"):
            (await admin.put(f"/v1/admin/subscriptions/{user}", json={"plan": "crossing"})).raise_for_status()
        shared = await within_bound("Who rows the ferry at Upper Mill?", ["miss", "exact", "exact"])
        await put("user")
        own = await within_bound("Who rows the ferry there?", ["miss", "miss", "exact"])
        await put("off")
        none = await within_bound("Who is it that rows the ferry?", ["off", "off", "off"])
        await put("tenant")
        again = await within_bound("Who rows the ferry over the river?", ["miss", "exact", "exact"])
        listed = {plan["name"]: plan["cache_scope"] for plan in (await admin.get("/v1/admin/plans")).json()["plans"]}
        refused = await admin.put("/v1/admin/plans/crossing", json={**PLAN, "cache_scope": "everybody"})

    assert (shared, own, none, again) == (["miss", "exact", "exact"], ["miss", "miss", "exact"], ["off"] * 3, ["miss", "exact", "exact"])
    assert listed["crossing"] == listed["free"] == "tenant"
    assert (refused.status_code, refused.json()["field"]) == (400, "cache_scope")
