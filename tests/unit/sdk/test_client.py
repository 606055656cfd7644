"""The Python client against a gateway that says what it is told, over a real channel."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import tailrace
from services.chassis.errors import BudgetExhausted, RateLimited, RequestInvalid
from services.chassis.principal import Principal
from services.chassis.server import Server
from tailrace.common.v1 import common_pb2
from tailrace.gateway.v1 import gateway_service_pb2_grpc
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

TEXT = ["A token ", "is valid ", "for an hour [1]."]


def events(*, done: bool = True) -> Iterator[orchestrator.AnswerEvent]:
    """One whole answer, or one that was cut."""
    passage = common_pb2.CitedPassage(number=1, document_id="d", chunk_id="c", title="Tokens", text="…", start=3, end=9)
    parts: list[dict[str, Any]] = [
        {"accepted": orchestrator.Accepted(answer_id="a1", session_id="s1", trace_id="ab" * 16)},
        {"step": orchestrator.Step(name="recall", status="running")},
        {"passages": orchestrator.Passages(passages=[passage])},
        {"step": orchestrator.Step(name="recall", status="done", duration_ms=4.5, facts={"hits": "1"})},
        {"heartbeat": orchestrator.Heartbeat()},
        *({"delta": orchestrator.Delta(text=piece)} for piece in TEXT),
        {"citation": orchestrator.Citation(number=1, start=30, end=33, document_id="d", chunk_id="c")},
    ]
    if done:
        digest = hashlib.sha256("".join(TEXT).encode()).hexdigest()
        cache = common_pb2.CacheReceipt(verdict="miss", reason="no_candidate")
        usage = common_pb2.Usage(input_tokens=70, output_tokens=9)
        parts.append({"done": orchestrator.Done(answer_id="a1", text_sha256=digest, usage=usage, cost_nanousd=42, model="m", cache=cache)})
    for number, part in enumerate(parts, start=1):
        yield orchestrator.AnswerEvent(answer_id="a1", sequence=number, **part)


class Gateway(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Answers as the question says; remembers what it was sent."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.received: dict[str, bytes] = {}
        self.left = asyncio.Event()
        self.searches: list[retrieval.SearchRequest] = []

    async def identify(self, context: grpc.aio.ServicerContext) -> Principal:
        self.tokens += [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
        return Principal("acme", "ada")

    async def Answer(self, request: orchestrator.AnswerRequest, context: Any) -> None:  # type: ignore[override]
        match request.question:
            case "limited":
                raise RateLimited("slow down", retry_after_ms=1500)
            case "poor":
                raise BudgetExhausted("nothing left", left_nanousd=7)
            case "":
                raise RequestInvalid("a question is needed", field="question", bound="1-32768 bytes")
        try:
            if request.question == "tools":
                for started_ms in (1.0, 2.0):
                    for status in ("running", "done"):
                        step = orchestrator.Step(name="tool", status=status, started_ms=started_ms)
                        await context.write(orchestrator.AnswerEvent(step=step))
            for event in events(done=request.question != "cut"):
                await context.write(event)
            if request.question == "endless":
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def IngestDocuments(self, requests: Any, context: Any) -> None:  # type: ignore[override]
        name = ""
        async for request in requests:
            if request.WhichOneof("part") == "header":
                name = request.header.source_uri
                self.received[name] = b""
            else:
                self.received[name] += request.content
        for index, name in enumerate(self.received):
            await context.write(retrieval.IngestDocumentsResponse(index=index, name=name, stage="received"))
            await context.write(retrieval.IngestDocumentsResponse(index=index, name=name, stage="indexed", chunks_total=2))

    async def ListDocuments(self, request: retrieval.ListDocumentsRequest, context: Any) -> None:  # type: ignore[override]
        second = request.page_token == "second"
        document = retrieval.Document(document_id="d2" if second else "d1", title="T")
        await context.write(retrieval.ListDocumentsResponse(document=document, next_page_token="" if second else "second"))

    async def ListCollections(self, request: retrieval.ListCollectionsRequest, context: Any) -> None:  # type: ignore[override]
        for name in ("c1", "c2"):
            await context.write(retrieval.ListCollectionsResponse(collection=name, documents=2, embedder_id="one", next_embedder_id="two"))

    async def DeleteDocument(self, request: retrieval.DeleteDocumentRequest, context: Any) -> retrieval.DeleteDocumentResponse:
        return retrieval.DeleteDocumentResponse(chunks_deleted=3)

    async def Search(self, request: retrieval.SearchRequest, context: Any) -> None:  # type: ignore[override]
        self.searches.append(request)
        passage = common_pb2.CitedPassage(number=1, document_id="d", title="T", text="…", page=4, flags=["override"])
        around = [retrieval.Chunk(chunk_id=name, ordinal=place) for place, name in ((0, "b"), (2, "a"))]
        explanation = retrieval.HitExplanation(dense_rank=2, dense_score=0.5, language="en") if request.explain else None
        row = retrieval.SearchResponse(hit=passage, explanation=explanation, before=around[:1], after=around[1:])
        await context.write(row)

    async def QueryUsage(self, request: ledger.QueryUsageRequest, context: Any) -> None:  # type: ignore[override]
        await context.write(ledger.QueryUsageResponse(group={request.group_by[0]: "m"}, operations=2, cost_nanousd=84))


@pytest.fixture
async def gateway() -> AsyncIterator[tuple[Gateway, str]]:
    """A running gateway and its address."""
    servicer = Gateway()
    server = Server(servicer.identify, reflect=False)
    server.add(gateway_service_pb2_grpc.add_GatewayServiceServicer_to_server, servicer, "tailrace.gateway.v1.GatewayService")
    port = await server.start("127.0.0.1", 0)
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(0, 0)


async def test_events_come_as_plain_values_in_order(gateway: tuple[Gateway, str]) -> None:
    """No protobuf type on the common path, no heartbeat, the receipt last, the token sent."""
    async with tailrace.AsyncClient(gateway[1], token="t0ken") as client:
        answer = client.answer("How long?")
        seen = [event async for event in answer]

    assert [type(event).__name__ for event in seen] == [
        "Accepted",
        "Step",
        "Passages",
        "Step",
        "Delta",
        "Delta",
        "Delta",
        "Citation",
        "Receipt",
    ]
    assert (answer.answer_id, answer.last_sequence) == ("a1", 10)
    assert gateway[0].tokens == ["Bearer t0ken"]


async def test_text_and_final_are_the_same_answer(gateway: tuple[Gateway, str]) -> None:
    """Pieces join to the whole; the whole has its receipt, passages and the last state of each step."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        pieces = [piece async for piece in client.answer("How long?").text()]
        final = await client.answer("How long?").final()

    assert pieces == TEXT
    assert final.text == "".join(TEXT)
    assert hashlib.sha256(final.text.encode()).hexdigest() == final.receipt.text_sha256
    assert (final.receipt.cost_nanousd, final.receipt.usage.input_tokens, final.session_id) == (42, 70, "s1")
    assert [(step.name, step.status) for step in final.steps] == [("recall", "done")]
    assert [passage.title for passage in final.passages] == ["Tokens"]


