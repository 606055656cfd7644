"""Retrieval and the ledger as the orchestrator's ports, and the translation of their messages. No decision is made here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any

import grpc
import msgspec
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.channel import Caller, Patience
from services.chassis.errors import DeadlineTooShort, DomainError, NotFound, Overloaded, RequestInvalid, Unavailable
from services.chassis.money import Price
from services.chassis.principal import Principal
from services.chassis.wire import price_value, timestamp, usage_message, usage_value
from services.orchestrator.domain import (
    Attempt,
    BookedAnswer,
    CachedAnswer,
    CacheReceipt,
    Candidate,
    Done,
    Draw,
    Edition,
    History,
    Hold,
    KeptTurn,
    LentCredit,
    OperationRecord,
    Passage,
    Payer,
    Question,
    RecallVerdict,
    StepChange,
    Summary,
    Turn,
)
from services.orchestrator.spool import Ack, Spool
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as ledger_pb
from tailrace.ledger.v1 import ledger_service_pb2_grpc as ledger_rpc
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval_pb
from tailrace.retrieval.v1 import retrieval_service_pb2_grpc as retrieval_rpc

SERVICE = Principal("tailrace", "orchestrator", frozenset({"service"}))
"""Who the orchestrator is when it writes what it alone knows."""
log = structlog.get_logger(__name__)

LATE_PAUSE_S, LATE_PAUSE_MAX_S = 1.0, 30.0
"""How long a turn on disk waits before it is tried again: whoever has it in memory tries as well, and sooner."""
LATE_TURN_S_MAX = 20 * 3600.0
"""How long it may wait: the ledger knows for a day what was deleted, and a turn that comes later would bring it back."""
RECALL_TIMEOUT_S = 15.0
SEARCH_TIMEOUT_S = 15.0
EMBED_TIMEOUT_S = 15.0
RECORD_STREAM_S = 3600.0
ACK_TIMEOUT_S = 30.0
RESERVE_TIMEOUT_S, RESERVE_HURRIED_S = 5.0, 1.0
"""How long a ledger may say nothing to a reservation before another is asked; less for who can pay otherwise."""
RUSH_S = 10.0
"""How long a question waits for a ledger that has too much to do: a queue that lasts for longer is better told to come again."""


@contextlib.contextmanager
def _named(dependency: str) -> Iterator[None]:
    """Call a service that cannot be reached by its name instead of its address. What is away behind it keeps its own name."""
    try:
        yield
    except Unavailable as error:
        if ":" in error.metadata.get("dependency", ":"):
            raise Unavailable(f"the {dependency} service cannot be reached", dependency=dependency) from error
        raise


def passage_value(message: common_pb2.CitedPassage) -> Passage:
    return Passage(
        number=message.number,
        document_id=message.document_id,
        chunk_id=message.chunk_id,
        title=message.title,
        source_uri=message.source_uri,
        text=message.text,
        start=message.start,
        end=message.end,
        score=message.score,
        heading_path=tuple(message.heading_path),
        document_version=message.document_version,
        page=message.page,
        flags=tuple(message.flags),
        similarity=message.similarity if message.HasField("similarity") else None,
    )


def passage_message(passage: Passage) -> common_pb2.CitedPassage:
    return common_pb2.CitedPassage(
        number=passage.number,
        document_id=passage.document_id,
        chunk_id=passage.chunk_id,
        title=passage.title,
        source_uri=passage.source_uri,
        text=passage.text,
        start=passage.start,
        end=passage.end,
        score=passage.score,
        heading_path=passage.heading_path,
        document_version=passage.document_version,
        page=passage.page,
        flags=passage.flags,
        similarity=passage.similarity,
    )


def cache_message(receipt: CacheReceipt) -> common_pb2.CacheReceipt:
    return common_pb2.CacheReceipt(
        verdict=receipt.verdict,
        similarity=receipt.similarity,
        source_question=receipt.source_question,
        source_answer_id=receipt.source_answer_id,
        age_s=receipt.age_s,
        saved_nanousd=receipt.saved_nanousd,
        reason=receipt.reason,
    )


def _cached_value(message: retrieval_pb.CachedAnswer) -> CachedAnswer:
    return CachedAnswer(
        answer_id=message.answer_id,
        question=message.question,
        user=message.user,
        text=message.text,
        passages=tuple(map(passage_value, message.passages)),
        model=message.model,
        provider=message.provider,
        cost_nanousd=message.cost_nanousd,
        created_at=_moment(message.created_at),
        finish_reason=message.finish_reason,
        usage=usage_value(message.usage),
    )


def _cached_message(answer: CachedAnswer) -> retrieval_pb.CachedAnswer:
    return retrieval_pb.CachedAnswer(
        answer_id=answer.answer_id,
        question=answer.question,
        user=answer.user,
        text=answer.text,
        passages=map(passage_message, answer.passages),
        model=answer.model,
        provider=answer.provider,
        cost_nanousd=answer.cost_nanousd,
        created_at=timestamp(answer.created_at),
        finish_reason=answer.finish_reason,
        usage=usage_message(answer.usage),
    )


def _turn_value(message: ledger_pb.Turn) -> Turn:
    return Turn(
        answer_id=message.answer_id,
        question=message.question,
        text=message.text,
        passages=tuple(map(passage_value, message.citations)),
        created_at=_moment(message.created_at),
        complete=message.complete,
    )


def _booked_value(reply: ledger_pb.GetOperationResponse) -> BookedAnswer:
    operation, turn = reply.operation, _turn_value(reply.turn) if reply.HasField("turn") else None
    verdict = next((step.facts["verdict"] for step in reversed(operation.steps) if "verdict" in step.facts), "")
    receipt = Done(
        answer_id=operation.operation_id,
        text_sha256="",
        usage=usage_value(operation.usage),
        cost_nanousd=operation.cost_nanousd,
        model=operation.model,
        provider=operation.provider,
        tier=operation.tier,
        finish_reason=operation.finish_reason,
        cache=cache_value(operation.cache),
        trace_id=operation.trace_id,
        estimated=operation.estimated,
        verdict="passed" if turn is not None and turn.complete else verdict,
        first_token_ms=operation.first_token_ms,
        duration_ms=operation.duration_ms,
    )
    status: Any = operation.status
    return BookedAnswer(status, operation.error_reason, operation.session_id, _moment(operation.created_at), receipt, turn)


def cache_value(message: common_pb2.CacheReceipt) -> CacheReceipt:
    verdict: Any = message.verdict
    return CacheReceipt(
        verdict,
        similarity=message.similarity if message.HasField("similarity") else None,
        source_question=message.source_question if message.HasField("source_question") else None,
        source_answer_id=message.source_answer_id if message.HasField("source_answer_id") else None,
        age_s=message.age_s if message.HasField("age_s") else None,
        saved_nanousd=message.saved_nanousd,
        reason=message.reason,
    )


def _turn_message(turn: Turn) -> ledger_pb.Turn:
    return ledger_pb.Turn(
        answer_id=turn.answer_id,
        question=turn.question,
        text=turn.text,
        citations=map(passage_message, turn.passages),
        created_at=timestamp(turn.created_at),
        complete=turn.complete,
    )


def _step_message(step: StepChange) -> common_pb2.StepTiming:
    return common_pb2.StepTiming(
        name=step.name, status=step.status, started_ms=step.started_ms, duration_ms=step.duration_ms, facts=step.facts
    )


def _attempt_message(attempt: Attempt) -> ledger_pb.Attempt:
    return ledger_pb.Attempt(
        attempt=attempt.attempt,
        hold_id=attempt.hold_id,
        provider=attempt.provider,
        model=attempt.model,
        provider_request_id=attempt.provider_request_id,
        usage=usage_message(attempt.usage),
        cost_nanousd=attempt.cost_nanousd,
        finish_reason=attempt.finish_reason,
        error_reason=attempt.error_reason,
        first_token_ms=attempt.first_token_ms,
        duration_ms=attempt.duration_ms,
        estimated=attempt.estimated,
        price_version=attempt.price_version,
        not_sent=attempt.not_sent,
        lease_id=attempt.lease_id,
        drawn_nanousd=attempt.drawn_nanousd,
    )


def _draw_message(draw: Draw) -> ledger_pb.LeaseDraw:
    return ledger_pb.LeaseDraw(
        operation_id=draw.operation_id,
        attempt=draw.attempt,
        provider=draw.provider,
        model=draw.model,
        price_version=draw.price_version,
        input_tokens_max=draw.input_tokens_max,
        output_tokens_max=draw.output_tokens_max,
        amount_nanousd=draw.amount_nanousd,
    )


def operation_message(record: OperationRecord) -> ledger_pb.Operation:
    """The record as the ledger books it. The asker's own words stay out, also those of a cached question."""
    asked = record.question
    cache = cache_message(record.cache)
    cache.ClearField("source_question")
    return ledger_pb.Operation(
        operation_id=asked.answer_id,
        tenant=asked.principal.tenant,
        user=asked.principal.user,
        session_id=asked.session_id,
        trace_id=record.trace_id,
        status=record.status,
        tier=asked.tier,
        model=record.model,
        provider=record.provider,
        finish_reason=record.finish_reason,
        error_reason=record.error_reason,
        usage=usage_message(record.usage),
        cost_nanousd=record.cost_nanousd,
        cache=cache,
        estimated=record.estimated,
        created_at=timestamp(asked.created_at),
        first_token_ms=record.first_token_ms,
        duration_ms=record.duration_ms,
        steps=map(_step_message, record.steps),
        attempts=map(_attempt_message, record.attempts),
        collection=asked.collection,
        api_key_id=asked.principal.api_key_id,
        purpose=record.purpose,
    )


