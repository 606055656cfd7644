"""Conversations over real channels: follow-ups, branches, summaries, titles, and the prompts that an administrator may see."""

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from bench.script import Behaviour
from services.chassis.errors import AnswerLogGone, NotAllowed, NotFound, RequestInvalid
from services.chassis.principal import Principal
from services.chassis.wire import usage_value
from services.local.stores import Valkey
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tests.fakes.orchestrator_world import ALICE, BOB, PRICES, Reply, World, replica, until, world

PORT = "Which port does the gateway listen on?"
REWRITE, SUMMARY, TITLE = b"You rewrite the last question", b"You summarise the earlier part", b"You give a conversation a title"
ROOT = Principal("acme", "root", frozenset({"user", "admin"}))


@pytest.fixture
async def keyless(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """An orchestrator without any key, that keeps two turns whole."""
    async with world(tmp_path, valkey.url, with_key=False, TAILRACE_ORCHESTRATOR_HISTORY_TURNS_MAX="2") as running:
        yield running


@pytest.fixture
async def claude(tmp_path: Path, valkey: Valkey) -> AsyncIterator[World]:
    """One whose provider does the small work too, and that keeps prompts."""
    settings = {
        "TAILRACE_ORCHESTRATOR_HISTORY_TURNS_MAX": "2",
        "TAILRACE_ORCHESTRATOR_REWRITES": "model",
        "TAILRACE_ORCHESTRATOR_TITLES": "model",
        "TAILRACE_ORCHESTRATOR_PROMPTS_KEPT_S": "60",
    }
    async with world(tmp_path, valkey.url, **settings) as running:
        yield running


def says(running: World, to: bytes, **behaviour: Any) -> None:
    """What the provider does when it is told `to`."""
    running.provider.rules.append((to, Behaviour(**behaviour)))


def step(reply: Reply, name: str) -> dict[str, str]:
    """The facts of an ended step."""
    return next(
        dict(event.step.facts) for event in reply.events if event.HasField("step") and event.step.name == name and event.step.duration_ms
    )


async def errands(running: World, purpose: str, count: int = 1) -> list[ledger_pb.Operation]:
    """The operations of a purpose, once there are so many."""

    def found() -> list[ledger_pb.Operation]:
        return [operation for operation in running.ledger.operations.values() if operation.purpose == purpose]

    await until(lambda: len(found()) >= count)
    return found()


def told(running: World, about: bytes) -> list[str]:
    """The texts of the messages of the latest request that holds `about`."""
    body = next(body for body in reversed(running.provider.prompts) if about in body)
    return [text_of(message["content"]) for message in orjson.loads(body)["messages"]]


def text_of(content: Any) -> str:
    """A message's content, which may be a text or a list of blocks."""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


async def test_a_follow_up_is_searched_and_answered_in_its_self_contained_form(keyless: World) -> None:
    """By rule, shown as a step that tells no text; a question that stands alone has no such step."""
    first = await keyless.ask(PORT, session_id="s1")
    reply = await keyless.ask("And the ledger?", session_id="s1")
    why = await keyless.ask("How long does it keep a hold?", session_id="s1")

    assert "rewrite" not in first.steps()
    assert [recall.question for recall in keyless.retrieval.recalls[1:]] == [
        "Which port does the ledger listen on?",
        "How long does the ledger keep a hold?",
    ]
    assert set(step(reply, "rewrite")) == {"by", "ms"}
    assert step(reply, "rewrite")["by"] == "rule"
    assert reply.done.cache.reason == "context_dependent"
    assert "ten minutes" in why.text


async def test_the_fast_model_rewrites_and_its_call_is_booked_on_its_own(claude: World) -> None:
    """What it writes is searched for; the answer's prompt has the question as it was asked; the money is in an operation of its own."""
    says(claude, REWRITE, text="How long does the gateway\nlisten?")
    await claude.ask(PORT, session_id="s1")
    reply = await claude.ask("How long does it?", session_id="s1")
    (operation,) = await errands(claude, "rewrite")
    answered = await claude.booked(reply.answer_id)

    assert claude.retrieval.recalls[-1].question == "How long does the gateway listen?"
    assert step(reply, "rewrite")["by"] == "model"
    assert "How long does it?" in told(claude, b"<passages>")[-1]
    assert (operation.status, operation.tier, operation.session_id, operation.user) == ("done", "", "s1", "alice")
    (attempt,) = operation.attempts
    assert attempt.cost_nanousd == PRICES["claude-haiku-5-5"].cost_nanousd(usage_value(attempt.usage)) > 0
    assert operation.operation_id != reply.answer_id
    assert len(answered.attempts) == 1
    assert reply.done.cost_nanousd == answered.cost_nanousd
    assert [s.name for s in operation.steps] == ["hold", "generate"]
    await until(lambda: not claude.ledger.open_holds)


async def test_small_work_is_done_by_the_cheapest_model_of_its_tier(tmp_path: Path, valkey: Valkey) -> None:
    """Whatever its place in the file, and by the ledger's prices; the answer is written by the first all the same."""
    names = ("claude-sonnet-5-5", "claude-haiku-5-5", "extractive")
    rows = "".join(
        f'[[models]]\nmodel = "{name}"\nprovider = "{"extractive" if name == "extractive" else "anthropic"}"\n'
        "context_tokens_max = 200_000\noutput_tokens_max = 64_000\n"
        for name in names
    )
    file = tmp_path / "models.toml"
    file.write_text(f'[tiers.fast]\nmodels = ["{names[0]}", "{names[1]}"]\n{rows}')
    settings = {"TAILRACE_MODELS_FILE": str(file), "TAILRACE_ORCHESTRATOR_REWRITES": "model"}
    async with world(tmp_path, valkey.url, **settings) as running:
        await until(lambda: running.ledger.prices_told)
        says(running, REWRITE, text="How long does the gateway\nlisten?")
        await running.ask(PORT, session_id="s1")
        reply = await running.ask("How long does it?", session_id="s1")
        (operation,) = await errands(running, "rewrite")

    assert (reply.done.model, operation.model, step(reply, "rewrite")["model"]) == (names[0], names[1], names[1])


async def test_a_slow_model_is_not_waited_for_and_is_booked_all_the_same(claude: World) -> None:
    """After a second and a half it is the rule; the call ends at its own bound, closed at the provider."""
    says(claude, REWRITE, fault="stall_after", fault_at=2, tokens=50)
    await claude.ask(PORT, session_id="s1")
    reply = await claude.ask("Why does it?", session_id="s1")
    (operation,) = await errands(claude, "rewrite")

    assert step(reply, "rewrite")["by"] == "rule"
    assert 1_400 <= int(step(reply, "rewrite")["ms"]) <= 20_000
    assert claude.retrieval.recalls[-1].question == f"{PORT}\nWhy does it?"
    assert (operation.status, operation.error_reason) == ("failed", "DEADLINE_TOO_SHORT")
    assert operation.attempts[0].usage.output_tokens >= 2
    assert operation.attempts[0].estimated
    await until(lambda: not claude.ledger.open_holds)


@pytest.mark.parametrize(
    "behaviour",
    [
        {"fault": "status", "status": 529},
        {"text": " \n "},
        {"text": "How does it handle retries? " * 200},
        {"text": "It tries again."},
        {"fault": "malformed"},
    ],
)
async def test_whatever_the_model_does_the_question_is_answered(claude: World, behaviour: dict[str, Any]) -> None:
    """An overload, nothing, too much, an answer instead of the question: the rule stands in, and what was used is booked."""
    says(claude, REWRITE, **behaviour)
    await claude.ask(PORT, session_id="s1")
    reply = await claude.ask("How does it handle retries?", session_id="s1")
    await errands(claude, "rewrite")

    assert reply.done.verdict == "passed"
    assert step(reply, "rewrite")["by"] == "rule"
    assert claude.retrieval.recalls[-1].question == "How does the gateway handle retries?"
    await until(lambda: not claude.ledger.open_holds)


async def test_who_asks_the_model_that_costs_nothing_pays_for_no_other(claude: World) -> None:
    """Rewritten by rule, without a title of a model."""
    await claude.ask(PORT, session_id="s1", model="extractive")
    reply = await claude.ask("How does it handle retries?", session_id="s1", model="extractive")
    await claude.booked(reply.answer_id)

    assert step(reply, "rewrite")["by"] == "rule"
    assert not claude.provider.prompts
    assert not any(operation.purpose for operation in claude.ledger.operations.values())


async def test_who_cannot_pay_for_a_rewrite_is_answered_by_rule(claude: World) -> None:
    """A refused hold is no attempt, and nothing is sent."""
    await claude.ask(PORT, session_id="s1")
    await errands(claude, "title")
    asked = len(claude.provider.prompts)
    claude.ledger.affordable = 64  # enough for nothing but the shortest
    reply = await claude.ask("Why does it?", session_id="s1", max_output_tokens=32)
    (operation,) = await errands(claude, "rewrite")

    assert step(reply, "rewrite")["by"] == "rule"
    assert (operation.status, operation.error_reason, len(operation.attempts)) == ("failed", "BUDGET_EXHAUSTED", 0)
    assert len(claude.provider.prompts) == asked + 1


async def test_a_regenerated_answer_is_new_and_takes_the_place_of_the_old(claude: World) -> None:
    """The cache has it, and is not asked; the next question without a word on the cache may be served the new one."""
    first = await claude.ask(PORT, session_id="s1")
    claude.behave(text="It listens on port 8080 [1].")
    again = await claude.ask(PORT, session_id="s1", replaces=first.answer_id)
    later = await claude.ask(PORT, session_id="s2")

    assert (again.text, again.done.cache.verdict, again.done.cache.reason) == ("It listens on port 8080 [1].", "miss", "regenerated")
    assert (later.text, later.done.cache.verdict) == ("It listens on port 8080 [1].", "exact")
    assert [turn.answer_id for turn in claude.ledger.branch("s1")] == [again.answer_id]
    assert len(claude.ledger.turns["s1"]) == 2


async def test_a_turn_that_is_still_on_its_way_can_be_replaced(claude: World) -> None:
    """An answer is done before the ledger has its words; who regenerates it at once does not find nothing."""
    claude.ledger.keeping.clear()
    first = await claude.ask(PORT, session_id="s1")
    again = asyncio.create_task(claude.ask(PORT, session_id="s1", replaces=first.answer_id))
    await until(lambda: claude.ledger.asked_in_vain)
    claude.ledger.keeping.set()

    assert (await again).done.cache.reason == "regenerated"
    await until(lambda: len(claude.ledger.turns["s1"]) == 2)
    assert len(claude.ledger.branch("s1")) == 1


async def test_an_edited_question_is_told_what_the_old_one_was_told(claude: World) -> None:
    """Not what came after it; and what came after stays where it was."""
    says(claude, REWRITE, fault="status", status=529)
    await claude.ask(PORT, session_id="s1")
    second = await claude.ask("Why does it?", session_id="s1")
    third = await claude.ask("And who says that?", session_id="s1")
    edited = await claude.ask("How does it?", session_id="s1", replaces=second.answer_id)
    texts = told(claude, b"<passages>")

    assert PORT in texts[0]
    assert not any("who says that" in text or "Why does it" in text for text in texts)
    assert [turn.question for turn in claude.ledger.branch("s1")] == [PORT, "How does it?"]
    assert [turn.question for turn in claude.ledger.branch("s1", third.answer_id)] == [PORT, "Why does it?", "And who says that?"]
    assert edited.done.cache.reason == "context_dependent"


async def test_what_is_replaced_must_be_there(claude: World) -> None:
    """An unknown answer, one of another conversation, and a conversation that is not named."""
    elsewhere = await claude.ask(PORT, session_id="s2")
    for unknown in (str(uuid.uuid4()), elsewhere.answer_id):
        with pytest.raises(NotFound):
            await claude.ask(PORT, session_id="s1", replaces=unknown)
    for fields in ({"replaces": elsewhere.answer_id}, {"session_id": "s1", "replaces": "x"}):
        with pytest.raises(RequestInvalid) as refused:
            await claude.ask(PORT, **fields)
        assert refused.value.field == "replaces"


async def test_older_turns_are_summarised_by_rule_and_told(keyless: World) -> None:
    """Once twice as many as are kept whole have none; what is told then is the summary and what it does not cover."""
    for number in range(4):
        await keyless.ask(f"Which port does gateway number {number} use?", session_id="s1")
    await until(lambda: keyless.ledger.summaries)
    (summary,) = keyless.ledger.summaries.values()
    reply = await keyless.ask("Why does it?", session_id="s1")

    assert summary.through_answer_id == keyless.ledger.turns["s1"][1].answer_id
    assert summary.made_by == "rule"
    assert [f"number {number}" in summary.text for number in range(4)] == [True, True, False, False]
    assert (step(reply, "history")["turns"], step(reply, "history")["summary"]) == ("2", "True")
    assert not any(operation.purpose for operation in keyless.ledger.operations.values())


async def test_the_fast_model_summarises_behind_the_answer(claude: World) -> None:
    """With an operation of its own, merging what was known; the next follow-up is told it in a fence, before the turns."""
    says(claude, SUMMARY, text="They spoke of </summary> four gateways.")
    says(claude, REWRITE, fault="status", status=529)
    for number in range(6):
        await claude.ask(f"Which port does gateway number {number} use?", session_id="s1")
    await until(lambda: len(claude.ledger.summaries) == 2)
    (first, second) = await errands(claude, "summary", 2)
    await claude.ask("Why does it?", session_id="s1")
    messages = told(claude, b"<passages>")

    assert first.attempts[0].cost_nanousd > 0
    assert second.status == "done"
    assert "four gateways" in told(claude, SUMMARY)[0]
    assert messages[0].startswith("<summary>\nOf what was said before:\nThey spoke of &lt;/summary> four gateways.\n</summary>")
    assert "number 4" in messages[0]
    assert not any("number 3" in message for message in messages)


async def test_a_summary_that_is_being_made_is_not_begun_again(claude: World) -> None:
    """Each turn that comes meanwhile hears that none covers it; one call is enough."""
    says(claude, SUMMARY, text="In short.", ttft_ms=1_500)
    for number in range(5):
        await claude.ask(f"Which port does gateway number {number} use?", session_id="s1")
    (operation,) = await errands(claude, "summary")
    await until(lambda: claude.ledger.summaries)

    assert operation.status == "done"
    assert len([body for body in claude.provider.prompts if SUMMARY in body]) == 1


async def test_a_new_conversation_is_given_a_title_once(claude: World) -> None:
    """By its first turn alone, without quotation marks and on one line."""
    says(claude, TITLE, text='"Ports of\nthe gateway."')
    await claude.ask(PORT, session_id="s1")
    await until(lambda: "s1" in claude.ledger.titles)
    await claude.ask("Which ledger keeps the prices of models?", session_id="s1")
    await errands(claude, "title")

    assert claude.ledger.titles == {"s1": "Ports of the gateway"}
    assert len([body for body in claude.provider.prompts if TITLE in body]) == 1


async def prompts(running: World, answer_id: str, who: Principal = ROOT) -> Any:
    return await running.caller.unary(running.stub.GetPrompts, pb.GetPromptsRequest(answer_id=answer_id), principal=who)


async def kept(running: World, answer_id: str) -> Any:
    """The prompts of an answer, once they are there."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await prompts(running, answer_id)
            except NotFound:
                await asyncio.sleep(0.01)


async def test_an_administrator_of_the_tenant_sees_what_was_sent(claude: World) -> None:
    """Word for word, for each call; nobody else does, and another tenant's administrator finds nothing."""
    reply = await claude.ask(PORT, session_id="s1")
    sent = (await kept(claude, reply.answer_id)).prompts[0]
    body = orjson.loads(next(body for body in claude.provider.prompts if b"<passages>" in body))

    assert (sent.attempt, sent.model, sent.purpose, sent.operation_id) == (1, "claude-haiku-5-5", "", "")
    assert sent.output_tokens_max == body["max_tokens"] and not sent.tools and not sent.HasField("output_schema")
    assert sent.template == step(reply, "compose")["template"]
    assert sent.system == text_of(body["system"])
    assert [(message.role, message.text) for message in sent.messages] == [
        (message["role"], text_of(message["content"])) for message in body["messages"]
    ]
    with pytest.raises(NotAllowed):
        await prompts(claude, reply.answer_id, ALICE)
    with pytest.raises(NotAllowed):
        await prompts(claude, reply.answer_id, Principal("acme", "root", frozenset({"admin"}), "k", frozenset({"answers"})))
    for who, answer_id in ((Principal("other", "root", frozenset({"admin"})), reply.answer_id), (ROOT, str(uuid.uuid4()))):
        with pytest.raises(NotFound):
            await prompts(claude, answer_id, who)


async def test_all_that_a_provider_was_told_is_seen(claude: World) -> None:
    """Tools, schema, bound and effort, as they were in the request; a picture is named."""
    tool = pb.ToolDefinition(name="weather", description="of a town")
    tool.input_schema.update({"type": "object", "properties": {"days": {"type": "integer"}}})
    schema = Struct()
    schema.update({"type": "object", "properties": {"port": {"type": "integer"}}, "required": ["port"], "additionalProperties": False})
    claude.behave(text='{"port": 8080}')
    picture = pb.Image(media_type="image/png", data=b"\x89PNG\r\n\x1a\n")
    reply = await claude.ask(
        PORT,
        tier="smart",
        tools=[tool],
        output_schema=schema,
        images=[picture],
        reasoning=True,
        max_output_tokens=300,
        cache=pb.CACHE_MODE_OFF,
    )
    sent = (await kept(claude, reply.answer_id)).prompts[0]
    body = orjson.loads(next(body for body in claude.provider.prompts if b"<passages>" in body))

    assert (sent.output_tokens_max, sent.effort) == (body["max_tokens"], body["output_config"]["effort"]) == (300, "low")
    assert [(each.name, each.description, dict(each.input_schema)["type"]) for each in sent.tools] == [("weather", "of a town", "object")]
    assert MessageToDict(sent.output_schema) == body["output_config"]["format"]["schema"]
    assert "[picture: image/png, 8 bytes]" in sent.messages[-1].text


async def test_small_calls_are_seen_with_the_answer_they_were_made_for(claude: World) -> None:
    """The rewritten question with the answer; the title, which comes later, beside it; each with the operation it is booked as."""
    says(claude, REWRITE, text="Which port does the ledger listen on?")
    says(claude, TITLE, text="Ports")
    first = await claude.ask(PORT, session_id="s1")
    await until(lambda: claude.ledger.turns.get("s1"))
    second = await claude.ask("And which one does the ledger have?", session_id="s1")
    (title,), (rewritten,) = await errands(claude, "title"), await errands(claude, "rewrite")
    async with asyncio.timeout(10):
        while len(beside := (await kept(claude, first.answer_id)).prompts) < 2:  # noqa: ASYNC110 - it is on the other side of a socket
            await asyncio.sleep(0.01)
    told = (await kept(claude, second.answer_id)).prompts

    assert [(each.purpose, each.operation_id) for each in beside] == [("", ""), ("title", title.operation_id)]
    assert [(each.purpose, each.operation_id) for each in told] == [("rewrite", rewritten.operation_id), ("", "")]
    assert "And which one does the ledger have?" in told[0].messages[-1].text
    assert told[0].template.startswith("rewrite") and told[0].output_tokens_max == 256


async def test_prompts_go_with_their_user(claude: World) -> None:
    """They are in the export of the user, and forgotten with them. Those of others stay, also of a user of the same name elsewhere."""
    name = f"user-{uuid.uuid4()}"  # the store is shared by all tests
    own = [await claude.ask(PORT, principal=Principal("acme", name), cache=pb.CACHE_MODE_OFF) for _ in range(2)]
    others = [await claude.ask(PORT, principal=who, cache=pb.CACHE_MODE_OFF) for who in (BOB, Principal("other", name))]
    for reply in (*own, others[0]):
        await kept(claude, reply.answer_id)
    exported, everything = pb.ExportPromptsRequest(user=name), list[pb.ExportPromptsResponse]()
    async with claude.caller.stream(claude.stub.ExportPrompts, exported, timeout_s=30, principal=ROOT) as rows:
        everything += [row async for row in rows]
    with pytest.raises(NotAllowed):
        async with claude.caller.stream(claude.stub.ExportPrompts, exported, timeout_s=30, principal=ALICE) as rows:
            everything += [row async for row in rows]
    request = pb.ForgetPromptsRequest(user=name)
    forgotten = await claude.caller.unary(claude.stub.ForgetPrompts, request, principal=ROOT)
    again = await claude.caller.unary(claude.stub.ForgetPrompts, request, principal=ROOT)

    assert {row.answer_id for row in everything} == {reply.answer_id for reply in own} and len(everything) == 2
    assert all(PORT in row.prompts[0].messages[-1].text for row in everything)
    assert (forgotten.forgotten, again.forgotten) == (2, 0)
    for reply in own:
        with pytest.raises(NotFound):
            await prompts(claude, reply.answer_id)
    assert (await prompts(claude, others[0].answer_id)).prompts
    assert (await prompts(claude, others[1].answer_id, Principal("other", "root", frozenset({"admin"})))).prompts
    with pytest.raises(RequestInvalid):
        await claude.caller.unary(claude.stub.ForgetPrompts, pb.ForgetPromptsRequest(), principal=ROOT)


async def test_logs_and_keys_of_answers_go_with_their_user(keyless: World) -> None:
    """Only when nothing of theirs waits for the books any more, which the ledger says by having erased them."""
    leaver = Principal("acme", f"user-{uuid.uuid4()}")
    first = await keyless.ask(PORT, principal=leaver, idempotency_key="k")
    request = pb.ForgetPromptsRequest(user=leaver.user)
    await keyless.caller.unary(keyless.stub.ForgetPrompts, request, principal=ROOT)
    before = await keyless.ask(PORT, principal=leaver, idempotency_key="k")
    request.erased = True
    await keyless.caller.unary(keyless.stub.ForgetPrompts, request, principal=ROOT)
    after = await keyless.ask(f"{PORT} ", principal=leaver, idempotency_key="k")

    assert before.answer_id == first.answer_id != after.answer_id
    with pytest.raises((NotFound, AnswerLogGone)):
        await keyless.resume(first.answer_id, principal=leaver)


async def test_answers_by_exact_words_go_with_their_user(keyless: World) -> None:
    """What an erased user was told is told to nobody else."""
    name = f"user-{uuid.uuid4()}"
    first = await keyless.ask(f"{PORT} {name}", principal=Principal("acme", name))
    before = await keyless.ask(f"{PORT} {name}", principal=BOB)
    await keyless.caller.unary(keyless.stub.ForgetPrompts, pb.ForgetPromptsRequest(user=name), principal=ROOT)
    after = await keyless.ask(f"{PORT} {name}", principal=BOB)

    assert before.done.cache.source_answer_id == first.answer_id
    assert after.done.cache.verdict == "miss"


async def test_no_prompt_is_kept_unless_it_was_asked_for(keyless: World) -> None:
    """The setting is off by default."""
    reply = await keyless.ask(PORT)
    await keyless.booked(reply.answer_id)
    with pytest.raises(NotFound):
        await prompts(keyless, reply.answer_id)


async def test_a_template_that_is_not_there_stops_the_process_from_starting(tmp_path: Path, valkey: Valkey) -> None:
    """Nobody finds out by an answer."""
    with pytest.raises(ValueError, match="there is no prompt template"):
        async with world(tmp_path, valkey.url, TAILRACE_ORCHESTRATOR_ANSWER_PROMPTS="answer.v99"):
            pass


async def test_a_tier_of_its_own_template_has_a_cache_of_its_own(tmp_path: Path, valkey: Valkey) -> None:
    """Its instructions are sent with their placeholders said, and the operation names it."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "answer.own.v1.md").write_text("Answer in {{language}} for {{tier}}, from {{collection}}.")
    variables = {"TAILRACE_PROMPTS_DIR": str(folder), "TAILRACE_ORCHESTRATOR_ANSWER_PROMPTS": "answer.v1, smart=answer.own.v1"}
    async with world(tmp_path, valkey.url, **variables) as running:
        reply = await running.ask(PORT, tier="smart")
        body = orjson.loads(running.provider.prompts[-1])
        plain = await running.ask(PORT)

    assert text_of(body["system"]) == "Answer in en for smart, from default."
    assert step(reply, "compose")["template"].startswith("answer.own.v1-")
    assert step(plain, "compose")["template"].startswith("answer.v1-")


@pytest.mark.parametrize("erased", [False, True], ids=["deleted", "erased"])
@pytest.mark.parametrize(
    "question", ["And which one does the ledger have?", "Which port does the ledger listen on?"], ids=["leaning", "alone"]
)
async def test_a_conversation_that_is_deleted_while_an_answer_of_it_runs_does_not_begin_anew(
    claude: World, question: str, erased: bool
) -> None:
    """The answer reaches its reader and is booked; nothing of it is kept. What is asked afterwards is."""
    await claude.ask(PORT, session_id="s1")
    await until(lambda: claude.ledger.turns.get("s1"))
    claude.ledger.keeping.clear()
    reply = await claude.ask(question, session_id="s1")
    claude.ledger.delete("" if erased else "s1")
    claude.ledger.keeping.set()
    await until(lambda: claude.ledger.turned_away)
    await claude.booked(reply.answer_id)
    assert (reply.kinds[-1], claude.ledger.turns) == ("done", {})

    await claude.ask(PORT, session_id="s1")
    await until(lambda: len(claude.ledger.turns.get("s1", [])) == 1)


async def test_of_two_first_answers_the_later_one_does_not_bring_back_what_was_deleted(claude: World) -> None:
    """Neither knew of any turn when it was asked."""
    claude.ledger.keeping.clear()
    replies = await asyncio.gather(claude.ask(PORT, session_id="s1"), claude.ask("Who wrote the ledger?", session_id="s1"))
    claude.ledger.delete("s1")
    claude.ledger.keeping.set()
    await until(lambda: claude.ledger.turned_away == 2)

    assert [reply.kinds[-1] for reply in replies] == ["done", "done"]
    assert "s1" not in claude.ledger.turns


async def test_a_follow_up_waits_for_the_turn_that_is_on_its_way(claude: World) -> None:
    """An answer is done before a slow ledger has its words; whoever asks on at once is still understood."""
    says(claude, REWRITE, fault="status", status=529)
    claude.ledger.keeping.clear()
    await claude.ask(PORT, session_id="s1")
    seen = Reply()
    following = asyncio.create_task(claude.ask("And which one does the ledger have?", session_id="s1", into=seen))
    await until(lambda: "history" in seen.steps())
    claude.ledger.keeping.set()
    reply = await following

    assert step(reply, "history")["turns"] == "1"
    assert PORT.encode() in claude.provider.prompts[-1]


async def test_a_turn_outlives_its_process_while_the_ledger_is_away(tmp_path: Path, valkey: Valkey) -> None:
    """Whoever read `done` finds the conversation again, and nothing waits on disk any more; what was deleted meanwhile stays deleted."""
    async with world(tmp_path / "one", valkey.url, with_key=False) as one:
        one.ledger.keeping.clear()
        async with replica(one, tmp_path / "two") as two:
            told = [await two.ask(PORT, session_id=session) for session in ("s1", "s2")]
        one.ledger.delete("s2")
        assert not one.ledger.turns
        one.ledger.keeping.set()
        async with replica(one, tmp_path / "two") as two:
            await until(lambda: one.ledger.turned_away and one.ledger.turns)
            kept = one.ledger.turns["s1"][0]
        with contextlib.closing(sqlite3.connect(two.spool_path)) as spool:
            left = spool.execute("SELECT count(*) FROM turns").fetchone()

    assert (kept.answer_id, kept.question, kept.text, kept.complete) == (told[0].answer_id, PORT, told[0].text, True)
    assert list(one.ledger.turns) == ["s1"] and left == (0,)


async def test_a_turn_that_the_ledger_keeps_at_once_is_not_written_to_disk(claude: World) -> None:
    """That would be one more sync for each answer."""
    await claude.ask(PORT, session_id="s1")
    assert len(claude.ledger.turns["s1"]) == 1
    written = b"".join(file.read_bytes() for file in claude.spool_path.parent.iterdir())

    assert b"claude-haiku-5-5" in written and PORT.encode() not in written
