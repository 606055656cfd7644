"""An orchestrator with everything around it: real channels, a real Valkey, the simulated provider, stand-ins for retrieval and the ledger.

The stand-ins keep the contract's rules that the orchestrator relies on: acknowledgement after booking, one hold per attempt, epochs.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from bench.script import Behaviour, Record
from bench.simulator import Connection, Provider
from services.chassis.channel import Caller, open_channel
from services.chassis.errors import BudgetExhausted, NotAllowed, NotFound, Overloaded, PriceUnknown, Unavailable
from services.chassis.lifecycle import started
from services.chassis.money import Price
from services.chassis.passport import Passport
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Server, passport_identity
from services.chassis.wire import price_message, usage_value
from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.wiring import build
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc as ledger_rpc
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as pb
from tailrace.orchestrator.v1 import orchestrator_service_pb2_grpc as pb_grpc
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval_pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as retrieval_rpc

KEY = "an internal key for tests"
ALICE = Principal("acme", "alice")
BOB = Principal("acme", "bob")
MALLORY = Principal("other", "alice")
PRICES = {
    "claude-haiku-5-5": Price("anthropic", "claude-haiku-5-5", 1, 100_000_000, 500_000_000, 10_000_000, 125_000_000, 200_000_000),
    "claude-sonnet-5-5": Price(
        "anthropic", "claude-sonnet-5-5", 1, 2_000_000_000, 10_000_000_000, 100_000_000, 2_500_000_000, 4_000_000_000
    ),
    "gpt-6-luna": Price("openai", "gpt-6-luna", 1, 100_000_000, 500_000_000, 10_000_000, 125_000_000, 200_000_000),
    "gemini-3.8-flash": Price("gemini", "gemini-3.8-flash", 1, 750_000_000, 3_750_000_000, 75_000_000, 750_000_000, 750_000_000),
    "extractive": Price("extractive", "extractive"),
}
PASSAGES = [
    common_pb2.CitedPassage(
        number=1,
        document_id="d1",
        chunk_id="d1-0",
        title="Operations guide",
        source_uri="guide.md",
        text="The gateway listens on port 8080. It speaks HTTP and gRPC. Every answer is streamed from the first token.",
        start=0,
        end=107,
        score=0.9,
        document_version=1,
    ),
    common_pb2.CitedPassage(
        number=2,
        document_id="d2",
        chunk_id="d2-3",
        title="Ledger",
        source_uri="ledger.md",
        text="The ledger keeps every hold for ten minutes. Prices are integers in nano-USD per million tokens.",
        start=40,
        end=136,
        score=0.5,
        document_version=2,
    ),
]


@dataclass
class FakeRetrieval(retrieval_rpc.RetrievalServiceServicer):
    """Two passages, an epoch, and a semantic cache that answers only what it is told to."""

    epoch: int = field(default_factory=itertools.count(1, 1000).__next__)
    """Another one for each world, because all worlds share one Valkey."""
    passages: list[common_pb2.CitedPassage] = field(default_factory=lambda: list(PASSAGES))
    semantic: dict[str, tuple[retrieval_pb.CachedAnswer, float]] = field(default_factory=dict)
    recalls: list[retrieval_pb.RecallRequest] = field(default_factory=list)
    remembered: list[retrieval_pb.RememberAnswerRequest] = field(default_factory=list)
    time_left_s: list[float] = field(default_factory=list)
    """What each recall might take."""
    verdicts: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, recalls wait for the word of the cache."""
    away: bool = False
    audience: str = ""
    searches: list[tuple[retrieval_pb.SearchRequest, Principal]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.verdicts.set()

    async def Search(self, request: retrieval_pb.SearchRequest, context: grpc.aio.ServicerContext) -> None:
        self.searches.append((request, current_principal()))
        for passage in self.passages[: request.limit]:
            await context.write(retrieval_pb.SearchResponse(hit=passage))

    async def Recall(self, request: retrieval_pb.RecallRequest, context: grpc.aio.ServicerContext) -> None:
        if self.away:
            raise Unavailable("qdrant is away", dependency="qdrant")
        self.recalls.append(request)
        self.time_left_s.append(context.time_remaining())
        await context.write(
            retrieval_pb.RecallResponse(started=retrieval_pb.RecallStarted(collection_epoch=self.epoch, audience=self.audience))
        )
        if request.HasField("held_epoch") and (request.held_epoch, request.held_audience) == (self.epoch, self.audience):
            return
        await self.verdicts.wait()
        verdict = retrieval_pb.RecallVerdict(reason="no_candidate")
        if request.want_cached and request.question in self.semantic:
            answer, similarity = self.semantic[request.question]
            verdict = retrieval_pb.RecallVerdict(answer=answer, similarity=similarity)
        await context.write(retrieval_pb.RecallResponse(verdict=verdict))
        await context.write(retrieval_pb.RecallResponse(passages=retrieval_pb.RecallPassages(passages=self.passages)))

    async def Embed(self, request: retrieval_pb.EmbedRequest, context: grpc.aio.ServicerContext) -> retrieval_pb.EmbedResponse:
        """The same text has the same vector, any two others stand at right angles."""
        if self.away:
            raise Unavailable("qdrant is away", dependency="qdrant")
        places = {text: place for place, text in enumerate(dict.fromkeys(request.texts))}
        rows = [retrieval_pb.Embedding(values=[float(n == places[text]) for n in range(len(request.texts))]) for text in request.texts]
        return retrieval_pb.EmbedResponse(embeddings=rows, embedder_id="fake")

    async def RememberAnswer(
        self, request: retrieval_pb.RememberAnswerRequest, context: grpc.aio.ServicerContext
    ) -> retrieval_pb.RememberAnswerResponse:
        self.remembered.append(request)
        if request.collection_epoch != self.epoch:
            return retrieval_pb.RememberAnswerResponse(remembered=False, reason="epoch_changed")
        return retrieval_pb.RememberAnswerResponse(remembered=True)


@dataclass
class FakeLedger(ledger_rpc.LedgerServiceServicer):
    """Books in memory."""

    holds: dict[str, ledger_pb.ReserveRequest] = field(default_factory=dict)
    open_holds: set[str] = field(default_factory=set)
    operations: dict[str, ledger_pb.Operation] = field(default_factory=dict)
    records: int = 0
    prices_told: int = 0
    turned_away: int = 0
    """Turns that were to follow or replace one that the conversation has not."""
    turns: dict[str, list[ledger_pb.Turn]] = field(default_factory=dict)
    summaries: dict[str, ledger_pb.Summary] = field(default_factory=dict)
    """By the answer they reach."""
    titles: dict[str, str] = field(default_factory=dict)
    asked_in_vain: int = 0
    """How often the way to an answer was asked for that no conversation has."""
    broke: bool = False
    poor: set[str] = field(default_factory=set)
    """Users who have nothing left."""
    too_dear: set[str] = field(default_factory=set)
    """Models that no budget can pay."""
    affordable: int = 1_000_000
    """Most output tokens that the budget can pay for."""
    affordable_of: dict[str, int] = field(default_factory=dict)
    """The same for single models, where it is another number."""
    credit_nanousd: int = 10_000_000_000
    """What each lease lends; 0 = none is lent."""
    leases: dict[str, ledger_pb.LendCreditRequest] = field(default_factory=dict)
    """Open leases."""
    returned: list[ledger_pb.ReturnCreditRequest] = field(default_factory=list)
    recalled: set[str] = field(default_factory=set)
    """Leases that are wanted back."""
    lent_elsewhere: int = 0
    """How many reservations are refused for want of what is lent to others."""
    busy: int = 0
    """How many reservations meet a ledger that has too much to do."""
    keeping: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, turns arrive and are not kept yet."""
    deciding: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set, money is asked for and nothing is said."""
    deleted: dict[str, datetime] = field(default_factory=dict)
    """When a conversation was deleted; at "", when the user was erased."""
    away: bool = False
    reject: str = ""
    recording: bool = True
    """While false, records arrive and are neither booked nor acknowledged."""

    def __post_init__(self) -> None:
        self.keeping.set()
        self.deciding.set()

    async def Reserve(self, request: ledger_pb.ReserveRequest, context: grpc.aio.ServicerContext) -> ledger_pb.ReserveResponse:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        if self.busy:
            self.busy -= 1
            raise Overloaded("every connection is in use", retry_after_ms=10)
        await self.deciding.wait()
        if self.lent_elsewhere:
            self.lent_elsewhere -= 1
            raise BudgetExhausted("it is lent", needed_nanousd=5, left_nanousd=2, lent_nanousd=3, scope="tenant")
        granted = min(request.output_tokens_max, self.affordable_of.get(request.model, self.affordable))
        is_poor = self.broke or current_principal().user in self.poor
        if is_poor or request.model in self.too_dear or granted < (request.output_tokens_min or request.output_tokens_max):
            raise BudgetExhausted("nothing is left", needed_nanousd=1, left_nanousd=0, scope="tenant")
        price = PRICES.get(request.model)
        if price is None:
            raise PriceUnknown("no price", model=request.model)
        hold_id = f"hold-{request.operation_id}-{request.attempt}"
        self.holds[hold_id] = request
        self.open_holds.add(hold_id)
        amount = price.worst_case_nanousd(request.input_tokens_max, granted)
        reply = ledger_pb.ReserveResponse(hold_id=hold_id, amount_nanousd=amount, output_tokens_max=granted)
        message = ledger_pb.ReserveResponse().expires_at
        message.GetCurrentTime()
        reply.price.CopyFrom(price_message(price, message.ToDatetime()))
        return reply

    async def ListPrices(self, request: ledger_pb.ListPricesRequest, context: grpc.aio.ServicerContext) -> None:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        now = ledger_pb.ReserveResponse().expires_at
        now.GetCurrentTime()
        for price in PRICES.values():
            await context.write(ledger_pb.ListPricesResponse(price=price_message(price, now.ToDatetime())))
        self.prices_told += 1

    async def LendCredit(self, request: ledger_pb.LendCreditRequest, context: grpc.aio.ServicerContext) -> ledger_pb.LendCreditResponse:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        if not self.credit_nanousd:
            raise BudgetExhausted("nothing can be lent", needed_nanousd=0, left_nanousd=0, scope="user")
        self.leases[request.lease_id] = request
        now = ledger_pb.ReserveResponse().expires_at
        now.GetCurrentTime()
        prices = [price_message(price, now.ToDatetime()) for price in PRICES.values()]
        return ledger_pb.LendCreditResponse(amount_nanousd=self.credit_nanousd, life_ms=120_000, prices=prices)

    async def ReturnCredit(
        self, request: ledger_pb.ReturnCreditRequest, context: grpc.aio.ServicerContext
    ) -> ledger_pb.ReturnCreditResponse:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        if self.leases.pop(request.lease_id, None) is None:
            raise NotFound("no such lease", kind="lease")
        self.returned.append(request)
        return ledger_pb.ReturnCreditResponse(returned_nanousd=self.credit_nanousd)

    async def ListRecalledCredit(
        self, request: ledger_pb.ListRecalledCreditRequest, context: grpc.aio.ServicerContext
    ) -> ledger_pb.ListRecalledCreditResponse:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        return ledger_pb.ListRecalledCreditResponse(lease_ids=self.recalled.intersection(request.lease_ids))

    async def RecordOperations(self, requests: AsyncIterator[ledger_pb.RecordOperationsRequest], context: grpc.aio.ServicerContext) -> None:
        if "service" not in current_principal().roles:
            raise NotAllowed("", needs="service")
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        async for request in requests:
            if self.away:
                raise Unavailable("postgres is away", dependency="postgres")
            if not self.recording:
                continue
            reply, *more = (self._record(record) for record in (request, *request.more))
            reply.more.extend(more)
            await context.write(reply)

    def _record(self, record: ledger_pb.RecordOperationsRequest) -> ledger_pb.RecordOperationsResponse:
        self.records += 1
        if self.reject:
            return ledger_pb.RecordOperationsResponse(record_id=record.record_id, rejected_reason=self.reject)
        duplicate = record.operation.operation_id in self.operations
        self.operations.setdefault(record.operation.operation_id, record.operation)
        for attempt in record.operation.attempts:
            self.open_holds.discard(f"hold-{record.operation.operation_id}-{attempt.attempt}")
        return ledger_pb.RecordOperationsResponse(record_id=record.record_id, duplicate=duplicate)

    async def GetOperation(
        self, request: ledger_pb.GetOperationRequest, context: grpc.aio.ServicerContext
    ) -> ledger_pb.GetOperationResponse:
        operation, asker = self.operations.get(request.operation_id), current_principal()
        if operation is None or (operation.tenant, operation.user) != (asker.tenant, asker.user):
            raise NotFound("no such operation", kind="operation")
        turns = self.turns.get(operation.session_id, ()) if request.with_turn else ()
        turn = next((turn for turn in turns if turn.answer_id == request.operation_id), None)
        return ledger_pb.GetOperationResponse(operation=operation, turn=turn)

    async def ListTurns(self, request: ledger_pb.ListTurnsRequest, context: grpc.aio.ServicerContext) -> None:
        turns = self.branch(request.session_id, request.until_answer_id)
        if request.until_answer_id and not turns:
            self.asked_in_vain += 1
            raise NotFound("the conversation has no such turn", kind="turn")
        through = [turn.answer_id for turn in turns if turn.answer_id in self.summaries]
        if request.with_summary and through:
            await context.write(ledger_pb.ListTurnsResponse(summary=self.summaries[through[-1]]))
        for turn in turns[-request.limit :]:
            await context.write(ledger_pb.ListTurnsResponse(turn=turn))

    async def AppendTurn(self, request: ledger_pb.AppendTurnRequest, context: grpc.aio.ServicerContext) -> ledger_pb.AppendTurnResponse:
        if self.away:
            raise Unavailable("postgres is away", dependency="postgres")
        await self.keeping.wait()
        turns = self.turns.get(request.session_id, [])
        parents = {turn.answer_id: turn.parent_answer_id for turn in turns}
        deleted_at = max((self.deleted[name] for name in (request.session_id, "") if name in self.deleted), default=None)
        if deleted_at is not None and deleted_at >= request.turn.created_at.ToDatetime(UTC):
            self.turned_away += 1
            raise NotFound("the conversation was deleted", kind="turn")
        if not {request.replaces, request.asked_after} - {""} <= parents.keys():
            self.turned_away += 1
            raise NotFound("the conversation has no such turn", kind="turn")
        if request.turn.answer_id not in parents:
            head = turns[-1].answer_id if turns else ""
            request.turn.parent_answer_id = parents[request.replaces] if request.replaces else head
            turns = self.turns.setdefault(request.session_id, turns)
            turns.append(request.turn)
        unsummarised = 0
        for turn in reversed(self.branch(request.session_id)):
            if turn.answer_id in self.summaries:
                break
            unsummarised += 1
        return ledger_pb.AppendTurnResponse(ordinal=len(turns), unsummarised=unsummarised)

    def delete(self, session_id: str = "") -> None:
        """Forget a conversation; without one all that the user has."""
        self.deleted[session_id] = datetime.now(UTC)
        for forgotten in [session_id] if session_id else list(self.turns):
            self.turns.pop(forgotten, None)

    def branch(self, session_id: str, until: str = "") -> list[ledger_pb.Turn]:
        """The turns that lead to an answer, or to the one kept last."""
        turns = {turn.answer_id: turn for turn in self.turns.get(session_id, [])}
        found, place = [], until or next(reversed(turns), "")
        while place in turns:
            found.insert(0, turns[place])
            place = turns[place].parent_answer_id
        return found

    async def PutSummary(self, request: ledger_pb.PutSummaryRequest, context: grpc.aio.ServicerContext) -> ledger_pb.PutSummaryResponse:
        self.summaries[request.summary.through_answer_id] = request.summary
        return ledger_pb.PutSummaryResponse()

    async def UpdateSession(
        self, request: ledger_pb.UpdateSessionRequest, context: grpc.aio.ServicerContext
    ) -> ledger_pb.UpdateSessionResponse:
        assert request.suggested_by
        self.titles[request.session_id] = request.title
        return ledger_pb.UpdateSessionResponse(session=ledger_pb.Session(session_id=request.session_id, title=request.title))

    def billed(self) -> tuple[int, int]:
        """Prompt and answer tokens over all operations."""
        usages = [usage_value(operation.usage) for operation in self.operations.values()]
        return sum(usage.prompt_tokens for usage in usages), sum(usage.output_tokens for usage in usages)


@dataclass
class Reply:
    """One answer as its reader saw it."""

    events: list[pb.AnswerEvent] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [str(event.WhichOneof("event")) for event in self.events]

    @property
    def text(self) -> str:
        return "".join(event.delta.text for event in self.events if event.HasField("delta"))

    @property
    def done(self) -> pb.Done:
        assert self.kinds[-1] == "done"
        return self.events[-1].done

    @property
    def answer_id(self) -> str:
        return self.events[0].answer_id

    def steps(self) -> dict[str, str]:
        """Last status of each step, in the order they began."""
        return {event.step.name: event.step.status for event in self.events if event.HasField("step")}


@dataclass
class World:
    """Everything a test may touch."""

    stub: Any
    caller: Caller
    ledger: FakeLedger
    retrieval: FakeRetrieval
    provider: Provider
    settings: OrchestratorSettings
    spool_path: Path
    spans: InMemorySpanExporter
    variables: dict[str, str]

    async def ask(self, question: str, *, principal: Principal = ALICE, into: Reply | None = None, **fields: Any) -> Reply:
        """Ask and read to the end. Raises what the answer ended in; `into` then holds what was read before."""
        reply = into or Reply()
        async with self.caller.stream(
            self.stub.Answer, pb.AnswerRequest(question=question, **fields), timeout_s=60, principal=principal
        ) as events:
            async for event in events:
                reply.events.append(event)
        return reply

    async def resume(self, answer_id: str, after: int = 0, *, principal: Principal = ALICE) -> Reply:
        reply = Reply()
        request = pb.ResumeAnswerRequest(answer_id=answer_id, after_sequence=after)
        async with self.caller.stream(self.stub.ResumeAnswer, request, timeout_s=60, principal=principal) as events:
            async for event in events:
                reply.events.append(event)
        return reply

    async def cancel(self, answer_id: str, *, principal: Principal = ALICE) -> bool:
        request = pb.CancelAnswerRequest(answer_id=answer_id)
        return bool((await self.caller.unary(self.stub.CancelAnswer, request, principal=principal)).was_running)

    def behave(self, **behaviour: Any) -> None:
        self.provider.default = Behaviour(**behaviour)

    async def records(self, *, over: bool = True) -> list[Record]:
        """The provider's own records; waits until every response is over."""
        if over:
            await until(lambda: all(record.state != "running" for record in self.provider.records))
        return list(self.provider.records)

    async def booked(self, answer_id: str) -> ledger_pb.Operation:
        """The operation as the ledger booked it."""
        await until(lambda: answer_id in self.ledger.operations)
        return self.ledger.operations[answer_id]


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is on the other side of a socket
            await asyncio.sleep(0.005)


def spans_of_this_process() -> InMemorySpanExporter:
    """Spans made from now on. The process has one tracer provider; it is set up if nobody has."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    tracers, exporter = trace.get_tracer_provider(), InMemorySpanExporter()
    assert isinstance(tracers, TracerProvider)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@contextlib.asynccontextmanager
async def provider_server(provider: Provider) -> AsyncIterator[str]:
    """The simulated provider in this process; yields its address."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(provider), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@contextlib.asynccontextmanager
async def serving(register: Any, servicer: object, port: int = 0) -> AsyncIterator[int]:
    """A stand-in on a port of its own."""
    server = Server(passport_identity(Passport(KEY.encode())), reflect=False)
    server.add(register, servicer, "stand-in")
    await server.start("127.0.0.1", port)
    try:
        yield server.port
    finally:
        await server.stop(0, 0)


@contextlib.asynccontextmanager
async def world(folder: Path, redis_url: str, *, with_key: bool = True, **variables: str) -> AsyncIterator[World]:
    """Start everything; `variables` are further settings."""
    ledger, retrieval, provider, spans = FakeLedger(), FakeRetrieval(), Provider(), spans_of_this_process()
    async with contextlib.AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(provider_server(provider))
        ledger_port = await stack.enter_async_context(serving(ledger_rpc.add_LedgerServiceServicer_to_server, ledger))
        retrieval_port = await stack.enter_async_context(serving(retrieval_rpc.add_RetrievalServiceServicer_to_server, retrieval))
        variables = {
            "TAILRACE_INTERNAL_KEY": KEY,
            "TAILRACE_ORCHESTRATOR_PORT": "0",
            "TAILRACE_LEDGER_TARGET": f"127.0.0.1:{ledger_port}",
            "TAILRACE_RETRIEVAL_TARGET": f"127.0.0.1:{retrieval_port}",
            "REDIS_URL": redis_url,
            "ANTHROPIC_API_KEY": "test-key" if with_key else "",
            "ANTHROPIC_BASE_URL": base_url,
            "GOOGLE_GEMINI_BASE_URL": base_url,
            # An address of one's own is a provider, also without a key.
            **({"OPENAI_BASE_URL": f"{base_url}/v1"} if "OPENAI_API_KEY" in variables else {}),
            "TAILRACE_ORCHESTRATOR_REWRITES": "rule",  # a call of the provider is an answer's, unless a test wants another
            **variables,
        }
        yield await stack.enter_async_context(_orchestrator(folder, ledger, retrieval, provider, spans, variables))
        spans.shutdown()


@contextlib.asynccontextmanager
async def replica(beside: World, folder: Path, **variables: str) -> AsyncIterator[World]:
    """One more orchestrator in the same world, with a disk of its own."""
    made = _orchestrator(folder, beside.ledger, beside.retrieval, beside.provider, beside.spans, {**beside.variables, **variables})
    async with made as running:
        yield running


@contextlib.asynccontextmanager
async def _orchestrator(
    folder: Path, ledger: FakeLedger, retrieval: FakeRetrieval, provider: Provider, spans: InMemorySpanExporter, variables: dict[str, str]
) -> AsyncIterator[World]:
    settings = OrchestratorSettings.load({**variables, "TAILRACE_STATE_DIR": str(folder)})
    async with build(settings) as service:
        async with started(service, "127.0.0.1") as port:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                caller = Caller(f"127.0.0.1:{port}", Passport(KEY.encode()))
                stub = pb_grpc.OrchestratorServiceStub(channel)
                spool_path = folder / "orchestrator" / "spool.db"
                yield World(stub, caller, ledger, retrieval, provider, settings, spool_path, spans, variables)
        await service.server.stop(0, 0)
        assert service.drain is not None
        await service.drain(5)
