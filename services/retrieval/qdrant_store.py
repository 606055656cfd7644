"""The VectorStore port on a Qdrant server, over gRPC. Collections are made on first contact, which may come long after the start.

Every failure to reach the server becomes Unavailable(dependency="qdrant"); the next call tries again.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from grpc import StatusCode
from grpc.aio import AioRpcError
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.http.exceptions import ApiException

from services.chassis.errors import Unavailable
from services.retrieval.facts import FACTS, NAME, VALUE, Condition
from services.retrieval.fingerprint import settle
from services.retrieval.ports import (
    DOCUMENTS,
    SKETCH,
    SPACES,
    TENANTS_MAX,
    Filter,
    Point,
    Query,
    Ranked,
    Record,
    Space,
    Sparse,
    record_of,
    stored_payload,
)
from services.retrieval.qdrant_layout import Layout

log = structlog.get_logger(__name__)
T = TypeVar("T")

COLLECTION_PREFIX = "tailrace-"
RETRY_S = 0.1
_OUR_FAULT = {StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED}


class QdrantStore:
    """`prepare` it until it succeeds; before that every call raises Unavailable."""

    def __init__(
        self,
        client: AsyncQdrantClient,
        dimension: int,
        fingerprint: str,
        prefix: str = COLLECTION_PREFIX,
        layout: Layout | None = None,
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._dimension = dimension
        self._fingerprint = fingerprint
        self._layout = layout or Layout()
        self._made: dict[str, Space] = {}
        self._prepared = False
        self._preparing = asyncio.Lock()

    async def prepare(self) -> None:
        """Make what collections are missing. Raises Unavailable."""
        async with self._preparing:
            if self._prepared:
                return
            await self._make(DOCUMENTS)
            unguarded = QdrantStore(self._client, self._dimension, self._fingerprint, self._prefix, self._layout)
            unguarded._prepared = True
            # The names without a suffix are the first embedder's, and so is the dimension of what is behind them.
            if await settle(unguarded, self._fingerprint) == self._fingerprint:
                for space in SPACES:
                    await self._make(space)
            for space in list(self._made.values()):
                await self._make(space)
            self._prepared = True

    async def close(self) -> None:
        await self._client.close()

    async def ensure(self, space: Space) -> None:
        if not self._prepared:
            raise Unavailable("the vector store has not been reached yet", dependency="qdrant")
        if space.name not in self._made:
            await self._make(space)

    async def claim(self, space: Space, point: Point) -> Record:
        only_new: dict[str, Any] = {"update_mode": models.UpdateMode.INSERT_ONLY}
        batch = [models.PointStruct(id=point.id, vector=_vectors(point), payload=stored_payload(point))]
        await self._ask(lambda: self._client.upsert(self._name(space), batch, **self._layout.write(), **only_new))
        found = await self.get(space, str(point.payload["tenant"]), [point.id])
        if point.id not in found:
            raise Unavailable("what was written cannot be read yet", dependency="qdrant")
        return found[point.id]

    async def exchange(self, space: Space, point: Point, expected: Mapping[str, str | int]) -> None:
        as_expected = translated(Filter(str(point.payload["tenant"]), equal=expected))
        only_that: dict[str, Any] = {"update_mode": models.UpdateMode.UPDATE_ONLY, "update_filter": as_expected}
        batch = [models.PointStruct(id=point.id, vector=_vectors(point), payload=stored_payload(point))]
        await self._ask(lambda: self._client.upsert(self._name(space), batch, **self._layout.write(), **only_that))

    async def tenants(self, space: Space) -> list[str]:
        reply = await self._ask(
            lambda: self._client.facet(self._name(space), "tenant", limit=TENANTS_MAX, exact=True, **self._layout.read())
        )
        return [str(hit.value) for hit in reply.hits]

    async def upsert(self, space: Space, points: Sequence[Point]) -> None:
        batch = [models.PointStruct(id=point.id, vector=_vectors(point), payload=stored_payload(point)) for point in points]
        await self._ask(lambda: self._client.upsert(self._name(space), batch, **self._layout.write()))

    async def delete(self, space: Space, where: Filter) -> None:
        await self._ask(
            lambda: self._client.delete(self._name(space), models.FilterSelector(filter=translated(where)), **self._layout.write())
        )

    async def remove(self, space: Space, tenant: str, ids: Sequence[str], expected: Mapping[str, str | int] = {}) -> None:
        if ids:
            owned = models.Filter(must=[*_conditions(Filter(tenant, equal=expected)), models.HasIdCondition(has_id=list(ids))])
            await self._ask(lambda: self._client.delete(self._name(space), models.FilterSelector(filter=owned), **self._layout.write()))

    async def expire(self, space: Space, field: str, below: int) -> None:
        old = models.Filter(must=[models.FieldCondition(key=field, range=models.Range(lt=below))])
        await self._ask(lambda: self._client.delete(self._name(space), models.FilterSelector(filter=old), **self._layout.write()))

    async def get(self, space: Space, tenant: str, ids: Sequence[str], *, sketches: bool = False) -> dict[str, Record]:
        if not ids:
            return {}
        told = True if sketches else _told(space)
        points = await self._ask(lambda: self._client.retrieve(self._name(space), list(ids), with_payload=told, **self._layout.read()))
        records = (record_of(str(point.id), dict(point.payload or {})) for point in points)
        return {record.id: record for record in records if record.payload["tenant"] == tenant}

    async def find(self, space: Space, where: Filter, *, limit: int, order_by: str = "", descending: bool = False) -> list[Record]:
        direction = models.Direction.DESC if descending else models.Direction.ASC
        order = models.OrderBy(key=order_by, direction=direction) if order_by else None
        points, _ = await self._ask(
            lambda: self._client.scroll(
                self._name(space),
                scroll_filter=translated(where),
                limit=limit,
                order_by=order,
                with_payload=_told(space),
                **self._layout.read(),
            )
        )
        return [Record(str(point.id), point.payload or {}) for point in points]

    async def count(self, space: Space, where: Filter) -> int:
        # A count takes no consistency: it is exact on the replicas that answer.
        return (await self._ask(lambda: self._client.count(self._name(space), count_filter=translated(where), exact=True))).count

    async def rank(self, space: Space, query: Query) -> Ranked:
        if isinstance(query.near, Sparse):
            asked: dict[str, Any] = {"query": _words(query.near), "using": "bm25"}
        else:
            vector = [float(value) for value in query.near]
            asked = {"query": vector, "using": "dense", "search_params": self._layout.search_params()}
        reply = await self._ask(
            lambda: self._client.query_points(
                self._name(space),
                **asked,
                query_filter=translated(query.where),
                limit=query.limit,
                with_payload=False,
                **self._layout.read(),
            )
        )
        return {uuid.UUID(str(point.id)).int: float(point.score) for point in reply.points}

    async def check(self) -> None:
        for space in [DOCUMENTS, *self._made.values()]:
            if not await self._ask(lambda space=space: self._client.collection_exists(self._name(space))):  # type: ignore[misc]
                self._prepared = False
                raise Unavailable("the vector store has lost its collections", dependency="qdrant")

    async def drop(self) -> None:
        """Remove our collections and everything in them."""
        for space in list(self._made.values()):
            await self._ask(lambda space=space: self._client.delete_collection(self._name(space)))  # type: ignore[misc]

    def _name(self, space: Space) -> str:
        return f"{self._prefix}{space.name}"

    async def _make(self, space: Space) -> None:
        name = self._name(space)
        with self._failures():
            if not await self._client.collection_exists(name):
                try:
                    await self._client.create_collection(name, **self._layout.collection(space, space.dimension or self._dimension))
                except AioRpcError as error:
                    # Another replica may have made it in the meantime.
                    if error.code() not in (StatusCode.ALREADY_EXISTS, StatusCode.INVALID_ARGUMENT):
                        raise
                    if not await self._client.collection_exists(name):
                        raise
            # Indexes that are there already stay as they are.
            for field, schema in self._layout.indexes(space).items():
                await self._client.create_payload_index(name, field, schema, **self._layout.write())
        self._made[space.name] = space

    async def _ask(self, asked: Callable[[], Awaitable[T]]) -> T:
        if not self._prepared:
            raise Unavailable("the vector store has not been reached yet", dependency="qdrant")
        with self._failures():
            try:
                return await asked()
            except AioRpcError as error:
                if error.code() is not StatusCode.UNAVAILABLE:
                    raise
            # Writes name their points and deletions their conditions, so that twice is as good as once. A node that has just
            # gone is behind the address no more.
            await asyncio.sleep(RETRY_S)
            return await asked()

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
            raise Unavailable("the vector store cannot be reached", dependency="qdrant") from error


def _told(space: Space) -> Any:
    """What of a payload is read where sketches are not asked for."""
    return models.PayloadSelectorExclude(exclude=[SKETCH]) if space.sketched else True


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
    must += [_of_facts(condition) for condition in where.facts]
    return must


def _of_facts(condition: Condition) -> models.Filter:
    parts: list[Any] = [models.FieldCondition(key=FACTS, match=models.MatchAny(any=list(condition.keywords)))]
    for measure in condition.measures:
        # Nested: name and range have to hold of the same object.
        named = models.FieldCondition(key=NAME, match=models.MatchValue(value=measure.name))
        within = models.FieldCondition(key=VALUE, range=models.Range(gte=measure.least, lt=measure.below))
        parts.append(models.NestedCondition(nested=models.Nested(key=measure.field, filter=models.Filter(must=[named, within]))))
    return models.Filter(must_not=[models.Filter(must=parts)]) if condition.negated else models.Filter(must=parts)


def _words(sparse: Sparse) -> models.SparseVector:
    return models.SparseVector(indices=list(sparse.indices), values=list(sparse.values))


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors["dense"] = [float(value) for value in point.dense]
    if point.sparse is not None:
        vectors["bm25"] = _words(point.sparse)
    return vectors
