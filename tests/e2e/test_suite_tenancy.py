"""What belongs to somebody else answers exactly like what does not exist, over HTTP and gRPC: three tenants, three users each."""

import asyncio
import contextlib
import json
import re
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest

from services.gateway.app import ROUTES, Router
from services.gateway.rpc import SERVICE
from services.gateway.rules import ROUTE_RULES, RPC_RULES
from tailrace.gateway.v1 import gateway_service_pb2_grpc
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval
from tests.suite import Suite, ask, events, until

TENANTS = ("north", "south", "west")
USERS = ("ann", "bob", "cyd")
PERSONAL = ("answer", "operation", "session")
"""What belongs to one user; the rest belongs to a tenant."""
UNKNOWN = "01890000-0000-7000-8000-000000000000"
IDS = {"answer_id", "operation_id", "document_id", "job_id"}
PAIRS, ROUNDS_MAX = 25, 6
DIFFERENCE_MAX_MS = 2.0
"""Between the quickest tenths of either kind: those met no other work on this machine, and are what an attacker looks at."""


@dataclass
class Belongings:
    """Ids of what one user of one tenant has."""

    tenant: str
    user: str
    ids: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
async def everybody(suite: Suite) -> AsyncIterator[list[Belongings]]:
    """Nine users with one of everything."""
    await suite.provider.reset()
    found = []
    for tenant in TENANTS:
        for user in USERS:
            found.append(await settle(suite, tenant, user))
    yield found


async def settle(suite: Suite, tenant: str, user: str) -> Belongings:
    """Give a user a document, an answer with its session, and what an admin makes: a plan, a subscription, a budget, a key."""
    own = Belongings(tenant, user)
    async with suite.client(user, tenant) as client:
        own.ids["document"], own.ids["job"] = await indexed(client, f"{tenant} {user}")
        answer = await ask(client, f"What did {user} of {tenant} write?", cache="off")
        own.ids |= {"answer": answer.answer_id, "operation": answer.answer_id, "session": answer.data("accepted")[0]["session_id"]}

        async def recorded() -> bool:
            paths = (f"/v1/operations/{own.ids['operation']}", f"/v1/sessions/{own.ids['session']}")
            return all([(await client.get(path)).status_code == 200 for path in paths])

        await until(recorded)
    member = f"{user}-of-{tenant}"
    async with suite.client("root", tenant, ("user", "admin")) as admin:
        (await admin.put(f"/v1/admin/users/{member}", json={"display_name": "A member"})).raise_for_status()
        (await admin.put(f"/v1/admin/budgets/user/{member}", json={"period": "day", "limit_usd": "1"})).raise_for_status()
        (await admin.post("/v1/admin/revocations", json={"user": member})).raise_for_status()
        made = await admin.post("/v1/admin/api-keys", json={"name": "robot", "user": member})
        own.ids |= {"api key": made.raise_for_status().json()["key_id"], "subscription": member, "budget": member, "member": member}
        own.ids["prompts"] = own.ids["answer"]
    return own


async def indexed(client: httpx.AsyncClient, name: str) -> tuple[str, str]:
    """Upload a document; return its id and its job's."""
    async with client.stream("POST", "/v1/documents", json={"title": name, "text": f"The diary of {name}."}) as response:
        assert response.status_code == 200
        last = [event.data async for event in events(response) if event.data.get("stage") == "indexed"][-1]
    return last["document_id"], last["job_id"]


