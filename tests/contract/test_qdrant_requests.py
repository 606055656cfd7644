"""What a Qdrant server of several nodes is sent, message by message: layout, ordering, consistency, retries. Needs no server."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from qdrant_client import AsyncQdrantClient
from qdrant_client import grpc as wire
from qdrant_client.grpc import collections_service_pb2_grpc, points_service_pb2_grpc

from services.chassis.errors import Unavailable
from services.retrieval.ports import ANSWERS, CHUNKS, DOCUMENTS, SPACES, Filter, Point, Query, Sparse
from services.retrieval.qdrant_layout import Layout
from services.retrieval.qdrant_store import QdrantStore

FINGERPRINT = "embedder encoder"
CLUSTER = Layout(
    shards=6,
    replicas=3,
    write_replicas=2,
    quantization="scalar",
    vectors_memory="cold",
    payload_on_disk=True,
    hnsw_m=0,
    hnsw_payload_m=24,
    write_ordering="strong",
    read_consistency="majority",
)
WRITES = {"Upsert", "Delete", "CreateFieldIndex"}
READS = {"Get", "Scroll", "Query", "Facet"}
ID = "6f0e3c52-6f6b-5f0e-9d39-9b7f3f0d2a11"


class Node:
    """A server that remembers what it was sent, has every collection once it was made, and fails when told."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.collections: set[str] = set()
        self.points: list[Any] = []
        self.failures: list[grpc.StatusCode] = []

    async def meet(self, name: str, request: Any, context: Any) -> None:
        self.sent.append((name, request))
        if self.failures:
            await context.abort(self.failures.pop(0), "as told")

    def of(self, name: str) -> list[Any]:
        return [request for sent, request in self.sent if sent == name]


class Collections(collections_service_pb2_grpc.CollectionsServicer):
    def __init__(self, node: Node) -> None:
        self.node = node

    async def CollectionExists(self, request: Any, context: Any) -> Any:
        await self.node.meet("CollectionExists", request, context)
        exists = request.collection_name in self.node.collections
        return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=exists))

    async def Create(self, request: Any, context: Any) -> Any:
        await self.node.meet("Create", request, context)
        if request.collection_name in self.node.collections:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "it exists")
        self.node.collections.add(request.collection_name)
        return wire.CollectionOperationResponse(result=True)


class Points(points_service_pb2_grpc.PointsServicer):
    def __init__(self, node: Node) -> None:
        self.node = node

    async def CreateFieldIndex(self, request: Any, context: Any) -> Any:
        return await self._done("CreateFieldIndex", request, context)

    async def Upsert(self, request: Any, context: Any) -> Any:
        self.node.points += request.points
        return await self._done("Upsert", request, context)

    async def Delete(self, request: Any, context: Any) -> Any:
        return await self._done("Delete", request, context)

    async def Get(self, request: Any, context: Any) -> Any:
        await self.node.meet("Get", request, context)
        found = [point for point in self.node.points if point.id in request.ids]
        return wire.GetResponse(result=[wire.RetrievedPoint(id=point.id, payload=point.payload) for point in found[:1]])

    async def Scroll(self, request: Any, context: Any) -> Any:
        await self.node.meet("Scroll", request, context)
        return wire.ScrollResponse()

    async def Count(self, request: Any, context: Any) -> Any:
        await self.node.meet("Count", request, context)
        return wire.CountResponse(result=wire.CountResult(count=1))

    async def Query(self, request: Any, context: Any) -> Any:
        await self.node.meet("Query", request, context)
        return wire.QueryResponse()

    async def Facet(self, request: Any, context: Any) -> Any:
        await self.node.meet("Facet", request, context)
        return wire.FacetResponse()

    async def _done(self, name: str, request: Any, context: Any) -> Any:
        await self.node.meet(name, request, context)
        return wire.PointsOperationResponse(result=wire.UpdateResult(operation_id=1, status=wire.UpdateStatus.Completed))


