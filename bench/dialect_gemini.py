"""The Gemini API's `generateContent`, streamed and whole, as the simulator writes it."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.dialect import Asked, Counts, Reason, Refused, chunk, required, said
from bench.script import Piece, Record

STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}
UNBOUNDED = 65_536
"""The bound of a request without one."""
FINISH_REASONS: dict[Reason, str] = {
    "end": "STOP",
    "calls": "STOP",
    "max_tokens": "MAX_TOKENS",
    "refusal": "SAFETY",
    "context_window": "MAX_TOKENS",
}
_SIGNATURE = "c2lnbmVk"


class Gemini:
    """`POST /v1/models/MODEL:streamGenerateContent?alt=sse` and `:generateContent`."""

    name = "gemini"
    path = re.compile(rb"/v1(?:beta)?/models/(?P<model>[\w.-]+):(?P<method>generateContent|streamGenerateContent)\Z")
    request_id_header = b"x-goog-request-id"
    half_an_event = chunk(b'data: {"candidates": [{"content": {"parts": [{"te\r\n\r\n')

    def authorised(self, headers: Mapping[bytes, bytes]) -> str:
        if not (key := headers.get(b"x-goog-api-key")):
            raise Refused(403, "Method doesn't allow unregistered callers")
        return key.decode()

    def asked(self, request: dict[str, Any], path: bytes) -> Asked:
        required(request, contents=list)
        found = self.path.match(path)
        assert found is not None
        bound = (request.get("generationConfig") or {}).get("maxOutputTokens") or UNBOUNDED
        return Asked(found["model"].decode(), found["method"] == b"streamGenerateContent", bound)

    def beginnings(self, request: dict[str, Any]) -> Sequence[tuple[dict[str, Any], bool]]:
        return ()

    def opening(self, record: Record, counts: Counts | None, request: dict[str, Any]) -> bytes:
        return b""

    def piece(self, record: Record, piece: Piece) -> bytes:
        if piece.call is None:
            return _word(record.request_id, record.model, piece.text, piece.kind == "thought")
        if not piece.last or (call := _call_part(record, piece)) is None:
            return b""  # a call comes whole, and one that cannot be read does not come
        return _event({**_tail(record.request_id, record.model), "candidates": [_answer([call])]})

    def closing(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts | None, request: dict[str, Any]) -> bytes:
        why = "MALFORMED_FUNCTION_CALL" if _broken(record, pieces) else FINISH_REASONS[reason]
        data: dict[str, Any] = {**_tail(record.request_id, record.model), "candidates": [_answer([{"text": ""}], why)]}
        if counts is not None:
            data["usageMetadata"] = _usage(counts)
        made = _event(data)
        return made * 2 if record.fault == "doubled_usage" else made

    def error_event(self, record: Record, *, limited: bool) -> bytes:
        if limited:
            return _event({"error": {"code": 429, "message": "Resource has been exhausted.", "status": "RESOURCE_EXHAUSTED"}})
        return _event({"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}})

    def whole(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts) -> bytes:
        parts: list[dict[str, Any]] = [{"text": thought, "thought": True}] if (thought := said(pieces, "thought")) else []
        if text := said(pieces, "text"):
            parts.append({"text": text})
        parts += [part for piece in pieces if piece.last and piece.call and (part := _call_part(record, piece))]
        why = "MALFORMED_FUNCTION_CALL" if _broken(record, pieces) else FINISH_REASONS[reason]
        tail = _tail(record.request_id, record.model)
        return orjson.dumps({**tail, "candidates": [_answer(parts, why)], "usageMetadata": _usage(counts)})

    def refusal(self, status: int, text: str, request: str) -> bytes:
        return orjson.dumps({"error": {"code": status, "message": text, "status": STATUSES.get(status, "INTERNAL")}})


def _answer(parts: list[dict[str, Any]], reason: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    return {**made, "finishReason": reason} if reason else made


def _tail(request_id: str, model: str) -> dict[str, Any]:
    return {"modelVersion": model, "responseId": request_id.replace("req_", "")}


def _event(data: dict[str, Any]) -> bytes:
    return chunk(b"data: %b\r\n\r\n" % orjson.dumps(data))


@functools.lru_cache(4096)
def _template(request_id: str, model: str, thought: bool) -> tuple[bytes, bytes]:
    """A chunk around a word, which differs in nothing else."""
    mark = "\x00"
    part: dict[str, Any] = {"text": mark, "thought": True} if thought else {"text": mark}
    before, _, after = orjson.dumps({"candidates": [_answer([part])], **_tail(request_id, model)}).partition(orjson.dumps(mark))
    return b"data: " + before, after + b"\r\n\r\n"


def _word(request_id: str, model: str, text: str, thought: bool) -> bytes:
    before, after = _template(request_id, model, thought)
    return chunk(before + orjson.dumps(text) + after)


def _call_part(record: Record, piece: Piece) -> dict[str, Any] | None:
    """A whole call; None if its arguments are no object, which this format cannot say."""
    assert piece.call is not None
    try:
        arguments = orjson.loads(piece.call.arguments)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(arguments, dict):
        return None
    call = {"id": f"call_{record.number}_{piece.block}", "name": piece.call.name, "args": arguments}
    part: dict[str, Any] = {"functionCall": call}
    return {**part, "thoughtSignature": _SIGNATURE} if piece.block == record.call_block else part  # of parallel calls only the first


def _broken(record: Record, pieces: Sequence[Piece]) -> bool:
    return any(piece.last and piece.call is not None and _call_part(record, piece) is None for piece in pieces)


def _usage(counts: Counts) -> dict[str, int]:
    """Zeros are left out, as proto3 JSON has it, but for a prompt of none."""
    spoken = counts.output - counts.thoughts
    made = {"candidatesTokenCount": spoken, "thoughtsTokenCount": counts.thoughts, "cachedContentTokenCount": counts.cached}
    total = counts.prompt + counts.output
    return {"promptTokenCount": counts.prompt, **{name: count for name, count in made.items() if count}, "totalTokenCount": total}
