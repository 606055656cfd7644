"""A change of embedder: beside the old, switched in one write, right at every moment, whoever dies or writes meanwhile."""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient

from services.chassis.clock import SystemClock
from services.chassis.errors import Unavailable
from services.chassis.principal import Principal
from services.retrieval.access import everything_of, reach_of
from services.retrieval.answer_cache import AnswerCache
from services.retrieval.chunking import in_context
from services.retrieval.domain import Chunk, Document, SearchMode, document_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore
from services.retrieval.encoding_spaces import Encodings, Standing
from services.retrieval.late_interaction import FORM, AskedTokens, asked, sketched
from services.retrieval.ports import DOCUMENTS, SYSTEM_TENANT, Embedded, Filter, Fusion, Point, Unpayable, Vectors, VectorStore
from services.retrieval.qdrant_store import QdrantStore
from services.retrieval.reencoding import Reencoding
from services.retrieval.registry import Registry
from services.retrieval.search import Searcher
from tests.fakes.embedding_service import vector

TENANT = "acme"
ANN = Principal(TENANT, "ann")
REACH = reach_of(ANN, "")
LARGE = 150
"""Chunks of a document that is moved in several steps."""


class WordEmbedder:
    """Vectors by words, of a length that tells it from others; another seed makes vectors that mean nothing to the first."""

    def __init__(self, name: str, dimension: int) -> None:
        self.embedder_id = name
        self.dimension = dimension
        self.embedded = 0

    async def embed_question(self, text: str) -> Vectors:
        row = np.asarray([vector(f"{text}", self.dimension)], np.float32)
        return row / np.linalg.norm(row)

    async def embed_texts(self, texts: Any) -> Embedded:
        await asyncio.sleep(0)
        self.embedded += len(texts)
        rows = [vector(" ".join(f"{word}" for word in text.split()), self.dimension) for text in texts]
        matrix = np.asarray(rows, np.float32)
        return Embedded(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), len(texts))

    def count_tokens(self, texts: Any) -> list[int]:
        return [len(text.split()) for text in texts]


class TokenReader(WordEmbedder):
    """Of the same id and vectors; it tells those of single words as well."""

    sketch_form = FORM

    async def read_question(self, text: str) -> tuple[Vectors, AskedTokens | None]:
        return await self.embed_question(text), asked(self._tokens(text))

    async def embed_texts(self, texts: Any) -> Embedded:
        tokens = [self._tokens(text) for text in texts]
        sketches = sketched(np.concatenate(tokens), [len(each) for each in tokens])
        return replace(await super().embed_texts(texts), sketches=sketches)

    def _tokens(self, text: str) -> Any:
        return np.asarray([vector(word, self.dimension) for word in text.split()], np.float32)


EMBEDDERS = {name: WordEmbedder(name, dimension) for name, dimension in (("one", 48), ("two", 64), ("three", 32))}
EMBEDDERS["reading one"] = TokenReader("one", 48)


class Killed(BaseException):
    """The process is gone."""


class DyingStore:
    """A store whose process dies at one of its writes; every other call goes through."""

    def __init__(self, store: Any, writes: int) -> None:
        self._store = store
        self._left = writes

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name in ("upsert", "delete", "remove", "claim", "exchange"):
                self._left -= 1
                if self._left < 0:
                    raise Killed
            return await work(*args, **kwargs)

        return call


@dataclass
class Process:
    """One retrieval process as far as it matters here."""

    encodings: Encodings
    registry: Registry
    searcher: Searcher
    reencoding: Reencoding
    embedder: WordEmbedder
    sparse: EdgeBm25
    answers: AnswerCache

    async def ingest(self, name: str, texts: list[str], collection: str = "default", lead: str = "") -> Document:
        """As the pipeline does: embedded by what is set. `lead` is every chunk's."""
        chunks = [Chunk(place, text, place * 1000, place * 1000 + len(text), lead=lead) for place, text in enumerate(texts)]
        id_ = document_id(TENANT, collection, name)
        draft = Document(id_, TENANT, collection, name, name, "text/plain", 0, " ".join(texts), 1, 1, len(chunks), 0, "")
        whole = [in_context(name, chunk) for chunk in chunks]
        embedded = await self.embedder.embed_texts(whole)
        words = [self.sparse.document(text) for text in whole]
        return await self.registry.replace(draft, chunks, embedded.vectors, words, embedded.sketches)

    async def search(self, query: str, mode: SearchMode = SearchMode.HYBRID, limit: int = 3) -> list[str]:
        """Texts of the hits, as the service finds them."""
        encoding = await self.encodings.answering(TENANT, "default")
        dense = await self.encodings.question(encoding, query, needed=mode is SearchMode.DENSE)
        found = await self.searcher.passages(REACH, query, dense, limit=limit, mode=mode, encoding=encoding)
        return [passage.text for passage in found]

    async def late(self, query: str) -> list[float | None]:
        """What late interaction says of the hits."""
        encoding = await self.encodings.answering(TENANT, "default")
        hits = await self.searcher.asked(REACH, query, limit=3, mode=SearchMode.HYBRID, encoding=encoding)
        return [hit.rerank_score for hit in hits]


