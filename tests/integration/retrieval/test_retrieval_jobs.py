"""Ingestion jobs: visible to whom they belong, cancelled, retried, shared by replicas, taken over from a dead one."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio as redis
from qdrant_client import AsyncQdrantClient

from services.chassis.afterwork import AfterWork
from services.chassis.clock import SystemClock
from services.chassis.errors import DocumentRejected, NotFound, Overloaded, Unavailable
from services.chassis.principal import Principal
from services.chassis.server import MESSAGE_BYTES_MAX
from services.local.stores import Valkey
from services.retrieval import ingest, rpc
from services.retrieval.access import everything_of
from services.retrieval.domain import Document, Extracted, Progress, Stage, Upload, document_id
from services.retrieval.edge_bm25 import EdgeBm25
from services.retrieval.edge_store import EdgeStore
from services.retrieval.ingest import Buffer, Ingestion, Pipeline
from services.retrieval.jobs import Claim, JobStore, Owner, Taken, Told
from services.retrieval.parsers import read
from services.retrieval.ports import CHUNKS, DOCUMENTS, SYSTEM_TENANT, Filter, Point, Space
from services.retrieval.qdrant_store import QdrantStore
from services.retrieval.redis_jobs import RedisJobs
from services.retrieval.registry import Registry
from tailrace.retrieval.v1 import retrieval_service_pb2 as pb
from tests.integration.retrieval.retrieval_kit import Retrieval, own_valkey
from tests.integration.retrieval.test_reencoding import WordEmbedder
from tests.integration.retrieval.test_retrieval_recovery import TENANT, draft

ANN, BOB = Owner("acme", "ann"), Owner("globex", "bob")


@pytest.fixture
async def own() -> AsyncIterator[Valkey]:
    """A Valkey with nothing in it."""
    async with own_valkey() as valkey:
        yield valkey


@contextlib.asynccontextmanager
async def store_of(valkey: Valkey, **settings: Any) -> AsyncIterator[RedisJobs]:
    """The store as a replica of its own sees it."""
    bounds = {"jobs_max": 8, "bytes_max": 1000, "lease_s": 30.0, "kept_s": 60.0, "timeout_s": 5.0, **settings}
    async with redis.Redis.from_url(valkey.url, retry=None) as client:
        yield RedisJobs(client, client, str(uuid.uuid4()), **bounds)


async def hand_in(store: RedisJobs, job_id: str, index: int, content: bytes = b"text", *, staged: bool = False) -> Taken:
    room = await store.reserve(job_id, index, len(content))
    return await put(store, job_id, index, content, staged=staged) if room.taken is Taken.TAKEN else room.taken


async def put(store: RedisJobs, job_id: str, index: int, content: bytes = b"text", *, staged: bool = False) -> Taken:
    """A document that room was asked for."""
    upload = Upload(b"", source_uri=f"{index}.txt")
    received = Progress(index, upload.name, Stage.RECEIVED, bytes=len(content))
    return Taken.TAKEN if await store.add(job_id, upload, received, [content], staged=staged) else Taken.CLOSED


async def begun(store: RedisJobs, owner: Owner, documents: int) -> str:
    job_id = str(uuid.uuid4())
    assert await store.begin(job_id, owner)
    for index in range(documents):
        assert Taken.TAKEN == await hand_in(store, job_id, index)
    await store.close(job_id, commit=True)
    return job_id


def at(claim: Claim, stage: Stage, **fields: Any) -> Told:
    progress = Progress(claim.index, claim.latest.name, stage, bytes=claim.latest.bytes, attempt=claim.latest.attempt, **fields)
    return Told(claim, progress, committing=stage is Stage.EMBEDDED)


async def claimed(store: RedisJobs) -> Claim:
    claim = await store.claim()
    assert claim is not None
    return claim


async def test_a_large_job_does_not_starve_another_tenant(own: Valkey) -> None:
    """Tenants take turns, so a single document is second at the latest."""
    async with store_of(own) as store:
        large = await begun(store, ANN, 20)
        single = await begun(store, BOB, 1)

        assert single in [(await claimed(store)).job_id for _ in range(2)]
        assert large == (await claimed(store)).job_id


async def test_a_document_is_claimed_for_whom_it_came_from(own: Valkey) -> None:
    """With the key that pays for it, if it came with one; the job is its user's all the same."""
    keyed = replace(ANN, api_key_id="key-7")
    async with store_of(own) as store:
        with_key, without = await begun(store, keyed, 1), await begun(store, ANN, 1)
        owners = {claim.job_id: claim.owner for claim in (await claimed(store), await claimed(store))}
        listed = await store.page("acme", "ann", 10, None)

    assert {with_key: keyed, without: ANN} == owners
    assert {with_key, without} == {state.job_id for state in listed}


