"""The RPCs about sessions and turns. Validate, call, translate."""

from services.chassis.clock import Clock
from services.chassis.principal import current_principal
from services.chassis.telemetry import span
from services.ledger.paging import moment_and_id, token_of
from services.ledger.ports import Conversations
from services.ledger.rpc import checks, messages
from services.ledger.rpc.callers import Writer
from tailrace.ledger.v1 import ledger_service_pb2 as pb

SESSION_CHARACTERS_MAX = 128
TURNS_SHOWN_MAX = 200
TURNS_DEFAULT = 20


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
            session, turns = await self._conversations.session(current_principal(), session_id, TURNS_SHOWN_MAX)
        return pb.GetSessionResponse(session=messages.session_message(session), turns=[messages.turn_message(turn) for turn in turns])

    async def ListTurns(self, request: pb.ListTurnsRequest, context: Writer) -> None:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        limit = checks.size(request.limit, TURNS_DEFAULT, TURNS_SHOWN_MAX, "limit")
        with span("ledger.turns"):
            turns = await self._conversations.turns(current_principal(), session_id, limit)
        for turn in turns:
            await context.write(pb.ListTurnsResponse(turn=messages.turn_message(turn)))

    async def AppendTurn(self, request: pb.AppendTurnRequest, _: object) -> pb.AppendTurnResponse:
        session_id = checks.text(request.session_id, "session_id", SESSION_CHARACTERS_MAX, empty=False)
        turn = messages.turn_value(request.turn, self._clock.now())
        with span("ledger.append_turn"):
            return pb.AppendTurnResponse(ordinal=await self._conversations.append(current_principal(), session_id, turn))
