"""The committed page in a real browser: against a scripted gateway for what a person sees and what a hostile text cannot do,
and on the whole suite for the way through.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser, BrowserContext, Dialog, Page, Request, async_playwright, expect

from bench.script import Behaviour, answer_text
from tests.e2e.page_gateway import TOKEN, TRACE, Cut, FakeGateway, Problem, citation, delta, document, done, passages, serving, step
from tests.suite import Suite

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
INSTALL = "apt-get install chromium (or point TAILRACE_BROWSER at a Chromium)"
EXACT = "the producer runs on for a grace time of 60 seconds"


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("TAILRACE_BROWSER") or next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A headless Chromium. Without one the tests are skipped, unless TAILRACE_REQUIRE_BROWSER says that they must run."""
    executable = find_browser()
    if executable is None:
        if os.environ.get("TAILRACE_REQUIRE_BROWSER"):
            pytest.fail(f"no browser found: {INSTALL}")
        pytest.skip(f"the page was NOT tested, no browser found: {INSTALL}")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        await browser.close()


@dataclass
class Visit:
    """A signed-in page, the gateway behind it, and everything that went wrong or went elsewhere."""

    page: Page
    gateway: FakeGateway
    context: BrowserContext
    troubles: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    async def ask(self, question: str) -> None:
        await self.page.fill("#question", question)
        await self.page.press("#question", "Enter")

    def watch(self, page: Page) -> None:
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.troubles.append(message.text))
        page.on("request", self._seen)

    def _seen(self, request: Request) -> None:
        if not request.url.startswith(self.gateway.url):
            self.strangers.append(request.url)


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """The page, opened with the address that the launcher prints. The page must not log an error or call another host."""
    async with serving(FakeGateway()) as gateway:
        context = await browser.new_context(viewport={"width": 1280, "height": 800})
        page = await context.new_page()
        visit = Visit(page, gateway, context)
        visit.watch(page)
        await page.goto(f"{gateway.url}/#token={TOKEN}")
        await page.wait_for_selector("#question")
        yield visit
        await context.close()
        assert visit.troubles == []
        assert visit.strangers == []


async def test_an_answer_streams_as_markdown_before_it_is_complete(visit: Visit) -> None:
    """Text is drawn when it arrives, unfinished emphasis and code as if they were closed, and never as raw marks."""
    more, end = asyncio.Event(), asyncio.Event()
    text = "A **bold claim** with `code`.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1\n```\n"
    visit.gateway.on(
        "Why?", step("generate", "running"), delta(text[:8]), more.wait, delta(text[8:24]), end.wait, delta(text[24:]), done(text)
    )
    await visit.ask("Why?")
    answer = visit.page.locator(".answer")
    await expect(answer.locator("strong")).to_have_text("bold")
    await expect(answer).not_to_contain_text("*")
    more.set()
    await expect(answer.locator("strong")).to_have_text("bold claim")
    await expect(answer.locator("p")).to_have_text("A bold claim with c")
    end.set()
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await expect(answer.locator("p code")).to_have_text("code")
    await expect(answer.locator("td")).to_have_text(["1", "2"])
    await expect(answer.locator("pre code")).to_have_text("x = 1")


async def test_finished_blocks_are_not_drawn_again(visit: Visit) -> None:
    """A paragraph that is complete keeps its element while the text goes on, so nothing flickers and a selection survives."""
    more = asyncio.Event()
    text = "First.\n\nSecond.\n\nThird.\n\nFourth."
    visit.gateway.on("Go", delta(text[:-7]), more.wait, delta(text[-7:]), done(text))
    await visit.ask("Go")
    first = visit.page.locator(".answer p").first
    await expect(visit.page.locator(".answer p")).to_have_count(3)
    await first.evaluate("element => element.seen = true")
    more.set()
    await expect(visit.page.locator(".answer p").last).to_have_text("Fourth.")
    assert await first.evaluate("element => element.seen === true")


async def test_a_citation_opens_its_passage_and_gives_the_focus_back(visit: Visit) -> None:
    """`[2]` is a chip; the panel shows where the passage stands and marks the sentence that carries the statement."""
    text = "It goes on: the producer runs on for a grace time of 60 seconds [2]. Unknown [7]."
    passage = f"First comes\nthis. Then {EXACT}. And more.\n\n- one\n- two"
    found = passages("Something else entirely.", passage, ending="txt")
    visit.gateway.on("Cite", found, delta(text), citation(2), done(text))
    await visit.ask("Cite")
    chip = visit.page.get_by_role("button", name="Passage 2: Streams 2")
    await expect(visit.page.locator(".answer .cite")).to_have_text(["2"])
    await expect(visit.page.locator(".answer")).to_contain_text("Unknown [7].")
    await expect(visit.page.locator(".source.cited .number")).to_have_text(["2"])
    await chip.focus()
    await visit.page.keyboard.press("Enter")
    panel = visit.page.get_by_role("dialog", name="Streams 2")
    await expect(panel).to_be_focused()
    await expect(panel.locator(".path")).to_have_text("Design › Part 2")
    await expect(panel.locator("dd")).to_have_text(["docs/streams-2.txt", f"2,400–{2400 + len(passage):,}", "3", "0.0325"])
    await expect(panel.locator("mark")).to_have_text(f"Then {EXACT}.")
    shown = await panel.locator(".passage-text").text_content()
    assert shown == passage.replace("comes\nthis", "comes this")
    await panel.get_by_role("button", name="Previous passage").click()
    await expect(visit.page.get_by_role("dialog", name="Streams 1")).to_contain_text("Something else entirely.")
    await visit.page.keyboard.press("Escape")
    await expect(visit.page.get_by_role("dialog")).to_have_count(0)
    await expect(chip).to_be_focused()


