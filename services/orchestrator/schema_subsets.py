"""JSON Schema as providers take it: each can bind an answer to a part of the keywords, and refuses the request with another one. Pure.

What is left out here is not lost: the finished answer is checked against the whole schema.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_MAPS = frozenset({"properties", "$defs", "definitions"})
"""Keywords whose value has a schema under each name."""


def is_closed(schema: Any, *, all_required: bool) -> bool:
    """Whether every object of a JSON Schema forbids other properties and, if `all_required`, requires its own.

    Providers bind an answer to such schemas alone, and refuse the request otherwise.
    """
    if isinstance(schema, Mapping):
        if schema.get("type") == "object" or "properties" in schema:
            if schema.get("additionalProperties") is not False:
                return False
            if all_required and set(schema.get("properties", ())) != set(schema.get("required", ())):
                return False
        return all(is_closed(part, all_required=all_required) for part in schema.values())
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return all(is_closed(part, all_required=all_required) for part in schema)
    return True


def only(schema: Any, known: Mapping[str, Any], dropped: frozenset[str]) -> dict[str, Any] | None:
    """`schema` without the keywords in `dropped`, which make it narrower; None if it has one that is not in `known` either.

    `known` gives for each keyword the values that are known of it, None for all; another value is dropped with its keyword.
    """
    if not isinstance(schema, Mapping):
        return None
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in dropped:
            continue
        if keyword not in known:
            return None
        values = known[keyword]
        if values is not None and value not in values:
            continue
        if keyword in _MAPS:
            parts = {name: only(part, known, dropped) for name, part in value.items()}
            if None in parts.values():
                return None
            made[keyword] = parts
        elif keyword == "anyOf":
            branches = [only(part, known, dropped) for part in value]
            if None in branches:
                return None
            made[keyword] = branches
        elif keyword == "items":
            if (part := only(value, known, dropped)) is None:
                return None
            made[keyword] = part
        else:
            made[keyword] = value
    return made


def one_type_each(schema: Any) -> Any:
    """The same schema where a list of types has become one schema for each of them."""
    if isinstance(schema, Mapping):
        made = {name: one_type_each(part) for name, part in schema.items()}
        if isinstance(types := made.get("type"), list):
            del made["type"]
            return {"anyOf": [{"type": kind, **made} for kind in types]}
        return made
    return [one_type_each(part) for part in schema] if isinstance(schema, list) else schema


def references_end(schema: Mapping[str, Any]) -> bool:
    """Whether every reference is to a definition under `$defs`, and none leads back to where it began."""
    definitions = schema.get("$defs", {})
    named = {f"#/$defs/{name}": _references(part) for name, part in definitions.items()}
    if not _references(schema) <= named.keys():
        return False
    ending: set[str] = set()
    while more := {name for name, leads_to in named.items() if name not in ending and leads_to <= ending}:
        ending |= more
    return ending == named.keys()


def _references(schema: Any) -> set[str]:
    if isinstance(schema, Mapping):
        found = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set[str]()
        return found.union(*map(_references, schema.values()))
    return set[str]().union(*map(_references, schema)) if isinstance(schema, list) else set()
