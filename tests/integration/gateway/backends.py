"""Stand-ins for the three services behind the gateway: real gRPC servers with the chassis's interceptors, whose answers a test scripts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from services.chassis.errors import NotFound, RequestInvalid
from services.chassis.passport import Passport
from services.chassis.principal import Principal, current_principal
from services.chassis.server import Server, passport_identity
from services.chassis.tls import MutualTls
from tailrace.common.v1 import common_pb2 as common
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.ledger.v1.ledger_service_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.orchestrator.v1.orchestrator_service_pb2_grpc import OrchestratorServiceServicer, add_OrchestratorServiceServicer_to_server
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval
from tailrace.retrieval.v1.retrieval_service_pb2_grpc import RetrievalServiceServicer, add_RetrievalServiceServicer_to_server
from tests.certificates import Files

KEY = b"an-internal-key-for-tests"
ANSWER = "0195f2a0-0000-7000-8000-000000000001"

Script = list[Any]
"""Messages to write; an exception to raise; a callable to await."""


def accepted(sequence: int = 1) -> orchestrator.AnswerEvent:
    event = orchestrator.Accepted(answer_id=ANSWER, session_id="s-1", trace_id="0" * 32)
    return orchestrator.AnswerEvent(answer_id=ANSWER, sequence=sequence, accepted=event)


def delta(sequence: int, text: str) -> orchestrator.AnswerEvent:
    return orchestrator.AnswerEvent(answer_id=ANSWER, sequence=sequence, delta=orchestrator.Delta(text=text))


def done(sequence: int) -> orchestrator.AnswerEvent:
    usage = common.Usage(input_tokens=2**60, output_tokens=7)
    receipt = orchestrator.Done(answer_id=ANSWER, usage=usage, cost_nanousd=1_500_000_000, finish_reason="end_turn", model="m")
    receipt.cache.verdict = "miss"
    return orchestrator.AnswerEvent(answer_id=ANSWER, sequence=sequence, done=receipt)


@dataclass
class Seen:
    """What reached the services."""

    calls: list[tuple[str, Any, Principal]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call was cancelled by the gateway."""

    def note(self, method: str, request: Any) -> None:
        self.calls.append((method, request, current_principal()))

    def last(self, method: str) -> tuple[Any, Principal]:
        return next((request, principal) for name, request, principal in reversed(self.calls) if name == method)

    def count(self, method: str) -> int:
        return sum(name == method for name, _, _ in self.calls)


async def play(script: Script, context: Any, seen: Seen) -> None:
    """Act a script out."""
    try:
        for beat in script:
            if isinstance(beat, Exception):
                raise beat
            if callable(beat):
                await beat()
            else:
                await context.write(beat)
    except asyncio.CancelledError:
        seen.cancelled.set()
        raise
    except Exception as error:
        if type(error).__name__ == "ExecuteBatchError":  # what a write meets when the caller is gone
            seen.cancelled.set()
        raise


async def forever() -> None:
    """A beat that never ends."""
    await asyncio.Event().wait()


class FakeOrchestrator(OrchestratorServiceServicer):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.script: Script = []
        self.resumed: Script = []
        self.prompts: Script = []

    async def Answer(self, request: Any, context: Any) -> None:
        self.seen.note("Answer", request)
        await play(self.script, context, self.seen)

    async def ResumeAnswer(self, request: Any, context: Any) -> None:
        self.seen.note("ResumeAnswer", request)
        await play(self.resumed, context, self.seen)

    async def CancelAnswer(self, request: Any, context: Any) -> Any:
        self.seen.note("CancelAnswer", request)
        if request.answer_id != ANSWER:
            raise NotFound("no such answer", kind="answer")
        return orchestrator.CancelAnswerResponse(was_running=True)

    async def ConfirmToolCall(self, request: Any, context: Any) -> Any:
        self.seen.note("ConfirmToolCall", request)
        if request.answer_id != ANSWER:
            raise NotFound("no such answer", kind="answer")
        return orchestrator.ConfirmToolCallResponse(was_waiting=True)

    async def GetPrompts(self, request: Any, context: Any) -> Any:
        self.seen.note("GetPrompts", request)
        message = orchestrator.SentMessage(role="user", text="Why?")
        return orchestrator.GetPromptsResponse(prompts=[orchestrator.SentPrompt(attempt=1, system="Answer.", messages=[message])])

    async def ExportPrompts(self, request: Any, context: Any) -> None:
        self.seen.note("ExportPrompts", request)
        await play(self.prompts, context, self.seen)

    async def ForgetPrompts(self, request: Any, context: Any) -> Any:
        self.seen.note("ForgetPrompts", request)
        return orchestrator.ForgetPromptsResponse(forgotten=1)

    async def ListModels(self, request: Any, context: Any) -> Any:
        self.seen.note("ListModels", request)
        model = orchestrator.Model(model="m-1", provider="extractive", tiers=["fast"], context_tokens_max=1000, output_tokens_max=100)
        return orchestrator.ListModelsResponse(models=[model], default_tier="fast")


