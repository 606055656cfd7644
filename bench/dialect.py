"""What a vendor's wire format is to the simulator: the parts that each of them writes in its own way. No sockets and no clock here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from bench.script import Piece, Record

Reason = Literal["end", "calls", "max_tokens", "refusal", "context_window"]

LAST_CHUNK = b"0\r\n\r\n"


class Counts(NamedTuple):
    """Tokens as they are billed. `prompt` holds the cached ones too, `output` the thoughts."""

    prompt: int
    cached: int
    written: int
    output: int
    thoughts: int


class Asked(NamedTuple):
    """What every vendor's request says in its own words."""

    model: str
    stream: bool
    max_tokens: int


class Refused(Exception):
    """A request the provider does not accept."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Dialect(Protocol):
    """One vendor's wire format. Everything that is returned for a stream is ready to be written, as chunks of HTTP/1.1 chunked coding."""

    name: str
    path: re.Pattern[bytes]
    """Of the requests that are answered in this format."""
    request_id_header: bytes
    half_an_event: bytes

    def authorised(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the key. Raises Refused."""
        ...

    def asked(self, request: dict[str, Any], path: bytes) -> Asked:
        """Read a request. Raises Refused if the vendor would."""
        ...

    def beginnings(self, request: dict[str, Any]) -> Sequence[tuple[dict[str, Any], bool]]:
        """The request up to the end of each block of its prompt, and whether that end is marked as one to keep. Shortest first."""
        ...

    def opening(self, record: Record, counts: Counts | None, request: dict[str, Any]) -> bytes:
        """What comes before the first token."""
        ...

    def piece(self, record: Record, piece: Piece) -> bytes:
        """One token, with what begins and ends its block."""
        ...

    def closing(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts | None, request: dict[str, Any]) -> bytes:
        """What comes after the last token, but for the last chunk. Without `counts` nothing is said of usage."""
        ...

    def error_event(self, record: Record, *, limited: bool) -> bytes:
        """An overload, or a rate limit, told in a stream that began well."""
        ...

    def whole(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts) -> bytes:
        """The body of a response that is not streamed."""
        ...

    def refusal(self, status: int, text: str, request: str) -> bytes:
        """The body of a response with an error status."""
        ...


def chunk(payload: bytes) -> bytes:
    """`payload` as one chunk of HTTP/1.1 chunked coding. Nothing stays nothing: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def said(pieces: Sequence[Piece], kind: str) -> str:
    """The text of one kind."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def calls_in(pieces: Sequence[Piece]) -> list[tuple[int, str, str]]:
    """Block, name and arguments of the calls, as far as they came."""
    found: dict[int, tuple[int, str, str]] = {}
    for piece in pieces:
        if piece.call is not None:
            before = found.get(piece.block, (0, "", ""))[2]
            found[piece.block] = (piece.block, piece.call.name, before + piece.text)
    return list(found.values())


def bearer(headers: Mapping[bytes, bytes]) -> str:
    """The key of an `authorization` header. Raises Refused."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not key:
        raise Refused(401, "You didn't provide an API key")
    return key.decode()


def bound_to(schema: Any, keywords: frozenset[str], where: str = "schema") -> None:
    """Refuse a schema that has other keywords, or an object that is open."""
    if not isinstance(schema, dict):
        raise Refused(400, f"{where}: not an object")
    for keyword, value in schema.items():
        if keyword not in keywords:
            raise Refused(400, f"{where}: {keyword} is not supported")
        if keyword in ("properties", "$defs"):
            for name, part in value.items():
                bound_to(part, keywords, f"{where}.{name}")
        elif keyword in ("anyOf", "allOf"):
            for part in value:
                bound_to(part, keywords, where)
        elif keyword == "items":
            bound_to(value, keywords, f"{where}[]")
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        raise Refused(400, f"{where}: additionalProperties must be false")


def required(request: dict[str, Any], **fields: type) -> None:
    """Refuse a request without one of these fields."""
    for field, kind in fields.items():
        if not isinstance(request.get(field), kind) or not request[field]:
            raise Refused(400, f"{field}: Field required")
