"""The RPCs of credit leases. Validate, call, translate."""

from services.chassis.clock import Clock
from services.chassis.telemetry import span
from services.ledger.domain import Draw, Lease
from services.ledger.ports import CreditLines, Prices
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import service
from tailrace.ledger.v1 import ledger_service_pb2 as pb

DRAWS_MAX = 10_000
LEASES_MAX = 10_000
"""More than a recorder can hold."""


class CreditRpcs:
    """Lend credit, call it back and take it back."""

    _credit: CreditLines
    _prices: Prices
    _clock: Clock
    _lease_life_ms: int

    async def LendCredit(self, request: pb.LendCreditRequest, _: object) -> pb.LendCreditResponse:
        service()
        lease = Lease(
            checks.uuid(request.lease_id, "lease_id"),
            checks.text(request.tenant, "tenant", 128, empty=False),
            checks.text(request.user, "user", 256, empty=False),
            checks.text(request.api_key_id, "api_key_id", 64),
        )
        with span("ledger.lend"):
            amount = await self._credit.lend(lease)
            prices = await self._prices.list_in_force(lease.tenant)
        return pb.LendCreditResponse(
            amount_nanousd=amount, life_ms=self._lease_life_ms, prices=[messages.listed_price_message(listed) for listed in prices]
        )

    async def ReturnCredit(self, request: pb.ReturnCreditRequest, _: object) -> pb.ReturnCreditResponse:
        service()
        lease_id = checks.uuid(request.lease_id, "lease_id")
        tenant, user = checks.text(request.tenant, "tenant", 128, empty=False), checks.text(request.user, "user", 256, empty=False)
        checks.between(len(request.draws), "draws", 0, DRAWS_MAX)
        draws = [_draw_value(draw) for draw in request.draws]
        with span("ledger.take_back"):
            return pb.ReturnCreditResponse(returned_nanousd=await self._credit.take_back(lease_id, tenant, user, draws))

    async def ListRecalledCredit(self, request: pb.ListRecalledCreditRequest, _: object) -> pb.ListRecalledCreditResponse:
        service()
        checks.between(len(request.lease_ids), "lease_ids", 0, LEASES_MAX)
        held = [checks.uuid(lease_id, "lease_ids") for lease_id in request.lease_ids]
        return pb.ListRecalledCreditResponse(lease_ids=map(str, await self._credit.recalled(held)))


def _draw_value(message: pb.LeaseDraw) -> Draw:
    return Draw(
        checks.uuid(message.operation_id, "draws.operation_id"),
        checks.between(message.attempt, "draws.attempt", 1, messages.ATTEMPTS_MAX),
        checks.text(message.provider, "draws.provider", 64, empty=False),
        checks.text(message.model, "draws.model", 128, empty=False),
        checks.between(message.price_version, "draws.price_version", 0, 2**31 - 1),
        checks.between(message.input_tokens_max, "draws.input_tokens_max", 0, 10_000_000),
        checks.between(message.output_tokens_max, "draws.output_tokens_max", 0, 1_000_000),
        checks.between(message.amount_nanousd, "draws.amount_nanousd", 0, checks.MONEY_MAX),
    )