async def test_a_dead_replicas_document_goes_to_another_and_its_words_count_no_more(own: Valkey) -> None:
    """After the lease; the second attempt says that it is one, and content and counts are whole."""
    async with store_of(own, lease_s=0.2) as dying, store_of(own) as living:
        job_id = await begun(dying, ANN, 1)
        old = await claimed(dying)
        async with asyncio.timeout(10):
            while (new := await living.claim()) is None:  # noqa: ASYNC110 - a lease runs out by the clock of the store
                await asyncio.sleep(0.02)

        assert (1, 2, b"text") == (old.latest.attempt, new.latest.attempt, await living.content(new))
        assert [False] == await dying.record([at(old, Stage.INDEXED)])
        assert [True] == await living.record([at(new, Stage.INDEXED, chunks_total=3, chunks_done=3)])
        state = await living.job(job_id)
        assert state is not None
        assert ("ended", {"indexed": 1}, 3, 3) == (state.status, state.stages, state.chunks_total, state.chunks_done)
        assert await living.content(new) is None


async def test_a_receiver_that_dies_leaves_a_job_that_ends(own: Valkey) -> None:
    """What it had received, the last document included, is worked off by others."""
    async with store_of(own, lease_s=0.2) as dying, store_of(own) as living:
        job_id = str(uuid.uuid4())
        await dying.begin(job_id, ANN)
        await hand_in(dying, job_id, 0)
        await hand_in(dying, job_id, 1, staged=True)
        seen = set()
        async with asyncio.timeout(10):
            while len(seen) < 2:
                if claim := await living.claim():
                    seen.add(claim.index)
                    await living.record([at(claim, Stage.INDEXED)])
                await asyncio.sleep(0.02)

        state = await living.job(job_id)
        assert state is not None
        assert state.ended
        assert Taken.CLOSED == await hand_in(dying, job_id, 2)


async def test_a_document_that_kills_every_replica_fails_at_last(own: Valkey) -> None:
    """It is not tried for ever."""
    async with store_of(own) as living:
        job_id = await begun(living, ANN, 1)
        for _ in range(5):
            async with store_of(own, lease_s=0.001) as dying:
                assert await dying.claim()
            await asyncio.sleep(0.01)
            await living.beat()

        assert await living.claim() is None
        assert [("failed", "INTERNAL")] == [(row.stage, row.error_reason) for row in await living.latest(job_id)]


async def test_cancel_and_retry_by_document_and_as_a_whole(own: Valkey) -> None:
    """What is being written is not cancelled; what was cancelled can be taken up again and the job ends a second time."""
    async with store_of(own) as store:
        job_id = await begun(store, ANN, 4)
        writing, working = await claimed(store), await claimed(store)
        await store.record([at(writing, Stage.EMBEDDED)])

        assert (1, 2, 0) == (await store.cancel(job_id, 3), await store.cancel(job_id, None), await store.cancel(job_id, None))
        assert [False] == await store.record([at(working, Stage.PARSED)])
        assert {writing.key} == await store.beat()
        assert [True] == await store.record([at(writing, Stage.INDEXED)])
        assert (1, 2) == (await store.retry(job_id, 3), await store.retry(job_id, None))
        while claim := await store.claim():
            await store.record([at(claim, Stage.INDEXED)])
        told = [row async for row in store.events(job_id)]
        assert {"indexed": 4} == (await store.job(job_id)).stages  # type: ignore[union-attr]
        assert 3 == sum(row.stage is Stage.CANCELLED for row in told)


