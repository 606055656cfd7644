"""The whole chain over real channels: what a reader sees, what is booked, what the cache serves again."""

import copy
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.chassis.errors import BudgetExhausted, ModelUnknown, NotAllowed, RequestInvalid, Unavailable
from services.chassis.principal import Principal
from services.chassis.wire import usage_value
from services.local.stores import Valkey
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, BOB, PRICES, Reply, World, world
from tests.suite import until


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator with a key, at the simulated provider."""
    async with world(tmp_path, valkey.url) as running:
        yield running


@pytest.fixture
async def keyless(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator without any key."""
    async with world(tmp_path, valkey.url, with_key=False) as running:
        yield running


async def test_answer_is_one_numbered_stream_from_accepted_to_done(claude: World) -> None:
    """Terminal law: `accepted` first, numbers grow by one, exactly one `done`, last; its hash is that of the joined text."""
    reply = await claude.ask("Which port does the gateway listen on?", tier="fast", cache=pb.CACHE_MODE_OFF)

    assert [event.sequence for event in reply.events] == list(range(1, len(reply.events) + 1))
    assert reply.kinds[0] == "accepted"
    assert reply.kinds.count("done") == 1
    assert reply.done.text_sha256 == hashlib.sha256(reply.text.encode()).hexdigest()
    assert reply.done.verdict == "passed"
    assert {"recall", "passages", "compose", "hold", "generate", "validate", "record"} <= reply.steps().keys()
    assert len(reply.events[0].accepted.trace_id) == 32


async def test_events_of_one_moment_share_a_message_only_with_a_reader_that_asks_for_it(claude: World) -> None:
    alone = await claude.ask("Which port does the gateway listen on?")
    assert not any(event.more for event in alone.events)
    together = Reply()
    request = pb.ResumeAnswerRequest(answer_id=alone.answer_id, batches=True)
    async with claude.caller.stream(claude.stub.ResumeAnswer, request, timeout_s=60, principal=ALICE) as messages:
        async for message in messages:
            more = list(message.more)
            message.ClearField("more")
            together.events += [message, *more]
            assert len(more) > 1
    assert together.events == alone.events
    fresh = await claude.ask("And what else is there to know?", cache=pb.CACHE_MODE_OFF, batches=True)
    assert len(fresh.events) < 0.8 * len(alone.events)  # what a step leaves and what the next begins with come together


async def test_no_text_comes_before_the_step_that_writes_it(keyless: World) -> None:
    """Also from a model that writes before anything else could run; and each change of a step is told once."""
    reply = await keyless.ask("Which port does the gateway listen on?")
    changes = [
        (event.step.name, event.step.status) if event.HasField("step") else ("", str(event.WhichOneof("event"))) for event in reply.events
    ]
    steps = [change for change in changes if change[0]]

    assert changes.index(("generate", "running")) < changes.index(("", "delta")) < changes.index(("generate", "done"))
    assert len(steps) == len(set(steps))


async def test_citations_point_at_the_markers_in_the_text(claude: World) -> None:
    """A citation's offsets cut exactly its marker out of the text."""
    claude.behave(text="Schön: the gateway listens on 8080 [1]. Holds live ten minutes [2].")
    reply = await claude.ask("Which port does the gateway listen on, and how long do holds live?", cache=pb.CACHE_MODE_OFF)
    citations = [event.citation for event in reply.events if event.HasField("citation")]

    assert [reply.text[c.start : c.end] for c in citations] == ["[1]", "[2]"]
    assert [c.document_id for c in citations] == ["d1", "d2"]


async def test_books_agree_with_the_provider_to_the_token(claude: World) -> None:
    """What is recorded is what the provider billed, and the cost is that usage at the held price."""
    claude.behave(tokens=37)
    reply = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_OFF)
    operation = await claude.booked(reply.answer_id)
    (record,) = await claude.records()

    assert (operation.usage.input_tokens, operation.usage.output_tokens) == (record.input_tokens, record.output_tokens)
    assert operation.cost_nanousd == PRICES["claude-haiku-5-5"].cost_nanousd(usage_value(operation.usage)) == reply.done.cost_nanousd
    assert operation.attempts[0].provider_request_id == record.request_id
    assert not claude.ledger.open_holds
    assert not operation.estimated


