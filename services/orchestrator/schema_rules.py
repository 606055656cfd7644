"""Which JSON Schemas may be asked of an answer: small ones, closed in themselves, whose checking takes a bounded time. Pure.

A schema comes from a caller and a text from a model, so neither is trusted.
"""

import re
from collections.abc import Iterator, Mapping
from re import _constants, _parser  # type: ignore[attr-defined]  # the only way to see what a pattern does
from typing import Any

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from services.chassis.errors import RequestInvalid

BYTES_MAX, DEPTH_MAX, NODES_MAX = 32_768, 24, 2_000
PATTERN_CHARACTERS_MAX = 512
WIDE_REPEAT = 32
"""A repeat that may go on longer than this counts as one without end."""
WAYS_MAX = 1_000
"""In how many ways a part of bounded length may match, all its repeats together."""
WIDE_REPEATS_MAX = 2
"""Each such repeat multiplies the time a pattern takes by the length of the string; so does looking for its beginning."""
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


def steps(pattern: str) -> int:
    """In which power of a string's length the time grows that `pattern` may take on it. Raises ValueError for one without such a bound."""
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        raise ValueError("too long")
    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("not a pattern") from error
    if _ways(parsed) > WAYS_MAX:
        raise ValueError("too many ways to match")
    anchored = bool(parsed) and parsed[0][0] is _constants.AT
    return min(WIDE_REPEATS_MAX + 2, _wide_repeats(parsed) + (not anchored))


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
            powers = steps(pattern)
        except ValueError as error:
            raise RequestInvalid(f"a pattern of the schema is not allowed: {error}", field=field, bound="patterns that end soon") from error
        if powers > WIDE_REPEATS_MAX + 1:
            raise RequestInvalid(
                "a pattern of the schema may take long", field=field, bound=f"{WIDE_REPEATS_MAX} open repeats, or one more with ^"
            )


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


_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_PLAIN = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.IN, _constants.ANY, _constants.AT, _constants.RANGE)


def _wide_repeats(parsed: Any, times: int = 1, *, inside: bool = False) -> int:
    """How many repeats without end follow each other, in a part that is there so many `times`.

    Raises ValueError for one within another, and for what chooses within one, or refers back.
    """
    count = 0
    for operator, argument in parsed:
        if operator in _REPEATS:
            least, most, repeated = argument
            is_wide = most > WIDE_REPEAT and most != least
            if inside and most != least:
                raise ValueError("a repeat within a repeat")
            inner_times = min(times * max(1, int(most)), NODES_MAX) if most == least else times
            count += times * is_wide + _wide_repeats(repeated, inner_times, inside=inside or is_wide)
        elif operator is _constants.SUBPATTERN:
            count += _wide_repeats(argument[3], times, inside=inside)
        elif operator is _constants.BRANCH:
            if inside:
                raise ValueError("a choice within a repeat")
            count += max(_wide_repeats(choice, times, inside=inside) for choice in argument[1])
        elif operator not in _PLAIN:
            raise ValueError("a look around or back")
    return count


def _ways(parsed: Any) -> int:
    """In how many ways the parts of bounded length may match, at most WAYS_MAX + 1."""
    ways = 1
    for operator, argument in parsed:
        if operator in _REPEATS:
            least, most, repeated = argument
            is_wide = most > WIDE_REPEAT and most != least
            ways *= 1 if is_wide else (most - least + 1) * _ways(repeated) ** min(int(most), WAYS_MAX)
        elif operator is _constants.SUBPATTERN:
            ways *= _ways(argument[3])
        elif operator is _constants.BRANCH:
            ways *= sum(_ways(choice) for choice in argument[1])
        ways = min(ways, WAYS_MAX + 1)
    return ways