async def test_a_full_store_says_so_and_one_job_cannot_fill_it(own: Valkey) -> None:
    """Half of it for one job; what only waits for a retry makes room."""
    async with store_of(own, bytes_max=100) as store:
        one, two, three = (str(uuid.uuid4()) for _ in range(3))
        for job_id in (one, two, three):
            await store.begin(job_id, ANN)
        assert [Taken.TAKEN, Taken.WAIT] == [await hand_in(store, one, index, b"x" * 50) for index in range(2)]
        assert [Taken.TAKEN, Taken.FULL] == [await hand_in(store, job, 0, b"x" * 50) for job in (two, three)]
        await store.close(one, commit=True)
        await store.cancel(one, None)

        assert Taken.TAKEN == await hand_in(store, three, 0, b"x" * 50)
        assert 0 == await store.retry(one, None)


async def test_room_that_one_replica_has_reserved_is_not_given_by_another(own: Valkey) -> None:
    """Nor twice to one job: whoever asks again has only the last."""
    async with store_of(own, bytes_max=100) as here, store_of(own, bytes_max=100) as there:
        one, two = str(uuid.uuid4()), str(uuid.uuid4())
        await here.begin(one, ANN)
        await there.begin(two, BOB)
        asked = [(await store.reserve(job, 0, 60)).taken for store, job in ((here, one), (here, one), (there, two))]

        assert [Taken.TAKEN, Taken.TAKEN, Taken.FULL] == asked
        assert Taken.TAKEN == await put(here, one, 0, b"x" * 60)
        assert Taken.FULL == (await there.reserve(two, 0, 60)).taken
        assert Taken.TAKEN == (await there.reserve(two, 0, 40)).taken


@pytest.mark.parametrize("end", ["close", "cancel", "death"])
async def test_room_that_was_reserved_for_nothing_is_given_back(own: Valkey, end: str) -> None:
    """However its job ends; and what comes after that is not kept, and leaves nothing."""
    async with store_of(own, bytes_max=100, lease_s=0.2) as dying, store_of(own, bytes_max=100) as living:
        one, two = str(uuid.uuid4()), str(uuid.uuid4())
        await dying.begin(one, ANN)
        await living.begin(two, BOB)
        await dying.reserve(one, 0, 100)
        before = (await living.reserve(two, 0, 100)).taken
        if end == "close":
            await living.close(one, commit=True)
        elif end == "cancel":
            await living.cancel(one, None)
        async with asyncio.timeout(10):
            while (after := (await living.reserve(two, 0, 100)).taken) is not Taken.TAKEN:
                await living.beat()
                await asyncio.sleep(0.02)

        assert (Taken.FULL, Taken.TAKEN) == (before, after)
        assert Taken.CLOSED == await put(dying, one, 0, b"x" * 100)
        async with redis.Redis.from_url(own.url) as client:
            assert [] == await client.keys("*content*")


def receiving(store: RedisJobs) -> Ingestion:
    """An ingestion whose workers stand still."""
    new_id = lambda: str(uuid.uuid4())  # noqa: E731
    return Ingestion(cast(Pipeline, None), store, AfterWork(), new_id, workers=0, lease_s=30.0, buffer=Buffer(10**9))