HTTP_CALLS: list[tuple[str, str, str, Any]] = [
    ("answer", "GET", "/v1/answers/{}", None),
    ("answer", "GET", "/v1/answers/{}/events", None),
    ("answer", "POST", "/v1/answers/{}/cancel", None),
    ("answer", "POST", "/v1/answers/{}/tool-calls/call-1", {"allowed": True}),
    ("operation", "GET", "/v1/operations/{}", None),
    ("session", "GET", "/v1/sessions/{}", None),
    ("session", "GET", "/v1/sessions/{}?branches=all", None),
    ("session", "GET", "/v1/sessions/{}/export", None),
    ("session", "PATCH", "/v1/sessions/{}", {"title": "mine now"}),
    ("session", "DELETE", "/v1/sessions/{}", None),
    ("document", "GET", "/v1/documents/{}", None),
    ("document", "DELETE", "/v1/documents/{}", None),
    ("job", "GET", "/v1/jobs/{}", None),
    ("job", "POST", "/v1/jobs/{}/cancel", None),
    ("job", "POST", "/v1/jobs/{}/retry", None),
]
ADMIN_CALLS: list[tuple[str, str, str, Any]] = [
    ("subscription", "GET", "/v1/admin/subscriptions/{}", None),
    ("subscription", "DELETE", "/v1/admin/subscriptions/{}", None),
    ("budget", "GET", "/v1/admin/budgets/user/{}", None),
    ("budget", "DELETE", "/v1/admin/budgets/user/{}", None),
    ("api key", "DELETE", "/v1/admin/api-keys/{}", None),
    ("member", "DELETE", "/v1/admin/revocations/users/{}", None),
    ("member", "GET", "/v1/admin/users/{}/export", None),
    ("member", "DELETE", "/v1/admin/users/{}", None),
    ("prompts", "GET", "/v1/answers/{}/prompts", None),
]
_OF_A_REQUEST = {"trace_id", "request_id", "instance"}
_HEADERS_OF_A_REQUEST = {"x-request-id", "request-id", "x-trace-id", "date"}


def said(response: httpx.Response, asked: str) -> tuple[int, dict[str, str], Any]:
    """All of a response that does not name the request itself."""
    headers = {
        name: value
        for name, value in response.headers.items()
        if name not in _HEADERS_OF_A_REQUEST and not name.startswith(("x-ratelimit-remaining-", "x-ratelimit-reset-"))
    }
    text = response.text.replace(asked, "<id>")
    body = json.loads(text) if text else None
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in _OF_A_REQUEST}
        headers.pop("content-length", None)
    return response.status_code, headers, body


def twin_of(known: str) -> str:
    """An id of the same form that nobody has."""
    return UNKNOWN if re.fullmatch(r"[0-9a-f-]{36}", known) else f"{known[:-1]}{'0' if known[-1] != '0' else '1'}"


def foreign_to(asker: Belongings, everybody: list[Belongings], kind: str) -> list[Belongings]:
    """Whose things of a kind the asker must not see."""
    personal = kind in PERSONAL
    return [own for own in everybody if own.tenant != asker.tenant or (personal and own.user != asker.user)]


async def test_a_foreign_id_answers_like_an_unknown_one_over_http(suite: Suite, everybody: list[Belongings]) -> None:
    """Same status, same headers, same body, for every pair of owner and asker; nothing of the owner's is gone afterwards."""
    compared = 0
    for asker in everybody:
        async with suite.client(asker.user, asker.tenant) as client:
            for kind, method, path, body in HTTP_CALLS:
                for owner in foreign_to(asker, everybody, kind):
                    foreign, unknown = owner.ids[kind], twin_of(owner.ids[kind])
                    of_foreign = said(await client.request(method, path.format(foreign), json=body), foreign)
                    of_unknown = said(await client.request(method, path.format(unknown), json=body), unknown)

                    assert of_foreign == of_unknown, (kind, method, path)
                    assert of_foreign[0] == 404, (kind, method, path, of_foreign)
                    compared += 1
    assert compared > 150
    for owner in everybody:
        async with suite.client(owner.user, owner.tenant) as client:
            for kind, method, path, _ in HTTP_CALLS:
                if method == "GET":
                    assert (await client.get(path.format(owner.ids[kind]))).status_code == 200, (kind, path)


