"""Holds in PostgreSQL: money is set aside in one round trip, and what `holds` decides is written down. What meets goes together."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from services.chassis.clock import Clock
from services.chassis.errors import BudgetExhausted, IdempotencyConflict, NotFound, Overloaded
from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.ledger import holds
from services.ledger.domain import Reservation, Reserved
from services.ledger.holds import Hold, HoldState, Move
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.prices import ListedPrice, usd
from services.ledger.together import Together

HOLD_COLUMNS = (
    "hold_id, attempt, price_id, amount_nanousd, state, cost_nanousd, estimated,"
    " input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens"
)
RESERVE = f"SELECT * FROM reserve_hold({', '.join(f'${number}' for number in range(1, 16))})"
RESOLVE = "SELECT resolve_holds_of($1, $2, $3)"
SETTLE_AND_RESERVE = "SELECT * FROM settle_and_reserve($1, $2, $3, $4)"
PRICE_TRIES_MAX = 3
MOVE_TRIES_MAX = 3
"""A hold has at most two moves in its life."""
OWN_MAX = 4096
"""Open holds of ours that are remembered, so that moving one need not ask for it first. Any other is asked for."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Money that shall be set aside."""

    principal: Principal
    wanted: Reservation
    listed: ListedPrice

    @property
    def parts(self) -> tuple[int, int]:
        """What the prompt may cost, and what each output token may, in millionths of a nano-USD."""
        return self.listed.price.worst_case_parts(self.wanted.input_tokens_max)

    def arguments(self, at: datetime | None) -> tuple[Any, ...]:
        """As reserve_hold takes them."""
        principal, wanted = self.principal, self.wanted
        return (
            *(principal.tenant, principal.user, principal.api_key_id, wanted.operation_id, wanted.attempt),
            *(wanted.provider, wanted.model, self.listed.price_id, *self.parts),
            *(wanted.input_tokens_max, wanted.output_tokens_max, wanted.output_tokens_min),
            *(timedelta(milliseconds=wanted.ttl_ms), at),
        )

    def row(self) -> dict[str, Any]:
        """As settle_and_reserve takes it."""
        prompt, output_rate = self.parts
        return {
            "user_id": self.principal.user,
            "api_key_id": self.principal.api_key_id,
            "operation_id": str(self.wanted.operation_id),
            "attempt": self.wanted.attempt,
            "provider": self.wanted.provider,
            "model": self.wanted.model,
            "price_id": self.listed.price_id,
            "prompt": str(prompt),  # may be more than JSON's readers take for a whole number
            "output_rate": output_rate,
            "input_tokens_max": self.wanted.input_tokens_max,
            "output_tokens_max": self.wanted.output_tokens_max,
            "output_tokens_min": self.wanted.output_tokens_min,
            "ttl_ms": self.wanted.ttl_ms,
        }


class _MovedMeanwhile(Exception):
    """The hold is not any more where a move was to take it from."""


