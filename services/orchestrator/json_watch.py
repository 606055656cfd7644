"""Can a text that is still being written become JSON of a certain shape? Pure; it says no at the first character that rules it out.

It looks at the grammar, at `type`, at the names of properties where no others are allowed, and at how many items an array may have. What
only the whole text can tell is left to `output_schema`.
"""

import re
from collections.abc import Mapping
from typing import Any

DEPTH_MAX = 64
_SPACE = " \t\n\r"
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?\Z")
_NUMBER_BEGUN = re.compile(r"-?(?:(?:0|[1-9]\d*)(?:\.\d*(?:(?<=\d)[eE][+-]?\d*)?|[eE][+-]?\d*)?)?\Z")
_NUMBER_CHARACTERS_MAX = 400
_WORDS = {"t": ("true", "boolean"), "f": ("false", "boolean"), "n": ("null", "null")}
_OPENING = {"{": "object", "[": "array", '"': "string"}
_NO_SCHEMA: Mapping[str, Any] = {}


class JsonWatch:
    """Reads a text in pieces. However it is cut, the same character is the one that is wrong."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._root = schema
        self._stack: list[_Level] = []
        self._expects = "value"
        """What the next character may begin: `value`, `value or ]`, `key or }`, `key`, `:`, `, or close`, or what goes on: `string`,
        `escape`, `number`, `word`, `end`."""
        self._schema = self._plain(schema)
        self._token = ""
        self._is_key = False

    def feed(self, piece: str) -> str | None:
        """None while the text can still satisfy the schema, else what is wrong: `json`, or the keyword of the schema."""
        place = 0
        while place < len(piece):
            if self._expects == "string":
                run = _IN_STRING.match(piece, place)
                end = run.end() if run else place
                if self._is_key:
                    self._token += piece[place:end]
                place = end
                if place == len(piece):
                    return None
            if wrong := self._take(piece[place]):
                return wrong
            place += 1
        return None

    def _take(self, letter: str) -> str | None:
        expects = self._expects
        if expects == "string":
            return self._in_string(letter)
        if expects == "escape":
            self._token, self._expects = self._token + letter, "string"
            return None if letter in '"\\/bfnrtu' else "json"
        if expects == "word":
            self._token += letter
            whole = next(word for word, _ in _WORDS.values() if word[0] == self._token[0])
            if self._token == whole:
                self._close_value()
            return None if whole.startswith(self._token) else "json"
        if expects == "number":
            if letter in "+-.eE0123456789":
                self._token += letter
                return None if len(self._token) <= _NUMBER_CHARACTERS_MAX and _NUMBER_BEGUN.match(self._token) else "json"
            if not _NUMBER.match(self._token):
                return "json"
            self._close_value()
            return self._take(letter)
        if letter in _SPACE:
            return None
        if expects in ("value", "value or ]"):
            if letter == "]" and expects == "value or ]":
                return self._leave()
            return self._begin_value(letter)
        if expects in ("key", "key or }"):
            if letter == "}" and expects == "key or }":
                return self._leave()
            self._token, self._is_key, self._expects = "", True, "string"
            return None if letter == '"' else "json"
        if expects == ":":
            self._expects = "value"
            return None if letter == ":" else "json"
        if expects == ", or close":
            level = self._stack[-1]
            if letter == ",":
                self._expects = "key" if level.closes == "}" else "value"
                return self._next_item(level) if level.closes == "]" else None
            return self._leave() if letter == level.closes else "json"
        return "json"  # something after the end

    def _in_string(self, letter: str) -> str | None:
        if letter == "\\":
            self._token, self._expects = self._token + letter if self._is_key else "", "escape"
            return None
        if letter != '"':
            return "json"  # a control character
        if not self._is_key:
            self._close_value()
            return None
        self._is_key, self._expects = False, ":"
        return self._enter_property(self._token)

    def _begin_value(self, letter: str) -> str | None:
        kind = _OPENING.get(letter) or (_WORDS[letter][1] if letter in _WORDS else "number" if letter in "-0123456789" else "")
        if not kind:
            return "json"
        if not self._allows(kind):
            return "type"
        if kind in ("object", "array"):
            if len(self._stack) == DEPTH_MAX:
                return "json"
            level = _Level("}" if kind == "object" else "]", self._schema)
            self._stack.append(level)
            self._expects = "key or }" if kind == "object" else "value or ]"
            return self._next_item(level) if kind == "array" else None
        self._token, self._is_key = letter, False
        self._expects = "string" if kind == "string" else "number" if kind == "number" else "word"
        return None

    def _allows(self, kind: str) -> bool:
        types = self._schema.get("type")
        if types is None:
            return True
        allowed = {types} if isinstance(types, str) else set(types)
        return kind in allowed or (kind == "number" and "integer" in allowed)

    def _enter_property(self, name: str) -> str | None:
        schema = self._stack[-1].schema
        known = schema.get("properties")
        known = known if isinstance(known, Mapping) else {}
        if "\\" in name:
            self._schema = _NO_SCHEMA  # an escaped name is left to the check of the whole
            return None
        if name in known:
            self._schema = self._plain(known[name])
            return None
        self._schema = _NO_SCHEMA
        closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        return "additionalProperties" if closed else None

    def _next_item(self, level: "_Level") -> str | None:
        """The schema of the next item. An array that is opened may still stay empty, so its first item is no item too many yet."""
        bound, items, prefix = level.schema.get("maxItems"), level.schema.get("items"), level.schema.get("prefixItems")
        if isinstance(prefix, list) and level.items < len(prefix):
            items = prefix[level.items]
        self._schema = self._plain(items)
        level.items += 1
        too_many = isinstance(bound, int | float) and level.items > max(1, bound)
        return "maxItems" if too_many else None

    def _leave(self) -> str | None:
        self._stack.pop()
        self._close_value()
        return None

    def _close_value(self) -> None:
        self._expects = ", or close" if self._stack else "end"

    def _plain(self, schema: Any) -> Mapping[str, Any]:
        """A schema as far as it can be judged by itself: behind a reference or a choice anything may be."""
        if not isinstance(schema, Mapping) or "$ref" in schema:
            return _NO_SCHEMA
        return schema


class _Level:
    """An object or array that is open."""

    __slots__ = ("closes", "items", "schema")

    def __init__(self, closes: str, schema: Mapping[str, Any]) -> None:
        self.closes, self.schema, self.items = closes, schema, 0