Opened = Callable[[Layout], tuple[Node, QdrantStore]]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """A store of a layout on a node of its own."""
    node = Node()
    server = grpc.aio.server()
    collections_service_pb2_grpc.add_CollectionsServicer_to_server(Collections(node), server)
    points_service_pb2_grpc.add_PointsServicer_to_server(Points(node), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = AsyncQdrantClient(url="http://127.0.0.1:1", grpc_port=port, prefer_grpc=True, timeout=2, check_compatibility=False)
    yield lambda layout: (node, QdrantStore(client, 384, FINGERPRINT, layout=layout))
    await client.close()
    await server.stop(0)


async def exercise(store: QdrantStore) -> None:
    """Every operation of the port."""
    dense, sparse = [1.0] + [0.0] * 383, Sparse((1,), (1.0,))
    await store.upsert(CHUNKS, [Point(ID, {"tenant": "acme"}, dense, sparse)])
    await store.delete(CHUNKS, Filter("acme"))
    await store.remove(CHUNKS, "acme", [ID])
    await store.expire(ANSWERS, "created_us", 5)
    await store.get(CHUNKS, "acme", [ID])
    await store.find(CHUNKS, Filter("acme"), limit=1)
    await store.count(CHUNKS, Filter("acme"))
    await store.rank(CHUNKS, Query(Filter("acme"), 3, sparse))
    await store.rank(CHUNKS, Query(Filter("acme"), 3, dense))
    await store.tenants(DOCUMENTS)


async def test_collections_are_laid_out_as_set(opened: Opened) -> None:
    """Shards, replicas, write factor, memory, quantization and the graph of a tenant's own points."""
    node, store = opened(CLUSTER)
    await store.prepare()
    made = {request.collection_name: request for request in node.of("Create")}

    assert {f"tailrace-{space.name}" for space in SPACES} == set(made)
    for request in made.values():
        assert (6, 3, 2, True) == (
            request.shard_number,
            request.replication_factor,
            request.write_consistency_factor,
            request.on_disk_payload,
        )
    dense = made["tailrace-chunks"].vectors_config.params_map.map["dense"]
    assert (384, wire.Distance.Cosine, wire.Memory.Cold) == (dense.size, dense.distance, dense.memory)
    assert (0, 24) == (dense.hnsw_config.m, dense.hnsw_config.payload_m)
    assert dense.hnsw_config.HasField("m")
    assert (wire.QuantizationType.Int8, wire.Memory.Pinned) == (
        dense.quantization_config.scalar.type,
        dense.quantization_config.scalar.memory,
    )
    assert wire.Modifier.Idf == made["tailrace-chunks"].sparse_vectors_config.map["bm25"].modifier
    assert not made["tailrace-documents"].vectors_config.params_map.map


async def test_every_tenant_index_says_that_it_is_one(opened: Opened) -> None:
    """And every field that a filter uses is indexed."""
    node, store = opened(CLUSTER)
    await store.prepare()
    indexes = {(request.collection_name, request.field_name): request for request in node.of("CreateFieldIndex")}

    wanted = {
        (f"tailrace-{space.name}", field) for space in SPACES for field in ("tenant", *space.keywords, *space.integers, *space.numbers)
    }
    assert wanted == set(indexes)
    for (_, field), request in indexes.items():
        assert (field == "tenant") == request.field_index_params.keyword_index_params.is_tenant


async def test_writes_wait_and_are_ordered_and_reads_agree(opened: Opened) -> None:
    """Every write and every read of every operation, as set."""
    node, store = opened(CLUSTER)
    await store.prepare()
    await exercise(store)

    assert {name for name, _ in node.sent} >= WRITES | READS
    for name, request in node.sent:
        if name in WRITES:
            assert request.wait, name
            assert wire.WriteOrderingType.Strong == request.ordering.type, name
        if name in READS:
            assert wire.ReadConsistencyType.Majority == request.read_consistency.type, name


async def test_a_quantized_first_look_is_scored_again(opened: Opened) -> None:
    """By meaning alone; without quantization nothing is said."""
    node, store = opened(CLUSTER)
    await store.prepare()
    await exercise(store)
    words, meaning = node.of("Query")

    assert ("bm25", "dense") == (words.using, meaning.using)
    assert meaning.params.quantization.rescore and not words.HasField("params")
    plain_node, plain = node, QdrantStore(store._client, 384, FINGERPRINT, layout=Layout())
    plain_node.sent.clear()
    await plain.prepare()
    await exercise(plain)
    assert not any(request.HasField("params") for request in plain_node.of("Query"))


async def test_one_node_needs_no_settings(opened: Opened) -> None:
    """The defaults suit one server: it chooses the shards, there is one replica, reads ask whoever answers."""
    node, store = opened(Layout())
    await store.prepare()
    await exercise(store)
    for request in node.of("Create"):
        assert not request.HasField("shard_number")
        assert (1, 1) == (request.replication_factor, request.write_consistency_factor)
        dense = request.vectors_config.params_map.map["dense"]
        assert not dense.HasField("quantization_config")
    assert not any(request.HasField("read_consistency") for name, request in node.sent if name in READS)
    assert all(request.wait for name, request in node.sent if name in WRITES)


async def test_a_claim_writes_only_what_is_new(opened: Opened) -> None:
    """The server decides who was first; what it holds is what both are told."""
    node, store = opened(CLUSTER)
    await store.prepare()
    for name in ("first", "second"):
        assert "first" == (await store.claim(DOCUMENTS, Point(ID, {"tenant": "acme", "kind": name}))).payload["kind"]

    assert all(wire.UpdateMode.InsertOnly == request.update_mode for request in node.of("Upsert"))


async def test_what_is_to_be_as_expected_is_looked_at_by_the_server(opened: Opened) -> None:
    """An exchange and a removal carry what they expect with them: between a look of ours and a write others would come."""
    node, store = opened(CLUSTER)
    await store.prepare()
    await store.exchange(DOCUMENTS, Point(ID, {"tenant": "acme"}), {"revision": "old", "epoch": 7})
    await store.remove(DOCUMENTS, "acme", [ID], {"revision": "old"})
    exchange, removal = node.of("Upsert")[-1], node.of("Delete")[-1]
    asked = {one.field.key: one.field.match for one in exchange.update_filter.must}

    assert wire.UpdateMode.UpdateOnly == exchange.update_mode
    assert ("acme", "old", 7) == (asked["tenant"].keyword, asked["revision"].keyword, asked["epoch"].integer)
    assert {"tenant", "revision"} == {one.field.key for one in removal.points.filter.must if one.HasField("field")}
    assert 1 == sum(one.HasField("has_id") for one in removal.points.filter.must)


async def test_a_node_that_goes_is_asked_once_more(opened: Opened) -> None:
    """A second failure is the caller's; what is wrong with a request is not tried again."""
    node, store = opened(CLUSTER)
    await store.prepare()
    node.sent.clear()
    node.failures = [grpc.StatusCode.UNAVAILABLE]
    assert 1 == await store.count(CHUNKS, Filter("acme"))
    assert 2 == len(node.of("Count"))
    node.failures = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable):
        await store.count(CHUNKS, Filter("acme"))
    assert 4 == len(node.of("Count"))
    node.failures = [grpc.StatusCode.INVALID_ARGUMENT]
    with pytest.raises(grpc.aio.AioRpcError):
        await store.count(CHUNKS, Filter("acme"))
    assert 5 == len(node.of("Count"))


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "UNAUTHENTICATED"])
async def test_whatever_else_the_server_says_is_unavailable(opened: Opened, code: str) -> None:
    """One typed error for all that the caller can do nothing about."""
    node, store = opened(CLUSTER)
    await store.prepare()
    node.failures = [grpc.StatusCode[code]] * 2
    with pytest.raises(Unavailable) as failed:
        await store.find(CHUNKS, Filter("acme"), limit=1)

    assert "qdrant" == failed.value.metadata["dependency"]


async def test_two_replicas_that_make_the_same_collection_are_both_content(opened: Opened) -> None:
    """Who comes second finds it there."""
    node, _ = opened(CLUSTER)
    exists = iter([False, True])

    class Late(Collections):
        async def CollectionExists(self, request: Any, context: Any) -> Any:
            return wire.CollectionExistsResponse(result=wire.CollectionExists(exists=next(exists, True)))

    server = grpc.aio.server()
    collections_service_pb2_grpc.add_CollectionsServicer_to_server(Late(node), server)
    points_service_pb2_grpc.add_PointsServicer_to_server(Points(node), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    node.collections.add("tailrace-documents")
    client = AsyncQdrantClient(url="http://127.0.0.1:1", grpc_port=port, prefer_grpc=True, timeout=2, check_compatibility=False)
    try:
        await QdrantStore(client, 384, FINGERPRINT, layout=CLUSTER).prepare()
    finally:
        await client.close()
        await server.stop(0)

    assert ["tailrace-documents"] == [request.collection_name for request in node.of("Create")]
