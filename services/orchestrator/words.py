"""The word lists of `words.toml` as sets. Nothing is decided with them here."""

import tomllib
from pathlib import Path

_TABLE = tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))

POINTERS = frozenset(_TABLE["pointers"].split())
CONVERSATION = frozenset(_TABLE["conversation"].split())
LITTLE = frozenset(_TABLE["little"].split())
STOP = frozenset(_TABLE["stop"].split())
NEGATIONS = frozenset(_TABLE["negations"].split())
OPPOSITES = tuple(tuple(pair.split(":")) for pair in _TABLE["opposites"].split())
NUMBERS: dict[str, str] = _TABLE["numbers"]
LANGUAGES = {code: frozenset(words.split()) for code, words in _TABLE["languages"].items()}
GRAMMAR = {role: frozenset(words.split()) for role, words in _TABLE["grammar"].items()}
