"""What of a schema each provider is sent."""

from typing import Any

import pytest

from services.orchestrator.claude_model import _bindable
from services.orchestrator.domain import Candidate, Message, Prompt
from services.orchestrator.openai_model import bound_schema
from services.orchestrator.schema_subsets import is_closed

OPEN: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
SHUT: dict[str, Any] = {**OPEN, "additionalProperties": False}
ALL: dict[str, Any] = {**SHUT, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "closed", "strict"),
    [
        (OPEN, False, False),
        (SHUT, True, False),
        (ALL, True, True),
        ({"type": "array", "items": OPEN}, False, False),
        ({**ALL, "properties": {"a": SHUT}}, True, False),
        ({"anyOf": [ALL, {"type": "null"}]}, True, True),
        ({"$defs": {"x": OPEN}, "type": "string"}, False, False),
        ({"type": "string", "enum": ["a"]}, True, True),
    ],
)
def test_a_schema_is_bound_only_where_every_object_is_closed(schema: dict[str, Any], closed: bool, strict: bool) -> None:
    """However deep it stands."""
    assert (is_closed(schema, all_required=False), is_closed(schema, all_required=True)) == (closed, strict)


def closed(part: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object with one property, as every provider takes it."""
    return {"type": "object", "properties": {"a": part}, "required": ["a"], "additionalProperties": False, **more}


@pytest.mark.parametrize(
    ("part", "sent"),
    [
        ({"type": "integer", "minimum": 1}, {"type": "integer", "description": "{minimum: 1}"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"type": "string", "pattern": "^a"}, {"type": "string", "description": "{pattern: ^a}"}),
        ({"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ({"oneOf": [ALL, {"type": "null"}]}, {"anyOf": [ALL, {"type": "null"}]}),
        ({"enum": ["x", 1]}, {"enum": ["x", 1]}),
    ],
)
def test_claude_is_sent_what_its_interface_takes(part: dict[str, Any], sent: dict[str, Any]) -> None:
    """The rest stands in descriptions; an answer is checked against all of it."""
    assert _bindable(closed(part)) == closed(sent)


@pytest.mark.parametrize(
    "schema",
    [
        OPEN,
        closed({}),
        closed({"not": {"type": "string"}}),
        {**closed({"$ref": "#/definitions/x"}), "definitions": {"x": {"type": "string"}}},
        {**closed({"$ref": "#/$defs/x"}), "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}},
        {**closed({"$ref": "#"})},
        closed({"anyOf": [True]}),
    ],
)
def test_claude_is_bound_to_nothing_where_its_interface_has_no_form_of_a_schema(schema: dict[str, Any]) -> None:
    """Open, without a type, with references that lead elsewhere or round in a circle."""
    assert _bindable(schema) is None


@pytest.mark.parametrize(
    ("schema", "sent", "strict"),
    [
        (closed({"type": "integer", "minimum": 1}), closed({"type": "integer", "minimum": 1}), True),
        (closed({"type": "string", "maxLength": 9, "format": "iri"}), closed({"type": "string"}), True),
        (closed({"type": "string"}, **{"$schema": "x"}), closed({"type": "string"}), True),
        (closed({"allOf": [ALL]}), closed({"allOf": [ALL]}), False),
        ({"type": "array", "items": ALL}, {"type": "array", "items": ALL}, False),
        (closed({"anyOf": [{"type": "string", "minLength": 1}]}), closed({"anyOf": [{"type": "string"}]}), True),
        (closed({"type": "array", "items": {"prefixItems": []}}), closed({"type": "array", "items": {"prefixItems": []}}), False),
        (OPEN, OPEN, False),
    ],
)
def test_openai_is_bound_strictly_only_to_keywords_it_knows(schema: dict[str, Any], sent: dict[str, Any], strict: bool) -> None:
    """What only narrows is left out; what cannot be left out binds loosely."""
    prompt = Prompt("t", "s", (Message("user", "?"),), "?", (), 10, output_schema=schema)

    assert bound_schema(prompt, Candidate("openai", "m", 1, 1, frozenset({"schema"}))) == {
        "name": "answer",
        "schema": sent,
        "strict": strict,
    }
