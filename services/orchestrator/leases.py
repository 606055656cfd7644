"""Credit leases of this replica: slices of budgets, lent in advance for who is active here, and drawn on while the ledger is out of reach.

Drawing is arithmetic in memory. A lease was debited at the ledger before, so whatever is drawn within it cannot overspend, and whatever
dies, what was lent comes back or is booked. Nothing here knows a wire format.
"""

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from uuid import uuid4

import structlog

from services.chassis.errors import BudgetExhausted, DomainError, HoldAlreadyExpired, NotFound
from services.chassis.money import Price
from services.chassis.principal import Principal
from services.orchestrator.domain import Attempt, Candidate, Draw, Hold, Payer
from services.orchestrator.ports import CreditLine

log = structlog.get_logger(__name__)

ROUND_S = 1.0
"""How often leases are looked at, and the ledger is asked which are wanted back; a user who has none is served at once."""
RETRY_S = 1.0
"""How soon a ledger that was away is asked again: what was drawn meanwhile should become known to it quickly."""
PROLONGED_AT = 0.75
"""Share of its life that a lease may have left when it is prolonged, so that an outage finds most of it ahead."""
IDLE_S = 300.0
"""A user who asked nothing for so long needs no lease."""
SHY_S = 60.0
"""How long a user whose budget was found exhausted is lent nothing: what little is left is theirs to reserve."""
DRAWS_MAX = 10_000
"""Calls on one lease; the ledger takes no more at once."""


@dataclass(slots=True)
class Lease:
    """What was lent to one payer, and what became of it."""

    lease_id: str
    payer: Payer
    credit_nanousd: int
    prices: Mapping[tuple[str, str], Price]
    """By provider and model."""
    life_s: float
    ends_at: float
    drawn_nanousd: int = 0
    """Worst case of the calls that run and cost of those that ended."""
    draws: dict[tuple[str, int], Draw] = field(default_factory=dict)
    """Calls that the ledger has not acknowledged yet, by operation and attempt."""
    used: bool = False

    def draw(self, call: Draw, now: float) -> bool:
        """Take the worst case of a call out of the lease; return whether it was in it. The same call again is the same draw."""
        if (call.operation_id, call.attempt) in self.draws:
            return True
        if now >= self.ends_at or len(self.draws) >= DRAWS_MAX or self.drawn_nanousd + call.amount_nanousd > self.credit_nanousd:
            return False
        self.draws[call.operation_id, call.attempt] = call
        self.drawn_nanousd += call.amount_nanousd
        self.used = True
        return True


