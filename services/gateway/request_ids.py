"""The id of a request: the caller's own if it is fit for logs and headers, else a new one. The same over every front."""

import re
import secrets

_FIT = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


def request_id_of(asked: str) -> str:
    """The id of a request whose caller asked for `asked`, which may be empty."""
    return asked if _FIT.fullmatch(asked) else secrets.token_hex(16)


def id_headers(request_id: str, trace_id: str) -> list[tuple[bytes, bytes]]:
    """What a response says of them; clients in the field read the request's id under either name."""
    return [(b"x-request-id", request_id.encode()), (b"request-id", request_id.encode()), (b"x-trace-id", trace_id.encode())]