async def test_a_foreign_turn_is_replaced_like_an_unknown_one(suite: Suite, everybody: list[Belongings]) -> None:
    """By a third user, in a conversation of their own or under the other's id of it; and every conversation stays as it was."""
    async with suite.client("cat", TENANTS[0]) as client:
        mine = (await ask(client, "What did cat write?", session_id="cats")).answer_id

        async def said_of(session: str, replaced: str) -> tuple[int, str, str]:
            body = {"question": "Mine now?", "session_id": session, "replaces": replaced, "stream": False}
            refused = await client.post("/v1/answers", json=body)
            return refused.status_code, refused.json()["reason"], refused.json()["detail"]

        for owner in everybody:
            # At once: each is looked for a while, as it might only just have been said.
            sessions = ("cats", owner.ids["session"])
            foreign = await asyncio.gather(*(said_of(session, owner.ids["answer"]) for session in sessions))
            unknown = await asyncio.gather(*(said_of(session, UNKNOWN) for session in sessions))
            assert foreign == unknown
            assert {reply[:2] for reply in foreign} == {(404, "NOT_FOUND")}
        shown = (await client.get("/v1/sessions/cats?branches=all")).raise_for_status().json()
        assert [turn["answer_id"] for turn in shown["turns"]] == [mine]
    for owner in everybody:
        async with suite.client(owner.user, owner.tenant) as client:
            shown = (await client.get(f"/v1/sessions/{owner.ids['session']}?branches=all")).raise_for_status().json()
            assert [turn["answer_id"] for turn in shown["turns"]] == [owner.ids["answer"]]
            assert shown["title_by"] == "rule"


async def test_a_foreign_id_answers_like_an_unknown_one_to_an_admin(suite: Suite, everybody: list[Belongings]) -> None:
    """An admin is one of a tenant: whom others employ, what they may spend and which keys they have is not told, and not changed."""
    for tenant in TENANTS:
        async with suite.client("root", tenant, ("user", "admin")) as admin:
            for kind, method, path, _ in ADMIN_CALLS:
                for owner in (own for own in everybody if own.tenant != tenant):
                    foreign, unknown = owner.ids[kind], twin_of(owner.ids[kind])
                    of_foreign = said(await admin.request(method, path.format(foreign)), foreign)
                    of_unknown = said(await admin.request(method, path.format(unknown)), unknown)

                    assert of_foreign == of_unknown, (kind, method, path)
    for tenant in TENANTS:
        async with suite.client("root", tenant, ("user", "admin")) as admin:
            keys = {key["key_id"]: key for key in (await admin.get("/v1/admin/api-keys")).raise_for_status().json()["api_keys"]}
            mine = [own for own in everybody if own.tenant == tenant]
            assert set(keys) == {own.ids["api key"] for own in mine}
            assert not any(key.get("revoked_at") for key in keys.values())
            for own in mine:
                budgets = (await admin.get(f"/v1/admin/budgets/user/{own.ids['budget']}")).raise_for_status().json()["budgets"]
                assert [budget["limit_usd"] for budget in budgets if budget["period"] == "day"] == ["1.00"]
                exported = await admin.get(f"/v1/admin/users/{own.ids['member']}/export")
                assert own.ids["member"] in exported.raise_for_status().text
                assert (await admin.delete(f"/v1/admin/revocations/users/{own.ids['member']}")).status_code == 204


