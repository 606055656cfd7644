"""The RPCs about sessions, turns and summaries. Validate, call, translate."""

from collections.abc import AsyncIterator
from uuid import UUID

from services.chassis.clock import Clock
from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal, current_principal
from services.chassis.telemetry import span
from services.ledger.domain import Session, Summary
from services.ledger.paging import moment_and_id, token_of
from services.ledger.ports import Conversations
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer
from tailrace.ledger.v1 import ledger_service_pb2 as pb

SESSION_CHARACTERS_MAX = 128
TURNS_SHOWN_MAX = 200
TITLE_CHARACTERS_MAX = 120
TURNS_DEFAULT = 20
PAGE = 100
"""Rows read at once; a reader that is slow holds no more than these."""


class ConversationRpcs:
    """Conversations of the calling user."""

    _conversations: Conversations
    _clock: Clock

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Writer) -> None:
        size, after = checks.size(request.page_size, 50, 1000), moment_and_id(request.page_token)
        with span("ledger.sessions"):
            page = await self._conversations.page(current_principal(), size=size, after=after)
        for place, session in enumerate(page.rows, 1):
            token = token_of(page.last) if place == len(page.rows) else ""
            await context.write(pb.ListSessionsResponse(session=messages.session_message(session), next_page_token=token))

    async def GetSession(self, request: pb.GetSessionRequest, _: object) -> pb.GetSessionResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        with span("ledger.session"):
            session, turns = await self._conversations.session(
                current_principal(), session_id, TURNS_SHOWN_MAX, all_branches=request.all_branches
            )
        return pb.GetSessionResponse(session=messages.session_message(session), turns=[messages.turn_message(turn) for turn in turns])

    async def ListTurns(self, request: pb.ListTurnsRequest, context: Writer) -> None:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        limit = checks.size(request.limit, TURNS_DEFAULT, TURNS_SHOWN_MAX, "limit")
        until = checks.uuid(request.until_answer_id, "until_answer_id") if request.until_answer_id else None
        principal, summary = current_principal(), None
        with span("ledger.turns"):
            if until is None:
                turns = await self._conversations.turns(principal, session_id, limit)
            else:
                turns = await self._conversations.turns_until(principal, session_id, until, limit)
            if request.with_summary and turns:
                summary = await self._conversations.summary(principal, session_id, UUID(turns[-1].answer_id))
        if summary is not None:
            await context.write(pb.ListTurnsResponse(summary=messages.summary_message(summary)))
        for turn in turns:
            await context.write(pb.ListTurnsResponse(turn=messages.turn_message(turn)))

    async def AppendTurn(self, request: pb.AppendTurnRequest, _: object) -> pb.AppendTurnResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        turn = messages.turn_value(request.turn, self._clock.now())
        replaces = checks.uuid(request.replaces, "replaces") if request.replaces else None
        asked_after = checks.uuid(request.asked_after, "asked_after") if request.asked_after else None
        with span("ledger.append_turn"):
            place, unsummarised = await self._conversations.append(current_principal(), session_id, turn, replaces, asked_after)
        return pb.AppendTurnResponse(ordinal=place, unsummarised=unsummarised)

    async def PutSummary(self, request: pb.PutSummaryRequest, _: object) -> pb.PutSummaryResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        summary = messages.summary_value(request.summary, self._clock.now())
        with span("ledger.put_summary"):
            await self._conversations.summarise(current_principal(), session_id, summary)
        return pb.PutSummaryResponse()

    async def UpdateSession(self, request: pb.UpdateSessionRequest, _: object) -> pb.UpdateSessionResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        title = None
        if request.HasField("title"):
            title = checks.prose(request.title, "title", TITLE_CHARACTERS_MAX).strip()
            if not title:
                raise RequestInvalid("the title is empty", field="title", bound=f"1-{TITLE_CHARACTERS_MAX} characters")
        suggested = bool(checks.text(request.suggested_by, "suggested_by", 128))
        head = checks.uuid(request.head_answer_id, "head_answer_id") if request.head_answer_id else None
        with span("ledger.update_session"):
            session = await self._conversations.update(current_principal(), session_id, title=title, suggested=suggested, head=head)
        return pb.UpdateSessionResponse(session=messages.session_message(session))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, _: object) -> pb.DeleteSessionResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        with span("ledger.delete_session"):
            await self._conversations.delete(current_principal(), session_id)
        return pb.DeleteSessionResponse()

    async def ExportSessions(self, request: pb.ExportSessionsRequest, context: Writer) -> None:
        session_id, owner = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX), current_principal()
        if session_id:
            with span("ledger.export_session"):
                session = await self._conversations.own_session(owner, session_id)
            async for response in self._records_of(owner, session):
                await context.write(response)
            return
        after = None
        while True:
            with span("ledger.export_sessions"):
                page = await self._conversations.page(owner, size=PAGE, after=after)
            for session in page.rows:
                async for response in self._records_of(owner, session):
                    await context.write(response)
            if page.last is None:
                return
            after = page.rows[-1].updated_at, page.rows[-1].session_id

    async def _records_of(self, owner: Principal, session: Session) -> AsyncIterator[pb.ExportSessionsResponse]:
        """A conversation, its turns, its summaries."""
        yield pb.ExportSessionsResponse(session=messages.session_message(session))
        place = 0
        while batch := await self._conversations.kept_turns(owner, session.session_id, place, PAGE):
            for _, turn in batch:
                kept = pb.SessionTurn(session_id=session.session_id, turn=messages.turn_message(turn))
                yield pb.ExportSessionsResponse(turn=kept)
            place = batch[-1][0]
        for summary in await self._conversations.kept_summaries(owner, session.session_id):
            yield pb.ExportSessionsResponse(summary=session_summary(session.session_id, summary))


def session_summary(session_id: str, summary: Summary) -> pb.SessionSummary:
    return pb.SessionSummary(session_id=session_id, summary=messages.summary_message(summary))
