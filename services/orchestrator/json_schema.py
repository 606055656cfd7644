"""JSON Schema (draft 2020-12) for what goes into a tool, what comes out of it, and answers of a shape; schema and value may be strangers'.

Nothing is fetched and nothing takes long: references stay inside the schema, patterns are matched in linear time, and each check has a
bound on its work. What tools do with arguments, and how a model is told of a schema, is not known here.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from pydantic_core import SchemaError as PatternError
from pydantic_core import SchemaValidator
from pydantic_core import ValidationError as Mismatch
from pydantic_core.core_schema import str_schema
from referencing import Registry

SCHEMA_BYTES_MAX = 32_768
SCHEMA_NODES_MAX = 2_000
DEPTH_MAX = 24
"""Of schemas and values. Protobuf, which carries both, stops at a hundred messages, and a level of JSON takes three."""
VALUE_BYTES_MAX = 65_536
VALUE_NODES_MAX = 5_000
PATTERN_CHARACTERS_MAX = 512
CHECKS_MAX = 50_000
"""Keywords looked at in one check, about a quarter of a second: a schema of a few lines can ask for 2^40 of them."""
ANSWER_CHECKS_MAX = 100_000
"""The same for an answer, which may be larger than what a tool takes."""
REASONS_MAX = 4
NAMED_MAX = 8
"""Properties that are named where there is no such one."""
REASON_CHARACTERS_MAX = 240
_REFUSED = frozenset({"$dynamicRef", "$recursiveRef", "$id"})
"""Keywords that change what references mean, or mean another thing with every use."""
_REFUSED_OF_ANSWERS = _REFUSED | {
    *("unevaluatedProperties", "unevaluatedItems"),
    *("$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"),
}
"""A caller writes these for us, so what no provider takes is told at once. What a tool's server writes has to be lived with."""
_DIALECTS = frozenset(
    {
        "https://json-schema.org/draft/2020-12/schema",
        "https://json-schema.org/draft/2019-09/schema",
        "http://json-schema.org/draft-07/schema",
    }
)
_COMPOSED = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas", "unevaluatedProperties", "additionalProperties"}
)
"""With one of these an object may have more properties than `properties` lists."""


class SchemaRefused(ValueError):
    """A schema that is not valid, or not one to check strangers' values with. Its text says why."""


class ValueRefused(ValueError):
    """A value that is no JSON, too large, or not what the schema says. Its text says why; it may quote the value."""


class TooMuchWork(Exception):
    """A check that would take too long, or go too deep."""


_checks_left: ContextVar[list[int]] = ContextVar("checks_left")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object within VALUE_BYTES_MAX, DEPTH_MAX and VALUE_NODES_MAX. Raises ValueRefused."""
    if len(text if isinstance(text, bytes) else text.encode()) > VALUE_BYTES_MAX:
        raise ValueRefused(f"larger than {VALUE_BYTES_MAX} bytes")
    try:
        value = orjson.loads(text or "{}")  # a call without arguments is often written as nothing
    except orjson.JSONDecodeError as error:
        raise ValueRefused(f"not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueRefused("not a JSON object")
    require_bounded(value)
    return value


def require_bounded(value: object, nodes_max: int = VALUE_NODES_MAX, *, of: tuple[type, ...] = (object,)) -> None:
    """Raise ValueRefused unless `value` is JSON of at most DEPTH_MAX levels and `nodes_max` nodes that are one of `of`, with finite
    numbers."""
    waiting, nodes = [(value, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        if counts := isinstance(item, of):
            nodes += 1
        if counts and depth > DEPTH_MAX:
            raise ValueRefused(f"nested deeper than {DEPTH_MAX} levels")
        if nodes > nodes_max:
            raise ValueRefused(f"more than {nodes_max} values")
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueRefused("a number is not finite")
        children: Iterable[object] = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        waiting += [(child, depth + 1) for child in children]


class Schema:
    """A schema that is fit to check strangers' values with. Raises SchemaRefused where it is made.

    That of a tool's arguments is one of an object; `of_answer` lets any value be asked for, and refuses more keywords.
    """

    def __init__(self, schema: Mapping[str, Any], *, of_answer: bool = False) -> None:
        try:
            text = orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
        except (TypeError, orjson.JSONEncodeError):
            raise SchemaRefused("not JSON") from None
        if len(text) > SCHEMA_BYTES_MAX:
            raise SchemaRefused(f"larger than {SCHEMA_BYTES_MAX} bytes")
        self._validator = _validator(text, of_answer)
        self._checks_max = ANSWER_CHECKS_MAX if of_answer else CHECKS_MAX

    def check(self, value: object) -> None:
        """Raise ValueRefused, with what is wrong and where, unless `value` satisfies the schema. `value` is bounded already."""
        try:
            found = [error for _, error in zip(range(REASONS_MAX), self.problems(value), strict=False)]
        except TooMuchWork:
            raise ValueRefused("the schema asks for too much work to check this") from None
        if found:
            raise ValueRefused("; ".join(_told(error) for error in found))

    def problems(self, value: object) -> Iterator[ValidationError]:
        """What is wrong with `value`, one mistake after the other. Raises TooMuchWork in the middle if the bound on work is reached."""
        _checks_left.set([self._checks_max])
        try:
            yield from self._validator.iter_errors(value)
        except (RecursionError, ArithmeticError) as error:  # as a number that is divided beyond what a float holds
            raise TooMuchWork from error


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` of a tool's arguments with no other properties than those it lists, if it lists any and does not say otherwise.

    JSON Schema lets others pass. A model that makes up a parameter should hear of it instead of seeing it ignored.
    """
    if not schema.get("properties") or _COMPOSED & schema.keys():
        return schema
    return {**schema, "additionalProperties": False}


