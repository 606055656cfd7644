"""Operations in PostgreSQL: booking what happened, once, and showing it again. Aggregates are in `postgres_usage`."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import orjson

from services.chassis.clock import Clock
from services.chassis.errors import DomainError, IdempotencyConflict, NotFound, PriceUnknown, RequestInvalid
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal
from services.ledger import holds, savings
from services.ledger.domain import Attempt, CacheFacts, Operation, Recorded, Step
from services.ledger.holds import NO_USAGE, Hold, Move
from services.ledger.paging import Page
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_holds import HOLD_COLUMNS, PostgresHolds, encoded, usage_columns, usage_of
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.prices import ListedPrice
from services.ledger.roller import months_kept_since

RECORDING_MAX = 4
"""Batches that are booked side by side. The others wait here, where they leave connections to those whose first token waits."""
FUTURE_MAX = timedelta(hours=1)
"""A recorder's clock may be so far ahead of ours; more is a mistake that would hide the row at the top of every list."""

_OPERATION = (
    "o.tenant, o.operation_id, o.user_id, o.session_id, o.api_key_id, o.trace_id, o.status, o.tier, o.model, o.provider, o.collection,"
    " o.finish_reason, o.error_reason, o.input_tokens, o.output_tokens, o.cache_read_tokens, o.cache_write_tokens, o.cache_write_1h_tokens,"
    " o.cost_nanousd, o.estimated, o.cache_verdict, o.cache_similarity, o.cache_source_id, o.cache_age_s, o.cache_saved_nanousd,"
    " o.cache_reason, o.created_at, o.recorded_at, o.first_token_ms, o.duration_ms, coalesce(o.purpose, '') AS purpose,"
    " (SELECT jsonb_agg(to_jsonb(a) ORDER BY a.attempt) FROM attempts a"
    "  WHERE a.tenant = o.tenant AND a.operation_id = o.operation_id AND a.created_at = o.created_at) AS attempts,"
    " (SELECT jsonb_agg(to_jsonb(s) ORDER BY s.ordinal) FROM steps s"
    "  WHERE s.tenant = o.tenant AND s.operation_id = o.operation_id AND s.created_at = o.created_at) AS steps"
)
# An id says in which month its operation lies, and only that month is looked in.
_THE_OPERATION = (
    "o.tenant = $1 AND o.operation_id = $2"
    " AND o.created_at = (SELECT k.created_at FROM operation_ids k WHERE k.tenant = $1 AND k.operation_id = $2)"
)

_HOLD = f"{HOLD_COLUMNS}, operation_id"
HoldsByCall = dict[str, dict[int, Hold]]
"""By operation, then by attempt."""
Baseline = tuple[str, str]
"""Provider and model that tiers are compared with."""
_ERASED = "TR410"
"""What the schema's refuse_erased says."""
_HOLD_THERE = "TR409"
"""What the schema's book_late says."""
STEP_COLUMNS = 7
BOOK = f"SELECT book_records({', '.join(f'${number}' for number in range(1, 5 + STEP_COLUMNS))})"


class _Erased(Exception):
    """The user of an operation was erased after it was accepted; nothing was booked."""


class _HoldsMeanwhile(Exception):
    """A call that had no hold when it was looked for has one now; nothing was booked."""

    def __init__(self, late: int) -> None:
        super().__init__(late)
        self.late = late
        """How many calls had none."""


