"""Schemas that may be asked for, and texts that have to satisfy them."""

import json
import time
from typing import Any

import pytest

from services.chassis.errors import RequestInvalid
from services.orchestrator.domain import Message, Prompt
from services.orchestrator.json_schema import SCHEMA_NODES_MAX as NODES_MAX
from services.orchestrator.json_watch import JsonWatch
from services.orchestrator.output_schema import asked_again, problems_of, require, tokens_max_of, told, unfenced

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+$"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2, "uniqueItems": True},
    },
    "required": ["name"],
    "additionalProperties": False,
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "other.json#/a"},
        {"$ref": "#/$defs/missing"},
        {"$id": "https://example.org/", "$ref": "#"},
        {"$dynamicRef": "#a"},
        {"$schema": "https://example.org/dialect"},
        {"unevaluatedProperties": False},
        {"pattern": "(?=a)b"},
        {"pattern": r"(a)\1"},
        {"pattern": "a" * 513},
        {"pattern": "["},
        {"pattern": "((a{1,100}){1,100}){1,100}"},
        {"patternProperties": {"(?<=x)y": {}}},
        {"type": "nothing"},
        {"type": 3},
        {"properties": []},
        deep(20),
        {"anyOf": [{"type": "string"}] * NODES_MAX},
        {"enum": ["x" * 40_000]},
    ],
)
def test_hostile_schema_is_refused_by_name(schema: dict[str, Any]) -> None:
    """What leads outside, takes long or is no schema is refused before anything is done with it, and quickly."""
    began = time.process_time()
    with pytest.raises(RequestInvalid) as refused:
        require(schema, "output_schema")

    assert (refused.value.field, bool(refused.value.metadata["bound"])) == ("output_schema", True)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": {}}},
        {"properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        {"enum": [{"$ref": "https://example.org/ is data here"}]},
        {"pattern": r"^\d{4}-\d{2}-\d{2}$"},
        {"pattern": r"^[^@\s]+@[^@\s]+$"},
        {"pattern": "^(red|green)$"},
        {"pattern": r"^(\d{1,3}\.){3}\d{1,3}$"},
        {"pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"},
    ],
)
def test_ordinary_schema_is_let_in(schema: dict[str, Any]) -> None:
    """Recursion, dates and addresses included."""
    require(schema, "output_schema")


@pytest.mark.parametrize(
    ("text", "keyword"),
    [
        ('{"name": "Ada", "age": 36, "tags": ["a", "b"]}', None),
        ('{"name": "Ada", "age": 36.0}', None),
        ('{"name": "ada"}', "/properties/name/pattern"),
        ('{"age": 3}', "/required"),
        ('{"name": "Ada", "age": "3"}', "/properties/age/type"),
        ('{"name": "Ada", "tags": ["a", "a"]}', "/properties/tags/uniqueItems"),
        ('{"name": "Ada", "more": 1}', "/additionalProperties"),
        ("[]", "/type"),
        ('{"name": "Ada"', "json"),
        ("NaN", "json"),
        ("", "json"),
    ],
)
def test_what_is_wrong_is_named_by_the_place_in_the_schema(text: str, keyword: str | None) -> None:
    """The place is the caller's own words; the quote of the text is for the model alone."""
    problems = problems_of(text, PERSON)

    assert (problems[0][0] if problems else None) == keyword


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"$ref": "#"}, "1"),
        ({"type": "array", "items": {"anyOf": [{"const": n} for n in range(400)]}}, json.dumps([399] * 20_000)),
        ({"items": {"pattern": "^(a+)+$"}}, json.dumps(["a" * 3_000 + "c"] * 50)),
        (
            {"patternProperties": {f"{n}(a|aa)+$": False for n in range(300)}},
            json.dumps({f"{n}aaaaaaaaaaaaaaaaaaaaaaaa": 1 for n in range(3000)}),
        ),
        ({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "[" * 900 + "]" * 900),
    ],
)
def test_checking_ends_soon_whatever_the_text(schema: dict[str, Any], text: str) -> None:
    """What would take long does not count as satisfied, and is not waited for."""
    require(schema, "output_schema")
    began = time.process_time()

    assert problems_of(text, schema)
    assert time.process_time() - began < 5


def test_large_array_of_different_items_is_checked_in_time() -> None:
    """Uniqueness is not looked for pair by pair."""
    rows = [{"n": n} for n in range(20_000)]

    assert problems_of(json.dumps(rows), {"uniqueItems": True}) == []
    assert problems_of(json.dumps([*rows, {"n": 0}]), {"uniqueItems": True})[0][0] == "/uniqueItems"


@pytest.mark.parametrize("text", ['{"a": 1}', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```\n'])
def test_json_in_a_block_of_code_is_taken_out(text: str) -> None:
    """Models that are not bound to a schema like to wrap it."""
    assert unfenced(text) == '{"a": 1}'


def test_schema_stands_at_the_end_of_the_prompt_and_is_counted() -> None:
    """What stands before stays the same, for prompt caching; the bound on tokens holds."""
    prompt = Prompt("t", "system", (Message("user", "passages and question"),), "question", (), 100)
    asked = told(prompt, PERSON)
    again = asked_again(asked, "{}", problems_of("{}", PERSON))

    assert asked.messages[0].text.startswith("passages and question\n\n")
    assert json.dumps(PERSON, separators=(",", ":")) in asked.messages[0].text
    assert (asked.system, asked.output_schema) == ("system", PERSON)
    assert asked.input_tokens_max == 100 + tokens_max_of(PERSON)
    assert [message.role for message in again.messages] == ["user", "assistant", "user"]
    assert "'name' is a required property" in again.messages[-1].text
    assert again.input_tokens_max > asked.input_tokens_max + len(again.messages[-1].text)


@pytest.mark.parametrize(
    ("text", "wrong", "at"),
    [
        ('{"name": "Ada", "age": 36, "tags": ["a", "b"]}', None, None),
        (' {"name": "A\\"d\\u00e4", "age": -0.5e+3} \n', None, None),
        ("Here is the JSON: {", "json", 0),
        ('["a"]', "type", 0),
        ('{"age": "3"}', "type", 8),
        ('{"nickname": 1}', "additionalProperties", 10),
        ('{"tags": ["a", "b", "c"]}', "maxItems", 18),
        ('{"tags": [1]}', "type", 10),
        ('{"age": 01}', "json", 9),
        ('{"age": 1.}', "json", 10),
        ('{"name": "a"} x', "json", 14),
        ('{"name": tru e}', "type", 9),
        ('{"name" "a"}', "json", 8),
        ("{,}", "json", 1),
        ('{"name": "a\nb"}', "json", 11),
        ('{"name": "\\x"}', "json", 11),
    ],
)
def test_first_character_that_rules_it_out_is_found(text: str, wrong: str | None, at: int | None) -> None:
    """Not one later, so that no more is paid for."""
    watch = JsonWatch(PERSON)
    found = next(((place, said) for place, letter in enumerate(text) if (said := watch.feed(letter))), (None, None))

    assert found == (at, wrong)