class Leases:
    """The leases of at most `leases_max` payers, the latest first; with 0 there are none and nothing is ever drawn."""

    def __init__(self, line: CreditLine, leases_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._line, self._leases_max, self._clock = line, leases_max, clock
        self._seen: OrderedDict[Payer, float] = OrderedDict()
        self._current: dict[Payer, Lease] = {}
        self._leaving: dict[str, Lease] = {}
        """Not drawn on any more, and not known to have ended at the ledger."""
        self._shy: dict[Payer, float] = {}
        self._surrenders: dict[Payer, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def noted(self, principal: Principal) -> None:
        """The ledger has just set money aside for `principal`: they are active here."""
        if not self._leases_max:
            return
        payer = Payer.of(principal)
        self._seen[payer] = self._clock()
        self._seen.move_to_end(payer)
        if len(self._seen) > self._leases_max:
            self._retire(self._seen.popitem(last=False)[0])
        if payer not in self._current and payer not in self._shy:
            self._wake.set()

    def covers(self, principal: Principal) -> bool:
        """Whether there is a lease to draw on."""
        lease = self._current.get(Payer.of(principal))
        return lease is not None and self._clock() < lease.ends_at

    def draw(
        self, principal: Principal, operation_id: str, attempt: int, candidate: Candidate, input_tokens_max: int, output_tokens_max: int
    ) -> Hold | None:
        """Set the worst case of a call aside here. None without a lease that can pay it, or without the model's price."""
        lease = self._current.get(Payer.of(principal))
        price = lease.prices.get((candidate.provider, candidate.model)) if lease is not None else None
        if lease is None or price is None:
            return None
        amount = price.worst_case_nanousd(input_tokens_max, output_tokens_max)
        of_model = (candidate.provider, candidate.model, price.version)
        if not lease.draw(Draw(operation_id, attempt, *of_model, input_tokens_max, output_tokens_max, amount), self._clock()):
            return None
        return Hold("", amount, price, output_tokens_max, lease.lease_id)

    def ended(self, operation_id: str, attempt: Attempt) -> None:
        """A call is over: what it did not cost may be drawn again."""
        lease = self._lease(attempt.lease_id)
        key = (operation_id, attempt.attempt)
        if lease is not None and (call := lease.draws.get(key)) is not None:
            lease.drawn_nanousd += attempt.cost_nanousd - call.amount_nanousd
            if attempt.not_sent:
                del lease.draws[key]

    def recorded(self, operation_id: str, attempts: Iterable[Attempt], booked: "asyncio.Future[None]") -> None:
        """The calls' record is on its way: once it is `booked`, the ledger need not be told of them at the end of their lease."""
        drawn = [attempt for attempt in attempts if attempt.lease_id]

        def forget(_: object) -> None:
            for attempt in drawn:
                if (lease := self._lease(attempt.lease_id)) is not None:
                    lease.draws.pop((operation_id, attempt.attempt), None)

        if drawn:
            booked.add_done_callback(forget)

    async def surrender(self, principal: Principal, since: float) -> bool:
        """Give the lease of an exhausted budget back; return whether any was, after `since`: then it is worth asking again."""
        payer = Payer.of(principal)
        task = self._surrenders.get(payer)
        if payer in self._current:
            self._shy[payer] = self._clock() + SHY_S
            task = self._surrenders[payer] = asyncio.create_task(self._given_back(payer), name="surrender")
        if task is None or (self._shy.get(payer, 0.0) - SHY_S < since and task.done()):
            return False
        await asyncio.shield(task)
        return True

    async def _given_back(self, payer: Payer) -> None:
        lease = self._retire(payer)
        if lease is not None:
            with contextlib.suppress(DomainError):  # it stays with those that leave, and is tried again
                await self._end(lease)
        self._shy[payer] = self._clock() + SHY_S

    async def live_forever(self) -> None:
        """Lend, prolong and give back as needed. While the ledger is away it is asked again and again; what is lent lasts meanwhile."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._round()
            except DomainError as error:
                log.warning("leases_put_off", reason=error.reason, leases=len(self._current), leaving=len(self._leaving))
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1))  # noqa: S311 - jitter, not a secret
                self._wake.set()
            except Exception as error:
                log.exception("leases_failed", error=type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def give_back(self, timeout_s: float) -> int:
        """End every lease, within `timeout_s`; return how many are left to expire by themselves. None is lent from now on."""
        self._closed = True
        for payer in list(self._current):
            self._retire(payer)
        with contextlib.suppress(TimeoutError, DomainError):
            async with asyncio.timeout(timeout_s):
                for lease in list(self._leaving.values()):
                    await self._end(lease)
        return len(self._leaving)

    async def _round(self) -> None:
        now = self._clock()
        for payer in [payer for payer, seen_at in self._seen.items() if now - seen_at > IDLE_S]:
            del self._seen[payer]
            self._retire(payer)
        for payer in [payer for payer, until in self._shy.items() if until <= now]:
            del self._shy[payer]
            self._surrenders.pop(payer, None)
        await self._heed_recalls()
        for lease in list(self._leaving.values()):
            await self._end(lease)
        for payer in list(self._seen):
            if self._closed:
                return
            await self._attend(payer)

    async def _heed_recalls(self) -> None:
        """Take out of service what somebody else was turned away for, and ask for nothing in its place for a while."""
        held = {lease.lease_id: payer for payer, lease in self._current.items()}
        if not held:
            return
        for lease_id in await self._line.recalled(list(held)):
            self._retire(held[lease_id])
            self._shy[held[lease_id]] = self._clock() + SHY_S

    async def _attend(self, payer: Payer) -> None:
        lease, now = self._current.get(payer), self._clock()
        if lease is None:
            if payer not in self._shy:
                await self._lend(payer)
        elif lease.used or lease.ends_at <= now:
            # The new one first: a ledger that goes away in between finds nobody without.
            await self._lend(payer)
            await self._end(lease)
        elif lease.ends_at - now < lease.life_s * PROLONGED_AT:
            await self._prolong(lease)

    async def _lend(self, payer: Payer) -> None:
        """Take a lease in the place of a former one, which leaves."""
        lease_id, began = str(uuid4()), self._clock()
        # Until the answer is here nobody knows whether the ledger has lent: then there is something to give back.
        self._leaving[lease_id] = Lease(lease_id, payer, 0, {}, 0.0, began)
        try:
            lent = await self._line.lend(lease_id, payer)
        except BudgetExhausted:
            del self._leaving[lease_id]
            self._retire(payer)
            self._shy[payer] = self._clock() + SHY_S
            return
        self._retire(payer)
        if payer not in self._shy and payer in self._seen and not self._closed:
            del self._leaving[lease_id]
            self._current[payer] = Lease(lease_id, payer, lent.amount_nanousd, lent.prices, lent.life_s, began + lent.life_s)

    async def _prolong(self, lease: Lease) -> None:
        began = self._clock()
        try:
            lent = await self._line.lend(lease.lease_id, lease.payer)
        except HoldAlreadyExpired:
            await self._lend(lease.payer)
            return
        lease.prices, lease.ends_at = lent.prices, began + lent.life_s

    def _retire(self, payer: Payer) -> Lease | None:
        """Take the payer's lease out of service; it is ended at the next chance."""
        lease = self._current.pop(payer, None)
        if lease is not None:
            self._leaving[lease.lease_id] = lease
            self._wake.set()
        return lease

    async def _end(self, lease: Lease) -> None:
        """Tell the ledger that a lease has ended, with the calls on it that it may not know."""
        try:
            await self._line.take_back(lease.lease_id, lease.payer, tuple(lease.draws.values()))
        except NotFound:
            pass  # it never was
        except DomainError as error:
            if error.retryable:
                raise
            log.error("lease_not_taken_back", lease_id=lease.lease_id, reason=error.reason)  # it expires by itself
        self._leaving.pop(lease.lease_id, None)

    def _lease(self, lease_id: str) -> Lease | None:
        if lease_id in self._leaving:
            return self._leaving[lease_id]
        return next((lease for lease in self._current.values() if lease.lease_id == lease_id), None) if lease_id else None
