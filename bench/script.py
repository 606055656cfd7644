"""What the simulated provider says and how it misbehaves: pure values. No sockets, no clock and no vendor's format here."""

import functools
import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import orjson

Fault = Literal[
    "none",
    "cut_before_first",
    "cut_after",
    "reset_before_first",
    "reset_after",
    "cut_at_end",
    "end_after",
    "stall_after",
    "hang",
    "error_in_200",
    "limit_in_200",
    "malformed",
    "status",
    "late_usage_missing",
    "zero_usage",
    "doubled_usage",
    "slow_drip",
    "refusal",
    "max_tokens",
    "context_window",
]
"""How one response goes wrong.

`cut_before_first` closes the socket before the response's head; `cut_after` in the body, after `fault_at` tokens; the two resets do the
same without a goodbye, and `cut_at_end` closes it between the end of the answer and that of the response; `end_after` ends the body after
`fault_at` tokens politely, but without the answer's end; `stall_after` goes silent there and `hang` before the head; `error_in_200` sends
an overload there as an event, `limit_in_200` a rate limit, and `malformed` half an event; `status` answers with `status`;
`late_usage_missing` leaves the last usage out;
`zero_usage` reports 0 tokens everywhere and `doubled_usage` everything twice; `slow_drip` splits every event over two
writes; the last three end with that stop reason.
"""

STRIKING = frozenset({"cut_after", "reset_after", "end_after", "stall_after", "error_in_200", "limit_in_200", "malformed"})
"""Faults that strike after `fault_at` tokens."""
IMAGE_TOKENS = 85
"""What a picture is billed, whatever its size."""


class ScriptedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tool call of the answer."""

    name: str
    arguments: str = "{}"
    """As the model writes them, in pieces of `CALL_PIECE` characters: a token each."""


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one request is answered."""

    ttft_ms: float = 0.0
    """Request received to the first token."""
    tokens: int = 20
    """Tokens of the answer; one delta event each. `max_tokens` of the request cuts it."""
    tokens_per_s: float = 0.0
    """Pace after the first token. 0 = all at once."""
    text: str = ""
    """What to say. Empty = plain words, citing `[1]` when the prompt holds passages."""
    cites: bool | None = None
    """Whether plain words cite `[1]`. Unset = when the prompt holds passages."""
    reasoning: str = ""
    """What it is seen to think before it answers, a token a word."""
    calls: tuple[ScriptedCall, ...] = ()
    """Tools it calls after its text. With calls, an empty `text` says nothing."""
    cached_tokens: int = 0
    """How many of the prompt's tokens come from the cache."""
    cache_write_tokens: int = 0
    """How many of them are written to it."""
    keeps_above_tokens: int | None = None
    """Keep the beginnings that a request marks, if they have at least so many tokens, and bill their reads and writes besides. None = the
    two numbers above are all there is. Only Anthropic's marks are known."""
    ignores_limit: bool = False
    """Whether the answer goes on past the bound of the request."""
    echoes_mark: bool = False
    """Whether every eighth token is the prompt's own mark (see `mark_of`), so that a reader can tell whose answer it has."""
    fault: Fault = "none"
    fault_at: int = 0
    """Token after which the fault strikes."""
    status: int = 500
    """HTTP status of the fault `status`."""
    retry_after_s: float | None = None
    """Sent with the fault `status` as `retry-after`."""
    location: str = ""
    """Sent with the fault `status` as `location`."""
    end_after_ms: float = 0.0
    """How long after the end of the answer the end of the response comes."""
    under_way: int = 0
    """Tokens it writes still when it hears that the client's side is closed, as one that is far away has. -1 = it goes on all the same."""
    waits: bool = False
    """Whether nothing is said, not even the head, until all that wait are released: no answer ends before a test has seen enough."""
    fail_first: int = 0
    """The fault strikes only the first so many requests of this behaviour. 0 = every one."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which requests behave how. Rules are tried newest first; the default behaviour answers the rest."""

    contains: str
    """Text to look for in the request's JSON, as it is written there, in the key it came with, and in the model, wherever that stands."""
    behaviour: Behaviour


class Record(msgspec.Struct, kw_only=True):
    """What really happened to one request: the witness that money tests are checked against. Times are seconds since it was received."""

    number: int
    request_id: str
    model: str
    format: str
    """Whose format the request came in."""
    stream: bool
    max_tokens: int
    fault: str
    mark: str
    """Which question this was: see `mark_of`."""
    received_at: float
    """When it was received, on the machine's monotonic clock, which other processes share."""
    input_tokens: int
    """Billed for the prompt, however it was cached: see `count_input_tokens`. 0 if the request was refused."""
    cached_tokens: int = 0
    """How many of them were read from what was kept."""
    cache_write_tokens: int = 0
    """How many of them were written there."""
    images: int = 0
    """Pictures in it."""
    call_block: int = 0
    """Where the calls of its answer begin."""
    output_tokens: int = 0
    """Billed for the answer, thoughts and calls included: tokens that were generated before the response ended or its socket closed."""
    state: Literal["running", "finished", "refused", "faulted", "client_closed"] = "running"
    head_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    """When the response was over, by whatever door."""
    closed_s: float | None = None
    """When its socket closed. None while it is open, or if a later request used it too."""


_PROMPT = ("system", "instructions", "systemInstruction", "messages", "input", "contents")
"""Where a prompt's texts stand, in one vendor's request or another's."""
_TEXT = ("text", "content", "parts", "output", "functionResponse", "response", "result", "error")


