"""The VectorStore port, on every implementation: Edge, the client's in-memory mode, and a server when QDRANT_URL names one."""

import inspect
import math
import os
import uuid
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient

from services.chassis.errors import Unavailable
from services.retrieval import edge_store, qdrant_store
from services.retrieval.domain import stable_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore
from services.retrieval.facts import Condition
from services.retrieval.facts import payload as payload_of
from services.retrieval.fingerprint import settle
from services.retrieval.late_interaction import ALPHABET
from services.retrieval.ports import ANSWERS, CHUNKS, DOCUMENTS, SPACES, Filter, Point, Query, Space, VectorStore, written
from services.retrieval.qdrant_store import QdrantStore

DIMENSION = 4
SPARSE = EdgeBm25("english")
KINDS = [
    "edge",
    "memory",
    pytest.param("server", marks=pytest.mark.skipif(not os.environ.get("QDRANT_URL"), reason="QDRANT_URL is not set")),
]


@pytest.fixture(params=KINDS, scope="module")
async def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VectorStore]:
    """A store of each kind."""
    if request.param == "edge":
        embedded = EdgeStore.open(tmp_path_factory.mktemp("contract") / "qdrant", DIMENSION)
        yield embedded
        embedded.close()
        return
    in_memory, on_server = {"location": ":memory:"}, {"url": os.environ.get("QDRANT_URL"), "prefer_grpc": True}
    location: dict[str, Any] = in_memory if request.param == "memory" else on_server
    client = AsyncQdrantClient(**location, check_compatibility=False)
    server = QdrantStore(client, DIMENSION, "test", prefix=f"test-{uuid.uuid4().hex}-")
    with warnings.catch_warnings():
        # The in-memory mode says that it has no payload indexes.
        warnings.simplefilter("ignore", UserWarning)
        await server.prepare()
    yield server
    if request.param == "server":
        await server.drop()
    await server.close()


@pytest.fixture
async def store(opened: VectorStore) -> VectorStore:
    """The same, empty."""
    for space in SPACES:
        for tenant in ("acme", "rival"):
            await opened.delete(space, Filter(tenant))
    return opened


def direction(angle: float) -> list[float]:
    """A unit vector; the nearer two angles, the more alike."""
    return [math.cos(angle), math.sin(angle), 0.0, 0.0]


def chunk(name: str, tenant: str = "acme", *, angle: float = 0.0, text: str = "", **fields: Any) -> Point:
    payload = {"tenant": tenant, "collection": "default", "document_id": "d", "revision": "r", "ordinal": 0, "text": text, **fields}
    return Point(stable_id(name), payload, direction(angle), SPARSE.document(text))


async def ranked(store: VectorStore, space: Space, query: Query) -> list[str]:
    """Ids, best first."""
    return [written(number) for number in await store.rank(space, query)]


async def test_what_is_written_is_found_by_id_and_by_field(store: VectorStore) -> None:
    """Payloads come back as they went in, nested values and large integers too."""
    moment = 1_795_476_077_660_595
    payload = {"tenant": "acme", "kind": "document", "indexed_us": moment, "metadata": {"a": "ü"}, "list": ["x", "y"]}
    await store.upsert(DOCUMENTS, [Point(stable_id("one"), payload)])

    assert payload == (await store.get(DOCUMENTS, "acme", [stable_id("one"), stable_id("none")]))[stable_id("one")].payload
    found = await store.find(DOCUMENTS, Filter("acme", equal={"indexed_us": moment}), limit=9)
    assert [payload] == [record.payload for record in found]


