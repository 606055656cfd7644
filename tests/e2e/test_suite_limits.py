"""Limits of a plan through the whole suite."""

import asyncio

from bench.script import Behaviour
from tests.suite import Suite, ask

PLAN = {"requests_per_minute": 1000, "tokens_per_minute": 100_000_000, "concurrent_answers": 1, "tiers": ["fast", "smart"]}
QUESTION = "Who keeps the key of the lock at Lower Mill?"


async def test_the_same_request_again_is_the_same_answer_where_the_plan_has_room_for_one(suite: Suite) -> None:
    """While it runs and when it has ended: one provider call, one place. Another question has none until the first is done."""
    await suite.provider.reset()
    await suite.provider.behave(Behaviour(waits=True, tokens=10))
    async with suite.client("keeper", "lock") as client, suite.client("boss", "lock", ("user", "admin")) as admin:
        (await admin.put("/v1/admin/plans/single", json=PLAN)).raise_for_status()
        (await admin.put("/v1/admin/subscriptions/keeper", json={"plan": "single"})).raise_for_status()
        client.headers["idempotency-key"] = "the key of the lock"
        begun = []
        for _ in range(2):  # twice begun, and left as soon as it is under way
            async with client.stream("POST", "/v1/answers", json={"question": QUESTION, "cache": "off"}) as response:
                begun.append((response.status_code, await anext(response.aiter_lines())))
        asked = [asyncio.create_task(ask(client, QUESTION, cache="off")) for _ in range(2)]
        other = await client.post("/v1/answers", json={"question": "Who else?"}, headers={"idempotency-key": "another"})
        await suite.provider.release()
        first, second = await asyncio.gather(*asked)
        again = await ask(client, QUESTION, cache="off")
        calls = await suite.provider.records()

    assert [status for status, _ in begun] == [200, 200]
    assert (other.status_code, other.json()["limit_kind"]) == (429, "concurrency")
    assert first.answer_id == second.answer_id == again.answer_id
    assert first.done["text_sha256"] == second.done["text_sha256"] == again.done["text_sha256"]
    assert len(calls) == 1
