"""An answer told again from the books, for who asks with its idempotency key once its events are gone. Pure.

Its text, citations and receipt are what they were. Steps, thoughts, calls of tools and passages that are not cited are not kept, so they
are not told, and events have other numbers than they had.
"""

import hashlib
from dataclasses import replace

from services.chassis.errors import AnswerLogGone, DomainError, restore
from services.orchestrator.citations import CitationReader
from services.orchestrator.domain import Accepted, BookedAnswer, Citation, PassagesFound, TextDelta, Turn
from services.orchestrator.log import EventLog


def retold(booked: BookedAnswer, *, is_json: bool, uses_tools: bool) -> EventLog:
    """The log of an answer, whose request says whether it is JSON and uses tools: whole, or ended in what the answer failed of. If too
    little is kept of one that ended well, that is AnswerLogGone, which says how it had ended.
    """
    receipt, events = booked.receipt, EventLog(booked.receipt.answer_id)
    if (turn := booked.turn) is None or booked.status != "done" or receipt.finish_reason == "tool_use":
        events.end(_failure(booked))
        return events
    events.append(Accepted(receipt.answer_id, booked.session_id, receipt.trace_id, booked.created_at))
    events.append(PassagesFound(turn.passages))
    events.append(TextDelta(turn.text))
    reader = CitationReader(turn.passages)
    for cited in _citations(turn, reader, is_json=is_json, uses_tools=uses_tools):
        events.append(cited)
    receipt = replace(receipt, text_sha256=hashlib.sha256(turn.text.encode()).hexdigest())
    if not uses_tools:
        receipt = replace(receipt, groundedness=reader.groundedness, sentences_judged=reader.judged)
    events.append(receipt)
    events.end()
    return events


def _citations(turn: Turn, reader: CitationReader, *, is_json: bool, uses_tools: bool) -> list[Citation]:
    if is_json:
        return []  # `[1]` in JSON is an array
    found = reader.read(turn.text)
    # What tools had returned bore sentences out as well.
    return [replace(cited, support=None) for cited in found] if uses_tools else found


def _failure(booked: BookedAnswer) -> DomainError:
    answer_id = booked.receipt.answer_id
    if booked.status != "done":
        return restore(booked.error_reason, "", {"answer_id": answer_id}, "INTERNAL")
    return AnswerLogGone("the answer was done, but its words are no longer kept", answer_id=answer_id, outcome=booked.status)