async def test_nothing_of_another_tenant_is_read_or_removed(store: VectorStore) -> None:
    """Search, find, count, get, remove and delete all stop at the tenant."""
    await store.upsert(CHUNKS, [chunk("mine", "acme", text="shared words"), chunk("theirs", "rival", text="shared words")])
    theirs, mine = stable_id("theirs"), stable_id("mine")

    for near in (direction(0), SPARSE.query("shared words")):
        assert [mine] == await ranked(store, CHUNKS, Query(Filter("acme"), 9, near))
    assert [mine] == [record.id for record in await store.find(CHUNKS, Filter("acme"), limit=9)]
    assert await store.count(CHUNKS, Filter("acme")) == 1
    assert await store.get(CHUNKS, "acme", [theirs]) == {}
    await store.remove(CHUNKS, "acme", [theirs])
    await store.delete(CHUNKS, Filter("acme", equal={"document_id": "d"}))
    assert await store.count(CHUNKS, Filter("rival")) == 1
    assert await store.count(CHUNKS, Filter("acme")) == 0


@pytest.mark.parametrize("tenant", ["", "ACME", "acme ", "аcme", "acme\x00", "*"])
async def test_a_tenant_that_looks_alike_is_another_one(store: VectorStore, tenant: str) -> None:
    """Tenants are compared exactly: no case, no trimming, no look-alike letters, no wildcard."""
    await store.upsert(CHUNKS, [chunk("mine", "acme", text="words")])

    assert await ranked(store, CHUNKS, Query(Filter(tenant), 9, direction(0))) == []
    assert await store.count(CHUNKS, Filter(tenant)) == 0


