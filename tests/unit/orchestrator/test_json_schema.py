"""JSON Schema between strangers: right and wrong values, and schemas that would fetch, hang or hide."""

import time
from typing import Any

import pytest

from services.orchestrator.json_schema import CHECKS_MAX, Schema, SchemaRefused, ValueRefused, closed, parse_object

DOUBLING = {f"a{level}": {"allOf": [{"$ref": f"#/$defs/a{level + 1}"}] * 2} for level in range(40)}


def refusal(schema: dict[str, Any], value: object) -> str:
    """Why the value is refused; empty if it is not."""
    try:
        Schema(schema).check(value)
    except ValueRefused as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("schema", "value", "reason"),
    [
        ({"properties": {"a": {"type": "integer"}}}, {"a": 5.0}, ""),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 5.5}, "a: 5.5 is not of type 'integer'"),
        ({"properties": {"a": {"type": "integer"}}}, {"a": True}, "a: True is not of type 'integer'"),
        ({"properties": {"a": {"enum": ["x"]}}}, {"a": "y"}, "a: 'y' is not one of ['x']"),
        ({"properties": {"a": {"pattern": "^b+$"}}}, {"a": "bbb"}, ""),
        ({"properties": {"a": {"pattern": "^b+$"}}}, {"a": "abc"}, "a: does not match the pattern"),
        ({"patternProperties": {"^x": {"type": "string"}}, "additionalProperties": False}, {"x1": "s"}, ""),
        ({"patternProperties": {"^x": {"type": "string"}}, "additionalProperties": False}, {"y": "s"}, "there is no property 'y'"),
        ({"patternProperties": {"^x": {"type": "string"}}}, {"x1": 1}, "x1: 1 is not of type 'string'"),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, {"b": 1}, "b: 1 is not of type 'string'"),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, 1.0]}, "a: has the same item twice"),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, True, "1", {"x": 1}, {"x": 2}]}, ""),
        ({"properties": {"a": {"format": "email"}}}, {"a": "no mail"}, ""),
        ({"$defs": {"n": {"type": "number"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}, {"a": "x"}, "a: 'x' is not of type 'number'"),
        ({"properties": {"a/b": {"type": "string"}, "c": {"$ref": "#/properties/a~1b"}}}, {"c": 1}, "c: 1 is not of type 'string'"),
        ({"anyOf": [{"type": "object"}, {"$ref": "#/anyOf/0"}], "properties": {"a": True, "b": False}}, {"a": 1}, ""),
        (
            {"patternProperties": {f"{n}b": {} for n in range(400)}},
            {f"{n}a": 1 for n in range(400)},
            "the schema asks for too much work to check this",
        ),
        ({"allOf": [{"$ref": "#"}]}, {}, "the schema asks for too much work to check this"),
        ({"$defs": {**DOUBLING, "a40": {}}, "$ref": "#/$defs/a0"}, {}, "the schema asks for too much work to check this"),
    ],
)
def test_values_are_checked(schema: dict[str, Any], value: object, reason: str) -> None:
    """The reason names the place, for whoever has to do better."""
    assert reason == refusal(schema, value)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array"}, "not a schema of an object"),
        ({"properties": {"a": {"type": "texts"}}}, "not a schema of draft 2020-12"),
        ({"properties": {"a": {"$ref": "https://example.com/s.json"}}}, "a reference leaves the schema"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "a reference leaves the schema"),
        ({"allOf": [{"properties": {"a": {"$ref": "other.json#/a"}}}]}, "a reference leaves the schema"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "a reference leads to no schema inside"),
        ({"properties": {"a": {"$ref": "#anchor"}}}, "a reference leaves the schema"),
        ({"x": {"pattern": "(?=a)"}, "properties": {"a": {"$ref": "#/x"}}}, "a reference leads to no schema inside"),
        ({"properties": {"a": {"default": {"type": "odd"}}, "b": {"$ref": "#/properties/a/default"}}}, "a reference leads to no schema"),
        ({"properties": {"a": {"$id": "https://example.com/", "$ref": "#/b"}}}, "$id is not taken here"),
        ({"$dynamicRef": "#meta"}, "$dynamicRef is not taken here"),
        ({"properties": []}, "the value of properties is wrong"),
        ({"properties": {"a": "text"}}, "there is something else"),
        ({"properties": {"a": {"items": [{}]}}}, "there is something else"),
        ({"properties": {"a": {"anyOf": []}}}, "the value of anyOf is wrong"),
        ({"properties": {"a": {"type": []}}}, "the value of type is wrong"),
        ({"properties": {"a": {"minLength": -1}}}, "the value of minLength is wrong"),
        ({"properties": {"a": {"minLength": True}}}, "the value of minLength is wrong"),
        ({"properties": {"a": {"exclusiveMinimum": True}}}, "the value of exclusiveMinimum is wrong"),
        ({"properties": {"a": {"multipleOf": 0}}}, "the value of multipleOf is wrong"),
        ({"required": "a"}, "the value of required is wrong"),
        ({"properties": {"a": {"pattern": 5}}}, "the value of pattern is wrong"),
        ({"properties": {"a": {"pattern": "(?=a)b"}}}, "a pattern is not regular"),
        ({"properties": {"a": {"pattern": r"(a)\1"}}}, "a pattern is not regular"),
        ({"properties": {"a": {"pattern": "((a{1000}){1000}){1000}"}}}, "a pattern is not regular"),
        ({"properties": {"a": {"pattern": "a" * 600}}}, "a pattern is no string of at most 512"),
        ({"patternProperties": {"(?!x)": {}}}, "a pattern is not regular"),
        ({"patternProperties": {"x": {}}, "unevaluatedProperties": False}, "patternProperties together"),
        ({"properties": {f"p{number}": {} for number in range(2_100)}}, "more than 2000"),
        ({"description": "x" * 40_000}, "larger than 32768 bytes"),
    ],
)
def test_hostile_schemas_are_refused(schema: dict[str, Any], reason: str) -> None:
    """Whatever would be fetched, hang or mean something else than it says."""
    with pytest.raises(SchemaRefused, match=reason.replace("$", r"\$")):
        Schema(schema)


