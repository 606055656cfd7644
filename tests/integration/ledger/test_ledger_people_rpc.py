"""Users, plans, subscriptions, budgets, prices, keys and conversations through a channel."""

import asyncio
import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from services.chassis import api_key
from services.chassis.errors import DomainError, IdempotencyConflict, NotAllowed, NotAuthenticated, NotFound, PriceUnknown, RequestInvalid
from services.chassis.principal import Principal
from services.chassis.wire import timestamp
from services.ledger import postgres_people, postgres_prices
from tailrace.common.v1 import common_pb2
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import RECORDER, Ledger, SetClock, operation, running

TEAM = pb.Plan(
    name="team", requests_per_minute=7, tokens_per_minute=70, concurrent_answers=3, monthly_budget_nanousd=0, tiers=["fast", "smart"]
)


def put_plan(**figures: Any) -> pb.PutPlanRequest:
    """A good plan but for `figures`."""
    plan = pb.Plan(**figures)
    plan.MergeFrom(TEAM)
    return pb.PutPlanRequest(plan=plan)


async def plan_of(ledger: Ledger, principal: Principal) -> pb.Plan:
    plan: pb.Plan = (await ledger.ask("GetEntitlements", pb.GetEntitlementsRequest(), principal)).plan
    return plan


async def test_everybody_starts_on_the_free_plan(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """First sight makes a user, many first sights at once make one."""
    plans = await asyncio.gather(*(plan_of(ledger, ann) for _ in range(10)))
    users = await ledger.rows("ListUsers", pb.ListUsersRequest(), boss)

    assert {plan.name for plan in plans} == {"free"}
    assert [(row.user.user, row.user.plan) for row in users] == [("ann", "free")]


async def test_a_subscription_changes_the_plan_at_once_and_its_end_changes_it_back(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """What an admin puts is in force with the next question."""
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="pro"), boss)
    seen = (await ledger.ask("GetSubscription", pb.GetSubscriptionRequest(), ann)).subscription

    assert (seen.user, seen.plan) == ("ann", "pro")
    assert (await plan_of(ledger, ann)).name == "pro"
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="enterprise"), boss)
    assert (await ledger.ask("GetSubscription", pb.GetSubscriptionRequest(user="ann"), boss)).subscription.plan == "enterprise"
    for _ in range(2):
        await ledger.ask("DeleteSubscription", pb.DeleteSubscriptionRequest(user="ann"), boss)
        assert (await plan_of(ledger, ann)).name == "free"


async def test_a_tenants_plan_is_its_own(ledger: Ledger, ann: Principal, boss: Principal, stranger: Principal) -> None:
    """An admin may replace a common plan for the own tenant; no other tenant notices."""
    mine = pb.Plan()
    mine.CopyFrom(TEAM)
    mine.name = "free"
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=TEAM), boss)
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=mine), boss)

    assert await plan_of(ledger, ann) == mine
    assert (await plan_of(ledger, stranger)).requests_per_minute == 600
    names = {
        caller.user: [row.plan.name for row in await ledger.rows("ListPlans", pb.ListPlansRequest(), caller)] for caller in (ann, stranger)
    }
    assert names == {"ann": ["enterprise", "free", "pro", "team"], "eve": ["enterprise", "free", "pro"]}
    with pytest.raises(NotFound):
        await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="eve", plan="team"), stranger)


async def test_a_plan_says_which_tools_its_answers_may_use(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """As put, each once, in force with the next question; what is no name of a tool is refused."""
    assert list((await plan_of(ledger, ann)).tools) == ["calculator", "current_time", "search_documents"]
    await ledger.ask("PutPlan", put_plan(tools=["calculator", "github__*", "calculator"]), boss)
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="team"), boss)
    assert list((await plan_of(ledger, ann)).tools) == ["calculator", "github__*"]
    await ledger.ask("PutPlan", put_plan(), boss)
    assert list((await plan_of(ledger, ann)).tools) == []
    for wrong in (["a b"], [""], ["*__*"], ["calc*"], ["x" * 65], ["a"] * 65):
        with pytest.raises(RequestInvalid) as raised:
            await ledger.ask("PutPlan", put_plan(tools=wrong), boss)
        assert raised.value.field == "plan.tools"


