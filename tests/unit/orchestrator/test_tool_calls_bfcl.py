"""Berkeley's function-calling questions against the loop: what an expert would call is called, what is wrong is refused with the reason."""

import gzip
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

from services.orchestrator.domain import ToolCall, ToolSpec
from services.orchestrator.json_schema import closed
from services.orchestrator.tools.toolbox import Bench, Handed, Refused
from tests.fakes.scripted_model import FakeTool, ScriptedModel, answered, question

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "tools"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
WRONG: dict[str, Any] = {"string": 7, "integer": "seven", "number": "seven", "boolean": "yes", "array": "one, two", "object": "one"}
"""A value of another type than each."""
CONTRADICTED = {
    ("parallel_multiple_21", "linear_regression_fit"): "x: \"data['sales']\" is not of type 'array'",
    ("parallel_multiple_26", "bank_calculate_balance"): "there is no property 'type'",
    ("parallel_multiple_94", "sort_list"): "elements.0: 'apple' is not of type 'integer'",
}
"""Calls of the data set that its own schema of the tool rules out, and how: 3 of 1,747. A tool must not get them."""
CONTRADICTED_SPELLINGS = frozenset(
    {
        *("simple_python_149", "simple_python_307", "simple_python_358", "multiple_76", "parallel_152", "parallel_multiple_12"),
        *("parallel_multiple_143", "parallel_multiple_173", "parallel_multiple_194"),
    }
)
"""Questions with a further allowed value that the schema rules out, such as `bronze` where it lists `Bronze`."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data set is not at {DATA}")


def converted(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with Python's names of types as JSON Schema; `any` is no type at all."""
    found = {key: value for key, value in schema.items() if key not in ("type", "properties", "items", "optional")}
    kind = TYPES.get(schema.get("type", ""), schema.get("type"))
    if kind is not None and kind != "any":
        found["type"] = kind
    if "properties" in schema:
        found["properties"] = {name: converted(inner) for name, inner in schema["properties"].items()}
    if "items" in schema:
        found["items"] = converted(schema["items"])
    return found


def name_of(function: str) -> str:
    return function.replace(".", "_")


def chosen(value: Any) -> Any:
    """One of the values that are allowed inside an allowed value: objects have lists of them too."""
    if isinstance(value, dict):
        return {name: chosen(next(one for one in inner if one != "")) for name, inner in value.items() if any(one != "" for one in inner)}
    return [chosen(item) for item in value] if isinstance(value, list) else value


