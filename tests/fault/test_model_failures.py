"""What becomes of an answer when its provider fails: the whole matrix of faults, an outage at load, and a provider that says nothing.

One more provider is one more `Subject`. The expectations stand in `ROWS`, from which the table in docs/models.md is made.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.struct_pb2 import Struct

from bench.script import Behaviour, Record, ScriptedCall
from services.chassis.errors import DomainError, ModelFailed, PriceUnknown
from services.local.stores import Valkey
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import PRICES, Reply, World, until, world

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
AT_ONCE = 10
"""Cells under way at the same time: enough to be quick, few enough that no limit on silence is passed for want of CPU."""


@dataclass(frozen=True)
class Subject:
    """A provider under test."""

    provider: str
    """As errors, prices and the models file have it."""
    price_of: str
    """A model of it whose price is known to the stand-in for the ledger."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Settings that make it the one that is asked, besides those of the world."""


OPENAI = {"OPENAI_API_KEY": "test-key"}
SUBJECTS = {
    "claude": Subject("anthropic", "claude-haiku-5-5"),
    "responses": Subject("openai", "gpt-6-luna", {**OPENAI, "TAILRACE_ORCHESTRATOR_OPENAI_API": "responses"}),
    "chat": Subject("openai", "gpt-6-luna", {**OPENAI, "TAILRACE_ORCHESTRATOR_OPENAI_API": "chat"}),
    "gemini": Subject("gemini", "gemini-3.8-flash", {"GEMINI_API_KEY": "test-key"}),
}


@dataclass(frozen=True)
class Row:
    """A fault, and what shall come of it."""

    name: str
    behaviour: dict[str, Any]
    calls: int
    """Calls of the first model."""
    stream: str
    """End where the reader reads along: `answer`, `next` for an answer of the next model, `escalated`, or the error's reason."""
    whole: str
    """The same where the whole answer is asked for."""
    whole_calls: int = 0
    """Calls of the first model then, if they are others."""
    elsewhere: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Calls and end with a provider where they are others, by its name in SUBJECTS."""
    arguments: str = ""
    """What the first model calls the calculator with, before it answers. `{mark}` stands for the cell's own word."""


BEFORE = "next"
ROWS = [
    Row("connection closed before the first token", {"fault": "cut_before_first"}, 3, BEFORE, BEFORE),
    Row("connection reset before the first token", {"fault": "reset_before_first"}, 3, BEFORE, BEFORE),
    Row("silence before the first byte", {"fault": "hang"}, 1, BEFORE, BEFORE),
    Row("silence before the first token", {"fault": "stall_after"}, 1, BEFORE, BEFORE),
    Row("error in a 200 before the first token", {"fault": "error_in_200"}, 3, BEFORE, BEFORE),
    Row("late 429 before the first token", {"fault": "limit_in_200"}, 3, BEFORE, BEFORE),
    Row("malformed before the first token", {"fault": "malformed"}, 3, BEFORE, BEFORE),
    Row("end before the first token", {"fault": "end_after"}, 3, BEFORE, BEFORE),
    Row("400", {"fault": "status", "status": 400}, 1, "MODEL_REFUSED", "MODEL_REFUSED"),
    Row("401", {"fault": "status", "status": 401}, 1, BEFORE, BEFORE),
    Row("403", {"fault": "status", "status": 403}, 1, BEFORE, BEFORE),
    Row("408", {"fault": "status", "status": 408}, 3, BEFORE, BEFORE),
    Row("429, soon again", {"fault": "status", "status": 429, "retry_after_s": 0.05}, 3, BEFORE, BEFORE),
    Row("429, in a minute", {"fault": "status", "status": 429, "retry_after_s": 60}, 1, BEFORE, BEFORE),
    Row("500", {"fault": "status", "status": 500}, 3, BEFORE, BEFORE),
    Row("503", {"fault": "status", "status": 503}, 3, BEFORE, BEFORE),
    Row("529", {"fault": "status", "status": 529}, 3, BEFORE, BEFORE),
    Row("500 that passes", {"fault": "status", "status": 500, "fail_first": 2}, 3, "answer", "answer"),
    Row("connection closed after the first token", {"fault": "cut_after", "fault_at": 7}, 1, "MODEL_FAILED", BEFORE, 3),
    Row("connection reset after the first token", {"fault": "reset_after", "fault_at": 7}, 1, "MODEL_FAILED", BEFORE, 3),
    Row("connection closed after the answer's end", {"fault": "cut_at_end"}, 1, "answer", "answer"),
    Row("end without its last event", {"fault": "end_after", "fault_at": 7}, 1, "MODEL_FAILED", BEFORE, 3),
    Row("malformed after the first token", {"fault": "malformed", "fault_at": 7}, 1, "MODEL_FAILED", BEFORE, 3),
    Row("error in a 200 after the first token", {"fault": "error_in_200", "fault_at": 7}, 1, "MODEL_OVERLOADED", BEFORE, 3),
    Row("late 429 after the first token", {"fault": "limit_in_200", "fault_at": 7}, 1, "MODEL_OVERLOADED", BEFORE, 3),
    Row("silence after the first token", {"fault": "stall_after", "fault_at": 7}, 1, "MODEL_STALLED", BEFORE, 1),
    Row("slow drip", {"fault": "slow_drip"}, 1, "answer", "answer"),
    Row("usage missing", {"fault": "late_usage_missing"}, 1, "answer", "answer"),
    Row("usage zero", {"fault": "zero_usage"}, 1, "answer", "answer"),
    Row("usage doubled", {"fault": "doubled_usage"}, 1, "answer", "answer"),
    Row("refusal", {"fault": "refusal"}, 1, "answer", "answer"),
    Row("empty answer", {"tokens": 0, "cites": False, "fail_first": 1}, 1, "escalated", "escalated"),
    # Gemini reads arguments itself, and says of what it cannot read only that there was something.
    Row("tool arguments that are no JSON", {}, 2, "answer", "answer", 0, {"gemini": (3, BEFORE)}, '{"expression": "{mark}'),
    Row("tool arguments against the schema", {}, 2, "answer", "answer", 0, {}, '{"expresion": "{mark}"}'),
    Row("huge answer", {"tokens": 20_000}, 1, "answer", "answer"),
]