async def test_a_plan_says_whom_cached_answers_are_shared_with(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """In force with the next question; a plan that does not say leaves it to the orchestrator; any other word is refused."""
    assert (await plan_of(ledger, ann)).cache_scope == "tenant"
    for scope in ("user", "off", "tenant", ""):
        await ledger.ask("PutPlan", put_plan(cache_scope=scope), boss)
        await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="team"), boss)
        assert (await plan_of(ledger, ann)).cache_scope == scope
    with pytest.raises(RequestInvalid) as raised:
        await ledger.ask("PutPlan", put_plan(cache_scope="everybody"), boss)
    assert raised.value.field == "plan.cache_scope"


async def test_a_plan_keeps_the_limits_of_tenant_and_keys_and_its_deadline(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """Each figure in its own place, in force with the next question, listed as put, and taken back by a plan without them."""
    plan = pb.Plan()
    plan.CopyFrom(TEAM)
    plan.tenant_limits.CopyFrom(pb.Limits(requests_per_minute=10_000_000, tokens_per_minute=100_000_000_000, concurrent_answers=100_000))
    plan.key_limits.CopyFrom(pb.Limits(requests_per_minute=1, tokens_per_minute=2, concurrent_answers=3))
    plan.answer_deadline_ms = 3_000_000
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=plan), boss)
    await ledger.ask("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="team"), boss)

    assert await plan_of(ledger, ann) == plan
    assert plan in [row.plan for row in await ledger.rows("ListPlans", pb.ListPlansRequest(), boss)]
    await ledger.ask("PutPlan", pb.PutPlanRequest(plan=TEAM), boss)
    assert await plan_of(ledger, ann) == TEAM


async def test_users_are_listed_in_pages(ledger: Ledger, boss: Principal) -> None:
    """Every user once, by id; names are kept and changed."""
    for name in ("carl", "anna", "bert"):
        await ledger.ask("PutUser", pb.PutUserRequest(user=name, display_name=name.title()), boss)
    await ledger.ask("PutUser", pb.PutUserRequest(user="bert", display_name="Bertha"), boss)
    first = await ledger.rows("ListUsers", pb.ListUsersRequest(page_size=2), boss)
    second = await ledger.rows("ListUsers", pb.ListUsersRequest(page_size=2, page_token=first[-1].next_page_token), boss)

    assert [row.user.display_name for row in (*first, *second)] == ["Anna", "Bertha", "Carl"]
    assert second[-1].next_page_token == ""


async def test_budgets_are_set_shown_changed_and_taken_away(ledger: Ledger, boss: Principal, stranger: Principal) -> None:
    """One budget a period; each ends with its period in UTC; a foreign tenant's name is unknown."""
    for period, limit in (("day", 5), ("month", 50), ("month", 60)):
        await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="tenant", period=period, limit_nanousd=limit), boss)
    seen = (await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope="tenant", subject=boss.tenant), boss)).budgets

    assert [(budget.period, budget.limit_nanousd, budget.subject) for budget in seen] == [
        ("day", 5, boss.tenant),
        ("month", 60, boss.tenant),
    ]
    now = datetime.now(UTC)
    assert now < seen[0].resets_at.ToDatetime(tzinfo=UTC) <= now + timedelta(days=1)
    assert seen[1].resets_at.ToDatetime(tzinfo=UTC).day == 1
    with pytest.raises(NotFound):
        await ledger.ask("GetBudgets", pb.GetBudgetsRequest(scope="tenant", subject=boss.tenant), stranger)
    await ledger.ask("DeleteBudget", pb.DeleteBudgetRequest(scope="tenant", period="day"), boss)
    await ledger.ask("DeleteBudget", pb.DeleteBudgetRequest(scope="tenant"), boss)
    with pytest.raises(NotFound):
        await ledger.ask("DeleteBudget", pb.DeleteBudgetRequest(scope="tenant"), boss)
    with pytest.raises(NotFound):
        await ledger.ask("PutBudget", pb.PutBudgetRequest(scope="key", subject="nobodys", period="day"), boss)


