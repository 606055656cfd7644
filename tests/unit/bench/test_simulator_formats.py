"""The provider simulator speaks OpenAI's and Gemini's formats so that their own packages understand all of it, typed and whole."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from google import genai
from google.genai import types
from openai import AsyncOpenAI, RateLimitError

from bench.provider import Simulator
from bench.script import Behaviour, ScriptedCall

SAID = Behaviour(
    reasoning="Let me see.",
    text="It is [1] 8080.",
    calls=(ScriptedCall(name="now", arguments='{"zone":"UTC"}'), ScriptedCall(name="sky", arguments='{"city":"Bonn"}')),
    cached_tokens=3,
    cache_write_tokens=2,
)
CALLS = [("now", {"zone": "UTC"}), ("sky", {"city": "Bonn"})]
ASKED: list[Any] = [{"role": "user", "content": "Which port is it that the gateway listens on?"}]
QUESTION = "Which port is it that the gateway listens on?"


@pytest.fixture
async def openai_client(provider: Simulator) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's package, pointed at the simulator."""
    async with AsyncOpenAI(base_url=f"{provider.url}/v1", api_key="k", max_retries=0, timeout=5) as client:
        yield client


@pytest.fixture
async def gemini_client(provider: Simulator) -> AsyncIterator[genai.client.AsyncClient]:
    """Google's package, pointed at the simulator."""
    client = genai.Client(vertexai=False, api_key="k", http_options=types.HttpOptions(base_url=provider.url)).aio
    yield client
    await client.aclose()


async def test_chat_completions_are_read_by_the_package(provider: Simulator, openai_client: AsyncOpenAI) -> None:
    """Streamed as whole, with the same calls and the same bill."""
    await provider.behave(SAID)
    create = openai_client.chat.completions.create
    stream = await create(model="m", messages=ASKED, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = await create(model="m", messages=ASKED)
    (first, second), usage = await provider.records(), chunks[-1].usage
    message = whole.choices[0].message

    assert text == message.content == SAID.text
    assert [
        (call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or () if call.type == "function"
    ] == CALLS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason == "tool_calls"
    assert usage is not None and usage.prompt_tokens_details is not None and whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (first.input_tokens, first.output_tokens)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (second.input_tokens, second.output_tokens)
    assert (usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens_details.cache_write_tokens) == (3, 2)


async def test_usage_is_told_only_to_who_asks_for_it(provider: Simulator, openai_client: AsyncOpenAI) -> None:
    """As the real interface does it: an adapter that forgets to ask has no counts."""
    stream = await openai_client.chat.completions.create(model="m", messages=ASKED, stream=True)

    assert [chunk.usage async for chunk in stream if chunk.usage] == []


async def test_responses_are_read_by_the_package(provider: Simulator, openai_client: AsyncOpenAI) -> None:
    """Its own helper puts the stream together."""
    await provider.behave(SAID)
    stream = await openai_client.responses.create(model="m", input=ASKED, stream=True)
    events = [event async for event in stream]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    whole = await openai_client.responses.create(model="m", input=ASKED)
    first, second = await provider.records()
    last = events[-1]

    assert (text, whole.output_text, thought) == (SAID.text, SAID.text, SAID.reasoning)
    assert [(item.name, json.loads(item.arguments)) for item in done if item.type == "function_call"] == CALLS
    assert [(item.name, json.loads(item.arguments)) for item in whole.output if item.type == "function_call"] == CALLS
    assert last.type == "response.completed" and last.response.usage is not None and whole.usage is not None
    assert (last.response.usage.input_tokens, last.response.usage.output_tokens) == (first.input_tokens, first.output_tokens)
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (second.input_tokens, second.output_tokens)
    assert last.response.usage.output_tokens_details.reasoning_tokens == 3


async def test_gemini_is_read_by_the_package(provider: Simulator, gemini_client: genai.client.AsyncClient) -> None:
    """Streamed as whole, with the same calls and the same bill."""
    await provider.behave(SAID)
    stream = await gemini_client.models.generate_content_stream(model="gemini-3.8-flash", contents=QUESTION)
    chunks = [chunk async for chunk in stream]
    parts = [part for chunk in chunks for part in (chunk.parts or ())]
    whole = await gemini_client.models.generate_content(model="gemini-3.8-flash", contents=QUESTION)
    first, second = await provider.records()
    text = "".join(part.text or "" for part in parts if not part.thought)
    usage, usage_whole = chunks[-1].usage_metadata, whole.usage_metadata

    assert text == "".join(part.text or "" for part in whole.parts or () if not part.thought) == SAID.text
    assert "".join(part.text or "" for part in parts if part.thought) == SAID.reasoning
    assert [(part.function_call.name, part.function_call.args) for part in parts if part.function_call] == CALLS
    assert [(call.name, call.args) for call in whole.function_calls or ()] == CALLS
    assert usage is not None and usage_whole is not None
    assert (usage.prompt_token_count, usage.cached_content_token_count, usage.thoughts_token_count) == (first.input_tokens, 3, 3)
    assert usage.total_token_count == first.input_tokens + first.output_tokens
    assert usage_whole.total_token_count == second.input_tokens + second.output_tokens


async def test_a_refusal_is_told_in_the_vendors_own_words(
    provider: Simulator, openai_client: AsyncOpenAI, gemini_client: genai.client.AsyncClient
) -> None:
    """Each package makes its own error of it, and the wait that is asked for arrives."""
    await provider.behave(Behaviour(fault="status", status=429, retry_after_s=3))
    with pytest.raises(RateLimitError) as limited:
        await openai_client.responses.create(model="m", input=ASKED)
    with pytest.raises(genai.errors.ClientError) as refused:
        await gemini_client.models.generate_content(model="gemini-3.8-flash", contents=QUESTION)

    assert (limited.value.code, limited.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "3")
    assert (refused.value.code, refused.value.status) == (429, "RESOURCE_EXHAUSTED")


async def test_nobody_is_answered_without_a_key(provider: Simulator) -> None:
    """Each format has its own place for it."""
    async with httpx.AsyncClient(base_url=provider.url, trust_env=False) as http:
        paths = ("/v1/chat/completions", "/v1/responses", "/v1beta/models/m:streamGenerateContent", "/v1/messages")
        statuses = [(await http.post(path, json={})).status_code for path in paths]

    assert statuses == [401, 401, 403, 401]
    assert await provider.records() == []
