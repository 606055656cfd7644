"""The Responses API of OpenAI: what its own models are asked through, since only there do they reason and call tools in one answer.

Only its requests and events are known here; client and errors are in `openai_model`.
"""

from typing import Any

import msgspec
import openai
import orjson

from services.orchestrator.domain import Candidate, Draft, Message, Prompt
from services.orchestrator.model_stream import BRIEF_BELOW_TOKENS, Reading, sealed, unsealed
from services.orchestrator.openai_model import Details, ErrorBody, OpenAiModel, OutputDetails, bound_schema, count, data_url, failed_midway

INCOMPLETE_REASONS = {"max_output_tokens": "max_tokens", "content_filter": "refusal"}
"""Why a response is incomplete, as our finish reasons. Any other means that the answer is not whole."""

_KEPT: dict[str, Any] = {"prompt_cache_breakpoint": {"mode": "explicit"}}
"""Marks a block up to which the provider may keep the prompt."""


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    output_tokens_details: OutputDetails | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Response(msgspec.Struct):
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: ErrorBody | None = None
    incomplete_details: _Incomplete | None = None


class _Item(msgspec.Struct):
    type: str = ""
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None
    summary: Any = None
    encrypted_content: str | None = None


class _Event(msgspec.Struct):
    """Every event of the stream; only what is read of it. Unknown types and fields pass by."""

    type: str = ""
    delta: Any = None
    output_index: int = 0
    item: _Item | None = None
    response: _Response | None = None
    code: str | int | None = None
    error: ErrorBody | None = None


_decode = msgspec.json.Decoder(_Event).decode


class ResponsesReading(Reading):
    """The events of a response.

    A model wants to see its own reasoning again with the calls that came of it: the items, which only OpenAI can read, go into the
    signature of the first call after them.
    """

    def __init__(self, provider: str, draft: Draft) -> None:
        super().__init__(provider, draft)
        self._refused = False
        self._reasoning: list[dict[str, Any]] = []

    def read(self, data: bytes) -> None:
        event = _decode(data)
        kind = event.type
        if kind == "response.output_text.delta":
            self.write(self._said(event))
        elif kind == "response.function_call_arguments.delta":
            self.argue(event.output_index, self._said(event))
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            self.think(self._said(event))
        elif kind == "response.refusal.delta":
            self._refused = True
            self.write(self._said(event))
        elif kind == "response.output_item.added":
            if event.item is not None and event.item.type == "function_call":
                self.begin_call(event.output_index, event.item.call_id or "", event.item.name or "")
        elif kind == "response.output_item.done":
            self._item_done(event)
        elif kind == "response.created":
            if event.response is not None:
                self.named(event.response.model)
                self.identified(event.response.id)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._finish(kind, event.response or _Response())
        elif kind == "error":
            raise failed_midway(self, event.error or ErrorBody(code=event.code))

    def _said(self, event: _Event) -> str:
        if not isinstance(event.delta, str):
            raise self.malformed()
        return event.delta

    def _item_done(self, event: _Event) -> None:
        item = event.item
        if item is None:
            return
        if item.type == "function_call":
            reasoning, self._reasoning = self._reasoning, []
            signature = sealed(self.provider, orjson.dumps(reasoning)) if reasoning else b""
            self.end_call(event.output_index, item.arguments if isinstance(item.arguments, str) else None, signature)
        elif item.type == "reasoning" and item.encrypted_content:
            self._reasoning.append(
                {"type": "reasoning", "id": item.id, "summary": item.summary or [], "encrypted_content": item.encrypted_content}
            )

    def _finish(self, kind: str, response: _Response) -> None:
        draft = self.draft
        self.named(response.model)
        if (used := response.usage) is not None:
            count(draft, used.input_tokens, used.output_tokens, used.input_tokens_details, used.output_tokens_details)
        if kind == "response.failed":
            raise failed_midway(self, response.error or ErrorBody())
        if kind == "response.incomplete":
            reason = response.incomplete_details.reason if response.incomplete_details else None
            draft.finish_reason = INCOMPLETE_REASONS.get(reason or "", "")
        else:
            draft.finish_reason = "refusal" if self._refused else "tool_use" if draft.calls else "end_turn"
        self.whole = self.finished = True


class OpenAiResponsesModel(OpenAiModel):
    """Calls the Responses API. Nothing of a call is kept at OpenAI beyond what its terms keep of every call."""

    def opened(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Any:
        return client.responses.with_streaming_response.create(**request)

    def reading(self, draft: Draft) -> Reading:
        return ResponsesReading(self._provider, draft)

    def request(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> dict[str, Any]:
        system: dict[str, Any] = {"type": "input_text", "text": prompt.system}
        items: list[dict[str, Any]] = [{"role": "developer", "content": [system]}]
        marks = self.marks_prefix(candidate.model)
        for number, message in enumerate(prompt.messages):
            # The history's last question ends what the conversation's next prompt begins with: of an answer nothing can be marked.
            items += self._items(message, marked=marks and number == prompt.history_messages - 2)
        request: dict[str, Any] = {
            "model": candidate.model,
            "input": items,
            "max_output_tokens": output_tokens_max,
            "store": False,
            "stream": True,
            "extra_headers": {"accept-encoding": "identity"},  # the bytes are read as they come
        }
        if self.is_openai:
            request["stream_options"] = {"include_obfuscation": False}  # padding of every event, against who can see TLS records
        if marks:
            system |= _KEPT
            if not prompt.tools:
                # Nothing follows that would read the question again, and writing it costs 1.25 times. With tools the next round does:
                # then OpenAI marks the end of each by itself.
                request["prompt_cache_options"] = {"mode": "explicit"}
        if prompt.tools:
            request["tools"] = [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": dict(tool.input_schema),
                    "strict": False,
                }
                for tool in prompt.tools
            ]
        if (schema := bound_schema(prompt, candidate)) is not None:
            request["text"] = {"format": {"type": "json_schema", **schema}}
        if "reasoning" in candidate.capabilities:
            request["include"] = ["reasoning.encrypted_content"]
            reasoning = {"summary": "auto"} if draft.on_reasoning is not None else {}
            if output_tokens_max < BRIEF_BELOW_TOKENS:
                reasoning["effort"] = draft.effort = "low"
            if reasoning:
                request["reasoning"] = reasoning
        return request

    def _items(self, message: Message, *, marked: bool = False) -> list[dict[str, Any]]:
        if message.role == "tool":
            return [{"type": "function_call_output", "call_id": result.call_id, "output": result.text} for result in message.results]
        items: list[dict[str, Any]] = []
        said: list[dict[str, Any]] = []
        if message.images:
            parts: list[dict[str, Any]] = [
                {"type": "input_image", "image_url": data_url(image), "detail": "auto"} for image in message.images
            ]
            said = [{"role": message.role, "content": [*parts, {"type": "input_text", "text": message.text}]}]
        elif message.text:
            content = [{"type": "input_text", "text": message.text, **_KEPT}] if marked else message.text
            said = [{"role": message.role, "content": content}]
        for number, call in enumerate(message.calls):
            if own := unsealed(self._provider, call.signature):  # what it thought goes before all that came of it
                items += orjson.loads(own)
            if number == 0:
                items += said
            items.append({"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments})
        return items if message.calls else said
