"""Text that has to be JSON of a certain shape: how a model is told, what is wrong with what it wrote, and how it is asked once more. Pure.

The schema was let in by `schema_rules`; what is checked here was written by a model, so every check has a bound.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError
from referencing import Registry

from services.orchestrator.compose import MESSAGE_OVERHEAD_TOKENS, tokens_max
from services.orchestrator.domain import Message, Prompt
from services.orchestrator.schema_rules import matcher

CHECKS_MAX = 100_000
"""Keywords looked at for one text; about as many microseconds, times three."""
PROBLEMS_MAX = 8
PROBLEM_CHARACTERS_MAX = 300
JSON = "json"
"""Stands for the place in the schema if the text is no JSON at all."""
_ASKED = (Path(__file__).parent / "prompts" / "schema.v1.md").read_text(encoding="utf-8").strip()
_AGAIN = (Path(__file__).parent / "prompts" / "repair.v1.md").read_text(encoding="utf-8").strip()


class TooMuch(Exception):
    """The text would take too long to check."""


def tokens_max_of(schema: Mapping[str, Any] | None) -> int:
    """Bound on the tokens that `told` adds to a prompt."""
    return 0 if schema is None else tokens_max(_words(schema))


def _words(schema: Mapping[str, Any]) -> str:
    return f"\n\n{_ASKED}\n<schema>\n{orjson.dumps(schema).decode()}\n</schema>"


def told(prompt: Prompt, schema: Mapping[str, Any]) -> Prompt:
    """`prompt` with the schema: as such for providers that can be bound to one, and in words, at its very end, for the others."""
    *before, last = prompt.messages
    words = _words(schema)
    messages = (*before, replace(last, text=last.text + words))
    return replace(prompt, messages=messages, output_schema=schema, input_tokens_max=prompt.input_tokens_max + tokens_max(words))


def asked_again(prompt: Prompt, text: str, problems: list[tuple[str, str]]) -> Prompt:
    """`prompt` after the model has answered `text`, with what is wrong with that."""
    named = "\n".join(f"- {problem[:PROBLEM_CHARACTERS_MAX]}" for _, problem in problems)
    more = (Message("assistant", text), Message("user", f"{_AGAIN}\n{named}"))
    size = sum(tokens_max(message.text) + MESSAGE_OVERHEAD_TOKENS for message in more)
    return replace(prompt, messages=(*prompt.messages, *more), input_tokens_max=prompt.input_tokens_max + size)


def unfenced(text: str) -> str:
    """The JSON in a Markdown block of code, if that is all the text is, else the text."""
    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```") and "\n" in bare:
        return bare.split("\n", 1)[1].removesuffix("```").strip()
    return text


def problems_of(text: str, schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with `text`, at most PROBLEMS_MAX: the place in the schema, and words that quote the text. Empty = it satisfies it."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as broken:
        return [(JSON, f"it is not JSON: {broken}")]
    found = []
    _left.set(_Left())
    try:
        for error in _checker()(schema, registry=Registry()).iter_errors(value):
            found.append((_pointer(error), f"at {error.json_path}: {error.message}"))
            if len(found) == PROBLEMS_MAX:
                break
    except (TooMuch, RecursionError, ArithmeticError):
        found.append(("", "it is too large or too deep to be checked"))
    return found


@dataclass(slots=True)
class _Left:
    """What may still be spent on the text that is being checked."""

    checks: int = CHECKS_MAX

    def spend(self, checks: int) -> None:
        self.checks -= checks
        if self.checks < 0:
            raise TooMuch


_left: ContextVar[_Left] = ContextVar("_left")


@functools.cache
def _checker() -> Any:
    """The validator of the library, with every keyword counted and patterns matched in linear time; it fetches nothing."""
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique,
    }
    counted = {keyword: _counted(check) for keyword, check in {**Draft202012Validator.VALIDATORS, **own}.items()}
    return validators.extend(Draft202012Validator, counted)  # type: ignore[no-untyped-call]


def _counted(check: Callable[..., Iterable[ValidationError] | None]) -> Callable[..., Iterator[ValidationError]]:
    def counting(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        _left.get().spend(1 + (len(value) // 8 if isinstance(value, list | dict) else 0))
        yield from check(validator, value, instance, schema) or ()

    return counting


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not matcher(pattern)(instance):
        yield ValidationError(f"it does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        _left.get().spend(len(instance))
        for name, value in instance.items():
            if matcher(pattern)(name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, instance: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    listed, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    _left.get().spend(len(instance) * (1 + len(patterns)))
    for name, value in instance.items():
        if name in listed or any(matcher(pattern)(name) for pattern in patterns):
            continue
        if inner is False:
            yield ValidationError(f"there is no property {name!r}")
        else:
            yield from validator.descend(value, inner, path=name)


def _unique(_validator: Any, wanted: bool, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    """In time proportional to the array, unlike the library's."""
    if wanted and isinstance(instance, list):
        _left.get().spend(1 + len(instance) // 8)
        if len({orjson.dumps(item, option=orjson.OPT_SORT_KEYS) for item in instance}) < len(instance):
            yield ValidationError("it has the same item twice")


def _pointer(error: ValidationError) -> str:
    """Where in the schema, which is the caller's own, a text fails; nothing of the text."""
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in error.absolute_schema_path)
    return "".join(f"/{part}" for part in parts)
