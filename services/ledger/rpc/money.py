"""The RPCs that move or price money: holds, budgets, prices. Validate, call, translate."""

from services.chassis.errors import NotFound
from services.chassis.principal import Principal, current_principal
from services.chassis.telemetry import span
from services.chassis.wire import timestamp
from services.ledger.domain import Reservation
from services.ledger.ports import Budgets, HoldBook, Prices
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer, admin
from tailrace.ledger.v1 import ledger_service_pb2 as pb

SCOPES = ("tenant", "user", "key")
PERIODS = ("day", "month")


class MoneyRpcs:
    """Reserve, settle, void; budgets; prices."""

    _holds: HoldBook
    _budgets: Budgets
    _prices: Prices

    async def Reserve(self, request: pb.ReserveRequest, _: object) -> pb.ReserveResponse:
        principal = current_principal()
        wanted = Reservation(
            checks.uuid(request.operation_id, "operation_id"),
            checks.between(request.attempt, "attempt", 1, messages.ATTEMPTS_MAX),
            checks.text(request.provider, "provider", 64, empty=False),
            checks.text(request.model, "model", 128, empty=False),
            checks.between(request.input_tokens_max, "input_tokens_max", 1, 10_000_000),
            checks.between(request.output_tokens_max, "output_tokens_max", 1, 1_000_000),
            checks.between(request.ttl_ms, "ttl_ms", 1_000, 3_600_000),
            checks.between(request.output_tokens_min, "output_tokens_min", 0, request.output_tokens_max),
        )
        with span("ledger.reserve"):
            reserved = await self._holds.reserve(principal, wanted)
        return pb.ReserveResponse(
            hold_id=reserved.hold_id,
            amount_nanousd=reserved.amount_nanousd,
            price=messages.listed_price_message(reserved.price),
            expires_at=timestamp(reserved.expires_at),
            output_tokens_max=reserved.output_tokens_max,
        )

    async def Settle(self, request: pb.SettleRequest, _: object) -> pb.SettleResponse:
        hold_id, usage = checks.known_uuid(request.hold_id, "hold"), checks.usage(request.usage, "usage")
        with span("ledger.settle"):
            hold = await self._holds.settle(current_principal(), hold_id, usage, estimated=request.estimated)
        return pb.SettleResponse(cost_nanousd=hold.cost_nanousd, overage_nanousd=hold.overage_nanousd)

    async def Void(self, request: pb.VoidRequest, _: object) -> pb.VoidResponse:
        hold_id = checks.known_uuid(request.hold_id, "hold")
        with span("ledger.void"):
            return pb.VoidResponse(released_nanousd=await self._holds.void(current_principal(), hold_id))

    async def GetBudgets(self, request: pb.GetBudgetsRequest, _: object) -> pb.GetBudgetsResponse:
        principal = admin()
        scope, subject = _subject(principal, request.scope, request.subject)
        with span("ledger.budgets"):
            budgets = await self._budgets.of(principal.tenant, scope, subject)
        return pb.GetBudgetsResponse(budgets=[messages.budget_message(budget) for budget in budgets])

    async def PutBudget(self, request: pb.PutBudgetRequest, _: object) -> pb.PutBudgetResponse:
        principal = admin()
        scope, subject = _subject(principal, request.scope, request.subject)
        period = checks.one_of(request.period, "period", PERIODS)
        limit = checks.between(request.limit_nanousd, "limit_nanousd", 0, checks.MONEY_MAX)
        with span("ledger.put_budget"):
            budget = await self._budgets.put(principal.tenant, scope, subject, period, limit)
        return pb.PutBudgetResponse(budget=messages.budget_message(budget))

    async def DeleteBudget(self, request: pb.DeleteBudgetRequest, _: object) -> pb.DeleteBudgetResponse:
        principal = admin()
        scope, subject = _subject(principal, request.scope, request.subject)
        period = checks.one_of(request.period, "period", ("", *PERIODS))
        with span("ledger.delete_budget"):
            await self._budgets.delete(principal.tenant, scope, subject, period)
        return pb.DeleteBudgetResponse()

    async def ListPrices(self, _: pb.ListPricesRequest, context: Writer) -> None:
        with span("ledger.prices"):
            prices = await self._prices.list_in_force(current_principal().tenant)
        for listed in prices:
            await context.write(pb.ListPricesResponse(price=messages.listed_price_message(listed)))

    async def PutPrice(self, request: pb.PutPriceRequest, _: object) -> pb.PutPriceResponse:
        principal = admin()
        price, valid_from = messages.price_and_day(request.price)
        with span("ledger.put_price"):
            listed = await self._prices.put(principal.tenant, price, valid_from)
        return pb.PutPriceResponse(price=messages.listed_price_message(listed))


def _subject(principal: Principal, scope: str, subject: str) -> tuple[str, str]:
    """Whose budget. A tenant's own name is the only one it may say."""
    checks.one_of(scope, "scope", SCOPES)
    if scope == "tenant":
        if subject not in ("", principal.tenant):
            raise NotFound("no such tenant", kind="tenant")
        return scope, principal.tenant
    return scope, checks.text(subject, "subject", 256, empty=False)
