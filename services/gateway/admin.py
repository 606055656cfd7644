"""The routes of administration. The role is checked before any of them runs; what a change means, the ledger decides."""

import re
from datetime import UTC, datetime

import orjson

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal, current_principal
from services.gateway import bodies, render, usd
from services.gateway.exchange import Exchange
from services.gateway.kit import Kit
from services.gateway.queries import at, page
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tailrace.orchestrator.v1 import orchestrator_service_pb2 as orchestrator
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

SCOPES = ("tenant", "user", "key")
EXPORT_TIMEOUT_S = 600.0
ERASE_TIMEOUT_S = 300.0
"""A user with a million operations takes a minute."""


async def plans(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/plans"""
    exchange.query(())
    rows = await kit.backends.ledger.rows(kit.backends.ledger.stub.ListPlans, ledger.ListPlansRequest())
    await exchange.respond_json({"plans": [render.plan(row.plan) for row in rows]})


async def put_plan(exchange: Exchange, kit: Kit) -> None:
    """PUT /v1/admin/plans/{name}, POST /v1/admin/plans"""
    exchange.query(())
    body = await exchange.json()
    if name := exchange.params.get("name"):
        if not re.fullmatch(r"[a-z0-9_-]{1,64}", name, re.ASCII):
            raise RequestInvalid("not the name of a plan", field="name", bound="1-64 of [a-z0-9_-]")
        request = bodies.parse(body, bodies.PlanBody).message(name)
    else:
        named = bodies.parse(body, bodies.NamedPlanBody)
        request = named.message(named.name)
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.PutPlan, request)
    kit.limits.forget()
    await exchange.respond_json(render.plan(reply.plan))


async def subscription(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/subscriptions/{user}"""
    exchange.query(())
    request = ledger.GetSubscriptionRequest(user=_subject(exchange, "user"))
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.GetSubscription, request)
    await exchange.respond_json(render.plain(reply.subscription))


async def put_subscription(exchange: Exchange, kit: Kit) -> None:
    """PUT /v1/admin/subscriptions/{user}"""
    exchange.query(())
    user = _subject(exchange, "user")
    body = bodies.parse(await exchange.json(), bodies.SubscriptionBody)
    request = ledger.PutSubscriptionRequest(user=user, plan=body.plan, when=body.when)
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.PutSubscription, request)
    _forget(kit, user)
    await exchange.respond_json(render.plain(reply.subscription))


async def delete_subscription(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/admin/subscriptions/{user}"""
    when = exchange.query({"when"}).get("when", "")
    user = _subject(exchange, "user")
    request = ledger.DeleteSubscriptionRequest(user=user, when=when)
    await kit.backends.ledger.unary(kit.backends.ledger.stub.DeleteSubscription, request)
    _forget(kit, user)
    await exchange.respond(204, b"", b"")


async def budgets(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/budgets/{scope}/{id}"""
    exchange.query(())
    scope, subject = _budget_of(exchange)
    request = ledger.GetBudgetsRequest(scope=scope, subject=subject)
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.GetBudgets, request)
    await exchange.respond_json({"budgets": [render.budget(budget) for budget in reply.budgets]})


async def put_budget(exchange: Exchange, kit: Kit) -> None:
    """PUT /v1/admin/budgets/{scope}/{id}"""
    exchange.query(())
    scope, subject = _budget_of(exchange)
    body = bodies.parse(await exchange.json(), bodies.BudgetBody)
    request = ledger.PutBudgetRequest(scope=scope, subject=subject, period=body.period, limit_nanousd=usd.parse(body.limit_usd))
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.PutBudget, request)
    await exchange.respond_json(render.budget(reply.budget))


