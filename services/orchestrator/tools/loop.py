"""The rounds between a model and its tools: ask, make the calls side by side, show what came of them, ask again, within bounds.

What a tool does is not known here, nor how a provider writes a call. What tools return is material: it goes to the model fenced.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from opentelemetry.trace import SpanKind

from services.chassis import telemetry
from services.chassis.deadline import current_deadline
from services.chassis.errors import DomainError, ModelFailed, Overloaded, RequestInvalid
from services.chassis.injection import flags_of_long
from services.chassis.telemetry import StepRecord, span
from services.orchestrator.attempts import first_draft
from services.orchestrator.compose import MESSAGE_OVERHEAD_TOKENS, fenced_question, fenced_result, tokens_max
from services.orchestrator.domain import Draft, Message, Prompt, Suspended, ToolCall, ToolConfirmation, ToolResult, ToolSpec
from services.orchestrator.json_schema import Schema, SchemaRefused, ValueRefused, parse_object, require_bounded
from services.orchestrator.run import Run
from services.orchestrator.tools.intake import results_for
from services.orchestrator.tools.toolbox import CALL_ID_CHARACTERS_MAX, Allowed, Bench, Handed, Judged, Output, Refused, ToolFailed

log = structlog.get_logger(__name__)

CALLS_PER_ROUND_MAX = 16
CALLS_MAX = 64
"""Of one answer. With the attempts of all rounds they are fewer steps than an operation may have."""
IMAGE_TOKENS_MAX = 8_192
"""More than any provider makes of one picture, however large it is."""
TOOL_OVERHEAD_TOKENS = 128
RESULT_NODES_MAX = 50_000
"""Values in what a tool returns as JSON, where it promises a shape: a server may send megabytes of them."""
TIME_SHARE = 0.5
"""Of the time that is left, how much a call may take: the model needs the rest to answer."""
CALLING = frozenset({"tool_use", "end_turn", "stop_sequence", ""})
"""How a draft with calls may end. Cut or refused, its last call may be half a call."""


@dataclass(slots=True)
class _Used:
    """What the tools of an answer have taken so far."""

    rounds: int = 0
    calls: int = 0
    """Without those that were passed over."""
    bytes: int = 0
    call_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Made:
    """A call that is over: as the reader sees its result and as the model does."""

    shown: ToolResult
    fenced: ToolResult


async def draft_with_tools(run: Run, prompt: Prompt) -> tuple[Draft, Prompt]:
    """The draft that ends the answer: the model's text, or calls of the client's tools, which end it with `tool_use`. With it the prompt
    that it is the answer to: with pictures, and all that tools returned.

    Raises what `first_draft` raises, ModelFailed if the model calls on when it may no more, Unavailable or Overloaded if an answer that
    must wait for its client cannot be kept.
    """
    asked = run.question
    bench = Bench()
    if asked.uses_tools or asked.images:
        with run.step("tools") as step:
            bench = await _lay_out(run, step)
            prompt = _equipped(run, bench, prompt)
    used = _Used()
    while True:
        draft = await first_draft(run, prompt)
        if not draft.calls or draft.finish_reason not in CALLING:
            return draft, prompt
        calls = _numbered(draft.calls, used)
        taken = calls[: min(CALLS_PER_ROUND_MAX, CALLS_MAX - used.calls)]
        used.rounds += 1
        used.calls += len(taken)
        judged = await asyncio.to_thread(_judge, bench, taken)  # a stranger's schema may take its time, and other streams go on
        for verdict in judged:
            run.events.append(_readable(verdict.call))
        made = await _make(run, judged, used)
        results = [each.fenced for each in made if each is not None] + [_passed_over(call) for call in calls[len(taken) :]]
        prompt = _spoken(prompt, draft, calls)
        if any(isinstance(verdict, Handed) for verdict in judged):
            await _suspend(run, prompt, results)
            draft.finish_reason = "tool_use"
            return draft, prompt
        run.begin_paragraph()
        prompt = _answered(prompt, results)
        if not bench.specs:  # no provider takes calls of tools it was not told of
            prompt = without_tools(prompt)
        if reason := _spent(run, prompt, used):
            return await _last(run, prompt, reason)


def _judge(bench: Bench, calls: Sequence[ToolCall]) -> list[Judged]:
    return [bench.judge(call) for call in calls]


def take_up(run: Run, step: StepRecord) -> Prompt:
    """The prompt of an answer that goes on with what its client's tools returned. Raises RequestInvalid."""
    asked, suspended = run.question, run.question.resumed
    assert suspended is not None
    run.show(suspended.prompt.passages)
    results = results_for(suspended, asked.tool_results)
    theirs = {result.call_id for result in asked.tool_results}
    for result in results:
        if result.call_id in theirs:
            run.returned(result)
    fenced = [replace(result, text=fenced_result(result.text)) if result.call_id in theirs else result for result in results]
    prompt = _answered(suspended.prompt, fenced)
    if asked.text != suspended.question:
        prompt = _with(prompt, Message("user", fenced_question(asked.text)))
    step.note(results=len(results), messages=len(prompt.messages))
    return prompt