MARKDOWN_PASSAGE = """## Redirects

Unlike `requests`, HTTPX does
**not follow redirects by default**. We [differ](https://example.org/why) here, *[see](javascript:alert(1))*.

![a chart](https://example.org/chart.png) <img src="https://example.org/x.png" onerror="alert(1)">

```python
# No heading.
client = httpx.Client(follow_redirects=True)
```

| verb | follows |
|---|---|
| GET | no |
"""


async def test_a_passage_of_a_markdown_document_reads_as_it_was_meant(visit: Visit) -> None:
    """Headings, code and tables are drawn, no marks are left, nothing loads or runs, and what the answer says is marked to the letter."""
    said = "Unlike `requests`, HTTPX does not follow redirects by default."
    visit.gateway.on("Cite", passages(MARKDOWN_PASSAGE), delta(f"{said} [1]"), citation(1), done(f"{said} [1]"))
    await visit.ask("Cite")
    await visit.page.locator(".cite").click()
    text = visit.page.locator(".passage-text")
    await expect(text.locator("h2")).to_have_text("Redirects")
    await expect(text.locator("strong")).to_have_text("not follow redirects by default")
    await expect(text.locator("pre code")).to_have_text("# No heading.\nclient = httpx.Client(follow_redirects=True)")
    await expect(text.locator("td")).to_have_text(["GET", "no"])
    assert "".join(await text.locator("mark").all_text_contents()) == said.replace("`", "")
    assert await text.locator("a").evaluate_all("links => links.map(link => link.href)") == ["https://example.org/why"]
    await expect(text.locator("img")).to_have_count(0)
    await expect(text).not_to_contain_text("**")
    await expect(text).not_to_contain_text("```")
    await text.get_by_role("button", name="Copy").click()
    await expect(text.get_by_role("button", name="Copied")).to_be_visible()


async def test_a_passage_that_begins_within_code_is_shown_as_code(visit: Visit) -> None:
    """A long block of code is cut in several passages: the end of one has a fence that closes, and none that opens."""
    visit.gateway.on("Cite", passages("x = 1  # one\n```\n\nThen *prose*."), delta("So [1]."), citation(1), done("So [1]."))
    await visit.ask("Cite")
    await visit.page.locator(".cite").click()
    text = visit.page.locator(".passage-text")
    await expect(text.locator("pre code")).to_have_text("x = 1  # one")
    await expect(text.locator("em")).to_have_text("prose")


TABLE_PASSAGE = """Limits of the pool.

| Setting | What it bounds | Default |
|---|---|---|
| pool | open connections | 100 |
| patience | seconds for a read | 500 |
| age | minutes of life | 30 |
"""


async def test_the_row_that_is_said_under_its_columns_is_marked_and_not_their_names(visit: Visit) -> None:
    said = "Setting: patience; What it bounds: seconds for a read; Default: 500"
    visit.gateway.on("Cite", passages(TABLE_PASSAGE), delta(f"{said} [1]"), citation(1), done(f"{said} [1]"))
    await visit.ask("Cite")
    await visit.page.locator(".cite").click()
    marks = visit.page.locator(".passage-text mark")
    await expect(marks).to_have_text(["patience", "seconds for a read", "500"])


PLAIN_PASSAGE = """# There he said that an offer had been made by Norwich.[42] Roberts did not
want to leave *the club*.[42]
In July 1997, Norwich paid the sum of money for Roberts.[43] His time did not begin happily.
She was suffering from la grippe; a new word in St. Petersburg, used by
the elite.

Grade | Carbon | Steel
SNB22 | 0.39 | alloyed"""


@pytest.mark.parametrize(
    "said",
    [
        "In July 1997, Norwich paid the sum of money for Roberts.",
        "She was suffering from la grippe; a new word in St. Petersburg, used by the elite.",
        "SNB22 | 0.39 | alloyed",
    ],
)
async def test_what_a_plain_passage_says_is_marked_to_the_letter(visit: Visit, said: str) -> None:
    """Footnotes and abbreviations end no sentence wrongly, rows of a table keep their lines, what is no Markdown is not read as such."""
    visit.gateway.on("Cite", passages(PLAIN_PASSAGE, ending="txt"), delta(f"{said} [1]"), citation(1), done(f"{said} [1]"))
    await visit.ask("Cite")
    await visit.page.locator(".cite").click()
    text = visit.page.locator(".passage-text")
    await expect(text).to_contain_text("# There he said that")
    await expect(text).to_contain_text("*the club*")
    assert "Steel\nSNB22" in (await text.inner_text())
    marked = "".join(await text.locator("mark").all_text_contents())
    assert re.sub(r"\[\d+\]", "", marked) == said


async def test_a_question_goes_to_the_collection_that_was_chosen(visit: Visit) -> None:
    """There is a choice where there is more than one; it holds for the follow-up, a retry and after a reload."""
    visit.gateway.on("Go", delta("Gone."), done("Gone."))
    await visit.ask("Go")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    choice = visit.page.get_by_role("combobox", name="Collection")
    await expect(choice).to_have_count(0)
    visit.gateway.documents = [document("a.md", 1), {**document("b.md", 1), "collection": "notes"}]
    await visit.page.reload()
    await expect(choice.locator("option")).to_have_text(["default", "notes"])
    await expect(choice).to_have_value("default")
    await choice.select_option("notes")
    await visit.ask("Go")
    await expect(visit.page.locator(".receipt")).to_have_count(2)
    await visit.page.reload()
    await expect(choice).to_have_value("notes")
    await visit.page.get_by_role("button", name="Regenerate").click()
    await expect(visit.page.locator(".receipt")).to_have_count(2)

    assert [body.get("collection") for body in visit.gateway.asked] == [None, "notes", "notes"]


