"""Recall: epoch, verdict, passages; and the semantic tier behind it."""

import asyncio

import pytest

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal
from tailrace.common.v1 import common_pb2
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.integration.retrieval.retrieval_kit import Retrieval

PAGE = {"guide.md": "# Timeouts\n\nThe default timeout is five seconds of network inactivity.\n"}
QUESTION = "What is the default timeout?"
PARAPHRASE = "Could you please tell me what the default timeout is?"


async def test_an_answer_is_found_again_in_other_words(retrieval: Retrieval, ann: Principal) -> None:
    """It comes back whole: text, passages, cost, usage, and who asked what."""
    await retrieval.ingest(ann, PAGE)
    epoch, verdict, passages = await retrieval.recall(ann, QUESTION)
    assert "no_candidate" == verdict.reason
    usage = common_pb2.Usage(input_tokens=10, output_tokens=5, cache_write_tokens=3, cache_write_1h_tokens=1)
    kept = await retrieval.remember(
        ann, QUESTION, "Five seconds [1].", epoch, passages=passages, cost_nanousd=123, usage=usage, finish_reason="end_turn"
    )
    assert kept.remembered

    _, verdict, again = await retrieval.recall(ann, PARAPHRASE)
    answer = verdict.answer
    assert ("Five seconds [1].", QUESTION, "ann", 123, "end_turn") == (
        answer.text,
        answer.question,
        answer.user,
        answer.cost_nanousd,
        answer.finish_reason,
    )
    assert usage == answer.usage
    assert [(passage.number, passage.text) for passage in passages] == [(passage.number, passage.text) for passage in answer.passages]
    assert 0.9 < verdict.similarity <= 1.0
    assert all(passage.HasField("similarity") for passage in (*passages, *again))
    for passage in (*passages, *again):
        passage.ClearField("similarity")  # each question's own
    assert passages == again


async def test_a_guard_stops_an_answer_to_another_question(retrieval: Retrieval, ann: Principal) -> None:
    """Nearly the same words, another number: the reason says which guard, and the similarity is told."""
    await retrieval.remember(ann, "What was the revenue in 2023?", "Ten.", 0)
    _, verdict, _ = await retrieval.recall(ann, "What was the revenue in 2024?")

    assert ("guard_numbers", False) == (verdict.reason, verdict.HasField("answer"))
    assert verdict.similarity > 0.8


async def test_a_question_that_is_far_away_is_below_the_threshold(retrieval: Retrieval, ann: Principal) -> None:
    """Similarity is told, nothing is served."""
    await retrieval.remember(ann, QUESTION, "Five.", 0)
    _, verdict, _ = await retrieval.recall(ann, "Which birds live in the Alps?")

    assert ("below_threshold", False) == (verdict.reason, verdict.HasField("answer"))


@pytest.mark.parametrize("difference", ["tenant", "collection", "scope", "epoch"])
async def test_similarity_never_crosses_a_border(retrieval: Retrieval, ann: Principal, eve: Principal, difference: str) -> None:
    """The very same question in another tenant, collection or scope, or after a change, finds nothing."""
    await retrieval.remember(ann, QUESTION, "Five.", 0)
    assert (await retrieval.recall(ann, QUESTION))[1].HasField("answer")
    if difference == "epoch":
        await retrieval.ingest(ann, PAGE)
    who = eve if difference == "tenant" else ann
    fields = {"collection": {"collection": "other"}, "scope": {"cache_scope": "other"}}.get(difference, {})
    _, verdict, _ = await retrieval.recall(who, QUESTION, **fields)

    assert ("no_candidate", False) == (verdict.reason, verdict.HasField("answer"))


@pytest.mark.parametrize("change", ["ingest", "replace", "delete"])
async def test_an_answer_begun_under_an_older_epoch_is_not_kept(retrieval: Retrieval, ann: Principal, change: str) -> None:
    """Whatever changed in the meantime, the answer rests on what is no more."""
    await retrieval.ingest(ann, PAGE)
    epoch, _, _ = await retrieval.recall(ann, QUESTION)
    if change == "delete":
        (id_,) = (await retrieval.ids(ann)).values()
        await retrieval.ask("DeleteDocument", pb.DeleteDocumentRequest(document_id=id_), ann)
    else:
        await retrieval.ingest(ann, {"other.md" if change == "ingest" else "guide.md": "# New\n\nEverything is different now.\n"})
    kept = await retrieval.remember(ann, QUESTION, "Five.", epoch)

    assert (False, "epoch_changed") == (kept.remembered, kept.reason)
    assert not (await retrieval.recall(ann, QUESTION))[1].HasField("answer")