async def _lay_out(run: Run, step: StepRecord) -> Bench:
    asked = run.question
    own, missing = await run.kit.tools.box.take(asked.server_tools)
    step.note(own=len(own), client=len(asked.tools))
    if missing:
        step.note(missing=", ".join(missing)[:200])
    return Bench(own, {tool.name: tool for tool in asked.tools})


def _equipped(run: Run, bench: Bench, prompt: Prompt) -> Prompt:
    """The prompt with tools and pictures, both within what every candidate takes. Raises RequestInvalid."""
    asked = run.question
    messages = list(prompt.messages)
    if asked.images:
        last = len(messages) - 1
        place = next((number for number in range(last) if messages[number + 1].calls), last)  # the question: before the first call, if any
        messages[place] = replace(messages[place], images=asked.images)
    size = prompt.input_tokens_max + IMAGE_TOKENS_MAX * len(asked.images)
    size += sum(_size_of(spec) for spec in bench.specs) - sum(_size_of(spec) for spec in prompt.tools)
    if size > _room(run):
        field_ = "tools" if asked.tools else "server_tools" if asked.server_tools else "images" if asked.images else "tool_results"
        raise RequestInvalid(
            "the question and what comes with it do not fit into the model's context", field=field_, bound=f"{_room(run)} tokens"
        )
    return replace(prompt, messages=tuple(messages), tools=bench.specs, input_tokens_max=size)


def _room(run: Run) -> int:
    """Tokens that a prompt may have with every model that may come to see it: also where the answer is escalated, or made cheaper."""
    asked = run.question
    ways = [way for way in (run.route, run.route.escalation, run.route.cheaper) if way is not None]
    rooms = [c.context_tokens_max - min(asked.output_tokens_max, c.output_tokens_max) for way in ways for c in way.candidates]
    return min(rooms + [way.prompt_tokens_max for way in ways if way.prompt_tokens_max is not None])


def _size_of(spec: ToolSpec) -> int:
    return TOOL_OVERHEAD_TOKENS + tokens_max(spec.name) + tokens_max(spec.description) + tokens_max(repr(spec.input_schema))


def _numbered(calls: Sequence[ToolCall], used: _Used) -> list[ToolCall]:
    """The calls with ids that no other call of the answer has: a result must find its call, and a person's word too."""
    found: list[ToolCall] = []
    for call in calls:
        call_id = call.call_id
        if not 1 <= len(call_id) <= CALL_ID_CHARACTERS_MAX or call_id in used.call_ids:
            call_id = f"call_{used.rounds}_{len(found)}_{len(used.call_ids)}"
        used.call_ids.add(call_id)
        found.append(replace(call, call_id=call_id))
    return found


def _passed_over(call: ToolCall) -> ToolResult:
    """What the model hears of a call that is one too many. Readers hear nothing: it is neither made nor anybody's to make."""
    reason = f"not called: {CALLS_PER_ROUND_MAX} calls at once and {CALLS_MAX} in all are the most there are"
    return ToolResult(call.call_id, call.name, fenced_result(reason), failed=True)


def _readable(call: ToolCall) -> ToolCall:
    """The call as an event, which holds JSON or nothing."""
    try:
        parse_object(call.arguments)
    except ValueRefused:
        return replace(call, arguments="{}", signature=b"")
    return replace(call, arguments=call.arguments or "{}", signature=b"")


