"""What a search can be asked besides its words, and what it says besides its hits."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from google.protobuf import struct_pb2, timestamp_pb2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal
from services.local.stores import free_port
from services.retrieval.edge_store import EdgeStore
from services.retrieval.encoding_spaces import Encodings
from services.retrieval.ports import Query, Ranked, Space
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.integration.retrieval.retrieval_kit import Retrieval, running, settings_for

BOOK = "\n\n".join(
    f"# Part {name}\n\n" + f"The {name} is described here in a sentence of its own. " * 15 for name in ("otter", "heron", "newt")
)


async def rows(retrieval: Retrieval, who: Principal, query: str, **request: object) -> list[pb.SearchResponse]:
    return await retrieval.stream("Search", pb.SearchRequest(query=query, **request), who)


async def test_a_hit_explains_its_place(retrieval: Retrieval, ann: Principal) -> None:
    """Rank and score of each ranking and the weight of meaning; only when asked for."""
    await retrieval.ingest(ann, {"book.md": BOOK})

    best = (await rows(retrieval, ann, "Where is the heron described?", explain=True))[0]
    assert "heron" in best.hit.text
    assert (1, 1) == (best.explanation.dense_rank, best.explanation.sparse_rank)
    assert best.explanation.fused_score == best.hit.score
    assert best.explanation.dense_score == best.hit.similarity
    assert "en" == best.explanation.language
    assert 0.4 < best.explanation.dense_weight <= 0.5
    assert not (await rows(retrieval, ann, "heron"))[0].HasField("explanation")


async def test_meaning_counts_for_nothing_in_a_script_the_embedder_cannot_read(retrieval: Retrieval, ann: Principal) -> None:
    """Its pieces are single letters there, so the words decide alone."""
    await retrieval.ingest(ann, {"ru.md": "Выдра живёт у реки и ловит рыбу.", "en.md": BOOK})

    best = (await rows(retrieval, ann, "Где живёт выдра?", explain=True))[0]
    assert "ru.md" == best.hit.source_uri
    assert 0.0 == best.explanation.dense_weight
    assert not best.hit.HasField("similarity")


async def test_hits_come_together_for_those_who_asked_for_that(
    retrieval: Retrieval, ann: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same hits in the same order: one a message, all in one, or as many as a message may hold."""
    await retrieval.ingest(ann, {f"{name}.md": f"# {name}\n\nThe {name} lives at the river." for name in ("otter", "heron", "newt", "eel")})

    alone = await rows(retrieval, ann, "What lives at the river?", explain=True)
    (all_,) = await rows(retrieval, ann, "What lives at the river?", explain=True, batches=True)
    monkeypatch.setattr("services.retrieval.rpc.BATCH_BYTES_MAX", 2 * alone[0].ByteSize() + 20)
    some = await rows(retrieval, ann, "What lives at the river?", explain=True, batches=True)

    assert [4, 0] == [len(alone), sum(len(row.more) for row in alone)]
    assert alone == _rows_in([all_])
    assert [1, 1] == [len(message.more) for message in some]
    assert alone == _rows_in(some)


def _rows_in(messages: list[pb.SearchResponse]) -> list[pb.SearchResponse]:
    """Each hit as it would come alone."""
    found = []
    for message in messages:
        first = pb.SearchResponse()
        first.CopyFrom(message)
        first.ClearField("more")
        found += [first, *message.more]
    return found


async def test_neighbours_stand_around_their_hit(retrieval: Retrieval, ann: Principal) -> None:
    """In reading order, as many as there are and as were asked for, without the hit itself."""
    await retrieval.ingest(ann, {"book.md": BOOK})

    best = (await rows(retrieval, ann, "heron", neighbours=1, mode=pb.SEARCH_MODE_SPARSE))[0]
    assert ["otter", "newt"] == [chunk.heading_path[-1].removeprefix("Part ") for chunk in (*best.before, *best.after)]
    assert (1, 1) == (len(best.before), len(best.after))


def value(fact: str | float | bool) -> struct_pb2.Value:
    if isinstance(fact, bool):
        return struct_pb2.Value(bool_value=fact)
    return struct_pb2.Value(string_value=fact) if isinstance(fact, str) else struct_pb2.Value(number_value=fact)


