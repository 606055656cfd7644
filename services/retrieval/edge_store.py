"""The VectorStore port on Qdrant Edge: one shard a space, in this process, owned by it alone.

Calls run on the event loop: the engine holds the GIL while it works, so a thread would only add its switch to a query of 0.2 ms.
For the same reason `optimize()` is never called here: it stops the whole process for seconds. What is written is searched by looking at
every vector until a copy of the shard has been built elsewhere and has taken its place: see `rebuild`.
"""

import asyncio
import dataclasses
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import qdrant_edge as edge
import structlog

from services.chassis.errors import Unavailable
from services.retrieval.edge_folders import another, clear, put_behind, settle, switch
from services.retrieval.facts import FACTS, NAME, VALUE, Condition
from services.retrieval.ports import (
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

T = TypeVar("T")

CANDIDATES = 300
"""Places of the graph that a search by meaning keeps in view: of the hundred nearest of 45,000 sentences it finds 99.3, of the ten 9.99."""
OVERSAMPLING = 2.0
"""Candidates by rounded vectors for each wanted hit, before the whole vectors decide."""
EXCLUDES_NOTHING = 0.999
"""Share that a filter must let pass to be none to the graph, as with one tenant and one collection: being ready to follow excluded links
makes a search that meets none an eighth slower. Where 2 % are excluded, another 2 of 100 are missed without."""
BUILT_FILE = "built_points"
"""In a shard's folder: how many points it had when its graph was built."""
CARRIED_AT_ONCE = 128
"""Points that are carried over to a rebuilt shard in one go: some milliseconds of the event loop."""
CARRIED_MAX = 200_000
"""Ids that are remembered while a shard is being rebuilt, 20 MB. With more, it is begun anew later."""
ROUNDS_MAX = 1000
ROOM = 4
"""Free space that a rebuild asks for, in sizes of the shard: a copy, and what is built of it. Writes must not run out of it."""

log = structlog.get_logger(__name__)


class StoreBusy(OSError):
    """Another process owns the folder."""


@dataclasses.dataclass(slots=True)
class _Missed:
    """What was done to a shard since a copy of it was begun: which points, not what they hold, for that the shard itself knows."""

    ids: set[str] = dataclasses.field(default_factory=set)
    deletions: list[Any] = dataclasses.field(default_factory=list)

    def note(self, ids: Sequence[str], deletion: Any) -> None:
        # One beyond the bound is kept, which tells that there were too many.
        if len(self.ids) + len(self.deletions) <= CARRIED_MAX:
            self.ids.update(ids)
            self.deletions += [deletion] if deletion else []


class EdgeStore:
    """Open with `EdgeStore.open`, close with `close`."""

    def __init__(self, shards: dict[str, Any], folder: Path, dimension: int) -> None:
        self._shards = shards
        self._folder = folder
        self._dimension = dimension
        self._closed = False
        self._unbuilt: dict[str, int] = {name: _unbuilt(folder / name, shard) for name, shard in shards.items()}
        # At first all: what a start replayed of their logs would be replayed at every start.
        self._unflushed = set(shards)
        self._missed: dict[str, _Missed] = {}
        self._unfrozen = asyncio.Event()
        self._unfrozen.set()

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
        self._closed = True
        for name, shard in self._shards.items():
            for ending in (shard.flush, shard.close):
                try:
                    ending()
                except Exception as error:
                    log.error("shard_not_flushed", space=name, error=str(error)[:200])
        self._shards.clear()

    def flush(self) -> None:
        """Write out the segments of what was written to, so that a later start replays a short log.

        The engine stops the process meanwhile, ten milliseconds with a disk at rest. While a shard is being copied another time will do.
        """
        if self._unfrozen.is_set():
            for name, shard in self._shards.items():
                if name in self._unflushed:
                    shard.flush()
                    self._unflushed.discard(name)

    async def ensure(self, space: Space) -> None:
        if not self._closed and space.name not in self._shards:
            shard = self._shards[space.name] = _open_shard(self._folder / space.name, space, self._dimension)
            self._unflushed.add(space.name)
            self._unbuilt[space.name] = _unbuilt(self._folder / space.name, shard)

    async def claim(self, space: Space, point: Point) -> Record:
        await self._writable()
        # Nothing suspends from here on, and nobody else has the shard.
        tenant = str(point.payload["tenant"])
        found = (await self.get(space, tenant, [point.id])).get(point.id)
        if found is not None:
            return found
        await self.upsert(space, [point])
        return Record(point.id, point.payload)

    async def exchange(self, space: Space, point: Point, expected: Mapping[str, str | int]) -> None:
        await self._writable()
        # As above.
        found = (await self.get(space, str(point.payload["tenant"]), [point.id])).get(point.id)
        if found is not None and _has(found, expected):
            await self.upsert(space, [point])

    async def tenants(self, space: Space) -> list[str]:
        request = edge.FacetRequest("tenant", limit=TENANTS_MAX, exact=True)
        return [str(hit.value) for hit in self._call(space, lambda shard: shard.facet(request)).hits]

    async def upsert(self, space: Space, points: Sequence[Point]) -> None:
        batch = [edge.Point(point.id, _vectors(point), stored_payload(point)) for point in points]
        await self._writable()
        self._update(space, edge.UpdateOperation.upsert_points(batch), [point.id for point in points])
        self._unbuilt[space.name] += len(batch)

    async def delete(self, space: Space, where: Filter) -> None:
        deletion = edge.UpdateOperation.delete_points_by_filter(translated(where))
        await self._writable()
        self._update(space, deletion, deletion=deletion)

    async def remove(self, space: Space, tenant: str, ids: Sequence[str], expected: Mapping[str, str | int] = {}) -> None:
        await self._writable()
        owned: list[Any] = [id_ for id_, record in (await self.get(space, tenant, ids)).items() if _has(record, expected)]
        if owned:
            self._update(space, edge.UpdateOperation.delete_points(owned), owned)

    async def expire(self, space: Space, field: str, below: int) -> None:
        old = edge.Filter(must=[edge.FieldCondition(key=field, range=edge.RangeFloat(lt=float(below)))])
        deletion = edge.UpdateOperation.delete_points_by_filter(old)
        await self._writable()
        # A deletion of nothing would be written and flushed like any other.
        if self._call(space, lambda shard: shard.count(edge.CountRequest(filter=old, exact=True))):
            self._update(space, deletion, deletion=deletion)

    async def get(self, space: Space, tenant: str, ids: Sequence[str], *, sketches: bool = False) -> dict[str, Record]:
        if not ids:
            return {}
        told = True if sketches else _told(space)
        points = self._call(space, lambda shard: shard.retrieve(list(ids), with_payload=told, with_vector=False))
        # The engine makes id and payload anew whenever they are asked for.
        found = [(str(point.id), point.payload) for point in points]
        return {id_: record_of(id_, payload) for id_, payload in found if payload["tenant"] == tenant}

    async def find(self, space: Space, where: Filter, *, limit: int, order_by: str = "", descending: bool = False) -> list[Record]:
        order = edge.OrderBy(order_by, edge.Direction.Desc if descending else edge.Direction.Asc) if order_by else None
        request = edge.ScrollRequest(limit=limit, filter=translated(where), with_payload=_told(space), with_vector=False, order_by=order)
        points, _ = self._call(space, lambda shard: shard.scroll(request))
        return [Record(str(point.id), point.payload) for point in points]

    async def count(self, space: Space, where: Filter) -> int:
        return int(self._call(space, lambda shard: shard.count(edge.CountRequest(filter=translated(where), exact=True))))

    async def rank(self, space: Space, query: Query) -> Ranked:
        request = edge.QueryRequest(
            query=_nearest(query.near), filter=translated(query.where), limit=query.limit, with_payload=False, params=_how(query.limit)
        )
        points = self._call(space, lambda shard: shard.query(request))
        return {point.id.int: point.score for point in points}

    async def check(self) -> None:
        for space in SPACES:
            self._call(space, lambda shard: shard.info())

    def unbuilt(self) -> dict[str, tuple[int, int]]:
        """By space with vectors of meaning: points that were written since its graph was built, and all of them."""
        return {name: (self._unbuilt[name], shard.info().points_count) for name, shard in self._shards.items() if _has_meaning(name)}

    async def rebuild(self, name: str, build: Callable[[Path], Awaitable[None]]) -> None:
        """Let `build` work on a copy of the space's shard, carry over what was written meanwhile, and put it in the shard's place.

        Until the switch, which is one step, the old shard takes every write and answers every question, so that nothing rests on whether
        this comes to its end. Writes wait while files are copied. Raises OSError, and what `build` raises.

        Cancellation: the copy is given up.
        """
        link = self._folder / name
        before, copy = link.resolve(), another(link)
        try:
            points = await self._copied(name, copy)
            await build(copy)
            fresh = _loaded(copy)
            try:
                await self._carry_over(name, fresh)
                # Nothing suspends from the last look at what was missed to the end of the switch.
                fresh.flush()
                (copy / BUILT_FILE).write_text(str(points))
                unbuilt = _unbuilt(copy, fresh)
                switch(link, copy)
            except BaseException:
                fresh.close()
                raise
            old, self._shards[name] = self._shards[name], fresh
            self._unbuilt[name] = unbuilt
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        finally:
            self._missed.pop(name, None)
        try:
            await asyncio.sleep(0)  # questions that came during the switch go first
        finally:
            old.close()
        await asyncio.to_thread(shutil.rmtree, before, ignore_errors=True)

    async def _copied(self, name: str, copy: Path) -> int:
        """Copy the shard's files as they are at one moment, and begin to note what is done to it; return how many points they hold.

        They are what a process that was killed at that moment would leave, which is what the engine can open.
        """
        source = (self._folder / name).resolve()
        size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
        if shutil.disk_usage(source).free < ROOM * size:
            raise OSError("there is no room to rebuild a shard in")
        points = int(self._shards[name].info().points_count)
        self._unfrozen.clear()
        self._missed[name] = _Missed()
        copying = asyncio.ensure_future(asyncio.to_thread(shutil.copytree, source, copy, dirs_exist_ok=True))
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            # The thread cannot be stopped, and until it is done nobody may write what it reads, nor remove what it writes.
            await asyncio.wait([copying])
            raise
        finally:
            self._unfrozen.set()
        return points

    async def _carry_over(self, name: str, fresh: Any) -> None:
        """Do to `fresh` what was done to the shard since the copy was begun; nothing is missing when this returns."""
        missed = self._missed[name]
        for _ in range(ROUNDS_MAX):
            if not missed.ids and not missed.deletions:
                return
            if len(missed.ids) + len(missed.deletions) > CARRIED_MAX:
                break
            ids, deletions = sorted(missed.ids), missed.deletions
            missed.ids, missed.deletions = set(), []
            # Deletions first: a point that was written after one is among the ids, and is taken as it is now.
            for deletion in deletions:
                fresh.update(deletion)
            for begin in range(0, len(ids), CARRIED_AT_ONCE):
                some = ids[begin : begin + CARRIED_AT_ONCE]
                there = self._shards[name].retrieve(some, with_payload=True, with_vector=True)
                if there:
                    fresh.update(edge.UpdateOperation.upsert_points([edge.Point(point.id, point.vector, point.payload) for point in there]))
                if gone := set(some) - {str(point.id) for point in there}:
                    fresh.update(edge.UpdateOperation.delete_points(sorted(gone)))
                await asyncio.sleep(0)
        raise OSError("more was written than a rebuilt shard can be told of")

    async def _writable(self) -> None:
        while not self._unfrozen.is_set():
            await self._unfrozen.wait()

    def _update(self, space: Space, operation: Any, ids: Sequence[str] = (), deletion: Any = None) -> None:
        # Before the write: of one that fails half-way something may be there.
        self._unflushed.add(space.name)
        self._call(space, lambda shard: shard.update(operation))
        if missed := self._missed.get(space.name):
            missed.note(ids, deletion)

    def _call(self, space: Space, work: Callable[[Any], T]) -> T:
        shard = self._shards.get(space.name)
        if shard is None:
            raise Unavailable("the vector store is closed", dependency="qdrant")
        return work(shard)


def _told(space: Space) -> Any:
    """What of a payload is read where sketches are not asked for."""
    return edge.PayloadSelector.Exclude([SKETCH]) if space.sketched else True


def _has(record: Record, expected: Mapping[str, str | int]) -> bool:
    return all(record.payload.get(key) == value for key, value in expected.items())


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


def _nearest(to: Sequence[float] | Sparse) -> Any:
    if isinstance(to, Sparse):
        return edge.Query.Nearest(_words(to), using="bm25")
    return edge.Query.Nearest(list(to), using="dense")


def _words(sparse: Sparse) -> Any:
    return edge.SparseVector(list(sparse.indices), list(sparse.values))


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors["dense"] = list(point.dense)
    if point.sparse is not None:
        vectors["bm25"] = _words(point.sparse)
    return vectors


def _how(limit: int) -> Any:
    """For what has a graph; the rest is looked at whole."""
    rounded = edge.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING)
    # Where a filter excludes some of what the graph leads over, the links of what is excluded are followed, too.
    through = edge.AcornSearchParams(enable=True, max_selectivity=EXCLUDES_NOTHING)
    return edge.SearchParams(hnsw_ef=max(CANDIDATES, limit), quantization=rounded, acorn=through)


