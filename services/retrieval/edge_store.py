"""The VectorStore port on Qdrant Edge: one shard a space, in this process, owned by it alone.

Calls run on the event loop: the engine holds the GIL while it works, so a thread would only add its switch to a query of 0.2 ms.
For the same reason `optimize()` is never called here: it stops the whole process for seconds.
"""

import functools
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import qdrant_edge as edge
import structlog

from services.chassis.errors import Unavailable
from services.retrieval.facts import FACTS, NAME, VALUE, Condition
from services.retrieval.ports import SPACES, TENANTS_MAX, Filter, Point, Query, Record, Space

T = TypeVar("T")

IDS_KEPT = 16_384
"""Ids as text, 5 MB at most: a search ranks two hundred points, often the same ones, and writing an id takes a microsecond."""

log = structlog.get_logger(__name__)


class StoreBusy(OSError):
    """Another process owns the folder."""


class EdgeStore:
    """Open with `EdgeStore.open`, close with `close`."""

    def __init__(self, shards: dict[str, Any], folder: Path, dimension: int) -> None:
        self._shards = shards
        self._folder = folder
        self._dimension = dimension
        self._closed = False

    @classmethod
    def open(cls, folder: Path, dimension: int) -> "EdgeStore":
        """Load the shards in `folder`, or make them. Raises StoreBusy if another process has them open."""
        shards: dict[str, Any] = {}
        try:
            for space in SPACES:
                shards[space.name] = _open_shard(folder / space.name, space, dimension)
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        return cls(shards, folder, dimension)

    def close(self) -> None:
        """Flush and close; calls after it raise Unavailable.

        What the engine fails to flush is in its log all the same, and the next start replays it, as after kill -9.
        """
        for name, shard in self._shards.items():
            for ending in (shard.flush, shard.close):
                try:
                    ending()
                except Exception as error:
                    log.error("shard_not_flushed", space=name, error=str(error)[:200])
        self._shards.clear()

    def flush(self) -> None:
        """Write segments out, so that a later start replays a short log."""
        for shard in self._shards.values():
            shard.flush()

    async def ensure(self, space: Space) -> None:
        if not self._closed and space.name not in self._shards:
            self._shards[space.name] = _open_shard(self._folder / space.name, space, self._dimension)

    async def claim(self, space: Space, point: Point) -> Record:
        # Nothing suspends in here, and nobody else has the shard.
        tenant = str(point.payload["tenant"])
        found = (await self.get(space, tenant, [point.id])).get(point.id)
        if found is not None:
            return found
        await self.upsert(space, [point])
        return Record(point.id, point.payload)

    async def tenants(self, space: Space) -> list[str]:
        request = edge.FacetRequest("tenant", limit=TENANTS_MAX, exact=True)
        return [str(hit.value) for hit in self._call(space, lambda shard: shard.facet(request)).hits]

    async def upsert(self, space: Space, points: Sequence[Point]) -> None:
        batch = [edge.Point(point.id, _vectors(point), dict(point.payload)) for point in points]
        self._update(space, edge.UpdateOperation.upsert_points(batch))

    async def delete(self, space: Space, where: Filter) -> None:
        self._update(space, edge.UpdateOperation.delete_points_by_filter(translated(where)))

    async def remove(self, space: Space, tenant: str, ids: Sequence[str]) -> None:
        owned = await self.get(space, tenant, ids)
        if owned:
            self._update(space, edge.UpdateOperation.delete_points([*owned]))

    async def expire(self, space: Space, field: str, below: int) -> None:
        old = edge.Filter(must=[edge.FieldCondition(key=field, range=edge.RangeFloat(lt=float(below)))])
        self._update(space, edge.UpdateOperation.delete_points_by_filter(old))

    async def get(self, space: Space, tenant: str, ids: Sequence[str]) -> dict[str, Record]:
        if not ids:
            return {}
        points = self._call(space, lambda shard: shard.retrieve(list(ids), with_payload=True, with_vector=False))
        return {str(point.id): Record(str(point.id), point.payload) for point in points if point.payload["tenant"] == tenant}

    async def find(self, space: Space, where: Filter, *, limit: int, order_by: str = "", descending: bool = False) -> list[Record]:
        order = edge.OrderBy(order_by, edge.Direction.Desc if descending else edge.Direction.Asc) if order_by else None
        request = edge.ScrollRequest(limit=limit, filter=translated(where), with_payload=True, with_vector=False, order_by=order)
        points, _ = self._call(space, lambda shard: shard.scroll(request))
        return [Record(str(point.id), point.payload) for point in points]

    async def count(self, space: Space, where: Filter) -> int:
        return int(self._call(space, lambda shard: shard.count(edge.CountRequest(filter=translated(where), exact=True))))

    async def search(self, space: Space, query: Query) -> list[Record]:
        where = translated(query.where)
        nearest = []
        if query.dense is not None:
            nearest.append(edge.Query.Nearest(list(query.dense), using="dense"))
        if query.sparse is not None:
            nearest.append(edge.Query.Nearest(edge.SparseVector(list(query.sparse.indices), list(query.sparse.values)), using="bm25"))
        if len(nearest) == 1:
            request = edge.QueryRequest(query=nearest[0], filter=where, limit=query.limit, with_payload=query.payload)
        else:
            brought = max(query.fusion.prefetch, query.limit)
            prefetches = [edge.Prefetch(query=one, limit=brought, filter=where) for one in nearest]
            request = edge.QueryRequest(prefetches=prefetches, query=_fusion(query), limit=query.limit, with_payload=query.payload)
        points = self._call(space, lambda shard: shard.query(request))
        return [Record(_written(point.id.int), point.payload or {}, float(point.score)) for point in points]

    async def check(self) -> None:
        for space in SPACES:
            self._call(space, lambda shard: shard.info())

    def _update(self, space: Space, operation: Any) -> None:
        self._call(space, lambda shard: shard.update(operation))

    def _call(self, space: Space, work: Callable[[Any], T]) -> T:
        shard = self._shards.get(space.name)
        if shard is None:
            raise Unavailable("the vector store is closed", dependency="qdrant")
        return work(shard)


