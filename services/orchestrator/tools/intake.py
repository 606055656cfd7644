"""What a request brings for tools and pictures, checked: every mistake names its field and its bound. Pure; no message is known."""

from collections.abc import Sequence

import orjson

from services.chassis.errors import RequestInvalid
from services.orchestrator.domain import Image, Suspended, ToolResult, ToolSpec
from services.orchestrator.json_schema import Schema, SchemaRefused, closed
from services.orchestrator.tools.toolbox import CALL_ID_CHARACTERS_MAX, DESCRIPTION_CHARACTERS_MAX, NAME, TOOLS_MAX

IMAGES_MAX = 8
IMAGE_BYTES_MAX = 5 * 1024 * 1024
IMAGES_BYTES_MAX = 10 * 1024 * 1024
SERVER_TOOLS_MAX = 32
SCHEMAS_BYTES_MAX = 262_144
"""Of all tools of a client: some hundredths of a second to look them through."""
RESULTS_MAX = 64
RESULT_BYTES_MAX = 65_536
RESULTS_BYTES_MAX = 1024 * 1024
_MAGIC = {
    "image/png": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": lambda data: data.startswith(b"\xff\xd8\xff"),
    "image/gif": lambda data: data.startswith((b"GIF87a", b"GIF89a")),
    "image/webp": lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP",
}


def require_images(images: Sequence[Image]) -> None:
    """Raise RequestInvalid for pictures that are too many, too large, or not what they are said to be."""
    if len(images) > IMAGES_MAX:
        raise RequestInvalid("too many pictures", field="images", bound=f"at most {IMAGES_MAX}")
    for number, image in enumerate(images):
        field = f"images[{number}]"
        looks_right = _MAGIC.get(image.media_type)
        if looks_right is None:
            raise RequestInvalid("a picture of this kind is not taken", field=f"{field}.media_type", bound=", ".join(_MAGIC))
        if not 0 < len(image.data) <= IMAGE_BYTES_MAX:
            raise RequestInvalid("a picture is empty or too large", field=f"{field}.data", bound=f"1-{IMAGE_BYTES_MAX} bytes")
        if not looks_right(image.data):
            raise RequestInvalid("the data is not a picture of this kind", field=f"{field}.data", bound=image.media_type)
    if sum(len(image.data) for image in images) > IMAGES_BYTES_MAX:
        raise RequestInvalid("the pictures are too large together", field="images", bound=f"at most {IMAGES_BYTES_MAX} bytes")


def require_tools(tools: Sequence[ToolSpec], server_tools: Sequence[str]) -> None:
    """Raise RequestInvalid for a tool of the client that no model could be offered, and for names that are not unique."""
    if len(tools) + len(server_tools) > TOOLS_MAX:
        raise RequestInvalid("too many tools", field="tools", bound=f"at most {TOOLS_MAX} together with server_tools")
    if len(server_tools) > SERVER_TOOLS_MAX:
        raise RequestInvalid("too many tools", field="server_tools", bound=f"at most {SERVER_TOOLS_MAX}")
    taken = set(server_tools)
    if len(taken) < len(server_tools):
        raise RequestInvalid("a tool is named twice", field="server_tools", bound="each name once")
    size = 0
    for number, tool in enumerate(tools):
        field = f"tools[{number}]"
        if not NAME.fullmatch(tool.name):
            raise RequestInvalid("not the name of a tool", field=f"{field}.name", bound="1-64 of [A-Za-z0-9_-]")
        if tool.name in taken:
            raise RequestInvalid("two tools have this name", field=f"{field}.name", bound="each name once, also among server_tools")
        taken.add(tool.name)
        if len(tool.description) > DESCRIPTION_CHARACTERS_MAX:
            raise RequestInvalid(
                "the description is too long", field=f"{field}.description", bound=f"at most {DESCRIPTION_CHARACTERS_MAX} characters"
            )
        size += len(orjson.dumps(tool.input_schema))
        if size > SCHEMAS_BYTES_MAX:
            raise RequestInvalid("the schemas are too large together", field="tools", bound=f"at most {SCHEMAS_BYTES_MAX} bytes")
        try:
            Schema(closed(tool.input_schema))
        except SchemaRefused as error:
            raise RequestInvalid(f"the schema is not taken: {error}", field=f"{field}.input_schema", bound=str(error)[:200]) from None


def results_for(suspended: Suspended, results: Sequence[ToolResult]) -> tuple[ToolResult, ...]:
    """All results of the calls that wait, ours and the client's `results`, in the calls' order.

    Raises RequestInvalid unless there is exactly one for each call that is the client's.
    """
    if len(results) > RESULTS_MAX:
        raise RequestInvalid("too many results", field="tool_results", bound=f"at most {RESULTS_MAX}")
    names = {call.call_id: call.name for call in suspended.calls}
    have = {result.call_id: result for result in suspended.results}
    wanted = names.keys() - have.keys()
    if sum(len(result.text.encode()) for result in results) > RESULTS_BYTES_MAX:
        raise RequestInvalid("the results are too large together", field="tool_results", bound=f"at most {RESULTS_BYTES_MAX} bytes")
    for number, result in enumerate(results):
        field = f"tool_results[{number}]"
        if not 1 <= len(result.call_id) <= CALL_ID_CHARACTERS_MAX or result.call_id not in wanted:
            raise RequestInvalid("no call of this id waits for a result", field=f"{field}.call_id", bound="each call once")
        if len(result.text.encode()) > RESULT_BYTES_MAX:
            raise RequestInvalid("the result is too large", field=f"{field}.text", bound=f"at most {RESULT_BYTES_MAX} bytes")
        wanted.discard(result.call_id)
        have[result.call_id] = ToolResult(result.call_id, names[result.call_id], result.text, result.failed)
    if wanted:
        raise RequestInvalid("a call has no result", field="tool_results", bound=f"one for each of {len(suspended.calls)} calls")
    return tuple(have[call.call_id] for call in suspended.calls)
