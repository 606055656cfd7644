"""Text that has to be JSON of a certain shape: how a model is told, what is wrong with what it wrote, and how it is asked once more. Pure.

What a schema may be, and the bounds of checking, are in `json_schema`; what is checked here was written by a model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from jsonschema.exceptions import ValidationError

from services.chassis.errors import RequestInvalid
from services.orchestrator.compose import MESSAGE_OVERHEAD_TOKENS, tokens_max
from services.orchestrator.domain import Message, Prompt
from services.orchestrator.json_schema import DEPTH_MAX, SCHEMA_BYTES_MAX, SCHEMA_NODES_MAX, Schema, SchemaRefused, TooMuchWork

PROBLEMS_MAX = 8
PROBLEM_CHARACTERS_MAX = 300
BOUND = f"JSON Schema 2020-12 of at most {SCHEMA_BYTES_MAX} bytes, {DEPTH_MAX} levels and {SCHEMA_NODES_MAX} parts, closed in itself"
JSON = "json"
"""Stands for the place in the schema if the text is no JSON at all."""
_ASKED = (Path(__file__).parent / "prompts" / "schema.v1.md").read_text(encoding="utf-8").strip()
_AGAIN = (Path(__file__).parent / "prompts" / "repair.v1.md").read_text(encoding="utf-8").strip()


def require(schema: Mapping[str, Any], field: str) -> None:
    """Raises RequestInvalid that names `field` and the bound unless `schema` may be asked for."""
    try:
        Schema(schema, of_answer=True)
    except SchemaRefused as error:
        raise RequestInvalid(f"the schema cannot be used: {error}", field=field, bound=BOUND) from None


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


def begun_wrong(place: str) -> tuple[str, str]:
    """The problem of a text whose first words rule out the schema, at this place of it."""
    return place, "it is not JSON, or has words before the JSON" if place == JSON else f"its beginning breaks the schema at {place}"


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
    try:
        for error in Schema(schema, of_answer=True).problems(value):
            found.append((_pointer(error), f"at {error.json_path}: {error.message}"))
            if len(found) == PROBLEMS_MAX:
                break
    except TooMuchWork:
        found.append(("", "it is too large or too deep to be checked"))
    return found


def _pointer(error: ValidationError) -> str:
    """Where in the schema, which is the caller's own, a text fails; nothing of the text."""
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in error.absolute_schema_path)
    return "".join(f"/{part}" for part in parts)