async def test_same_question_again_is_an_exact_hit_that_costs_nothing(claude: World) -> None:
    """The second asking is served from Redis: same text, no provider call, its own operation, what was saved."""
    first = await claude.ask("Which port does the gateway listen on?")
    second = await claude.ask("which port  does the gateway listen on")

    assert second.text == first.text
    assert second.done.cache.verdict == "exact"
    assert second.done.cache.source_answer_id == first.answer_id
    assert second.done.cache.source_question == "Which port does the gateway listen on?"
    assert second.done.cache.saved_nanousd == first.done.cost_nanousd > 0
    assert second.done.cost_nanousd == 0
    assert len(await claude.records()) == 1
    assert (await claude.booked(second.answer_id)).cache.verdict == "exact"
    # What an older world left in the shared Valkey may be held at first; only an answer of this epoch ends a recall.
    assert [recall.held_epoch == claude.retrieval.epoch for recall in claude.retrieval.recalls] == [False, True]


async def test_hit_of_another_user_hides_their_question(claude: World) -> None:
    """A tenant shares answers, not what its users typed."""
    await claude.ask("Which port does the gateway listen on?")
    reply = await claude.ask("Which port does the gateway listen on?", principal=BOB)

    assert reply.done.cache.verdict == "exact"
    assert not reply.done.cache.HasField("source_question")


async def test_other_tenant_never_hits(claude: World) -> None:
    """The tenant is part of the key."""
    await claude.ask("Which port does the gateway listen on?")
    reply = await claude.ask("Which port does the gateway listen on?", principal=type(ALICE)("globex", "alice"))

    assert reply.done.cache.verdict == "miss"


async def test_changed_documents_make_older_answers_unreachable(claude: World) -> None:
    """An answer we hold is served only while its epoch is the collection's."""
    await claude.ask("Which port does the gateway listen on?")
    claude.retrieval.epoch += 1
    reply = await claude.ask("Which port does the gateway listen on?")

    assert reply.done.cache.verdict == "miss"


async def test_an_answer_of_one_audience_is_not_served_to_another(claude: World) -> None:
    """The very same words, the very same epoch: who may read other documents is asked anew, and both are answered for themselves."""
    question = "Which port does the gateway listen on?"
    claude.retrieval.audience = "those who may read the salaries"
    first = await claude.ask(question)
    claude.retrieval.audience = "the others"
    other = await claude.ask(question, principal=BOB)
    again = await claude.ask(question, principal=BOB)

    assert [reply.done.cache.verdict for reply in (first, other, again)] == ["miss", "miss", "exact"]
    assert again.done.cache.source_answer_id == other.answer_id
    assert [request.audience for request in claude.retrieval.remembered] == ["those who may read the salaries", "the others"]


async def test_an_answer_given_a_passage_with_instructions_is_not_remembered(claude: World) -> None:
    """Neither tier keeps it; the reader is shown the flag."""
    first_passage, *others = claude.retrieval.passages
    claude.retrieval.passages = [copy.deepcopy(first_passage), *others]
    claude.retrieval.passages[0].flags.append("override")
    first = await claude.ask("Which port does the gateway listen on?")
    again = await claude.ask("Which port does the gateway listen on?")

    assert [reply.done.cache.verdict for reply in (first, again)] == ["miss", "miss"]
    assert claude.retrieval.remembered == []
    shown = [event.passages.passages[0] for event in first.events if event.HasField("passages")]
    assert [list(passage.flags) for passage in shown] == [["override"]]


async def test_off_neither_serves_nor_remembers_and_refresh_only_remembers(claude: World) -> None:
    """The three cache modes."""
    off = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_OFF)
    refreshed = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_REFRESH)
    used = await claude.ask("Which port does the gateway listen on?")

    assert (off.done.cache.verdict, off.done.cache.reason) == ("off", "requested")
    assert (refreshed.done.cache.verdict, refreshed.done.cache.reason) == ("miss", "requested")
    assert used.done.cache.source_answer_id == refreshed.answer_id


