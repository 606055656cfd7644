"""The RPCs that write down what happened and show it again. Validate, call, translate."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.clock import Clock
from services.chassis.errors import DomainError, RequestInvalid
from services.chassis.principal import current_principal
from services.chassis.telemetry import span
from services.ledger.paging import moment_and_uuid, token_of
from services.ledger.ports import Conversations, OperationBook, OperationFeed, UsageReports
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer, service
from services.ledger.spans import needs_rows
from tailrace.ledger.v1 import ledger_service_pb2 as pb

log = structlog.get_logger(__name__)

T = TypeVar("T")

RECORDING_MAX = 4
"""Records of one stream that are booked side by side. More than this mostly wait for each other's rows."""
HEARTBEAT_S = 15.0
GROUPINGS = ("day", "hour", "tenant", "user", "key", "session", "model", "tier", "step", "cache")
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
        """Records are booked side by side and acknowledged in order.

        What is being booked when the caller leaves is kept whole or not at all; it comes again.
        """
        service()
        begun: asyncio.Queue[asyncio.Task[pb.RecordOperationsResponse] | None] = asyncio.Queue()
        free = asyncio.Semaphore(RECORDING_MAX)
        tasks: set[asyncio.Task[object]] = set()

        def start(work: Coroutine[object, object, T]) -> asyncio.Task[T]:
            task = asyncio.create_task(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return task

        async def read() -> None:
            try:
                async for request in requests:
                    await free.acquire()
                    begun.put_nowait(start(self._record(request)))
            finally:
                begun.put_nowait(None)

        reading = start(read())
        self._reading.add(reading)
        try:
            while (task := await begun.get()) is not None:
                await context.write(await task)
                free.release()
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.result()
        finally:
            self._reading.discard(reading)
            left = list(tasks)
            for unfinished in left:
                unfinished.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _record(self, request: pb.RecordOperationsRequest) -> pb.RecordOperationsResponse:
        """Book one record. Raises only what may pass by itself; what never can be booked is answered so, and the stream goes on."""
        try:
            operation = messages.operation_value(request.operation)
            with span("ledger.record"):
                recorded = await self._operations.record(operation)
        except DomainError as error:
            if error.retryable:
                raise
            log.error("record_rejected", reason=error.reason, detail=error.detail)
            return pb.RecordOperationsResponse(record_id=request.record_id, rejected_reason=error.reason, rejected_detail=error.detail)
        except Exception as error:
            log.exception("record_failed_unexpectedly", error=type(error).__name__)
            return pb.RecordOperationsResponse(
                record_id=request.record_id, rejected_reason="INTERNAL", rejected_detail=type(error).__name__
            )
        return pb.RecordOperationsResponse(record_id=request.record_id, duplicate=recorded.duplicate, cost_nanousd=recorded.cost_nanousd)

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
        longest = USAGE_OF_ROWS_MAX if needs_rows(group_by) else USAGE_MAX
        if not start <= end <= start + longest:
            raise RequestInvalid(f"from must be before to, by at most {longest.days} days", field="from", bound=f"{longest.days} days")
        with span("ledger.usage"):
            rows = await self._usage.query(current_principal(), group_by, start, end)
        for row in rows:
            await context.write(messages.usage_row_message(row))


def default_start(end: datetime) -> datetime:
    """The start of the day, in UTC, 30 days before `end`: whole days are what sums are kept of."""
    return (end - USAGE_DEFAULT).replace(hour=0, minute=0, second=0, microsecond=0)