async def test_steps_appear_while_they_run_and_end_with_their_milliseconds(visit: Visit) -> None:
    """Running, done, skipped with its reason: each in one row, in the order they came."""
    found, end = asyncio.Event(), asyncio.Event()
    visit.gateway.on(
        "Steps",
        step("recall", took=6.4),
        step("passages", "running", 6.4),
        found.wait,
        step("passages", "done", 6.4, 312.2, found="5"),
        step("history", "skipped", 318.0, reason="stands_alone"),
        end.wait,
        delta("Done."),
        done("Done."),
    )
    await visit.ask("Steps")
    row = visit.page.locator
    await expect(row("[data-step=passages]")).to_have_class("step running")
    await expect(row("[data-step=recall] .step-time")).to_have_text("6.4 ms")
    found.set()
    await expect(row("[data-step=passages]")).to_have_class("step done")
    await expect(row("[data-step=passages] .step-time")).to_have_text("312 ms")
    await expect(row("[data-step=passages] .step-facts")).to_have_text("5 found")
    await expect(row("[data-step=history] .step-time")).to_have_text("skipped")
    await expect(row("[data-step=history] .step-facts")).to_have_text("stands alone")
    end.set()
    await expect(row(".steps h3")).to_have_text("Steps 2.31 s")
    assert await row(".steps li").evaluate_all("rows => rows.map(row => row.dataset.step)") == ["recall", "passages", "history"]


async def test_the_cost_line_shows_exact_money_and_the_whole_receipt(visit: Visit) -> None:
    """Nano-USD are shown to the last digit that was charged, beyond what a double can hold."""
    visit.gateway.on("Cost", delta("So."), done("So.", cost_nanousd="9007199254740993"))
    await visit.ask("Cost")
    receipt = visit.page.locator(".receipt")
    await expect(receipt.locator("strong")).to_have_text("$9,007,199.254740993")
    for part in (
        "claude-sonnet-4-5",
        "smart",
        "1,532 in, 214 out",
        "cache miss: below threshold",
        "first token 412 ms",
        "total 2.31 s",
        TRACE[:8],
    ):
        await expect(receipt).to_contain_text(part)
    await visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await receipt.get_by_role("button", name=f"Copy the trace id {TRACE}").click()
    assert await visit.page.evaluate("navigator.clipboard.readText()") == TRACE


async def test_a_cache_hit_says_what_it_saved_and_can_be_asked_afresh(visit: Visit) -> None:
    """The verdict, its age and similarity, the question it was; asking afresh refreshes the cache."""
    cache = {
        "verdict": "semantic",
        "similarity": 0.9731,
        "source_question": "What then?",
        "age_s": "754",
        "saved_nanousd": "7806000",
        "reason": "",
    }
    visit.gateway.on("What now?", delta("This."), done("This.", cost_nanousd="0", cache=cache))
    await visit.ask("What now?")
    receipt = visit.page.locator(".receipt")
    for part in ("$0.00", "cached, similarity 0.973", "saved $0.007806", "12 min old", "Answered before as “What then?”"):
        await expect(receipt).to_contain_text(part)
    await receipt.get_by_role("button", name="Answer afresh").click()
    await expect(visit.page.locator(".receipt")).to_have_count(2)
    assert [asked["cache"] for asked in visit.gateway.asked] == ["use", "refresh"]


@pytest.mark.parametrize("how", ["button", "escape"])
async def test_stop_cancels_the_answer_and_keeps_what_had_arrived(visit: Visit, how: str) -> None:
    """The gateway is told; the partial text stays; the question can be asked again."""
    visit.gateway.on("Long", delta("As far as "), asyncio.Event().wait)
    await visit.ask("Long")
    await expect(visit.page.locator(".answer p")).to_contain_text("As far as")
    if how == "button":
        await visit.page.get_by_role("button", name="Stop the answer").click()
    else:
        await visit.page.press("#question", "Escape")
    await expect(visit.page.locator(".notice")).to_contain_text("Stopped.")
    await expect(visit.page.locator(".answer p")).to_contain_text("As far as")
    await expect(visit.page.get_by_role("button", name="Send the question")).to_be_visible()
    assert visit.gateway.cancelled == ["answer-1"]


async def test_a_step_that_a_stop_cut_short_is_shown_as_stopped_and_one_that_failed_before_as_failed(visit: Visit) -> None:
    """A stop is no failure, also after a reload; what broke by itself before the stop stays a failure."""
    visit.gateway.on(
        "Long",
        step("recall", "failed", 0.0, 5.0),
        step("generate", "running", 6.0),
        delta("As far as "),
        asyncio.Event().wait,
        at_stop=[step("generate", "failed", 6.0, 900.0), step("record", "done", 907.0, 3.0)],
    )
    await visit.ask("Long")
    await expect(visit.page.locator(".answer p")).to_contain_text("As far as")
    await visit.page.get_by_role("button", name="Stop the answer").click()
    for again in (False, True):
        if again:
            await visit.page.reload()
        await expect(visit.page.locator(".notice")).to_contain_text("Stopped.")
        await expect(visit.page.locator("[data-step=generate]")).to_have_class("step stopped")
        await expect(visit.page.locator("[data-step=generate] .step-time")).to_have_text("stopped")
        await expect(visit.page.locator("[data-step=recall]")).to_have_class("step failed")