@contextlib.asynccontextmanager
async def process(
    store: VectorStore, name: str, *, openable: tuple[str, ...] = ("one", "two", "three"), language: str = "english", **times: Any
) -> AsyncIterator[Process]:
    """A process whose settings say `name`."""

    @contextlib.asynccontextmanager
    async def open_embedder(wanted: str, dimension: int) -> AsyncIterator[Any]:
        if wanted not in openable:
            raise OSError(f"{wanted} needs a key")
        assert EMBEDDERS[wanted].dimension == dimension
        yield EMBEDDERS[wanted]

    sparse, clock = EdgeBm25(language), SystemClock()
    embedder = EMBEDDERS[name]
    encodings = Encodings(store, embedder, name, sparse, open_embedder, lambda id_: EdgeBm25.like(id_, sparse), clock)
    if isinstance(store, QdrantStore):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            await store.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        await encodings.begin()
    registry = Registry(store, clock, encodings)
    await registry.recover(0)
    searcher = Searcher(store, registry, encodings, Fusion(), SystemClock(), late_candidates=20)
    answers = AnswerCache(store, encodings, clock, similarity_min=0.9, ttl_s=60)
    given = {"exclusive": True, "linger_s": 0.0, **times}
    reencoding = Reencoding(store, registry, encodings, clock, f"owner {id(encodings)}", **given)
    try:
        yield Process(encodings, registry, searcher, reencoding, embedder, sparse, answers)
    finally:
        await encodings.close()