class PostgresHolds:
    """Reserve, settle, void and expire.

    `clock` decides which price and period apply and what has expired; with none, the database's own does, which all replicas share.
    """

    def __init__(self, database: Database, prices: PostgresPrices, clock: Clock | None = None) -> None:
        self._database, self._prices, self._clock = database, prices, clock
        self._own: OrderedDict[tuple[str, str, str], tuple[Hold, str]] = OrderedDict()
        """Made here and not yet moved here, with their API keys, by tenant, user and id. Somebody else may have moved them: the database
        knows."""
        self._counted: OrderedDict[tuple[str, str, str, date], None] = OrderedDict()
        """Tenants, users and API keys whose counters of the day are there: only those go together."""
        self._together = Together[tuple[str, str], _Call | Move, Any](self._do)
        """By tenant and API key, whose rows all of them lock."""

    def _now(self) -> datetime | None:
        return self._clock.now() if self._clock else None

    async def reserve(self, principal: Principal, wanted: Reservation) -> Reserved:
        for _ in range(PRICE_TRIES_MAX):
            book, began = self._prices.book, time.monotonic()
            listed = await self._prices.in_force(principal.tenant, wanted.provider, wanted.model, self._now() or datetime.now(UTC))
            row = await self._reserve(_Call(principal, wanted, listed))
            if row["outcome"] == "exhausted":
                raise _exhausted(row, wanted, listed, await self._recalled(principal, row, began))
            if row["outcome"] != "price_changed":
                return await self._reserved(principal, row, wanted)
            await self._prices.reload(book)
        raise Overloaded("the price changes faster than it can be read", retry_after_ms=1000)

    async def _reserve(self, call: _Call) -> Any:
        if not any(call.parts):  # it costs nothing, so it locks nothing and waits for nobody
            return await self._reserve_alone(call)
        principal, today = call.principal, (self._now() or datetime.now(UTC)).date()
        account = principal.tenant, principal.user, principal.api_key_id, today
        if account in self._counted:
            return await self._together.do((principal.tenant, principal.api_key_id), call)
        row = await self._reserve_alone(call)
        self._counted[account] = None
        if len(self._counted) > OWN_MAX:
            self._counted.popitem(last=False)
        return row

    async def _do(self, key: tuple[str, str], asked: Sequence[_Call | Move]) -> Sequence[Any]:
        """Moves and calls of one tenant and API key: a row for each call, or _MovedMeanwhile for a move that came too late."""
        moves, calls = [one for one in asked if isinstance(one, Move)], [one for one in asked if isinstance(one, _Call)]
        wanted = orjson.dumps([call.row() for call in calls]).decode()
        try:
            rows = iter(await self._database.self_scoped().fetch(SETTLE_AND_RESERVE, key[0], encoded(moves), wanted, self._now()))
        except asyncpg.PostgresError:  # of one of them: none was done, and the others must not suffer
            return [await self._outcome_alone(key[0], one) for one in asked]
        return [next(rows) if isinstance(one, _Call) else None for one in asked]

    async def _outcome_alone(self, tenant: str, one: _Call | Move) -> Any:
        try:
            return await self._do_alone(tenant, one)
        except Exception as error:
            return error

    async def _do_alone(self, tenant: str, one: _Call | Move) -> Any:
        if isinstance(one, _Call):
            return await self._reserve_alone(one)
        try:
            return await self._database.self_scoped().value(RESOLVE, tenant, encoded([one]), self._now())
        except asyncpg.RestrictViolationError as error:
            raise _MovedMeanwhile from error

    async def _reserve_alone(self, call: _Call) -> Any:
        return await self._database.self_scoped().row(RESERVE, *call.arguments(self._now()))

    async def _recalled(self, principal: Principal, row: Any, began: float) -> int:
        """Call back what is lent of the budget that refused; return how much that is, with what came back since `began`."""
        recalled: int = await self._database.self_scoped().value(
            "SELECT recall_credit($1, $2, $3, $4, $5, $6)",
            *(principal.tenant, principal.user, principal.api_key_id, "user" if row["scope"] == "plan" else row["scope"]),
            *(timedelta(seconds=time.monotonic() - began), self._now()),
        )
        return recalled

    async def _reserved(self, principal: Principal, row: Any, wanted: Reservation) -> Reserved:
        if row["outcome"] == "conflict":
            key = f"{wanted.operation_id}/{wanted.attempt}"
            raise IdempotencyConflict("this attempt was reserved for another call", key=key)
        # A hold that was there before may have been made with a version that came into force since the book was read.
        listed = self._prices.book.version(row["price_id"]) or (await self._prices.reload()).version(row["price_id"])
        assert listed is not None
        hold = Hold(str(row["hold_id"]), row["amount_nanousd"], listed.price, HoldState(row["state"]))
        if hold.state is not HoldState.RESERVED:
            raise holds.refusal(hold)
        self._own[principal.tenant, principal.user, hold.hold_id] = hold, principal.api_key_id
        if len(self._own) > OWN_MAX:
            self._own.popitem(last=False)
        return Reserved(hold.hold_id, hold.amount_nanousd, listed, row["expires_at"], row["output_tokens_max"])

    async def settle(self, principal: Principal, hold_id: UUID, usage: Usage, *, estimated: bool) -> Hold:
        return await self._moved(principal, hold_id, lambda hold: holds.settle(hold, usage, estimated=estimated))

    async def void(self, principal: Principal, hold_id: UUID) -> int:
        return (await self._moved(principal, hold_id, holds.void)).amount_nanousd

    async def _moved(self, principal: Principal, hold_id: UUID, decide: Callable[[Hold], Move | None]) -> Hold:
        """The hold after what `decide` says of it, in one round trip if it is of our own making, else in two.

        It is not locked meanwhile: the database refuses a move from where a hold is not any more, and then it is decided anew.
        """
        if (own := self._own.pop((principal.tenant, principal.user, str(hold_id)), None)) is not None:
            hold, api_key_id = own
            if (move := decide(hold)) is None:
                return hold
            with contextlib.suppress(_MovedMeanwhile):
                await self._together.do((principal.tenant, api_key_id), move)
                return move.hold

        async def work(connection: Connection) -> Hold:
            for _ in range(MOVE_TRIES_MAX):
                hold = await self._found(connection, principal, hold_id)
                if (move := decide(hold)) is None:
                    return hold
                with contextlib.suppress(asyncpg.RestrictViolationError):
                    await connection.execute(RESOLVE, principal.tenant, encoded([move]), self._now())
                    return move.hold
            raise Overloaded("the hold is being moved by others", retry_after_ms=200)

        return await self._database.self_scoped().run(work)

    async def _found(self, connection: Connection, principal: Principal, hold_id: UUID) -> Hold:
        found = (principal.tenant, principal.user, "admin" in principal.roles, hold_id)
        row = await connection.fetchrow(f"SELECT {HOLD_COLUMNS} FROM find_hold($1, $2, $3, $4)", *found)
        if row is None:
            raise NotFound("no such hold", kind="hold")
        return await self.hold_of(row, connection)

    async def expire_one(self, grace_ms: int) -> str | None:

        async def work(connection: Connection) -> str | None:
            async with connection.transaction():
                row = await connection.fetchrow(
                    f"SELECT {HOLD_COLUMNS} FROM holds WHERE state = 'reserved'"
                    " AND expires_at <= coalesce($1, clock_timestamp()) - $2::interval"
                    " ORDER BY expires_at LIMIT 1 FOR UPDATE SKIP LOCKED",
                    self._now(),
                    timedelta(milliseconds=grace_ms),
                )
                if row is None:
                    return None
                hold = await self.hold_of(row, connection)
                await resolve(connection, [holds.expire(hold)], self._now())
                return hold.hold_id

        return await self._database.run(work)

    async def hold_of(self, row: Any, connection: Connection) -> Hold:
        """A row of HOLD_COLUMNS as the state machine's value."""
        listed = await self._prices.version(row["price_id"], connection)
        return Hold(
            str(row["hold_id"]),
            row["amount_nanousd"],
            listed.price,
            HoldState(row["state"]),
            usage_of(row),
            row["cost_nanousd"],
            row["estimated"],
        )