@functools.lru_cache(maxsize=IDS_KEPT)
def _written(number: int) -> str:
    """The UUID with that number, as ids are written here."""
    return str(uuid.UUID(int=number))


def translated(where: Filter) -> Any:
    """`where` in Edge's terms; the tenant is always part of it."""
    must: list[Any] = [edge.FieldCondition(key="tenant", match=edge.MatchValue(where.tenant))]
    must += [edge.FieldCondition(key=key, match=edge.MatchValue(value)) for key, value in where.equal.items()]
    must += [edge.FieldCondition(key=key, match=edge.MatchAny(list(values))) for key, values in where.any_of.items()]
    must += [edge.FieldCondition(key=key, range=edge.RangeFloat(gte=float(value))) for key, value in where.at_least.items()]
    must += [edge.FieldCondition(key=key, range=edge.RangeFloat(lt=float(value))) for key, value in where.below.items()]
    if where.readers is not None:
        open_to_all = edge.IsEmptyCondition(key="readers")
        must.append(edge.Filter(should=[open_to_all, edge.FieldCondition(key="readers", match=edge.MatchAny(list(where.readers)))]))
    must += [_of_facts(condition) for condition in where.facts]
    return edge.Filter(must=must)


def _of_facts(condition: Condition) -> Any:
    parts: list[Any] = [edge.FieldCondition(key=FACTS, match=edge.MatchAny(list(condition.keywords)))]
    for measure in condition.measures:
        # Nested: name and range have to hold of the same object.
        named = edge.FieldCondition(key=NAME, match=edge.MatchValue(measure.name))
        within = edge.FieldCondition(key=VALUE, range=edge.RangeFloat(gte=measure.least, lt=measure.below))
        parts.append(edge.NestedCondition(key=measure.field, filter=edge.Filter(must=[named, within])))
    return edge.Filter(must_not=[edge.Filter(must=parts)]) if condition.negated else edge.Filter(must=parts)


def _fusion(query: Query) -> Any:
    if query.fusion.mode == "rrf":
        return edge.Fusion.Rrf(k=query.fusion.rrf_k, weights=list(query.fusion.weights))
    return edge.Fusion.Dbsf()


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors["dense"] = list(point.dense)
    if point.sparse is not None:
        vectors["bm25"] = edge.SparseVector(list(point.sparse.indices), list(point.sparse.values))
    return vectors


def _open_shard(folder: Path, space: Space, dimension: int) -> Any:
    """A shard counts as made only once it has its final name: a start that dies half-way leaves nothing that looks like one."""
    if not folder.exists():
        unfinished = folder.with_name(f".making-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        shard = edge.EdgeShard.create(str(unfinished), _config(space, dimension))
        _index(shard, space)
        shard.flush()
        shard.close()
        unfinished.rename(folder)
    try:
        shard = edge.EdgeShard.load(str(folder))
    except Exception as error:
        # The binding raises bare Exception; its text is all there is to tell a lock from damage.
        if "WouldBlock" in str(error):
            raise StoreBusy(f"{folder.parent} is in use by another retrieval process; give each its own TAILRACE_STATE_DIR") from error
        raise OSError(f"{folder} cannot be opened: {error}") from error
    # What an older release made lacks the younger fields' indexes.
    _index(shard, space)
    return shard


def _index(shard: Any, space: Space) -> None:
    """Index the fields of `space` that are not yet."""
    kinds = (
        (edge.PayloadSchemaType.Keyword, ("tenant", *space.keywords)),
        (edge.PayloadSchemaType.Integer, space.integers),
        (edge.PayloadSchemaType.Float, space.numbers),
    )
    for kind, fields in kinds:
        for field in fields:
            shard.update(edge.UpdateOperation.create_field_index(field, kind))


def _config(space: Space, dimension: int) -> Any:
    return edge.EdgeConfig(
        vectors={"dense": edge.EdgeVectorParams(size=space.dimension or dimension, distance=edge.Distance.Cosine)} if space.dense else {},
        sparse_vectors={"bm25": edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)} if space.sparse else {},
        # A query is 0.2 ms of work: more threads would only wait for each other.
        max_search_threads=1,
    )
