"""What the service says about collections, and a change of embedder as its callers see it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.chassis.principal import Principal
from services.retrieval import reencoding
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.fakes.embedding_service import DIMENSION, embedding_service
from tests.integration.retrieval.retrieval_kit import Retrieval, running, settings_for

QUESTION = "How do you reset the router?"


async def collections(retrieval: Retrieval, who: Principal) -> dict[str, pb.ListCollectionsResponse]:
    rows = await retrieval.stream("ListCollections", pb.ListCollectionsRequest(), who)
    return {row.collection: row for row in rows}


async def moved(retrieval: Retrieval, who: Principal, embedder: str) -> pb.ListCollectionsResponse:
    """The default collection once it is found by `embedder` and nothing is under way."""
    async with asyncio.timeout(30):
        while True:
            row = (await collections(retrieval, who))["default"]
            if embedder in row.embedder_id and not row.next_embedder_id:
                return row


async def test_collections_of_the_tenant_are_listed(retrieval: Retrieval, ann: Principal, eve: Principal) -> None:
    """By name, with their documents and epoch; nobody else's."""
    assert {} == await collections(retrieval, ann)
    await retrieval.ingest(ann, {"a.md": "# A", "b.md": "# B"})
    await retrieval.ingest(ann, {"c.md": "# C"}, collection="other")
    await retrieval.ingest(eve, {"e.md": "# E"}, collection="secret")
    listed = await collections(retrieval, ann)

    assert [("default", 2), ("other", 1)] == [(name, row.documents) for name, row in listed.items()]
    assert all("minilm-l6-v2-int8" in row.embedder_id and not row.next_embedder_id for row in listed.values())
    epoch = listed["other"].epoch
    await retrieval.ingest(ann, {"d.md": "# D"}, collection="other")
    shown = [row.document for row in await retrieval.stream("ListDocuments", pb.ListDocumentsRequest(collection="other"), ann)]
    document = (await retrieval.ask("GetDocument", pb.GetDocumentRequest(document_id=shown[0].document_id), ann)).document
    assert {listed["other"].embedder_id} == {one.embedder_id for one in (*shown, document)}
    again = (await collections(retrieval, ann))["other"]
    assert (2, True) == (again.documents, again.epoch > epoch)
    assert {"secret"} == set(await collections(retrieval, eve))


async def test_a_store_of_fp32_moves_to_the_default_precision(state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older release left it: found at every moment by meaning too, answers are cached again, and fp32 stays to be had by setting."""
    monkeypatch.setattr(reencoding, "INTERVAL_S", 0.05)
    monkeypatch.setattr(reencoding, "LINGER_S", 0.2)
    (state_dir / "models").mkdir(exist_ok=True)
    (tmp_path / "models").symlink_to(state_dir / "models")
    ann = Principal("tenant", "ann", frozenset({"user", "admin"}))
    async with running(settings_for(tmp_path, embed_quant="fp32")) as older:
        await older.ingest(ann, {"router.md": "# Router\n\nHold the button for ten seconds.", "tea.md": "# Tea\n\nSteep it."})
        best = (await older.search(ann, QUESTION))[0].chunk_id
        assert "minilm-l6-v2-fp32" in (await collections(older, ann))["default"].embedder_id
    async with running(settings_for(tmp_path)) as younger:
        async with asyncio.timeout(60):
            while True:
                for mode in (pb.SEARCH_MODE_HYBRID, pb.SEARCH_MODE_DENSE):
                    assert best == (await younger.search(ann, QUESTION, mode=mode))[0].chunk_id
                row = (await collections(younger, ann))["default"]
                if "minilm-l6-v2-int8" in row.embedder_id and not row.next_embedder_id:
                    break
            assert 2 == row.documents
            # The removal of what fp32 left makes one epoch more: an answer remembered before that is asked for in vain.
            while not (found := await younger.recall(ann, QUESTION))[1].HasField("answer"):
                await younger.remember(ann, QUESTION, "Ten seconds [1].", found[0])


async def test_documents_are_counted_as_the_caller_may_read_them(retrieval: Retrieval, ann: Principal) -> None:
    """A colleague does not learn how many others there are; an admin and the one they are limited to do."""
    await retrieval.ingest(ann, {"open.md": "# Open"})
    await retrieval.ingest(ann, {"limited.md": "# Limited"}, access=pb.Access(users=["zoe"]))
    counts = {}
    for who in (ann, Principal(ann.tenant, "zoe"), Principal(ann.tenant, "bob"), Principal(ann.tenant, "boss", frozenset({"admin"}))):
        counts[who.user] = (await collections(retrieval, who))["default"].documents

    assert {"ann": 2, "zoe": 2, "bob": 1, "boss": 2} == counts


@pytest.mark.slow
async def test_a_restart_with_another_embedder_moves_what_is_stored(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From MiniLM to a remote service and on to another of its models: found before, meanwhile and after; old answers are not served."""
    monkeypatch.setattr(reencoding, "INTERVAL_S", 0.05)
    monkeypatch.setattr(reencoding, "LINGER_S", 0.5)
    (tmp_path / "models").symlink_to(state_dir / "models")
    ann = Principal("tenant", "ann", frozenset({"user", "admin"}))
    async with running(settings_for(tmp_path)) as first:
        await first.ingest(
            ann, {"router.md": "# Router\n\nHold the router button for ten seconds to reset it.", "tea.md": "# Tea\n\nSteep."}
        )
        epoch, _, passages = await first.recall(ann, QUESTION)
        assert (await first.remember(ann, QUESTION, "Hold it [1].", epoch)).remembered
        assert (await first.recall(ann, QUESTION))[1].HasField("answer")
        best = passages[0].chunk_id

    async with embedding_service() as service:
        remote: dict[str, Any] = {"embedder_url": f"{service.url}/v1", "embedder_dimensions": DIMENSION}
        async with running(settings_for(tmp_path, embedder="openai:small", **remote)) as second:
            assert best == (await second.search(ann, QUESTION))[0].chunk_id
            row = await moved(second, ann, "openai-small")
            assert (2, True) == (row.documents, row.epoch > epoch)
            for mode in (pb.SEARCH_MODE_HYBRID, pb.SEARCH_MODE_DENSE, pb.SEARCH_MODE_SPARSE):
                assert best == (await second.search(ann, QUESTION, mode=mode))[0].chunk_id
            assert not (await second.recall(ann, QUESTION))[1].HasField("answer")
            assert (await second.remember(ann, QUESTION, "Hold it [1].", row.epoch)).remembered
            assert (await second.recall(ann, QUESTION))[1].HasField("answer")
            forgotten = await second.ask("ForgetAnswers", pb.ForgetAnswersRequest(), ann)
            assert forgotten.forgotten >= 1
            assert not (await second.recall(ann, QUESTION))[1].HasField("answer")
        async with running(settings_for(tmp_path, embedder="openai:large", **{**remote, "embedder_dimensions": 32})) as third:
            # The service cannot make 32 numbers: nothing is switched, and what was there goes on answering.
            async with asyncio.timeout(30):
                while not (row := (await collections(third, ann))["default"]).next_embedder_id:
                    assert best == (await third.search(ann, QUESTION))[0].chunk_id
            asked = len(service.asked)
            while len(service.asked) < asked + 10:
                assert best == (await third.search(ann, QUESTION))[0].chunk_id
            row = (await collections(third, ann))["default"]
            assert ("openai-small-64", "openai-large-32") == (row.embedder_id, row.next_embedder_id)
            assert 0 == row.reembedded
