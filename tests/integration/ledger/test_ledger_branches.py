"""Conversations as trees: regenerated and edited turns, summaries, titles, what is exported and what is gone."""

import asyncio
import uuid
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from services.chassis.errors import IdempotencyConflict, NotFound, RequestInvalid
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger.postgres_conversations import PostgresConversations
from services.ledger.postgres_database import opened
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger, attempt, operation


async def say(ledger: Ledger, who: Principal, question: str, *, session: str = "s1", replaces: str = "", answer_id: str = "") -> Any:
    """Keep a turn; return its answer's id."""
    turn = pb.Turn(answer_id=answer_id or str(uuid.uuid4()), question=question, text=f"to {question}", complete=True)
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=session, turn=turn, replaces=replaces), who)
    return turn.answer_id


async def branch(ledger: Ledger, who: Principal, *, session: str = "s1", limit: int = 0, until: str = "") -> list[str]:
    request = pb.ListTurnsRequest(session_id=session, limit=limit, until_answer_id=until)
    return [row.turn.question for row in await ledger.rows("ListTurns", request, who)]


async def shown(ledger: Ledger, who: Principal, *, session: str = "s1", all_branches: bool = False) -> Any:
    return await ledger.ask("GetSession", pb.GetSessionRequest(session_id=session, all_branches=all_branches), who)


async def summarise(ledger: Ledger, who: Principal, through: str, text: str, *, session: str = "s1") -> None:
    summary = pb.Summary(through_answer_id=through, text=text, made_by="rule")
    await ledger.ask("PutSummary", pb.PutSummaryRequest(session_id=session, summary=summary), who)


async def test_an_edited_turn_begins_a_branch_and_what_followed_stays_in_its_own(ledger: Ledger, ann: Principal) -> None:
    """The conversation goes on from the edit; the old turns are still there, each with what it follows."""
    first = await say(ledger, ann, "one")
    second = await say(ledger, ann, "two")
    third = await say(ledger, ann, "three")
    edited = await say(ledger, ann, "two, edited", replaces=second)
    last = await say(ledger, ann, "four")
    current, everything = await shown(ledger, ann), await shown(ledger, ann, all_branches=True)

    assert await branch(ledger, ann) == ["one", "two, edited", "four"]
    assert [turn.question for turn in current.turns] == ["one", "two, edited", "four"]
    assert current.session.head_answer_id == last
    assert current.session.turns == 5
    assert [(turn.answer_id, turn.parent_answer_id) for turn in everything.turns] == [
        (first, ""),
        (second, first),
        (third, second),
        (edited, first),
        (last, edited),
    ]
    assert await branch(ledger, ann, limit=2) == ["two, edited", "four"]


async def test_the_first_turn_can_be_replaced_too(ledger: Ledger, ann: Principal) -> None:
    """Then the branch begins with nothing before it."""
    first = await say(ledger, ann, "one")
    await say(ledger, ann, "two")
    again = await say(ledger, ann, "one again", replaces=first)

    assert await branch(ledger, ann) == ["one again"]
    await say(ledger, ann, "one, third time", replaces=again)
    assert await branch(ledger, ann) == ["one, third time"]


async def test_the_way_to_an_answer_is_read_whatever_is_current(ledger: Ledger, ann: Principal) -> None:
    """That is what a regenerated answer is told of the conversation, and the turn itself."""
    await say(ledger, ann, "one")
    second = await say(ledger, ann, "two")
    await say(ledger, ann, "three")
    await say(ledger, ann, "other two", replaces=second)

    assert await branch(ledger, ann, until=second) == ["one", "two"]
    with pytest.raises(NotFound):
        await branch(ledger, ann, until=str(uuid.uuid4()))


async def test_one_can_go_back_to_another_branch(ledger: Ledger, ann: Principal) -> None:
    """And go on from there."""
    await say(ledger, ann, "one")
    second = await say(ledger, ann, "two")
    await say(ledger, ann, "other two", replaces=second)
    back = await ledger.ask("UpdateSession", pb.UpdateSessionRequest(session_id="s1", head_answer_id=second), ann)
    await say(ledger, ann, "three")

    assert back.session.head_answer_id == second
    assert await branch(ledger, ann) == ["one", "two", "three"]
    with pytest.raises(NotFound):
        await ledger.ask("UpdateSession", pb.UpdateSessionRequest(session_id="s1", head_answer_id=str(uuid.uuid4())), ann)