class FakeRetrieval(RetrievalServiceServicer):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.documents: list[tuple[Any, bytes]] = []
        """Documents that arrived whole: header and content."""
        self.broken_off = 0
        """Streams that ended by a part that is none, so that the document before it was given up."""
        self.hits: Script = []

    async def ForgetAnswers(self, request: Any, context: Any) -> Any:
        self.seen.note("ForgetAnswers", request)
        return retrieval.ForgetAnswersResponse(forgotten=1)

    async def IngestDocuments(self, request_iterator: Any, context: Any) -> None:
        self.seen.note("IngestDocuments", None)
        whole: list[tuple[Any, bytearray]] = []
        try:
            async for part in request_iterator:
                if part.HasField("header"):
                    if whole:
                        await self._received(whole, context)
                    whole.append((part.header, bytearray()))
                elif part.HasField("content"):
                    whole[-1][1].extend(part.content)
                else:
                    raise RequestInvalid("a message holds neither a header nor content", field="part")
        except RequestInvalid:
            self.broken_off += 1
            raise
        await self._received(whole, context)
        self.documents += [(header, bytes(content)) for header, content in whole]
        for index, (header, content) in enumerate(whole):
            for stage in ("parsed", "indexed"):
                progress = retrieval.IngestDocumentsResponse(
                    job_id="job-1", index=index, name=header.source_uri or header.title, stage=stage, bytes=len(content)
                )
                await context.write(progress)

    async def _received(self, whole: list[tuple[Any, bytearray]], context: Any) -> None:
        header, content = whole[-1]
        name = header.source_uri or header.title
        await context.write(
            retrieval.IngestDocumentsResponse(job_id="job-1", index=len(whole) - 1, name=name, stage="received", bytes=len(content))
        )

    async def Search(self, request: Any, context: Any) -> None:
        self.seen.note("Search", request)
        await play(self.hits, context, self.seen)

    async def ListCollections(self, request: Any, context: Any) -> None:
        self.seen.note("ListCollections", request)
        await context.write(retrieval.ListCollectionsResponse(collection="c", documents=2, epoch=2**60, embedder_id="one", reembedded=1))

    async def ListDocuments(self, request: Any, context: Any) -> None:
        self.seen.note("ListDocuments", request)
        await context.write(
            retrieval.ListDocumentsResponse(document=retrieval.Document(document_id="d-1", bytes=7), next_page_token="next")
        )

    async def GetDocument(self, request: Any, context: Any) -> Any:
        self.seen.note("GetDocument", request)
        if request.document_id != "d-1":
            raise NotFound("no such document", kind="document")
        return retrieval.GetDocumentResponse(
            document=retrieval.Document(document_id="d-1"), chunks=[retrieval.Chunk(chunk_id="c-1", start=0, end=4, text="text")]
        )

    async def DeleteDocument(self, request: Any, context: Any) -> Any:
        self.seen.note("DeleteDocument", request)
        return retrieval.DeleteDocumentResponse(chunks_deleted=3)

    async def GetIngestionJob(self, request: Any, context: Any) -> Any:
        self.seen.note("GetIngestionJob", request)
        return retrieval.GetIngestionJobResponse(job_id=request.job_id, status="running")

    async def ListIngestionJobs(self, request: Any, context: Any) -> None:
        self.seen.note("ListIngestionJobs", request)
        await context.write(retrieval.ListIngestionJobsResponse(job_id="job-2", status="ended"))
        await context.write(retrieval.ListIngestionJobsResponse(job_id="job-1", status="running", next_page_token="more"))

    async def CancelIngestionJob(self, request: Any, context: Any) -> Any:
        self.seen.note("CancelIngestionJob", request)
        return retrieval.CancelIngestionJobResponse(cancelled=2)

    async def RetryIngestionJob(self, request: Any, context: Any) -> Any:
        self.seen.note("RetryIngestionJob", request)
        return retrieval.RetryIngestionJobResponse(retried=1)

    async def WatchIngestionJob(self, request: Any, context: Any) -> None:
        self.seen.note("WatchIngestionJob", request)
        await context.write(retrieval.IngestDocumentsResponse(job_id=request.job_id, stage="indexed"))


