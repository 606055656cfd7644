"""The small tools: arithmetic, the time, the user's documents; and what a request may bring for tools and pictures."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from services.chassis.errors import RequestInvalid
from services.orchestrator.domain import Image, Message, Passage, Prompt, Suspended, ToolCall, ToolResult, ToolSpec
from services.orchestrator.tools.calculator import Calculator, evaluate, written
from services.orchestrator.tools.current_time import CurrentTime
from services.orchestrator.tools.document_search import SearchDocuments
from services.orchestrator.tools.intake import require_images, require_tools, results_for
from services.orchestrator.tools.toolbox import Toolbox, ToolFailed
from tests.fakes.scripted_model import FakeTool, question


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        *(("0.1 + 0.2", "0.3"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"), ("-2 ^ 2", "-4"), ("2 ** 3 ** 2", "512"), ("2^-1", "0.5")),
        *(("7 // 2", "3"), ("-7 // 2", "-4"), ("-7 % 3", "2"), ("7 % -3", "-2"), ("(19.99 * 3) * 1.19", "71.3643"), ("1e3", "1000")),
        *(("round(2.675, 2)", "2.68"), ("round(-2.5)", "-3"), ("floor(-1.5)", "-2"), ("ceil(1.2)", "2"), ("abs(-3)", "3")),
        *(("max(1, 2, 3) + min(4, 5)", "7"), ("sum(1, 2, 3)", "6"), ("log(1000)", "3"), ("sqrt(16)", "4"), ("--3", "3"), (".5", "0.5")),
    ],
)
def test_arithmetic_is_exact(expression: str, value: str) -> None:
    """In decimals, with the precedence of mathematics."""
    result, exact = evaluate(expression)

    assert (value, True) == (written(result), exact)


@pytest.mark.parametrize("expression", ["1 / 3", "sqrt(2)", "pi", "2 ^ 0.5", "exp(1)"])
def test_what_is_rounded_says_so(expression: str) -> None:
    """Forty digits, and never a false claim of exactness."""
    assert not evaluate(expression)[1]
    assert len(written(evaluate(expression)[0])) <= 42


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "1 2", "(1", "1)", "2 *", "foo(1)", "__import__('os')", "x", "1,000", "1 / 0", "5 % 0", "sqrt(-1)", "ln(0)", "0^0"),
        *("9 ^ 9 ^ 9", "10 ^ 1001", "1e999 * 1e999", "(" * 60 + "1" + ")" * 60, "2^" * 60 + "2", "1" * 600, "max()", "round(1, 2, 3)"),
        *("round(1, 1e3)", "(-8) ^ (1/3)", "1 if 1 else 2", "[1]", "a.b", "1_000", "0x10", "$5"),
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_refused_at_once(expression: str) -> None:
    """No expression is code, and none fills the memory or the day."""
    began = time.perf_counter()
    with pytest.raises(ToolFailed):
        evaluate(expression)

    assert time.perf_counter() - began < 2


async def test_the_calculator_says_what_was_rounded() -> None:
    """So that the model does not quote the last digit as truth."""
    assert (await Calculator().call({"expression": "1/8"}, question())).text == "0.125"
    assert (await Calculator().call({"expression": "1/3"}, question())).text.endswith("(rounded to 40 digits)")


class _Clock:
    def now(self) -> datetime:
        return datetime(2026, 3, 29, 0, 59, 59, tzinfo=UTC)


async def test_the_time_is_told_in_the_zone_that_was_asked_for() -> None:
    """By the clock that was handed in."""
    tool = CurrentTime(_Clock())

    assert (await tool.call({}, question())).text == "Sunday, 2026-03-29T00:59:59+00:00 (UTC)"
    assert (await tool.call({"timezone": "Asia/Tokyo"}, question())).text == "Sunday, 2026-03-29T09:59:59+09:00 (Asia/Tokyo)"
    for wrong in ("Mars/Base", "../../etc/passwd", "/etc/localtime"):
        with pytest.raises(ToolFailed):
            await tool.call({"timezone": wrong}, question())


class _Documents:
    def __init__(self, *hits: Passage) -> None:
        self.hits, self.asked = hits, list[tuple[Any, ...]]()

    async def search(self, query: str, collection: str, limit: int) -> tuple[Passage, ...]:
        self.asked.append((query, collection, limit))
        return self.hits


async def test_documents_are_searched_in_the_answers_own_collection() -> None:
    """Whatever the model writes: the collection is none of its arguments."""
    hit = Passage(1, "d", "c", "Guide", "g.md", "Port 8080.", 0, 10, 0.9, heading_path=("Ports",), page=3)
    documents = _Documents(hit, replace(hit, flags=("instructions",)))
    output = await SearchDocuments(documents).call({"query": "port"}, question(collection="manuals"))

    assert documents.asked == [("port", "manuals", 5)] and output.passages == documents.hits
    assert output.text == "From Guide › Ports, page 3:\nPort 8080.\n\nFrom Guide › Ports, page 3:\nPort 8080."
    assert (await SearchDocuments(_Documents()).call({"query": "port"}, question())).text == "Nothing was found."
    long = await SearchDocuments(_Documents(*[replace(hit, text="ä" * 5_000)] * 10)).call({"query": "port"}, question())
    assert len(long.passages) == 3 and len(long.text.encode()) <= 14_000


PNG, JPEG = Image("image/png", b"\x89PNG\r\n\x1a\nrest"), Image("image/jpeg", b"\xff\xd8\xff\xe0")


@pytest.mark.parametrize(
    ("images", "field"),
    [
        ([PNG] * 9, "images"),
        ([PNG, Image("image/svg+xml", b"<svg>")], "images[1].media_type"),
        ([Image("image/png", b"")], "images[0].data"),
        ([Image("image/png", JPEG.data)], "images[0].data"),
        ([Image("image/webp", b"RIFF0000WAVE")], "images[0].data"),
        ([Image("image/png", PNG.data + b"x" * 5 * 1024 * 1024)], "images[0].data"),
        ([Image("image/png", PNG.data + b"x" * (4 * 1024 * 1024))] * 3, "images"),
    ],
)
def test_pictures_are_what_they_say_and_within_bounds(images: list[Image], field: str) -> None:
    """The mistake names its place."""
    with pytest.raises(RequestInvalid) as raised:
        require_images(images)

    assert field == raised.value.field and raised.value.metadata["bound"]


def test_right_pictures_pass() -> None:
    """All four kinds."""
    require_images([PNG, JPEG, Image("image/gif", b"GIF89a"), Image("image/webp", b"RIFF0000WEBP")])


@pytest.mark.parametrize(
    ("tools", "server_tools", "field"),
    [
        ([ToolSpec("a.b", "", {})], [], "tools[0].name"),
        ([ToolSpec("a", "", {}), ToolSpec("a", "", {})], [], "tools[1].name"),
        ([ToolSpec("a", "", {})], ["a"], "tools[0].name"),
        ([ToolSpec("a", "x" * 5_000, {})], [], "tools[0].description"),
        ([ToolSpec("a", "", {"properties": {"b": {"$ref": "https://x/"}}})], [], "tools[0].input_schema"),
        ([], ["a", "a"], "server_tools"),
        ([], [f"t{number}" for number in range(33)], "server_tools"),
        ([ToolSpec(f"t{number}", "", {}) for number in range(65)], [], "tools"),
    ],
)
def test_tools_of_a_client_are_checked(tools: list[ToolSpec], server_tools: list[str], field: str) -> None:
    """Before any model is asked."""
    with pytest.raises(RequestInvalid) as raised:
        require_tools(tools, server_tools)

    assert field == raised.value.field and raised.value.metadata["bound"]


def test_server_tools_are_known_by_name() -> None:
    """An unknown name is told what there is."""
    box = Toolbox([FakeTool("calculator")])
    box.require(["calculator"])
    for wrong in ("calculators", "other__tool", "", "calculator__x"):
        with pytest.raises(RequestInvalid, match="no such tool") as raised:
            box.require(["calculator", wrong])
        assert (raised.value.field, raised.value.metadata["bound"]) == ("server_tools[1]", "one of: calculator")


def suspended() -> Suspended:
    calls = (ToolCall("a", "weather", "{}"), ToolCall("b", "double", "{}"), ToolCall("c", "weather", "{}"))
    prompt = Prompt("t", "s", (Message("user", "q"), Message("assistant", calls=calls)), "q", (), 10)
    results = (ToolResult("b", "double", "42"),)
    return Suspended("answer-1", ("acme", "alice"), "s", "default", "fast", "q", prompt, False, results, (), ())


def test_results_take_their_place_among_the_calls() -> None:
    """In the calls' order, ours among them, with the tools' names."""
    found = results_for(suspended(), [ToolResult("c", "", "rain"), ToolResult("a", "", "sun", failed=True)])

    assert [("a", "weather", "sun"), ("b", "double", "42"), ("c", "weather", "rain")] == [(r.call_id, r.name, r.text) for r in found]


@pytest.mark.parametrize(
    ("results", "field"),
    [
        ([ToolResult("a", "", "x")], "tool_results"),
        ([ToolResult("a", "", "x"), ToolResult("a", "", "x")], "tool_results[1].call_id"),
        ([ToolResult("b", "", "x")], "tool_results[0].call_id"),
        ([ToolResult("z", "", "x")], "tool_results[0].call_id"),
        ([ToolResult("a", "", "x" * 70_000)], "tool_results[0].text"),
        ([ToolResult("a", "", "")] * 65, "tool_results"),
    ],
)
def test_each_call_of_the_client_has_exactly_one_result(results: list[ToolResult], field: str) -> None:
    """A provider refuses anything else, so we do first and say where."""
    with pytest.raises(RequestInvalid) as raised:
        results_for(suspended(), results)

    assert field == raised.value.field