class RemoteRecall:
    """A Recall stream, part by part. While retrieval is away for a moment it is begun again: a recall changes nothing."""

    def __init__(self, begin: Callable[[], AbstractAsyncContextManager[Any]], patience_s: float) -> None:
        self._begin, self._patience_s = begin, patience_s
        self._call = contextlib.AsyncExitStack()
        self._parts: Any = None

    async def edition(self) -> Edition:
        started = await self._part("started")
        return Edition(started.collection_epoch, started.audience)

    async def verdict(self) -> RecallVerdict:
        message = await self._part("verdict")
        return RecallVerdict(
            answer=_cached_value(message.answer) if message.HasField("answer") else None,
            similarity=message.similarity if message.HasField("similarity") else None,
            reason=message.reason,
        )

    async def passages(self) -> tuple[Passage, ...]:
        return tuple(map(passage_value, (await self._part("passages")).passages))

    async def aclose(self) -> None:
        """Cancel what was not asked for."""
        await self._call.aclose()

    async def _part(self, name: str) -> Any:
        """The next part of this name; those before it were not asked for."""
        patience: Patience | None = None
        while True:
            try:
                with _named("retrieval"):
                    if self._parts is None:
                        self._parts = await self._call.enter_async_context(self._begin())
                    async for message in self._parts:
                        if message.WhichOneof("part") == name:
                            return getattr(message, name)
                raise Unavailable("the retrieval service ended a recall too early", dependency="retrieval")
            except DomainError as error:
                await self._call.aclose()
                self._parts = None
                patience = patience or Patience(self._patience_s)
                await patience.wait(error, "retrieval")