async def delete_budget(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/admin/budgets/{scope}/{id}"""
    period = exchange.query({"period"}).get("period", "")
    if period not in ("", "day", "month"):
        raise RequestInvalid("there is no such period", field="period", bound="day, month")
    scope, subject = _budget_of(exchange)
    request = ledger.DeleteBudgetRequest(scope=scope, subject=subject, period=period)
    await kit.backends.ledger.unary(kit.backends.ledger.stub.DeleteBudget, request)
    await exchange.respond(204, b"", b"")


async def prices(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/prices"""
    exchange.query(())
    rows = await kit.backends.ledger.rows(kit.backends.ledger.stub.ListPrices, ledger.ListPricesRequest())
    await exchange.respond_json({"prices": [render.price(row.price) for row in rows]})


async def put_price(exchange: Exchange, kit: Kit) -> None:
    """PUT and POST /v1/admin/prices: a new version."""
    exchange.query(())
    request = bodies.parse(await exchange.json(), bodies.PriceBody).message()
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.PutPrice, request, idempotent=False)
    await exchange.respond_json(render.price(reply.price))


async def api_keys(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/api-keys"""
    size, token = page(exchange.query({"page_size", "page_token"}))
    request = ledger.ListApiKeysRequest(page_size=size, page_token=token)
    rows = await kit.backends.ledger.rows(kit.backends.ledger.stub.ListApiKeys, request)
    listed = [render.plain(row.key) for row in rows]
    await exchange.respond_json({"api_keys": listed, "next_page_token": rows[-1].next_page_token if rows else ""})


async def create_api_key(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/admin/api-keys"""
    exchange.query(())
    body = bodies.parse(await exchange.json(), bodies.ApiKeyBody)
    request = ledger.CreateApiKeyRequest(name=body.name, user=body.user, roles=body.roles, scopes=body.scopes)
    if body.expires_at:
        request.expires_at.FromDatetime(at(body.expires_at, "expires_at"))
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.CreateApiKey, request, idempotent=False)
    await exchange.respond_json({**render.plain(reply.key), "secret": reply.secret}, 201)