class Row:
    """One question: its tools and the calls that are right."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.key: str = row["id"]
        self.specs = [
            ToolSpec(name_of(function["name"]), function["description"], converted(function["parameters"])) for function in row["function"]
        ]
        self.truth = [(name_of(name), arguments) for call in row["ground_truth"] or () for name, arguments in call.items()]

    @property
    def bench(self) -> Bench:
        return Bench(handed={spec.name: spec for spec in self.specs})

    def calls(self) -> Iterator[tuple[ToolSpec, dict[str, Any]]]:
        """Every right call, with the first allowed value of each argument that is needed or comes first."""
        by_name = {spec.name: spec for spec in self.specs}
        for name, allowed in self.truth:
            required = by_name[name].input_schema.get("required", ())
            first = {key: next((value for value in values if value != "" or key not in required), "") for key, values in allowed.items()}
            yield by_name[name], {key: chosen(value) for key, value in first.items() if value != ""}

    def alternatives(self) -> Iterator[tuple[ToolSpec, dict[str, Any]]]:
        """Every right call once more for each other allowed value of an argument."""
        by_name = {spec.name: spec for spec in self.specs}
        for (name, allowed), (_, base) in zip(self.truth, self.calls(), strict=True):
            for key, values in allowed.items():
                for value in values[1:]:
                    if value != "":
                        yield by_name[name], {**base, key: chosen(value)}


@cache
def rows(part: str) -> list[Row]:
    with gzip.open(DATA / f"bfcl_{part}.jsonl.gz") as lines:
        return [Row(orjson.loads(line)) for line in lines]


PARTS = ("simple_python", "multiple", "parallel", "parallel_multiple")


def written(name: str, arguments: dict[str, Any], call_id: str = "x") -> ToolCall:
    return ToolCall(call_id, name, orjson.dumps(arguments).decode())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
async def test_every_right_call_is_made_with_its_arguments(part: str) -> None:
    """A scripted model calls all that the experts call, at once; each call reaches its tool as it was written."""
    made = 0
    for row in rows(part):
        tools = {spec.name: FakeTool(spec.name, properties=dict(spec.input_schema.get("properties", {}))) for spec in row.specs}
        for spec in row.specs:
            tools[spec.name].required = tuple(spec.input_schema.get("required", ()))
        calls = [written(spec.name, arguments, f"c{number}") for number, (spec, arguments) in enumerate(row.calls())]
        told = await answered(ScriptedModel([calls, "done"]), tools.values())

        assert told.failure is None, row.key
        failed = {(row.key, result.name): result.text for result in told.results if result.failed}
        assert failed.keys() == {place for place in CONTRADICTED if place[0] == row.key}
        assert all(CONTRADICTED[place] in text for place, text in failed.items())
        got = Counter(orjson.dumps([tool.name, one], option=orjson.OPT_SORT_KEYS) for tool in tools.values() for one in tool.got)
        wanted = Counter(orjson.dumps([spec.name, arguments], option=orjson.OPT_SORT_KEYS) for spec, arguments in row.calls())
        assert got <= wanted and got.total() == len(calls) - len(failed), row.key
        made += len(calls)
    assert made >= len(rows(part))


@pytest.mark.slow
def test_every_other_allowed_value_is_taken_too() -> None:
    """The experts list several spellings and defaults; none of them is wrong."""
    tried = [
        (row.key, isinstance(row.bench.judge(written(spec.name, arguments)), Handed))
        for part in PARTS
        for row in rows(part)
        for spec, arguments in row.alternatives()
        if (row.key, spec.name) not in CONTRADICTED
    ]

    assert len(tried) > 1_000
    assert {key for key, taken in tried if not taken} == CONTRADICTED_SPELLINGS


def mistakes(spec: ToolSpec, arguments: dict[str, Any]) -> Iterator[tuple[str, ToolCall, str]]:
    """Kind of mistake, the call, and what its reason must name."""
    schema = spec.input_schema
    properties: dict[str, Any] = dict(schema.get("properties", {}))
    for name in schema.get("required", ()):
        yield "missing required", written(spec.name, {key: value for key, value in arguments.items() if key != name}), f"'{name}'"
    for name in arguments:
        if wrong := WRONG.get(properties[name].get("type", "")):
            yield "wrong type", written(spec.name, {**arguments, name: wrong}), name
    yield "unknown parameter", written(spec.name, {**arguments, "made_up_parameter": 1}), "'made_up_parameter'"
    yield "unknown function", written(spec.name + "_v2", arguments), "there is no tool of this name"
    yield "no JSON", ToolCall("x", spec.name, orjson.dumps(arguments).decode()[:-1]), "not valid JSON"


@pytest.mark.slow
def test_every_wrong_call_is_refused_with_its_reason() -> None:
    """Each right call is broken in every way there is: 100 % are refused, and the reason names the place."""
    seen, caught = Counter[str](), Counter[str]()
    for part in PARTS:
        for row in rows(part):
            bench = row.bench
            for spec, arguments in row.calls():
                if (row.key, spec.name) in CONTRADICTED:
                    continue
                assert isinstance(bench.judge(written(spec.name, arguments)), Handed), row.key
                for kind, call, place in mistakes(spec, arguments):
                    verdict = bench.judge(call)
                    seen[kind] += 1
                    caught[kind] += isinstance(verdict, Refused) and place in verdict.reason
    print(*(f"{kind}: {caught[kind]} of {count}" for kind, count in seen.items()), sep="\n")

    assert caught == seen and min(seen.values()) > 1_000


@pytest.mark.slow
async def test_where_no_call_may_be_made_every_call_is_refused() -> None:
    """Questions that no tool is for: none is offered, and a model that calls one all the same is refused and answers in words."""
    for row in rows("irrelevance"):
        calls = [ToolCall(f"c{number}", spec.name, "{}") for number, spec in enumerate(row.specs)]
        told = await answered(ScriptedModel([calls, "I have no tool for this."]), asked=question())

        assert told.text == "I have no tool for this." and told.failure is None
        assert [("no tool may be called here", True)] * len(calls) == [(result.text, result.failed) for result in told.results], row.key


def test_a_schema_that_says_nothing_of_other_properties_takes_none() -> None:
    """As every schema here, and unlike JSON Schema's own rule."""
    assert closed({"type": "object", "properties": {"a": {}}})["additionalProperties"] is False
    assert "additionalProperties" not in closed({"type": "object"})