async def test_a_price_that_says_nothing_of_cached_tokens_does_not_make_them_free(ledger: Ledger, boss: Principal) -> None:
    """They cost as others of the prompt do; what is explicitly nothing stays nothing."""
    silent = common_pb2.Price(provider="local", model=f"m-{boss.tenant}", input_nanousd_per_mtok=7, output_nanousd_per_mtok=0)
    told = (await ledger.ask("PutPrice", pb.PutPriceRequest(price=silent), boss)).price
    silent.cache_read_nanousd_per_mtok = 0
    free = (await ledger.ask("PutPrice", pb.PutPriceRequest(price=silent), boss)).price

    assert (told.cache_read_nanousd_per_mtok, told.cache_write_5m_nanousd_per_mtok, told.cache_write_1h_nanousd_per_mtok) == (7, 7, 7)
    assert (told.output_nanousd_per_mtok, free.cache_read_nanousd_per_mtok, free.cache_write_1h_nanousd_per_mtok) == (0, 0, 7)


async def test_a_new_price_is_a_new_version_and_holds_keep_theirs(
    ledger: Ledger, ann: Principal, boss: Principal, stranger: Principal
) -> None:
    """Nothing is changed in place: what was reserved at a price is settled at it, what comes after pays the new one."""
    price = common_pb2.Price(provider="local", model=f"m-{ann.tenant}", input_nanousd_per_mtok=10**9, output_nanousd_per_mtok=10**9)
    with pytest.raises(PriceUnknown):
        await ledger.reserve(ann, provider="local", model=price.model)
    first = (await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)).price
    held = await ledger.reserve(ann, provider="local", model=price.model)
    price.input_nanousd_per_mtok = 5 * 10**9
    second = (await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)).price
    same = (await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)).price
    dearer = await ledger.reserve(ann, provider="local", model=price.model)
    usage = common_pb2.Usage(input_tokens=1000)
    costs = [(await ledger.ask("Settle", pb.SettleRequest(hold_id=hold.hold_id, usage=usage), ann)).cost_nanousd for hold in (held, dearer)]

    assert (first.version, second.version, same.version) == (1, 2, 2)
    assert costs == [1_000_000, 5_000_000]
    listed = {row.price.model: row.price.version for row in await ledger.rows("ListPrices", pb.ListPricesRequest(), ann)}
    assert listed[price.model] == 2
    assert listed["claude-sonnet-5-5"] == 2
    assert price.model not in {row.price.model for row in await ledger.rows("ListPrices", pb.ListPricesRequest(), stranger)}
    with pytest.raises(PriceUnknown):
        await ledger.reserve(stranger, provider="local", model=price.model)


async def test_a_price_at_which_a_call_could_cost_more_than_can_be_counted_is_refused(ledger: Ledger, boss: Principal) -> None:
    """Cached tokens of a long prompt pay in proportion to plain ones: with those nearly free, what they cost has no bound of its own."""
    price = common_pb2.Price(provider="local", model=f"m-{boss.tenant}", input_nanousd_per_mtok=1, output_nanousd_per_mtok=0)
    price.cache_write_1h_nanousd_per_mtok = price.long_input_nanousd_per_mtok = price.long_output_nanousd_per_mtok = 10**13
    price.long_context_above_tokens = 1
    with pytest.raises(RequestInvalid) as refused:
        await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)
    price.input_nanousd_per_mtok = 10**13

    assert refused.value.field == "price.long_input_nanousd_per_mtok"
    assert (await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)).price.version == 1


