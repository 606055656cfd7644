"""The turns of a conversation: those that a question leans on are read before it is answered, its own is kept afterwards.

What is done with their words, a rewritten question, a title, a summary, is not decided here.
"""

import asyncio
import random
from dataclasses import replace

import structlog

from services.chassis.errors import DeadlineTooShort, DomainError, NotFound, Overloaded, Unavailable
from services.chassis.telemetry import StepRecord
from services.orchestrator.compose import recent
from services.orchestrator.conversation import look_after
from services.orchestrator.domain import History, Summary, Turn
from services.orchestrator.run import Run
from services.orchestrator.standalone import depends_on_history

log = structlog.get_logger(__name__)

TURN_WAITS_S = (0.1, 0.2, 0.4)
"""How long a turn that is not there is waited for. One that somebody else has takes just as long as one that nobody has."""
TURN_TRIES_MAX = 16
TURN_WAIT_MAX_S = 30.0
"""Some minutes in all: the words of a turn wait in memory, so not for ever."""


async def read_history(run: Run, step: StepRecord) -> tuple[tuple[Turn, ...], str]:
    """The latest turns, and a summary of those before them, if the question leans on them. Then no cache is asked: the same words mean
    something else elsewhere. A question that takes the place of another is told what that one was told.
    """
    asked, turns_max = run.question, run.kit.limits.history_turns_max
    leans = turns_max > 0 and depends_on_history(asked.text)
    if asked.session_is_new or not (leans or asked.replaces):
        step.skip("new_session" if asked.session_is_new else "stands_alone")
        return (), ""
    # What no summary covers yet may be twice what is kept whole.
    history = await _history(run, 2 * turns_max + 1 if leans else 1)
    turns = history.turns
    if asked.replaces:
        *before, replaced = turns
        turns = tuple(before)
        step.note(replaces=True)
        if replaced.question == asked.text and not run.cache.reason:
            run.cache = replace(run.cache, reason="regenerated")  # who asks again wants no copy of what there is
    if not leans:
        return (), ""
    turns = recent(_told_whole(turns, history.summary, turns_max), run.kit.limits.history_bytes_max)
    step.note(turns=len(turns), summary=history.summary is not None)
    return turns, history.summary.text if history.summary is not None else ""


def _told_whole(turns: tuple[Turn, ...], summary: Summary | None, turns_max: int) -> tuple[Turn, ...]:
    """The turns that no summary covers, and the latest in any case; while there is no summary, not more than twice as many as those."""
    covered = [place for place, turn in enumerate(turns, 1) if summary is not None and turn.answer_id == summary.through]
    begin = min(covered[0] if covered else 0, max(0, len(turns) - turns_max))
    return turns[max(begin, len(turns) - 2 * turns_max) :]


async def _history(run: Run, limit: int) -> History:
    """As the ledger has it. Turns of answers that have ended here, or one that is to be replaced, may be on their way still: an answer's
    end does not wait long for its turn."""
    asked = run.question
    if under_way := run.kit.turns_under_way.get(run.conversation):
        await asyncio.wait(set(under_way), timeout=sum(TURN_WAITS_S))
    for wait_s in TURN_WAITS_S if asked.replaces else ():
        try:
            return await run.kit.ledger.history(asked.session_id, limit, asked.replaces, patient=True)
        except NotFound:
            await asyncio.sleep(wait_s)
    return await run.kit.ledger.history(asked.session_id, limit, asked.replaces, patient=True)


async def keep_turn(run: Run, *, complete: bool) -> None:
    """Keep the turn: the words go to the ledger on their own way. A follow-up that comes meanwhile waits for them; see `read_history`."""
    kept = asyncio.get_running_loop().create_future()
    under_way = run.kit.turns_under_way.setdefault(run.conversation, set())
    under_way.add(kept)
    try:
        run.turn_is_settled = await _append_turn(run, complete=complete)
        if run.turn_is_settled and run.turn_is_spooled:
            await _forget_turn(run)
    finally:
        kept.set_result(None)
        under_way.discard(kept)
        if not under_way:
            run.kit.turns_under_way.pop(run.conversation, None)


async def _append_turn(run: Run, *, complete: bool) -> bool:
    """Whether the ledger has the turn, or never will; what it was not there for in all these tries waits on disk, or is lost."""
    asked = run.question
    for tries in range(TURN_TRIES_MAX):
        try:
            turn = run.turn(complete=complete)
            kept = await run.kit.ledger.append_turn(asked.session_id, turn, asked.principal, asked.replaces, _asked_after(run))
            if complete:
                look_after(run, kept)
            return True
        except (Unavailable, DeadlineTooShort, Overloaded):
            await asyncio.sleep(random.uniform(0.1, min(TURN_WAIT_MAX_S, 0.25 * 2**tries)))  # noqa: S311 - jitter, not a secret
        except NotFound:
            log.info("conversation_deleted_meanwhile", answer_id=asked.answer_id)
            return True
        except DomainError as error:
            log.error("turn_rejected", answer_id=asked.answer_id, reason=error.reason)
            return True
    if not run.turn_is_spooled:
        log.error("turn_lost", answer_id=asked.answer_id, tries=TURN_TRIES_MAX)
    return False


def _asked_after(run: Run) -> str:
    """The latest turn that the conversation had, if it was read."""
    return run.turns[-1].answer_id if run.turns else ""


async def spool_turn(run: Run, *, complete: bool) -> None:
    """Make the turn durable that the ledger has not kept yet: `done` is not to promise more than a crash leaves."""
    if run.kit.late_turns is None or run.turn_is_settled:
        return
    run.turn_is_spooled = True
    try:
        await run.kit.late_turns.keep(run.question, run.turn(complete=complete), _asked_after(run))
    except DomainError as error:
        run.turn_is_spooled = False
        log.error("turn_not_durable", answer_id=run.question.answer_id, reason=error.reason)


async def _forget_turn(run: Run) -> None:
    assert run.kit.late_turns is not None
    try:
        await run.kit.late_turns.forget(run.question.answer_id)
    except DomainError as error:  # it is sent once more then, which changes nothing
        log.warning("late_turn_not_forgotten", answer_id=run.question.answer_id, reason=error.reason)
