"""Messages of the contract as the JSON that HTTP clients read: proto3 JSON with our field names, money also in dollars. Pure."""

import re
from typing import Any

import orjson

from services.gateway import sse, usd
from services.gateway.proto_json import plain as plain
from tailrace.common.v1 import common_pb2 as common
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval


def answer_event(event: orchestrator.AnswerEvent) -> bytes:
    """One event of an answer as a block. A piece of text, which is nearly every event, takes the short way."""
    kind = event.WhichOneof("event")
    if kind == "delta":
        return sse.delta(event.sequence, event.delta.text)
    if kind == "heartbeat":
        return sse.HEARTBEAT
    if kind is None:
        return b""  # a kind of event that a newer orchestrator knows and we do not
    return sse.block(_data(event, kind), event=kind.encode(), event_id=event.sequence, tells_retry=kind == "accepted")


def answer_frame(event: orchestrator.AnswerEvent, tags: bytes) -> str:
    """One event of an answer as a JSON text; `tags` are the members that say whose it is. Its `data` is what `answer_event` has."""
    kind = event.WhichOneof("event")
    if kind is None:
        return ""  # as there
    number = b"" if kind == "heartbeat" else b'"id":%d,' % event.sequence
    return (b'{"type":"%s",%s%s,"data":%s}' % (kind.encode(), number, tags, _data(event, kind))).decode()


def _data(event: orchestrator.AnswerEvent, kind: str) -> bytes:
    # Sorted: protobuf keeps no order of a map's keys, and a replay must have the bytes of the first reading, through any gateway.
    value = tool_call(event.tool_call) if kind == "tool_call" else plain(getattr(event, kind))
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def tool_call(message: orchestrator.ToolCall) -> dict[str, Any]:
    """A call with whole numbers written as such: a Struct has floating ones alone, and not every client's parser takes 3.0 for 3."""
    return {**plain(message), "input": _whole(plain(message.input))}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {name: _whole(item) for name, item in value.items()} if isinstance(value, dict) else value


def is_done(event: orchestrator.AnswerEvent) -> bool:
    """Whether this is an answer's receipt."""
    return event.WhichOneof("event") == "done"


def operation(message: ledger.Operation) -> dict[str, Any]:
    """An operation, with its cost in dollars beside the exact one."""
    return {**plain(message), "cost_usd": usd.render(message.cost_nanousd)}


def answer_record(reply: ledger.GetOperationResponse) -> dict[str, Any]:
    """The record of an answer: its operation, and its text if that is kept."""
    record = {"answer_id": reply.operation.operation_id, **operation(reply.operation)}
    if reply.HasField("turn"):
        turn = plain(reply.turn)
        record |= {name: turn[name] for name in ("question", "text", "citations", "complete")}
    return record


def usage_row(row: ledger.QueryUsageResponse) -> dict[str, Any]:
    """One row of usage."""
    return {
        **plain(row),
        "cost_usd": usd.render(row.cost_nanousd),
        "saved_usd": usd.render(row.saved_nanousd),
        "prompt_cache_saved_usd": usd.render(row.prompt_cache_saved_nanousd),
        "tiering_saved_usd": usd.render(row.tiering_saved_nanousd),
    }


def hit(passage: common.CitedPassage) -> dict[str, Any]:
    """A search hit. Offsets count characters and fit a JSON number."""
    return {**plain(passage), "start": passage.start, "end": passage.end, "document_version": passage.document_version}


def found(row: retrieval.SearchResponse) -> dict[str, Any]:
    """A search hit with what stands around it, and how it came to its place if that was asked for."""
    around = {"before": [chunk(message) for message in row.before], "after": [chunk(message) for message in row.after]}
    explained = {"explanation": plain(row.explanation)} if row.HasField("explanation") else {}
    return {**hit(row.hit), **around, **explained}


def chunk(message: retrieval.Chunk) -> dict[str, Any]:
    """A chunk of a document. Offsets as in `hit`."""
    return {**plain(message), "start": message.start, "end": message.end}


def plan(message: ledger.Plan) -> dict[str, Any]:
    return {
        "name": message.name,
        "requests_per_minute": message.requests_per_minute,
        "tokens_per_minute": message.tokens_per_minute,
        "concurrent_answers": message.concurrent_answers,
        "monthly_budget_usd": usd.render(message.monthly_budget_nanousd),
        "tiers": list(message.tiers),
        "tenant_limits": _limits(message.tenant_limits),
        "key_limits": _limits(message.key_limits),
        "answer_deadline_ms": message.answer_deadline_ms,
        "tools": list(message.tools),
        "cache_scope": message.cache_scope,
    }


def _limits(message: ledger.Limits) -> dict[str, int]:
    return {
        "requests_per_minute": message.requests_per_minute,
        "tokens_per_minute": message.tokens_per_minute,
        "concurrent_answers": message.concurrent_answers,
    }


def budget(message: ledger.Budget) -> dict[str, Any]:
    return {
        "scope": message.scope,
        "id": message.subject,
        "period": message.period,
        "limit_usd": usd.render(message.limit_nanousd),
        "spent_usd": usd.render(message.spent_nanousd),
        "held_usd": usd.render(message.held_nanousd),
        "left_usd": usd.render(max(0, message.limit_nanousd - message.spent_nanousd - message.held_nanousd)),
        "resets_at": message.resets_at.ToJsonString() if message.HasField("resets_at") else None,
    }


def price(message: common.Price) -> dict[str, Any]:
    return {
        "provider": message.provider,
        "model": message.model,
        "version": message.version,
        "valid_from": message.valid_from.ToJsonString() if message.HasField("valid_from") else None,
        "input_usd_per_mtok": usd.render(message.input_nanousd_per_mtok),
        "output_usd_per_mtok": usd.render(message.output_nanousd_per_mtok),
        "cache_read_usd_per_mtok": usd.render(message.cache_read_nanousd_per_mtok),
        "cache_write_5m_usd_per_mtok": usd.render(message.cache_write_5m_nanousd_per_mtok),
        "cache_write_1h_usd_per_mtok": usd.render(message.cache_write_1h_nanousd_per_mtok),
        "long_context_above_tokens": message.long_context_above_tokens,
        "long_input_usd_per_mtok": usd.render(message.long_input_nanousd_per_mtok),
        "long_output_usd_per_mtok": usd.render(message.long_output_nanousd_per_mtok),
        "source": message.source,
    }


def progress(message: retrieval.IngestDocumentsResponse) -> bytes:
    """Progress of one document as a block."""
    return sse.block(orjson.dumps(plain(message)), event=b"progress")


def watched(message: ledger.WatchOperationsResponse) -> bytes:
    """An operation as a block; a heartbeat if it has none."""
    if not message.HasField("operation"):
        return sse.HEARTBEAT
    return sse.block(orjson.dumps(operation(message.operation)), event=b"operation")


NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)


def csv(rows: list[dict[str, str]], columns: list[str]) -> bytes:
    """Rows as CSV (RFC 4180). A cell that a spreadsheet would run as a formula is made text by an apostrophe; a number stays one."""

    def cell(value: str) -> str:
        if value[:1] in ("=", "+", "-", "@", "\t", "\r") and not NUMBER.fullmatch(value):
            value = f"'{value}"
        return '"' + value.replace('"', '""') + '"' if any(mark in value for mark in ',"\r\n') else value

    lines = [",".join(columns), *(",".join(cell(row.get(column, "")) for column in columns) for row in rows)]
    return ("\r\n".join(lines) + "\r\n").encode()
