"""The routes of an answer: ask, resume, cancel, look up. What an answer is, the orchestrator decides; here one stream becomes the other."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from services.chassis.errors import AnswerInterrupted, RequestInvalid
from services.gateway import bodies, deadlines, render, sse
from services.gateway.answer_stream import AnswerStream
from services.gateway.bridge import Bridge
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit
from services.gateway.limits import Metered
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator


async def ask(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/answers"""
    async with kit.counting_unreadable():
        exchange.query(())
        # Only pictures make a question large, so a large one says early that it has some.
        content = await exchange.json(larger_with=b'"images"', larger_bytes_max=bodies.ANSWER_BYTES_MAX)
        body = bodies.parse(content, bodies.AnswerBody)
        request = body.message(_idempotency_key(exchange))
        asked_ms = deadlines.requested_ms(exchange.header("request-timeout"))
    async with kit.answering(request, asked_ms, exchange.arrived_at_s) as (admission, timeout_s):
        exchange.extra_headers += admission.headers
        async with AnswerStream(kit.backends.orchestrator, request, timeout_s=timeout_s) as events:
            metered = Metered(events, admission, exchange.prepared)
            if body.stream:
                await _relay(exchange, kit, metered)
            else:
                await exchange.respond_json(await kit.unless_client_leaves(exchange, _whole(metered)))


async def resume(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/answers/{id}/events"""
    request = orchestrator.ResumeAnswerRequest(answer_id=exchange.params["id"], after_sequence=_after(exchange))
    # Who comes back has heard when to; nobody else begins in the middle, and `accepted` says it to those who begin at the start.
    begins = request.after_sequence > 0 and not exchange.header("last-event-id")
    async with kit.resuming(request) as events:
        await _relay(exchange, kit, events, tell_retry=begins)


async def cancel(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/answers/{id}/cancel"""
    exchange.query(())
    reply = await kit.cancel(orchestrator.CancelAnswerRequest(answer_id=exchange.params["id"]))
    await exchange.respond_json({"answer_id": exchange.params["id"], "was_running": reply.was_running}, 202)


async def confirm(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/answers/{id}/tool-calls/{call_id}"""
    exchange.query(())
    word = bodies.parse(await exchange.json(), bodies.ToolWordBody)
    answer_id, call_id = exchange.params["id"], exchange.params["call_id"]
    request = orchestrator.ConfirmToolCallRequest(answer_id=answer_id, call_id=call_id, allowed=word.allowed)
    reply = await kit.backends.orchestrator.unary(kit.backends.orchestrator.stub.ConfirmToolCall, request, idempotent=False)
    await exchange.respond_json({"answer_id": answer_id, "call_id": call_id, "was_waiting": reply.was_waiting})


async def show(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/answers/{id}"""
    exchange.query(())
    request = ledger.GetOperationRequest(operation_id=exchange.params["id"], with_turn=True)
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.GetOperation, request)
    await exchange.respond_json(render.answer_record(reply))


async def prompts(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/answers/{id}/prompts"""
    exchange.query(())
    request = orchestrator.GetPromptsRequest(answer_id=exchange.params["id"])
    reply = await kit.backends.orchestrator.unary(kit.backends.orchestrator.stub.GetPrompts, request)
    await exchange.respond_json({"answer_id": exchange.params["id"], **render.plain(reply)})


async def models(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/models"""
    exchange.query(())
    reply = await kit.backends.orchestrator.unary(kit.backends.orchestrator.stub.ListModels, orchestrator.ListModelsRequest())
    data = [
        {
            "id": model.model,
            "object": "model",
            "created": 0,
            "owned_by": model.provider,
            "tiers": list(model.tiers),
            "context_tokens_max": model.context_tokens_max,
            "output_tokens_max": model.output_tokens_max,
        }
        for model in reply.models
    ]
    await exchange.respond_json({"object": "list", "data": data, "default_tier": reply.default_tier})


async def _relay(exchange: Exchange, kit: Kit, events: AnswerStream | Metered, *, tell_retry: bool = False) -> None:
    as_block = _telling_retry(render.answer_event) if tell_retry else render.answer_event
    bridge = Bridge(exchange, as_block, render.is_done, kit.timing, kit.draining, at_hand=events.at_hand)
    with kit.counted(bridge, "answers"):
        if not await bridge.run(events):
            # The log has ended and the client has all of it: 204 is what stops a browser from coming back.
            await exchange.respond(204, b"", b"")


def _telling_retry(as_block: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """`as_block`, with `retry:` within the first block that has data."""
    told = False

    def telling(event: Any) -> bytes:
        nonlocal told
        block = as_block(event)
        if told or not block or block == sse.HEARTBEAT:
            return block
        told = True
        return sse.RETRY + block

    return telling


async def _whole(events: AsyncIterator[Any]) -> dict[str, Any]:
    """The answer as one document."""
    text: list[str] = []
    reasoning: list[str] = []
    citations: list[dict[str, Any]] = []
    passages: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    steps: dict[tuple[str, float], dict[str, Any]] = {}
    session_id = ""
    async for event in events:
        match event.WhichOneof("event"):
            case "accepted":
                session_id = event.accepted.session_id
            case "delta":
                text.append(event.delta.text)
            case "reasoning":
                reasoning.append(event.reasoning.text)
            case "citation":
                citations.append(render.plain(event.citation))
            case "passages":
                passages = [render.plain(passage) for passage in event.passages.passages]
            case "step":
                steps[event.step.name, event.step.started_ms] = render.plain(event.step)  # calls of tools have a name in common
            case "tool_call":
                calls.append(render.tool_call(event.tool_call))
            case "tool_result":
                results.append(render.plain(event.tool_result))
            case "done":
                return {
                    **render.plain(event.done),
                    "session_id": session_id,
                    "text": "".join(text),
                    "reasoning": "".join(reasoning),
                    "citations": citations,
                    "passages": passages,
                    "steps": list(steps.values()),
                    "tool_calls": calls,
                    "tool_results": results,
                }
    raise AnswerInterrupted("the answer ended before it was done")


def _idempotency_key(exchange: Exchange) -> str:
    key = exchange.header("idempotency-key")
    bound = f"at most {bodies.KEY_LENGTH_MAX} printable ASCII characters"
    if len(key) > bodies.KEY_LENGTH_MAX or not (key.isascii() and key.isprintable()):
        raise RequestInvalid("the idempotency key is not valid", field="Idempotency-Key", bound=bound)
    return key


def _after(exchange: Exchange) -> int:
    """What the client has already, by `?after=` and `Last-Event-ID`: the later of them, since a browser comes back to the same address."""
    query = exchange.query({"after"})
    return max(_number(query.get("after", ""), "after"), _number(exchange.header("last-event-id"), "Last-Event-ID"))


def _number(value: str, field: str) -> int:
    """The number of an event, 0 if there is none. Raises RequestInvalid."""
    if not value:
        return 0
    if not (value.isascii() and value.isdecimal() and len(value) <= 18):
        raise RequestInvalid("not the number of an event", field=field, bound="0 to 999999999999999999")
    return int(value)
