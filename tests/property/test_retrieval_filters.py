"""Conditions on metadata mean the same in every store as in plain Python, whatever the keys and values look like."""

import asyncio
import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qdrant_client import AsyncQdrantClient

from services.retrieval import facts
from services.retrieval.domain import Fact, stable_id
from services.retrieval.edge_store import EdgeStore
from services.retrieval.facts import Condition
from services.retrieval.ports import CHUNKS, Filter, Point, VectorStore
from services.retrieval.qdrant_store import QdrantStore

HOSTILE = [
    "a", "A", "a.b", "a[]", "a[0]", "numbers[].value", "facts", "tenant", "readers", "document_id", "1:a", "a=s:b", "a=b", '"', "'", "\\",
    "\0", " ", "é", "e\u0301", "а", "𝒂", "\u202ea", "x" * 256, "x" * 255,
]  # fmt: skip
MOMENTS = ["2026-01-01", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "2026-01-01T00:00:00.000001Z", "2025-12-31t23:59:59z"]
NUMBERS = [0.0, -0.0, 1.0, 1.5, -1.5, 0.1 + 0.2, 0.3, 1e300, -1e300, 5e-324, 2.0**53, 2.0**53 + 2]
numbers = st.sampled_from(NUMBERS) | st.floats(allow_nan=False, allow_infinity=False)
strings = st.sampled_from([*MOMENTS, *HOSTILE, "", "1", "1.0", "True", "b", "s:b", "2026-01-01 ", "2026-13-01", "2026-W01-1"]) | st.text(
    max_size=20
)
keys = st.sampled_from(HOSTILE[:6]) | st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=20)
values: st.SearchStrategy[Fact] = st.booleans() | numbers | strings
START = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
moments = st.sampled_from([START + step for step in (-1_000_000, -1, 0, 1, 2)])


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    return Condition(
        draw(keys),
        any_of=tuple(draw(st.lists(values, max_size=3))),
        at_least=draw(st.none() | st.none() | numbers),
        below=draw(st.none() | st.none() | numbers),
        from_us=draw(st.none() | st.none() | moments),
        until_us=draw(st.none() | st.none() | moments),
        negated=draw(st.booleans()),
    )


def matches(metadata: dict[str, Fact], condition: Condition) -> bool:
    """The contract of MetadataCondition, read aloud."""
    return _as_asked(metadata, condition) != condition.negated


def _as_asked(metadata: dict[str, Fact], condition: Condition) -> bool:
    if condition.key not in metadata:
        return False
    fact = metadata[condition.key]
    # In Python True is 1.
    if condition.any_of and (isinstance(fact, bool), fact) not in [(isinstance(one, bool), one) for one in condition.any_of]:
        return False
    if condition.at_least is not None or condition.below is not None:
        if isinstance(fact, bool | str):
            return False
        if not (-math.inf if condition.at_least is None else condition.at_least) <= fact:
            return False
        if not fact < (math.inf if condition.below is None else condition.below):
            return False
    if condition.from_us is not None or condition.until_us is not None:
        at = _moment(fact)
        if at is None:
            return False
        if condition.from_us is not None and at < condition.from_us:
            return False
        if condition.until_us is not None and at >= condition.until_us:
            return False
    return True


def _moment(fact: Fact) -> int | None:
    """Of the few that are drawn; what is drawn letter by letter is none."""
    offsets = {MOMENTS[0]: 0, MOMENTS[1]: 0, MOMENTS[2]: 0, MOMENTS[3]: 1, MOMENTS[4]: -1_000_000}
    return START + offsets[fact] if isinstance(fact, str) and fact in offsets else None


@dataclass
class Stores:
    """Both kinds, in one event loop."""

    runner: asyncio.Runner
    stores: dict[str, VectorStore]
    tenants: Iterator[str]

    def found(self, name: str, tenant: str, where: Filter) -> set[str]:
        async def ask() -> set[str]:
            return {record.id for record in await self.stores[name].find(CHUNKS, where, limit=100)}

        return self.runner.run(ask())

    def write(self, points: list[Point]) -> None:
        async def upsert() -> None:
            for store in self.stores.values():
                await store.upsert(CHUNKS, points)

        self.runner.run(upsert())

    def forget(self, tenant: str) -> None:
        async def delete() -> None:
            for store in self.stores.values():
                await store.delete(CHUNKS, Filter(tenant))

        self.runner.run(delete())


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    with asyncio.Runner() as runner:
        embedded = EdgeStore.open(Path(tmp_path_factory.mktemp("filters")) / "qdrant", 2)
        in_memory = QdrantStore(AsyncQdrantClient(":memory:"), 2, "test")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            runner.run(in_memory.prepare())
        yield Stores(runner, {"edge": embedded, "memory": in_memory}, (f"tenant {number}" for number in itertools.count()))
        runner.run(in_memory.close())
        embedded.close()


def point(tenant: str, place: int, metadata: dict[str, Fact]) -> Point:
    payload: dict[str, Any] = {"tenant": tenant, "collection": "default", "place": place, **facts.payload(metadata)}
    return Point(stable_id(tenant, str(place)), payload, [1.0, 0.0])


@given(
    documents=st.lists(st.dictionaries(keys, values, max_size=4), min_size=1, max_size=6),
    asked=st.lists(conditions(), min_size=1, max_size=8),
    together=st.integers(1, 3),
)
@example(
    documents=[{"a": "b=s:c"}, {"a=s:b": "c"}], asked=[Condition("a=s:b", any_of=("c",)), Condition("a", any_of=("b=s:c",))], together=1
)
@example(documents=[{"a": 1.0, "b": 9.0}, {"a": 9.0}], asked=[Condition("a", at_least=5.0), Condition("b", below=5.0)], together=1)
@example(documents=[{"a": True}, {"a": 1.0}, {"a": "True"}, {}], asked=[Condition("a", any_of=(True,)), Condition("a")], together=1)
@example(documents=[{"a": -0.0}, {"a": 0.0}], asked=[Condition("a", any_of=(0.0,)), Condition("a", any_of=(-0.0,))], together=1)
@example(documents=[{"a": MOMENTS[0]}, {"a": START + 0.0}], asked=[Condition("a", from_us=START), Condition("a", at_least=1.0)], together=1)
@settings(max_examples=150, deadline=None)
def test_every_store_finds_what_the_contract_says(
    stores: Stores, documents: list[dict[str, Fact]], asked: list[Condition], together: int
) -> None:
    """Each condition alone and turned round, and several together; another tenant's twin is never among them."""
    tenant = next(stores.tenants)
    points = [point(tenant, place, metadata) for place, metadata in enumerate(documents)]
    stores.write(points + [point(f"{tenant} twin", place, metadata) for place, metadata in enumerate(documents)])
    for begin in range(len(asked)):
        chosen = tuple(asked[begin : begin + together])
        expected = {
            one.id for one, metadata in zip(points, documents, strict=True) if all(matches(metadata, condition) for condition in chosen)
        }
        for name in stores.stores:
            assert expected == stores.found(name, tenant, Filter(tenant, facts=chosen)), (name, chosen)
    for owner in (tenant, f"{tenant} twin"):
        stores.forget(owner)