async def test_a_change_in_one_collection_leaves_the_answers_of_another(retrieval: Retrieval, ann: Principal) -> None:
    """Epochs belong to collections."""
    await retrieval.remember(ann, QUESTION, "Five.", 0)
    await retrieval.ingest(ann, PAGE, collection="other")

    assert (await retrieval.recall(ann, QUESTION))[1].HasField("answer")


async def test_forgetting_is_for_admins_and_for_ones_own(retrieval: Retrieval, ann: Principal) -> None:
    """A user forgets only what was answered to that user; an admin any of the tenant; the count is true."""
    bob, boss = Principal(ann.tenant, "bob"), Principal(ann.tenant, "boss", frozenset({"user", "admin"}))
    await retrieval.remember(ann, QUESTION, "Five.", 0)
    await retrieval.remember(bob, "Which birds live in the Alps?", "Many.", 0)

    assert 0 == (await retrieval.ask("ForgetAnswers", pb.ForgetAnswersRequest(answer_id=f"answer to {QUESTION}"), bob)).forgotten
    assert 1 == (await retrieval.ask("ForgetAnswers", pb.ForgetAnswersRequest(), bob)).forgotten
    assert (await retrieval.recall(ann, QUESTION))[1].HasField("answer")
    assert 1 == (await retrieval.ask("ForgetAnswers", pb.ForgetAnswersRequest(collection="default"), boss)).forgotten
    assert not (await retrieval.recall(ann, QUESTION))[1].HasField("answer")


async def test_only_a_service_may_remember_for_somebody_else(retrieval: Retrieval, ann: Principal) -> None:
    """The user in the message counts only when another service says it."""
    service = Principal(ann.tenant, "orchestrator", frozenset({"service"}))
    await retrieval.remember(ann, QUESTION, "Five.", 0, user="bob")
    await retrieval.remember(service, "Which birds live in the Alps?", "Many.", 0, user="bob")

    assert "ann" == (await retrieval.recall(ann, QUESTION))[1].answer.user
    assert "bob" == (await retrieval.recall(ann, "Which birds live in the Alps?"))[1].answer.user


async def test_a_recall_gives_only_what_was_asked_for(retrieval: Retrieval, ann: Principal) -> None:
    """Without cache the verdict says so; without passages none are sent."""
    await retrieval.ingest(ann, PAGE)
    _, verdict, passages = await retrieval.recall(ann, QUESTION, want_cached=False, cache_scope="")
    assert ("requested", 1) == (verdict.reason, len(passages))
    assert 0 < passages[0].similarity <= 1

    _, verdict, passages = await retrieval.recall(ann, QUESTION, passages_max=0)
    assert ("no_candidate", []) == (verdict.reason, passages)


async def test_a_recall_ends_where_the_asker_holds_a_true_answer(retrieval: Retrieval, ann: Principal) -> None:
    """Of the same epoch: nothing after it. Of an older one: as if none were held, also for a collection that never changed."""
    asked = {"question": QUESTION, "cache_scope": "scope", "want_cached": True, "passages_max": 5}
    assert ["started"] == await retrieval.parts(ann, **asked, held_epoch=0)

    await retrieval.ingest(ann, PAGE)
    assert ["started", "verdict", "passages"] == await retrieval.parts(ann, **asked, held_epoch=0)
    epoch, _, _ = await retrieval.recall(ann, QUESTION)
    assert ["started"] == await retrieval.parts(ann, **asked, held_epoch=epoch)


async def test_an_answer_that_cannot_be_is_refused(retrieval: Retrieval, ann: Principal) -> None:
    """Negative costs, impossible counts and empty texts name their field."""
    for fields, field in (
        ({"cost_nanousd": -1}, "answer.cost_nanousd"),
        ({"usage": common_pb2.Usage(input_tokens=-1)}, "answer.usage"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            await retrieval.remember(ann, QUESTION, "Five.", 0, **fields)
        assert field == refused.value.field
    with pytest.raises(RequestInvalid) as refused:
        await retrieval.remember(ann, QUESTION, "", 0)
    assert "answer.text" == refused.value.field


async def test_questions_do_not_wait_for_documents(retrieval: Retrieval, ann: Principal) -> None:
    """While a large document is embedded, a question is answered before it is done, and quickly."""
    await retrieval.ingest(ann, PAGE)
    large = "\n\n".join(f"# Part {number}\n\n{'many words about something ' * 40}" for number in range(60))
    ingesting = asyncio.create_task(retrieval.ingest(ann, {"large.md": large}))
    took = []
    while not ingesting.done():
        _, verdict, _ = await retrieval.recall(ann, QUESTION)
        took.append(verdict.embed_ms)
        await asyncio.sleep(0.02)
    await ingesting

    # One batch of documents alone takes ten times as long as a question.
    assert len(took) > 5
    assert sorted(took)[len(took) // 2] < 60