async def test_a_document_that_waits_for_room_is_sent_once(own: Valkey) -> None:
    """However long its job has its share; the store hears short questions only, and fewer and fewer of them."""
    content = b"x" * 400_000
    async with store_of(own, bytes_max=10**6) as store, redis.Redis.from_url(own.url) as client:
        job = await receiving(store).begin(ANN, detach=False)
        assert Taken.TAKEN == await hand_in(store, job.job_id, 0, content)
        await client.config_resetstat()
        waiting = asyncio.create_task(
            job.add(Upload(b"", source_uri="1.txt"), Progress(1, "1.txt", Stage.RECEIVED, bytes=400_000), [content], staged=False)
        )
        asked = 0
        async with asyncio.timeout(30):
            while asked < 6:
                asked = (await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)
                await asyncio.sleep(0.02)
        while_waiting = (await client.info("stats"))["total_net_input_bytes"]
        await store.record([at(await claimed(store), Stage.INDEXED)])
        async with asyncio.timeout(10):
            assert await waiting
        at_the_end = (await client.info("stats"))["total_net_input_bytes"]

    assert while_waiting < 100_000
    assert 400_000 < at_the_end < 500_000


async def test_who_waits_for_room_while_nothing_moves_is_refused_at_last(own: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as any ingestion tells progress it waits on."""
    monkeypatch.setattr(ingest, "STILL_WAIT_S", 0.5)
    async with store_of(own, bytes_max=100) as store:
        job = await receiving(store).begin(ANN, detach=False)
        assert Taken.TAKEN == await hand_in(store, job.job_id, 0, b"x" * 50)
        other = await begun(store, BOB, 1)
        theirs = next(claim for claim in (await claimed(store), await claimed(store)) if claim.job_id == other)
        upload, received = Upload(b"", source_uri="1.txt"), Progress(1, "1.txt", Stage.RECEIVED, bytes=50)
        waiting = asyncio.create_task(job.add(upload, received, [b"x" * 50], staged=False))
        for done in range(10):
            await store.record([at(theirs, Stage.CHUNKED, chunks_done=done)])
            await asyncio.sleep(0.2)
        patient = not waiting.done()
        with pytest.raises(Overloaded):
            async with asyncio.timeout(30):
                await waiting

    assert patient


async def test_too_many_jobs_are_refused_and_old_ones_forgotten(own: Valkey) -> None:
    """Nothing of a forgotten job is left behind."""
    async with store_of(own, jobs_max=1, kept_s=0.0) as store:
        job_id = await begun(store, ANN, 1)
        assert not await store.begin(str(uuid.uuid4()), ANN)
        await store.record([at(await claimed(store), Stage.FAILED)])
        await store.sweep()

        assert await store.job(job_id) is None
        assert [] == await store.page("acme", "", 10, None)
        assert [] == [row async for row in store.events(job_id)]


async def test_a_store_that_is_away_is_said_to_be(own: Valkey) -> None:
    """By name."""
    async with store_of(own) as store:
        await own.stop()
        for call in (store.claim(), store.check(), store.job("x"), store.begin("x", ANN)):
            with pytest.raises(Unavailable) as away:
                await call
            assert "redis" == away.value.metadata["dependency"]


async def test_jobs_are_seen_by_their_user_and_by_admins_alone(retrieval: Retrieval, ann: Principal) -> None:
    """Another user of the tenant is told what is told of jobs that never were, in every call."""
    bob, admin = Principal(ann.tenant, "bob"), Principal(ann.tenant, "root", frozenset({"admin"}))
    job_id = (await retrieval.ingest(ann, {"a.md": "# A\n\nText.\n", "bad.txt": ""}))[0].job_id

    for who, seen in ((ann, [job_id]), (admin, [job_id]), (bob, [])):
        rows = await retrieval.stream("ListIngestionJobs", pb.ListIngestionJobsRequest(), who)
        assert seen == [row.job_id for row in rows]
    calls = (("Get", pb.GetIngestionJobRequest), ("Cancel", pb.CancelIngestionJobRequest), ("Retry", pb.RetryIngestionJobRequest))
    for name, request in calls:
        with pytest.raises(NotFound):
            await retrieval.ask(f"{name}IngestionJob", request(job_id=job_id), bob)
        assert await retrieval.ask(f"{name}IngestionJob", request(job_id=job_id), admin)


async def test_a_large_job_is_shown_in_replies_of_bounded_size(
    retrieval: Retrieval, ann: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they are whole and in order, and each goes on where the one before ended."""
    names = [f"{number} " + "字" * 1000 for number in range(5)]
    job_id = (await retrieval.ingest(ann, dict.fromkeys(names, "")))[0].job_id
    monkeypatch.setattr(rpc, "JOB_BYTES_MAX", 7_000)
    replies, first = [], 0
    while not replies or first:
        request = pb.GetIngestionJobRequest(job_id=job_id, first_document=first)
        replies.append(await retrieval.ask("GetIngestionJob", request, ann))
        first = replies[-1].next_document

    assert [2, 2, 1] == [len(reply.documents) for reply in replies]
    assert names == [row.name for reply in replies for row in reply.documents]
    assert {5} == {reply.summary.documents for reply in replies}


def test_documents_with_the_longest_names_fit_into_a_message() -> None:
    """Ten thousand with names of 1024 characters of four bytes, all of them failed."""
    row = pb.IngestDocumentsResponse(
        job_id=str(uuid.uuid4()), index=9_999, name="😀" * 1024, error_detail="x" * 500, unread_pages="1" * 200
    )
    reply = pb.GetIngestionJobResponse(documents=rpc._rows_that_fit([row] * 10_000))
    ordinary = pb.IngestDocumentsResponse(job_id=row.job_id, index=9_999, name="a folder/of ordinary/names.md", document_id=row.job_id)

    assert reply.ByteSize() < MESSAGE_BYTES_MAX - 1024 * 1024
    assert len(reply.documents) > 1000
    assert 10_000 == len(rpc._rows_that_fit([ordinary] * 10_000))


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
async def test_two_replicas_that_change_one_document_leave_one_version_and_no_orphan(own: Valkey) -> None:
    """Each has a registry of its own on one store. What was received last stays, whoever is quicker; no chunk of another is left."""
    vectors = QdrantStore(AsyncQdrantClient(":memory:"), 2, "any")
    await vectors.prepare()
    async with store_of(own) as one, store_of(own) as other:
        registries = [Registry(vectors, SystemClock(), turn=replica.turn) for replica in (one, other)]
        changes = [
            registries[number % 2].replace(replace(document, received=number), chunks, dense, sparse)
            for number in range(8)
            for document, chunks, dense, sparse in [draft(f"v{number}")]
        ]
        random.Random(3).shuffle(changes)
        await asyncio.gather(*changes)
        latest = await registries[0].document(everything_of(TENANT), draft("v7")[0].document_id)

        intents = Filter(SYSTEM_TENANT, equal={"kind": "intent"})
        assert "v7" == latest.content_sha256
        assert (3, 0) == (await vectors.count(CHUNKS, Filter(TENANT)), await vectors.count(DOCUMENTS, intents))
        assert [f"v7 {ordinal}" for ordinal in range(3)] == [row.chunk.text for row in await registries[1].chunks(latest, 0, 9)]
    await vectors.close()


class StandingStill:
    """A store as a process sees it that stands still before one of its writes, as under SIGSTOP, until it is let go."""

    def __init__(self, store: QdrantStore, space: Space, kind: str = "") -> None:
        """It is the first write to that space, or the first of a point of that kind."""
        self._store, self._space, self._kind = store, space, kind
        self.stands, self.goes_on = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)

        async def call(space: Space, *args: Any, **kwargs: Any) -> Any:
            if space == self._space and self._is_it(name, *args) and not self.stands.is_set():
                self.stands.set()
                await self.goes_on.wait()
            return await work(space, *args, **kwargs)

        return call

    def _is_it(self, name: str, what: Any = None, *_: Any) -> bool:
        if self._kind == "gone":
            return name == "remove" and what != SYSTEM_TENANT
        if name not in ("upsert", "claim", "exchange"):
            return False
        points = [what] if isinstance(what, Point) else what
        return not self._kind or any(point.payload.get("kind") == self._kind for point in points)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.parametrize("change", ["replace", "delete"])