class PostgresOperations:
    """Records and shows operations."""

    def __init__(
        self,
        database: Database,
        held: PostgresHolds,
        prices: PostgresPrices,
        clock: Clock,
        *,
        baseline: Baseline | None = None,
        retention_days: int = 0,
    ) -> None:
        self._database, self._held, self._prices, self._clock = database, held, prices, clock
        self._baseline, self._retention_days = baseline, retention_days
        self._recording = asyncio.Semaphore(RECORDING_MAX)

    async def record(self, operation: Operation) -> Recorded:
        self._check(operation)
        queries = self._database.of(operation.tenant)
        try:
            return (await queries.run(lambda connection: self._record(connection, [operation])))[0]
        except _Erased:
            return (await queries.run(lambda connection: self._record(connection, [_nameless(operation)])))[0]

    async def record_all(self, operations: Sequence[Operation]) -> list[Recorded | DomainError]:
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, operation in enumerate(operations):
            places[operation.tenant].append(place)
        outcomes: dict[int, Recorded | DomainError] = {}

        async def of_one_tenant(own: list[int]) -> None:
            own.sort(key=lambda place: operations[place].operation_id)  # whoever sends the same ones locks them in the same order
            async with self._recording:
                outcomes.update(zip(own, await self._record_together([operations[place] for place in own]), strict=True))

        # Side by side: what one tenant's transaction waits for keeps no other one's waiting.
        ends = await asyncio.gather(*map(of_one_tenant, places.values()), return_exceptions=True)
        for failure in ends:
            if failure is not None:
                raise failure
        return [outcomes[place] for place in range(len(operations))]

    async def _record_together(self, operations: Sequence[Operation]) -> Sequence[Recorded | DomainError]:
        """Book operations of one tenant in one transaction, or, if one is wrong or came before, each in its own."""
        if len({operation.operation_id for operation in operations}) < len(operations):
            return [await self._alone(operation) for operation in operations]
        try:
            for operation in operations:
                self._check(operation)
            return await self._database.of(operations[0].tenant).run(lambda connection: self._record(connection, operations))
        except _Erased:
            pass
        except DomainError as error:
            if error.retryable:
                raise
        return [await self._alone(operation) for operation in operations]

    async def _alone(self, operation: Operation) -> Recorded | DomainError:
        try:
            return await self.record(operation)
        except DomainError as error:
            if error.retryable:
                raise
            return error

    def _check(self, operation: Operation) -> None:
        if operation.created_at > self._clock.now() + FUTURE_MAX:
            raise RequestInvalid("the operation lies in the future", field="operation.created_at")

    async def _record(self, connection: Connection, operations: Sequence[Operation]) -> list[Recorded]:
        """Book operations in one transaction. Of many, none may be known: that is told by IdempotencyConflict and undoes all of them.

        Raises _Erased.
        """
        late_before: int | None = None
        while True:
            try:
                return await self._book(connection, operations)
            except _HoldsMeanwhile as met:
                # A hold that somebody else has made in the meantime is found the next time, unless it is another user's.
                if late_before is not None and met.late >= late_before:
                    raise IdempotencyConflict("the operation belongs to another user", key=operations[0].operation_id) from None
                late_before = met.late

    async def _book(self, connection: Connection, operations: Sequence[Operation]) -> list[Recorded]:
        async with connection.transaction():
            known = await self._known_holds(connection, operations)
            booked, moves, late = list[Operation](), list[Move](), list[dict[str, Any]]()
            for operation in operations:
                baseline = await self._baseline_price(operation, connection)
                own = known.get(operation.operation_id, {})
                prices = {
                    attempt.attempt: await self._price_told(operation, attempt, connection)
                    for attempt in operation.attempts
                    if attempt.attempt not in own
                }
                attempts, own_moves, own_late = _resolved(operation, own, prices, baseline)
                moves += own_moves
                late += own_late
                booked.append(
                    replace(
                        operation,
                        attempts=attempts,
                        usage=sum((attempt.usage for attempt in attempts), Usage()),
                        cost_nanousd=sum(attempt.cost_nanousd for attempt in attempts),
                        estimated=operation.estimated or any(attempt.estimated for attempt in attempts),
                    )
                )
                if not own_moves and not own_late and self._purged(operation):
                    if len(operations) > 1:
                        raise IdempotencyConflict("the operation was recorded before", key=operation.operation_id)
                    return [Recorded(booked[-1].cost_nanousd, duplicate=True)]
            late_rows = orjson.dumps(late).decode()
            try:
                all_new = await connection.fetchval(BOOK, *_rows(booked), encoded(moves), late_rows, *_columns_of_steps(booked))
            except asyncpg.PostgresError as error:
                if error.sqlstate == _ERASED:
                    raise _Erased from None
                if error.sqlstate == _HOLD_THERE:
                    raise _HoldsMeanwhile(len(late)) from None
                raise
            if all_new:
                return [Recorded(operation.cost_nanousd, duplicate=False) for operation in booked]
            if moves or late or len(booked) > 1:
                # The very same record would have found all its holds resolved; the error undoes what was done here.
                raise IdempotencyConflict("the operation was recorded with other attempts", key=booked[0].operation_id)
            return [await self._duplicate(connection, booked[0])]

    def _purged(self, operation: Operation) -> bool:
        """Whether the operation is of a month that is dropped. Then only its holds still know that it was recorded before."""
        return bool(self._retention_days) and operation.created_at < months_kept_since(self._clock.now(), self._retention_days)

    async def _baseline_price(self, operation: Operation, connection: Connection) -> Price | None:
        """What the operation's tier is compared with; None without a tier, or a price at that time."""
        if self._baseline and operation.tier and operation.attempts:
            with contextlib.suppress(PriceUnknown):
                return (await self._prices.in_force(operation.tenant, *self._baseline, operation.created_at, connection)).price
        return None

    async def _duplicate(self, connection: Connection, booked: Operation) -> Recorded:
        """What stands for a record that came before. Raises IdempotencyConflict unless that said the same."""
        known = await recorded(connection, booked.tenant, UUID(booked.operation_id))
        if known is None:  # its month is dropped, and its id is still there
            return Recorded(booked.cost_nanousd, duplicate=True)
        if known[0].user != booked.user:
            raise IdempotencyConflict("the operation was recorded for another user", key=booked.operation_id)
        told = tuple(replace(attempt, prompt_cache_saved_nanousd=0, tiering_saved_nanousd=0) for attempt in booked.attempts)
        session_id = known[0].session_id and booked.session_id  # its conversation may be deleted since
        if known[0] != replace(booked, attempts=told, session_id=session_id):
            raise IdempotencyConflict("the operation was recorded with another content", key=booked.operation_id)
        return Recorded(booked.cost_nanousd, duplicate=True)

    async def _known_holds(self, connection: Connection, operations: Sequence[Operation]) -> HoldsByCall:
        """The holds there are of operations of one tenant, by attempt, locked."""
        calling = [operation for operation in operations if operation.attempts]
        if not calling:
            return {}
        rows = await connection.fetch(
            f"SELECT {_HOLD} FROM holds_of($1, $2, $3)",
            calling[0].tenant,
            [UUID(operation.operation_id) for operation in calling],
            [operation.user for operation in calling],
        )
        found: HoldsByCall = {}
        for row in rows:
            found.setdefault(str(row["operation_id"]), {})[row["attempt"]] = await self._held.hold_of(row, connection)
        return found

    async def _price_told(self, operation: Operation, attempt: Attempt, connection: Connection) -> ListedPrice:
        """What a call that has no hold was counted with, or costs."""
        named = (operation.tenant, attempt.provider, attempt.model, attempt.price_version)
        return await self._prices.told(*named, operation.created_at, connection)

    async def get(self, principal: Principal, operation_id: UUID) -> Operation:
        row = await self._database.of(principal.tenant).row(
            f"SELECT {_OPERATION} FROM operations o WHERE {_THE_OPERATION} AND (o.user_id = $3 OR $4)",
            *(principal.tenant, operation_id, principal.user, "admin" in principal.roles),
        )
        if row is None:
            raise NotFound("no such operation", kind="operation")
        return operation_of(row)

    async def page(
        self, principal: Principal, *, size: int, after: tuple[datetime, UUID] | None, session_id: str = "", user: str = ""
    ) -> Page[Operation]:
        conditions, arguments = ["o.tenant = $1"], [principal.tenant, size + 1]
        if "admin" not in principal.roles:
            arguments.append(principal.user)
            conditions.append(f"o.user_id = ${len(arguments)}")
        for column, wanted in (("session_id", session_id), ("user_id", user)):
            if wanted:
                arguments.append(wanted)
                conditions.append(f"o.{column} = ${len(arguments)}")
        if after is not None:
            arguments += after
            conditions.append(f"(o.created_at, o.operation_id) < (${len(arguments) - 1}, ${len(arguments)})")
        rows = await self._database.of(principal.tenant).fetch(
            f"SELECT {_OPERATION} FROM operations o WHERE {' AND '.join(conditions)}"
            " ORDER BY o.created_at DESC, o.operation_id DESC LIMIT $2",
            *arguments,
        )
        last = rows[size - 1] if len(rows) > size else None
        return Page([operation_of(row) for row in rows[:size]], (last["created_at"], str(last["operation_id"])) if last else None)