async def test_an_answer_waits_for_a_browser_that_is_offline(visit: Visit) -> None:
    """The page says that the browser is offline, does not use up its attempts, and goes on by itself once it is not."""
    text = "One two."
    visit.gateway.on("Count", delta("One "), Cut(), delta("two."), done(text))
    await visit.page.evaluate("Object.defineProperty(navigator, 'onLine', { configurable: true, get: () => false })")
    await visit.ask("Count")
    await expect(visit.page.locator(".notice")).to_have_text("You are offline. The answer goes on as soon as you are back.")
    assert visit.gateway.resumed == []
    await visit.page.evaluate("delete navigator.onLine; dispatchEvent(new Event('online'))")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    assert visit.gateway.resumed == [("answer-1", 2)]


async def test_a_question_that_cannot_be_sent_says_what_a_person_can_do(visit: Visit) -> None:
    """Offline is the browser's, an unreachable host is not; neither speaks of parts that a reader does not know."""
    notice = visit.page.locator(".notice")
    visit.gateway.on("Go", delta("Gone."), done("Gone."))
    await visit.page.route("**/v1/answers", lambda route: route.abort())
    await visit.ask("Go")
    await expect(notice.locator("strong")).to_have_text("Tailrace cannot be reached")
    await expect(notice.locator("p")).to_have_text("It may be starting again, or your connection may be broken. Try again in a moment.")
    await visit.context.set_offline(True)
    await notice.get_by_role("button", name="Retry").click()
    await expect(notice.locator("strong")).to_have_text("You are offline")
    await expect(notice.locator("p")).to_have_text("Nothing was lost. Try again once you are connected.")
    await visit.context.set_offline(False)
    await visit.page.unroute("**/v1/answers")
    await notice.get_by_role("button", name="Retry").click()
    await expect(visit.page.locator(".answer").last).to_have_text("Gone.")
    visit.troubles.clear()  # the browser itself logs what it could not send


async def test_an_interrupted_stream_goes_on_where_it_broke(visit: Visit) -> None:
    """A socket that closes without an end is resumed after the last event: nothing is lost and nothing comes twice."""
    text = "One two three four."
    visit.gateway.on("Count", delta("One "), delta("two "), Cut(), delta("three "), Cut(), delta("four."), done(text))
    await visit.ask("Count")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await expect(visit.page.locator(".answer p")).to_have_text(text)
    assert visit.gateway.resumed == [("answer-1", 3), ("answer-1", 4)]
    assert len(visit.gateway.asked) == 1


async def test_a_reload_in_the_middle_loses_nothing(visit: Visit) -> None:
    """The answer goes on after a reload with the same text, in the same conversation, and ended answers come back as they were."""
    end = asyncio.Event()
    visit.gateway.on("First", delta("Whole."), done("Whole."))
    visit.gateway.on("Second", passages("Text."), delta("Half "), end.wait, delta("and half."), done("Half and half."))
    await visit.ask("First")
    await expect(visit.page.locator(".receipt")).to_have_count(1)
    await visit.ask("Second")
    await expect(visit.page.locator(".turn:last-child .answer p")).to_contain_text("Half")
    await visit.page.reload()
    await expect(visit.page.locator(".turn:last-child .answer p")).to_contain_text("Half")
    end.set()
    await expect(visit.page.locator(".receipt")).to_have_count(2)
    await expect(visit.page.locator(".answer")).to_have_text(["Whole.", "Half and half."])
    assert visit.gateway.resumed == [("answer-2", 0)]
    assert [asked["session_id"] for asked in visit.gateway.asked] == ["", "session-1"]


async def test_the_last_turn_can_be_regenerated_and_edited(visit: Visit) -> None:
    """The new answer takes its place on the page and in the conversation; earlier turns cannot be touched."""
    visit.gateway.on("First", delta("One."), done("One."))
    visit.gateway.on("Second", delta("Two."), done("Two."))
    visit.gateway.on("Edited", delta("Three."), done("Three."))
    await visit.ask("First")
    await expect(visit.page.locator(".receipt")).to_have_count(1)
    await visit.ask("Second")
    await expect(visit.page.locator(".receipt")).to_have_count(2)
    await expect(visit.page.get_by_role("button", name="Regenerate")).to_have_count(1)
    visit.gateway.on("Second", delta("Two again."), done("Two again."))
    await visit.page.get_by_role("button", name="Regenerate").click()
    await expect(visit.page.locator(".answer")).to_have_text(["One.", "Two again."])
    await expect(visit.page.get_by_role("button", name="Edit")).to_have_count(1)
    await visit.page.get_by_role("button", name="Edit").click()
    box = visit.page.get_by_role("textbox", name="The question, edited")
    await expect(box).to_have_value("Second")
    await box.fill("Edited")
    await box.press("Escape")
    await expect(visit.page.locator(".question")).to_have_text(["First", "Second"])
    await visit.page.get_by_role("button", name="Edit").click()
    await box.fill("Edited")
    await box.press("Enter")
    await expect(visit.page.locator(".answer")).to_have_text(["One.", "Three."])
    await expect(visit.page.locator(".question")).to_have_text(["First", "Edited"])
    assert [(asked["question"], asked.get("replaces"), asked["session_id"]) for asked in visit.gateway.asked] == [
        ("First", None, ""),
        ("Second", None, "session-1"),
        ("Second", "answer-2", "session-1"),
        ("Edited", "answer-3", "session-1"),
    ]


