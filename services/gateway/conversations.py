"""The routes of conversations: list, show, rename, go back, delete, export. What a conversation is, and whose, the ledger decides."""

from collections.abc import AsyncIterator
from typing import Any

import orjson

from services.chassis.errors import RequestInvalid
from services.gateway import bodies, render
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit
from services.gateway.queries import page
from services.gateway.transcript import Transcript
from tailrace.ledger.v1 import ledger_service_pb2 as ledger

EXPORT_TIMEOUT_S = 600.0


async def listed(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/sessions"""
    size, token = page(exchange.query({"page_size", "page_token"}))
    rows = await kit.backends.ledger.rows(
        kit.backends.ledger.stub.ListSessions, ledger.ListSessionsRequest(page_size=size, page_token=token)
    )
    sessions = [render.plain(row.session) for row in rows if row.HasField("session")]
    await exchange.respond_json({"sessions": sessions, "next_page_token": rows[-1].next_page_token if rows else ""})


async def show(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/sessions/{id}: the current branch, or with `?branches=all` every turn with the one it follows."""
    branches = exchange.query({"branches"}).get("branches", "current")
    if branches not in ("current", "all"):
        raise RequestInvalid("there are no such branches", field="branches", bound="current, all")
    request = ledger.GetSessionRequest(session_id=exchange.params["id"], all_branches=branches == "all")
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.GetSession, request)
    await exchange.respond_json({**render.plain(reply.session), "turns": [render.plain(turn) for turn in reply.turns]})


async def update(exchange: Exchange, kit: Kit) -> None:
    """PATCH /v1/sessions/{id}"""
    exchange.query(())
    body = bodies.parse(await exchange.json(), bodies.SessionPatchBody)
    request = body.message(exchange.params["id"])
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.UpdateSession, request)
    await exchange.respond_json(render.plain(reply.session))


async def delete(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/sessions/{id}"""
    exchange.query(())
    request = ledger.DeleteSessionRequest(session_id=exchange.params["id"])
    await kit.backends.ledger.unary(kit.backends.ledger.stub.DeleteSession, request, timeout_s=30.0)
    await exchange.respond(204, b"", b"")


async def export(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/sessions/{id}/export: all branches, as Markdown for people or as JSON; `format` says which, else Accept."""
    wanted = exchange.query({"format"}).get("format", "json" if exchange.accepts("application/json") else "markdown")
    if wanted not in ("markdown", "json"):
        raise RequestInvalid("there is no such format", field="format", bound="markdown, json")
    request = ledger.ExportSessionsRequest(session_id=exchange.params["id"])
    pieces = _as_json if wanted == "json" else _as_markdown
    media_type, ending = ("application/json", "json") if wanted == "json" else ("text/markdown; charset=utf-8", "md")
    await _download(exchange, kit, request, pieces, media_type, f"conversation.{ending}")


async def export_all(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/sessions:export: a line of JSON for each record, and a last one that says how many there were."""
    exchange.query(())
    await _download(exchange, kit, ledger.ExportSessionsRequest(), _as_lines, "application/x-ndjson", "conversations.ndjson")


async def _download(exchange: Exchange, kit: Kit, request: Any, pieces: Any, media_type: str, name: str) -> None:
    """Write what comes as it comes. Until the first record a refusal can be told as one; later, half a file must not look whole."""
    headers = [
        (b"content-type", media_type.encode()),
        (b"cache-control", b"no-store"),
        (b"content-disposition", f'attachment; filename="{name}"'.encode()),
    ]
    ledger_service = kit.backends.ledger
    async with ledger_service.stream(ledger_service.stub.ExportSessions, request, timeout_s=EXPORT_TIMEOUT_S) as messages:
        async for piece in pieces(messages):
            if not exchange.status:
                await exchange.start(200, headers)
            await exchange.write(piece)
    await exchange.write(b"", last=True)


async def _as_markdown(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    transcript = Transcript()
    async for message in messages:
        match message.WhichOneof("record"):
            case "session":
                yield transcript.opening(message.session).encode()
            case "turn":
                yield transcript.turn(message.turn.turn).encode()
            case _:
                pass  # a summary says again, for models, what the turns say
    yield transcript.closing().encode()


async def _as_json(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """One document: the session, with its turns and summaries."""
    opened, turns, summaries = b"", 0, list[Any]()
    async for message in messages:
        match message.WhichOneof("record"):
            case "session":
                opened = orjson.dumps(render.plain(message.session))[:-1] + b',"turns":['
                yield opened
            case "turn":
                yield (b"," if turns else b"") + orjson.dumps(render.plain(message.turn.turn))
                turns += 1
            case "summary":
                summaries.append(render.plain(message.summary.summary))
    yield b'],"summaries":' + orjson.dumps(summaries) + b"}"


async def _as_lines(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    count = 0
    async for message in messages:
        count += 1
        yield orjson.dumps(render.plain(message)) + b"\n"
    yield orjson.dumps({"complete": True, "records": count}) + b"\n"