def condition(key: str, *any_of: str | float | bool, since: int | None = None, **fields: Any) -> pb.MetadataCondition:
    if since is not None:
        fields["from"] = timestamp_pb2.Timestamp(seconds=since)
    return pb.MetadataCondition(key=key, any_of=[value(fact) for fact in any_of], **fields)


async def filed(retrieval: Retrieval, who: Principal, name: str, collection: str = "", **facts: Any) -> None:
    text = f"# {name}\n\nThe lighthouse is described in {name}.\n"
    (*_, last) = await retrieval.ingest(who, {name: text}, collection=collection, **facts)
    assert "indexed" == last.stage


async def names(retrieval: Retrieval, who: Principal, **request: Any) -> set[str]:
    return {hit.source_uri for hit in await retrieval.search(who, "Where is the lighthouse?", **request)}


async def test_metadata_decides_what_is_searched(retrieval: Retrieval, ann: Principal) -> None:
    """By string, number, boolean and moment; a field that is not there does not match, unless the condition is turned round."""
    await filed(
        retrieval, ann, "old.md", metadata={"year": value(1999.0), "draft": value(False), "on": value("1999-05-01"), "tenant": value("x")}
    )
    await filed(retrieval, ann, "new.md", metadata={"year": value(2024.0), "draft": value(True), "on": value("2024-05-01T00:00:00Z")})
    await filed(retrieval, ann, "bare.md")

    assert {"new.md"} == await names(retrieval, ann, metadata=[condition("year", at_least=2000)])
    assert {"old.md"} == await names(retrieval, ann, metadata=[condition("year", 1999.0, 7.0), condition("draft", False)])
    assert set() == await names(retrieval, ann, metadata=[condition("draft", 1.0)])
    assert {"new.md"} == await names(retrieval, ann, metadata=[condition("on", since=1_000_000_000)])
    instant = 1_714_521_600
    barely_after = timestamp_pb2.Timestamp(seconds=instant, nanos=1)
    assert {"new.md"} == await names(retrieval, ann, metadata=[condition("on", since=instant, until=barely_after)])
    assert set() == await names(retrieval, ann, metadata=[pb.MetadataCondition(key="on", **{"from": barely_after})])
    assert {"old.md", "bare.md"} == await names(retrieval, ann, metadata=[condition("draft", True, negated=True)])
    assert {"old.md"} == await names(retrieval, ann, metadata=[condition("tenant", "x")])
    assert set() == await names(retrieval, ann, metadata=[condition("tenant", ann.tenant)])
    assert {"old.md", "new.md"} == await names(retrieval, ann, metadata=[condition("year")])


async def test_changed_metadata_counts_at_once(retrieval: Retrieval, ann: Principal) -> None:
    """Though the text is the same, and True is not 1."""
    await filed(retrieval, ann, "a.md", metadata={"state": value(True)})
    await filed(retrieval, ann, "a.md", metadata={"state": value(1.0)})

    assert {"a.md"} == await names(retrieval, ann, metadata=[condition("state", 1.0)])
    assert set() == await names(retrieval, ann, metadata=[condition("state", True)])


async def test_no_condition_reaches_further_than_its_caller(retrieval: Retrieval, ann: Principal, eve: Principal) -> None:
    """Turned round, over all collections and by its id: a limited document stays its readers', and a tenant's its own."""
    await filed(retrieval, ann, "secret.md", access=pb.Access(users=["ann"]), metadata={"a": value("b")})
    await filed(retrieval, ann, "far.md", "far", access=pb.Access(users=["ann"]))
    (secret,) = (await retrieval.ids(ann, collection="default")).values()
    hostile: list[dict[str, Any]] = [
        {"metadata": [condition("nothing", negated=True)]},
        {"metadata": [condition("tenant", ann.tenant)]},
        {"metadata": [condition("readers", "user:ann", negated=True), condition("a", "b")]},
        {"more_collections": ["far", "default"]},
        {"more_collections": ["far"], "document_ids": [secret], "metadata": [condition("x", negated=True)]},
    ]

    for who in (Principal(ann.tenant, "kim"), eve):
        for request in hostile:
            assert set() == await names(retrieval, who, **request), request
    assert {"secret.md"} == await names(retrieval, ann, more_collections=["far"], document_ids=[secret])
    assert {"secret.md", "far.md"} == await names(retrieval, ann, more_collections=["far"])


