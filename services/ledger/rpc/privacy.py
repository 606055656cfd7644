"""The RPCs about what is kept of one person: everything, or nothing any more. Validate, call, translate."""

from collections.abc import AsyncIterator
from uuid import UUID

from services.chassis.principal import Principal
from services.chassis.telemetry import span
from services.ledger.ports import Budgets, Conversations, Keys, OperationBook, People, Privacy
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer, admin
from services.ledger.rpc.conversations import session_summary
from tailrace.ledger.v1 import ledger_service_pb2 as pb

PAGE = 100
"""Rows read at once; a reader that is slow holds no more than these."""


class PrivacyRpcs:
    """Export and erase one user."""

    _privacy: Privacy
    _people: People
    _budgets: Budgets
    _keys: Keys
    _operations: OperationBook
    _conversations: Conversations

    async def EraseUser(self, request: pb.EraseUserRequest, _: object) -> pb.EraseUserResponse:
        principal, user = admin(), checks.text(request.user, "user", 256, empty=False)
        with span("ledger.erase_user"):
            return pb.EraseUserResponse(erased=await self._privacy.erase(principal.tenant, user))

    async def ExportUser(self, request: pb.ExportUserRequest, context: Writer) -> None:
        principal, user = admin(), checks.text(request.user, "user", 256, empty=False)
        with span("ledger.export_user"):
            member = await self._people.known_member(principal.tenant, user)
        await context.write(pb.ExportUserResponse(user=messages.user_message(member)))
        for plan, started_at, ended_at in await self._privacy.subscriptions(principal.tenant, user):
            await context.write(pb.ExportUserResponse(subscription=messages.past_subscription_message(user, plan, started_at, ended_at)))
        owner = Principal(principal.tenant, user)
        async for response in self._budgets_of(owner.tenant, "user", user):
            await context.write(response)
        async for response in self._keys_of(owner):
            await context.write(response)
        async for response in self._conversations_of(owner):
            await context.write(response)
        async for response in self._operations_of(owner):
            await context.write(response)

    async def _budgets_of(self, tenant: str, scope: str, subject: str) -> AsyncIterator[pb.ExportUserResponse]:
        for budget in await self._budgets.of(tenant, scope, subject):
            yield pb.ExportUserResponse(budget=messages.budget_message(budget))

    async def _keys_of(self, owner: Principal) -> AsyncIterator[pb.ExportUserResponse]:
        """Each key, with its budgets."""
        after = None
        while True:
            page = await self._keys.page(owner.tenant, size=PAGE, after=after)
            for key in page.rows:
                if key.user == owner.user:
                    yield pb.ExportUserResponse(api_key=messages.key_message(key))
                    async for budget in self._budgets_of(owner.tenant, "key", key.key_id):
                        yield budget
            if page.last is None:
                return
            after = page.rows[-1].created_at, page.rows[-1].key_id

    async def _conversations_of(self, owner: Principal) -> AsyncIterator[pb.ExportUserResponse]:
        """Each conversation, then all turns in the order of conversation and position, then the summaries."""
        after = None
        while True:
            page = await self._conversations.page(owner, size=PAGE, after=after)
            for session in page.rows:
                yield pb.ExportUserResponse(session=messages.session_message(session))
            if page.last is None:
                break
            after = page.rows[-1].updated_at, page.rows[-1].session_id
        place = ("", 0)
        while batch := await self._privacy.turns(owner.tenant, owner.user, place, PAGE):
            for session_id, _, turn in batch:
                yield pb.ExportUserResponse(turn=pb.SessionTurn(session_id=session_id, turn=messages.turn_message(turn)))
            place = batch[-1][0], batch[-1][1]
        place = ("", 0)
        while found := await self._privacy.summaries(owner.tenant, owner.user, place, PAGE):
            for session_id, _, summary in found:
                yield pb.ExportUserResponse(summary=session_summary(session_id, summary))
            place = found[-1][0], found[-1][1]

    async def _operations_of(self, owner: Principal) -> AsyncIterator[pb.ExportUserResponse]:
        after = None
        while True:
            page = await self._operations.page(owner, size=PAGE, after=after)
            for operation in page.rows:
                yield pb.ExportUserResponse(operation=messages.operation_message(operation))
            if page.last is None:
                break
            after = page.rows[-1].created_at, UUID(page.rows[-1].operation_id)
