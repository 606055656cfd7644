"""The VectorStore port on a Qdrant server, over gRPC. Collections are made on first contact, which may come long after the start.

Every failure to reach the server becomes Unavailable(dependency="qdrant"); the next call tries again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, TypeVar

import structlog
from grpc import StatusCode
from grpc.aio import AioRpcError
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException

from services.chassis.errors import Unavailable
from services.retrieval.fingerprint import OtherEmbedder, settle
from services.retrieval.ports import SPACES, Filter, Point, Query, Record, Space

log = structlog.get_logger(__name__)
T = TypeVar("T")

COLLECTION_PREFIX = "tailrace-"
_OUR_FAULT = {StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED}


class QdrantStore:
    """`prepare` it until it succeeds; before that every call raises Unavailable."""

    def __init__(self, client: AsyncQdrantClient, dimension: int, fingerprint: str, prefix: str = COLLECTION_PREFIX) -> None:
        self._client = client
        self._prefix = prefix
        self._dimension = dimension
        self._fingerprint = fingerprint
        self._prepared = False
        self._preparing = asyncio.Lock()

    async def prepare(self) -> None:
        """Make what collections are missing and compare fingerprints. Raises Unavailable or OtherEmbedder."""
        async with self._preparing:
            if self._prepared:
                return
            for space in SPACES:
                await self._make(space)
            unguarded = QdrantStore(self._client, self._dimension, self._fingerprint, self._prefix)
            unguarded._prepared = True
            await settle(unguarded, self._fingerprint)
            self._prepared = True

    async def close(self) -> None:
        await self._client.close()

    async def upsert(self, space: Space, points: Sequence[Point]) -> None:
        batch = [models.PointStruct(id=point.id, vector=_vectors(point), payload=dict(point.payload)) for point in points]
        await self._ask(self._client.upsert(self._name(space), batch, wait=True))

    async def delete(self, space: Space, where: Filter) -> None:
        await self._ask(self._client.delete(self._name(space), models.FilterSelector(filter=translated(where)), wait=True))

    async def remove(self, space: Space, tenant: str, ids: Sequence[str]) -> None:
        if ids:
            owned = models.Filter(must=[*_conditions(Filter(tenant)), models.HasIdCondition(has_id=list(ids))])
            await self._ask(self._client.delete(self._name(space), models.FilterSelector(filter=owned), wait=True))

    async def expire(self, space: Space, field: str, below: int) -> None:
        old = models.Filter(must=[models.FieldCondition(key=field, range=models.Range(lt=below))])
        await self._ask(self._client.delete(self._name(space), models.FilterSelector(filter=old), wait=True))

    async def get(self, space: Space, tenant: str, ids: Sequence[str]) -> dict[str, Record]:
        if not ids:
            return {}
        points = await self._ask(self._client.retrieve(self._name(space), list(ids), with_payload=True))
        records = (Record(str(point.id), point.payload or {}) for point in points)
        return {record.id: record for record in records if record.payload["tenant"] == tenant}

    async def find(self, space: Space, where: Filter, *, limit: int, order_by: str = "", descending: bool = False) -> list[Record]:
        direction = models.Direction.DESC if descending else models.Direction.ASC
        order = models.OrderBy(key=order_by, direction=direction) if order_by else None
        points, _ = await self._ask(
            self._client.scroll(self._name(space), scroll_filter=translated(where), limit=limit, order_by=order, with_payload=True)
        )
        return [Record(str(point.id), point.payload or {}) for point in points]

    async def count(self, space: Space, where: Filter) -> int:
        return (await self._ask(self._client.count(self._name(space), count_filter=translated(where), exact=True))).count

    async def search(self, space: Space, query: Query) -> list[Record]:
        where = translated(query.where)
        nearest: list[tuple[str, Any]] = []
        if query.dense is not None:
            nearest.append(("dense", [float(value) for value in query.dense]))
        if query.sparse is not None:
            nearest.append(("bm25", models.SparseVector(indices=list(query.sparse.indices), values=list(query.sparse.values))))
        if len(nearest) == 1:
            using, vector = nearest[0]
            asked = self._client.query_points(self._name(space), query=vector, using=using, query_filter=where, limit=query.limit)
        else:
            brought = max(query.fusion.prefetch, query.limit)
            prefetch = [models.Prefetch(query=vector, using=using, filter=where, limit=brought) for using, vector in nearest]
            asked = self._client.query_points(self._name(space), prefetch=prefetch, query=_fusion(query), limit=query.limit)
        return [Record(str(point.id), point.payload or {}, float(point.score)) for point in (await self._ask(asked)).points]

    async def check(self) -> None:
        for space in SPACES:
            if not await self._ask(self._client.collection_exists(self._name(space))):
                self._prepared = False
                raise Unavailable("the vector store has lost its collections", dependency="qdrant")

    async def drop(self) -> None:
        """Remove our collections and everything in them."""
        for space in SPACES:
            await self._ask(self._client.delete_collection(self._name(space)))

    def _name(self, space: Space) -> str:
        return f"{self._prefix}{space.name}"

    async def _make(self, space: Space) -> None:
        name = self._name(space)
        with self._failures():
            if not await self._client.collection_exists(name):
                dense = models.VectorParams(size=self._dimension, distance=models.Distance.COSINE)
                await self._client.create_collection(
                    name,
                    vectors_config={"dense": dense} if space.dense else {},
                    sparse_vectors_config={"bm25": models.SparseVectorParams(modifier=models.Modifier.IDF)} if space.sparse else {},
                )
            # Indexes that are there already stay as they are.
            await self._client.create_payload_index(
                name, "tenant", models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
            )
            for field in space.keywords:
                await self._client.create_payload_index(name, field, models.PayloadSchemaType.KEYWORD)
            for field in space.integers:
                await self._client.create_payload_index(name, field, models.PayloadSchemaType.INTEGER)

    async def _ask(self, asked: Awaitable[T]) -> T:
        if not self._prepared:
            asyncio.ensure_future(asked).cancel()
            raise Unavailable("the vector store has not been reached yet", dependency="qdrant")
        with self._failures():
            return await asked

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except AioRpcError as error:
            if error.code() in _OUR_FAULT:
                raise
            # A server that came back empty has to be prepared again.
            if error.code() is StatusCode.NOT_FOUND:
                self._prepared = False
            raise Unavailable("the vector store cannot be reached", dependency="qdrant") from error
        except (ApiException, OSError) as error:
            if isinstance(error, OtherEmbedder):
                raise
            raise Unavailable("the vector store cannot be reached", dependency="qdrant") from error


def translated(where: Filter) -> models.Filter:
    """`where` in Qdrant's terms; the tenant is always part of it."""
    return models.Filter(must=_conditions(where))


