"""A browser's own EventSource, which reconnects by its own rules, through a proxy that keeps cutting it off.

Nothing of the page is involved: what is tested is that the gateway's stream is one that browsers can resume, and end.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser

from bench.faulty_proxy import PASS, FaultyProxy, Rule
from bench.ground import Ground, ground, seed_of_run
from bench.reader import Read, Reply, fetch, read_answer, request
from bench.script import Behaviour
from tests.e2e.test_page_in_browser import browser
from tests.integration.ledger.ledger_kit import audit

pytestmark = pytest.mark.slow
__all__ = ["browser"]  # the fixture

CUTS = 3
LISTEN = """
path => {
  window.got = [];
  window.source = new EventSource(path);
  const names = ["accepted", "step", "passages", "delta", "citation", "tool_call", "tool_result", "done", "cancelled", "error"];
  for (const name of names) source.addEventListener(name, event => {
    if (event.data !== undefined) got.push([event.lastEventId, name, event.data]);
  });
}
"""
LOOP_WOULD_SHOW_S = 2.5
"""More than twice what the stream tells a browser to wait before it comes back."""


@pytest.fixture(scope="module")
async def made() -> AsyncIterator[Ground]:
    async with ground(seed_of_run()) as made:
        yield made
        assert await audit(made.suite.postgres.url) == {}


def as_the_browser_has_them(read: Read) -> list[list[str]]:
    return [
        [str(block.id), block.name, next(line[6:] for line in block.raw.decode().split("\n") if line.startswith("data: "))]
        for block in read.blocks
    ]


async def test_an_event_source_that_is_cut_gets_every_event_once_and_stops_at_the_end(browser: Browser, made: Ground) -> None:
    """It comes back with its Last-Event-ID after every cut; after the end it is told 204, and does not come back again."""
    print(f"SEED={made.seed}")
    chance = random.Random(made.seed)
    await made.suite.provider.behave(Behaviour(ttft_ms=20, tokens=30, tokens_per_s=100))
    _, body = made.question()
    read = await read_answer(made.ports, made.token(), body, key="event-source")
    events = f"/v1/answers/{read.answer_id}/events"
    visits: list[bytes] = []
    identity = (("authorization", f"Bearer {made.token()}"),)

    def choose(_: int, head: bytes) -> Rule:
        """Only the stream is cut: at an event, or inside the next one."""
        if events.encode() not in head:
            return Rule(headers=identity)
        visits.append(head)
        if len(visits) > CUTS:
            return Rule(headers=identity)
        return Rule(cut_after_events=chance.randint(1, 6), cut_extra_bytes=chance.choice((0, chance.randint(1, 60))), headers=identity)

    async with FaultyProxy(made.ports[1], choose) as proxy:
        context = await browser.new_context()
        try:
            page = await context.new_page()
            await page.goto(f"http://127.0.0.1:{proxy.port}/")  # a page whose policy lets it connect to its own origin
            await page.evaluate(LISTEN, events)
            await page.wait_for_function("() => window.source.readyState === EventSource.CLOSED", timeout=30_000)
            got: list[Any] = await page.evaluate("() => window.got")
            at_the_end = len(visits)
            await asyncio.sleep(LOOP_WOULD_SHOW_S)
        finally:
            await context.close()

    assert got == as_the_browser_has_them(read)
    assert len(visits) == at_the_end == CUTS + 2  # what is left, and the 204
    assert proxy.cuts == CUTS
    assert [b"last-event-id" in head.lower() for head in visits] == [False] + [True] * (CUTS + 1)
    last = await fetch(made.ports[0], request("GET", events, made.token(), last_event_id=str(read.last_id)))
    assert (last.status, last.blocks) == (204, [])


async def test_an_event_source_of_a_signed_in_page_follows_an_answer_that_is_being_made(browser: Browser, made: Ground) -> None:
    """It brings nothing but the cookie of the page's sign-in, connects while the model writes, is cut, and comes back before the end."""
    print(f"SEED={made.seed}")
    chance = random.Random(f"{made.seed}:live")
    await made.suite.provider.behave(Behaviour(ttft_ms=20, tokens=300, tokens_per_s=30))
    _, body = made.question()
    begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    visits: list[tuple[bytes, bool]] = []
    """Heads of the requests for the stream, and whether the answer was still being made."""

    def look(reply: Reply) -> None:
        if reply.blocks and not begun.done():
            begun.set_result(reply.blocks[0].data["answer_id"])

    def choose(_: int, head: bytes) -> Rule:
        if not (begun.done() and f"/v1/answers/{begun.result()}/events".encode() in head):
            return PASS
        visits.append((head, not reading.done()))
        return Rule(cut_after_events=chance.randint(1, 20), cut_extra_bytes=chance.randint(0, 60)) if len(visits) <= CUTS else PASS

    async with FaultyProxy(made.ports[1], choose) as proxy:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{proxy.port}/#token={made.token()}")
        await page.wait_for_selector("#question")  # signed in
        reading = asyncio.create_task(read_answer(made.ports, made.token(), body, key="event-source-live", on_blocks=look))
        try:
            await page.evaluate(LISTEN, f"/v1/answers/{await begun}/events")
            read = await reading
            await page.wait_for_function("() => window.source.readyState === EventSource.CLOSED", timeout=30_000)
            got: list[Any] = await page.evaluate("() => window.got")
        finally:
            reading.cancel()
            await context.close()

    assert read.end == "done"
    assert got == as_the_browser_has_them(read)
    assert proxy.cuts == CUTS
    assert [live for _, live in visits] == [True] * (CUTS + 1) + [False]  # the last one is told 204
    assert [b"last-event-id" in head.lower() for head, _ in visits] == [False] + [True] * (CUTS + 1)
    assert all(b"cookie: tailrace=" in head.lower() and b"authorization" not in head.lower() for head, _ in visits)
