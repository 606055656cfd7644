"""The RPCs about users, plans, subscriptions and API keys. Validate, call, translate."""

from services.chassis.clock import Clock
from services.chassis.errors import NotAllowed, RequestInvalid
from services.chassis.principal import Principal, current_principal
from services.chassis.telemetry import span
from services.ledger.paging import key_of, moment_and_id, token_of
from services.ledger.ports import Keys, People
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer, admin, service
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb

MOMENTS = ("", "now", "period_end")


class PeopleRpcs:
    """Who there is, what they may do, and the keys they come with."""

    _people: People
    _keys: Keys
    _clock: Clock

    async def GetEntitlements(self, _: pb.GetEntitlementsRequest, __: object) -> pb.GetEntitlementsResponse:
        principal = current_principal()
        with span("ledger.entitlements"):
            member = await self._people.member(principal.tenant, principal.user)
        return pb.GetEntitlementsResponse(plan=messages.plan_message(member.plan))

    async def ListUsers(self, request: pb.ListUsersRequest, context: Writer) -> None:
        principal, size = admin(), checks.size(request.page_size, 100, 1000)
        after = key_of(request.page_token, 1)
        with span("ledger.users"):
            page = await self._people.page(principal.tenant, size=size, after=after[0] if after else "")
        for place, member in enumerate(page.rows, 1):
            token = token_of(page.last) if place == len(page.rows) else ""
            await context.write(pb.ListUsersResponse(user=messages.user_message(member), next_page_token=token))

    async def PutUser(self, request: pb.PutUserRequest, _: object) -> pb.PutUserResponse:
        principal, user = admin(), checks.text(request.user, "user", 256, empty=False)
        name = checks.text(request.display_name, "display_name", 256)
        with span("ledger.put_user"):
            return pb.PutUserResponse(user=messages.user_message(await self._people.put(principal.tenant, user, name)))

    async def ListPlans(self, _: pb.ListPlansRequest, context: Writer) -> None:
        with span("ledger.plans"):
            plans = await self._people.plans(current_principal().tenant)
        for plan in plans:
            await context.write(pb.ListPlansResponse(plan=messages.plan_message(plan)))

    async def PutPlan(self, request: pb.PutPlanRequest, _: object) -> pb.PutPlanResponse:
        principal, plan = admin(), messages.plan_value(request.plan)
        with span("ledger.put_plan"):
            await self._people.put_plan(principal.tenant, plan)
        return pb.PutPlanResponse(plan=messages.plan_message(plan))

    async def GetSubscription(self, request: pb.GetSubscriptionRequest, _: object) -> pb.GetSubscriptionResponse:
        principal, user = current_principal(), checks.text(request.user, "user", 256)
        with span("ledger.subscription"):
            if user in ("", principal.user):
                member = await self._people.member(principal.tenant, principal.user)
            else:
                member = await self._people.known_member(admin().tenant, user)
        return pb.GetSubscriptionResponse(subscription=messages.subscription_message(member))

    async def PutSubscription(self, request: pb.PutSubscriptionRequest, _: object) -> pb.PutSubscriptionResponse:
        principal, user = admin(), checks.text(request.user, "user", 256, empty=False)
        plan = checks.matching(request.plan, "plan", messages.PLAN_NAME, "1-64 of [a-z0-9_-]")
        at_period_end = checks.one_of(request.when, "when", MOMENTS) == "period_end"
        with span("ledger.put_subscription"):
            member = await self._people.subscribe(principal.tenant, user, plan, at_period_end=at_period_end)
        return pb.PutSubscriptionResponse(subscription=messages.subscription_message(member))

    async def DeleteSubscription(self, request: pb.DeleteSubscriptionRequest, _: object) -> pb.DeleteSubscriptionResponse:
        principal, user = admin(), checks.text(request.user, "user", 256, empty=False)
        at_period_end = checks.one_of(request.when, "when", MOMENTS) == "period_end"
        with span("ledger.delete_subscription"):
            await self._people.unsubscribe(principal.tenant, user, at_period_end=at_period_end)
        return pb.DeleteSubscriptionResponse()

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, _: object) -> pb.CreateApiKeyResponse:
        principal = admin()
        name, user = checks.text(request.name, "name", 128, empty=False), checks.text(request.user, "user", 256, empty=False)
        roles = checks.roles(request.roles, "roles") or ("service",)
        scopes = checks.scopes(request.scopes, "scopes")
        _may_grant(principal, roles, scopes)
        expires_at = checks.moment(request.expires_at, "expires_at") if request.HasField("expires_at") else None
        if expires_at is not None and expires_at <= self._clock.now():
            raise RequestInvalid("the key would have expired already", field="expires_at", bound="in the future")
        with span("ledger.create_key"):
            key, secret = await self._keys.create(principal.tenant, user, name, roles, scopes, expires_at)
        return pb.CreateApiKeyResponse(key=messages.key_message(key), secret=secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Writer) -> None:
        principal, size = admin(), checks.size(request.page_size, 1000, 1000)
        after = moment_and_id(request.page_token)
        with span("ledger.keys"):
            page = await self._keys.page(principal.tenant, size=size, after=after)
        for place, key in enumerate(page.rows, 1):
            token = token_of(page.last) if place == len(page.rows) else ""
            await context.write(pb.ListApiKeysResponse(key=messages.key_message(key), next_page_token=token))

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, _: object) -> pb.RevokeApiKeyResponse:
        principal, key_id = admin(), checks.text(request.key_id, "key_id", 64, empty=False)
        with span("ledger.revoke_key"):
            await self._keys.revoke(principal.tenant, key_id)
        return pb.RevokeApiKeyResponse()

    async def ResolveApiKey(self, request: pb.ResolveApiKeyRequest, _: object) -> pb.ResolveApiKeyResponse:
        service()
        secret = checks.text(request.secret, "secret", 256, empty=False)
        with span("ledger.resolve_key"):
            found = await self._keys.resolve(secret)
        principal = common_pb2.Principal(
            tenant=found.tenant,
            user=found.user,
            roles=sorted(found.roles),
            api_key_id=found.api_key_id,
            scopes=sorted(found.scopes),
        )
        principal.issued_at.FromDatetime(self._clock.now())
        return pb.ResolveApiKeyResponse(principal=principal)


def _may_grant(granter: Principal, roles: tuple[str, ...], scopes: tuple[str, ...]) -> None:
    """Raise NotAllowed if the key would be able to do more than its maker. `service` says what a caller is and adds nothing at the edge."""
    if lacking := set(roles) - granter.roles - {"service"}:
        role = min(lacking)
        raise NotAllowed(f"the role {role} is not yours to give", field="roles", needs=role)
    if granter.scopes and not (scopes and granter.scopes.issuperset(scopes)):
        raise NotAllowed("the scopes are wider than those of the key that makes them", field="scopes")