class FakeLedger(LedgerServiceServicer):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.requests_per_minute = 1_000_000
        self.plan = ledger.Plan()
        """What the plan gives besides requests."""
        self.tells_plans = asyncio.Event()
        """Until it is set, whoever asks for a plan waits."""
        self.tells_plans.set()
        self.keys: dict[str, Principal] = {}
        self.watched: Script = []
        self.operations = [ledger.ListOperationsResponse(operation=ledger.Operation(operation_id=ANSWER))]
        self.booked = ledger.Operation(operation_id=ANSWER, cost_nanousd=7_500_000)
        """What is known of ANSWER. Without a status it has not ended."""
        self.tells_operations = asyncio.Event()
        """Until it is set, whoever asks for one operation waits."""
        self.tells_operations.set()
        self.usage: list[Any] = []
        self.exported: Script = []
        self.budget = ledger.Budget(scope="user", subject="ada", period="day", limit_nanousd=1_500_000_000, spent_nanousd=1)

    async def GetEntitlements(self, request: Any, context: Any) -> Any:
        self.seen.note("GetEntitlements", request)
        await self.tells_plans.wait()
        reply = ledger.GetEntitlementsResponse(plan=self.plan)
        reply.plan.MergeFrom(ledger.Plan(name="free", requests_per_minute=self.requests_per_minute))
        return reply

    async def ResolveApiKey(self, request: Any, context: Any) -> Any:
        self.seen.note("ResolveApiKey", request)
        current_principal().require("service")
        owner = self.keys.get(request.secret)
        if owner is None:
            return ledger.ResolveApiKeyResponse()
        principal = common.Principal(
            tenant=owner.tenant,
            user=owner.user,
            roles=sorted(owner.roles),
            api_key_id=owner.api_key_id,
            scopes=sorted(owner.scopes),
        )
        return ledger.ResolveApiKeyResponse(principal=principal)

    async def GetOperation(self, request: Any, context: Any) -> Any:
        self.seen.note("GetOperation", request)
        await self.tells_operations.wait()
        if request.operation_id != ANSWER:
            raise NotFound("no such operation", kind="operation")
        reply = ledger.GetOperationResponse(operation=self.booked)
        if request.with_turn:
            reply.turn.CopyFrom(ledger.Turn(answer_id=ANSWER, question="Why?", text="Because [1].", complete=True))
        return reply

    async def ListOperations(self, request: Any, context: Any) -> None:
        self.seen.note("ListOperations", request)
        for row in self.operations:
            await context.write(row)

    async def WatchOperations(self, request: Any, context: Any) -> None:
        self.seen.note("WatchOperations", request)
        await play(self.watched, context, self.seen)

    async def QueryUsage(self, request: Any, context: Any) -> None:
        self.seen.note("QueryUsage", request)
        for row in self.usage:
            await context.write(row)

    async def ListSessions(self, request: Any, context: Any) -> None:
        self.seen.note("ListSessions", request)
        await context.write(ledger.ListSessionsResponse(session=ledger.Session(session_id="s-1", turns=2)))

    async def GetSession(self, request: Any, context: Any) -> Any:
        self.seen.note("GetSession", request)
        return ledger.GetSessionResponse(session=ledger.Session(session_id=request.session_id), turns=[ledger.Turn(question="Why?")])

    async def UpdateSession(self, request: Any, context: Any) -> Any:
        self.seen.note("UpdateSession", request)
        return ledger.UpdateSessionResponse(session=ledger.Session(session_id=request.session_id, title=request.title))

    async def DeleteSession(self, request: Any, context: Any) -> Any:
        self.seen.note("DeleteSession", request)
        if request.session_id != "s-1":
            raise NotFound("no such conversation", kind="session")
        return ledger.DeleteSessionResponse()

    async def ExportSessions(self, request: Any, context: Any) -> None:
        self.seen.note("ExportSessions", request)
        if request.session_id not in ("", "s-1"):
            raise NotFound("no such conversation", kind="session")
        await play(self.exported, context, self.seen)

    async def ListPlans(self, request: Any, context: Any) -> None:
        self.seen.note("ListPlans", request)
        await context.write(ledger.ListPlansResponse(plan=ledger.Plan(name="free", monthly_budget_nanousd=1)))

    async def PutPlan(self, request: Any, context: Any) -> Any:
        self.seen.note("PutPlan", request)
        return ledger.PutPlanResponse(plan=request.plan)

    async def GetSubscription(self, request: Any, context: Any) -> Any:
        self.seen.note("GetSubscription", request)
        return ledger.GetSubscriptionResponse(subscription=ledger.Subscription(user=request.user, plan="free"))

    async def PutSubscription(self, request: Any, context: Any) -> Any:
        self.seen.note("PutSubscription", request)
        return ledger.PutSubscriptionResponse(subscription=ledger.Subscription(user=request.user, plan=request.plan))

    async def DeleteSubscription(self, request: Any, context: Any) -> Any:
        self.seen.note("DeleteSubscription", request)
        return ledger.DeleteSubscriptionResponse()

    async def GetBudgets(self, request: Any, context: Any) -> Any:
        self.seen.note("GetBudgets", request)
        return ledger.GetBudgetsResponse(budgets=[self.budget])

    async def PutBudget(self, request: Any, context: Any) -> Any:
        self.seen.note("PutBudget", request)
        budget = ledger.Budget(scope=request.scope, subject=request.subject, period=request.period, limit_nanousd=request.limit_nanousd)
        return ledger.PutBudgetResponse(budget=budget)

    async def DeleteBudget(self, request: Any, context: Any) -> Any:
        self.seen.note("DeleteBudget", request)
        return ledger.DeleteBudgetResponse()

    async def ListPrices(self, request: Any, context: Any) -> None:
        self.seen.note("ListPrices", request)
        await context.write(ledger.ListPricesResponse(price=common.Price(provider="p", model="m", input_nanousd_per_mtok=2_000_000_000)))

    async def PutPrice(self, request: Any, context: Any) -> Any:
        self.seen.note("PutPrice", request)
        return ledger.PutPriceResponse(price=request.price)

    async def CreateApiKey(self, request: Any, context: Any) -> Any:
        self.seen.note("CreateApiKey", request)
        return ledger.CreateApiKeyResponse(key=ledger.ApiKey(key_id="k-1", name=request.name), secret="trk_once")

    async def ListApiKeys(self, request: Any, context: Any) -> None:
        self.seen.note("ListApiKeys", request)
        await context.write(ledger.ListApiKeysResponse(key=ledger.ApiKey(key_id="k-1"), next_page_token="more"))

    async def RevokeApiKey(self, request: Any, context: Any) -> Any:
        self.seen.note("RevokeApiKey", request)
        return ledger.RevokeApiKeyResponse()

    async def ListUsers(self, request: Any, context: Any) -> None:
        self.seen.note("ListUsers", request)
        await context.write(ledger.ListUsersResponse(user=ledger.User(user="ada")))

    async def PutUser(self, request: Any, context: Any) -> Any:
        self.seen.note("PutUser", request)
        return ledger.PutUserResponse(user=ledger.User(user=request.user, display_name=request.display_name))

    async def ExportUser(self, request: Any, context: Any) -> None:
        self.seen.note("ExportUser", request)
        await context.write(ledger.ExportUserResponse(user=ledger.User(user=request.user)))
        await context.write(ledger.ExportUserResponse(operation=ledger.Operation(operation_id=ANSWER)))

    async def EraseUser(self, request: Any, context: Any) -> Any:
        self.seen.note("EraseUser", request)
        return ledger.EraseUserResponse(erased=True)