async def test_a_price_for_a_snapshot_itself_is_found_at_every_replica(ledger: Ledger, ann: Principal, boss: Principal) -> None:
    """One that goes by the price of its family hears within seconds that the snapshot has one of its own."""
    model = f"m-{ann.tenant}"
    price = common_pb2.Price(provider="local", model=model, input_nanousd_per_mtok=10**9, output_nanousd_per_mtok=10**9)
    await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)
    clock = SetClock(datetime.now(UTC))
    async with running(ledger.url, clock) as other:
        of_family = await other.reserve(ann, provider="local", model=f"{model}-20260801")
        price.model, price.input_nanousd_per_mtok = f"{model}-20260801", 5 * 10**9
        await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)
        clock.moment = datetime.now(UTC) + timedelta(seconds=6)
        of_snapshot = await other.reserve(ann, provider="local", model=f"{model}-20260801")

    assert [hold.price.model for hold in (of_family, of_snapshot)] == [model, f"{model}-20260801"]
    assert of_snapshot.price.input_nanousd_per_mtok == 5 * 10**9


async def test_a_key_made_before_keys_had_a_checksum_goes_on(ledger: Ledger, boss: Principal) -> None:
    """Whole as it was; a new one without its checksum is no old one."""
    made = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="bot", user="robot", roles=["user"]), boss)
    old = made.secret[:-6]
    with pytest.raises(NotAuthenticated):
        await ledger.ask("ResolveApiKey", pb.ResolveApiKeyRequest(secret=old), RECORDER)
    connection = await asyncpg.connect(ledger.url)
    try:
        digest = hashlib.sha256(old.encode()).digest()
        await connection.execute("UPDATE api_keys SET secret_sha256 = $2 WHERE key_id = $1", made.key.key_id, digest)
    finally:
        await connection.close()

    assert (await ledger.ask("ResolveApiKey", pb.ResolveApiKeyRequest(secret=old), RECORDER)).principal.user == "robot"


async def test_an_api_key_acts_as_its_user_until_it_ends(ledger: Ledger, boss: Principal, stranger: Principal) -> None:
    """The secret is shown once and kept hashed; wrong, revoked and foreign ones open nothing."""
    made = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="bot", user="robot", roles=["user"]), boss)
    found = (await ledger.ask("ResolveApiKey", pb.ResolveApiKeyRequest(secret=made.secret), RECORDER)).principal

    assert made.secret.startswith(f"trk_{made.key.key_id}_")
    assert (found.tenant, found.user, list(found.roles), found.api_key_id) == (boss.tenant, "robot", ["user"], made.key.key_id)
    altered = made.secret[:-1] + ("A" if made.secret[-1] != "A" else "B")
    for wrong in (altered, "trk_", f"trk_{'0' * 16}_{'A' * 43}", api_key.sealed(f"trk_{'0' * 16}_{'A' * 43}"), made.secret[:-6], "x"):
        with pytest.raises(NotAuthenticated) as refused:
            await ledger.ask("ResolveApiKey", pb.ResolveApiKeyRequest(secret=wrong), RECORDER)
        assert refused.value.metadata["cause"] == "unknown"
    with pytest.raises(NotFound):
        await ledger.ask("RevokeApiKey", pb.RevokeApiKeyRequest(key_id=made.key.key_id), stranger)
    await ledger.ask("RevokeApiKey", pb.RevokeApiKeyRequest(key_id=made.key.key_id), boss)
    with pytest.raises(NotAuthenticated):
        await ledger.ask("ResolveApiKey", pb.ResolveApiKeyRequest(secret=made.secret), RECORDER)
    [row] = await ledger.rows("ListApiKeys", pb.ListApiKeysRequest(), boss)
    assert (row.key.key_id, row.key.name, row.key.revoked) == (made.key.key_id, "bot", True)
    assert made.secret not in str(row)
    default = await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="svc", user="robot"), boss)
    assert list(default.key.roles) == ["service"]