async def test_plans_and_prices_of_a_tenant_are_its_own(suite: Suite, everybody: list[Belongings]) -> None:
    """They are listed to nobody else, a foreign plan cannot be subscribed to, and a foreign price changes nobody's."""
    plan = {"requests_per_minute": 5, "tokens_per_minute": 5, "concurrent_answers": 5, "monthly_budget_usd": "5", "tiers": ["fast"]}
    price = {"provider": "anthropic", "input_usd_per_mtok": "1", "output_usd_per_mtok": "2"}
    admins = {tenant: suite.client("root", tenant, ("user", "admin")) for tenant in TENANTS}
    async with contextlib.AsyncExitStack() as stack:
        for tenant, admin in admins.items():
            await stack.enter_async_context(admin)
            (await admin.put(f"/v1/admin/plans/{tenant}-plan", json=plan)).raise_for_status()
            (await admin.put("/v1/admin/prices", json={**price, "model": f"{tenant}-model"})).raise_for_status()
        (await admins["north"].put("/v1/admin/prices", json={**price, "model": "claude-haiku-4-5"})).raise_for_status()
        for tenant, admin in admins.items():
            plans = {one["name"] for one in (await admin.get("/v1/admin/plans")).json()["plans"]}
            prices = {one["model"]: one["output_usd_per_mtok"] for one in (await admin.get("/v1/admin/prices")).json()["prices"]}
            own = next(one for one in everybody if one.tenant == tenant)
            assert {name for name in plans if name.endswith("-plan")} == {f"{tenant}-plan"}
            assert {name for name in prices if name.endswith("-model")} == {f"{tenant}-model"}
            assert (float(prices["claude-haiku-4-5"]) == 2) is (tenant == "north")
            for other in (name for name in TENANTS if name != tenant):
                path = f"/v1/admin/subscriptions/{own.ids['subscription']}"
                foreign, unknown = f"{other}-plan", f"{other}-plum"
                of_foreign = said(await admin.put(path, json={"plan": foreign}), foreign)
                assert of_foreign == said(await admin.put(path, json={"plan": unknown}), unknown)
                assert of_foreign[0] == 404


async def test_lists_hold_what_is_ones_own(suite: Suite, everybody: list[Belongings]) -> None:
    """Operations and sessions by user, documents by tenant; a filter by a foreign id finds nothing."""
    for asker in everybody:
        async with suite.client(asker.user, asker.tenant) as client:
            operations = (await client.get("/v1/operations")).json()["operations"]
            sessions = (await client.get("/v1/sessions")).json()["sessions"]
            documents = (await client.get("/v1/documents")).json()["documents"]
            assert [one["operation_id"] for one in operations] == [asker.ids["operation"]]
            assert [one["session_id"] for one in sessions] == [asker.ids["session"]]
            own = {other.ids["document"] for other in everybody if other.tenant == asker.tenant}
            assert {one["document_id"] for one in documents} == own
            for other in foreign_to(asker, everybody, "session"):
                listed = (await client.get("/v1/operations", params={"session_id": other.ids["session"]})).json()["operations"]
                assert listed == []


RPCS: list[tuple[str, str, Any]] = [
    ("answer", "ResumeAnswer", lambda known: orchestrator.ResumeAnswerRequest(answer_id=known)),
    ("answer", "CancelAnswer", lambda known: orchestrator.CancelAnswerRequest(answer_id=known)),
    ("operation", "GetOperation", lambda known: ledger.GetOperationRequest(operation_id=known, with_turn=True)),
    ("document", "DeleteDocument", lambda known: retrieval.DeleteDocumentRequest(document_id=known)),
    ("answer", "ConfirmToolCall", lambda known: orchestrator.ConfirmToolCallRequest(answer_id=known, call_id="call-1", allowed=True)),
    ("prompts", "GetPrompts", lambda known: orchestrator.GetPromptsRequest(answer_id=known)),
    ("job", "GetIngestionJob", lambda known: retrieval.GetIngestionJobRequest(job_id=known)),
    ("job", "WatchIngestionJob", lambda known: retrieval.WatchIngestionJobRequest(job_id=known)),
    ("job", "CancelIngestionJob", lambda known: retrieval.CancelIngestionJobRequest(job_id=known)),
    ("job", "RetryIngestionJob", lambda known: retrieval.RetryIngestionJobRequest(job_id=known)),
]
MAKES_ONES_OWN = {
    "PUT /v1/admin/plans/{name}",
    "PUT /v1/admin/subscriptions/{user}",
    "PUT /v1/admin/budgets/{scope}/{id}",
    "PUT /v1/admin/users/{user}",
}
"""What they name is made in the caller's own tenant, so a foreign name is a free one."""


