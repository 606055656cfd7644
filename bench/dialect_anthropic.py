"""Anthropic's Messages format, as the simulator writes it."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.dialect import Asked, Counts, Reason, Refused, bound_to, calls_in, chunk, required, said
from bench.script import Piece, Record

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
STOP_REASONS: dict[Reason, str] = {
    "end": "end_turn",
    "calls": "tool_use",
    "max_tokens": "max_tokens",
    "refusal": "refusal",
    "context_window": "model_context_window_exceeded",
}
SCHEMA_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "allOf", "enum", "const", "$ref", "$defs"),
        *("title", "description", "default", "format", "minItems"),
    }
)
"""What an answer can be bound to."""
_CALL_ID = "toolu_{}_{}"
_SIGNATURE = "c2lnbmVk"


class Anthropic:
    """`POST /v1/messages`."""

    name = "anthropic"
    path = re.compile(rb"/v1/messages\Z")
    request_id_header = b"request-id"
    half_an_event = chunk(b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_del\n\n')

    def authorised(self, headers: Mapping[bytes, bytes]) -> str:
        key = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not key:
            raise Refused(401, "x-api-key header is required")
        if b"anthropic-version" not in headers:
            raise Refused(400, "anthropic-version: header is required")
        return key.decode()

    def asked(self, request: dict[str, Any], path: bytes) -> Asked:
        required(request, model=str, messages=list, max_tokens=int)
        if bound := (request.get("output_config") or {}).get("format"):
            bound_to(bound["schema"], SCHEMA_KEYWORDS)
        return Asked(request["model"], bool(request.get("stream")), request["max_tokens"])

    def beginnings(self, request: dict[str, Any]) -> Sequence[tuple[dict[str, Any], bool]]:
        so_far: dict[str, Any] = {"tools": request.get("tools", []), "system": [], "messages": []}
        found = []
        for block in _blocks(request.get("system", [])):
            bare, marked = _bare(block)
            so_far = {**so_far, "system": [*so_far["system"], bare]}
            found.append((so_far, marked))
        for message in request["messages"]:
            content: list[dict[str, Any]] = []
            before = so_far["messages"]
            for block in _blocks(message["content"]):
                bare, marked = _bare(block)
                content = [*content, bare]
                so_far = {**so_far, "messages": [*before, {"role": message["role"], "content": content}]}
                found.append((so_far, marked))
        return found

    def opening(self, record: Record, counts: Counts | None, request: dict[str, Any]) -> bytes:
        spent = _usage(counts._replace(output=min(1, counts.output))) if counts else None
        start = _event("message_start", {"message": _message(record, [], None, spent)})
        return chunk(start) + chunk(_event("ping", {}))

    def piece(self, record: Record, piece: Piece) -> bytes:
        made = _delta(piece.kind, piece.text, piece.block)
        if piece.first:
            made = _start(record, piece) + made
        if piece.last:
            made += _stop(piece.kind, piece.block)
        return made

    def closing(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts | None, request: dict[str, Any]) -> bytes:
        data: dict[str, Any] = {"delta": {"stop_reason": STOP_REASONS[reason], "stop_sequence": None}}
        if counts is not None:
            data["usage"] = _usage(counts)
        ends = _event("message_delta", data)
        return chunk((ends * 2 if record.fault == "doubled_usage" else ends) + _event("message_stop", {}))

    def error_event(self, record: Record, *, limited: bool) -> bytes:
        error = ("rate_limit_error", "This request would exceed your rate limit") if limited else ("overloaded_error", "Overloaded")
        return chunk(_event("error", {"error": {"type": error[0], "message": error[1]}}))

    def whole(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts) -> bytes:
        content: list[dict[str, Any]] = []
        if thought := said(pieces, "thought"):
            content.append({"type": "thinking", "thinking": thought, "signature": _SIGNATURE})
        if text := said(pieces, "text"):
            content.append({"type": "text", "text": text})
        content += [
            {"type": "tool_use", "id": _CALL_ID.format(record.number, block), "name": name, "input": orjson.loads(arguments)}
            for block, name, arguments in calls_in(pieces)
        ]
        return orjson.dumps(_message(record, content, STOP_REASONS[reason], _usage(counts)))

    def refusal(self, status: int, text: str, request: str) -> bytes:
        kind = ERROR_TYPES.get(status, "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": text}, "request_id": request})


def _blocks(content: Any) -> list[dict[str, Any]]:
    """A text alone is a block of it."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _bare(block: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The block without its mark, and whether it had one."""
    return {name: value for name, value in block.items() if name != "cache_control"}, "cache_control" in block


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt - counts.cached - counts.written,
        "cache_creation_input_tokens": counts.written,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.output,
        "output_tokens_details": {"thinking_tokens": counts.thoughts},
        "service_tier": "standard",
    }


def _message(record: Record, content: list[dict[str, Any]], stop_reason: str | None, spent: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": record.request_id.replace("req_", "msg_"),
        "type": "message",
        "role": "assistant",
        "model": record.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": spent,
    }


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **data}))


def _start(record: Record, piece: Piece) -> bytes:
    if piece.call is not None:
        call_id = _CALL_ID.format(record.number, piece.block)
        block: dict[str, Any] = {"type": "tool_use", "id": call_id, "name": piece.call.name, "input": {}}
    elif piece.kind == "thought":
        block = {"type": "thinking", "thinking": "", "signature": ""}
    else:
        block = {"type": "text", "text": ""}
    return chunk(_event("content_block_start", {"index": piece.block, "content_block": block}))


@functools.lru_cache(4096)
def _delta(kind: str, text: str, block: int) -> bytes:
    types = {
        "text": {"type": "text_delta", "text": text},
        "thought": {"type": "thinking_delta", "thinking": text},
        "call": {"type": "input_json_delta", "partial_json": text},
    }
    return chunk(_event("content_block_delta", {"index": block, "delta": types[kind]}))


@functools.lru_cache(64)
def _stop(kind: str, block: int) -> bytes:
    stop = _event("content_block_stop", {"index": block})
    if kind == "thought":
        stop = _event("content_block_delta", {"index": block, "delta": {"type": "signature_delta", "signature": _SIGNATURE}}) + stop
    return chunk(stop)