@dataclass(frozen=True)
class Cell:
    """A row read along or as a whole, with a tier and models of its own: no cell knows how another's models fare."""

    row: Row
    is_whole: bool
    number: int
    subject: str

    @property
    def name(self) -> str:
        return f"{self.row.name}, {'JSON' if self.is_whole else 'stream'}"

    @property
    def mark(self) -> str:
        return f"mark-cell-{self.number}"

    @property
    def models(self) -> tuple[str, str, str]:
        """First, next, and where an answer is escalated to."""
        return f"first-{self.number}", f"next-{self.number}", f"better-{self.number}"

    @property
    def expected(self) -> tuple[int, str]:
        """Calls of the first model, and the end."""
        if self.subject in self.row.elsewhere:
            return self.row.elsewhere[self.subject]
        if self.is_whole:
            return self.row.whole_calls or self.row.calls, self.row.whole
        return self.row.calls, self.row.stream

    def behaviour(self) -> Behaviour:
        """The fault strikes the first model's calls only. Each cell's is a value of its own, as the simulator counts by value."""
        calls, end = self.expected
        wanted = {"ttft_ms": self.number / 1000, **self.row.behaviour}
        if end in ("next", "escalated"):
            wanted.setdefault("fail_first", calls)
        if self.row.behaviour.get("tokens") == 0:
            wanted.pop("fail_first")
        return Behaviour(**wanted)

    @property
    def arguments(self) -> str:
        return self.row.arguments.replace("{mark}", f"wrong-{self.number}-arguments")

    def rules(self) -> list[tuple[bytes, Behaviour]]:
        """What the provider does, the most particular last."""
        mark = self.mark.encode() + b" "
        if not self.arguments:
            return [(mark, self.behaviour())]
        usual = self.behaviour()
        calls = msgspec.structs.replace(usual, calls=(ScriptedCall(name="calculator", arguments=self.arguments),))
        # Once it sees what it wrote, or where the next model is asked, there is an answer.
        return [(mark, calls), (f"wrong-{self.number}-arguments".encode(), usual), (f"\n{self.models[1]}".encode(), usual)]


def cells_of(subject: str) -> list[Cell]:
    """The whole matrix of one provider."""
    return [Cell(row, is_whole, 2 * place + is_whole, subject) for place, row in enumerate(ROWS) for is_whole in (False, True)]