async def test_without_the_tenant_condition_the_tests_above_would_see_foreign_points(
    store: VectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proof that they test something: with the condition taken out, the other tenant's point is found."""
    for module in (edge_store, qdrant_store):
        whole = module.translated

        def without_tenant(where: Filter, whole: Any = whole) -> Any:
            conditions = whole(where)
            return type(conditions)(must=[condition for condition in conditions.must if condition.key != "tenant"])

        monkeypatch.setattr(module, "translated", without_tenant)
    await store.upsert(CHUNKS, [chunk("theirs", "rival")])

    assert [stable_id("theirs")] == await ranked(store, CHUNKS, Query(Filter("acme"), 9, direction(0)))


async def test_filters_mean_the_same_everywhere(store: VectorStore) -> None:
    """Equality, any-of and both integer bounds, alone and together."""
    await store.upsert(CHUNKS, [chunk(f"c{number}", ordinal=number, document_id=f"d{number % 3}") for number in range(9)])

    async def ordinals(**conditions: Any) -> list[int]:
        found = await store.find(CHUNKS, Filter("acme", **conditions), limit=99, order_by="ordinal")
        return [record.payload["ordinal"] for record in found]

    assert await ordinals(equal={"document_id": "d1"}) == [1, 4, 7]
    assert await ordinals(any_of={"document_id": ("d1", "d2")}) == [1, 2, 4, 5, 7, 8]
    assert await ordinals(at_least={"ordinal": 5}, below={"ordinal": 7}) == [5, 6]
    assert await ordinals(equal={"document_id": "d1"}, at_least={"ordinal": 5}) == [7]
    assert await ordinals(equal={"document_id": "d9"}) == []


async def test_conditions_on_metadata_hold_in_searches_of_every_kind(store: VectorStore) -> None:
    """By meaning, by words, and in counting, finding and deleting; two fields of one document are never mixed up."""
    facts: dict[str, dict[str, Any]] = {
        "old": {"year": 1999.0, "size": 10.0, "kind": "report", "on": "1999-05-01"},
        "new": {"year": 2024.0, "size": 1.0, "kind": "report", "on": "2024-05-01T12:00:00+02:00"},
        "bare": {},
    }
    await store.upsert(CHUNKS, [chunk(name, text="zebra", **payload_of(metadata)) for name, metadata in facts.items()])
    names = {stable_id(name): name for name in facts}
    spring = int(datetime(2024, 5, 1, 10, tzinfo=UTC).timestamp()) * 1_000_000

    async def seen(*conditions: Condition) -> set[str]:
        where = Filter("acme", facts=conditions)
        queries = [Query(where, 9, direction(0)), Query(where, 9, SPARSE.query("zebra"))]
        found = [{names[id_] for id_ in await ranked(store, CHUNKS, query)} for query in queries]
        found.append({names[record.id] for record in await store.find(CHUNKS, where, limit=9)})
        assert all(one == found[0] for one in found)
        assert len(found[0]) == await store.count(CHUNKS, where)
        return found[0]

    assert {"old", "new"} == await seen(Condition("kind", any_of=("report", "memo")))
    assert {"new"} == await seen(Condition("kind", any_of=("report",)), Condition("year", at_least=2000.0))
    assert {"bare"} == await seen(Condition("kind", negated=True))
    assert set() == await seen(Condition("size", at_least=2.0, below=9.0))
    assert {"new"} == await seen(Condition("on", from_us=spring))
    assert {"old"} == await seen(Condition("on", until_us=spring))
    assert {"old", "bare"} == await seen(Condition("on", from_us=spring, negated=True))
    assert set() == await seen(Condition("on", any_of=(True, 1.0)))
    await store.delete(CHUNKS, Filter("acme", facts=(Condition("year", below=2000.0),)))
    assert {"new", "bare"} == await seen()


async def test_found_points_come_in_the_order_asked_for(store: VectorStore) -> None:
    """By an integer field, both ways, with a limit."""
    await store.upsert(CHUNKS, [chunk(f"c{number}", ordinal=number) for number in (3, 1, 4, 0, 2)])

    ascending = await store.find(CHUNKS, Filter("acme"), limit=3, order_by="ordinal")
    descending = await store.find(CHUNKS, Filter("acme"), limit=3, order_by="ordinal", descending=True)
    assert [record.payload["ordinal"] for record in ascending] == [0, 1, 2]
    assert [record.payload["ordinal"] for record in descending] == [4, 3, 2]


async def test_a_ranking_by_words_knows_no_meaning_and_the_other_no_words(store: VectorStore) -> None:
    """Best first, and by words only what has one of them."""
    await store.upsert(
        CHUNKS,
        [
            chunk("meaning", angle=0.05, text="unrelated"),
            chunk("both", angle=0.1, text="zebra crossing"),
            chunk("words", angle=1.5, text="zebra"),
        ],
    )

    by_meaning = await ranked(store, CHUNKS, Query(Filter("acme"), 2, direction(0)))
    by_words = await ranked(store, CHUNKS, Query(Filter("acme"), 9, SPARSE.query("zebra crossing")))
    assert [stable_id("meaning"), stable_id("both")] == by_meaning
    assert [stable_id("both"), stable_id("words")] == by_words


async def test_similarity_is_the_cosine(store: VectorStore) -> None:
    """Best first, with the true cosine as score."""
    await store.upsert(
        ANSWERS, [Point(stable_id(str(angle)), {"tenant": "acme", "angle": angle}, direction(angle)) for angle in (0.0, 0.5, 1.0)]
    )

    scores = await store.rank(ANSWERS, Query(Filter("acme"), 9, direction(0.1)))
    assert [stable_id(str(angle)) for angle in (0.0, 0.5, 1.0)] == [written(number) for number in scores]
    assert [math.cos(0.1), math.cos(0.4), math.cos(0.9)] == pytest.approx(list(scores.values()), abs=1e-5)


async def test_writing_again_replaces(store: VectorStore) -> None:
    """One id is one point."""
    await store.upsert(CHUNKS, [chunk("one", text="before")])
    await store.upsert(CHUNKS, [chunk("one", text="after")])

    assert [record.payload["text"] for record in await store.find(CHUNKS, Filter("acme"), limit=9)] == ["after"]


async def test_expiry_reaches_all_tenants_but_only_what_is_old(store: VectorStore) -> None:
    """The one operation that knows no tenant only deletes."""
    await store.upsert(
        ANSWERS,
        [
            Point(stable_id(f"{tenant}{at}"), {"tenant": tenant, "created_us": at}, direction(0))
            for tenant in ("acme", "rival")
            for at in (1, 5)
        ],
    )
    await store.expire(ANSWERS, "created_us", 5)

    assert [await store.count(ANSWERS, Filter(tenant)) for tenant in ("acme", "rival")] == [1, 1]


async def test_a_store_knows_which_encoding_came_first(store: VectorStore) -> None:
    """The first stays the first, whoever comes later and however often."""
    assert ["test", "test", "test"] == [await settle(store, name) for name in ("test", "other", "test")]


async def test_of_two_who_claim_one_prevails(store: VectorStore) -> None:
    """Both are told the same, and nothing is overwritten."""
    id_ = stable_id("claimed")
    for name in ("first", "second", "third"):
        claimed = await store.claim(DOCUMENTS, Point(id_, {"tenant": "acme", "kind": name}))
        assert "first" == claimed.payload["kind"]

    assert 1 == await store.count(DOCUMENTS, Filter("acme"))


async def test_a_point_is_exchanged_for_another_only_while_it_is_what_was_expected(store: VectorStore) -> None:
    """What is not there, or is another's by now, stays as it is."""
    id_, moment = stable_id("exchanged"), 1_795_476_077_660_595
    outcomes = []
    await store.exchange(DOCUMENTS, Point(id_, {"tenant": "acme", "kind": "none"}), {"kind": "none"})
    outcomes.append(await store.get(DOCUMENTS, "acme", [id_]))
    await store.claim(DOCUMENTS, Point(id_, {"tenant": "acme", "kind": "first", "epoch": moment}))
    for name, expected in (("second", {"kind": "first", "epoch": moment}), ("third", {"kind": "first"}), ("fourth", {"epoch": moment + 1})):
        await store.exchange(DOCUMENTS, Point(id_, {"tenant": "acme", "kind": name, "epoch": moment}), expected)
        outcomes.append((await store.get(DOCUMENTS, "acme", [id_]))[id_].payload["kind"])
    await store.exchange(DOCUMENTS, Point(id_, {"tenant": "rival", "kind": "stolen"}), {"kind": "second"})
    outcomes.append((await store.get(DOCUMENTS, "acme", [id_]))[id_].payload["kind"])

    assert [{}, "second", "second", "second", "second"] == outcomes


async def test_a_point_is_removed_only_while_it_is_what_was_expected(store: VectorStore) -> None:
    """Another that has its id by now stays."""
    id_ = stable_id("removed")
    await store.upsert(DOCUMENTS, [Point(id_, {"tenant": "acme", "kind": "document", "revision": "new"})])
    left = []
    for revision in ("old", "new"):
        await store.remove(DOCUMENTS, "acme", [id_], {"revision": revision})
        left.append(await store.count(DOCUMENTS, Filter("acme")))

    assert [1, 0] == left


async def test_a_space_made_later_has_its_own_dimension(store: VectorStore) -> None:
    """Beside the first spaces and apart from them; making it twice changes nothing."""
    later = replace(CHUNKS, name="chunks-later", dimension=2)
    for _ in range(2):
        await store.ensure(later)
    await store.upsert(later, [Point(stable_id("x"), {"tenant": "acme"}, [0.6, 0.8], SPARSE.document("words"))])

    assert [stable_id("x")] == await ranked(store, later, Query(Filter("acme"), 9, [0.6, 0.8]))
    assert 0 == await store.count(CHUNKS, Filter("acme"))
    await store.delete(later, Filter("acme"))


async def test_a_sketch_is_told_to_who_asks_for_it_alone(store: VectorStore) -> None:
    """No record has it, it is its tenant's, and a point that is written again without one has none."""
    sketch = "".join(ALPHABET) * 100
    await store.upsert(CHUNKS, [replace(chunk(f"c{number}", text="words"), sketch=f"{number}{sketch}") for number in range(3)])
    await store.upsert(CHUNKS, [chunk("bare", text="words"), replace(chunk("theirs", "rival"), sketch=sketch)])
    ids = [stable_id(name) for name in ("c0", "c1", "c2", "bare", "theirs", "none")]

    asked = await store.get(CHUNKS, "acme", ids, sketches=True)
    read = [*(await store.get(CHUNKS, "acme", ids)).values(), *await store.find(CHUNKS, Filter("acme"), limit=9)]
    assert {**{ids[number]: f"{number}{sketch}" for number in range(3)}, ids[3]: ""} == {id_: one.sketch for id_, one in asked.items()}
    assert 8 == len(read)
    assert {(frozenset(chunk("x").payload), "")} == {(frozenset(one.payload), one.sketch) for one in read}
    assert {frozenset(chunk("x").payload)} == {frozenset(one.payload) for one in asked.values()}
    await store.upsert(CHUNKS, [chunk("c0", text="words")])
    assert "" == (await store.get(CHUNKS, "acme", ids, sketches=True))[ids[0]].sketch


async def test_upkeep_learns_whose_points_there_are(store: VectorStore) -> None:
    """Every tenant once."""
    await store.upsert(
        DOCUMENTS, [Point(stable_id(f"{tenant}{place}"), {"tenant": tenant}) for tenant in ("acme", "rival") for place in "ab"]
    )

    assert {"acme", "rival"} <= set(await store.tenants(DOCUMENTS))
    assert len(await store.tenants(DOCUMENTS)) == len(set(await store.tenants(DOCUMENTS)))


async def test_a_server_that_lost_its_collections_is_prepared_again(store: VectorStore) -> None:
    """The check says so, calls are refused until then, and afterwards work goes on."""
    if not isinstance(store, QdrantStore):
        pytest.skip("an embedded store cannot lose its collections while it is open")
    await store.drop()
    with pytest.raises(Unavailable):
        await store.check()
    with pytest.raises(Unavailable):
        await store.count(CHUNKS, Filter("acme"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        await store.prepare()
    await store.check()

    assert 0 == await store.count(CHUNKS, Filter("acme"))


@pytest.mark.parametrize("condition", ['key="tenant"', "where.readers is not None"])
async def test_without_a_condition_what_it_keeps_out_comes_in(store: VectorStore, condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that hold the conditions would fail if its line were deleted: here it is."""
    points = [
        Point(stable_id("own"), {"tenant": "acme", "text": "own"}, [1.0, 0, 0, 0], SPARSE.document("reef")),
        Point(stable_id("foreign"), {"tenant": "rival", "text": "foreign"}, [1.0, 0, 0, 0], SPARSE.document("reef")),
        Point(
            stable_id("limited"), {"tenant": "acme", "text": "limited", "readers": ["user:bob"]}, [1.0, 0, 0, 0], SPARSE.document("reef")
        ),
    ]
    await store.upsert(CHUNKS, points)
    where = Filter("acme", readers=("user:ann",))

    async def seen() -> set[str]:
        names = {point.id: point.payload["text"] for point in points}
        found = [record.id for record in await store.find(CHUNKS, where, limit=10)]
        for near in ([1.0, 0, 0, 0], SPARSE.query("reef")):
            found += await ranked(store, CHUNKS, Query(where, 10, near))
        return {names[id_] for id_ in found}

    assert {"own"} == await seen()
    assert {"own", "limited"} == {record.payload["text"] for record in await store.find(CHUNKS, Filter("acme"), limit=10)}
    module, name = (edge_store, "translated") if isinstance(store, EdgeStore) else (qdrant_store, "_conditions")
    lines = inspect.getsource(getattr(module, name)).splitlines()
    (place,) = [place for place, line in enumerate(lines) if condition in line]
    lines[place] = "    must = []" if "tenant" in condition else "    if False:"
    namespace: dict[str, Any] = vars(module).copy()
    exec("\n".join(lines), namespace)
    monkeypatch.setattr(module, name, namespace[name])
    assert ({"own", "foreign"} if "tenant" in condition else {"own", "limited"}) == await seen()
