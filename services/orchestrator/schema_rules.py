"""Which JSON Schemas may be asked of an answer: small ones, closed in themselves, whose checking takes a bounded time. Pure.

A schema comes from a caller and a text from a model, so neither is trusted.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic_core import SchemaError as PatternError
from pydantic_core import SchemaValidator
from pydantic_core import ValidationError as Mismatch
from pydantic_core.core_schema import str_schema

from services.chassis.errors import RequestInvalid

BYTES_MAX, DEPTH_MAX, NODES_MAX = 32_768, 24, 2_000
PATTERN_CHARACTERS_MAX = 512
_DIALECTS = frozenset(
    {
        "https://json-schema.org/draft/2020-12/schema",
        "https://json-schema.org/draft/2019-09/schema",
        "http://json-schema.org/draft-07/schema",
    }
)
_REFUSED = frozenset(
    {
        "unevaluatedProperties",
        "unevaluatedItems",
        "$id",
        "$anchor",
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "$vocabulary",
    }
)
_LITERAL = frozenset({"enum", "const", "default", "examples"})
"""Keywords whose values are data and not schemas."""


def require(schema: Mapping[str, Any], field: str) -> None:
    """Raises RequestInvalid that names `field` and the bound unless `schema` may be asked for."""
    size = len(orjson.dumps(schema))
    if size > BYTES_MAX:
        raise RequestInvalid(f"the schema has {size} bytes", field=field, bound=f"{BYTES_MAX} bytes")
    for count, (depth, node) in enumerate(_nodes(schema)):
        if depth > DEPTH_MAX:
            raise RequestInvalid("the schema is too deep", field=field, bound=f"{DEPTH_MAX} levels")
        if count == NODES_MAX:
            raise RequestInvalid("the schema has too many parts", field=field, bound=f"{NODES_MAX} objects")
        _require_node(schema, node, field)
    try:
        Draft202012Validator.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        raise RequestInvalid("this is not a JSON Schema", field=field, bound="JSON Schema 2020-12") from error


@functools.lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a text holds `pattern`, told in linear time: Python's own engine can be kept busy for ever by twenty characters.

    Raises ValueError for what is no pattern, is too long, or needs more: look-around and references back.
    """
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        raise ValueError(f"more than {PATTERN_CHARACTERS_MAX} characters")
    try:
        validator = SchemaValidator(str_schema(pattern=pattern, regex_engine="rust-regex"))
    except PatternError:
        raise ValueError("no regular expression without look-around and references back") from None

    def holds(text: str) -> bool:
        try:
            validator.validate_python(text)
        except Mismatch:
            return False
        return True

    return holds


def _nodes(value: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every object of the schema that may be one itself, with its depth."""
    waiting: list[tuple[int, Any]] = [(1, value)]
    while waiting:
        depth, part = waiting.pop()
        if isinstance(part, Mapping):
            yield depth, part
            waiting += [(depth + 1, inner) for key, inner in part.items() if key not in _LITERAL]
        elif isinstance(part, list):
            waiting += [(depth + 1, inner) for inner in part]


def _require_node(schema: Mapping[str, Any], node: Mapping[str, Any], field: str) -> None:
    if refused := _REFUSED & node.keys():
        raise RequestInvalid(f"the schema uses {min(refused)}", field=field, bound="without it")
    if isinstance(dialect := node.get("$schema"), str) and dialect.rstrip("#") not in _DIALECTS:
        raise RequestInvalid("the schema is of a dialect that is not known", field=field, bound="JSON Schema 2020-12")
    if isinstance(reference := node.get("$ref"), str) and not _resolves(schema, reference):
        raise RequestInvalid("the schema refers to something outside of itself", field=field, bound="#/… that exists")
    patterns = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
    if isinstance(more := node.get("patternProperties"), Mapping):
        patterns += more
    for pattern in patterns:
        try:
            matcher(pattern)
        except ValueError as error:
            raise RequestInvalid(f"a pattern of the schema is refused: {error}", field=field, bound="patterns that end soon") from error


def _resolves(schema: Mapping[str, Any], reference: str) -> bool:
    """Whether a JSON pointer within the schema leads to a schema."""
    if reference != "#" and not reference.startswith("#/"):
        return False
    at: Any = schema
    for part in reference[2:].split("/") if len(reference) > 1 else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(at, Mapping) or key not in at or "%" in part:
            return False
        at = at[key]
    return isinstance(at, Mapping | bool)