async def test_a_replica_that_stood_still_undoes_nothing_that_came_after_it(own: Valkey, change: str) -> None:
    """Its turn ran out in the middle of a change and another wrote a later version: that stays, whole, and alone."""
    vectors = QdrantStore(AsyncQdrantClient(":memory:"), 2, "any")
    await vectors.prepare()
    async with store_of(own) as one, store_of(own) as other, redis.Redis.from_url(own.url) as client:
        still = StandingStill(vectors, CHUNKS if change == "replace" else DOCUMENTS)
        sleeper, awake = Registry(cast(Any, still), SystemClock(), turn=one.turn), Registry(vectors, SystemClock(), turn=other.turn)
        if change == "delete":
            first, *rest = draft("v0")
            await awake.replace(first, *rest)
        document, *rest = draft("v1")
        id_ = document.document_id
        work = sleeper.replace(replace(document, received=1), *rest) if change == "replace" else sleeper.delete(TENANT, id_)
        stopped = asyncio.create_task(work)
        await still.stands.wait()
        (turn,) = await client.keys("*turn:*")
        await client.delete(turn)  # what the lease does after its time
        later, *rest = draft("v2")
        await awake.replace(replace(later, received=2), *rest)
        still.goes_on.set()
        with pytest.raises(Unavailable):
            await stopped
        latest = await awake.document(everything_of(TENANT), id_)

        assert "v2" == latest.content_sha256
        assert [f"v2 {ordinal}" for ordinal in range(3)] == [row.chunk.text for row in await awake.chunks(latest, 0, 9)]
        intents = Filter(SYSTEM_TENANT, equal={"kind": "intent"})
        assert (3, 0) == (await vectors.count(CHUNKS, Filter(TENANT)), await vectors.count(DOCUMENTS, intents))
    await vectors.close()