async def recorded_since(connection: Connection, moment: datetime, operation_id: UUID, limit: int) -> list[tuple[Operation, datetime]]:
    """Operations of all tenants recorded after `moment`, or then with a greater id, in that order, with when.

    For the feed, which filters by tenant itself.
    """
    rows = await connection.fetch(
        f"SELECT {_OPERATION} FROM operations o WHERE o.recorded_at >= $1 AND (o.recorded_at, o.operation_id) > ($1, $2)"
        " ORDER BY o.recorded_at, o.operation_id LIMIT $3",
        *(moment, operation_id, limit),
    )
    return [(operation_of(row), row["recorded_at"]) for row in rows]


async def recorded(connection: Connection, tenant: str, operation_id: UUID) -> tuple[Operation, datetime] | None:
    """One operation with when it was recorded."""
    row = await connection.fetchrow(f"SELECT {_OPERATION} FROM operations o WHERE {_THE_OPERATION}", tenant, operation_id)
    return (operation_of(row), row["recorded_at"]) if row else None


def _resolved(
    operation: Operation, known: dict[int, Hold], prices: dict[int, ListedPrice], baseline: Price | None
) -> tuple[tuple[Attempt, ...], list[Move], list[dict[str, Any]]]:
    """The attempts with what they cost and saved, the moves of those that have a hold, and the others as book_late reads them."""
    attempts, moves, late = [], list[Move](), list[dict[str, Any]]()
    for attempt in sorted(operation.attempts, key=lambda attempt: attempt.attempt):
        listed = prices.get(attempt.attempt)
        # What a late call draws on its lease, if anything, is found out where that is locked.
        hold = Hold(str(uuid4()), 0, listed.price) if listed else known[attempt.attempt]
        if attempt.hold_id and attempt.hold_id != hold.hold_id:
            raise RequestInvalid(f"attempt {attempt.attempt} names a hold that is not its own", field="attempts.hold_id")
        if attempt.not_sent and attempt.usage != NO_USAGE:
            raise RequestInvalid(f"attempt {attempt.attempt} was not sent and yet used tokens", field="attempts.not_sent")
        move = holds.not_sent(hold) if attempt.not_sent else holds.settle(hold, attempt.usage, estimated=attempt.estimated)
        if move is not None:
            hold = move.hold
            if listed is None:
                moves.append(move)
            else:
                late.append(_late(operation, attempt, hold, listed.price_id))
        attempts.append(
            replace(
                attempt,
                lease_id="",  # what its lease was is the hold's to know
                drawn_nanousd=0,
                hold_id=hold.hold_id,
                cost_nanousd=hold.cost_nanousd,
                price_version=hold.price.version,
                prompt_cache_saved_nanousd=savings.prompt_cache_saved_nanousd(hold.price, attempt.usage),
                tiering_saved_nanousd=savings.tiering_saved_nanousd(hold.price, baseline, attempt.usage) if baseline else 0,
            )
        )
    return tuple(attempts), moves, late