def count_input_tokens(request: dict[str, Any]) -> int:
    """Count the prompt by the simulator's own rule.

    One token for every four bytes of UTF-8 text begun, three for each message, and 85 for each picture.
    """
    total = sum(3 for name in ("messages", "input", "contents") for _ in request.get(name, ()))
    return total + -(-sum(len(text.encode()) for text in _texts(request)) // 4) + IMAGE_TOKENS * count_images(request)


def count_images(value: Any) -> int:
    """Pictures in a request of any vendor's."""
    if isinstance(value, list):
        return sum(map(count_images, value))
    if not isinstance(value, dict):
        return 0
    is_one = value.get("type") in ("image", "image_url", "input_image") or "inlineData" in value
    return int(is_one) + sum(map(count_images, value.values()))


def _texts(request: dict[str, Any]) -> list[str]:
    found: list[str] = []

    def take(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                take(item)
        elif isinstance(value, dict):
            for key in _TEXT:
                take(value.get(key))

    for name in _PROMPT:
        take(request.get(name))
    if tools := request.get("tools"):
        found.append(orjson.dumps(tools).decode())
    return found


_PASSAGE = re.compile(rb"""(?:\\n|")\[1\]|\b(?:number|index|n|id)=\\?["']1\\?["']""")
"""A passage numbered 1 in the request's JSON: as an attribute, or `[1]` at the start of a line. Instructions may speak of `[1]` too."""
_OPENING = "All of this is in there [1]:"
"""What it cites claims nothing, whatever the passage: it does not fail the checks."""
_FILLING = "the water flows through the turbine and then a quiet channel carries it away from the wheel"
"""Said once in order and then in any: a text that goes round in circles fails the checks."""


_MARK = re.compile(rb"mark-[a-z0-9]+-[a-z0-9]+")
_MARK_EVERY = 8


def mark_of(body: bytes) -> str:
    """The last `mark-<whose>-<number>` in a request, which is the question's. Empty if there is none."""
    return (_MARK.findall(body) or [b""])[-1].decode()


CALL_PIECE = 7


class Piece(NamedTuple):
    """A token, and where it stands: the answer is a row of blocks, each of one kind."""

    kind: Literal["thought", "text", "call"]
    text: str
    block: int
    first: bool
    """Whether it begins its block."""
    last: bool
    call: ScriptedCall | None = None


def pieces_of(behaviour: Behaviour, body: bytes) -> tuple[Piece, ...]:
    """The answer, the same for the same behaviour and request."""
    if behaviour.echoes_mark and (mark := mark_of(body)):
        words = [f" {mark}" if n % _MARK_EVERY == 0 else word for n, word in enumerate(_plain(behaviour.tokens, cites=False))]
        return _block("text", tuple(words), 0)
    if behaviour.text or behaviour.reasoning or behaviour.calls:
        return _scripted(behaviour)
    cites = behaviour.cites if behaviour.cites is not None else _PASSAGE.search(body) is not None
    return _block("text", _plain(behaviour.tokens, cites), 0)


@functools.lru_cache(256)
def _block(kind: Literal["thought", "text"], words: tuple[str, ...], block: int) -> tuple[Piece, ...]:
    return tuple(Piece(kind, word, block, n == 0, n == len(words) - 1) for n, word in enumerate(words))


@functools.lru_cache(256)
def _scripted(behaviour: Behaviour) -> tuple[Piece, ...]:
    thoughts = tuple(re.findall(r"\s*\S+|\s+$", behaviour.reasoning))
    words = tuple(re.findall(r"\s*\S+|\s+$", behaviour.text))
    if not behaviour.text and not behaviour.calls:
        words = _plain(behaviour.tokens, cites=bool(behaviour.cites))
    pieces = [*_block("thought", thoughts, 0), *_block("text", words, int(bool(thoughts)))]
    for number, call in enumerate(behaviour.calls, int(bool(thoughts)) + int(bool(words))):
        cuts = [call.arguments[at : at + CALL_PIECE] for at in range(0, len(call.arguments), CALL_PIECE)] or [""]
        pieces += [Piece("call", cut, number, n == 0, n == len(cuts) - 1, call) for n, cut in enumerate(cuts)]
    return tuple(pieces)


def bounded(pieces: Sequence[Piece], behaviour: Behaviour, max_tokens: int) -> Sequence[Piece]:
    """As much of the answer as the request allows."""
    if len(pieces) <= max_tokens or behaviour.ignores_limit:
        return pieces
    return (*pieces[: max_tokens - 1], pieces[max_tokens - 1]._replace(last=True))


@functools.lru_cache(256)
def _plain(count: int, cites: bool) -> tuple[str, ...]:
    opening = [word for word in _OPENING.split() if cites or word != "[1]:"]
    filling, chance = _FILLING.split(), random.Random(count)
    more = max(0, count - len(opening) - len(filling))
    words = (opening + filling + chance.choices(filling, k=more))[:count]
    if cites and count < len(opening):
        words[-1:] = ["[1]"]
    return tuple(word if i == 0 else f" {word}" for i, word in enumerate(words))


def answer_text(behaviour: Behaviour, *, cites: bool) -> str:
    """The whole text of `behaviour`, for tests that compare."""
    return behaviour.text or "".join(_plain(behaviour.tokens, cites))


def request_id(number: int, seed: str) -> str:
    """An id of the provider's shape, the same for the same seed and number."""
    return "req_" + hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:24]