@dataclass
class Asleep:
    """A replica that changed its document as far as `kind`, and stands before it: its turn has run out, and others have it."""

    vectors: QdrantStore
    still: StandingStill
    awake: Registry
    work: asyncio.Task[Document]

    async def wakes(self) -> None:
        self.still.goes_on.set()
        with contextlib.suppress(Unavailable):
            await self.work

    async def shown(self) -> list[str]:
        """What a reader sees of the document: the chunks of its version, each once."""
        document = await self.awake.prior(TENANT, draft("")[0].document_id)
        chunks = [] if document is None else [row.chunk.text for row in await self.awake.chunks(document, 0, 99)]
        intents = Filter(SYSTEM_TENANT, equal={"kind": "intent"})
        assert (len(chunks), 0) == (await self.vectors.count(CHUNKS, Filter(TENANT)), await self.vectors.count(DOCUMENTS, intents))
        return chunks


@contextlib.asynccontextmanager
async def asleep_before(own: Valkey, kind: str, change: str, *, first: bool) -> AsyncIterator[Asleep]:
    """`first` = there is no version before the change."""
    vectors = QdrantStore(AsyncQdrantClient(":memory:"), 2, "any")
    await vectors.prepare()
    async with store_of(own) as one, store_of(own) as other, redis.Redis.from_url(own.url) as client:
        still = StandingStill(vectors, DOCUMENTS, kind)
        sleeper, awake = Registry(cast(Any, still), SystemClock(), turn=one.turn), Registry(vectors, SystemClock(), turn=other.turn)
        if not first:
            await awake.replace(*draft("v0"))
        document, *rest = draft("v1")
        work = sleeper.delete(TENANT, document.document_id) if change == "delete" else sleeper.replace(replace(document, received=1), *rest)
        stopped = asyncio.create_task(work)
        await still.stands.wait()
        (turn,) = await client.keys("*turn:*")
        await client.delete(turn)  # what the lease does after its time
        yield Asleep(vectors, still, awake, stopped)
    await vectors.close()


def three(name: str) -> list[str]:
    return [f"{name} {ordinal}" for ordinal in range(3)]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.parametrize(("change", "first"), [("replace", True), ("replace", False), ("delete", False)])