def models_file(subject: Subject, cells: list[Cell]) -> str:
    """Every cell's tier, and the tier its empty or doubtful answers are escalated to."""
    row = 'provider = "{provider}"\ncontext_tokens_max = 200_000\noutput_tokens_max = 64_000\n'
    parts = ['[tiers.fast]\nmodels = ["extractive"]\n']
    for cell in cells:
        first, following, better = cell.models
        parts.append(f'[tiers.t{cell.number}]\nmodels = ["{first}", "{following}"]\nescalate_to = "b{cell.number}"\n')
        parts.append(f'[tiers.b{cell.number}]\nmodels = ["{better}"]\n')
    for name in (model for cell in cells for model in cell.models):
        parts.append(f'[[models]]\nmodel = "{name}"\n{row.format(provider=subject.provider)}capabilities = ["tools"]\n')
    parts.append(f'[[models]]\nmodel = "extractive"\n{row.format(provider="extractive")}')
    return "\n".join(parts)


@asynccontextmanager
async def ground(
    subject: Subject, cells: list[Cell], folder: Path, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """A world whose models file has a tier for each cell."""
    for name in (model for cell in cells for model in cell.models):
        monkeypatch.setitem(PRICES, name, replace(PRICES[subject.price_of], model=name))
    path = folder / "models.toml"
    path.write_text(models_file(subject, cells))
    limits = {"TAILRACE_MODEL_FIRST_TOKEN_S": "3", "TAILRACE_MODEL_STALL_S": "2", "TAILRACE_MODELS_FILE": str(path)}
    async with world(folder, valkey.url, **limits, **subject.variables) as running:
        yield running


async def run_cell(running: World, cell: Cell) -> list[str]:
    """Ask, look at everything from all sides, and return what is not as it shall be."""
    running.provider.rules += cell.rules()
    if cell.row.behaviour.get("tokens") == 0:
        running.provider.rules.append((cell.models[2].encode(), Behaviour()))
    reply, error = Reply(), ""
    fields: dict[str, Any] = {"whole": True, "cancel_on_disconnect": True} if cell.is_whole else {}
    if cell.arguments:
        fields["server_tools"] = ["calculator"]
    question = f"Which port does the gateway listen on, {cell.mark} ?"
    try:
        await running.ask(question, into=reply, tier=f"t{cell.number}", max_output_tokens=64_000, cache=pb.CACHE_MODE_OFF, **fields)
    except DomainError as failure:
        error = failure.reason
    if not reply.events:
        return [f"{cell.name}: refused with {error}"]
    operation = await running.booked(reply.answer_id)

    def records() -> list[Record]:
        return [record for record in running.provider.records if record.model in cell.models]

    await until(lambda: all(record.state != "running" for record in records()))
    calls, end = cell.expected
    seen = error or {cell.models[0]: "answer", cell.models[1]: "next", cell.models[2]: "escalated"}.get(reply.done.model, "?")
    numbers = [event.sequence for event in reply.events if not event.HasField("heartbeat")]
    told = [choice.reason for choice in reply.done.choices] if not error else []
    reasons = {"answer": ["first"], "next": ["first", "fell_over"], "escalated": ["first", "escalated"]}
    wrong = {
        "end": seen != end,
        "calls": sum(record.model == cell.models[0] for record in records()) != calls,
        "one end": ("done" in reply.kinds) == bool(error),
        "numbers": numbers != list(range(1, len(numbers) + 1)),
        "choices": not error and told != reasons[end],
        "text": not error and reply.text and reply.text.split()[0] != "All",
        "status": operation.status != ("failed" if error else "done") or operation.error_reason != error,
        "attempts": len(operation.attempts) != len(records()),
        "tool results": [event.tool_result.failed for event in reply.events if event.HasField("tool_result")]
        != ([True] if cell.arguments and end == "answer" else []),
        "usage": not booked_right(operation, records(), cell.row.name == "usage zero"),
    }
    return [f"{cell.name}: {what} (saw {seen}, {[r.model for r in records()]}, {told})" for what, is_wrong in wrong.items() if is_wrong]


def booked_right(operation: ledger_pb.Operation, records: list[Record], is_zero: bool) -> bool:
    """Every attempt against the provider's own record: a count that is not marked as an estimate is the provider's, and no estimate of
    what was written is below it."""
    for attempt, record in zip(operation.attempts, records, strict=False):
        usage = attempt.usage
        if is_zero:
            right = (usage.input_tokens, usage.output_tokens, attempt.estimated) == (0, 0, False)
        elif attempt.estimated:
            right = usage.output_tokens >= record.output_tokens
        elif record.state == "refused":
            right = (usage.input_tokens, usage.output_tokens) == (0, 0)
        else:
            right = (usage.input_tokens, usage.output_tokens) == (record.input_tokens, record.output_tokens) or (
                attempt.error_reason != "" and record.output_tokens == usage.output_tokens == 0
            )
        if not right:
            return False
    return True


@pytest.mark.parametrize("name", SUBJECTS)
async def test_every_fault_ends_as_the_matrix_says(
    name: str, tmp_path: Path, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly one typed end, the right tries and the right next model, every call booked, every socket closed, no hold left open."""
    free, cells = asyncio.Semaphore(AT_ONCE), cells_of(name)
    async with ground(SUBJECTS[name], cells, tmp_path, valkey, monkeypatch) as running:

        async def bounded(cell: Cell) -> list[str]:
            async with free:
                return await run_cell(running, cell)

        wrong = [line for lines in await asyncio.gather(*map(bounded, cells)) for line in lines]
        await until(lambda: not running.ledger.open_holds)
    with capsys.disabled():
        print(f"\n{name}: {len(cells) - len({line.split(':')[0] for line in wrong})} of {len(cells)} cells as the matrix says")

    assert wrong == []


def table() -> str:
    """The matrix for people."""
    ends = {"answer": "answered", "next": "the next model answers", "escalated": "the better tier answers"}
    lines = ["| fault | calls of the model | read along | as one document |", "|---|---|---|---|"]
    for row in ROWS:
        calls = f"{row.calls}, {row.whole_calls} as one document" if row.whole_calls not in (0, row.calls) else f"{row.calls}"
        calls += "".join(f"; {provider}: {few}, {ends.get(end, f'`{end}`')}" for provider, (few, end) in row.elsewhere.items())
        lines.append(f"| {row.name} | {calls} | {ends.get(row.stream, f'`{row.stream}`')} | {ends.get(row.whole, f'`{row.whole}`')} |")
    return "\n".join(lines)


def test_matrix_in_the_docs_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """What is promised to people is what is tested. The table is printed, so that whoever runs the tests sees what they hold."""
    with capsys.disabled():
        print(f"\n{table()}")
    found = re.search(r"<!-- fault matrix -->\n(.*?)\n<!-- end -->", DOCS.read_text(encoding="utf-8"), re.DOTALL)

    assert found is not None
    assert found[1] == table(), f"put this between the markers in docs/models.md:\n{table()}"


OUTAGE = """
[tiers.fast]
models = ["claude-haiku-5-5", "claude-sonnet-5-5"]
[tiers.alone]
models = ["claude-haiku-5-5"]
[tiers.goes_on]
models = ["claude-haiku-5-5", "claude-sonnet-5-5", "extractive"]
continue = true
[tiers.held]
models = ["claude-haiku-5-5"]
hold_back = true
escalate_to = "better"
[tiers.better]
models = ["claude-sonnet-5-5"]
[tiers.watched]
models = ["claude-haiku-5-5"]
shadow = { tier = "better", share = 1.0 }
[tiers.thrifty]
models = ["claude-sonnet-5-5"]
cheaper = "alone"
""" + "".join(
    f'[[models]]\nmodel = "{model}"\nprovider = "{provider}"\ncontext_tokens_max = 200_000\noutput_tokens_max = 64_000\n'
    for model, provider in (("claude-haiku-5-5", "anthropic"), ("claude-sonnet-5-5", "anthropic"), ("extractive", "extractive"))
)
QUESTION = "Which port does the gateway listen on?"


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator whose tier has two candidates, and one with each special way. No hold is left open."""
    (tmp_path / "models.toml").write_text(OUTAGE)
    limits = {"TAILRACE_MODEL_FIRST_TOKEN_S": "60", "TAILRACE_MODEL_STALL_S": "2", "TAILRACE_MODELS_FILE": str(tmp_path / "models.toml")}
    async with world(tmp_path, valkey.url, **limits) as running:
        yield running
        await until(lambda: not running.ledger.open_holds)


def only_first(running: World, **behaviour: Any) -> None:
    """Let the first candidate misbehave, and it alone."""
    running.provider.rules = [(b"claude-haiku-5-5", Behaviour(**behaviour))]


async def test_outage_of_the_first_model_is_no_storm_and_ends_when_it_is_over(claude: World) -> None:
    """At load: all are answered, by the next; provider calls stay within 1.1 x requests; the model is taken back within 5 s."""
    only_first(claude, fault="status", status=503)
    replies: list[asyncio.Task[Reply]] = []
    for _ in range(240):
        replies.append(asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)))
        await asyncio.sleep(0.025)
    answered = await asyncio.gather(*replies)
    calls = len(await claude.records())
    claude.provider.rules = []
    restored_at = time.monotonic()
    async with asyncio.timeout(30):
        while (await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)).done.model != "claude-haiku-5-5":  # noqa: ASYNC110 - it is far away
            await asyncio.sleep(0.05)

    assert {reply.done.model for reply in answered} == {"claude-sonnet-5-5"}
    assert calls <= 1.1 * len(answered)
    assert time.monotonic() - restored_at < 5