def _has_meaning(name: str) -> bool:
    """Spaces of other encodings are named after those of the first."""
    return any(space.dense and (name == space.name or name.startswith(f"{space.name}-")) for space in SPACES)


def _unbuilt(folder: Path, shard: Any) -> int:
    built = folder / BUILT_FILE
    said = built.read_text() if built.exists() else ""
    return max(0, int(shard.info().points_count) - (int(said) if said.isdecimal() else 0))


def _open_shard(link: Path, space: Space, dimension: int) -> Any:
    """A shard counts as made only once the link leads to it: a start that dies half-way leaves nothing that looks like one."""
    settle(link)
    if not link.exists():
        folder = another(link)
        shard = edge.EdgeShard.create(str(folder), _config(space, dimension))
        _index(shard, space)
        shard.flush()
        shard.close()
        switch(link, folder)
    shard = _loaded(link)
    if not link.is_symlink():
        shard.close()
        put_behind(link)
        shard = _loaded(link)
    clear(link)
    # What an older release made lacks the younger fields' indexes.
    _index(shard, space)
    return shard


def _loaded(link: Path) -> Any:
    """The shard that the link leads to, opened by its own path: see edge_folders. Raises StoreBusy if another process has it."""
    try:
        return edge.EdgeShard.load(str(link.resolve()))
    except Exception as error:
        # The binding raises bare Exception; its text is all there is to tell a lock from damage.
        if "WouldBlock" in str(error):
            raise StoreBusy(f"{link.parent} is in use by another retrieval process; give each its own TAILRACE_STATE_DIR") from error
        raise OSError(f"{link} cannot be opened: {error}") from error


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
