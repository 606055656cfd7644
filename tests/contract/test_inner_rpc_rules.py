"""Who may call what behind the edge: every RPC of the inner services, without a principal, with a forged one, and by every role."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from services.chassis.passport import Passport
from services.chassis.principal import ROLES, Principal
from services.local.stores import Postgres, Valkey
from tailrace.ledger.v1 import ledger_service_pb2
from tailrace.orchestrator.v1 import orchestrator_service_pb2
from tailrace.retrieval.v1 import retrieval_service_pb2
from tests.fakes import orchestrator_world
from tests.integration.ledger import ledger_kit
from tests.integration.retrieval import retrieval_kit

MEMBER, ADMIN, SERVICE = "", "admin", "service"
RULES = {
    "orchestrator": {
        "Answer": MEMBER,
        "ResumeAnswer": MEMBER,
        "CancelAnswer": MEMBER,
        "ConfirmToolCall": MEMBER,
        "GetPrompts": ADMIN,
        "ExportPrompts": ADMIN,
        "ForgetPrompts": ADMIN,
        "ListModels": MEMBER,
        "GetStatus": SERVICE,
    },
    "retrieval": {
        "Recall": MEMBER,
        "Search": MEMBER,
        "Embed": MEMBER,
        "IngestDocuments": MEMBER,
        "GetIngestionJob": MEMBER,
        "WatchIngestionJob": MEMBER,
        "ListCollections": MEMBER,
        "ListIngestionJobs": MEMBER,
        "CancelIngestionJob": MEMBER,
        "RetryIngestionJob": MEMBER,
        "ListDocuments": MEMBER,
        "GetDocument": MEMBER,
        "DeleteDocument": MEMBER,
        "RememberAnswer": MEMBER,
        "ForgetAnswers": MEMBER,
    },
    "ledger": {
        "Reserve": MEMBER,
        "Settle": MEMBER,
        "Void": MEMBER,
        "RecordOperations": SERVICE,
        "LendCredit": SERVICE,
        "ReturnCredit": SERVICE,
        "ListRecalledCredit": SERVICE,
        "GetOperation": MEMBER,
        "ListOperations": MEMBER,
        "WatchOperations": MEMBER,
        "QueryUsage": MEMBER,
        "GetEntitlements": MEMBER,
        "ListUsers": ADMIN,
        "PutUser": ADMIN,
        "ExportUser": ADMIN,
        "EraseUser": ADMIN,
        "ListPlans": MEMBER,
        "PutPlan": ADMIN,
        "GetSubscription": MEMBER,
        "PutSubscription": ADMIN,
        "DeleteSubscription": ADMIN,
        "GetBudgets": ADMIN,
        "PutBudget": ADMIN,
        "DeleteBudget": ADMIN,
        "ListSessions": MEMBER,
        "GetSession": MEMBER,
        "ListTurns": MEMBER,
        "AppendTurn": MEMBER,
        "PutSummary": MEMBER,
        "UpdateSession": MEMBER,
        "DeleteSession": MEMBER,
        "ExportSessions": MEMBER,
        "ListPrices": MEMBER,
        "PutPrice": ADMIN,
        "CreateApiKey": ADMIN,
        "ListApiKeys": ADMIN,
        "RevokeApiKey": ADMIN,
        "ResolveApiKey": SERVICE,
    },
}
"""The role an RPC needs; none = whoever is signed for, on what is theirs."""
DESCRIPTORS = {
    "orchestrator": orchestrator_service_pb2.DESCRIPTOR.services_by_name["OrchestratorService"],
    "retrieval": retrieval_service_pb2.DESCRIPTOR.services_by_name["RetrievalService"],
    "ledger": ledger_service_pb2.DESCRIPTOR.services_by_name["LedgerService"],
}
RPCS = [(service, method) for service, descriptor in DESCRIPTORS.items() for method in descriptor.methods]
EACH_RPC = pytest.mark.parametrize(("service", "method"), RPCS, ids=[f"{service}-{method.name}" for service, method in RPCS])
REFUSALS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
BROKEN = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class Served:
    """A running service: its stub and the key that its callers sign with."""

    stub: Any
    passport: Passport


@pytest.fixture(scope="module")
async def served(postgres: Postgres, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Served]]:
    """All three, each with what it needs."""
    folder: Path = tmp_path_factory.mktemp("inner")
    async with (
        ledger_kit.running(await ledger_kit.fresh_database(postgres)) as ledger,
        retrieval_kit.running(retrieval_kit.settings_for(folder)) as retrieval,
        orchestrator_world.world(folder, valkey.url) as orchestrator,
    ):
        yield {
            "ledger": Served(ledger.stub, Passport(ledger_kit.INTERNAL_KEY.encode())),
            "retrieval": Served(retrieval.stub, Passport(retrieval_kit.KEY.encode())),
            "orchestrator": Served(orchestrator.stub, Passport(orchestrator_world.KEY.encode())),
        }


async def code_of(served: Served, method: Any, metadata: Any) -> grpc.StatusCode:
    """How an empty request ends. A stream is left after its first message."""
    call, request = getattr(served.stub, method.name), GetMessageClass(method.input_type)()

    async def one() -> AsyncIterator[Any]:
        yield request

    try:
        made = call(one() if method.client_streaming else request, metadata=metadata, timeout=10)
        if method.server_streaming:
            await made.read()
            made.cancel()
        else:
            await made
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("service", DESCRIPTORS)
def test_every_rpc_has_a_rule_and_every_rule_an_rpc(service: str) -> None:
    """Who adds an RPC decides here who may call it."""
    assert {method.name for method in DESCRIPTORS[service].methods} == RULES[service].keys()


@EACH_RPC
async def test_nobody_is_served_without_a_principal_that_we_signed(served: dict[str, Served], service: str, method: Any) -> None:
    """No principal, half of one, one signed with another key, and one that says more than what was signed."""
    almighty, plain = Principal("acme", "ann", ROLES), Principal("acme", "ann")
    own = served[service].passport
    signed, forged = own.sign(plain), Passport(b"a key of somebody else").sign(almighty)
    for metadata in ((), signed[:1], signed[1:], forged, (forged[0], signed[1]), (*signed, *signed)):
        assert await code_of(served[service], method, metadata) is grpc.StatusCode.UNAUTHENTICATED


@EACH_RPC
@pytest.mark.parametrize("role", sorted(ROLES))
async def test_a_role_may_what_the_table_says_and_nothing_else(served: dict[str, Served], service: str, method: Any, role: str) -> None:
    """Refused by type, or served; an empty request that is refused for what it lacks has passed the rule."""
    needs = RULES[service][method.name]
    code = await code_of(served[service], method, served[service].passport.sign(Principal("acme", "ann", frozenset({role}))))

    assert code not in BROKEN
    if needs in (MEMBER, role):
        assert code not in REFUSALS
    else:
        assert code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("method", [name for name, needs in RULES["ledger"].items() if needs == ADMIN])
async def test_an_admins_narrowed_key_administers_nothing(served: dict[str, Served], method: str) -> None:
    """Also where the edge was passed by."""
    narrowed = Principal("acme", "ann", frozenset({"admin"}), "k-1", frozenset({"answers"}))
    ledger = served["ledger"]

    code = await code_of(ledger, DESCRIPTORS["ledger"].methods_by_name[method], ledger.passport.sign(narrowed))

    assert code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(("environment", "shown"), [("development", True), ("production", False)])
async def test_no_service_describes_itself_in_production(
    postgres: Postgres, valkey: Valkey, tmp_path: Path, environment: str, shown: bool
) -> None:
    """As each is wired: a stranger on an inner port learns no method by asking, only where somebody develops."""
    variables = {"TAILRACE_ENV": environment}
    codes = {}
    async with (
        ledger_kit.running(await ledger_kit.fresh_database(postgres), **variables) as ledger,
        retrieval_kit.running(retrieval_kit.settings_for(tmp_path, environment=environment)) as retrieval,
        orchestrator_world.world(tmp_path, valkey.url, **variables) as orchestrator,
    ):
        for name, target in {
            "ledger": f"127.0.0.1:{ledger.port}",
            "retrieval": retrieval.caller.target,
            "orchestrator": orchestrator.caller.target,
        }.items():
            async with grpc.aio.insecure_channel(target) as channel:
                call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(iter([b""]), timeout=10)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                codes[name] = await call.code()

    assert codes == dict.fromkeys(DESCRIPTORS, grpc.StatusCode.OK if shown else grpc.StatusCode.UNIMPLEMENTED)