def _exhausted(row: Any, wanted: Reservation, listed: ListedPrice, lent_nanousd: int) -> BudgetExhausted:
    """The refusal. What is lent is on its way back: with it the same call may be admitted soon."""
    least = wanted.output_tokens_min or wanted.output_tokens_max
    needed = listed.price.worst_case_nanousd(wanted.input_tokens_max, least)
    left, until = usd(max(row["left_nanousd"], 0)), row["resets_at"]
    return BudgetExhausted(
        f"the {row['scope']}'s budget has {left} USD left until {until:%Y-%m-%d %H:%M} UTC, and the call may cost {usd(needed)} USD",
        needed_nanousd=needed,
        left_nanousd=row["left_nanousd"],
        lent_nanousd=lent_nanousd,
        scope=row["scope"],
        resets_at=row["resets_at"].isoformat(),
    )


async def resolve(connection: Connection, moves: Sequence[Move], at: datetime | None) -> None:
    """Write moves down, inside the transaction that has locked their holds."""
    await connection.execute("SELECT resolve_holds($1, $2)", encoded(moves), at)


def encoded(moves: Sequence[Move]) -> str:
    """Moves as resolve_holds reads them."""
    rows = [
        {
            "hold_id": move.hold.hold_id,
            "state": move.hold.state.value,
            "kind": move.kind,
            "held": move.held_nanousd,
            "spent": move.spent_nanousd,
            "cost_nanousd": move.hold.cost_nanousd,
            "estimated": move.hold.estimated,
            **usage_columns(move.hold.usage),
        }
        for move in moves
    ]
    return orjson.dumps(rows).decode()


def usage_columns(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cache_read_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "cache_write_1h_tokens": usage.cache_write_1h_tokens,
    }


def usage_of(row: Any) -> Usage:
    return Usage(
        row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["cache_write_tokens"], row["cache_write_1h_tokens"]
    )