async def revoke_api_key(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/admin/api-keys/{id}"""
    exchange.query(())
    request = ledger.RevokeApiKeyRequest(key_id=exchange.params["id"])
    await kit.backends.ledger.unary(kit.backends.ledger.stub.RevokeApiKey, request)
    kit.identity.forget_api_keys()
    await exchange.respond(204, b"", b"")


async def revoke(exchange: Exchange, kit: Kit) -> None:
    """POST /v1/admin/revocations: a token that ends at once, or every token that a user has."""
    exchange.query(())
    body = bodies.parse(await exchange.json(), bodies.RevocationBody)
    if bool(body.jti) == bool(body.user):
        raise RequestInvalid("name a token or a user", field="jti", bound="one of jti, user")
    tenant, revocations = current_principal().tenant, kit.revocations
    if body.user:
        if body.expires_at:
            raise RequestInvalid("a user's revocation has no end", field="expires_at", bound="only with jti")
        until = await revocations.revoke_user(tenant, body.user)
        await exchange.respond_json({"user": body.user, "issued_until": _rfc3339(until)}, 201)
        return
    now = kit.identity.now()
    latest = now + kit.identity.lifetime_max_s
    expires_at = at(body.expires_at, "expires_at").timestamp() if body.expires_at else latest
    if not now < expires_at <= latest:
        raise RequestInvalid("expires_at is out of bounds", field="expires_at", bound=f"within {kit.identity.lifetime_max_s} s from now")
    await revocations.revoke_token(tenant, body.jti, expires_at)
    await exchange.respond_json({"jti": body.jti, "expires_at": _rfc3339(expires_at)}, 201)


async def restore(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/admin/revocations/{kind}/{id}"""
    exchange.query(())
    kind = exchange.params["kind"]
    if kind not in ("tokens", "users"):
        raise RequestInvalid("there is no such kind of revocation", field="kind", bound="tokens, users")
    await kit.revocations.restore(kind, current_principal().tenant, _subject(exchange, "id"))
    await exchange.respond(204, b"", b"")


async def users(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/users"""
    size, token = page(exchange.query({"page_size", "page_token"}))
    rows = await kit.backends.ledger.rows(kit.backends.ledger.stub.ListUsers, ledger.ListUsersRequest(page_size=size, page_token=token))
    listed = [render.plain(row.user) for row in rows if row.HasField("user")]
    await exchange.respond_json({"users": listed, "next_page_token": rows[-1].next_page_token if rows else ""})


async def put_user(exchange: Exchange, kit: Kit) -> None:
    """PUT /v1/admin/users/{user}, POST /v1/admin/users"""
    exchange.query(())
    content = await exchange.json()
    if "user" in exchange.params:
        user, body = _subject(exchange, "user"), bodies.parse(content, bodies.UserBody)
    else:
        named = bodies.parse(content, bodies.NamedUserBody)
        user, body = named.user, named
    request = ledger.PutUserRequest(user=user, display_name=body.display_name)
    reply = await kit.backends.ledger.unary(kit.backends.ledger.stub.PutUser, request)
    await exchange.respond_json(render.plain(reply.user))


async def export_user(exchange: Exchange, kit: Kit) -> None:
    """GET /v1/admin/users/{user}/export: a line of JSON for each record, and a last one that says how many there were.

    The prompts that are kept of the user's answers come after what the ledger has.
    """
    exchange.query(())
    user = _subject(exchange, "user")
    request = ledger.ExportUserRequest(user=user)
    stub, count = kit.backends.ledger.stub, 0
    headers = [
        (b"content-type", b"application/x-ndjson"),
        (b"cache-control", b"no-store"),
        (b"content-disposition", b'attachment; filename="user.ndjson"'),
    ]
    async with kit.backends.ledger.stream(stub.ExportUser, request, timeout_s=EXPORT_TIMEOUT_S) as messages:
        async for message in messages:
            if count == 0:  # until then a refusal can still be told as one
                await exchange.start(200, headers)
            count += 1
            await exchange.write(orjson.dumps(render.plain(message)) + b"\n")
    asked, kept = kit.backends.orchestrator, orchestrator.ExportPromptsRequest(user=user)
    async with asked.stream(asked.stub.ExportPrompts, kept, timeout_s=EXPORT_TIMEOUT_S) as sent:
        async for message in sent:
            count += 1
            await exchange.write(orjson.dumps({"prompts": render.plain(message)}) + b"\n")
    await exchange.write(orjson.dumps({"complete": True, "records": count}) + b"\n", last=True)


async def erase_user(exchange: Exchange, kit: Kit) -> None:
    """DELETE /v1/admin/users/{user}"""
    exchange.query(())
    user = _subject(exchange, "user")
    # First what can be served again; if that fails, the user is still there to try again.
    await _forget_answers(kit, user, erased=False)
    await kit.backends.ledger.unary(kit.backends.ledger.stub.EraseUser, ledger.EraseUserRequest(user=user), timeout_s=ERASE_TIMEOUT_S)
    # An answer may have ended in between. Now none is under way any more: the ledger erases nobody who has money set aside.
    await _forget_answers(kit, user, erased=True)
    _forget(kit, user)
    await exchange.respond(204, b"", b"")


async def _forget_answers(kit: Kit, user: str, *, erased: bool) -> None:
    """Forget what is kept of a user's answers outside the ledger, as the user themselves would have it forgotten."""
    forget = retrieval.ForgetAnswersRequest()
    themselves = Principal(current_principal().tenant, user)
    await kit.backends.retrieval.unary(kit.backends.retrieval.stub.ForgetAnswers, forget, principal=themselves, timeout_s=30.0)
    kept = orchestrator.ForgetPromptsRequest(user=user, erased=erased)
    await kit.backends.orchestrator.unary(kit.backends.orchestrator.stub.ForgetPrompts, kept, timeout_s=30.0)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _forget(kit: Kit, user: str) -> None:
    kit.limits.forget(Principal(current_principal().tenant, user))


def _budget_of(exchange: Exchange) -> tuple[str, str]:
    scope = exchange.params["scope"]
    if scope not in SCOPES:
        raise RequestInvalid("there is no such scope", field="scope", bound=", ".join(SCOPES))
    return scope, _subject(exchange, "id")


def _subject(exchange: Exchange, field: str) -> str:
    value = exchange.params[field]
    if not 1 <= len(value) <= 256 or "\0" in value:
        raise RequestInvalid(f"{field} is out of bounds", field=field, bound="1-256 characters")
    return value