@dataclass
class Behind:
    """The services behind the gateway."""

    seen: Seen
    orchestrator: FakeOrchestrator
    retrieval: FakeRetrieval
    ledger: FakeLedger
    ports: dict[str, int]
    servers: dict[str, Server]

    async def stop(self, name: str) -> None:
        """Take a service away."""
        await self.servers.pop(name).stop(0, 0)

    async def start(self, name: str, files: Files | None = None) -> None:
        """Bring a service (back) to its port; with `files` it takes calls over mutual TLS alone."""
        tls = MutualTls.read(files.certificate, files.key, files.authority) if files else None
        server = Server(passport_identity(Passport(KEY)), reflect=False, tls=tls)
        register, servicer = _SERVICES[name]
        server.add(register, getattr(self, name), servicer)
        self.ports[name] = await server.start("127.0.0.1", self.ports.get(name, 0))
        await server.ready({"store": True})
        self.servers[name] = server


_SERVICES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "orchestrator": (add_OrchestratorServiceServicer_to_server, "tailrace.orchestrator.v1.OrchestratorService"),
    "retrieval": (add_RetrievalServiceServicer_to_server, "tailrace.retrieval.v1.RetrievalService"),
    "ledger": (add_LedgerServiceServicer_to_server, "tailrace.ledger.v1.LedgerService"),
}


@contextlib.asynccontextmanager
async def running_behind() -> AsyncIterator[Behind]:
    """All three, on free ports."""
    seen = Seen()
    behind = Behind(seen, FakeOrchestrator(seen), FakeRetrieval(seen), FakeLedger(seen), {}, {})
    for name in _SERVICES:
        await behind.start(name)
    try:
        yield behind
    finally:
        for name in list(behind.servers):
            await behind.stop(name)