def _late(operation: Operation, attempt: Attempt, hold: Hold, price_id: int) -> dict[str, Any]:
    """A call that nobody has told of before, as it ends: its hold as book_late reads it."""
    return {
        "hold_id": hold.hold_id,
        "tenant": operation.tenant,
        "user_id": operation.user,
        "api_key_id": operation.api_key_id,
        "operation_id": operation.operation_id,
        "attempt": attempt.attempt,
        "provider": attempt.provider,
        "model": attempt.model,
        "price_id": price_id,
        "lease_id": attempt.lease_id or None,
        "input_tokens_max": attempt.usage.prompt_tokens,
        "output_tokens_max": attempt.usage.output_tokens,
        "amount_nanousd": attempt.drawn_nanousd,
        "created_at": operation.created_at,
        "state": hold.state.value,
        "cost_nanousd": hold.cost_nanousd,
        "estimated": hold.estimated,
        **usage_columns(hold.usage),
    }


def _nameless(operation: Operation) -> Operation:
    """What is kept of an erased user's operation, as the schema's erase_user keeps it. The same one again is under the same name."""
    cache = replace(operation.cache, source_answer_id=None)
    return replace(operation, user=f"erased-{operation.operation_id}", session_id="", trace_id="", api_key_id="", cache=cache)


def _rows(operations: Sequence[Operation]) -> tuple[str, str]:
    """Operations and their attempts as book_records reads them: rows of these tables, as JSON."""
    told, attempts = list[dict[str, Any]](), list[dict[str, Any]]()
    for operation in operations:
        key = {"tenant": operation.tenant, "operation_id": operation.operation_id, "created_at": operation.created_at}
        told.append({**key, **_columns(operation)})
        attempts += ({**key, **_attempt_columns(attempt)} for attempt in operation.attempts)
    return orjson.dumps(told).decode(), orjson.dumps(attempts).decode()


