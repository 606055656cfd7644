"""Server-sent events as bytes: pure, and strict about what clients in the field cannot read. Nothing here knows a stream or a socket.

A block without data is refused, because client libraries fail on it; only comments go without. Text never enters a field raw:
it comes as JSON, in which CR, LF and NUL are escaped.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import orjson

HEARTBEAT = b": heartbeat\n\n"
RETRY_MS = 1000
"""What a browser waits before it comes back. Sent within the first block, never as one of its own."""

RETRY = b"retry: %d\n" % RETRY_MS

_LINE_BREAKS = (b"\r", b"\n", b"\0")


def block(data: bytes, *, event: bytes = b"", event_id: int | None = None, tells_retry: bool = False) -> bytes:
    """One event. Raises ValueError for empty data, or a line break or NUL in any field."""
    if not data:
        raise ValueError("an event needs data")
    for field in (data, event):
        if any(mark in field for mark in _LINE_BREAKS):
            raise ValueError("a line break or NUL inside a field")
    lines = [RETRY] if tells_retry else []
    if event_id is not None:
        if event_id < 0:
            raise ValueError("an id is not negative")
        lines.append(b"id: %d\n" % event_id)
    if event:
        lines.append(b"event: %s\n" % event)
    lines.append(b"data: %s\n\n" % data)
    return b"".join(lines)


def delta(sequence: int, text: str) -> bytes:
    """A piece of text: what `block` would make of it, without its checks, because JSON has no raw line break."""
    return b'id: %d\nevent: delta\ndata: {"text":%s}\n\n' % (sequence, orjson.dumps(text))