async def test_model_is_taken_back_at_the_first_token_and_not_at_the_last(claude: World) -> None:
    """A probe that streams for a while keeps nobody out meanwhile."""
    only_first(claude, fault="status", status=500)
    await asyncio.gather(*(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF) for _ in range(10)))
    only_first(claude, tokens=400, tokens_per_s=40)
    before, asking = len(claude.provider.records), list[asyncio.Task[Reply]]()

    def streaming() -> list[Record]:
        late = list(claude.provider.records)[before:]
        return [record for record in late if record.model == "claude-haiku-5-5" and record.first_token_s is not None]

    async with asyncio.timeout(30):
        while not streaming():
            asking.append(asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)))
            await asyncio.sleep(0.1)
    probes = len(streaming())
    asking += [asyncio.create_task(claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)) for _ in range(5)]
    await until(lambda: len(streaming()) == probes + 5)
    still_running = all(record.state == "running" for record in streaming())
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for record in list(claude.ledger.holds.values()):
        await claude.cancel(record.operation_id)

    assert still_running


async def test_failing_lone_model_is_not_stormed_either(claude: World) -> None:
    """With nobody to fall over to, each request is one call and few retries, each ends by type, and the first that works is an answer."""
    only_first(claude, fault="status", status=500)
    ended = await asyncio.gather(*(claude.ask(QUESTION, tier="alone", cache=pb.CACHE_MODE_OFF) for _ in range(100)), return_exceptions=True)
    calls = len(await claude.records())
    claude.provider.rules = []
    again = await claude.ask(QUESTION, tier="alone", cache=pb.CACHE_MODE_OFF)

    assert {getattr(failure, "reason", "") for failure in ended} == {"MODEL_FAILED"}
    assert calls <= 1.2 * len(ended)
    assert again.done.model == "claude-haiku-5-5"


