"""Chat Completions: the interface every server of one's own speaks (vLLM, Ollama, llama.cpp), Azure too, and OpenAI itself.

Only its requests and events are known here; client and errors are in `openai_model`.
"""

from typing import Any

import msgspec
import openai

from services.orchestrator.domain import Candidate, Draft, Message, Prompt
from services.orchestrator.model_stream import Reading
from services.orchestrator.openai_model import Details, ErrorBody, OpenAiModel, OutputDetails, bound_schema, count, data_url, failed_midway

FINISH_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
"""Finish reasons as ours. Any other means that the answer is not whole."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    completion_tokens_details: OutputDetails | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """Every chunk of the stream; only what is read of it. Unknown fields pass by."""

    id: str | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: ErrorBody | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class ChatReading(Reading):
    """The chunks of a completion. Each ends with usage in a chunk of its own, and `[DONE]`; some servers leave out either."""

    def __init__(self, provider: str, draft: Draft) -> None:
        super().__init__(provider, draft)
        self._refused = False
        self._named: dict[int, str] = {}
        """Ids of the calls as they were begun, by index."""

    def read(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.whole = self.finished = True
            return
        chunk = _decode(data)
        if chunk.error is not None:
            raise failed_midway(self, chunk.error)
        for choice in chunk.choices or ():
            if choice.delta is not None:
                self._more(chunk, choice.delta)
            if choice.finish_reason:
                self._finish(choice.finish_reason)
        if (used := chunk.usage) is not None:
            details = used.prompt_tokens_details, used.completion_tokens_details
            count(self.draft, used.prompt_tokens, used.completion_tokens, *details)
            self.draft.usage_is_final &= self.finished  # some servers count along
        if not self.draft.request_id and chunk.id:
            self.draft.request_id = chunk.id
        self.named(chunk.model)
        self.identified(chunk.id)

    def _more(self, chunk: _Chunk, delta: _Delta) -> None:
        if thought := delta.reasoning_content or delta.reasoning:
            self.think(thought)
        if delta.content:
            self.write(delta.content)
        elif delta.refusal:
            self._refused = True
            self.write(delta.refusal)
        for position, call in enumerate(delta.tool_calls or ()):
            self._call(chunk, position if call.index is None else call.index, call)

    def _call(self, chunk: _Chunk, index: int, call: _Call) -> None:
        function = call.function or _Function()
        if function.name and self._named.get(index) != (call.id or ""):
            if index in self.open_calls:  # some servers send several whole calls under one index
                self.end_call(index)
            self._named[index] = call.id or ""
            number = len(self.draft.calls) + len(self.open_calls)
            self.begin_call(index, call.id or f"{chunk.id or 'call'}-{number}", function.name)
        if function.arguments:
            self.argue(index, function.arguments)

    def _finish(self, reason: str) -> None:
        self.finished = True
        ours = FINISH_REASONS.get(reason, "")
        if ours in ("end_turn", "tool_use"):
            for key in list(self.open_calls):
                self.end_call(key)
            if self.draft.calls:  # some servers say `stop` here too
                ours = "tool_use"
        self.draft.finish_reason = "refusal" if self._refused and ours == "end_turn" else ours


class OpenAiChatModel(OpenAiModel):
    """Calls Chat Completions, of OpenAI or of any server that has taken over its format."""

    def opened(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Any:
        return client.chat.completions.with_streaming_response.create(**request)

    def reading(self, draft: Draft) -> Reading:
        return ChatReading(self._provider, draft)

    def request(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": prompt.system}]
        for message in prompt.messages:
            messages += _messages(message)
        request: dict[str, Any] = {
            "model": candidate.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            # The old name is the one that every server knows; OpenAI itself refuses it for models that reason.
            "max_completion_tokens" if self.is_vendor else "max_tokens": output_tokens_max,
            "extra_headers": {"accept-encoding": "identity"},  # the bytes are read as they come
        }
        if prompt.tools:
            request["tools"] = [
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.input_schema)},
                }
                for tool in prompt.tools
            ]
        if (schema := bound_schema(prompt, candidate)) is not None:
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


def _messages(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [{"role": "tool", "tool_call_id": result.call_id, "content": result.text} for result in message.results]
    if message.images:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in message.images]
        return [{"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}]
    made: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.calls:
        made["content"] = message.text or None
        made["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.calls
        ]
    return [made]