async def test_keys_are_listed_a_page_at_a_time(ledger: Ledger, boss: Principal, stranger: Principal) -> None:
    """Oldest first, each once, and the last page says that it is."""
    made = [await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name=f"key {n}", user="robot"), boss) for n in range(5)]
    await ledger.ask("CreateApiKey", pb.CreateApiKeyRequest(name="theirs", user="robot"), stranger)
    pages, token = [], ""
    while not pages or token:
        rows = await ledger.rows("ListApiKeys", pb.ListApiKeysRequest(page_size=2, page_token=token), boss)
        pages.append([row.key.key_id for row in rows])
        token = rows[-1].next_page_token
    whole = await ledger.rows("ListApiKeys", pb.ListApiKeysRequest(), boss)

    assert [len(page) for page in pages] == [2, 2, 1]
    assert [key_id for page in pages for key_id in page] == [key.key.key_id for key in made] == [row.key.key_id for row in whole]
    assert whole[-1].next_page_token == ""
    with pytest.raises(RequestInvalid):
        await ledger.rows("ListApiKeys", pb.ListApiKeysRequest(page_size=1001), boss)


async def test_lists_without_pages_are_kept_short(ledger: Ledger, boss: Principal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan or a priced model too many is refused; those that are there can still be changed."""
    monkeypatch.setattr(postgres_people, "PLANS_OF_TENANT_MAX", 2)
    monkeypatch.setattr(postgres_prices, "MODELS_OF_TENANT_MAX", 2)

    def plan(n: int, limit: int = 1) -> pb.PutPlanRequest:
        made = pb.PutPlanRequest(plan=TEAM)
        made.plan.name, made.plan.requests_per_minute = f"own-{n}", limit
        return made

    async def put(n: int, limit: int = 1) -> None:
        await ledger.ask("PutPlan", plan(n, limit), boss)
        price = common_pb2.Price(provider="p", model=f"m-{n}", input_nanousd_per_mtok=limit, output_nanousd_per_mtok=1)
        await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)

    await put(1)
    await put(2)
    await put(2, limit=7)
    with pytest.raises(RequestInvalid) as refused_plan:
        await ledger.ask("PutPlan", plan(3), boss)
    with pytest.raises(RequestInvalid) as refused_price:
        price = common_pb2.Price(provider="p", model="m-3", input_nanousd_per_mtok=1, output_nanousd_per_mtok=1)
        await ledger.ask("PutPrice", pb.PutPriceRequest(price=price), boss)

    assert (refused_plan.value.field, refused_price.value.field) == ("plan.name", "price.model")


async def test_turns_are_numbered_once_each(ledger: Ledger, ann: Principal) -> None:
    """Turns that come at once get different places; the same answer again keeps its own."""
    turns = [pb.Turn(answer_id=str(uuid.uuid4()), question=f"question {n}", text=f"answer {n}", complete=True) for n in range(12)]
    requests = [pb.AppendTurnRequest(session_id="s1", turn=turn) for turn in turns for _ in range(3)]
    places = [answer.ordinal for answer in await asyncio.gather(*(ledger.ask("AppendTurn", request, ann) for request in requests))]

    assert sorted(set(places)) == list(range(1, 13))
    assert all(len(set(places[n : n + 3])) == 1 for n in range(0, 36, 3))
    latest = await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s1", limit=5), ann)
    by_place = dict(zip(places[::3], turns, strict=True))
    assert [row.turn.question for row in latest] == [by_place[place].question for place in range(8, 13)]
    with pytest.raises(IdempotencyConflict):
        await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="other", turn=turns[0]), ann)


async def test_a_conversation_comes_back_as_it_was_kept(ledger: Ledger, ann: Principal, bob: Principal, boss: Principal) -> None:
    """Texts, citations and order are kept whole; a session's id belongs to its user, so another's is another."""
    cited = common_pb2.CitedPassage(
        number=1,
        document_id="d",
        chunk_id="c",
        title="T",
        text="Ü\n",
        start=2,
        end=9,
        score=0.5,
        heading_path=["a", "b"],
        document_version=3,
    )
    answer_id = str(uuid.uuid4())
    turn = pb.Turn(answer_id=answer_id, question="Why?" * 50, text="Because [1].\x00", citations=[cited], complete=True)
    turn.created_at.GetCurrentTime()
    turn.created_at.FromMicroseconds(turn.created_at.ToMicroseconds())
    await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id="s", turn=turn), ann)
    await ledger.record(operation(ann, answer_id, session_id="s"))
    turn.text = "Because [1].\ufffd"  # NUL is the one character that cannot be kept
    seen = await ledger.ask("GetSession", pb.GetSessionRequest(session_id="s"), ann)
    told = await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=answer_id, with_turn=True), ann)

    assert list(seen.turns) == [turn]
    assert told.turn == turn
    assert (seen.session.title, seen.session.turns) == (("Why?" * 50)[:120], 1)
    assert (await ledger.ask("GetSession", pb.GetSessionRequest(session_id="s"), boss)).session == seen.session
    assert await ledger.rows("ListTurns", pb.ListTurnsRequest(session_id="s"), bob) == []
    assert await ledger.rows("ListSessions", pb.ListSessionsRequest(), bob) == []
    with pytest.raises(NotFound):
        await ledger.ask("GetSession", pb.GetSessionRequest(session_id="s"), bob)
    hit = common_pb2.CacheReceipt(verdict="exact", source_answer_id=answer_id)
    for asker, question in ((ann, turn.question), (bob, "")):
        again = operation(asker, cache=hit)
        await ledger.record(again)
        shown = await ledger.ask("GetOperation", pb.GetOperationRequest(operation_id=again.operation_id, with_turn=True), asker)
        assert shown.operation.cache.source_question == question


async def test_sessions_are_listed_latest_first_in_pages(ledger: Ledger, ann: Principal) -> None:
    """The conversation that moved last comes first, and tokens lead through all of them."""
    start = datetime(2026, 11, 1, tzinfo=UTC)
    for minute, session in enumerate(("a", "b", "c", "a")):
        turn = pb.Turn(answer_id=str(uuid.uuid4()), question="q", text="t", created_at=timestamp(start + timedelta(minutes=minute)))
        await ledger.ask("AppendTurn", pb.AppendTurnRequest(session_id=session, turn=turn), ann)
    first = await ledger.rows("ListSessions", pb.ListSessionsRequest(page_size=2), ann)
    second = await ledger.rows("ListSessions", pb.ListSessionsRequest(page_size=2, page_token=first[-1].next_page_token), ann)

    assert [(row.session.session_id, row.session.turns) for row in (*first, *second)] == [("a", 2), ("c", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        ("ListUsers", pb.ListUsersRequest()),
        ("PutUser", pb.PutUserRequest(user="x")),
        ("PutPlan", pb.PutPlanRequest(plan=TEAM)),
        ("GetSubscription", pb.GetSubscriptionRequest(user="bob")),
        ("PutSubscription", pb.PutSubscriptionRequest(user="ann", plan="enterprise")),
        ("DeleteSubscription", pb.DeleteSubscriptionRequest(user="ann")),
        ("GetBudgets", pb.GetBudgetsRequest(scope="user", subject="ann")),
        ("PutBudget", pb.PutBudgetRequest(scope="user", subject="ann", period="day", limit_nanousd=10**12)),
        ("DeleteBudget", pb.DeleteBudgetRequest(scope="user", subject="ann")),
        ("PutPrice", pb.PutPriceRequest(price=common_pb2.Price(provider="p", model="m"))),
        ("CreateApiKey", pb.CreateApiKeyRequest(name="k", user="ann", roles=["admin"])),
        ("ListApiKeys", pb.ListApiKeysRequest()),
        ("RevokeApiKey", pb.RevokeApiKeyRequest(key_id="k")),
        ("ResolveApiKey", pb.ResolveApiKeyRequest(secret="s")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_plain_user_may_not(ledger: Ledger, ann: Principal, method: str, request_message: object) -> None:
    """What is an admin's or a service's is refused to everybody else, by every RPC."""
    ask = ledger.rows if method.startswith("List") else ledger.ask
    with pytest.raises(NotAllowed):
        await ask(method, request_message, ann)


@pytest.mark.parametrize(
    ("method", "request_message", "field"),
    [
        ("PutUser", pb.PutUserRequest(user=""), "user"),
        ("PutUser", pb.PutUserRequest(user="a", display_name="n" * 257), "display_name"),
        ("PutPlan", pb.PutPlanRequest(plan=pb.Plan(name="Free!", tiers=["t"])), "plan.name"),
        ("PutPlan", pb.PutPlanRequest(plan=pb.Plan(name="x", tiers=["t"])), "plan.requests_per_minute"),
        ("PutPlan", pb.PutPlanRequest(plan=pb.Plan(name="x")), "plan.tiers"),
        ("PutPlan", put_plan(tenant_limits=pb.Limits(requests_per_minute=-1)), "plan.tenant_limits.requests_per_minute"),
        ("PutPlan", put_plan(tenant_limits=pb.Limits(tokens_per_minute=100_000_000_001)), "plan.tenant_limits.tokens_per_minute"),
        ("PutPlan", put_plan(key_limits=pb.Limits(concurrent_answers=100_001)), "plan.key_limits.concurrent_answers"),
        ("PutPlan", put_plan(answer_deadline_ms=3_000_001), "plan.answer_deadline_ms"),
        ("PutSubscription", pb.PutSubscriptionRequest(user="a", plan=""), "plan"),
        ("PutBudget", pb.PutBudgetRequest(scope="world", subject="a", period="day"), "scope"),
        ("PutBudget", pb.PutBudgetRequest(scope="user", subject="", period="day"), "subject"),
        ("PutBudget", pb.PutBudgetRequest(scope="user", subject="a", period="year"), "period"),
        ("PutBudget", pb.PutBudgetRequest(scope="user", subject="a", period="day", limit_nanousd=-1), "limit_nanousd"),
        ("PutPrice", pb.PutPriceRequest(price=common_pb2.Price(model="m")), "price.provider"),
        (
            "PutPrice",
            pb.PutPriceRequest(price=common_pb2.Price(provider="p", model="m", output_nanousd_per_mtok=1)),
            "price.input_nanousd_per_mtok",
        ),
        (
            "PutPrice",
            pb.PutPriceRequest(price=common_pb2.Price(provider="p", model="m", input_nanousd_per_mtok=1)),
            "price.output_nanousd_per_mtok",
        ),
        (
            "PutPrice",
            pb.PutPriceRequest(price=common_pb2.Price(provider="p", model="m", input_nanousd_per_mtok=-1, output_nanousd_per_mtok=1)),
            "price.input_nanousd_per_mtok",
        ),
        (
            "PutPrice",
            pb.PutPriceRequest(
                price=common_pb2.Price(
                    provider="p", model="m", input_nanousd_per_mtok=0, output_nanousd_per_mtok=5, long_context_above_tokens=9
                )
            ),
            "price.long_output_nanousd_per_mtok",
        ),
        ("CreateApiKey", pb.CreateApiKeyRequest(user="a"), "name"),
        ("CreateApiKey", pb.CreateApiKeyRequest(name="n", user="a", roles=["root"]), "roles"),
        ("CreateApiKey", pb.CreateApiKeyRequest(name="n", user="a", expires_at=timestamp(datetime(2020, 1, 1, tzinfo=UTC))), "expires_at"),
        ("GetSession", pb.GetSessionRequest(), "session_id"),
        ("AppendTurn", pb.AppendTurnRequest(session_id="s", turn=pb.Turn(answer_id="7")), "turn.answer_id"),
        ("AppendTurn", pb.AppendTurnRequest(session_id="s" * 129, turn=pb.Turn(answer_id=str(uuid.uuid4()))), "session_id"),
        (
            "AppendTurn",
            pb.AppendTurnRequest(session_id="s", turn=pb.Turn(answer_id=str(uuid.uuid4()), question="q" * 32769)),
            "turn.question",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_input_names_its_field(ledger: Ledger, boss: Principal, method: str, request_message: object, field: str) -> None:
    """Every bad value is a typed problem with its field, never an internal error."""
    with pytest.raises(DomainError) as refused:
        await ledger.ask(method, request_message, boss)

    assert isinstance(refused.value, RequestInvalid)
    assert refused.value.field == field