async def test_several_collections_are_searched_as_one(retrieval: Retrieval, ann: Principal) -> None:
    """One ranking over those named and no other; the same name twice, and one with nothing in it, do no harm."""
    for name in ("one", "two", "three"):
        await filed(retrieval, ann, f"{name}.md", name)

    assert {"one.md"} == await names(retrieval, ann, collection="one")
    assert {"one.md", "two.md"} == await names(retrieval, ann, collection="one", more_collections=["two", "one", "never"])
    (third,) = (await retrieval.ids(ann, collection="three")).values()
    assert set() == await names(retrieval, ann, collection="one", more_collections=["two"], document_ids=[third])
    found = await retrieval.search(ann, "lighthouse", collection="one", more_collections=["two", "three"], limit=2)
    assert [1, 2] == [hit.number for hit in found]


async def test_collections_of_different_embedders_are_refused_together(
    retrieval: Retrieval, ann: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their similarities cannot be compared. One in which nothing ever was stands in nobody's way."""
    await filed(retrieval, ann, "one.md", "one")
    await filed(retrieval, ann, "two.md", "two")
    answering = Encodings.answering
    strange = set[str]()

    async def divided(self: Encodings, tenant: str, collection: str) -> Any:
        encoding = await answering(self, tenant, collection)
        return replace(encoding, id=f"other {encoding.encoder_id}") if collection in strange else encoding

    monkeypatch.setattr(Encodings, "answering", divided)
    strange.add("two")
    with pytest.raises(RequestInvalid) as refused:
        await names(retrieval, ann, collection="one", more_collections=["two"])
    assert "more_collections" == refused.value.field
    strange.add(empty := secrets.token_hex(4))
    strange.remove("two")
    found = await rows(retrieval, ann, "lighthouse", collection=empty, more_collections=["two", "one"], explain=True)
    assert {"one.md", "two.md"} == {row.hit.source_uri for row in found}
    assert "other" not in {row.explanation.embedder_id for row in found}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"metadata": [condition("a")] * 17}, "metadata"),
        ({"metadata": [condition("a"), condition("")]}, "metadata[1].key"),
        ({"metadata": [condition("x" * 257)]}, "metadata[0].key"),
        ({"metadata": [condition("a", *["b"] * 65)]}, "metadata[0].any_of"),
        ({"metadata": [condition("a", "b", "x" * 257)]}, "metadata[0].any_of[1]"),
        ({"metadata": [condition("a", float("nan"))]}, "metadata[0].any_of[0]"),
        ({"metadata": [pb.MetadataCondition(key="a", any_of=[struct_pb2.Value(null_value=0)])]}, "metadata[0].any_of[0]"),  # type: ignore[arg-type]
        ({"metadata": [condition("a"), condition("a"), condition("a", at_least=float("inf"))]}, "metadata[2].at_least"),
        ({"metadata": [condition("a", below=float("nan"))]}, "metadata[0].below"),
        ({"metadata": [condition("a", since=2**60)]}, "metadata[0].from"),
        ({"metadata": [condition("a", until=timestamp_pb2.Timestamp(nanos=-1))]}, "metadata[0].until"),
        ({"more_collections": ["c"] * 16}, "more_collections"),
        ({"more_collections": ["c", "a b"]}, "more_collections[1]"),
    ],
)
async def test_what_is_asked_has_bounds(retrieval: Retrieval, ann: Principal, request_: dict[str, Any], field: str) -> None:
    """Named with the place of the condition and its part."""
    with pytest.raises(RequestInvalid) as refused:
        await names(retrieval, ann, **request_)
    assert field == refused.value.field
    assert refused.value.metadata["bound"]