async def _make(run: Run, judged: Sequence[Judged], used: _Used) -> list[_Made | None]:
    """Make the calls that are ours, side by side; what was refused has its result at once, what is handed on has none."""
    made: list[_Made | None] = [None] * len(judged)

    async def one(place: int, verdict: Allowed | Refused) -> None:
        made[place] = result = await _call(run, verdict, used)
        run.returned(result.shown)

    try:
        async with asyncio.TaskGroup() as calling:
            for place, verdict in enumerate(judged):
                if not isinstance(verdict, Handed):
                    calling.create_task(one(place, verdict), name="tool")
    except BaseExceptionGroup as errors:  # the log is full: nothing else comes out of a call
        raise errors.exceptions[0] from None
    return made


async def _call(run: Run, verdict: Allowed | Refused, used: _Used) -> _Made:
    """Make one call, or say why not. Never raises but for cancellation."""
    call = verdict.call
    known = not isinstance(verdict, Refused) or verdict.known
    name = call.name if known else "unknown"  # whatever a model may have written is no name for a span
    attributes: dict[str, Any] = {telemetry.GEN_AI_OPERATION: "execute_tool", telemetry.GEN_AI_TOOL_NAME: name}
    with run.step("tool") as step, span(f"execute_tool {name}", kind=SpanKind.INTERNAL, **attributes):
        if isinstance(verdict, Refused):
            outcome, output = "wrong_arguments" if known else "unknown", Output(verdict.reason)
        elif not await _allowed(run, verdict):
            outcome, output = "not_allowed", Output("the user did not allow this call")
        else:
            outcome, output = await _outcome(run, verdict)
        limits = run.kit.tools.limits
        text = _cut(output.text, min(limits.result_bytes_max, max(0, limits.results_bytes_max - used.bytes)))
        used.bytes += len(text.encode())
        step.note(tool=name, outcome=outcome, bytes=len(text.encode()))
        # In a thread: a page may be long, and other streams go on. What a search found was looked at when it was stored.
        flags = await asyncio.to_thread(flags_of_long, text)
        flags = tuple(sorted({*flags, *(flag for passage in output.passages for flag in passage.flags)}))
        if flags:
            step.note(flags=", ".join(flags))
        shown = ToolResult(call.call_id, call.name, text, failed=outcome != "done", flags=flags)
        fenced = fenced_result(text, suspicious=bool(flags))
        if output.passages and text == output.text and (cited := run.show_more(output.passages)):
            fenced = fenced_result("", cited, suspicious=bool(flags))  # the same, with numbers
        return _Made(shown, replace(shown, text=fenced))


async def _allowed(run: Run, verdict: Allowed) -> bool:
    """Whether the call may be made: a person is asked where the tool is marked so, and silence is a no."""
    tools, call = run.kit.tools, verdict.call
    if not tools.box.needs_word(call.name):
        return True
    wait_s = _time_for(tools.limits.confirm_s)
    run.trail.tell()
    run.events.append(ToolConfirmation(call.call_id, call.name, int(wait_s * 1000)))
    return await tools.confirmations.wait(run.question.answer_id, call.call_id, wait_s) is True


async def _outcome(run: Run, verdict: Allowed) -> tuple[str, Output]:
    """What came of a call: how it went in one word, and what it returned or why it did not."""
    try:
        async with asyncio.timeout(_time_for(run.kit.tools.limits.call_s)):
            output = await verdict.tool.call(verdict.arguments, run.question)
        if (promised := verdict.tool.output_schema) is not None:
            try:
                await asyncio.to_thread(_check_result, promised, output.structured)  # as with arguments: it may take its time
            except (ValueRefused, SchemaRefused) as error:
                return "wrong_result", Output(f"the tool returned something else than it promises: {error}")
        return "done", output
    except ToolFailed as error:
        return "failed", Output(str(error))
    except TimeoutError:
        return "timed_out", Output("the tool took too long")
    except DomainError as error:
        return "failed", Output(error.detail)
    except Exception as error:  # a tool is anybody's code; its text may hold anybody's words
        log.error("tool_failed_unexpectedly", tool=verdict.call.name, error=type(error).__name__)
        return "failed", Output("the tool failed")


def _check_result(promised: Mapping[str, Any], structured: object) -> None:
    """Raises ValueRefused, SchemaRefused."""
    require_bounded(structured, RESULT_NODES_MAX)
    Schema(promised).check(structured)


def _time_for(wanted_s: float) -> float:
    deadline = current_deadline.get()
    return wanted_s if deadline is None else max(0.0, min(wanted_s, deadline.remaining_s * TIME_SHARE))