async def test_conversations_are_listed_taken_up_renamed_and_deleted(visit: Visit) -> None:
    """By their titles, which are text and nothing else; what is taken up goes on in the same conversation."""
    turn = {"answer_id": "answer-9", "question": "Why?", "text": "Because **so**.", "citations": [], "complete": True}
    shared = {"updated_at": "2026-01-02T03:04:05Z"}
    visit.gateway.sessions = {
        "s-1": {"session_id": "s-1", "title": "<img src=x onerror=alert(1)>", "turns": [turn], **shared},
        "s-2": {"session_id": "s-2", "title": "Other", "turns": [], **shared},
    }
    visit.gateway.on("How?", delta("Thus."), done("Thus."))
    rows = visit.page.locator(".row")
    await visit.page.get_by_role("link", name="History").click()
    await expect(rows).to_have_count(2)
    await expect(visit.page.locator("main img")).to_have_count(0)
    await expect(visit.page.get_by_role("link", name="Export Other")).to_have_attribute("href", "/v1/sessions/s-2/export")
    await visit.page.get_by_role("button", name="Rename Other").click()
    await visit.page.get_by_role("textbox", name="Title").fill("Better")
    await visit.page.get_by_role("button", name="Save").click()
    await expect(rows.nth(1).locator(".row-title")).to_have_text("Better")
    await visit.page.get_by_role("button", name="Delete Better").click()
    await visit.page.get_by_role("button", name="Delete for good").click()
    await expect(rows).to_have_count(1)
    await rows.nth(0).locator(".row-title").click()
    await expect(visit.page.locator(".answer strong")).to_have_text("so")
    await visit.ask("How?")
    await expect(visit.page.locator(".answer")).to_have_text(["Because so.", "Thus."])
    assert visit.gateway.asked[-1]["session_id"] == "s-1"
    assert list(visit.gateway.sessions) == ["s-1"]


async def test_a_failure_keeps_the_partial_answer_and_can_be_retried(visit: Visit) -> None:
    """A plain cause, the trace id, what had arrived; Retry asks the same question again."""
    visit.gateway.on("Fail", delta("Only this"), Problem("MODEL_STALLED", "The model went silent", "No token arrived for 20 s."))
    await visit.ask("Fail")
    alert = visit.page.get_by_role("alert")
    for part in ("The model went silent", "No token arrived for 20 s.", TRACE[:8]):
        await expect(alert).to_contain_text(part)
    await expect(visit.page.locator(".answer p")).to_have_text("Only this")
    visit.gateway.on("Fail", delta("All of it."), done("All of it."))
    await alert.get_by_role("button", name="Retry").click()
    await expect(visit.page.locator(".answer")).to_have_text(["All of it."])
    assert [asked["question"] for asked in visit.gateway.asked] == ["Fail", "Fail"]


async def test_a_text_that_is_not_what_the_receipt_says_is_not_passed_off_as_whole(visit: Visit) -> None:
    """The hash of the receipt is checked against the text that was joined."""
    visit.gateway.on("Hash", delta("Tampered."), done("Genuine."))
    await visit.ask("Hash")
    await expect(visit.page.locator(".notice")).to_contain_text("is not what the receipt says")


HOSTILE = """
<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><svg onload="window.pwned=1"></svg>
<iframe src="http://127.0.0.2:9/frame"></iframe><style>@import "http://127.0.0.2:9/style"</style>

[script](javascript:window.pwned=1) [data](data:text/html,<script>window.pwned=1</script>) [spaced](java&#10;script:window.pwned=1)
[by reference][evil] <javascript:window.pwned=1> [relative](/v1/answers) [quoted](https://example.com/"onmouseover="window.pwned=1)

![remote](http://127.0.0.2:9/leak.png) ![by reference][leak] [![nested](http://127.0.0.2:9/nested.png)](https://example.com/ok)

```"><img/src=x/onerror=window.pwned=1>
<img src=x onerror=window.pwned=1>
```

| <img src=x onerror=window.pwned=1> | ![cell](http://127.0.0.2:9/cell.png) |
|---|---|
| a | b |

[evil]: javascript:window.pwned=1
[leak]: http://127.0.0.2:9/reference.png
"""


async def test_hostile_text_runs_nothing_loads_nothing_and_links_nowhere_unsafe(visit: Visit) -> None:
    """Raw HTML is text, images are their alternative text, links are absolute and open without an opener, also while streaming."""
    title = '<img src=x onerror="window.pwned=1">'
    pieces = [delta(HOSTILE[start : start + 7]) for start in range(0, len(HOSTILE), 7)]
    visit.gateway.on(title, passages(HOSTILE, title=title), *pieces, delta("[1]"), citation(1), done(HOSTILE + "[1]"))
    await visit.ask(title)
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await visit.page.locator(".answer .cite").click()
    await expect(visit.page.locator(".passage-text")).to_contain_text("<script>window.pwned=1</script>")
    answer = visit.page.locator(".answer")
    await expect(answer).to_contain_text('<img src=x onerror="window.pwned=1">')
    await expect(answer.locator("img, script, svg, iframe, style, [onerror], [onload], [onmouseover]")).to_have_count(0)
    links = await answer.locator("a").evaluate_all("links => links.map(link => [link.protocol, link.hostname, link.target, link.rel])")
    assert {tuple(link) for link in links} == {("https:", "example.com", "_blank", "noopener noreferrer")}
    for text in ("script", "data", "spaced", "by reference", "relative"):
        await expect(answer.get_by_role("link", name=text, exact=True)).to_have_count(0)
    assert await visit.page.evaluate("window.pwned") is None