async def test_a_chunk_that_says_the_same_gives_way_to_the_next(retrieval: Retrieval, ann: Principal) -> None:
    """Five copies of a page are one hit, and the rest of the places go to other pages; a version with another number stays."""
    page = "The ferry over the river Wenn is pulled along a chain by its ferryman, who was taught by his father and by nobody else."
    copies = {f"copy-{number}.md": page + "\n" * number for number in range(5)}
    others = {"fare.md": f"{page} It costs 2 crowns.", "new-fare.md": f"{page} It costs 3 crowns.", "gate.md": "The gate of the river."}
    await retrieval.ingest(ann, {**copies, **others}, collection="copies")

    found = await rows(retrieval, ann, "Who pulls the ferry over the river Wenn?", limit=4, collection="copies")
    sources = [row.hit.source_uri for row in found]
    assert 4 == len(sources)
    assert {"fare.md", "new-fare.md", "gate.md"} < set(sources)
    assert [1, 2, 3, 4] == [row.hit.number for row in found]


async def test_each_ranking_brings_several_times_what_is_wanted(
    retrieval: Retrieval, ann: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred for a few; for a hundred as many times more, so that what one has at its top and the other far down is seen by both."""
    brought: list[int] = []
    rank = EdgeStore.rank

    async def noted(self: EdgeStore, space: Space, query: Query) -> Ranked:
        brought.append(query.limit)
        return await rank(self, space, query)

    monkeypatch.setattr(EdgeStore, "rank", noted)
    await rows(retrieval, ann, "Where is the heron described?", limit=10)
    await rows(retrieval, ann, "Where is the heron described?", limit=100)

    assert [100, 100, 416, 416] == brought


async def test_the_best_are_judged_again_by_their_single_words(tmp_path: Path) -> None:
    """By default, where both meaning and words rank; the explanation has the score. Without it the order is the fusion's."""
    who = Principal(tenant="acme", user="ann")
    ways = (pb.SEARCH_MODE_HYBRID, pb.SEARCH_MODE_DENSE, pb.SEARCH_MODE_SPARSE)
    async with running(settings_for(tmp_path)) as retrieval:
        await retrieval.ingest(who, {"book.md": BOOK})
        judged, by_meaning, by_words = [await rows(retrieval, who, "Where is the heron described?", mode=way, explain=True) for way in ways]
    async with running(settings_for(tmp_path / "without", late_candidates=0)) as retrieval:
        await retrieval.ingest(who, {"book.md": BOOK})
        fused = await rows(retrieval, who, "Where is the heron described?", explain=True)

    scores = [row.explanation.rerank_score for row in judged]
    assert all(row.explanation.HasField("rerank_score") for row in judged)
    assert 3 == len(scores) and scores == sorted(scores, reverse=True)
    assert "heron" in judged[0].hit.text
    assert judged[0].hit.score == pytest.approx(fused[0].hit.score, abs=1e-3)
    assert not any(row.explanation.HasField("rerank_score") for row in (*by_meaning, *by_words, *fused))


async def test_a_reranker_has_the_last_word_and_is_not_needed(tmp_path: Path) -> None:
    """Its order counts and explains itself. When it fails, the order is the fusion's, and it is left alone for a while."""
    judge = Judge()
    settings = settings_for(tmp_path, reranker_url=f"http://127.0.0.1:{judge.port}/rerank", reranker_format="tei")
    who = Principal(tenant="acme", user="ann")
    async with judge.listening(), running(settings) as retrieval:
        await retrieval.ingest(who, {name: f"The {name} lives in the river." for name in ("otter", "heron", "newt")})
        judge.favourite = "newt"
        favoured = await rows(retrieval, who, "Where does the otter live?", explain=True)
        judge.favourite = ""
        alone = await rows(retrieval, who, "Where does the otter live?", explain=True)
        await rows(retrieval, who, "Where does the heron live?")

    assert "newt" in favoured[0].hit.text
    assert [1.0, 0.0, 0.0] == [row.explanation.rerank_score for row in favoured]
    assert "otter" in alone[0].hit.text
    assert not any(row.explanation.HasField("rerank_score") for row in alone)
    assert 2 == judge.asked


class Judge:
    """A reranker that likes one word; without a favourite it fails."""

    def __init__(self) -> None:
        self.port, self.favourite, self.asked = free_port(), "", 0

    async def rerank(self, request: Request) -> Response:
        self.asked += 1
        texts = (await request.json())["texts"]
        if not self.favourite:
            return Response(status_code=503)
        return JSONResponse([{"index": place, "score": float(self.favourite in text)} for place, text in enumerate(texts)])

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        app = Starlette(routes=[Route("/rerank", self.rerank, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn tells it this way only
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = True
            await task