async def test_a_replica_that_stood_still_before_its_last_write_undoes_no_later_version(own: Valkey, change: str, first: bool) -> None:
    """It had just made sure of its turn. What came after it stays: no old version comes back, no chunk is missing or there twice."""
    async with asleep_before(own, "document" if change == "replace" else "gone", change, first=first) as asleep:
        later, *rest = draft("v2")
        await asleep.awake.replace(replace(later, received=2), *rest)
        await asleep.wakes()

        assert three("v2") == await asleep.shown()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
async def test_a_replica_that_stood_still_before_its_last_write_brings_back_nothing_that_was_deleted(own: Valkey) -> None:
    async with asleep_before(own, "document", "replace", first=False) as asleep:
        await asleep.awake.delete(TENANT, draft("")[0].document_id)
        await asleep.wakes()

        assert [] == await asleep.shown()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.parametrize("first", [True, False])
async def test_a_change_that_was_taken_for_dead_and_cleared_away_is_made_whole_when_its_replica_wakes(own: Valkey, first: bool) -> None:
    """A document never points at chunks that are gone."""
    async with asleep_before(own, "document", "replace", first=first) as asleep:
        await asleep.awake.recover(0)
        await asleep.wakes()

        assert three("v1") == await asleep.shown()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
async def test_two_documents_that_change_at_once_lose_neither_the_epoch_nor_that_one_of_them_is_limited(own: Valkey) -> None:
    """Answers of a collection that has limited documents are never shared with the whole tenant, whoever writes the epoch last."""
    async with asleep_before(own, "epoch", "replace", first=True) as asleep:
        other, *rest = draft("v9")
        other = replace(other, document_id=document_id(TENANT, "default", "b.md"), source_uri="b.md", readers=("user:ann",))
        await asleep.awake.replace(other, *rest)
        before = await asleep.awake.epoch(TENANT, "default")
        await asleep.wakes()
        after = await asleep.awake.epoch(TENANT, "default")

        assert (True, True, True) == (before.limited, after.limited, after.number >= before.number)


async def test_who_watches_waits_for_a_store_that_is_slow(own: Valkey) -> None:
    """The store is silent for longer than any answer may take; the watcher hears what was told meanwhile, all of it, and the end."""
    async with store_of(own, timeout_s=0.2) as watching, store_of(own) as working, redis.Redis.from_url(own.url) as client:
        job_id = await begun(working, ANN, 1)
        heard: list[str] = []

        async def watch() -> None:
            async for progress in watching.events(job_id):
                heard.append(progress.stage)

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(watch())
            while not heard:  # noqa: ASYNC110 - what is waited for comes from a store
                await asyncio.sleep(0.01)
            await client.execute_command("CLIENT", "PAUSE", "3000", "ALL")
            claim = await working.claim()
            assert claim is not None
            assert [True] == await working.record([Told(claim, replace(claim.latest, stage=Stage.INDEXED))])

    assert ["received", "indexed"] == heard


class InThisOrder:
    """A store whose documents are claimed in the order given, which need not be the one they were received in."""

    def __init__(self, claims: list[tuple[Claim, bytes]]) -> None:
        self.waiting = list(claims)
        self.told: list[Progress] = []
        self.ended = asyncio.Event()
        self._contents: dict[str, bytes] = {}

    async def claim(self) -> Claim | None:
        if not self.waiting:
            return None
        claim, self._contents[claim.key] = self.waiting.pop(0)
        return claim

    async def content(self, claim: Claim) -> bytes:
        return self._contents[claim.key]

    async def record(self, told: list[Told]) -> list[bool]:
        self.told += [one.progress for one in told]
        if not self.waiting and self.told[-1].stage.final:
            self.ended.set()
        return [True] * len(told)

    async def beat(self) -> set[str]:
        return set(self._contents)

    async def sweep(self) -> None:
        return None

    async def leave(self) -> None:
        return None


