"""What a search says besides its hits: how each came to its place, and what stands around it."""

from services.chassis.principal import Principal
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.integration.retrieval.retrieval_kit import Retrieval

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
    assert 0.4 < best.explanation.dense_weight <= 0.5
    assert not (await rows(retrieval, ann, "heron"))[0].HasField("explanation")


async def test_meaning_counts_for_nothing_in_a_script_the_embedder_cannot_read(retrieval: Retrieval, ann: Principal) -> None:
    """Its pieces are single letters there, so the words decide alone."""
    await retrieval.ingest(ann, {"ru.md": "Выдра живёт у реки и ловит рыбу.", "en.md": BOOK})

    best = (await rows(retrieval, ann, "Где живёт выдра?", explain=True))[0]
    assert "ru.md" == best.hit.source_uri
    assert 0.0 == best.explanation.dense_weight


async def test_neighbours_stand_around_their_hit(retrieval: Retrieval, ann: Principal) -> None:
    """In reading order, as many as there are and as were asked for, without the hit itself."""
    await retrieval.ingest(ann, {"book.md": BOOK})

    best = (await rows(retrieval, ann, "heron", neighbours=1, mode=pb.SEARCH_MODE_SPARSE))[0]
    assert ["otter", "newt"] == [chunk.heading_path[-1].removeprefix("Part ") for chunk in (*best.before, *best.after)]
    assert (1, 1) == (len(best.before), len(best.after))
