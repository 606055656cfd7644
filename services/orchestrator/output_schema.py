"""Text that has to be JSON of a certain shape: how a model is told, what is wrong with what it wrote, and how it is asked once more. Pure.

The schema was let in by `schema_rules`; what is checked here was written by a model, so every check has a bound.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
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
from services.orchestrator.schema_rules import steps

CHECKS_MAX = 100_000
"""Keywords looked at for one text; about as many microseconds, times three."""
PATTERN_STEPS_MAX = 2_000_000
"""What all patterns together may take on one text, in steps of the matcher."""
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
    pattern_steps: int = PATTERN_STEPS_MAX

    def spend(self, checks: int) -> None:
        self.checks -= checks
        if self.checks < 0:
            raise TooMuch

    def match(self, pattern: str, text: str) -> None:
        self.pattern_steps -= len(text) ** max(1, _steps(pattern))
        if self.pattern_steps < 0:
            raise TooMuch


_left: ContextVar[_Left] = ContextVar("_left")
_steps = functools.lru_cache(maxsize=1024)(steps)


@functools.cache
def _checker() -> Any:
    """The validator of the library, with every keyword counted; it fetches nothing, and asserts no `format`."""
    counted = {keyword: _counted(check) for keyword, check in Draft202012Validator.VALIDATORS.items()}
    return validators.extend(Draft202012Validator, {**counted, "uniqueItems": _unique})  # type: ignore[no-untyped-call]


def _counted(check: Callable[..., Iterator[ValidationError] | None]) -> Callable[..., Iterator[ValidationError]]:
    def counting(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        left = _left.get()
        left.spend(1 + (len(value) // 8 if isinstance(value, list | dict) else 0))
        if check is Draft202012Validator.VALIDATORS["pattern"] and isinstance(instance, str):
            left.match(value, instance)
        if isinstance(instance, dict) and isinstance(patterns := schema.get("patternProperties"), dict):
            for pattern in patterns:
                for key in instance:
                    left.match(pattern, key)
        yield from check(validator, value, instance, schema) or ()

    return counting


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