def _conditions(where: Filter) -> list[Any]:
    must: list[Any] = [models.FieldCondition(key="tenant", match=models.MatchValue(value=where.tenant))]
    must += [models.FieldCondition(key=key, match=models.MatchValue(value=value)) for key, value in where.equal.items()]
    must += [models.FieldCondition(key=key, match=models.MatchAny(any=list(values))) for key, values in where.any_of.items()]
    must += [models.FieldCondition(key=key, range=models.Range(gte=value)) for key, value in where.at_least.items()]
    must += [models.FieldCondition(key=key, range=models.Range(lt=value)) for key, value in where.below.items()]
    if where.readers is not None:
        open_to_all = models.IsEmptyCondition(is_empty=models.PayloadField(key="readers"))
        named = models.FieldCondition(key="readers", match=models.MatchAny(any=list(where.readers)))
        must.append(models.Filter(should=[open_to_all, named]))
    return must


def _fusion(query: Query) -> Any:
    if query.fusion.mode == "rrf":
        return models.RrfQuery(rrf=models.Rrf(k=query.fusion.rrf_k, weights=list(query.fusion.weights)))
    return models.FusionQuery(fusion=models.Fusion.DBSF)


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors["dense"] = [float(value) for value in point.dense]
    if point.sparse is not None:
        vectors["bm25"] = models.SparseVector(indices=list(point.sparse.indices), values=list(point.sparse.values))
    return vectors
