"""The routes of what happened: operations and usage. What is counted, and who may see it, the ledger decides."""

from collections.abc import Sequence
from typing import Any

from services.chassis.errors import RequestInvalid
from services.gateway import render, usd
from services.gateway.bridge import Bridge
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit
from services.gateway.queries import moment, page
from tailrace.ledger.v1 import ledger_service_pb2 as ledger

WATCH_TIMEOUT_S = 86_400.0
GROUPS = ("day", "hour", "tenant", "user", "key", "session", "model", "tier", "step", "cache", "purpose")
USAGE_TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens")
USAGE_COLUMNS = (
    *("operations", "failed", "cancelled", "estimated", "cache_hits", "coalesced", "attempts", *USAGE_TOKENS),
    *("cost_usd", "saved_usd", "prompt_cache_saved_usd", "tiering_saved_usd"),
    *(f"{time}_ms_{share}" for time in ("duration", "first_token") for share in ("p50", "p90", "p99")),
)
OPERATION_COLUMNS = (
    *("operation_id", "created_at", "tenant", "user", "api_key_id", "session_id", "status", "tier", "provider", "model", "collection"),
    *("finish_reason", "error_reason", "attempts", *USAGE_TOKENS, "cost_usd", "estimated", "cache_verdict", "saved_usd"),
    *("first_token_ms", "duration_ms", "trace_id"),
)
NEXT_PAGE = b"x-next-page-token"
"""Where a page of CSV says how to go on, as JSON does in `next_page_token`."""


async def operations(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/operations"""
    query = exchange.query({"page_size", "page_token", "session_id", "user", "format"})
    as_csv = _wants_csv(exchange, query)
    size, token = page(query)
    request = ledger.ListOperationsRequest(
        page_size=size, page_token=token, session_id=_name(query, "session_id", 64), user=_name(query, "user", 256)
    )
    rows = await kit.backends.ledger.rows(kit.backends.ledger.stub.ListOperations, request)
    listed = [render.operation(row.operation) for row in rows if row.HasField("operation")]
    following = rows[-1].next_page_token if rows else ""
    if as_csv:
        await _respond_csv(exchange, "operations", [_operation_cells(row) for row in listed], OPERATION_COLUMNS, following)
    else:
        await exchange.respond_json({"operations": listed, "next_page_token": following})


async def operation(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/operations/{id}"""
    exchange.query(())
    request = ledger.GetOperationRequest(operation_id=exchange.params["id"])
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.GetOperation, request)
    await exchange.respond_json(render.operation(reply.operation))


async def watch(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/operations:watch"""
    exchange.query(())
    books, request = kit.backends.ledger, ledger.WatchOperationsRequest()
    with kit.watching():
        async with books.stream(books.stub.WatchOperations, request, timeout_s=WATCH_TIMEOUT_S) as messages:
            bridge: Bridge[Any] = Bridge(exchange, render.watched, lambda _: False, kit.timing, kit.draining, lasting=True)
            with kit.counted(bridge, "operations"):
                await bridge.run(messages)


async def usage(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/usage"""
    query = exchange.query({"group_by", "from", "to", "format"})
    as_csv = _wants_csv(exchange, query)
    groups = [name for name in query.get("group_by", "").split(",") if name]
    if len(groups) > 4 or len(set(groups)) != len(groups) or not set(groups) <= set(GROUPS):
        bound = f"at most 4 of {', '.join(GROUPS)}"
        raise RequestInvalid(f"group by {bound}, each once", field="group_by", bound=bound)
    request = ledger.QueryUsageRequest(group_by=groups)
    begin, end = moment(query, "from"), moment(query, "to")
    if begin and end and begin >= end:
        raise RequestInvalid("the time ends before it begins", field="to", bound="later than from")
    if begin:
        getattr(request, "from").FromDatetime(begin)
    if end:
        request.to.FromDatetime(end)
    replies = await kit.backends.ledger.rows(kit.backends.ledger.stub.QueryUsage, request)
    rows = [render.usage_row(row) for row in replies]
    if as_csv:
        cells = [{**_usage_cells(row), **{name: str(row["group"].get(name, "")) for name in groups}} for row in rows]
        await _respond_csv(exchange, "usage", cells, (*groups, *USAGE_COLUMNS))
    else:
        await exchange.respond_json({"group_by": groups, "rows": rows})


def _wants_csv(exchange: Exchange, query: dict[str, str]) -> bool:
    """Whether the answer shall be CSV: `format` says so, else Accept."""
    wanted = query.get("format", "csv" if exchange.accepts("text/csv") else "json")
    if wanted not in ("csv", "json"):
        raise RequestInvalid("there is no such format", field="format", bound="csv, json")
    return wanted == "csv"


async def _respond_csv(
    exchange: Exchange, name: str, cells: list[dict[str, str]], columns: Sequence[str], next_page_token: str = ""
) -> None:
    """Send a file whose length is told beforehand, so that one that was cut is not taken for the whole; lists are bounded."""
    headers = [(b"cache-control", b"no-store"), (b"content-disposition", f'attachment; filename="{name}.csv"'.encode())]
    if next_page_token:
        headers.append((NEXT_PAGE, next_page_token.encode()))
    await exchange.respond(200, render.csv(cells, list(columns)), b"text/csv; charset=utf-8", headers)


def _usage_cells(row: dict[str, Any]) -> dict[str, str]:
    return _texts({**row, **_tokens(row)}, USAGE_COLUMNS)


def _operation_cells(row: dict[str, Any]) -> dict[str, str]:
    cache = row.get("cache", {})
    more = {
        "attempts": len(row["attempts"]),
        "estimated": "true" if row["estimated"] else "false",
        "cache_verdict": cache.get("verdict", ""),
        "saved_usd": usd.render(int(cache.get("saved_nanousd", 0))),
    }
    return _texts({**row, **_tokens(row), **more}, OPERATION_COLUMNS)


def _tokens(row: dict[str, Any]) -> dict[str, str]:
    used = row.get("usage", {})
    return {name: used.get(name, "0") for name in USAGE_TOKENS}


def _texts(row: dict[str, Any], columns: Sequence[str]) -> dict[str, str]:
    return {name: str(row.get(name, "")) for name in columns}


def _name(query: dict[str, str], field: str, length_max: int) -> str:
    value = query.get(field, "")
    if len(value) > length_max or "\0" in value:
        raise RequestInvalid(f"{field} is too long", field=field, bound=f"at most {length_max} characters")
    return value
