"""Cuts the bytes of a provider's stream into the data of its events, the same for every vendor. What is in them is not known here."""

from collections.abc import Iterator

from services.chassis.errors import ModelFailed

EVENT_BYTES_MAX = 1024 * 1024


class EventBytes:
    """Cuts a stream's bytes into the data of its events, whatever the chunks; see the HTML standard, server-sent events."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of every event that `chunk` completes. Raises ModelFailed if one grows without end."""
        text = self._rest + chunk if self._rest else chunk
        if b"\r" in text:
            keep = b"\r" if text.endswith(b"\r") else b""  # its \n may be in the next chunk
            text = text[: len(text) - len(keep)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + keep
        *blocks, self._rest = text.split(b"\n\n")
        if len(self._rest) > EVENT_BYTES_MAX:
            raise ModelFailed("the provider sent an event without end", provider=self._provider, cause="malformed")
        for block in blocks:
            data = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield data[0] if len(data) == 1 else b"\n".join(data)
