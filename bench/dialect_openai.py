"""OpenAI's two formats, Chat Completions and Responses, as the simulator writes them."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.dialect import Asked, Counts, Reason, bearer, bound_to, calls_in, chunk, required, said
from bench.script import Piece, Record

CODES = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("requests", "rate_limit_exceeded"),
}
"""Type and code by status; any other is a `server_error`."""
STRICT_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "anyOf", "enum", "const", "$ref", "$defs"),
        *("title", "description", "format", "pattern", "minItems", "maxItems"),
        *("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
)
"""What an answer can be bound to strictly."""
UNBOUNDED = 1_000_000
"""The bound of a request without one."""
FINISH_REASONS: dict[Reason, str] = {
    "end": "stop",
    "calls": "tool_calls",
    "max_tokens": "length",
    "refusal": "content_filter",
    "context_window": "length",
}


def _refusal(status: int, text: str) -> bytes:
    kind, code = CODES.get(status, ("server_error", None))
    return orjson.dumps({"error": {"message": text, "type": kind, "param": None, "code": code}})


def _bound(form: dict[str, Any] | None) -> None:
    if form and form.get("strict"):
        bound_to(form["schema"], STRICT_KEYWORDS)


def _call_id(record: Record, block: int) -> str:
    return f"call_{record.number}_{block}"


class ChatCompletions:
    """`POST /v1/chat/completions`."""

    name = "openai_chat"
    path = re.compile(rb"/v1/chat/completions\Z")
    request_id_header = b"x-request-id"
    half_an_event = chunk(b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"del\n\n')

    def authorised(self, headers: Mapping[bytes, bytes]) -> str:
        return bearer(headers)

    def asked(self, request: dict[str, Any], path: bytes) -> Asked:
        required(request, model=str, messages=list)
        _bound((request.get("response_format") or {}).get("json_schema"))
        bound = request.get("max_completion_tokens") or request.get("max_tokens") or UNBOUNDED
        return Asked(request["model"], bool(request.get("stream")), bound)

    def beginnings(self, request: dict[str, Any]) -> Sequence[tuple[dict[str, Any], bool]]:
        return ()

    def opening(self, record: Record, counts: Counts | None, request: dict[str, Any]) -> bytes:
        return _completion(record, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, record: Record, piece: Piece) -> bytes:
        if piece.call is None:
            field = "content" if piece.kind == "text" else "reasoning_content"
            return _word(record.request_id, record.model, field, piece.text)
        index = piece.block - record.call_block
        call: dict[str, Any] = {"index": index, "function": {"arguments": piece.text}}
        if piece.first:
            call = {"index": index, "id": _call_id(record, piece.block), "type": "function"}
            call["function"] = {"name": piece.call.name, "arguments": piece.text}
        return _completion(record, {"tool_calls": [call]})

    def closing(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts | None, request: dict[str, Any]) -> bytes:
        made = _completion(record, {}, FINISH_REASONS[reason])
        if counts is not None and (request.get("stream_options") or {}).get("include_usage"):
            spent = _event({**_head(record), "choices": [], "usage": _chat_usage(counts)})
            made += spent * 2 if record.fault == "doubled_usage" else spent
        return made + chunk(b"data: [DONE]\n\n")

    def error_event(self, record: Record, *, limited: bool) -> bytes:
        kind, code = CODES[429] if limited else ("server_error", "server_is_overloaded")
        return _event({"error": {"message": "Not now", "type": kind, "param": None, "code": code}})

    def whole(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": said(pieces, "text") or None, "refusal": None}
        if thought := said(pieces, "thought"):
            message["reasoning_content"] = thought
        if calls := calls_in(pieces):
            message["tool_calls"] = [
                {"id": _call_id(record, block), "type": "function", "function": {"name": name, "arguments": arguments}}
                for block, name, arguments in calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": FINISH_REASONS[reason], "logprobs": None}
        return orjson.dumps({**_head(record), "object": "chat.completion", "choices": [choice], "usage": _chat_usage(counts)})

    def refusal(self, status: int, text: str, request: str) -> bytes:
        return _refusal(status, text)


def _head(record: Record) -> dict[str, Any]:
    return {
        "id": record.request_id.replace("req_", "chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": record.model,
        "service_tier": "default",
        "system_fingerprint": None,
    }


def _completion(record: Record, delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _event({**_head(record), "choices": [choice], "usage": None})


@functools.lru_cache(4096)
def _word_template(request_id: str, model: str, field: str) -> tuple[bytes, bytes]:
    """A chunk around a word, which differs in nothing else."""
    mark = "\x00"
    head = {
        "id": request_id.replace("req_", "chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [{"index": 0, "delta": {field: mark}, "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
    before, _, after = orjson.dumps(head).partition(orjson.dumps(mark))
    return b"data: " + before, after + b"\n\n"


def _word(request_id: str, model: str, field: str, text: str) -> bytes:
    before, after = _word_template(request_id, model, field)
    return chunk(before + orjson.dumps(text) + after)


def _event(data: dict[str, Any]) -> bytes:
    return chunk(b"data: %b\n\n" % orjson.dumps(data))


def _chat_usage(counts: Counts) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.output,
        "total_tokens": counts.prompt + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": counts.written, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": counts.thoughts, "audio_tokens": 0},
    }


class Responses:
    """`POST /v1/responses`."""

    name = "openai_responses"
    path = re.compile(rb"/v1/responses\Z")
    request_id_header = b"x-request-id"
    half_an_event = chunk(b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","del\n\n')

    def authorised(self, headers: Mapping[bytes, bytes]) -> str:
        return bearer(headers)

    def asked(self, request: dict[str, Any], path: bytes) -> Asked:
        required(request, model=str, input=list)
        _bound((request.get("text") or {}).get("format"))
        return Asked(request["model"], bool(request.get("stream")), request.get("max_output_tokens") or UNBOUNDED)

    def beginnings(self, request: dict[str, Any]) -> Sequence[tuple[dict[str, Any], bool]]:
        return ()

    def opening(self, record: Record, counts: Counts | None, request: dict[str, Any]) -> bytes:
        early = counts if record.fault == "doubled_usage" else None
        response = self._response(record, "in_progress", [], early)
        return _named("response.created", 0, {"response": response}) + _named("response.in_progress", 1, {"response": response})

    def piece(self, record: Record, piece: Piece) -> bytes:
        made = _part_delta(piece.kind, piece.text, piece.block, record.number)
        if piece.first:
            made = self._begin(record, piece) + made
        if piece.last:
            made += self._end(record, piece)
        return made

    def _begin(self, record: Record, piece: Piece) -> bytes:
        place = {"output_index": piece.block}
        if piece.call is not None:
            item = self._call(record, piece.block, piece.call.name, "", "in_progress")
            return _named("response.output_item.added", 2, {**place, "item": item})
        if piece.kind == "thought":
            item = {"id": f"rs_{record.number}", "type": "reasoning", "summary": []}
            return _named("response.output_item.added", 2, {**place, "item": item})
        item = {"id": f"msg_{record.number}", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = _named("response.output_item.added", 2, {**place, "item": item})
        return added + _named(
            "response.content_part.added", 3, {**place, "item_id": f"msg_{record.number}", "content_index": 0, "part": part}
        )

    def _end(self, record: Record, piece: Piece) -> bytes:
        place = {"output_index": piece.block}
        if piece.call is not None:
            item = self._call(record, piece.block, piece.call.name, piece.call.arguments, "completed")
        elif piece.kind == "thought":
            item = _reasoning(record)
        else:
            item = {"id": f"msg_{record.number}", "type": "message", "status": "completed", "role": "assistant", "content": []}
        return _named("response.output_item.done", 5, {**place, "item": item})

    def closing(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts | None, request: dict[str, Any]) -> bytes:
        status = "completed" if reason in ("end", "calls") else "incomplete"
        response = self._response(record, status, [], counts, reason)
        return _named(f"response.{status}", 9, {"response": response})

    def error_event(self, record: Record, *, limited: bool) -> bytes:
        if not limited:
            return _named("error", 7, {"code": "server_is_overloaded", "message": "Overloaded", "param": None})
        response = self._response(record, "failed", [], None)
        response["error"] = {"code": "rate_limit_exceeded", "message": "Rate limit reached"}  # a limit ends the response, not the stream
        return _named("response.failed", 7, {"response": response})

    def whole(self, record: Record, reason: Reason, pieces: Sequence[Piece], counts: Counts) -> bytes:
        output: list[dict[str, Any]] = [_reasoning(record)] if said(pieces, "thought") else []
        if text := said(pieces, "text"):
            content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            output.append({"id": f"msg_{record.number}", "type": "message", "status": "completed", "role": "assistant", "content": content})
        output += [self._call(record, block, name, arguments, "completed") for block, name, arguments in calls_in(pieces)]
        status = "completed" if reason in ("end", "calls") else "incomplete"
        return orjson.dumps(self._response(record, status, output, counts, reason))

    def refusal(self, status: int, text: str, request: str) -> bytes:
        return _refusal(status, text)

    def _call(self, record: Record, block: int, name: str, arguments: str, status: str) -> dict[str, Any]:
        return {
            "id": f"fc_{record.number}_{block}",
            "type": "function_call",
            "status": status,
            "call_id": _call_id(record, block),
            "name": name,
            "arguments": arguments,
        }

    def _response(
        self, record: Record, status: str, output: list[dict[str, Any]], counts: Counts | None, reason: Reason = "end"
    ) -> dict[str, Any]:
        why = {"refusal": "content_filter"}.get(reason, "max_output_tokens")
        spent = None
        if counts is not None:
            spent = {
                "input_tokens": counts.prompt,
                "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": counts.written},
                "output_tokens": counts.output,
                "output_tokens_details": {"reasoning_tokens": counts.thoughts},
                "total_tokens": counts.prompt + counts.output,
            }
        return {
            "id": record.request_id.replace("req_", "resp_"),
            "object": "response",
            "created_at": 1_790_000_000,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why} if status == "incomplete" else None,
            "model": record.model,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": spent,
        }


def _reasoning(record: Record) -> dict[str, Any]:
    return {"id": f"rs_{record.number}", "type": "reasoning", "summary": [], "encrypted_content": f"sealed-{record.number}"}


def _named(name: str, sequence: int, data: dict[str, Any]) -> bytes:
    body = orjson.dumps({"type": name, "sequence_number": sequence, **data})
    return chunk(b"event: %b\ndata: %b\n\n" % (name.encode(), body))


@functools.lru_cache(4096)
def _part_delta(kind: str, text: str, block: int, number: int) -> bytes:
    if kind == "call":
        return _named(
            "response.function_call_arguments.delta", 4, {"item_id": f"fc_{number}_{block}", "output_index": block, "delta": text}
        )
    if kind == "thought":
        place = {"item_id": f"rs_{number}", "output_index": block, "summary_index": 0}
        return _named("response.reasoning_summary_text.delta", 4, {**place, "delta": text})
    place = {"item_id": f"msg_{number}", "output_index": block, "content_index": 0}
    return _named("response.output_text.delta", 4, {**place, "delta": text, "logprobs": []})