async def test_the_same_answer_again_changes_nothing_and_what_it_replaces_must_be_there(ledger: Ledger, ann: Principal) -> None:
    """A repeated append makes no second branch; a foreign turn is an unknown one."""
    first = await say(ledger, ann, "one")
    elsewhere = await say(ledger, ann, "elsewhere", session="s2")
    again = str(uuid.uuid4())
    for _ in range(2):
        await say(ledger, ann, "one again", replaces=first, answer_id=again)

    assert (await shown(ledger, ann)).session.turns == 2
    for unknown in (elsewhere, str(uuid.uuid4())):
        with pytest.raises(NotFound):
            await say(ledger, ann, "x", replaces=unknown)
    with pytest.raises(IdempotencyConflict):
        await say(ledger, ann, "x", session="s2", answer_id=again)
    assert (await shown(ledger, ann)).session.turns == 2


async def test_many_answers_in_one_conversation_at_once_are_all_kept_in_one_line(ledger: Ledger, ann: Principal) -> None:
    """Each follows the one that was kept before it: none is lost in a branch that nobody asked for."""
    await asyncio.gather(*(say(ledger, ann, f"q{number}") for number in range(12)))

    assert sorted(await branch(ledger, ann)) == sorted(f"q{number}" for number in range(12))


async def test_turns_of_the_version_before_are_one_line_and_go_on(ledger: Ledger, ann: Principal) -> None:
    """A replica that has not been upgraded appends as ever; its turns have no parent and no head, and mean the one before."""
    connection = await asyncpg.connect(ledger.url)
    try:
        for question in ("one", "two"):
            row = await connection.fetchrow(
                "SELECT * FROM append_turn($1, $2, 's1', $3, $4, 'a', '[]', true, now())", ann.tenant, ann.user, uuid.uuid4(), question
            )
            assert row is not None
        await connection.execute("UPDATE turns SET parent = NULL WHERE tenant = $1", ann.tenant)
        await connection.execute("UPDATE sessions SET head = NULL WHERE tenant = $1", ann.tenant)
    finally:
        await connection.close()
    before = await branch(ledger, ann)
    await say(ledger, ann, "three")

    assert before == ["one", "two"]
    assert await branch(ledger, ann) == ["one", "two", "three"]
    assert [bool(turn.parent_answer_id) for turn in (await shown(ledger, ann)).turns] == [False, True, True]


async def test_a_summary_holds_for_every_branch_that_has_its_turn_and_for_no_other(ledger: Ledger, ann: Principal) -> None:
    """The one that reaches furthest along the way is read, first of all, and only if it is asked for."""
    ids = [await say(ledger, ann, f"q{number}") for number in range(4)]
    await summarise(ledger, ann, ids[0], "of one")
    await summarise(ledger, ann, ids[2], "of three")
    along = await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s1", with_summary=True), ann)
    plain = await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s1"), ann)
    await say(ledger, ann, "other q1", replaces=ids[1])
    beside = await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s1", with_summary=True), ann)

    assert (along[0].summary.text, along[0].summary.through_answer_id, along[0].HasField("turn")) == ("of three", ids[2], False)
    assert not plain[0].HasField("summary")
    assert beside[0].summary.text == "of one"
    with pytest.raises(NotFound):
        await summarise(ledger, ann, str(uuid.uuid4()), "x")
    with pytest.raises(RequestInvalid):
        await summarise(ledger, ann, ids[0], " ")


async def test_who_appends_hears_how_many_turns_no_summary_covers(ledger: Ledger, ann: Principal) -> None:
    """Along the branch alone."""

    async def append(replaces: str = "") -> tuple[str, int]:
        turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a")
        reply = await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s1", turn=turn, replaces=replaces), ann)
        return turn.answer_id, reply.unsummarised

    first, second, third = [await append() for _ in range(3)]
    await summarise(ledger, ann, second[0], "of two")
    fourth = await append()
    beside = await append(replaces=second[0])

    assert [first[1], second[1], third[1], fourth[1], beside[1]] == [1, 2, 3, 2, 2]


async def test_no_conversation_keeps_more_than_sixteen_summaries(ledger: Ledger, ann: Principal) -> None:
    """Those that reach furthest stay."""
    ids = [await say(ledger, ann, f"q{number}") for number in range(20)]
    for number, answer_id in enumerate(ids):
        await summarise(ledger, ann, answer_id, f"of {number}")
    records = await ledger.rows("ExportSessions", pb.ExportSessionsRequest(session_id="s1"), ann)

    assert [record.summary.summary.text for record in records if record.HasField("summary")] == [f"of {number}" for number in range(4, 20)]