async def test_black_hole_ends_at_the_deadline_and_is_put_aside(claude: World) -> None:
    """A provider that takes requests and says nothing: each ends by its deadline, and the model counts as failed, so that others answer."""
    only_first(claude, fault="hang")

    async def timed(deadline_ms: int) -> tuple[str, float]:
        began = time.monotonic()
        try:
            reply = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF, deadline_ms=deadline_ms)
        except DomainError as failure:
            return failure.reason, time.monotonic() - began
        return reply.done.model, time.monotonic() - began

    first = await asyncio.gather(*(timed(1500) for _ in range(10)))
    then = await asyncio.gather(*(timed(5000) for _ in range(5)))

    assert {end for end, _ in first} == {"DEADLINE_TOO_SHORT"}
    assert max(took for _, took in first) < 1.5 + 3  # the bench says how near it is; here others use the CPU too
    answered = [took for end, took in then if end == "claude-sonnet-5-5"]
    assert len(answered) >= 4  # one of them may have been the probe
    assert max(answered) < 1.5 + 3


async def test_text_that_breaks_off_goes_on_with_the_next_model_where_the_tier_wants_it(claude: World) -> None:
    """The reader sees one text; the receipt names who went on; both calls are booked; the second is shown what is there."""
    only_first(claude, fault="cut_after", fault_at=7, tokens=20)
    reply = await claude.ask(QUESTION, tier="goes_on")
    operation = await claude.booked(reply.answer_id)
    first, second = await claude.records()

    assert [choice.reason for choice in reply.done.choices] == ["first", "continued"]
    assert reply.done.model == "claude-sonnet-5-5"
    assert reply.text.startswith("All of this is in there [1]:All")
    assert len(reply.text.split()) == 7 + second.output_tokens - 1
    assert [attempt.error_reason for attempt in operation.attempts] == ["MODEL_FAILED", ""]
    assert operation.usage.output_tokens >= first.output_tokens + second.output_tokens
    assert b"All of this is in there [1]:" in claude.provider.prompts[-1]
    assert b"Continue it exactly where it stopped" in claude.provider.prompts[-1]
    assert second.max_tokens <= first.max_tokens - 7


