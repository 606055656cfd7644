"""What the simulated provider says and how it misbehaves: pure values and bytes. No sockets and no clock here."""

import functools
import hashlib
import random
import re
from typing import Any, Literal

import msgspec
import orjson

Fault = Literal[
    "none",
    "cut_before_first",
    "cut_after",
    "end_after",
    "stall_after",
    "hang",
    "error_in_200",
    "malformed",
    "status",
    "late_usage_missing",
    "zero_usage",
    "slow_drip",
    "refusal",
    "max_tokens",
    "context_window",
]
"""How one response goes wrong.

`cut_before_first` closes the socket before the response's head; `cut_after` in the body, after `fault_at` tokens; `end_after` ends the
body there politely, but without `message_stop`; `stall_after` goes silent there and `hang` before the head; `error_in_200` sends an error
event there and `malformed` half an event; `status` answers with `status`; `late_usage_missing` leaves the usage out of `message_delta`;
`zero_usage` reports 0 tokens everywhere; `slow_drip` splits every event over two writes; the last three end with that stop reason.
"""

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


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
    echoes_mark: bool = False
    """Whether every eighth token is the prompt's own mark (see `mark_of`), so that a reader can tell whose answer it has."""
    fault: Fault = "none"
    fault_at: int = 0
    """Token after which the fault strikes."""
    status: int = 500
    """HTTP status of the fault `status`."""
    retry_after_s: float | None = None
    """Sent with the fault `status` as `retry-after`."""
    fail_first: int = 0
    """The fault strikes only the first so many requests of this behaviour. 0 = every one."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which requests behave how. Rules are tried newest first; the default behaviour answers the rest."""

    contains: str
    """Text to look for in the request's JSON, as it is written there."""
    behaviour: Behaviour


class Record(msgspec.Struct, kw_only=True):
    """What really happened to one request: the witness that money tests are checked against. Times are seconds since it was received."""

    number: int
    request_id: str
    model: str
    stream: bool
    max_tokens: int
    fault: str
    mark: str
    """Which question this was: see `mark_of`."""
    received_at: float
    """When it was received, on the machine's monotonic clock, which other processes share."""
    input_tokens: int
    """Billed for the prompt: see `count_input_tokens`. 0 if the request was refused."""
    output_tokens: int = 0
    """Billed for the answer: tokens that were generated before the response ended or its socket closed."""
    state: Literal["running", "finished", "refused", "faulted", "client_closed"] = "running"
    head_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    """When the response was over, by whatever door."""
    closed_s: float | None = None
    """When its socket closed. None while it is open, or if a later request used it too."""


def count_input_tokens(request: dict[str, Any]) -> int:
    """Count the prompt by the simulator's own rule: one token for every four bytes of UTF-8 text begun, and three for each message."""
    total = sum(3 for _ in request.get("messages", ()))
    return total + -(-sum(len(text.encode()) for text in _texts(request)) // 4)


def _texts(request: dict[str, Any]) -> list[str]:
    found: list[str] = []

    def take(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                take(item)
        elif isinstance(value, dict):
            for key in ("text", "content"):
                take(value.get(key))

    take(request.get("system"))
    for message in request.get("messages", ()):
        take(message.get("content") if isinstance(message, dict) else None)
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


def tokens_of(behaviour: Behaviour, body: bytes) -> list[str]:
    """The answer as pieces, the same for the same behaviour and request."""
    if behaviour.echoes_mark and (mark := mark_of(body)):
        return [f" {mark}" if n % _MARK_EVERY == 0 else word for n, word in enumerate(_plain(behaviour.tokens, cites=False))]
    if behaviour.text:
        return re.findall(r"\s*\S+|\s+$", behaviour.text)
    cites = behaviour.cites if behaviour.cites is not None else _PASSAGE.search(body) is not None
    return list(_plain(behaviour.tokens, cites))


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


def usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
        "service_tier": "standard",
    }


def message(record: Record, text: str, stop_reason: str | None, spent: dict[str, Any]) -> dict[str, Any]:
    """The body of a response that is not streamed, or the start of one that is."""
    return {
        "id": record.request_id.replace("req_", "msg_"),
        "type": "message",
        "role": "assistant",
        "model": record.model,
        "content": [{"type": "text", "text": text}] if stop_reason else [],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": spent,
    }


def error_body(kind: str, text: str, request: str) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": text}, "request_id": request})


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **data}))


def chunk(payload: bytes) -> bytes:
    """`payload` as one chunk of HTTP/1.1 chunked coding."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


@functools.lru_cache(4096)
def delta(text: str) -> bytes:
    """One token as a ready chunk."""
    return chunk(event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}}))


BLOCK_START = chunk(event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}) + event("ping", {}))
BLOCK_STOP = event("content_block_stop", {"index": 0})
MESSAGE_STOP = event("message_stop", {})
HALF_AN_EVENT = chunk(b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_del\n\n')
LAST_CHUNK = b"0\r\n\r\n"