async def test_semantic_hit_says_how_similar_it_was(claude: World) -> None:
    """A hit of the memory is served with its similarity."""
    first = await claude.ask("Which port does the gateway listen on?")
    claude.retrieval.semantic["What port is the gateway on?"] = (claude.retrieval.remembered[-1].answer, 0.97)
    reply = await claude.ask("What port is the gateway on?")

    assert reply.text == first.text
    assert reply.done.cache.verdict == "semantic"
    assert reply.done.cache.similarity == pytest.approx(0.97)


async def test_follow_up_gets_the_conversation_and_no_cache(claude: World) -> None:
    """A question that leans on the conversation is asked with it, searched with it, and never cached."""
    await claude.ask("Which port does the gateway listen on?", session_id="s1")
    reply = await claude.ask("Why does it?", session_id="s1")
    again = await claude.ask("Why does it?", session_id="s1")

    assert reply.done.cache.reason == "context_dependent"
    assert again.done.cache.reason == "context_dependent"
    assert b"Which port does the gateway" in claude.provider.prompts[-1]
    assert claude.retrieval.recalls[-1].question.startswith("Which port does the gateway listen on?\n")


async def test_question_that_stands_alone_is_a_hit_in_another_session(claude: World) -> None:
    """A conversation changes nothing for a question that does not need it."""
    await claude.ask("Which port does the gateway listen on?", session_id="s1")
    reply = await claude.ask("Which port does the gateway listen on?", session_id="s2")

    assert reply.done.cache.verdict == "exact"


async def test_question_about_now_is_never_cached(claude: World) -> None:
    """The clock is not part of the key, so what depends on it has none."""
    await claude.ask("Which port does the gateway listen on today?")
    reply = await claude.ask("Which port does the gateway listen on today?")

    assert (reply.done.cache.verdict, reply.done.cache.reason) == ("miss", "time_dependent")


async def test_answer_with_an_invented_citation_is_told_and_not_remembered(claude: World) -> None:
    """A number that no passage has is a verdict, not a citation."""
    claude.behave(text="The gateway listens on 8080 [7].")
    first = await claude.ask("Which port does the gateway listen on?")
    second = await claude.ask("Which port does the gateway listen on?")

    assert first.done.verdict == "citation_unknown"
    assert "citation" not in first.kinds
    assert second.done.cache.verdict == "miss"


@pytest.mark.parametrize(
    ("fault", "finish_reason", "verdict"),
    [("refusal", "refusal", "refused"), ("max_tokens", "max_tokens", "cut"), ("context_window", "context_window", "context_overflow")],
)
async def test_stop_reasons_are_told_and_only_whole_answers_remembered(claude: World, fault: str, finish_reason: str, verdict: str) -> None:
    """A refusal or a cut answer ends with its reason and is not kept."""
    claude.behave(fault=fault)
    first = await claude.ask("Which port does the gateway listen on?")
    second = await claude.ask("Which port does the gateway listen on?")

    assert (first.done.finish_reason, first.done.verdict) == (finish_reason, verdict)
    assert second.done.cache.verdict == "miss"


async def test_without_a_key_the_passages_answer_for_themselves(keyless: World) -> None:
    """The extractive model answers with the right sentence, cited, at no cost, and says what it is."""
    reply = await keyless.ask("Which port does the gateway listen on?")

    assert reply.text.startswith("The gateway listens on port 8080. [1]")
    assert (reply.done.provider, reply.done.model, reply.done.cost_nanousd) == ("extractive", "extractive", 0)
    assert "citation" in reply.kinds


async def test_without_a_key_no_answer_is_made_up(keyless: World) -> None:
    """What the passages do not say, the extractive model did not find."""
    reply = await keyless.ask("Who painted the ceiling of the Sistine Chapel?")

    assert "do not seem to answer" in reply.text
    assert "citation" not in reply.kinds


