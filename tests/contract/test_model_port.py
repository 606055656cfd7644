"""What every model keeps to, whichever provider is behind it: the draft tells the truth at any moment, and a cancel ends the call."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from bench.script import Behaviour
from bench.simulator import Provider
from services.orchestrator.claude_model import ClaudeModel
from services.orchestrator.domain import Candidate, Draft, Message, Passage, Prompt
from services.orchestrator.extractive_model import ExtractiveModel
from services.orchestrator.standalone import language
from tests.contract.model_subjects import SUBJECTS, Subject, subject_of
from tests.fakes.orchestrator_world import provider_server, until

TEXT = "The gateway listens on port 8080. The gateway speaks HTTP and gRPC. Holds live for ten minutes."
PASSAGE = Passage(1, "d1", "c1", "Gateway", "guide.md", TEXT, 0, len(TEXT), 1.0)
FINISH_REASONS = {"end_turn", "max_tokens", "stop_sequence", "refusal", "tool_use", "context_window"}


def prompt(question: str = "Which port does the gateway listen on?") -> Prompt:
    return Prompt("t", "Answer.", (Message("user", f'<passage n="1">{TEXT}</passage> {question}'),), question, (PASSAGE,), 500)


@pytest.fixture
async def provider() -> Provider:
    return Provider()


@pytest.fixture(params=["extractive", *SUBJECTS])
async def subject(request: pytest.FixtureRequest, provider: Provider) -> AsyncIterator[Subject]:
    """Each implementation in turn."""
    if request.param == "extractive":
        yield Subject(ExtractiveModel(language), Candidate("extractive", "extractive", 1_000_000, 64_000))
        return
    async with provider_server(provider) as url, subject_of(request.param, url) as made:
        yield made


def draft(heard: list[str] | None = None, then: Callable[[], None] = lambda: None) -> Draft:
    def hear(piece: str) -> None:
        if heard is not None:
            heard.append(piece)
        then()

    return Draft(hear)


async def test_every_piece_is_heard_at_once_and_joins_to_the_text(subject: Subject) -> None:
    """Nothing of the text comes by another way than `write`, and no piece is empty."""
    heard: list[str] = []
    made = draft(heard)
    await subject.model.generate(prompt(), subject.candidate, 1000, made)

    assert made.text == "".join(heard) != ""
    assert all(heard)


async def test_whole_answer_ends_with_a_known_reason_and_final_counts(subject: Subject) -> None:
    """A call that returns has said why it ended and what it used."""
    made = draft()
    await subject.model.generate(prompt(), subject.candidate, 1000, made)
    _, estimated = made.usage(prompt())

    assert made.finish_reason in FINISH_REASONS
    assert not estimated
    assert made.sent
    assert made.model == subject.candidate.model


async def test_answer_stops_at_the_bound_it_was_given(subject: Subject) -> None:
    """The bound of the hold is the bound of the call."""
    made = draft()
    await subject.model.generate(prompt("What does the gateway listen on and speak?"), subject.candidate, 3, made)

    assert made.finish_reason == "max_tokens"


async def test_cancel_in_the_middle_leaves_a_truthful_draft(subject: Subject) -> None:
    """CancelledError comes out, what was heard stays, and the counts cover it."""
    calling: asyncio.Task[None] | None = None

    def stop() -> None:
        assert calling is not None
        calling.cancel()

    made = draft(then=stop)
    calling = asyncio.create_task(
        subject.model.generate(prompt("What does the gateway listen on and speak?"), subject.candidate, 1000, made)
    )
    with pytest.raises(asyncio.CancelledError):
        await calling
    usage, _ = made.usage(prompt())

    assert made.text
    assert usage.output_tokens >= 0
    assert not made.finish_reason or made.usage_is_final


async def test_calls_side_by_side_do_not_mix(subject: Subject) -> None:
    """Twenty at once, each its own."""
    drafts = [draft() for _ in range(20)]
    await asyncio.gather(*(subject.model.generate(prompt(), subject.candidate, 1000, made) for made in drafts))

    assert len({made.text for made in drafts}) == 1


async def test_claude_closes_the_socket_within_a_moment_of_a_cancel(provider: Provider) -> None:
    """Cancelled before, in and between tokens: the provider sees the socket close, and nothing goes back into the pool half-read."""
    provider.default = Behaviour(tokens=1000, tokens_per_s=100, ttft_ms=30)
    async with provider_server(provider) as url:
        model = ClaudeModel(["key"], url, connect_s=1, first_token_s=5, stall_s=5)
        for wait_s in (0.01, 0.05, 0.1, 0.15):
            calling = asyncio.create_task(model.generate(prompt(), Candidate("anthropic", "claude-haiku-5-5", 1, 1), 1000, draft()))
            await asyncio.sleep(wait_s)
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
        await until(lambda: all(record.state == "client_closed" for record in provider.records), 1.0)
        provider.default = Behaviour(text="All well.")
        made = draft()
        await model.generate(prompt(), Candidate("anthropic", "claude-haiku-5-5", 1, 1), 1000, made)
        await model.aclose()

    assert made.text == "All well."
    assert len(provider.records) >= 4


async def test_claude_sends_the_stable_part_as_a_prefix_that_may_be_kept(provider: Provider) -> None:
    """The system prompt is marked for the provider's cache and holds nothing of the question."""
    async with provider_server(provider) as url:
        model = ClaudeModel(["key"], url, connect_s=1, first_token_s=5, stall_s=5)
        await model.generate(prompt(), Candidate("anthropic", "claude-haiku-5-5", 1, 1), 10, draft())
        await model.aclose()
    sent = provider.prompts[-1]

    assert b'"cache_control":{"type":"ephemeral"}' in sent.replace(b": ", b":").replace(b", ", b",")
    assert b'"max_tokens":10' in sent.replace(b": ", b":")


async def test_claude_that_cannot_be_reached_was_sent_nothing() -> None:
    """A refused connection costs nothing, and the draft says so: its hold is given back."""
    from services.chassis.errors import ModelFailed

    model = ClaudeModel(["key"], "http://127.0.0.1:1", connect_s=1, first_token_s=5, stall_s=5)
    made = draft()
    with pytest.raises(ModelFailed) as failed:
        await model.generate(prompt(), Candidate("anthropic", "claude-haiku-5-5", 1, 1), 10, made)
    await model.aclose()

    assert failed.value.metadata["cause"] == "connect"
    assert not made.sent
