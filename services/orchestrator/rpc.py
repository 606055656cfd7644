"""The orchestrator's RPCs: check what came in, hand it on, render what comes out. No step of an answer happens here."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

import grpc
import orjson
from google.protobuf.struct_pb2 import Struct, Value

from services.chassis.clock import Clock
from services.chassis.deadline import current_deadline
from services.chassis.errors import DomainError, IdempotencyConflict, NotFound, Overloaded, RequestInvalid, Unavailable
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Server
from services.chassis.wire import asked, timestamp, usage_message, usage_value
from services.orchestrator.clients import cache_message, cache_value, passage_message, passage_value
from services.orchestrator.domain import (
    Accepted,
    CacheMode,
    Capability,
    Citation,
    Done,
    Event,
    Image,
    PassagesFound,
    Priority,
    Question,
    Reasoned,
    Recorded,
    Route,
    SentPrompt,
    StepChange,
    Suspended,
    TextDelta,
    ToolCall,
    ToolConfirmation,
    ToolResult,
    ToolSpec,
)
from services.orchestrator.log import EVENTS_MAX, Entry
from services.orchestrator.output_schema import require as require_schema
from services.orchestrator.ports import Books, ExactCache, PromptShelf
from services.orchestrator.registry import Elsewhere, Found, Registry, owner_of
from services.orchestrator.router import Router, Wish, writing
from services.orchestrator.spool import Figures
from services.orchestrator.tools.intake import RESULTS_MAX, require_images, require_tools, results_for
from services.orchestrator.tools.toolbox import CALL_ID_CHARACTERS_MAX, Toolbox, Toolset
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2_grpc as pb_grpc

QUESTION_BYTES_MAX = 32_768
OUTPUT_TOKENS_MAX = 64_000
KEY_CHARACTERS_MAX = 256
USER_CHARACTERS_MAX = 256
ANSWER_ID_CHARACTERS_MAX = 64
DEADLINE_MS_MAX = 3_000_000
CALL_MARGIN_S = 0.2
"""What a call's own deadline leaves for booking and for the last message."""
ANSWER_LEAST_S = 0.25
"""A call with less time left than this is not begun."""
BATCH_EVENTS_MAX, BATCH_BYTES_MAX = 128, 64 * 1024
"""Events of one message. One that begins below the second bound may end above it, by one event."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PRIORITIES: dict[int, Priority] = {
    pb.PRIORITY_UNSPECIFIED: "interactive",
    pb.PRIORITY_INTERACTIVE: "interactive",
    pb.PRIORITY_BATCH: "batch",
}
_CACHE_MODES: dict[int, CacheMode] = {
    pb.CACHE_MODE_UNSPECIFIED: "use",
    pb.CACHE_MODE_USE: "use",
    pb.CACHE_MODE_REFRESH: "refresh",
    pb.CACHE_MODE_OFF: "off",
}


def new_answer_id() -> str:
    """A UUID of version 7: sortable by time, 74 random bits; RFC 9562, section 5.7."""
    value = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(UUID(int=value))


def fingerprint(request: pb.AnswerRequest) -> bytes:
    """Digest of what is asked."""
    return hashlib.sha256(asked(request)).digest()


def read_question(
    request: pb.AnswerRequest,
    principal: Principal,
    router: Router,
    clock: Clock,
    output_tokens_default: int,
    box: Toolbox,
    resumed: Suspended | None = None,
) -> Question:
    """Check every field of `request`, which goes on with `resumed`, if anything.

    Raises RequestInvalid that names the field and its bound, ModelUnknown, NotAllowed for what the plan has not, DeadlineTooShort.
    """
    size = len(request.question.encode())
    if size > QUESTION_BYTES_MAX:
        raise RequestInvalid(f"the question has {size} bytes", field="question", bound=f"1-{QUESTION_BYTES_MAX} bytes")
    if not request.question.strip() and not (request.continues or request.tool_results):
        raise RequestInvalid("the question is empty", field="question", bound=f"1-{QUESTION_BYTES_MAX} bytes")
    if "\x00" in request.question:
        raise RequestInvalid("the question holds a NUL character", field="question", bound="no U+0000")
    for field in ("session_id", "collection"):
        value = getattr(request, field)
        if value and not _NAME.fullmatch(value):
            raise RequestInvalid(f"{field} has characters or a length that is not allowed", field=field, bound="1-64 of [A-Za-z0-9_-]")
    if request.HasField("max_output_tokens") and not 1 <= request.max_output_tokens <= OUTPUT_TOKENS_MAX:
        raise RequestInvalid("max_output_tokens is out of bounds", field="max_output_tokens", bound=f"1-{OUTPUT_TOKENS_MAX}")
    if len(request.idempotency_key) > KEY_CHARACTERS_MAX:
        raise RequestInvalid("the idempotency key is too long", field="idempotency_key", bound=f"0-{KEY_CHARACTERS_MAX} characters")
    if request.cache not in _CACHE_MODES:
        raise RequestInvalid("there is no such cache mode", field="cache", bound="0-3")
    if request.HasField("deadline_ms") and not 1 <= request.deadline_ms <= DEADLINE_MS_MAX:
        raise RequestInvalid("deadline_ms is out of bounds", field="deadline_ms", bound=f"1-{DEADLINE_MS_MAX}")
    if request.priority not in _PRIORITIES:
        raise RequestInvalid("there is no such priority", field="priority", bound="0-2")
    if request.replaces and not (request.session_id and _UUID.fullmatch(request.replaces)):
        bound = "an answer of the session that is named"
        raise RequestInvalid("an answer can take the place of one of its own session only", field="replaces", bound=bound)
    tools, server_tools, results = _tools(request, box, resumed)
    principal.require_tools(server_tools)  # what an answer began with, its plan may have lost since
    images = tuple(Image(image.media_type, image.data) for image in request.images)
    require_images(images)
    if resumed is not None and resumed.has_images and not images:
        raise RequestInvalid("the pictures must come again with the results", field="images", bound="the pictures of the question")
    needs: dict[Capability, str] = {"images": "images"} if images else {}
    if tools or server_tools or results:
        needs["tools"] = "tools" if tools else "server_tools" if server_tools else "tool_results"
    schema = _output_schema(request)
    output_tokens_max = request.max_output_tokens if request.HasField("max_output_tokens") else output_tokens_default
    wish = Wish(
        request.model or (resumed.model if resumed is not None and not request.tier else ""),
        request.tier or (resumed.tier if resumed is not None else ""),
        request.question,
        needs,
        principal.plan,
        principal.tiers,
        output_tokens_max,
    )
    route = router.route(wish)
    if schema is not None:
        route = _writing(route)
    answer_id = new_answer_id()
    return Question(
        answer_id=answer_id,
        text=request.question if resumed is None or request.question.strip() else resumed.question,
        principal=principal,
        session_id=request.session_id or (resumed.session_id if resumed is not None else answer_id),
        session_is_new=not request.session_id and resumed is None,
        tier=route.asked,
        candidates=route.candidates,
        output_tokens_max=output_tokens_max,
        collection=request.collection or (resumed.collection if resumed is not None else "default"),
        cache="off" if principal.cache_scope == "off" else _CACHE_MODES[request.cache],
        created_at=clock.now(),
        idempotency_key=request.idempotency_key,
        cancel_on_disconnect=request.cancel_on_disconnect,
        priority=_PRIORITIES[request.priority],
        deadline_s=_deadline_s(request),
        route=route,
        whole=request.whole,
        images=images,
        tools=tools,
        server_tools=server_tools,
        tool_results=results,
        continues=request.continues,
        replaces=request.replaces,
        output_schema=schema,
        reasoning=request.reasoning,
        resumed=resumed,
    )


def _tools(
    request: pb.AnswerRequest, box: Toolbox, resumed: Suspended | None
) -> tuple[tuple[ToolSpec, ...], tuple[str, ...], tuple[ToolResult, ...]]:
    """Tools of the client, names of ours, and results. What goes on has the tools it began with, unless the request brings others."""
    if resumed is None and (request.tool_results or request.continues):
        present, missing = ("tool_results", "continues") if request.tool_results else ("continues", "tool_results")
        raise RequestInvalid(f"{present} comes without {missing}", field=missing, bound="both or neither")
    tools = tuple(
        ToolSpec(tool.name, tool.description, _object(tool.input_schema) or {"type": "object", "properties": {}}) for tool in request.tools
    )
    server_tools = tuple(request.server_tools)
    require_tools(tools, server_tools)
    box.require(server_tools)
    if resumed is None:
        return tools, server_tools, ()
    tools, server_tools = tools or resumed.tools, server_tools or resumed.server_tools
    require_tools(tools, server_tools)  # together: either may be new
    if request.session_id and request.session_id != resumed.session_id:
        raise RequestInvalid("the answer belongs to another session", field="continues", bound="an answer of the same session")
    results = tuple(ToolResult(result.call_id, "", result.text, result.failed) for result in request.tool_results[: RESULTS_MAX + 1])
    results_for(resumed, results)
    return tools, server_tools, results


def _writing(route: Route) -> Route:
    if (left := writing(route)) is None:
        raise RequestInvalid("no configured model writes JSON", field="output_schema")
    return left


def _output_schema(request: pb.AnswerRequest) -> dict[str, Any] | None:
    """The schema as JSON has it; None if there is none. Raises RequestInvalid for one that must not be asked for."""
    if not request.HasField("output_schema"):
        return None
    schema = _object(request.output_schema)
    require_schema(schema, "output_schema")
    return schema


def _object(struct: Struct) -> dict[str, Any]:
    """JSON that came as a Struct, with whole numbers as such: a Struct has only floating ones."""
    return {name: _value(value) for name, value in struct.fields.items()}


def _value(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "list_value":
            return [_value(item) for item in value.list_value.values]
        case "struct_value":
            return _object(value.struct_value)
        case _:
            return None


def _deadline_s(request: pb.AnswerRequest) -> float | None:
    """What the field says, or less if the call itself has less left: the call keeps a moment, so that it is us who say what was slow."""
    bounds = [request.deadline_ms / 1000] if request.HasField("deadline_ms") else []
    if (call := current_deadline.get()) is not None:
        call.require("answer", ANSWER_LEAST_S)
        bounds.append(call.remaining_s - CALL_MARGIN_S)
    return min(bounds, default=None)


def event_message(answer_id: str, entry: Entry) -> pb.AnswerEvent:
    """An entry of the log as readers see it; the same entry is always the same message."""
    match entry.event:
        case TextDelta(text):
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, delta=pb.Delta(text=text))
        case Citation() as cited:
            citation = pb.Citation(
                number=cited.number,
                start=cited.start,
                end=cited.end,
                document_id=cited.document_id,
                chunk_id=cited.chunk_id,
                support=cited.support,
                sentence_start=cited.sentence_start,
                sentence_end=cited.sentence_end,
            )
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, citation=citation)
        case StepChange() as step:
            change = pb.Step(name=step.name, status=step.status, started_ms=step.started_ms, duration_ms=step.duration_ms, facts=step.facts)
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, step=change)
        case PassagesFound(passages):
            shown = pb.Passages(passages=map(passage_message, passages))
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, passages=shown)
        case Accepted() as taken:
            accepted = pb.Accepted(
                answer_id=taken.answer_id, session_id=taken.session_id, trace_id=taken.trace_id, created_at=timestamp(taken.created_at)
            )
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, accepted=accepted)
        case Reasoned(text):
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, reasoning=pb.Reasoning(text=text))
        case ToolCall() as call:
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, tool_call=_call_message(call))
        case ToolConfirmation() as waiting:
            confirmation = pb.ToolConfirmation(call_id=waiting.call_id, name=waiting.name, wait_ms=waiting.wait_ms)
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, tool_confirmation=confirmation)
        case ToolResult() as returned:
            result = pb.ToolResult(call_id=returned.call_id, text=returned.text, failed=returned.failed, flags=returned.flags)
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, tool_result=result)
        case Done() as done:
            return pb.AnswerEvent(answer_id=answer_id, sequence=entry.sequence, done=_done_message(done))
        case Recorded(payload):
            return pb.AnswerEvent.FromString(payload)


def in_batches(answer_id: str, entries: Sequence[Entry], events_max: int) -> Iterator[pb.AnswerEvent]:
    """Entries in as few messages as their bounds allow, made one at a time: a reader who comes late is sent the whole answer."""
    first: pb.AnswerEvent | None = None
    size = 0
    for entry in entries:
        message = event_message(answer_id, entry)
        if first is None:
            first, size = message, 0
        elif len(first.more) + 1 < events_max and size < BATCH_BYTES_MAX:
            first.more.append(message)
        else:
            yield first
            first, size = message, 0
        if events_max > 1:
            size += message.ByteSize()
    if first is not None:
        yield first


def event_bytes(answer_id: str, entry: Entry) -> bytes:
    """An entry as other replicas read it."""
    return event_message(answer_id, entry).SerializeToString(deterministic=True)


def event_value(payload: bytes) -> Event | None:
    """An event of another replica, if it is one that whoever follows its answer tells again."""
    message = pb.AnswerEvent.FromString(payload)
    match message.WhichOneof("event"):
        case "delta":
            return TextDelta(message.delta.text)
        case "reasoning":
            return Reasoned(message.reasoning.text)
        case "passages":
            return PassagesFound(tuple(map(passage_value, message.passages.passages)))
        case "done":
            return _done_value(message.done)
        case _:
            return None


def _done_value(message: pb.Done) -> Done:
    return Done(
        answer_id=message.answer_id,
        text_sha256=message.text_sha256,
        usage=usage_value(message.usage),
        cost_nanousd=message.cost_nanousd,
        model=message.model,
        provider=message.provider,
        tier=message.tier,
        finish_reason=message.finish_reason,
        cache=cache_value(message.cache),
        trace_id=message.trace_id,
        estimated=message.estimated,
        verdict=message.verdict,
        first_token_ms=message.first_token_ms,
        duration_ms=message.duration_ms,
    )


def _done_message(done: Done) -> pb.Done:
    return pb.Done(
        answer_id=done.answer_id,
        text_sha256=done.text_sha256,
        usage=usage_message(done.usage),
        cost_nanousd=done.cost_nanousd,
        model=done.model,
        tier=done.tier,
        finish_reason=done.finish_reason,
        cache=cache_message(done.cache),
        trace_id=done.trace_id,
        estimated=done.estimated,
        verdict=done.verdict,
        first_token_ms=done.first_token_ms,
        duration_ms=done.duration_ms,
        provider=done.provider,
        choices=[
            pb.Choice(model=made.model, provider=made.provider, tier=made.tier, reason=made.reason, difficulty=made.difficulty)
            for made in done.choices
        ],
        groundedness=done.groundedness,
        sentences_judged=done.sentences_judged,
        reasoning_tokens=done.reasoning_tokens,
    )


def _require_user(user: str) -> None:
    if not 1 <= len(user) <= USER_CHARACTERS_MAX:
        raise RequestInvalid("the user is missing or too long", field="user", bound=f"1-{USER_CHARACTERS_MAX} characters")


def _prompt_message(sent: SentPrompt) -> pb.SentPrompt:
    message = pb.SentPrompt(
        attempt=sent.attempt,
        model=sent.model,
        template=sent.template,
        system=sent.system,
        messages=[pb.SentMessage(role=role, text=text) for role, text in sent.messages],
        output_tokens_max=sent.output_tokens_max,
        effort=sent.effort,
        purpose=sent.purpose,
        operation_id=sent.operation_id,
    )
    for tool in sent.tools:
        message.tools.add(name=tool.name, description=tool.description).input_schema.update(tool.input_schema)
    if sent.output_schema is not None:
        message.output_schema.update(sent.output_schema)
    return message


def _call_message(call: ToolCall) -> pb.ToolCall:
    """A call whose arguments were checked: they are a JSON object."""
    message = pb.ToolCall(call_id=call.call_id, name=call.name)
    message.input.update(orjson.loads(call.arguments))
    return message


class OrchestratorRpc(pb_grpc.OrchestratorServiceServicer):
    """Handlers write into their stream and are never generators: grpc.aio does not close those."""

    def __init__(
        self,
        registry: Registry,
        router: Router,
        books: Books,
        clock: Clock,
        tools: Toolset,
        shelf: PromptShelf,
        exact: ExactCache,
        spool_figures: Callable[[], Awaitable[Figures]],
        *,
        output_tokens_default: int,
        heartbeat_s: float,
    ) -> None:
        self._registry, self._router, self._books, self._clock, self._tools = registry, router, books, clock, tools
        self._shelf, self._exact, self._spool_figures = shelf, exact, spool_figures
        self._output_tokens_default, self._heartbeat_s = output_tokens_default, heartbeat_s

    async def Answer(self, request: pb.AnswerRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        try:
            found = await self._begin(request)
        except IdempotencyConflict:
            raise
        except DomainError as refusal:
            if (before := await self._begun_before(request, refusal)) is None:
                raise
            found = before
        await self._follow(found, 0, context, batches=request.batches)

    async def ResumeAnswer(self, request: pb.ResumeAnswerRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        if not 0 <= request.after_sequence <= EVENTS_MAX:
            raise RequestInvalid("no answer has an event of this number", field="after_sequence", bound=f"0-{EVENTS_MAX}")
        found = await self._registry.find(current_principal(), _answer_id(request.answer_id))
        await self._follow(found, request.after_sequence, context, batches=request.batches)

    async def CancelAnswer(self, request: pb.CancelAnswerRequest, context: grpc.aio.ServicerContext) -> pb.CancelAnswerResponse:
        return pb.CancelAnswerResponse(was_running=await self._registry.cancel(current_principal(), _answer_id(request.answer_id)))

    async def ConfirmToolCall(self, request: pb.ConfirmToolCallRequest, context: grpc.aio.ServicerContext) -> pb.ConfirmToolCallResponse:
        answer_id = _answer_id(request.answer_id)
        if not 1 <= len(request.call_id) <= CALL_ID_CHARACTERS_MAX:
            raise RequestInvalid("the call id is missing or too long", field="call_id", bound=f"1-{CALL_ID_CHARACTERS_MAX} characters")
        await self._registry.find(current_principal(), answer_id)
        return pb.ConfirmToolCallResponse(was_waiting=await self._tools.confirmations.say(answer_id, request.call_id, request.allowed))

    async def _begin(self, request: pb.AnswerRequest) -> Found:
        resumed = await self._resumed(request)
        question = read_question(
            request, current_principal(), self._router, self._clock, self._output_tokens_default, self._tools.box, resumed
        )
        if not self._books.has_room:
            raise Overloaded("too many records wait for the ledger", retry_after_ms=5000)
        return await self._registry.begin(question, fingerprint(request))

    async def _begun_before(self, request: pb.AnswerRequest, refusal: DomainError) -> Found | None:
        """The answer that the same request began when it was not refused yet: the key stands for it, whatever has changed since.

        A replica that is stopping refers to the others.
        """
        if (
            not 1 <= len(request.idempotency_key) <= KEY_CHARACTERS_MAX
            or "draining" in refusal.metadata
            or isinstance(refusal, Unavailable)
        ):
            return None
        uses_tools = bool(request.tools or request.server_tools or request.continues)
        try:
            return await self._registry.begun_before(
                current_principal(),
                request.idempotency_key,
                fingerprint(request),
                is_json=request.HasField("output_schema"),
                uses_tools=uses_tools,
            )
        except Unavailable:  # nobody can say what the key stands for: then what was refused stays so
            return None

    async def _resumed(self, request: pb.AnswerRequest) -> Suspended | None:
        """The answer that the request goes on with. Raises NotFound for a foreign or unknown one, and one that has waited too long."""
        if not (request.continues and request.tool_results):
            return None
        resumed = await self._tools.pending.find(owner_of(current_principal()), _answer_id(request.continues))
        if resumed is None:
            raise NotFound("no answer of this id waits for the results of tools", kind="answer")
        return resumed

    async def GetPrompts(self, request: pb.GetPromptsRequest, context: grpc.aio.ServicerContext) -> pb.GetPromptsResponse:
        admin = current_principal()
        admin.require("admin")
        admin.require_scope("admin")
        prompts = await self._shelf.get(admin.tenant, _answer_id(request.answer_id))
        if not prompts:
            raise NotFound("no prompts are kept of this answer", kind="prompts")
        return pb.GetPromptsResponse(prompts=map(_prompt_message, prompts))

    async def ExportPrompts(self, request: pb.ExportPromptsRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override]
        admin = current_principal()
        admin.require("admin")
        admin.require_scope("admin")
        _require_user(request.user)
        async with contextlib.aclosing(self._shelf.of_user(admin.tenant, request.user)) as kept:
            async for answer_id, prompts in kept:
                await context.write(pb.ExportPromptsResponse(answer_id=answer_id, prompts=map(_prompt_message, prompts)))

    async def ForgetPrompts(self, request: pb.ForgetPromptsRequest, context: grpc.aio.ServicerContext) -> pb.ForgetPromptsResponse:
        admin = current_principal()
        admin.require("admin")
        admin.require_scope("admin")
        _require_user(request.user)
        await self._exact.forget(admin.tenant, request.user)
        if request.erased:
            await self._registry.forget(admin.tenant, request.user)
        # Also where nothing is kept any more: what was kept before the setting was changed is still there.
        return pb.ForgetPromptsResponse(forgotten=await self._shelf.forget(admin.tenant, request.user))

    async def ListModels(self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext) -> pb.ListModelsResponse:
        models = [
            pb.Model(
                model=offer.candidate.model,
                provider=offer.candidate.provider,
                tiers=offer.tiers,
                context_tokens_max=offer.candidate.context_tokens_max,
                output_tokens_max=offer.candidate.output_tokens_max,
                capabilities=sorted(offer.candidate.capabilities),
            )
            for offer in self._router.offers()
        ]
        return pb.ListModelsResponse(models=models, default_tier=self._router.default_tier)

    async def GetStatus(self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext) -> pb.GetStatusResponse:
        current_principal().require("service")
        told = await self._spool_figures()
        return pb.GetStatusResponse(
            spool=pb.SpoolStatus(
                records=told.depth,
                oldest_ms=int(told.oldest_s * 1000),
                size_bytes=told.size_bytes,
                dead_letters=told.dead_letters,
                full=told.full,
                broken=told.broken,
            )
        )

    async def _follow(self, found: Found, after: int, context: grpc.aio.ServicerContext, *, batches: bool) -> None:
        """Write the answer's events from after a number on, until `done` or its error; what is there at one moment in one message."""
        async with self._registry.reading(found, after) as (events, reader):
            # What another replica showed before it died may be more than it could share.
            may_lag = isinstance(found, Elsewhere) and not (events.ended and events.failure is None)
            if after > len(events) and not may_lag:
                raise RequestInvalid("the answer has no event of this number", field="after_sequence", bound=f"0-{len(events)}")
            while True:
                entries = await reader.next(self._heartbeat_s)
                for message in in_batches(events.answer_id, entries, BATCH_EVENTS_MAX if batches else 1):
                    await context.write(message)
                if entries:
                    continue
                if not reader.ended:
                    beat = pb.AnswerEvent(answer_id=events.answer_id, sequence=reader.position, heartbeat=pb.Heartbeat())
                    await context.write(beat)
                elif reader.failure is not None:
                    raise reader.failure.bare()
                else:
                    return


def offer(server: Server, handlers: OrchestratorRpc) -> None:
    """Put the handlers on `server` under the contract's name."""
    name = pb.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
    server.add(pb_grpc.add_OrchestratorServiceServicer_to_server, handlers, name)


def _answer_id(value: str) -> str:
    if not 1 <= len(value) <= ANSWER_ID_CHARACTERS_MAX:
        raise RequestInvalid("the answer id is missing or too long", field="answer_id", bound=f"1-{ANSWER_ID_CHARACTERS_MAX} characters")
    return value