async def test_strings_that_broke_other_pages_break_nothing_here(visit: Visit, data_dir: Path) -> None:
    """Every string of a public list, script injections of all kinds among them, as an answer and as the passage it cites: no element but
    those of text, no dialog, no request to anybody else."""
    dialogs: list[str] = []

    async def dismiss(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        await dialog.dismiss()

    visit.page.on("dialog", dismiss)
    strings = [text for text in json.loads((data_dir / "hostile" / "naughty_strings.json").read_text("utf-8")) if text.strip()]
    assert len(strings) > 200
    whole = "\n\n".join(strings)
    pieces = [delta(whole[start : start + 997]) for start in range(0, len(whole), 997)]
    visit.gateway.on("All", passages(whole), *pieces, delta(" [1]"), citation(1), done(whole + " [1]"))
    await visit.ask("All")
    await expect(visit.page.locator(".receipt")).to_be_visible(timeout=30_000)
    await visit.page.locator(".answer .cite").last.click()
    await expect(visit.page.locator(".passage-text")).not_to_be_empty()
    active = "img, script, svg, iframe, object, embed, style, link, form, video, audio, math, base, meta"
    for place in (".answer", ".passage-text"):
        await expect(visit.page.locator(place).locator(active)).to_have_count(0)
        names = await visit.page.locator(place).first.evaluate(
            "place => [...place.querySelectorAll('*')].flatMap(one => one.getAttributeNames()).filter(name => name.startsWith('on'))"
        )
        assert names == []
    schemes = await visit.page.locator(".answer a").evaluate_all("links => [...new Set(links.map(link => link.protocol))]")

    assert set(schemes) <= {"https:", "http:", "mailto:"}
    assert dialogs == []


async def test_the_token_leaves_the_address_bar_and_no_script_can_read_it(visit: Visit) -> None:
    """The fragment is taken and removed; a reload stays signed in by the cookie; signing out forgets all; a pasted token signs in."""
    assert visit.page.url == f"{visit.gateway.url}/"
    visit.gateway.on("Mine", delta("Secret."), done("Secret."))
    await visit.ask("Mine")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await visit.page.reload()
    await expect(visit.page.locator(".answer")).to_have_text("Secret.")
    stored = await visit.page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage) + document.cookie")
    assert TOKEN not in stored
    assert [(one["name"], one["httpOnly"], one["sameSite"]) for one in await visit.context.cookies()] == [("tailrace", True, "Strict")]
    async with visit.page.expect_response(lambda response: response.request.method == "DELETE"):
        await visit.page.get_by_role("button", name="Sign out").click()
    await expect(visit.page.locator("#question")).to_have_count(0)
    assert await visit.context.cookies() == []
    assert await visit.page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage) + document.cookie") == "{}{}"
    await visit.page.fill("#token", f"  Bearer {TOKEN} ")
    await visit.page.get_by_role("button", name="Sign in").click()
    await expect(visit.page.get_by_role("heading", name="Ask your documents")).to_be_visible()


async def test_an_expired_token_asks_to_sign_in_and_keeps_what_was_there(visit: Visit) -> None:
    """In words for a person; another token of the same person brings back the conversation and the question that was refused."""
    visit.gateway.on("Mine", delta("Kept."), done("Kept."))
    await visit.ask("Mine")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await visit.context.clear_cookies()
    await visit.ask("Yours?")
    alert = visit.page.get_by_role("alert")
    await expect(alert).to_have_text("Your sign-in has ended. Sign in again to go on. What was here is kept, also what you typed.")
    visit.troubles.clear()  # the browser itself logs the 401
    await visit.page.fill("#token", TOKEN)
    await visit.page.press("#token", "Enter")
    await expect(visit.page.locator(".answer")).to_have_text(["Kept."])
    await expect(visit.page.locator("#question")).to_have_value("Yours?")


async def test_enter_sends_and_shift_enter_does_not(visit: Visit) -> None:
    """The question keeps its lines; a draft typed while an answer runs is kept and not sent."""
    end = asyncio.Event()
    visit.gateway.on("one\ntwo", end.wait, delta("Yes."), done("Yes."))
    box = visit.page.locator("#question")
    await expect(box).to_be_focused()
    await box.evaluate("box => (box.dataset.first = 'yes')")
    await visit.page.keyboard.type("one")
    await visit.page.keyboard.press("Shift+Enter")
    await visit.page.keyboard.type("two")
    await visit.page.keyboard.press("Enter")
    await expect(visit.page.locator(".question")).to_have_text("one\ntwo")
    await expect(box).to_have_attribute("data-first", "yes")  # another box would have no focus for a moment, and lose what is typed
    await visit.page.keyboard.type("next")
    await visit.page.keyboard.press("Enter")
    end.set()
    await expect(visit.page.locator(".receipt")).to_have_count(1)
    await expect(box).to_have_value("next")
    assert [asked["question"] for asked in visit.gateway.asked] == ["one\ntwo"]


async def test_an_answer_is_announced_once_when_it_is_complete(visit: Visit) -> None:
    """Screen readers hear the end and not every token."""
    end = asyncio.Event()
    visit.gateway.on("Say", delta("Part "), end.wait, delta("and whole."), done("Part and whole."))
    status = visit.page.locator("main > [role=status]")
    await visit.ask("Say")
    await expect(visit.page.locator(".answer")).to_contain_text("Part")
    await expect(status).to_have_text("Answering")
    await expect(visit.page.get_by_role("log")).to_have_attribute("aria-live", "off")
    end.set()
    await expect(status).to_have_text("Answer complete. Part and whole.")


async def test_a_refused_question_says_why_and_when_to_come_back(visit: Visit) -> None:
    """A problem document before the stream is shown like one within it."""
    visit.gateway.refusal = (
        429,
        {"title": "Too many requests", "detail": "At most 60 a minute.", "reason": "RATE_LIMITED", "trace_id": TRACE},
    )
    await visit.ask("Again")
    await expect(visit.page.get_by_role("alert")).to_contain_text("At most 60 a minute.")
    visit.troubles.clear()  # the browser itself logs the 429