class RemoteMemory:
    """Memory at the retrieval service. `patience_s`: how long a recall waits for it to be back."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller, patience_s: float) -> None:
        self._stub = retrieval_rpc.RetrievalServiceStub(channel)
        self._caller, self._patience_s = caller, patience_s

    @contextlib.asynccontextmanager
    async def recall(
        self, query: str, collection: str, scope: str, *, want_cached: bool, passages_max: int, held: Edition | None
    ) -> AsyncIterator[RemoteRecall]:
        request = retrieval_pb.RecallRequest(
            question=query,
            collection=collection,
            cache_scope=scope,
            want_cached=want_cached,
            passages_max=passages_max,
            held_epoch=held.epoch if held is not None else None,
            held_audience=held.audience if held is not None else "",
        )
        recall = RemoteRecall(lambda: self._caller.stream(self._stub.Recall, request, timeout_s=RECALL_TIMEOUT_S), self._patience_s)
        try:
            yield recall
        finally:
            await recall.aclose()

    async def remember(self, answer: CachedAnswer, collection: str, scope: str, edition: Edition) -> str:
        request = retrieval_pb.RememberAnswerRequest(
            answer=_cached_message(answer),
            collection=collection,
            cache_scope=scope,
            collection_epoch=edition.epoch,
            audience=edition.audience,
        )
        with _named("retrieval"):
            reply = await self._caller.unary(self._stub.RememberAnswer, request, timeout_s=10)
        return "" if reply.remembered else reply.reason or "refused"

    async def embed(self, texts: Sequence[str]) -> list[Sequence[float]]:
        with _named("retrieval"):
            reply = await self._caller.unary(self._stub.Embed, retrieval_pb.EmbedRequest(texts=texts), timeout_s=EMBED_TIMEOUT_S)
        return [row.values for row in reply.embeddings]


class RemoteSearch:
    """DocumentSearch at the retrieval service."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller) -> None:
        self._stub = retrieval_rpc.RetrievalServiceStub(channel)
        self._caller = caller

    async def search(self, query: str, collection: str, limit: int) -> tuple[Passage, ...]:
        request = retrieval_pb.SearchRequest(query=query, collection=collection, limit=limit, batches=True)
        with _named("retrieval"):
            async with self._caller.stream(self._stub.Search, request, timeout_s=SEARCH_TIMEOUT_S) as messages:
                return tuple([passage_value(row.hit) async for message in messages for row in (message, *message.more)])