def test_every_route_and_rpc_that_takes_an_id_is_compared() -> None:
    """Whoever adds one adds it here. A filter by an id is a list, and an answer that is replaced has a test of its own."""
    router = Router(ROUTES)
    routes = [router.find(method, path.partition("?")[0].format("x").encode())[0] for _, method, path, _ in HTTP_CALLS + ADMIN_CALLS]
    with_id = {method.name for method in SERVICE.methods if IDS & set(method.input_type.fields_by_name)}

    assert {f"{route.method} {route.path}" for route in routes} | MAKES_ONES_OWN == {name for name in ROUTE_RULES if "{" in name}
    assert {name for _, name, _ in RPCS} == with_id


async def status_of(call: Any, known: str) -> tuple[grpc.StatusCode, str, Any]:
    """How a call was refused, with everything that does not name the request."""
    try:
        if hasattr(call, "read"):
            await call.read()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        trailing = sorted((key, value) for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin")
        return (
            error.code(),
            (error.details() or "").replace(known, "<id>"),
            [value.replace(known.encode(), b"<id>") for _, value in trailing],
        )
    raise AssertionError("it was served")


async def test_a_foreign_id_answers_like_an_unknown_one_over_grpc(suite: Suite, everybody: list[Belongings]) -> None:
    """The same over the gateway's other front."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{suite.ports['gateway']}") as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        for asker in everybody:
            for kind, name, request in RPCS:
                roles = ("user", "admin") if RPC_RULES[name].role else ("user",)
                metadata = (("authorization", f"Bearer {suite.token(asker.user, asker.tenant, roles)}"),)
                for owner in foreign_to(asker, everybody, kind):
                    foreign, unknown = owner.ids[kind], twin_of(owner.ids[kind])
                    call = getattr(stub, name)
                    of_foreign = await status_of(call(request(foreign), metadata=metadata, timeout=10), foreign)
                    of_unknown = await status_of(call(request(unknown), metadata=metadata, timeout=10), unknown)

                    assert of_foreign == of_unknown, name
                    assert of_foreign[0] is grpc.StatusCode.NOT_FOUND, (name, of_foreign)


async def test_a_foreign_id_takes_as_long_as_an_unknown_one(suite: Suite, everybody: list[Belongings]) -> None:
    """Nobody finds out by the clock which ids exist. The two are asked for by turns, so that both meet the same load; where they seem to
    differ, more are asked for, since a true difference stays."""
    asker, owner = everybody[0], everybody[-1]
    left = {(method, path): (owner.ids[kind], twin_of(owner.ids[kind])) for kind, method, path, _ in HTTP_CALLS}
    bodies = {(method, path): body for _, method, path, body in HTTP_CALLS}
    taken: dict[tuple[str, str], tuple[list[float], list[float]]] = {call: ([], []) for call in left}
    async with suite.client(asker.user, asker.tenant) as client:
        for _ in range(ROUNDS_MAX):
            for (method, path), ids in left.items():
                for pair in range(PAIRS):
                    for which in (0, 1) if pair % 2 else (1, 0):
                        began = time.perf_counter()
                        await client.request(method, path.format(ids[which]), json=bodies[method, path])
                        taken[method, path][which].append((time.perf_counter() - began) * 1000)
            left = {call: ids for call, ids in left.items() if abs(difference_ms(*taken[call])) >= DIFFERENCE_MAX_MS}
    for (method, path), times in taken.items():
        print(f"foreign - unknown, quickest tenth of {len(times[0])}: {difference_ms(*times):+.2f} ms  {method} {path}")

    assert not left


def difference_ms(foreign: list[float], unknown: list[float]) -> float:
    return statistics.quantiles(foreign, n=10)[0] - statistics.quantiles(unknown, n=10)[0]