async def test_a_title_is_the_first_question_until_somebody_gives_another(ledger: Ledger, ann: Principal) -> None:
    """A suggestion never undoes what the user chose, nor an earlier suggestion."""

    async def rename(title: str, by: str = "") -> tuple[str, str]:
        request = pb.UpdateSessionRequest(session_id="s1", title=title, suggested_by=by)
        session = (await ledger.ask("UpdateSession", request, ann)).session
        return session.title, session.title_by

    await say(ledger, ann, "Which port, please? " + "x" * 200)
    by_rule = (await shown(ledger, ann)).session

    assert (by_rule.title, by_rule.title_by) == ("Which port, please? " + "x" * 100, "rule")
    assert await rename("Ports", "claude") == ("Ports", "model")
    assert await rename("Other", "claude") == ("Ports", "model")
    assert await rename("My ports") == ("My ports", "user")
    assert await rename("Other", "claude") == ("My ports", "user")
    for wrong in ("", " ", "x" * 121):
        with pytest.raises(RequestInvalid):
            await rename(wrong)


async def test_a_deleted_conversation_is_gone_and_its_money_stays(ledger: Ledger, ann: Principal) -> None:
    """Also its id in the operations; the next question under the same id begins anew."""
    kept = await say(ledger, ann, "secret question")
    await say(ledger, ann, "other", session="s2")
    await summarise(ledger, ann, kept, "secret summary")
    await ledger.record(operation(ann, kept, session_id="s1"))
    await ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id="s1"), ann)
    record = await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=kept, with_turn=True), ann)
    listed = await ledger.rows("ListSessions", pb.ListSessionsRequest(), ann)

    assert [row.session.session_id for row in listed] == ["s2"]
    assert (record.operation.session_id, record.HasField("turn")) == ("", False)
    assert await branch(ledger, ann) == []
    for method, request in (
        ("DeleteSession", pb.DeleteSessionRequest(session_id="s1")),
        ("GetSession", pb.GetSessionRequest(session_id="s1")),
    ):
        with pytest.raises(NotFound):
            await ledger.ask(method, request, ann)
    await say(ledger, ann, "anew")
    assert await branch(ledger, ann) == ["anew"]


async def test_everything_is_exported_conversation_by_conversation(ledger: Ledger, ann: Principal, bob: Principal) -> None:
    """All branches and summaries, more than a page of turns, nothing of others."""
    first = await say(ledger, ann, "one")
    await say(ledger, ann, "one again", replaces=first)
    await summarise(ledger, ann, first, "of one")
    for number in range(105):
        await say(ledger, ann, f"q{number}", session="s2")
    await say(ledger, bob, "bob's")
    everything = await ledger.rows("ExportSessions", pb.ExportSessionsRequest(), ann)
    one = await ledger.rows("ExportSessions", pb.ExportSessionsRequest(session_id="s1"), ann)
    kinds = [record.WhichOneof("record") for record in everything]

    assert kinds == ["session", *["turn"] * 105, "session", "turn", "turn", "summary"]
    assert [record.turn.turn.question for record in everything[1:106]] == [f"q{number}" for number in range(105)]
    assert [record.turn.turn.question for record in one[1:3]] == ["one", "one again"]
    assert not any("bob" in str(record) for record in everything)
    with pytest.raises(NotFound):
        await ledger.rows("ExportSessions", pb.ExportSessionsRequest(session_id="s3"), ann)