def test_a_deep_schema_is_refused() -> None:
    """Without a stack overflow on the way."""
    schema: dict[str, Any] = {}
    for _ in range(500):
        schema = {"properties": {"a": schema}}
    with pytest.raises(SchemaRefused):
        Schema(schema)


def test_names_that_look_like_keywords_are_names() -> None:
    """A property may be called `$ref`, and data may look like a schema."""
    schema = {"properties": {"$ref": {"type": "string"}, "pattern": {"enum": [{"$ref": "https://x/"}]}}}

    assert refusal(schema, {"$ref": "x", "pattern": {"$ref": "https://x/"}}) == ""


def test_a_pattern_that_hangs_others_takes_no_time() -> None:
    """Python's own engine would need 2^5000 steps here."""
    began = time.perf_counter()

    assert refusal({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 5_000 + "b"}) == "a: does not match the pattern"
    assert time.perf_counter() - began < 5


def test_the_bound_of_work_holds_for_each_check_anew() -> None:
    """A check that was large leaves the next one all its room."""
    large = {"properties": {"a": {"items": {"type": "integer", "minimum": 0}}}}
    for _ in range(3):
        assert refusal(large, {"a": list(range(CHECKS_MAX // 4))}) == ""


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1', "[]", '"x"', "{} {}", '{"a": ' + "[" * 30 + "]" * 30 + "}", "x" * 70_000])
def test_what_is_no_bounded_object_is_refused(text: str) -> None:
    """Before any schema is asked."""
    with pytest.raises(ValueRefused):
        parse_object(text)


def test_no_arguments_at_all_are_an_empty_object() -> None:
    """How models often write a call without arguments."""
    assert parse_object("") == {} == parse_object("{}")


def test_composed_schemas_are_not_closed() -> None:
    """What another branch allows cannot be seen from here."""
    for schema in ({"properties": {"a": {}}, "allOf": [{}]}, {"properties": {"a": {}}, "additionalProperties": True}, {}):
        assert closed(schema) is schema