async def test_answer_that_does_not_pass_is_asked_of_the_better_tier_before_anybody_reads_it(claude: World) -> None:
    """A citation of nothing is healed by another model; what the first wrote is paid for and never shown."""
    only_first(claude, text="It listens on port 1234 [77].")
    reply = await claude.ask(QUESTION, tier="held")
    operation = await claude.booked(reply.answer_id)

    assert [choice.reason for choice in reply.done.choices] == ["first", "escalated"]
    assert (reply.done.verdict, reply.done.model) == ("passed", "claude-sonnet-5-5")
    assert "1234" not in reply.text
    assert len(operation.attempts) == 2
    assert operation.cost_nanousd == sum(attempt.cost_nanousd for attempt in operation.attempts)


async def test_doubtful_answer_is_better_than_none(claude: World) -> None:
    """If the better tier fails, what there is is told, with its verdict."""
    claude.provider.rules = [
        (b"claude-haiku-5-5", Behaviour(text="It listens on port 1234 [77].")),
        (b"claude-sonnet-5-5", Behaviour(fault="status", status=400)),
    ]
    reply = await claude.ask(QUESTION, tier="held")

    assert (reply.done.verdict, reply.done.model, "1234" in reply.text) == ("citation_unknown", "claude-haiku-5-5", True)


async def test_budget_that_cannot_pay_the_tier_may_pay_a_cheaper_one(claude: World) -> None:
    """The cheaper tier is asked where the ledger refuses the dear one; the receipt says why."""
    claude.ledger.too_dear = {"claude-sonnet-5-5"}
    reply = await claude.ask(QUESTION, tier="thrifty")

    assert (reply.done.model, reply.done.tier) == ("claude-haiku-5-5", "thrifty")
    assert [(choice.tier, choice.reason) for choice in reply.done.choices] == [("thrifty", "first"), ("alone", "budget")]


async def test_a_text_that_broke_off_is_not_continued_with_quotes_where_the_next_model_has_no_price(
    claude: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was shown ends in its own failure."""
    monkeypatch.delitem(PRICES, "claude-sonnet-5-5")
    only_first(claude, text="It listens on port 8080", fault="cut_after", fault_at=3)
    read = Reply()
    with pytest.raises(ModelFailed):
        await claude.ask(QUESTION, tier="goes_on", cache=pb.CACHE_MODE_OFF, into=read)

    assert read.text == "It listens on"


async def test_a_model_without_a_price_is_passed_over(claude: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given away, and the tier's other models are asked; only if none has a price is that the answer's end."""
    monkeypatch.delitem(PRICES, "claude-haiku-5-5")
    reply = await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)
    monkeypatch.delitem(PRICES, "claude-sonnet-5-5")
    with pytest.raises(PriceUnknown):
        await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)

    assert [(choice.model, choice.reason) for choice in reply.done.choices] == [
        ("claude-haiku-5-5", "first"),
        ("claude-sonnet-5-5", "no_price"),
    ]
    assert [record.model for record in claude.provider.records] == ["claude-sonnet-5-5"]


@pytest.mark.parametrize(
    ("dear", "cheap", "model", "written"), [(300, 4_000, "claude-haiku-5-5", 1_000), (300, 400, "claude-haiku-5-5", 400)]
)
async def test_a_whole_answer_of_the_cheaper_tier_is_better_than_a_short_one_of_the_dear(
    claude: World, dear: int, cheap: int, model: str, written: int
) -> None:
    """Nothing is shortened while there is a cheaper way; the last way is, if it must be."""
    claude.ledger.affordable_of = {"claude-sonnet-5-5": dear, "claude-haiku-5-5": cheap}
    claude.behave(tokens=2_000)
    reply = await claude.ask(QUESTION, tier="thrifty", max_output_tokens=1_000)

    assert (reply.done.model, reply.done.usage.output_tokens) == (model, written)