async def test_a_foreign_conversation_is_an_unknown_one(ledger: Ledger, ann: Principal, bob: Principal, stranger: Principal) -> None:
    """For another user of the tenant, for an admin of another one, and for one's own admin where it would change something."""
    kept = await say(ledger, ann, "one")
    boss = Principal(ann.tenant, "boss", frozenset({"user", "admin"}))
    requests: list[tuple[str, Any]] = [
        ("UpdateSession", pb.UpdateSessionRequest(session_id="s1", title="mine")),
        ("UpdateSession", pb.UpdateSessionRequest(session_id="s1", head_answer_id=kept)),
        ("DeleteSession", pb.DeleteSessionRequest(session_id="s1")),
        ("PutSummary", pb.PutSummaryRequest(session_id="s1", summary=pb.Summary(through_answer_id=kept, text="x", made_by="y"))),
        (
            "AppendTurn",
            pb.AppendTurnRequest(session_id="s1", turn=pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a"), replaces=kept),
        ),
    ]
    for other in (bob, stranger, boss):
        for method, request in requests:
            with pytest.raises(NotFound):
                await ledger.ask(method, request, other)
        with pytest.raises(NotFound):
            await ledger.rows("ExportSessions", pb.ExportSessionsRequest(session_id="s1"), other)
        with pytest.raises(NotFound):
            await branch(ledger, other, until=kept)

    assert await branch(ledger, ann) == ["one"]
    assert (await shown(ledger, ann)).session.title == "one"


async def test_summaries_go_with_the_user_and_are_exported_with_them(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What is kept in short is kept all the same."""
    kept = await say(ledger, ann, "one")
    await summarise(ledger, ann, kept, "of one")
    records = await ledger.rows("ExportUser", pb.ExportUserRequest(user="ann"), boss)
    await ledger.ask("EraseUser", pb.EraseUserRequest(user="ann"), boss)
    connection = await asyncpg.connect(ledger.url)
    try:
        left = await connection.fetchval("SELECT count(*) FROM summaries WHERE tenant = $1", ann.tenant)
    finally:
        await connection.close()

    assert [record.WhichOneof("record") for record in records] == ["user", "session", "turn", "summary"]
    assert records[-1].summary.summary.text == "of one"
    assert left == 0


async def test_an_operation_says_what_it_was_for(ledger: Ledger, ann: Principal) -> None:
    """If it was not for an answer; and nothing else can be said."""
    titled, answered = operation(ann, purpose="title", tier=""), operation(ann)
    wrong = operation(ann, purpose="fun")
    acks = await ledger.record(titled, answered, wrong, titled)
    found = {
        row.operation.operation_id: row.operation.purpose for row in await ledger.rows("ListOperations", pb.ListOperationsRequest(), ann)
    }

    assert [bool(ack.rejected_reason) for ack in acks] == [False, False, True, False]
    assert acks[3].duplicate
    assert found == {titled.operation_id: "title", answered.operation_id: ""}


async def test_usage_tells_answers_from_small_work_and_shadows(ledger: Ledger, ann: Principal) -> None:
    """Alone, and beside model and step; what is summed is what the operations say."""
    written = [operation(ann), operation(ann), operation(ann, purpose="title", tier=""), operation(ann, purpose="shadow")]
    assert not any(ack.rejected_reason for ack in await ledger.record(*written))

    async def used(*group_by: str) -> dict[tuple[str, ...], tuple[int, int]]:
        rows = await ledger.rows("QueryUsage", pb.QueryUsageRequest(group_by=group_by), ann)
        return {tuple(row.group[name] for name in group_by): (row.operations, row.cost_nanousd) for row in rows}

    cost = {each.purpose: each.cost_nanousd for each in written}
    expected = {("answer",): (2, 2 * cost[""]), ("title",): (1, cost["title"]), ("shadow",): (1, cost["shadow"])}

    assert await used("purpose") == expected
    assert await used("purpose", "model") == {(purpose, written[0].model): figures for (purpose,), figures in expected.items()}
    by_step = await used("step", "purpose")
    assert {purpose for _, purpose in by_step} == {"answer", "title", "shadow"}
    assert sum(cost for _, cost in by_step.values()) == sum(each.cost_nanousd for each in written)


async def test_a_turn_of_a_conversation_that_was_deleted_is_not_kept(ledger: Ledger, ann: Principal) -> None:
    """It was asked in one that had turns: it would begin it anew. While that is there, it may be asked after any of its turns."""
    first, second, late = (str(uuid.uuid4()) for _ in range(3))

    async def append(answer_id: str, asked_after: str = "") -> pb.AppendTurnResponse:
        turn = pb.Turn(answer_id=answer_id, question="q", text="a", complete=True)
        return await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s9", turn=turn, asked_after=asked_after), ann)

    await append(first)
    await append(second, first)
    again = await append(second, first)
    await ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id="s9"), ann)
    with pytest.raises(NotFound):
        await append(late, second)
    left = await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s9", limit=10), ann)
    anew = await append(late)

    assert (again.ordinal, left, anew.ordinal) == (2, [], 1)


async def test_what_was_asked_before_a_conversation_was_deleted_does_not_begin_it_anew(
    ledger: Ledger, ann: Principal, bob: Principal
) -> None:
    """Two first answers, and a question that names no turn; what is asked afterwards does, and so does anybody else's."""
    asked_at, session_id = datetime.now(UTC), "s10"

    async def append(who: Principal, created_at: datetime) -> int:
        turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a", complete=True, created_at=timestamp(created_at))
        return (await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=session_id, turn=turn), who)).ordinal

    await append(ann, asked_at)
    await ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id=session_id), ann)
    with pytest.raises(NotFound):
        await append(ann, asked_at)
    assert await branch(ledger, ann, session=session_id) == []

    assert [await append(bob, asked_at), await append(ann, datetime.now(UTC))] == [1, 1]