class RemoteLedger:
    """Ledger at the ledger service. `patience_s`: how long an answer waits for it to be back."""

    def __init__(self, channel: grpc.aio.Channel, caller: Caller, patience_s: float) -> None:
        self._stub = ledger_rpc.LedgerServiceStub(channel)
        self._caller, self._patience_s = caller, patience_s

    async def reserve(
        self,
        operation_id: str,
        attempt: int,
        candidate: Candidate,
        input_tokens_max: int,
        output_tokens_max: int,
        output_tokens_min: int,
        ttl_ms: int,
        *,
        patient: bool = True,
    ) -> Hold:
        request = ledger_pb.ReserveRequest(
            operation_id=operation_id,
            attempt=attempt,
            provider=candidate.provider,
            model=candidate.model,
            input_tokens_max=input_tokens_max,
            output_tokens_max=output_tokens_max,
            output_tokens_min=output_tokens_min,
            ttl_ms=ttl_ms,
        )
        patience, rush = Patience(self._patience_s if patient else 0), Patience(RUSH_S)
        timeout_s = RESERVE_TIMEOUT_S if patient else RESERVE_HURRIED_S
        while True:  # the same attempt of the same operation is one hold, however often it is asked for
            try:
                with _named("ledger"):
                    reply = await self._caller.unary(self._stub.Reserve, request, timeout_s=timeout_s)
                break
            except Overloaded as error:  # it has not been asked yet, and a rush of questions is no reason to turn one away
                await rush.let_pass(error)
            except DomainError as error:
                await patience.wait(error, "ledger")
        granted = reply.output_tokens_max or output_tokens_max  # a ledger of the former version grants all, and does not say so
        return Hold(reply.hold_id, reply.amount_nanousd, price_value(reply.price), granted)

    async def prices(self) -> dict[tuple[str, str], Price]:
        """The common price list, by provider and model."""
        with _named("ledger"):
            async with self._caller.stream(self._stub.ListPrices, ledger_pb.ListPricesRequest(), timeout_s=5, principal=SERVICE) as rows:
                return {(row.price.provider, row.price.model): price_value(row.price) async for row in rows}

    async def lend(self, lease_id: str, payer: Payer) -> LentCredit:
        request = ledger_pb.LendCreditRequest(lease_id=lease_id, tenant=payer.tenant, user=payer.user, api_key_id=payer.api_key_id)
        with _named("ledger"):
            reply = await self._caller.unary(self._stub.LendCredit, request, timeout_s=5, principal=SERVICE)
        prices = {(price.provider, price.model): price_value(price) for price in reply.prices}
        return LentCredit(reply.amount_nanousd, reply.life_ms / 1000, prices)

    async def take_back(self, lease_id: str, payer: Payer, draws: Sequence[Draw]) -> None:
        request = ledger_pb.ReturnCreditRequest(
            lease_id=lease_id, tenant=payer.tenant, user=payer.user, draws=[_draw_message(draw) for draw in draws]
        )
        with _named("ledger"):
            await self._caller.unary(self._stub.ReturnCredit, request, timeout_s=10, principal=SERVICE)

    async def recalled(self, held: Sequence[str]) -> Collection[str]:
        request = ledger_pb.ListRecalledCreditRequest(lease_ids=held)
        try:
            with _named("ledger"):
                reply = await self._caller.unary(self._stub.ListRecalledCredit, request, principal=SERVICE)
        except DomainError as error:
            if error.code == "UNIMPLEMENTED":  # a ledger of the former version recalls nothing
                return ()
            raise
        return frozenset(reply.lease_ids)

    async def history(self, session_id: str, limit: int, until: str = "", *, patient: bool = False) -> History:
        request = ledger_pb.ListTurnsRequest(session_id=session_id, limit=limit, until_answer_id=until, with_summary=True)
        patience = Patience(self._patience_s if patient else 0)
        while True:
            try:
                return await self._history(request)
            except DomainError as error:
                await patience.wait(error, "ledger")

    async def _history(self, request: ledger_pb.ListTurnsRequest) -> History:
        turns, summary = list[Turn](), None
        with _named("ledger"):
            async with self._caller.stream(self._stub.ListTurns, request, timeout_s=5) as rows:
                async for row in rows:
                    if row.HasField("summary"):
                        summary = Summary(row.summary.through_answer_id, row.summary.text)
                    else:
                        turns.append(_turn_value(row.turn))
        return History(tuple(turns), summary)

    async def knows(self, principal: Principal, operation_id: str) -> bool:
        request = ledger_pb.GetOperationRequest(operation_id=operation_id)
        try:
            with _named("ledger"):
                await self._caller.unary(self._stub.GetOperation, request, timeout_s=5, principal=principal)
        except (NotFound, RequestInvalid):
            return False
        return True

    async def booked(self, principal: Principal, operation_id: str) -> BookedAnswer | None:
        request = ledger_pb.GetOperationRequest(operation_id=operation_id, with_turn=True)
        try:
            with _named("ledger"):
                reply = await self._caller.unary(self._stub.GetOperation, request, timeout_s=5, principal=principal)
        except (NotFound, RequestInvalid):
            return None
        return _booked_value(reply)

    async def append_turn(self, session_id: str, turn: Turn, principal: Principal, replaces: str = "", asked_after: str = "") -> KeptTurn:
        request = ledger_pb.AppendTurnRequest(session_id=session_id, turn=_turn_message(turn), replaces=replaces, asked_after=asked_after)
        return await self.append(request, principal)

    async def append(self, request: ledger_pb.AppendTurnRequest, principal: Principal) -> KeptTurn:
        """As `append_turn`, of what was written down before."""
        with _named("ledger"):
            reply = await self._caller.unary(self._stub.AppendTurn, request, timeout_s=10, principal=principal)
        return KeptTurn(reply.ordinal, reply.unsummarised)

    async def put_summary(self, session_id: str, summary: Summary, made_by: str, principal: Principal) -> None:
        message = ledger_pb.Summary(through_answer_id=summary.through, text=summary.text, made_by=made_by)
        request = ledger_pb.PutSummaryRequest(session_id=session_id, summary=message)
        with _named("ledger"):
            await self._caller.unary(self._stub.PutSummary, request, timeout_s=10, principal=principal)

    async def suggest_title(self, session_id: str, title: str, model: str, principal: Principal) -> None:
        request = ledger_pb.UpdateSessionRequest(session_id=session_id, title=title, suggested_by=model)
        with _named("ledger"):
            await self._caller.unary(self._stub.UpdateSession, request, timeout_s=10, principal=principal)

    @contextlib.asynccontextmanager
    async def recording(self) -> AsyncIterator["RecordLink"]:
        """Open the long-lived stream that operations are recorded through."""
        async with self._caller.stream(self._stub.RecordOperations, None, timeout_s=RECORD_STREAM_S, principal=SERVICE) as messages:
            yield RecordLink(messages)