async def test_final_has_a_step_for_every_call_of_a_tool(gateway: tuple[Gateway, str]) -> None:
    """They have a name in common, and each began at a time of its own."""
    _, target = gateway
    async with tailrace.AsyncClient(target, token="token") as client:
        final = await client.answer("tools").final()

    assert [(1.0, "done"), (2.0, "done")] == [(step.started_ms, step.status) for step in final.steps if step.name == "tool"]


async def test_an_answer_that_was_read_says_so_when_it_is_read_again(gateway: tuple[Gateway, str]) -> None:
    """Nothing is left of it here; `resume` reads it again."""
    _, target = gateway
    async with tailrace.AsyncClient(target, token="token") as client:
        answer = client.answer("How long?")
        await answer.final()
        with pytest.raises(RuntimeError, match="read once"):
            await answer.final()


async def test_a_stream_that_ends_without_its_end_is_an_error(gateway: tuple[Gateway, str]) -> None:
    """OK without a receipt is never taken for an answer; the id to resume with is there."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        with pytest.raises(tailrace.Interrupted) as cut:
            await client.answer("cut").final()

    assert cut.value.metadata == {"answer_id": "a1"}


async def test_errors_are_typed_and_say_what_to_do(gateway: tuple[Gateway, str]) -> None:
    """The time to wait, the money left, the field that is wrong."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        with pytest.raises(tailrace.RateLimited) as limited:
            await client.answer("limited").final()
        with pytest.raises(tailrace.BudgetExhausted) as poor:
            await client.answer("poor").final()
        with pytest.raises(tailrace.RequestInvalid) as invalid:
            await client.answer("").final()

    assert limited.value.retry_after_s == 1.5
    assert poor.value.left_nanousd == 7
    assert (invalid.value.field, invalid.value.bound) == ("question", "1-32768 bytes")


async def test_nobody_there_is_unavailable() -> None:
    """A connection that cannot be made is an exception of ours, within the timeout."""
    async with tailrace.AsyncClient("127.0.0.1:1", token="t", timeout_s=5) as client:
        with pytest.raises((tailrace.Unavailable, tailrace.DeadlineExceeded)):
            await client.answer("anybody?").final()


async def test_a_reader_that_stops_early_closes_its_call(gateway: tuple[Gateway, str]) -> None:
    """The gateway learns at once that nobody reads any more."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        answer = client.answer("endless")
        async for event in answer:
            if isinstance(event, tailrace.Delta):
                break
        await answer.aclose()
        async with asyncio.timeout(5):
            await gateway[0].left.wait()

    assert gateway[0].left.is_set()


async def test_files_and_uploads_arrive_whole(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """Contents above one message's size are cut and joined; names are as given."""
    large = bytes(range(256)) * 4096
    (tmp_path / "large.txt").write_bytes(large)
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        uploads = [tailrace.Upload("large", tmp_path / "large.txt"), tailrace.Upload("small", b"text"), tailrace.Upload("empty", b"")]
        progress = [item async for item in client.ingest(*uploads)]

    assert gateway[0].received == {"large": large, "small": b"text", "empty": b""}
    assert [item.name for item in progress if item.final] == ["large", "small", "empty"]