async def test_history_is_kept_as_turns_with_their_citations(claude: World) -> None:
    """The conversation holds question, text and what is cited."""
    claude.behave(text="It listens on 8080 [1].")
    reply = await claude.ask("Which port does the gateway listen on?", session_id="s9")
    (turn,) = claude.ledger.turns["s9"]

    assert (turn.question, turn.text, turn.complete) == ("Which port does the gateway listen on?", reply.text, True)
    assert [passage.number for passage in turn.citations] == [1]


async def test_models_are_those_that_are_configured(claude: World, tmp_path: Path, valkey: Valkey) -> None:
    """A provider without a key is not offered."""
    with_key = await claude.caller.unary(claude.stub.ListModels, pb.ListModelsRequest(), principal=ALICE)
    async with world(tmp_path / "other", valkey.url, with_key=False) as other:
        without = await other.caller.unary(other.stub.ListModels, pb.ListModelsRequest(), principal=ALICE)

    assert with_key.default_tier == "fast"
    assert {model.model for model in with_key.models} > {"claude-haiku-5-5", "claude-sonnet-5-5"}
    assert [(model.model, sorted(model.tiers)) for model in without.models] == [("extractive", ["auto", "best", "fast", "smart"])]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"question": ""}, "question"),
        ({"question": " \n\t "}, "question"),
        ({"question": "a\x00b"}, "question"),
        ({"question": "é" * 16_385}, "question"),
        ({"question": "x", "session_id": "a b"}, "session_id"),
        ({"question": "x", "session_id": "a" * 65}, "session_id"),
        ({"question": "x", "collection": "../etc"}, "collection"),
        ({"question": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"question": "x", "max_output_tokens": 64_001}, "max_output_tokens"),
        ({"question": "x", "idempotency_key": "k" * 257}, "idempotency_key"),
        ({"question": "x", "cache": 9}, "cache"),
        ({"question": "x", "output_schema": {"type": "object"}}, "output_schema"),
        ({"question": "x", "tools": [pb.ToolDefinition(name="t")]}, "tools"),
    ],
)
async def test_bad_field_is_named(keyless: World, fields: dict[str, object], field: str) -> None:
    """Every bound of the contract is checked before anything happens."""
    with pytest.raises(RequestInvalid) as refused:
        await keyless.ask(**fields)  # type: ignore[arg-type]

    assert refused.value.field == field
    assert not keyless.ledger.operations


async def test_largest_question_is_answered(keyless: World) -> None:
    """The bound itself is allowed."""
    reply = await keyless.ask("port " * 6553 + "gat")

    assert reply.done.verdict == "passed"


@pytest.mark.parametrize("fields", [{"model": "gpt-none"}, {"tier": "royal"}])
async def test_unknown_model_or_tier_is_its_own_error(keyless: World, fields: dict[str, str]) -> None:
    """What is not configured cannot be asked."""
    with pytest.raises(ModelUnknown):
        await keyless.ask("Which port?", **fields)


async def test_budget_that_cannot_pay_stops_before_the_provider(claude: World) -> None:
    """No hold, no byte to the provider; the refusal is recorded."""
    claude.ledger.broke = True
    with pytest.raises(BudgetExhausted):
        await claude.ask("Which port does the gateway listen on?")

    assert not claude.provider.records
    (operation,) = claude.ledger.operations.values()
    assert (operation.status, operation.error_reason, len(operation.attempts)) == ("failed", "BUDGET_EXHAUSTED", 0)


async def test_the_receipt_says_how_much_of_the_output_was_reasoning(claude: World) -> None:
    """As a part of it: it is paid once."""
    claude.behave(reasoning="Ports have numbers.", text="It is 8080 [1].")
    reply = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_OFF)
    operation = await claude.booked(reply.answer_id)
    generated = next(event.step.facts for event in reply.events if event.step.name == "generate" and event.step.status == "done")

    assert (reply.done.reasoning_tokens, reply.done.usage.output_tokens) == (3, 7)
    assert generated["reasoning_tokens"] == "3"
    assert reply.done.cost_nanousd == operation.cost_nanousd == PRICES["claude-haiku-5-5"].cost_nanousd(usage_value(reply.done.usage))