async def test_a_turn_that_waits_while_its_conversation_is_deleted_is_not_kept(ledger: Ledger, ann: Principal) -> None:
    """It waits for the same lock, looks once it has it, and sees what happened meanwhile."""
    asked_at = datetime.now(UTC)
    await say(ledger, ann, "q", session="s11")
    connection = await asyncpg.connect(ledger.url)
    try:
        async with connection.transaction():
            assert await connection.fetchval("SELECT delete_session($1, $2, 's11')", ann.tenant, ann.user)
            turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="a", complete=True, created_at=timestamp(asked_at))
            late = asyncio.create_task(ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s11", turn=turn), ann))
            record = asyncio.create_task(ledger.record(first := operation(ann, session_id="s11", created_at=timestamp(asked_at))))
            await until_waiting(ledger.url, 2)
        with pytest.raises(NotFound):
            await late
        await record
    finally:
        await connection.close()

    assert await branch(ledger, ann, session="s11") == []
    assert await session_of(ledger, ann, first.operation_id) == ""


async def test_a_record_that_is_being_written_loses_the_session_that_is_deleted_meanwhile(ledger: Ledger, ann: Principal) -> None:
    """Deleting waits for it. Sent again, it is what it was; and one that comes later is booked without the session from the start."""
    asked_at = datetime.now(UTC)
    await say(ledger, ann, "q", session="s12")
    records = [operation(ann, session_id="s12", created_at=timestamp(asked_at), attempts=[attempt()]) for _ in range(3)]
    connection = await asyncpg.connect(ledger.url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM users WHERE tenant = $1 AND user_id = $2 FOR KEY SHARE", ann.tenant, ann.user)
            deleting = asyncio.create_task(ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id="s12"), ann))
            await until_waiting(ledger.url, 1)
            assert not deleting.done()
        await deleting
    finally:
        await connection.close()
    acks = [*await ledger.record(records[0]), *await ledger.record(records[1], records[2]), *await ledger.record(records[0])]

    assert [(ack.duplicate, ack.rejected_reason) for ack in acks] == [(False, ""), (False, ""), (False, ""), (True, "")]
    assert {await session_of(ledger, ann, record.operation_id) for record in records} == {""}


async def test_deletions_are_forgotten_after_a_day(ledger: Ledger, ann: Principal) -> None:
    """Then nothing of what was deleted can be on its way any more."""
    for session_id in ("s13", "s14"):
        await say(ledger, ann, "q", session=session_id)
        await ledger.ask("DeleteSession", pb.DeleteSessionRequest(session_id=session_id), ann)
    async with opened(ledger.url, connections_max=1, wait_s=5) as database:
        await database.run(
            lambda connection: connection.execute(
                "UPDATE deleted_sessions SET deleted_at = now() - interval '25 hours' WHERE digest = digest_of_session($1, $2, 's13')",
                ann.tenant,
                ann.user,
            )
        )
        forgotten = await PostgresConversations(database).forget_deletions()
        left = await database.value("SELECT count(*) FROM deleted_sessions WHERE tenant = $1", ann.tenant)

    assert (forgotten, left) == (1, 1)


async def session_of(ledger: Ledger, who: Principal, operation_id: str) -> str:
    return str((await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=operation_id), who)).operation.session_id)


async def until_waiting(url: str, waiting: int) -> None:
    """Until so many connections to the database wait for a lock."""
    connection = await asyncpg.connect(url)
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        async with asyncio.timeout(10):
            while await connection.fetchval(query) < waiting:  # noqa: ASYNC110 - what is waited for is in the database
                await asyncio.sleep(0.01)
    finally:
        await connection.close()