def _cut(text: str, bytes_max: int) -> str:
    encoded = text.encode()
    if len(encoded) <= bytes_max:
        return text
    return encoded[:bytes_max].decode(errors="ignore")


def _with(prompt: Prompt, message: Message) -> Prompt:
    size = MESSAGE_OVERHEAD_TOKENS + tokens_max(message.text)
    for call in message.calls:
        size += MESSAGE_OVERHEAD_TOKENS + tokens_max(call.call_id + call.name + call.arguments) + len(call.signature)
    for result in message.results:
        size += MESSAGE_OVERHEAD_TOKENS + tokens_max(result.call_id + result.name + result.text)
    return replace(prompt, messages=(*prompt.messages, message), input_tokens_max=prompt.input_tokens_max + size)


def _spoken(prompt: Prompt, draft: Draft, calls: Sequence[ToolCall]) -> Prompt:
    return _with(prompt, Message("assistant", draft.text, calls=tuple(calls)))


def _answered(prompt: Prompt, results: Sequence[ToolResult]) -> Prompt:
    return _with(prompt, Message("tool", results=tuple(results)))


def without_tools(prompt: Prompt) -> Prompt:
    """The prompt with calls and results told in words, for a model that shall not call: every provider takes that, from any other."""
    messages: list[Message] = []
    for message in prompt.messages:
        if message.calls:
            told = "\n".join(f"(called the tool {call.name} with {call.arguments})" for call in message.calls)
            message = Message("assistant", f"{message.text}\n{told}".strip())
        elif message.role == "tool":
            message = Message("user", "\n".join(f"(result of {result.name})\n{result.text}" for result in message.results))
        messages.append(message)
    overhead = 64 * sum(len(message.calls) + len(message.results) for message in prompt.messages)
    return replace(prompt, messages=tuple(messages), tools=(), input_tokens_max=prompt.input_tokens_max + overhead)


def _spent(run: Run, prompt: Prompt, used: _Used) -> str:
    """Why no further round may follow; nothing if one may."""
    limits = run.kit.tools.limits
    if used.rounds >= limits.rounds_max:
        return f"{limits.rounds_max} rounds are the most there are"
    if used.calls >= CALLS_MAX:
        return f"{CALLS_MAX} calls are the most there are"
    if limits.cost_nanousd_max and run.cost_nanousd >= limits.cost_nanousd_max:
        return "the answer has cost as much as it may"
    if used.bytes >= limits.results_bytes_max:
        return "the results have reached their bound"
    if prompt.input_tokens_max + limits.result_bytes_max > _room(run):
        return "the conversation has reached its bound"
    return ""


async def _last(run: Run, prompt: Prompt, reason: str) -> tuple[Draft, Prompt]:
    """Tell the model once that no call may follow, and let it answer. Raises ModelFailed if it calls all the same."""
    told = _with(
        without_tools(prompt), Message("user", f"<tool_limit>\nNo tool may be called any more: {reason}. Answer now.\n</tool_limit>")
    )
    merged = (*told.messages[:-2], Message("user", f"{told.messages[-2].text}\n{told.messages[-1].text}"))
    told = replace(told, messages=merged)
    draft = await first_draft(run, told)
    require_no_calls(draft)
    return draft, told


def require_no_calls(draft: Draft) -> None:
    """Raise ModelFailed if a model calls that was given no tools."""
    if draft.calls and draft.finish_reason in CALLING:
        raise ModelFailed("the model called a tool after it was told not to", cause="tool_calls")


async def _suspend(run: Run, prompt: Prompt, results: Sequence[ToolResult]) -> None:
    """Keep what the answer needs to go on once its client has called. Raises Unavailable, Overloaded."""
    asked = run.question
    kept = Suspended(
        answer_id=asked.answer_id,
        owner=(asked.principal.tenant, asked.principal.user),
        session_id=asked.session_id,
        collection=asked.collection,
        tier=asked.tier,
        question=asked.text,
        prompt=replace(prompt, messages=tuple(replace(message, images=()) for message in prompt.messages), passages=run.passages),
        has_images=any(message.images for message in prompt.messages),
        results=tuple(results),
        tools=asked.tools,
        server_tools=asked.server_tools,
        asked_at=asked.asked_at,
        model=asked.route.named if asked.route is not None else "",
    )
    with run.step("suspend") as step:
        try:
            await run.kit.tools.pending.keep(kept)
        except Overloaded:
            step.note(kept="refused")
            raise