async def test_answer_is_made_as_short_as_the_budget_can_pay(claude: World) -> None:
    """The provider is given the bound that was granted, the step `hold` says so, and the answer costs no more than was held."""
    claude.ledger.affordable = 300
    claude.behave(tokens=2000)
    reply = await claude.ask("Which port does the gateway listen on?", max_output_tokens=4000, cache=pb.CACHE_MODE_OFF)
    (record,) = await claude.records()
    held = next(event.step.facts for event in reply.events if event.step.name == "hold" and event.step.status == "done")

    assert (record.max_tokens, record.output_tokens) == (300, 300)
    assert (held["output_tokens_max"], held["output_tokens_wanted"]) == ("300", "4000")
    assert reply.done.finish_reason == "max_tokens"
    assert reply.done.cost_nanousd <= int(held["held_nanousd"])


@pytest.mark.parametrize(("affordable", "wanted"), [(255, 4000), (99, 100), (0, 4000)])
async def test_answer_that_would_be_too_short_is_refused(claude: World, affordable: int, wanted: int) -> None:
    """Below the least length, or below what a short question asked for, nothing is sent to the provider."""
    claude.ledger.affordable = affordable
    with pytest.raises(BudgetExhausted):
        await claude.ask("Which port does the gateway listen on?", max_output_tokens=wanted, cache=pb.CACHE_MODE_OFF)

    assert not claude.provider.records
    assert not claude.ledger.holds


async def test_ledger_away_refuses_and_says_so(claude: World) -> None:
    """The ledger fails closed: no hold, no answer."""
    claude.ledger.away = True
    with pytest.raises(Unavailable) as refused:
        await claude.ask("Which port does the gateway listen on?")

    assert refused.value.metadata["dependency"] == "postgres"
    assert not claude.provider.records


async def test_retrieval_away_refuses_and_says_so(claude: World) -> None:
    """Nothing is answered from nothing."""
    claude.retrieval.away = True
    with pytest.raises(Unavailable) as refused:
        await claude.ask("Which port does the gateway listen on?")

    assert refused.value.metadata["dependency"] == "qdrant"


async def test_the_plan_says_whom_a_cached_answer_is_shared_with(claude: World) -> None:
    """Kept for one it is served to this one alone, kept for the tenant not to who shares nothing, and `off` neither serves nor keeps."""
    question = "Which port does the gateway listen on?"

    async def told(who: Principal, scope: str, asked: str = question) -> str:
        return (await claude.ask(asked, principal=replace(who, cache_scope=scope))).done.cache.verdict

    assert [await told(ALICE, "user"), await told(BOB, "user"), await told(ALICE, "user")] == ["miss", "miss", "exact"]
    assert [await told(BOB, "tenant"), await told(ALICE, "tenant"), await told(BOB, "")] == ["miss", "exact", "exact"]
    assert await told(ALICE, "off") == "off"
    other = "Which port does the ledger listen on?"
    assert [await told(ALICE, "off", other), await told(ALICE, "tenant", other)] == ["off", "miss"]


async def test_the_status_tells_of_the_spool_to_services_alone(claude: World) -> None:
    """Nothing waits once all is booked."""
    service = replace(ALICE, roles=frozenset({"service"}))
    with pytest.raises(NotAllowed):
        await claude.caller.unary(claude.stub.GetStatus, pb.GetStatusRequest(), principal=ALICE)
    reply = await claude.ask("Which port does the gateway listen on?", cache=pb.CACHE_MODE_OFF)
    await claude.booked(reply.answer_id)

    async def drained() -> bool:
        told = await claude.caller.unary(claude.stub.GetStatus, pb.GetStatusRequest(), principal=service)
        return told.spool.size_bytes > 4096 and told.spool == pb.SpoolStatus(size_bytes=told.spool.size_bytes)

    await until(drained)