async def test_files_are_indexed_one_by_one_and_documents_deleted_for_good(visit: Visit) -> None:
    """Every file has its own row and its own failure; the list follows; deleting asks once."""
    visit.gateway.documents = [document("old.md", 512)]
    await visit.page.get_by_role("link", name="Documents", exact=True).click()
    await expect(visit.page.locator(".row-title")).to_have_text(["old.md"])
    files = [
        {"name": "guide.md", "mimeType": "text/markdown", "buffer": b"# Guide\n\nText."},
        {"name": "picture.txt", "mimeType": "text/plain", "buffer": b"\0\1\2"},
        {"name": "empty.txt", "mimeType": "text/plain", "buffer": b""},
    ]
    await visit.page.set_input_files("input[type=file]", files)  # type: ignore[arg-type]
    row = visit.page.locator(".upload")
    await expect(row.nth(0)).to_contain_text("Indexed · 4 chunks")
    await expect(row.nth(1)).to_contain_text("The file is not text")
    await expect(row.nth(2)).to_contain_text("The file is empty")
    assert visit.gateway.uploaded == {"guide.md": b"# Guide\n\nText.", "picture.txt": b"\0\1\2"}
    await expect(visit.page.locator(".row-title")).to_have_text(["guide.md", "old.md"])
    await visit.page.get_by_role("button", name="Delete old.md").click()
    await visit.page.get_by_role("button", name="Delete for good").click()
    await expect(visit.page.locator(".row-title")).to_have_text(["guide.md"])
    assert [one["title"] for one in visit.gateway.documents] == ["guide.md"]


async def test_a_half_scanned_document_says_which_pages_nobody_could_read(visit: Visit) -> None:
    """While it is taken in and in the list; a document that was read whole says nothing of the kind."""
    visit.gateway.unread_pages = {"half.pdf": "2-4, 9"}
    visit.gateway.documents = [document("one.pdf", 512, "7"), document("whole.md", 512)]
    await visit.page.get_by_role("link", name="Documents", exact=True).click()
    file = {"name": "half.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-"}
    await visit.page.set_input_files("input[type=file]", file)  # type: ignore[arg-type]
    said = "Pages 2-4, 9 are pictures and were not read: nothing on them will be found"
    await expect(visit.page.locator(".upload .unread")).to_have_text(said)
    await expect(visit.page.locator(".row-title")).to_have_text(["half.pdf", "one.pdf", "whole.md"])
    row = visit.page.locator(".row")
    await expect(row.nth(0).locator(".unread")).to_have_text(said)
    await expect(row.nth(1).locator(".unread")).to_have_text("Page 7 is a picture and was not read: nothing on it will be found")
    await expect(row.nth(2).locator(".unread")).to_have_count(0)


async def test_files_can_be_dropped(visit: Visit) -> None:
    """What is dropped on the field is sent."""
    await visit.page.get_by_role("link", name="Documents", exact=True).click()
    transfer = await visit.page.evaluate_handle(
        "() => { const transfer = new DataTransfer(); transfer.items.add(new File(['dropped'], 'drop.txt')); return transfer }"
    )
    await visit.page.dispatch_event(".drop", "drop", {"dataTransfer": transfer})
    await expect(visit.page.locator(".upload")).to_contain_text("Indexed")
    assert visit.gateway.uploaded == {"drop.txt": b"dropped"}


async def test_a_narrow_window_shows_everything_without_scrolling_sideways(visit: Visit) -> None:
    """Tables and code scroll within themselves, the page does not."""
    text = "| " + " | ".join("wide" * 5 for _ in range(9)) + " |\n|" + "---|" * 9 + "\n\n```\n" + "x" * 400 + "\n```\n"
    visit.gateway.on("w" * 300, passages("Text."), step("recall", took=1), delta(text), done(text))
    await visit.page.set_viewport_size({"width": 340, "height": 700})
    await visit.ask("w" * 300)
    await expect(visit.page.locator(".receipt")).to_be_visible()
    assert await visit.page.evaluate("document.documentElement.scrollWidth") <= 340
    await expect(visit.page.locator(".steps")).to_be_visible()


@pytest.mark.parametrize("width", [360, 390, 640, 768, 900, 1024, 1280, 1440, 1920])
async def test_an_open_passage_covers_nothing_that_can_be_used(visit: Visit, width: int) -> None:
    """What a person can press beside the open passage is reached by a press on its middle, at every width."""
    text = "It goes on [1]."
    visit.gateway.on("Cite", passages(f"{EXACT}. " * 60), step("recall", took=1), delta(text), citation(1), done(text))
    await visit.page.set_viewport_size({"width": width, "height": 720})
    await visit.ask("Cite")
    await expect(visit.page.locator(".receipt")).to_be_visible()
    await visit.page.locator(".cite").click()
    panel = visit.page.get_by_role("dialog", name="Streams 1")
    await expect(panel).to_be_visible()
    await expect(visit.page.locator(".cite")).to_be_in_viewport(ratio=1)
    await visit.page.fill("#question", "And then?")
    for name in ("Edit", "Send the question", "New conversation", "Sign out", "Regenerate", "Passage 1: Streams 1", "Close the passage"):
        await visit.page.get_by_role("button", name=name, exact=True).click(trial=True)
    box = await panel.bounding_box()
    assert box is not None
    for name in (".top", ".composer", *((".log",) if box["x"] else ())):
        other = await visit.page.locator(name).bounding_box()
        assert other is not None
        beside = other["x"] + other["width"] <= box["x"] or other["y"] + other["height"] <= box["y"]
        assert beside, f"the passage covers {name}"
    assert await visit.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [390, 1280])