async def test_content_that_comes_again_is_the_latest_that_was_received(tmp_path: Path) -> None:
    """Old, new, old: if the second old one is worked off before the new one, the new one is no longer wanted."""
    store = EdgeStore.open(tmp_path / "qdrant", 2)
    registry = Registry(store, SystemClock())
    received = [(1, b"old"), (3, b"old"), (2, b"new")]
    claims = [
        (Claim("j", place, 1, ANN, Upload(b"", source_uri="a.txt"), Progress(place, "a.txt", Stage.RECEIVED), place), content)
        for place, content in received
    ]
    jobs = InThisOrder(claims)

    async def parse(upload: Upload) -> Extracted:
        return read(upload)

    pipeline = Pipeline(WordEmbedder("any", 2), EdgeBm25("english"), registry, parse)
    ingestion = Ingestion(pipeline, cast(JobStore, jobs), AfterWork(), lambda: "j", workers=1, lease_s=30.0, buffer=Buffer(1000))
    async with ingestion.running(), asyncio.timeout(10):
        await jobs.ended.wait()
    (document,) = await registry.page(everything_of("acme"), "", 9, None)

    assert ["indexed", "unchanged", "unchanged"] == [progress.stage for progress in jobs.told if progress.stage.final]
    assert (3, 1) == (document.received, document.version)
    assert ["old"] == [stored.chunk.text for stored in await registry.chunks(document, 0, 9)]
    store.close()


@pytest.mark.parametrize(("failures", "stages"), [(2, ["indexed"]), (3, ["failed"])])
async def test_a_document_does_not_fail_for_what_passes_by_itself(tmp_path: Path, failures: int, stages: list[str]) -> None:
    """Twice unavailable and then not: it is indexed, once. What stays away fails by its own reason; what cannot pass is not tried again."""
    store = EdgeStore.open(tmp_path / "qdrant", 2)
    registry = Registry(store, SystemClock())
    uploads = [Upload(b"", source_uri="a.txt"), Upload(b"", source_uri="refused.txt")]
    claims = [
        (Claim("j", place, 1, ANN, upload, Progress(place, upload.name, Stage.RECEIVED), place), b"text")
        for place, upload in enumerate(uploads)
    ]
    jobs, parsed = InThisOrder(claims), list[str]()

    async def parse(upload: Upload) -> Extracted:
        parsed.append(upload.source_uri)
        if upload.source_uri == "refused.txt":
            raise DocumentRejected("no", cause="malformed")
        if len(parsed) <= failures:
            raise Unavailable("slow for once", dependency="redis")
        return read(upload)

    pipeline = Pipeline(WordEmbedder("any", 2), EdgeBm25("english"), registry, parse)
    ingestion = Ingestion(pipeline, cast(JobStore, jobs), AfterWork(), lambda: "j", workers=1, lease_s=30.0, buffer=Buffer(1000))
    async with ingestion.running(), asyncio.timeout(20):
        await jobs.ended.wait()
    ended = [progress for progress in jobs.told if progress.stage.final]

    assert [*stages, "failed"] == [progress.stage for progress in ended]
    assert ["UNAVAILABLE" if stages == ["failed"] else "", "DOCUMENT_REJECTED"] == [progress.error_reason for progress in ended]
    assert ["a.txt"] * 3 + ["refused.txt"] == parsed
    assert (1 if stages == ["indexed"] else 0) == len(await registry.page(everything_of("acme"), "", 9, None))
    store.close()


async def test_a_document_that_changed_meanwhile_is_not_renewed(tmp_path: Path) -> None:
    """The content that came again is then written as a version of its own."""
    store = EdgeStore.open(tmp_path / "qdrant", 2)
    registry = Registry(store, SystemClock())
    first = await registry.replace(*draft("old"))
    assert await registry.renew(first, 5)
    document, *rest = draft("new")
    second = await registry.replace(replace(document, received=6), *rest)

    assert await registry.renew(second, 2)
    assert 6 == (await registry.document(everything_of(TENANT), second.document_id)).received
    assert not await registry.renew(first, 7)
    await registry.delete(TENANT, second.document_id)
    assert not await registry.renew(second, 8)
    store.close()
