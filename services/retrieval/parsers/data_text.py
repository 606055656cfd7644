"""JSON, JSON lines and XML as text to be read: one line a value with its name, one block a record. Values stay as written."""

import json
from collections.abc import Iterator
from typing import Any

from services.retrieval.domain import BlockKind, Extracted
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.rejection import rejected
from services.retrieval.parsers.xml_tree import Element, name_of, tree_of

JSON = "application/json"
JSON_LINES = "application/x-ndjson"
XML = "application/xml"

DEPTH_MAX = 200
RECORD_CHARACTERS = 1_500
"""A value that is longer written out becomes a section with blocks of its own."""
_INLINE_ITEMS_MAX = 20
_INLINE_CHARACTERS_MAX = 200

# A record is a list of (name, value); a value is a string, a record, or a list of values under one name.
Node = Any


def parse_json(text: str) -> Extracted:
    """Raises DocumentRejected: `malformed`, `truncated`."""
    value = _loaded(text)
    outline = Outline()
    _write(outline, "", value, 1)
    title = (
        next((item for name, item in value.items() if name in ("title", "name") and isinstance(item, str)), "")
        if isinstance(value, dict)
        else ""
    )
    return outline.extracted(JSON, title)


def parse_json_lines(text: str) -> Extracted:
    """Each line a record; raises DocumentRejected, cause `malformed`, for one that is none."""
    outline = Outline()
    for line in text.split("\n"):
        if line.strip():
            _write(outline, "", _loaded(line), 1)
    return outline.extracted(JSON_LINES)


def is_json(text: str) -> bool:
    try:
        return isinstance(_loaded(text), dict | list)
    except type(rejected("", cause="")):
        return False


def is_json_lines(text: str) -> bool:
    """Whether the first lines are a record each."""
    lines = [line for line in text[:200_000].split("\n")[:4] if line.strip()]
    return len(lines) >= 2 and all(line.lstrip()[0] in "{[" and is_json(line) for line in lines[:3])


def parse_xml(text: str) -> Extracted:
    """Elements that hold only text are values; mixed ones are prose. Raises DocumentRejected: `malformed`, `truncated`, `dtd`."""
    root = tree_of(text)
    outline = Outline()
    _write(outline, "", _of_element(root), 1)
    title = next((words_of(child.text or "") for child in root if name_of(child).lower() == "title"), "")
    return outline.extracted(XML, title)


def _loaded(text: str) -> Node:
    try:
        # Numbers stay as written: nothing is rounded, and a number of a million digits is not computed.
        return json.loads(text.removeprefix("\ufeff"), parse_float=str, parse_int=str, parse_constant=str)
    except RecursionError:
        raise rejected("the JSON is nested too deeply", cause="malformed") from None
    except json.JSONDecodeError as error:
        # Only an end that came too early is found at the very end.
        early = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        why = ("the JSON ends before it is complete", "truncated") if early else ("the JSON is broken", "malformed")
        raise rejected(why[0], cause=why[1]) from None


def _of_element(element: Element) -> Node:
    """An element as a value: its text, or a record of its attributes and children."""
    fields: dict[str, Node] = {}

    def add(name: str, value: Node) -> None:
        if name not in fields:
            fields[name] = value
        elif isinstance(fields[name], list):
            fields[name].append(value)
        else:
            fields[name] = [fields[name], value]

    children = [child for child in element if name_of(child)]
    own = words_of(element.text or "")
    if children and (own or any(words_of(child.tail or "") for child in children)):
        return words_of(" ".join(str(text) for text in element.itertext()))
    for key, value in element.attrib.items():
        add(str(key).rpartition("}")[2], str(value))
    for child in children:
        add(name_of(child), _of_element(child))
    if own and fields:
        add("text", own)
    return fields or own


def _write(outline: Outline, name: str, value: Node, level: int) -> None:
    """A value that fits is one block; one that does not is a section of its parts."""
    if isinstance(value, list):
        if not _fits(value) or all(isinstance(item, dict) for item in value):
            if name:
                outline.heading(level, name)
            for item in value:
                _write(outline, "", item, level + bool(name))
            outline.leave(level)
            return
    elif isinstance(value, dict) and not _fits(value):
        if name:
            outline.heading(level, name)
        gathered: list[str] = []
        later: list[tuple[str, Node]] = []
        for key, item in value.items():
            if isinstance(item, dict | list) and not (_fits(item) and _small(item)):
                later.append((key, item))
            else:
                gathered.extend(_lines(key, item, 0))
        _block(outline, gathered)
        for key, item in later:
            _write(outline, key, item, level + bool(name))
        outline.leave(level)
        return
    _block(outline, list(_lines(name, value, 0)))


def _block(outline: Outline, lines: list[str]) -> None:
    outline.block(BlockKind.LIST, "\n".join(lines))


def _small(value: Node) -> bool:
    return sum(len(line) for line in _lines("", value, 0)) <= _INLINE_CHARACTERS_MAX


def _fits(value: Node) -> bool:
    """Whether the value is short enough for one block. Stops counting as soon as it is not."""
    characters = 0
    for line in _lines("", value, 0):
        characters += len(line) + 1
        if characters > RECORD_CHARACTERS:
            return False
    return True


def _lines(name: str, value: Node, depth: int) -> Iterator[str]:
    """`name: value`, what is below indented; a short list of plain values on one line."""
    indent = "  " * depth
    if depth > DEPTH_MAX:
        raise rejected("the file is nested too deeply", cause="malformed", depth_max=DEPTH_MAX)
    if isinstance(value, dict):
        if name:
            yield f"{indent}{name}:"
        for key, item in value.items():
            yield from _lines(key, item, depth + bool(name))
    elif isinstance(value, list):
        plain = [_plain(item) for item in value if not isinstance(item, dict | list)]
        if len(plain) == len(value) and len(plain) <= _INLINE_ITEMS_MAX and sum(map(len, plain)) <= _INLINE_CHARACTERS_MAX:
            yield f"{indent}{name}{': ' if name else ''}{', '.join(plain)}"
            return
        if name:
            yield f"{indent}{name}:"
        for item in value:
            if isinstance(item, dict | list):
                # A dash of its own keeps the records of a list apart.
                yield f"{indent}  -"
                yield from _lines("", item, depth + 2)
            else:
                yield f"{indent}  - {_plain(item)}"
    else:
        yield f"{indent}{name}{': ' if name else ''}{_plain(value)}"


def _plain(value: Node) -> str:
    if value is None:
        return "null"
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