@functools.lru_cache(maxsize=128)
def _validator(text: bytes, of_answer: bool) -> Any:
    """The same tools come with every question of a client, so what was looked through once is kept."""
    schema = orjson.loads(text)
    _look_through(schema, of_answer)
    return _Checks(schema, registry=Registry())  # an empty one: what it lacks is not fetched


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else _is_names(value) and bool(value) and _TYPES.issuperset(value)


_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_ONE = frozenset(
    {
        *("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"),
        *("unevaluatedItems", "unevaluatedProperties"),
    }
)
"""Keywords whose value is a schema."""
_SEVERAL = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
"""Keywords whose value is a list of schemas."""
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value is a map of schemas by names, which are no keywords."""
_SHAPES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_SEVERAL, lambda value: isinstance(value, list) and bool(value)),
    **dict.fromkeys(_NAMED, lambda value: isinstance(value, dict)),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _is_count),
    **dict.fromkeys(("minContains", "maxContains"), _is_count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
    **dict.fromkeys(("$ref", "$anchor", "pattern", "format", "title", "description"), lambda value: isinstance(value, str)),
    "multipleOf": lambda value: _is_number(value) and value > 0,
    "uniqueItems": lambda value: isinstance(value, bool),
    "required": _is_names,
    "dependentRequired": lambda value: isinstance(value, dict) and all(map(_is_names, value.values())),
    "enum": lambda value: isinstance(value, list),
    "type": _is_type,
}
"""What each keyword's value must be. By hand: the draft's own schema of schemas takes a hundred times as long to apply."""


def _look_through(root: Any, of_answer: bool) -> None:
    """Raise SchemaRefused for what is no schema, and for what could fetch, hang or hide."""
    refused = _REFUSED_OF_ANSWERS if of_answer else _REFUSED
    if not isinstance(root, dict) or (not of_answer and root.get("type", "object") != "object"):
        raise SchemaRefused('not a schema of an object ("type": "object")')
    dialect = root.pop("$schema", None)
    if of_answer and dialect is not None and (not isinstance(dialect, str) or dialect.rstrip("#") not in _DIALECTS):
        raise SchemaRefused("of a dialect that is not known")
    if not of_answer:
        root.pop("$id", None)  # a name for others to refer to, and nobody does
    try:
        require_bounded(root, SCHEMA_NODES_MAX, of=(dict, list))
    except ValueRefused as error:
        raise SchemaRefused(str(error)) from None
    waiting: list[Any] = [root]
    seen: set[int] = set()
    references: set[str] = set()
    keywords: set[str] = set()
    while waiting:
        node = waiting.pop()
        seen.add(id(node))
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise SchemaRefused("not a schema of draft 2020-12: where a schema belongs there is something else")
        keywords |= node.keys()
        for keyword, value in node.items():
            if keyword in refused:
                raise SchemaRefused(f"{keyword} is not taken here")
            if keyword in _SHAPES and not _SHAPES[keyword](value):
                raise SchemaRefused(f"not a schema of draft 2020-12: the value of {keyword} is wrong")
            if keyword in _ONE:
                waiting.append(value)
            elif keyword in _SEVERAL:
                waiting += value
            elif keyword in _NAMED:
                waiting += value.values()
        for pattern in (*(node[name] for name in ("pattern",) if name in node), *node.get("patternProperties", ())):
            _matcher(pattern)
        if (reference := node.get("$ref")) is not None:
            references.add(reference)
    if {"patternProperties", "unevaluatedProperties"} <= keywords:
        raise SchemaRefused("patternProperties together with unevaluatedProperties is not taken")
    for reference in references:
        if id(_place(root, reference)) not in seen:
            raise SchemaRefused("a reference leads to no schema inside")


def _place(root: Any, reference: str) -> Any:
    """What a reference points at. Raises SchemaRefused unless it is a JSON pointer (RFC 6901) into the schema itself."""
    if not reference.startswith("#") or (reference != "#" and not reference.startswith("#/")):
        raise SchemaRefused("a reference leaves the schema")
    node = root
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isascii() and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            raise SchemaRefused("a reference leads to no schema inside")
    return node


@functools.lru_cache(maxsize=32)
def _matcher(pattern: object) -> Callable[[str], bool]:
    """Searches for `pattern` in linear time: Python's own engine can be kept busy for ever by twenty characters.

    Few are kept: one of a stranger may take 10 MB, the engine's own bound.
    """
    if not isinstance(pattern, str) or len(pattern) > PATTERN_CHARACTERS_MAX:
        raise SchemaRefused(f"a pattern is no string of at most {PATTERN_CHARACTERS_MAX} characters")
    try:
        validator = SchemaValidator(str_schema(pattern=pattern, regex_engine="rust-regex"))
    except PatternError:
        raise SchemaRefused("a pattern is not regular: no look-around, no references back") from None

    def found(text: str) -> bool:
        try:
            validator.validate_python(text)
        except Mismatch:
            return False
        return True

    return found


def _counted(check: Callable[..., Iterable[ValidationError] | None]) -> Callable[..., Iterable[ValidationError]]:
    def run(validator: Any, keyword: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        _spend(1 + (len(keyword) // 8 if isinstance(keyword, list | dict) else 0))
        yield from check(validator, keyword, instance, schema) or ()

    return run


def _spend(checks: int) -> None:
    """Take so much of what may still be done for the value that is being checked. Raises TooMuchWork."""
    left = _checks_left.get()
    left[0] -= checks
    if left[0] < 0:
        raise TooMuchWork


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matcher(pattern)(instance):
        yield ValidationError("does not match the pattern")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, inner in patterns.items():
            _spend(len(instance))
            matches = _matcher(pattern)
            for name, value in instance.items():
                if matches(name):
                    yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    listed, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    _spend(len(instance) * (1 + len(patterns)) // 8)
    matchers = [_matcher(pattern) for pattern in patterns]
    for name, value in instance.items():
        if name in listed or any(matches(name) for matches in matchers):
            continue
        if inner is False:
            known = ", ".join(f"{each!r:.64}" for each in itertools.islice(listed, NAMED_MAX))
            yield ValidationError(f"there is no property {name!r:.64}" + (f"; there are: {known}" if known else ""))
        elif isinstance(inner, dict):
            yield from validator.descend(value, inner, path=name)


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """In linear time: equal values have equal canonical texts."""
    if wanted and isinstance(instance, list):
        _spend(len(instance) // 8)
        texts = {orjson.dumps(_canonical(item), option=orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME) for item in instance}
        if len(texts) < len(instance):
            yield ValidationError("has the same item twice")


def _canonical(value: Any) -> Any:
    """1.0 as 1: JSON Schema has one kind of number."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return {name: _canonical(item) for name, item in value.items()} if isinstance(value, dict) else value


_Checks: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {
        name: _counted(check)
        for name, check in {
            **Draft202012Validator.VALIDATORS,
            "pattern": _pattern,
            "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
            "uniqueItems": _unique_items,
        }.items()
    },
)


def _told(error: ValidationError) -> str:
    """One mistake, for whoever made it."""
    place = ".".join(map(str, error.absolute_path))
    return f"{place}: {error.message}"[:REASON_CHARACTERS_MAX] if place else error.message[:REASON_CHARACTERS_MAX]