class RecordLink:
    """Records out, acks in."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    async def send(self, records: Sequence[tuple[int, bytes]]) -> None:
        request, *more = (
            ledger_pb.RecordOperationsRequest(record_id=record_id, operation=ledger_pb.Operation.FromString(payload))
            for record_id, payload in records
        )
        request.more.extend(more)
        try:
            await self._messages.write(request)
        except asyncio.InvalidStateError as error:  # how grpc.aio says that the call is over
            raise Unavailable("the ledger ended the stream", dependency="ledger") from error

    async def acks(self) -> Sequence[Ack]:
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                reply = await anext(self._messages)
        except TimeoutError as error:
            raise Unavailable("the ledger did not acknowledge in time", dependency="ledger") from error
        return [Ack(ack.record_id, ack.rejected_reason, ack.rejected_detail) for ack in (reply, *reply.more)]


class SpooledBooks:
    """Books: on our disk first, at the ledger as soon as it can be."""

    def __init__(self, spool: Spool, replica: str) -> None:
        self._spool, self._replica = spool, replica

    def intend(self, record: OperationRecord) -> None:
        self._spool.intend(record.question.answer_id, self._replica, operation_message(record).SerializeToString())

    def mark(self, record: OperationRecord) -> None:
        self._spool.mark(record.question.answer_id, self._replica, operation_message(record).SerializeToString())

    async def keep(self, record: OperationRecord) -> None:
        await self._spool.keep(record.question.answer_id, self._replica, operation_message(record).SerializeToString())

    @property
    def has_room(self) -> bool:
        return self._spool.has_room

    async def record(self, record: OperationRecord) -> "asyncio.Future[None]":
        return await self._spool.append(record.question.answer_id, operation_message(record).SerializeToString())


class SpooledTurns:
    """LateTurns: on our disk, and tried again from there, also by the next process."""

    def __init__(self, spool: Spool, ledger: RemoteLedger) -> None:
        self._spool, self._ledger = spool, ledger

    async def keep(self, asked: Question, turn: Turn, asked_after: str) -> None:
        request = ledger_pb.AppendTurnRequest(
            session_id=asked.session_id, turn=_turn_message(turn), replaces=asked.replaces, asked_after=asked_after
        )
        payload = _LATE_TURN.encode(_LateTurn(asked.principal.tenant, asked.principal.user, request.SerializeToString()))
        await self._spool.keep_turn(turn.answer_id, payload)

    async def forget(self, answer_id: str) -> None:
        await self._spool.forget_turn(answer_id)

    async def send_forever(self) -> None:
        """Send what waits, oldest first, for ever. Whatever fails is tried again; the wait grows to LATE_PAUSE_MAX_S."""
        failures = 0
        while True:
            await self._spool.has_turns.wait()
            await asyncio.sleep(min(LATE_PAUSE_MAX_S, LATE_PAUSE_S * 2**failures))
            try:
                while (row := await self._spool.oldest_turn()) is not None:
                    await self._send(*row)
                    failures = 0
            except DomainError as error:
                failures = min(failures + 1, 10)
                log.warning("late_turns_wait", reason=error.reason, failures=failures)

    async def _send(self, answer_id: str, payload: bytes, waited_s: float) -> None:
        """Send one turn, and forget it unless the ledger is away. Raises Unavailable, DeadlineTooShort, Overloaded."""
        if waited_s > LATE_TURN_S_MAX:
            log.error("turn_lost", answer_id=answer_id, waited_s=round(waited_s))
        else:
            try:
                late = _LATE_TURN_OF.decode(payload)
                await self._ledger.append(ledger_pb.AppendTurnRequest.FromString(late.request), Principal(late.tenant, late.user))
            except (msgspec.MsgspecError, DecodeError):
                log.error("late_turn_unreadable", answer_id=answer_id)  # of another version
            except (Unavailable, DeadlineTooShort, Overloaded):
                raise
            except NotFound:
                log.info("conversation_deleted_meanwhile", answer_id=answer_id)
            except DomainError as error:
                log.error("turn_rejected", answer_id=answer_id, reason=error.reason)
        await self._spool.forget_turn(answer_id)


class _LateTurn(msgspec.Struct):
    """A turn on disk, and whose it is."""

    tenant: str
    user: str
    request: bytes


_LATE_TURN, _LATE_TURN_OF = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_LateTurn)


async def ping(channel: grpc.aio.Channel, dependency: str) -> None:
    """Raise Unavailable unless `channel` is connected or can be at once, TimeoutError if nobody refuses it either."""
    try:
        async with asyncio.timeout(0.8):
            await channel.channel_ready()
    except TimeoutError:
        if channel.get_state() is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise
        raise Unavailable(f"the {dependency} service cannot be reached", dependency=dependency) from None


def _moment(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)