@pytest.fixture(params=["edge", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[VectorStore]:
    """An empty store of each kind; its first embedder is `one`."""
    first = f"one {EdgeBm25('english').encoder_id}"
    if request.param == "edge":
        embedded = EdgeStore.open(tmp_path / "qdrant", EMBEDDERS["one"].dimension)
        yield embedded
        embedded.close()
        return
    server = QdrantStore(AsyncQdrantClient(location=":memory:"), EMBEDDERS["one"].dimension, first)
    yield server
    await server.close()


LIONS, TIDES = "lions hunt zebras at dawn", "tides follow the moon"


async def filled(store: VectorStore) -> None:
    async with process(store, "one") as one:
        await one.ingest("lions", [LIONS])
        await one.ingest("tides", [TIDES])
        await one.ingest("large", [f"chapter number{place} about topic{place}" for place in range(LARGE)])


async def cut_short(process: Process, store: Any, writes: int) -> None:
    """Move until the process dies at one of its writes."""
    dying: Any = DyingStore(store, writes)
    registry = Registry(dying, SystemClock(), process.encodings)
    process.encodings._store = dying
    cut = Reencoding(dying, registry, process.encodings, SystemClock(), "x", exclusive=True, linger_s=0)
    with contextlib.suppress(Killed):
        while await cut.once():
            pass
    process.encodings._store = store


async def vectors_of(store: VectorStore, process: Process) -> dict[str, int]:
    """Chunks in the spaces of each embedder."""
    return {encoding.embedder_id: await store.count(encoding.chunks, Filter(TENANT)) for encoding in await process.encodings.all()}


async def sketches_of(store: VectorStore, process: Process) -> list[str]:
    """Of each chunk that the collection answers with."""
    space = (await process.encodings.answering(TENANT, "default")).chunks
    ids = [record.id for record in await store.find(space, Filter(TENANT), limit=LARGE + 9)]
    return [record.sketch for record in (await store.get(space, TENANT, ids, sketches=True)).values()]


async def test_a_changed_embedder_takes_over_and_the_old_vectors_go(store: VectorStore) -> None:
    """Until the switch the old answers, afterwards the new; nothing of the old is left."""
    await filled(store)
    async with process(store, "two") as two:
        assert "one" == (await two.encodings.answering(TENANT, "default")).embedder_id
        assert LIONS == (await two.search("lions hunt zebras", SearchMode.DENSE))[0]
        epoch = (await two.registry.epoch(TENANT, "default")).number
        while await two.reencoding.once():
            pass
        assert "two" == (await two.encodings.answering(TENANT, "default")).embedder_id
        for mode in SearchMode:
            assert LIONS == (await two.search("lions hunt zebras", mode))[0]
            assert "chapter number77 about topic77" == (await two.search("number77 topic77", mode))[0]
        assert {"one": 0, "two": LARGE + 2} == await vectors_of(store, two)
        assert (await two.registry.epoch(TENANT, "default")).number > epoch
        assert 0 == await two.reencoding.once()
        assert LARGE == len(await two.registry.chunks((await two.registry.page(everything_of(TENANT), "", 9, None))[0], 0, 1000))
        assert 0 == await store.count(DOCUMENTS, Filter(SYSTEM_TENANT, equal={"kind": "intent"}))


async def test_what_leads_up_to_a_chunk_moves_along_with_it(store: VectorStore) -> None:
    """The new embedder reads it as the old one did, and it is not shown afterwards either."""
    async with process(store, "one") as one:
        await one.ingest("lions", [LIONS], lead="about savannas")
        await one.ingest("tides", [TIDES])
    async with process(store, "two") as two:
        while await two.reencoding.once():
            pass

        assert "two" == (await two.encodings.answering(TENANT, "default")).embedder_id
        assert [LIONS] == await two.search("savannas", SearchMode.SPARSE)
        assert LIONS == (await two.search("about savannas", SearchMode.DENSE))[0]


async def test_a_new_collection_begins_with_the_embedder_that_is_set(store: VectorStore) -> None:
    """It has nothing to move, also while others still have."""
    await filled(store)
    async with process(store, "two") as two:
        await two.ingest("new", ["something new"], collection="other")

        assert Standing(two.encodings.current_id) == await two.encodings.standing(TENANT, "other")
        assert "one" == (await two.encodings.answering(TENANT, "default")).embedder_id
        assert {"one": LARGE + 2, "two": 1} == await vectors_of(store, two)


@pytest.mark.parametrize("writes", [*range(14), 18, 21, 24, 27])
async def test_killed_at_any_write_it_goes_on_and_a_search_is_right_all_the_time(store: VectorStore, writes: int) -> None:
    """Right before and after the death, in the restarted process before it works and after."""
    await filled(store)

    async def is_right(one: Process) -> None:
        for mode in SearchMode:
            assert LIONS == (await one.search("lions hunt zebras", mode))[0]
            assert TIDES == (await one.search("tides moon", mode))[0]
            assert 50 == len(set(await one.search("chapter about lions tides", mode, limit=50)))

    async with process(store, "two") as two:
        await cut_short(two, store, writes)
        await is_right(two)
    async with process(store, "two") as again:
        await is_right(again)
        before = again.embedder.embedded
        while await again.reencoding.once():
            pass
        await is_right(again)
        assert again.embedder.embedded - before <= LARGE + 2
        assert {"one": 0, "two": LARGE + 2} == await vectors_of(store, again)
        assert 0 == await store.count(DOCUMENTS, Filter(SYSTEM_TENANT, equal={"kind": "intent"}))


async def test_what_is_written_and_deleted_meanwhile_is_right_in_both(store: VectorStore) -> None:
    """Changes between any two steps are seen at once, and after the switch, too."""
    await filled(store)
    # A search that began before the switch ends in the space it began in, which stays for a while.
    async with process(store, "two", linger_s=0.5) as two:
        announced = asyncio.Event()

        async def announce(*standing: Any, told: Any = two.encodings.note_progress) -> None:
            announced.set()
            await told(*standing)

        two.encodings.note_progress = announce  # type: ignore[method-assign]
        moving = asyncio.create_task(two.reencoding.once())
        await announced.wait()
        for number in range(5):
            await two.ingest("lions", [f"lions version{number} sleep"])
            assert f"lions version{number} sleep" == (await two.search(f"lions version{number} sleep"))[0]
            assert not any("hunt" in text for text in await two.search("lions hunt zebras", limit=50))
        await two.registry.delete(TENANT, document_id(TENANT, "default", "tides"))
        assert TIDES not in await two.search("tides moon", limit=50)
        await two.ingest("late", ["comets return"])
        assert "comets return" == (await two.search("comets return"))[0]
        await moving
        async with asyncio.timeout(10):
            while (await vectors_of(store, two))["one"]:
                await two.reencoding.once()
                await asyncio.sleep(0.05)

        for mode in SearchMode:
            assert "comets return" == (await two.search("comets return", mode))[0]
            assert "lions version4 sleep" == (await two.search("lions version4 sleep", mode))[0]
            assert TIDES not in await two.search("tides moon", mode, limit=50)
        assert {"one": 0, "two": LARGE + 2} == await vectors_of(store, two)


async def test_settings_that_change_back_give_up_what_was_begun(store: VectorStore) -> None:
    """Half a move leaves nothing behind, and no question notices."""
    await filled(store)
    async with process(store, "three") as three:
        await cut_short(three, store, 12)
        assert (await vectors_of(store, three))["three"] > 0
    async with process(store, "two") as two:
        assert LIONS == (await two.search("lions hunt zebras"))[0]
        while await two.reencoding.once():
            pass
        assert LIONS == (await two.search("lions hunt zebras", SearchMode.DENSE))[0]
        assert {"one": 0, "two": LARGE + 2, "three": 0} == await vectors_of(store, two)


async def test_an_embedder_that_cannot_be_opened_leaves_the_words(store: VectorStore) -> None:
    """Search by meaning says which embedder is missing; words find, what is ingested now is found, and the move goes on to its end."""
    await filled(store)
    async with process(store, "two", openable=("two",)) as two:
        with pytest.raises(Unavailable, match="vectors are from one"):
            await two.search("lions hunt zebras", SearchMode.DENSE)
        assert LIONS == (await two.search("lions hunt zebras"))[0]
        await two.ingest("late", ["comets return"])
        assert "comets return" == (await two.search("comets return"))[0]
        while await two.reencoding.once():
            pass
        for text in (LIONS, "comets return"):
            assert text == (await two.search(text, SearchMode.DENSE))[0]


async def test_an_embedder_that_cannot_be_paid_now_leaves_the_words(store: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger may be away for a minute; who asks for meaning alone is told."""
    await filled(store)

    async def unpayable(_: str) -> Vectors:
        raise Unpayable("the ledger is away", dependency="ledger")

    async with process(store, "one") as one:
        monkeypatch.setattr(one.embedder, "embed_question", unpayable)
        assert LIONS == (await one.search("lions hunt zebras"))[0]
        with pytest.raises(Unpayable):
            await one.search("lions hunt zebras", SearchMode.DENSE)


async def test_another_language_of_words_is_a_move_as_well(store: VectorStore) -> None:
    """The old stems are asked for until the new ones are there."""
    await filled(store)
    async with process(store, "one", language="german") as german:
        assert LIONS == (await german.search("hunting lion", SearchMode.SPARSE))[0]
        while await german.reencoding.once():
            pass
        assert "german" in (await german.encodings.answering(TENANT, "default")).encoder_id
        assert LIONS == (await german.search("lions hunt zebras", SearchMode.SPARSE))[0]
        assert [] == await german.search("hunting", SearchMode.SPARSE)


async def test_what_was_stored_without_sketches_gets_them_and_is_judged_by_them_from_the_switch_on(store: VectorStore) -> None:
    """Its embedder is the same, so meaning answers all the while; back again, nothing of them is left."""
    await filled(store)
    async with process(store, "reading one") as reading:
        await reading.ingest("late", ["comets return to lions"])
        assert LIONS == (await reading.search("lions hunt zebras", SearchMode.DENSE))[0]
        assert [None] * 3 == await reading.late("lions hunt zebras")
        while await reading.reencoding.once():
            pass
        encoding = await reading.encodings.answering(TENANT, "default")
        assert ("one", FORM) == (encoding.embedder_id, encoding.sketch_form)
        sketches = await sketches_of(store, reading)
        assert LARGE + 3 == len(sketches) and all(sketches)
        scores = await reading.late("lions hunt zebras")
        assert scores == sorted((score for score in scores if score is not None), reverse=True)
        assert 3 == len(scores)
        await reading.ingest("later", ["lions and comets"])
        assert None not in await reading.late("lions and comets")
    async with process(store, "one") as one:
        while await one.reencoding.once():
            pass
        assert [""] * (LARGE + 4) == await sketches_of(store, one)
        assert [None] * 3 == await one.late("lions and comets")


async def test_who_was_judged_is_never_ranked_with_who_was_not(store: VectorStore) -> None:
    """One of the best has no sketch: then none is judged by them, and the order is the fusion's."""
    async with process(store, "reading one") as reading:
        for name in ("hunt", "rest", "wait"):
            await reading.ingest(name, [f"lions {name} in the shade"])
        assert None not in await reading.late("lions rest")
        encoding = await reading.encodings.answering(TENANT, "default")
        (last,) = [one for one in await store.find(encoding.chunks, Filter(TENANT), limit=9) if "wait" in one.payload["text"]]
        text = str(last.payload["text"])
        dense = (await reading.embedder.embed_texts([text])).vectors[0]
        await store.upsert(encoding.chunks, [Point(last.id, last.payload, dense, reading.sparse.document(text))])
        assert [None] * 3 == await reading.late("lions rest")


async def test_of_two_replicas_the_one_that_began_last_counts(store: VectorStore) -> None:
    """The older one moves nothing back; it answers with what each collection has, in whatever state it finds it."""
    await filled(store)
    async with process(store, "one") as older, process(store, "two") as newer:
        assert 0 == await older.reencoding.once()
        # The store was away for a moment: meeting it again is no new beginning.
        await older.encodings.begin()
        assert 0 == await older.reencoding.once()
        while await newer.reencoding.once():
            pass
        assert 0 == await older.reencoding.once()
        for replica in (older, newer):
            assert LIONS == (await replica.search("lions hunt zebras", SearchMode.DENSE))[0]
        await older.ingest("late", ["comets return"])
        for replica in (older, newer):
            assert "comets return" == (await replica.search("comets return", SearchMode.DENSE))[0]
        assert {"one": 0, "two": LARGE + 3} == await vectors_of(store, newer)


async def test_replicas_take_turns_and_give_writers_time(store: VectorStore) -> None:
    """One of two moves; and not before every writer must have seen the announcement."""
    await filled(store)
    times = {"exclusive": False, "announced_s": 1000.0}
    async with process(store, "two", **times) as first, process(store, "two", **times) as second:
        assert [1, 1] == [await first.reencoding.once(), await second.reencoding.once()]
        standing = await first.encodings.standing(TENANT, "default")
        assert first.encodings.current_id == standing.next
        assert 0 == (await vectors_of(store, first))["two"]
        first.reencoding._announced_s = second.reencoding._announced_s = 0
        before = first.embedder.embedded
        await asyncio.gather(first.reencoding.once(), second.reencoding.once())
        assert LARGE + 2 == first.embedder.embedded - before
        assert {"one": 0, "two": LARGE + 2} == await vectors_of(store, first)


async def test_questions_under_way_find_what_they_began_with(store: VectorStore) -> None:
    """The old vectors stay for a while after the switch."""
    await filled(store)
    async with process(store, "two", linger_s=1000.0) as two:
        old = await two.encodings.answering(TENANT, "default")
        dense = await two.encodings.question(old, "lions hunt zebras")
        epoch = (await two.registry.epoch(TENANT, "default")).number
        assert 1 == await two.reencoding.once()
        assert (await two.registry.epoch(TENANT, "default")).number > epoch
        assert "two" == (await two.encodings.answering(TENANT, "default")).embedder_id
        found = await two.searcher.passages(REACH, "lions", dense, limit=3, mode=SearchMode.DENSE, encoding=old)
        assert LIONS == found[0].text
        two.reencoding._linger_s = 0
        assert 0 == await two.reencoding.once()
        assert {"one": 0, "two": LARGE + 2} == await vectors_of(store, two)


async def test_what_is_written_between_the_last_look_and_the_switch_is_in_both(store: VectorStore) -> None:
    """Another replica may write after everything was looked through: it has known of the next encoding since the announcement."""
    await filled(store)
    async with process(store, "two") as two, process(store, "two") as other:
        advance = two.encodings.advance

        async def late(tenant: str, collection: str, expected: Standing, then: Standing) -> bool:
            if then.encoding == two.encodings.current_id and then.leaving and expected.next:
                await other.ingest("late", ["comets return"])
            return await advance(tenant, collection, expected, then)

        two.encodings.advance = late  # type: ignore[method-assign]
        while await two.reencoding.once():
            pass
        for mode in SearchMode:
            assert "comets return" == (await two.search("comets return", mode))[0]
        assert {"one": 0, "two": LARGE + 3} == await vectors_of(store, two)


async def test_a_younger_replica_stops_the_move_of_an_older_one(store: VectorStore) -> None:
    """Between two documents it sees that another embedder is wanted now; nothing is switched to its own any more."""
    await filled(store)
    async with process(store, "two") as two:
        reencode = two.registry.reencode
        async with contextlib.AsyncExitStack() as stack:
            younger: list[Process] = []

            async def then_another(*moved: Any) -> None:
                await reencode(*moved)
                if not younger:
                    younger.append(await stack.enter_async_context(process(store, "three")))

            two.registry.reencode = then_another  # type: ignore[method-assign]
            assert 1 == await two.reencoding.once()
            assert "one" == (await two.encodings.answering(TENANT, "default")).embedder_id
            while await younger[0].reencoding.once():
                pass
            assert {"one": 0, "two": 0, "three": LARGE + 2} == await vectors_of(store, younger[0])


async def test_an_embedder_that_opens_as_another_one_is_not_taken(store: VectorStore) -> None:
    """The name may lead to another model by now: its vectors mean nothing among the old ones."""
    await filled(store)
    async with process(store, "two") as two:

        @contextlib.asynccontextmanager
        async def another(wanted: str, dimension: int) -> AsyncIterator[Any]:
            yield WordEmbedder(f"{wanted} of another release", dimension)

        two.encodings._open = another
        with pytest.raises(Unavailable, match="vectors are from one"):
            await two.search("lions hunt zebras", SearchMode.DENSE)


async def test_a_store_that_never_had_another_embedder_is_not_looked_through(store: VectorStore) -> None:
    """Every pass would otherwise ask about all collections of all tenants for nothing."""
    await filled(store)
    async with process(store, "one") as one:
        counting = DyingStore(store, 0)
        one.reencoding._store = counting  # type: ignore[assignment]

        async def never(*_: Any) -> list[str]:
            pytest.fail("it looked")

        counting.tenants = never  # type: ignore[attr-defined]
        assert 0 == await one.reencoding.once()


class Overtaken:
    """A store as a process sees it that stands still before it writes a standing; meanwhile `then` happens."""

    def __init__(self, store: Any, then: Any) -> None:
        self._store, self._then = store, then

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)

        async def call(space: Any, what: Any, *args: Any, **kwargs: Any) -> Any:
            points = what if isinstance(what, list) else [what]
            if name in ("upsert", "exchange") and any(getattr(point, "payload", {}).get("kind") == "standing" for point in points):
                await self._then()
            return await work(space, what, *args, **kwargs)

        return call


@pytest.mark.parametrize("known", [True, False])
async def test_a_mover_that_stood_still_takes_no_collection_back(store: VectorStore, known: bool) -> None:
    """What another has made of it in the meantime stays: its old vectors may be gone. `known` = the collection has a standing already."""
    async with process(store, "one") as one, process(store, "two") as two:
        begin, moving = Standing(one.encodings.current_id), Standing(one.encodings.current_id, next=two.encodings.current_id)
        there = Standing(two.encodings.current_id, leaving=one.encodings.current_id)
        if known:
            assert await two.encodings.advance(TENANT, "default", begin, begin)

        async def moved_by_another() -> None:
            assert await two.encodings.advance(TENANT, "default", begin, moving)
            assert await two.encodings.advance(TENANT, "default", moving, there)

        one.encodings._store = Overtaken(store, moved_by_another)  # type: ignore[assignment]
        advanced = await one.encodings.advance(TENANT, "default", begin, moving)

        assert (False, there) == (advanced, await two.encodings.standing(TENANT, "default"))