async def test_the_citation_whose_passage_is_open_stays_in_sight(visit: Visit, width: int) -> None:
    """Also where making room moves it: under a long answer, with another long one below it that can be jumped to."""
    text = "Word. " * 400
    visit.gateway.on("Long", *(step(f"step {number}", took=1) for number in range(9)), delta(text), done(text))
    visit.gateway.on("Cite", passages(EXACT), delta(f"Here [1]. {text}"), citation(1), done(f"Here [1]. {text}"))
    await visit.page.set_viewport_size({"width": width, "height": 720})
    for turns, question in enumerate(("Long", "Cite", "Long"), 1):
        await visit.ask(question)
        await expect(visit.page.locator(".receipt")).to_have_count(turns)
    chip = visit.page.locator(".answer .cite")
    await chip.click()
    await expect(visit.page.get_by_role("dialog", name="Streams 1")).to_be_visible()
    await expect(visit.page.get_by_role("button", name="Jump to the latest")).to_be_visible()
    await expect(chip).to_be_in_viewport(ratio=1)
    middle = "{x, y, width, height} = chip.getBoundingClientRect()"
    seen = f"chip => {{ const {middle}; return document.elementFromPoint(x + width / 2, y + height / 2) === chip; }}"
    assert await chip.evaluate(seen)


async def test_an_upload_that_meets_a_limit_is_sent_again(visit: Visit) -> None:
    """A file waits as long as the gateway says, instead of failing."""
    visit.gateway.busy_uploads = 1
    await visit.page.get_by_role("link", name="Documents", exact=True).click()
    file = {"name": "late.md", "mimeType": "text/markdown", "buffer": b"Late."}
    await visit.page.set_input_files("input[type=file]", file)  # type: ignore[arg-type]
    await expect(visit.page.locator(".upload")).to_contain_text("Waiting for its turn")
    await expect(visit.page.locator(".upload")).to_contain_text("Indexed")
    visit.troubles.clear()  # the browser itself logs the 429


@pytest.fixture
async def page(browser: Browser, suite: Suite) -> AsyncIterator[Page]:
    """The page of the running suite, signed in as a user of the tenant that has documents."""
    context = await browser.new_context()
    page = await context.new_page()
    page.set_default_timeout(10_000)
    await page.goto(f"{suite.url}/#token={suite.token()}")
    await page.wait_for_selector("#question")
    yield page
    await context.close()


async def test_the_suite_answers_in_the_page(suite: Suite, client: httpx.AsyncClient, page: Page) -> None:
    """Text, passage, steps and cost come through all services; the same question again is a hit that costs nothing."""
    await suite.provider.behave(Behaviour(tokens=30))
    for _ in range(2):
        await page.fill("#question", "Who rebuilt the gate of the heron, and after what?")
        await page.press("#question", "Enter")
        await expect(page.get_by_role("button", name="Stop the answer")).to_have_count(0)
    await expect(page.locator(".receipt")).to_have_count(2)
    await expect(page.locator(".receipt").first).to_contain_text("cache miss")
    await expect(page.locator(".receipt").last).to_contain_text("cached, same question")
    await expect(page.locator(".receipt strong").last).to_have_text("$0.00")
    assert await page.locator(".receipt strong").first.text_content() != "$0.00"
    for answer in await page.locator(".answer").all():
        assert (await answer.text_content() or "").split() == answer_text(Behaviour(tokens=30), cites=True).replace(" [1]", "1").split()
    await expect(page.locator(".turn:first-child [data-step=generate] .step-time")).to_contain_text("s")
    await page.locator(".cite").first.click()
    await expect(page.get_by_role("dialog").locator(".facts")).to_contain_text("Characters")
    assert len(await suite.provider.records()) == 1


async def test_a_reload_and_a_stop_reach_the_provider_through_the_suite(suite: Suite, client: httpx.AsyncClient, page: Page) -> None:
    """After a reload the same provider call goes on; stopping closes it."""
    await suite.provider.behave(Behaviour(tokens=2000, tokens_per_s=50))
    await page.fill("#question", "What is told of the eel ladder, year by year?")
    await page.press("#question", "Enter")
    await expect(page.locator(".answer .block")).to_contain_text("quiet channel")
    before = await page.locator(".answer").text_content() or ""
    await page.reload()
    await expect(page.locator(".answer")).to_contain_text(before.strip()[:40])
    await page.press("#question", "Escape")
    await expect(page.locator(".notice")).to_contain_text("Stopped.")
    (record,) = await suite.provider.records()
    assert record.state == "client_closed"


def test_the_build_is_as_new_as_its_source() -> None:
    """`npm run build` in web/ writes a digest of the source beside the build."""
    web = Path(__file__).resolve().parents[2] / "web"
    single = ["digest.mjs", "index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"]
    files = [web / name for name in single]
    files += [path for folder in ("public", "src") for path in (web / folder).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(web).as_posix() for path in files):
        digest.update(f"{name}\0".encode() + (web / name).read_bytes() + b"\0")
    built = web.parent / "services" / "gateway" / "static" / "source.sha256"
    assert built.read_text().strip() == digest.hexdigest(), "run `npm ci && npm run build` in web/"


def test_the_built_page_is_small_and_its_lock_file_names_no_host() -> None:
    """The committed build stays under 300 kB, with every asset behind a name that changes with its content."""
    root = Path(__file__).resolve().parents[2]
    static = root / "services" / "gateway" / "static"
    sizes = {path.name: path.stat().st_size for path in static.rglob("*") if path.is_file()}
    assert "index.html" in sizes
    assert sum(sizes.values()) < 300_000
    assert all("-" in path.stem for path in (static / "assets").iterdir())
    assert '"resolved"' not in (root / "web" / "package-lock.json").read_text()
