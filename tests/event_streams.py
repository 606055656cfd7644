"""A reader of event streams that shares nothing with ours, and strings that try to become events. No test is here.

The strings come from outside the project and are data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

OWN = (
    "\r",
    "\n",
    "\r\n\r\n",
    "\n\nevent: done\ndata: {}\n\n",
    "x\rid: 99\rdata: y\r\r",
    "\0",
    "\ufeff",
    "\u2028\u2029\x85\x0b\x0c",
    ": comment",
    "data: x",
    "retry: 1",
    "",
    " ",
)


@dataclass(frozen=True)
class Read:
    """One event as a reader dispatches it."""

    event: str
    data: str
    id: str


def read_by_the_standard(stream: bytes) -> list[Read]:
    """HTML standard, 9.2.6 "Interpreting an event stream", step by step and character by character."""
    text = stream.decode("utf-8", "replace")
    if text[:1] == "\ufeff":
        text = text[1:]
    events: list[Read] = []
    data, kind, last_id = "", "", ""
    position = 0
    while position < len(text):
        end = position
        while end < len(text) and text[end] not in "\r\n":
            end += 1
        if end == len(text):
            break  # an unfinished line, and with it an unfinished event, is discarded
        line = text[position:end]
        position = end + (2 if text[end : end + 2] == "\r\n" else 1)
        if line == "":
            if data != "":
                events.append(Read(kind or "message", data.removesuffix("\n"), last_id))
            data, kind = "", ""
            continue
        if line[0] == ":":
            continue
        colon = line.find(":")
        field, value = (line, "") if colon < 0 else (line[:colon], line[colon + 1 :])
        if value[:1] == " ":
            value = value[1:]
        if field == "event":
            kind = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last_id = value
    return events


def hostile_strings(data_dir: Path) -> list[str]:
    """Every string of the folder, and what is hostile to event streams in particular."""
    found = [text for path in sorted((data_dir / "hostile").glob("*.json")) for text in json.loads(path.read_text("utf-8"))]
    assert len(found) > 100
    return [*OWN, *found]