def _columns_of_steps(operations: Sequence[Operation]) -> tuple[list[Any], ...]:
    """The steps of operations as book_records reads them: of which operation each is, counted from 1, then its columns."""
    rows = [
        (place, ordinal, step.name, step.status, step.started_ms, step.duration_ms, orjson.dumps(step.facts).decode())
        for place, operation in enumerate(operations, 1)
        for ordinal, step in enumerate(operation.steps, 1)
    ]
    return tuple(map(list, zip(*rows, strict=True))) or ([],) * STEP_COLUMNS


def _columns(operation: Operation) -> dict[str, Any]:
    return {
        "user_id": operation.user,
        "session_id": operation.session_id,
        "api_key_id": operation.api_key_id,
        "trace_id": operation.trace_id,
        "status": operation.status,
        "tier": operation.tier,
        "model": operation.model,
        "provider": operation.provider,
        "collection": operation.collection,
        "finish_reason": operation.finish_reason,
        "error_reason": operation.error_reason,
        **usage_columns(operation.usage),
        "cost_nanousd": operation.cost_nanousd,
        "estimated": operation.estimated,
        "cache_verdict": operation.cache.verdict,
        "cache_similarity": operation.cache.similarity,
        "cache_source_id": operation.cache.source_answer_id,
        "cache_age_s": operation.cache.age_s,
        "cache_saved_nanousd": operation.cache.saved_nanousd,
        "cache_reason": operation.cache.reason,
        "first_token_ms": operation.first_token_ms,
        "duration_ms": operation.duration_ms,
        "purpose": operation.purpose or None,
        "calls_sent": sum(not attempt.not_sent for attempt in operation.attempts),
        "prompt_cache_saved_nanousd": sum(attempt.prompt_cache_saved_nanousd for attempt in operation.attempts),
        "tiering_saved_nanousd": sum(attempt.tiering_saved_nanousd for attempt in operation.attempts),
    }


def _attempt_columns(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.attempt,
        "hold_id": attempt.hold_id,
        "provider": attempt.provider,
        "model": attempt.model,
        "provider_request_id": attempt.provider_request_id,
        "price_version": attempt.price_version,
        **usage_columns(attempt.usage),
        "cost_nanousd": attempt.cost_nanousd,
        "finish_reason": attempt.finish_reason,
        "error_reason": attempt.error_reason,
        "first_token_ms": attempt.first_token_ms,
        "duration_ms": attempt.duration_ms,
        "estimated": attempt.estimated,
        "not_sent": attempt.not_sent,
    }


def operation_of(row: Any) -> Operation:
    return Operation(
        operation_id=str(row["operation_id"]),
        tenant=row["tenant"],
        user=row["user_id"],
        session_id=row["session_id"],
        api_key_id=row["api_key_id"],
        trace_id=row["trace_id"],
        status=row["status"],
        tier=row["tier"],
        model=row["model"],
        provider=row["provider"],
        collection=row["collection"],
        finish_reason=row["finish_reason"],
        error_reason=row["error_reason"],
        usage=usage_of(row),
        cost_nanousd=row["cost_nanousd"],
        estimated=row["estimated"],
        cache=CacheFacts(
            row["cache_verdict"],
            row["cache_similarity"],
            row["cache_source_id"],
            row["cache_age_s"],
            row["cache_saved_nanousd"],
            row["cache_reason"],
        ),
        created_at=row["created_at"],
        first_token_ms=row["first_token_ms"],
        duration_ms=row["duration_ms"],
        attempts=tuple(_attempt_of(attempt) for attempt in orjson.loads(row["attempts"] or "[]")),
        steps=tuple(_step_of(step) for step in orjson.loads(row["steps"] or "[]")),
        purpose=row["purpose"],
    )


def _attempt_of(row: dict[str, Any]) -> Attempt:
    return Attempt(
        attempt=row["attempt"],
        hold_id=row["hold_id"],
        provider=row["provider"],
        model=row["model"],
        usage=usage_of(row),
        provider_request_id=row["provider_request_id"],
        cost_nanousd=row["cost_nanousd"],
        finish_reason=row["finish_reason"],
        error_reason=row["error_reason"],
        first_token_ms=row["first_token_ms"],
        duration_ms=row["duration_ms"],
        estimated=row["estimated"],
        price_version=row["price_version"],
        not_sent=row["not_sent"],
    )


def _step_of(row: dict[str, Any]) -> Step:
    return Step(row["name"], row["status"], row["started_ms"], row["duration_ms"], row["facts"])