async def test_models_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing(claude: World, tmp_path: Path) -> None:
    """Nothing is restarted for a change, and nothing stops for a mistake."""
    path = Path(claude.settings.models_file)

    async def first_choice() -> str:
        return (await claude.ask(QUESTION, cache=pb.CACHE_MODE_OFF)).done.model

    assert await first_choice() == "claude-haiku-5-5"
    path.write_text(OUTAGE.replace('models = ["claude-haiku-5-5", "claude-sonnet-5-5"]', 'models = ["claude-sonnet-5-5"]', 1))
    async with asyncio.timeout(15):
        while await first_choice() != "claude-sonnet-5-5":  # noqa: ASYNC110 - it is far away
            await asyncio.sleep(0.1)
    path.write_text("[tiers")
    await asyncio.sleep(1.5)

    assert await first_choice() == "claude-sonnet-5-5"


async def test_shadow_answer_is_unseen_and_booked_on_its_own_tenant_with_what_it_was_compared_by(claude: World) -> None:
    """The reader's answer, its cost and its record are what they are without it; the sample's record holds both sides and no text."""
    claude.provider.rules = [(b"claude-sonnet-5-5", Behaviour(text="The gateway listens on port 8080 [1]."))]
    only_said = "The gateway listens on port 8080 [77]."
    claude.provider.rules.append((b"claude-haiku-5-5", Behaviour(text=only_said)))
    reply = await claude.ask(QUESTION, tier="watched")
    await until(lambda: len(claude.ledger.operations) == 2)
    mine = claude.ledger.operations[reply.answer_id]
    (shadow,) = (operation for operation in claude.ledger.operations.values() if operation.tenant == "shadow")
    facts = next(dict(step.facts) for step in shadow.steps if step.name == "compare")

    assert (reply.text, reply.done.cost_nanousd) == (only_said, mine.cost_nanousd)
    assert len(mine.attempts) == len(shadow.attempts) == 1
    assert (mine.model, shadow.model, shadow.user) == ("claude-haiku-5-5", "claude-sonnet-5-5", "shadow")
    assert (mine.purpose, shadow.purpose) == ("", "shadow")
    assert (facts["of"], facts["tier"], facts["other_tier"]) == (reply.answer_id, "watched", "better")
    assert (facts["verdict"], facts["other_verdict"], facts["agreement"]) == ("citation_unknown", "passed", "1.000")
    assert int(facts["cost_nanousd"]) == mine.cost_nanousd > 0
    assert (facts["other_groundedness"], facts["similarity"]) == ("1.000", "1.000") and "groundedness" not in facts
    assert b"8080" not in shadow.SerializeToString()


async def test_shadow_answer_that_does_not_satisfy_the_schema_has_not_passed(claude: World) -> None:
    """An answer to somebody would have ended in an error: a tier that writes such is not as good as the other."""
    schema = Struct()
    schema.update({"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"]})
    claude.provider.rules = [
        (b"claude-sonnet-5-5", Behaviour(text='{"port": "8080"}')),
        (b"claude-haiku-5-5", Behaviour(text='{"port": 8080}')),
    ]
    reply = await claude.ask(QUESTION, tier="watched", output_schema=schema)
    await until(lambda: len(claude.ledger.operations) == 2)
    (shadow,) = (operation for operation in claude.ledger.operations.values() if operation.tenant == "shadow")
    facts = next(dict(step.facts) for step in shadow.steps if step.name == "compare")

    assert (reply.done.verdict, facts["verdict"], facts["other_verdict"]) == ("passed", "passed", "output_invalid")


async def test_shadow_answer_that_fails_or_is_refused_touches_nobody(claude: World) -> None:
    """A budget of its own that is used up, or a provider that fails, ends the sample and nothing else."""
    claude.ledger.too_dear = {"claude-sonnet-5-5"}
    reply = await claude.ask(QUESTION, tier="watched")
    await until(lambda: len(claude.ledger.operations) == 2)
    (shadow,) = (operation for operation in claude.ledger.operations.values() if operation.tenant == "shadow")

    assert reply.done.verdict == "passed"
    assert (shadow.status, shadow.error_reason, len(shadow.attempts)) == ("failed", "BUDGET_EXHAUSTED", 0)
