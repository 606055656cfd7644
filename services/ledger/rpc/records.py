"""The RPCs that write down what happened and show it again. Validate, call, translate."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.clock import Clock
from services.chassis.errors import DomainError, Internal, RequestInvalid
from services.chassis.principal import current_principal
from services.chassis.telemetry import span
from services.ledger.domain import Operation, Recorded
from services.ledger.paging import moment_and_uuid, token_of
from services.ledger.ports import Conversations, OperationBook, OperationFeed, UsageReports
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer, service
from services.ledger.spans import needs_rows
from tailrace.ledger.v1 import ledger_service_pb2 as pb

log = structlog.get_logger(__name__)

RECORDS_MAX = 256
"""Most records that are booked in one transaction: the commit is shared by all, and their rows are locked by it until then."""
HEARTBEAT_S = 15.0
GROUPINGS = ("day", "hour", "tenant", "user", "key", "session", "model", "tier", "step", "cache", "purpose")
GROUPINGS_MAX = 4
USAGE_DEFAULT = timedelta(days=30)
USAGE_MAX = timedelta(days=400)
USAGE_OF_ROWS_MAX = timedelta(days=31)
"""The same where no sums are kept and single operations are read."""


class RecordRpcs:
    """Record, get, list and watch operations; query usage."""

    _operations: OperationBook
    _usage: UsageReports
    _feed: OperationFeed
    _conversations: Conversations
    _clock: Clock
    _reading: set[asyncio.Task[None]]

    def end_streams(self) -> None:
        """End the calls that would go on for ever: watchers are let go, recorders get the acks of what was read."""
        self._feed.end()
        for reading in self._reading:
            reading.cancel()

    async def RecordOperations(self, requests: AsyncIterator[pb.RecordOperationsRequest], context: Writer) -> None:
        """Records that came together are booked together, and acknowledged as they came, in order.

        While one batch is booked the next is read and checked. What is being booked when the caller leaves is kept whole or not at all;
        it comes again.
        """
        service()
        come: asyncio.Queue[pb.RecordOperationsRequest | None] = asyncio.Queue()
        room = asyncio.Semaphore(2 * RECORDS_MAX)

        async def read() -> None:
            try:
                async for request in requests:
                    if len(request.more) >= RECORDS_MAX or any(record.more for record in request.more):
                        raise RequestInvalid("a message holds too many records", field="more", bound=f"0-{RECORDS_MAX - 1}, one deep")
                    for _ in range(1 + len(request.more)):
                        await room.acquire()
                    come.put_nowait(request)
            finally:
                come.put_nowait(None)

        bookings: asyncio.Queue[asyncio.Task[list[pb.RecordOperationsResponse]] | None] = asyncio.Queue(1)
        under_way = set[asyncio.Task[list[pb.RecordOperationsResponse]]]()

        async def book() -> None:
            async for batch in _batches(come):
                booking = asyncio.create_task(self._record(batch))
                under_way.add(booking)
                await bookings.put(booking)
            await bookings.put(None)

        reading, handing_on = asyncio.create_task(read()), asyncio.create_task(book())
        self._reading.add(reading)
        try:
            while (next_booking := await bookings.get()) is not None:
                for reply in await next_booking:
                    await context.write(reply)
                    for _ in range(1 + len(reply.more)):
                        room.release()
                under_way.discard(next_booking)
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.result()
        finally:
            self._reading.discard(reading)
            for task in (works := [reading, handing_on, *under_way]):
                task.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _record(self, batch: Sequence[pb.RecordOperationsRequest]) -> list[pb.RecordOperationsResponse]:
        """Book what came; one reply a message."""
        acks = iter(await self._book([record for message in batch for record in (message, *message.more)]))
        replies = []
        for message in batch:
            reply = next(acks)
            reply.more.extend(itertools.islice(acks, len(message.more)))
            replies.append(reply)
        return replies

    async def _book(self, records: Sequence[pb.RecordOperationsRequest]) -> list[pb.RecordOperationsResponse]:
        """Book records. Raises only what may pass by itself; what never can be booked is answered so, and the stream goes on."""
        read = [_operation_or_error(record.operation) for record in records]
        try:
            with span("ledger.record"):
                recorded = iter(await self._operations.record_all([operation for operation in read if isinstance(operation, Operation)]))
        except DomainError:
            raise
        except Exception as error:
            log.exception("record_failed_unexpectedly", error=type(error).__name__, records=len(records))
            if len(records) > 1:  # which of them it is has to be found out
                return [reply for record in records for reply in await self._book([record])]
            recorded = iter([Internal(type(error).__name__)])
        outcomes = [next(recorded) if isinstance(operation, Operation) else operation for operation in read]
        return [_reply(record.record_id, outcome) for record, outcome in zip(records, outcomes, strict=True)]

    async def GetOperation(self, request: pb.GetOperationRequest, _: object) -> pb.GetOperationResponse:
        operation_id = checks.known_uuid(request.operation_id, "operation")
        with span("ledger.operation"):
            operation = await self._operations.get(current_principal(), operation_id)
            if not request.with_turn:
                return pb.GetOperationResponse(operation=messages.operation_message(operation))
            turn = await self._conversations.turn(operation.tenant, operation.user, operation_id)
            source = None
            with contextlib.suppress(ValueError, DomainError):
                source_id = checks.known_uuid(operation.cache.source_answer_id or "", "operation")
                # Only if the same user asked it: somebody else's question is not theirs to see.
                source = await self._conversations.turn(operation.tenant, operation.user, source_id)
        return pb.GetOperationResponse(
            operation=messages.operation_message(operation, source.question if source else None),
            turn=messages.turn_message(turn) if turn else None,
        )

    async def ListOperations(self, request: pb.ListOperationsRequest, context: Writer) -> None:
        size = checks.size(request.page_size, 50, 1000)
        session_id, user = checks.text(request.session_id, "session_id", 128), checks.text(request.user, "user", 256)
        after = moment_and_uuid(request.page_token)
        with span("ledger.operations"):
            page = await self._operations.page(current_principal(), size=size, after=after, session_id=session_id, user=user)
        for place, operation in enumerate(page.rows, 1):
            token = token_of(page.last) if place == len(page.rows) else ""
            await context.write(pb.ListOperationsResponse(operation=messages.operation_message(operation), next_page_token=token))

    async def WatchOperations(self, _: pb.WatchOperationsRequest, context: Writer) -> None:
        """A heartbeat at once says that the watch is on."""
        with self._feed.watching(current_principal()) as watcher:
            await context.write(pb.WatchOperationsResponse())
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        operation = await watcher.next()
                except TimeoutError:
                    await context.write(pb.WatchOperationsResponse())
                    continue
                if operation is None:
                    return
                await context.write(pb.WatchOperationsResponse(operation=messages.operation_message(operation)))

    async def QueryUsage(self, request: pb.QueryUsageRequest, context: Writer) -> None:
        group_by = [checks.one_of(name, "group_by", GROUPINGS) for name in dict.fromkeys(request.group_by)]
        checks.between(len(group_by), "group_by", 0, GROUPINGS_MAX)
        end = checks.moment(request.to, "to") if request.HasField("to") else self._clock.now().astimezone(UTC)
        since: Timestamp = getattr(request, "from")
        start = checks.moment(since, "from") if request.HasField("from") else default_start(end)
        principal = current_principal()
        of_one = () if "admin" in principal.roles else ("user",)
        longest = USAGE_OF_ROWS_MAX if needs_rows([*group_by, *of_one]) else USAGE_MAX
        if not start <= end <= start + longest:
            bound = f"{longest.days} days" + (" by session, step or purpose, or by hour of a user or key" if longest < USAGE_MAX else "")
            raise RequestInvalid(f"from must be before to, by at most {longest.days} days", field="from", bound=bound)
        with span("ledger.usage"):
            rows = await self._usage.query(principal, group_by, start, end)
        for row in rows:
            await context.write(messages.usage_row_message(row))


def default_start(end: datetime) -> datetime:
    """The start of the day, in UTC, 30 days before `end`: whole days are what sums are kept of."""
    return (end - USAGE_DEFAULT).replace(hour=0, minute=0, second=0, microsecond=0)


async def _batches(come: "asyncio.Queue[pb.RecordOperationsRequest | None]") -> AsyncIterator[list[pb.RecordOperationsRequest]]:
    """What has come by now, again and again: at least one message, and more while they hold at most RECORDS_MAX records. Ends at None."""
    left_over = list[pb.RecordOperationsRequest | None]()
    while (message := left_over.pop() if left_over else await come.get()) is not None:
        batch, records = [message], 1 + len(message.more)
        while not come.empty() and not left_over:
            following = come.get_nowait()
            if following is not None and records + 1 + len(following.more) <= RECORDS_MAX:
                batch.append(following)
                records += 1 + len(following.more)
            else:
                left_over.append(following)
        yield batch


def _operation_or_error(message: pb.Operation) -> Operation | DomainError:
    try:
        return messages.operation_value(message)
    except DomainError as error:
        return error


def _reply(record_id: int, outcome: Recorded | DomainError) -> pb.RecordOperationsResponse:
    if isinstance(outcome, Recorded):
        return pb.RecordOperationsResponse(record_id=record_id, duplicate=outcome.duplicate, cost_nanousd=outcome.cost_nanousd)
    log.error("record_rejected", reason=outcome.reason, detail=outcome.detail)
    return pb.RecordOperationsResponse(record_id=record_id, rejected_reason=outcome.reason, rejected_detail=outcome.detail)