async def test_a_missing_file_is_said_before_anything_is_sent(gateway: tuple[Gateway, str], tmp_path: Path) -> None:
    """The good document before it is not half an ingestion."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        with pytest.raises(FileNotFoundError):
            _ = [item async for item in client.ingest(tailrace.Upload("a", b"text"), tmp_path / "none.md")]

    assert gateway[0].received == {}


async def test_lists_follow_their_pages(gateway: tuple[Gateway, str]) -> None:
    """Every document, however many pages they come in."""
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        listed = [document.document_id async for document in client.list_documents()]
        collections = [collection async for collection in client.collections()]
        deleted = await client.delete_document("d1")
        rows = [row async for row in client.usage("model")]

    assert listed == ["d1", "d2"]
    assert collections == [tailrace.Collection(name, 2, 0, "one", "two", 0) for name in ("c1", "c2")]
    assert deleted == 3
    assert [(row.group, row.operations, row.cost_nanousd) for row in rows] == [({"model": "m"}, 2, 84)]


async def test_the_blocking_client_gives_the_same(gateway: tuple[Gateway, str]) -> None:
    """Without an event loop: text, whole answer, lists and errors."""

    def work() -> tuple[list[str], str, list[str], type[Exception]]:
        with tailrace.Client(gateway[1], token="t") as client:
            pieces = list(client.answer("How long?").text())
            text = client.answer("How long?").final().text
            for event in client.answer("endless"):
                if isinstance(event, tailrace.Delta):
                    break
            listed = [document.document_id for document in client.list_documents()]
            try:
                client.answer("limited").final()
            except tailrace.TailraceError as error:
                return pieces, text, listed, type(error)
        raise AssertionError("the limit was not reached")

    pieces, text, listed, error = await asyncio.to_thread(work)

    assert (pieces, text, listed, error) == (TEXT, "".join(TEXT), ["d1", "d2"], tailrace.RateLimited)


def test_target_and_token_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given is read from TAILRACE_TARGET and TAILRACE_TOKEN."""
    monkeypatch.setenv("TAILRACE_TARGET", "gateway.example:50050")

    async def target() -> str:
        async with tailrace.AsyncClient() as client:
            return client.target

    assert asyncio.run(target()) == "gateway.example:50050"


async def test_a_search_says_what_is_searched_and_gets_what_explains_its_hits(gateway: tuple[Gateway, str]) -> None:
    """Values keep their kinds on the way; a hit is a passage with more; without `explain` there is no explanation."""
    since = datetime(2026, 1, 1, tzinfo=UTC)
    conditions = [tailrace.Condition("a", ("1", 1.0, True), negated=True), tailrace.Condition("n", at_least=0.0, since=since)]
    async with tailrace.AsyncClient(gateway[1], token="t") as client:
        asked = client.search("q", more_collections=["x"], document_ids=["d"], metadata=conditions, neighbours=1, explain=True)
        (hit,) = [found async for found in asked]
        (plain,) = [found async for found in client.search("q")]
    first, second = gateway[0].searches[0].metadata

    assert ["string_value", "number_value", "bool_value"] == [value.WhichOneof("kind") for value in first.any_of]
    assert (True, False, True, False) == (first.negated, first.HasField("at_least"), second.HasField("at_least"), second.HasField("below"))
    assert since == getattr(second, "from").ToDatetime(UTC)
    request = gateway[0].searches[0]
    assert (["x"], ["d"], 1) == (list(request.more_collections), list(request.document_ids), request.neighbours)
    assert isinstance(hit, tailrace.Passage)
    assert (4, ("override",), ["b"], ["a"]) == (
        hit.page,
        hit.flags,
        [row.chunk_id for row in hit.before],
        [row.chunk_id for row in hit.after],
    )
    assert hit.explanation is not None
    assert (2, None, "en") == (hit.explanation.dense_rank, hit.explanation.sparse_rank, hit.explanation.language)
    assert plain.explanation is None


async def test_the_blocking_client_searches_alike(gateway: tuple[Gateway, str]) -> None:
    """Every argument is passed on."""

    def work() -> list[int]:
        with tailrace.Client(gateway[1], token="t") as client:
            wanted = [tailrace.Condition("a")]
            found = client.search("q", collection="c", more_collections=["x"], metadata=wanted, neighbours=2, explain=True)
            return [hit.number for hit in found]

    assert [1] == await asyncio.to_thread(work)
    (request,) = gateway[0].searches
    assert ("c", ["x"], "a") == (request.collection, list(request.more_collections), request.metadata[0].key)
    assert (2, True) == (request.neighbours, request.explain)
