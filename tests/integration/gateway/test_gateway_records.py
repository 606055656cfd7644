"""Operations, usage, conversations, administration and the map of the suite, over HTTP."""

import asyncio
import csv
import io
import json
from typing import Any

import httpx
import pytest

from services.gateway import clients
from tailrace.common.v1 import common_pb2 as common
from tailrace.ledger.v1 import ledger_service_pb2 as ledger
from tests.integration.gateway.backends import ANSWER, forever
from tests.integration.gateway.conftest import Front, problem_of, until
from tests.integration.gateway.test_gateway_answers import blocks_of


async def test_operations_are_listed_and_shown(front: Front, client: httpx.AsyncClient) -> None:
    """With the cost in dollars beside the exact one."""
    listed = (await client.get("/v1/operations", params={"session_id": "s", "page_size": 5})).json()
    shown = (await client.get(f"/v1/operations/{ANSWER}")).json()

    assert listed["operations"][0]["operation_id"] == ANSWER
    assert (shown["cost_nanousd"], shown["cost_usd"]) == ("7500000", "0.0075")


async def test_a_watch_shows_operations_until_the_client_leaves(front: Front, client: httpx.AsyncClient) -> None:
    """A heartbeat is a comment; leaving ends the call behind."""
    operation = ledger.WatchOperationsResponse(operation=ledger.Operation(operation_id=ANSWER))
    front.behind.ledger.watched = [ledger.WatchOperationsResponse(), operation, forever]

    body = ""
    async with client.stream("GET", "/v1/operations:watch") as response:
        async for chunk in response.aiter_text():
            body += chunk
            if "event: operation" in body:
                break

    assert blocks_of(body)[0]["data"]["operation_id"] == ANSWER
    assert body.startswith(": heartbeat\n\n")
    await asyncio.wait_for(front.behind.seen.cancelled.wait(), 2)


async def test_usage_is_json_or_csv_without_formulas(front: Front, client: httpx.AsyncClient) -> None:
    """Names that a spreadsheet would run are made text."""
    row = ledger.QueryUsageResponse(operations=3, cost_nanousd=1_500_000_000, usage=common.Usage(input_tokens=9))
    row.group["user"] = '=HYPERLINK("http://x","y")'
    row.group["model"] = "@m"
    front.behind.ledger.usage = [row]

    as_json = (
        await client.get("/v1/usage", params={"group_by": "user,model", "from": "2026-01-01", "to": "2026-02-01T00:00:00+01:00"})
    ).json()
    as_csv = await client.get("/v1/usage?group_by=user,model", headers={"accept": "text/csv"})
    request, _ = front.behind.seen.calls[0][1:]

    assert (as_json["rows"][0]["cost_usd"], as_json["rows"][0]["usage"]["input_tokens"]) == ("1.50", "9")
    assert getattr(request, "from").ToJsonString() == "2026-01-01T00:00:00Z"
    assert request.to.ToJsonString() == "2026-01-31T23:00:00Z"
    assert as_csv.headers["content-type"].startswith("text/csv")
    lines = as_csv.text.split("\r\n")
    assert lines[0].startswith("user,model,operations,failed,cancelled,estimated,cache_hits,coalesced,attempts,input_tokens")
    assert lines[1].startswith('"\'=HYPERLINK(""http://x"",""y"")",\'@m,3,')
    assert (await client.get("/v1/usage?group_by=user&format=csv")).headers["content-type"].startswith("text/csv")
    assert (await client.get("/v1/usage?format=json", headers={"accept": "text/csv"})).json()["group_by"] == []


@pytest.mark.parametrize(
    ("accept", "csv"),
    [
        ("text/csv, application/json", True),
        ("text/csv, */*;q=0.1", True),
        ("application/json;q=0.5, Text/CSV;q=0.5", True),
        ("text/csv; header=present; q=1.000", True),
        ("application/json, text/csv;q=0.9", False),
        ("text/csv;q=0", False),
        ("text/csv;q=0.0, */*;q=0.0", False),
        ("*/*", False),
    ],
)
async def test_csv_is_for_who_would_rather_have_it(front: Front, client: httpx.AsyncClient, accept: str, csv: bool) -> None:
    """By the weights of Accept."""
    front.behind.ledger.usage = []
    reply = await client.get("/v1/usage", headers={"accept": accept})

    assert reply.headers["content-type"].startswith("text/csv") is csv


async def test_what_was_saved_may_be_negative_and_stays_a_number(front: Front, client: httpx.AsyncClient) -> None:
    """A minus sign makes no formula of a number."""
    front.behind.ledger.usage = [ledger.QueryUsageResponse(prompt_cache_saved_nanousd=-1_500_000_000, first_token_ms_p90=7.5)]
    [row] = csv.DictReader(io.StringIO((await client.get("/v1/usage?format=csv")).text))

    assert (row["prompt_cache_saved_usd"], row["first_token_ms_p90"]) == ("-1.50", "7.5")


async def test_operations_are_exported_as_csv_page_by_page(front: Front, client: httpx.AsyncClient) -> None:
    """Names that a spreadsheet would run are text, quotes and line breaks survive, and a header leads to the next page."""
    hostile = {"user": "=1+1", "session_id": '+"a",b', "collection": "@x\r\ny", "model": "-2+3", "error_reason": "\tcmd", "tier": "\rx"}
    made = ledger.Operation(operation_id=ANSWER, cost_nanousd=7_500_000, attempts=[ledger.Attempt(), ledger.Attempt()], **hostile)
    made.cache.verdict, made.cache.saved_nanousd = "exact", 2_000_000_000
    front.behind.ledger.operations = [ledger.ListOperationsResponse(operation=made, next_page_token="more")]
    reply = await client.get("/v1/operations", params={"format": "csv", "page_size": 5})
    [row] = csv.DictReader(io.StringIO(reply.text, newline=""))

    assert reply.headers["x-next-page-token"] == "more"
    assert reply.headers["content-type"].startswith("text/csv")
    assert {name: row[name] for name in hostile} == {name: f"'{value}" for name, value in hostile.items()}
    assert (row["operation_id"], row["cost_usd"], row["attempts"], row["saved_usd"]) == (ANSWER, "0.0075", "2", "2.00")
    assert problem_of(await client.get("/v1/operations?format=xml"), 400, "REQUEST_INVALID")["field"] == "format"


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("group_by=moon", "group_by"),
        ("group_by=day,day", "group_by"),
        ("group_by=day,hour,user,model,tier", "group_by"),
        ("from=yesterday", "from"),
        ("from=2026-01-01T00:00:00", "from"),
        ("from=2026-02-01&to=2026-01-01", "to"),
        ("tenant=globex", "tenant"),
        ("from=2026-01-01&from=2026-01-02", "from"),
        ("from=%FF", "query"),
    ],
)
async def test_a_bad_query_names_its_field(front: Front, client: httpx.AsyncClient, query: str, field: str) -> None:
    """400 with the bound."""
    assert problem_of(await client.get(f"/v1/usage?{query}"), 400, "REQUEST_INVALID")["field"] == field


async def test_who_groups_by_what_there_is_not_is_told_what_there_is(front: Front, client: httpx.AsyncClient) -> None:
    """By the names they are asked for with."""
    problem = problem_of(await client.get("/v1/usage?group_by=cache_verdict"), 400, "REQUEST_INVALID")

    assert "hour, tenant, user, key, session, model, tier, step, cache, purpose" in problem["detail"]


async def test_budgets_are_decimal_dollars_outside_and_nano_inside(front: Front, admin: httpx.AsyncClient) -> None:
    """No float on the way."""
    shown = (await admin.get("/v1/admin/budgets/user/ada")).json()["budgets"][0]
    put = (await admin.put("/v1/admin/budgets/user/ada%2Fb", json={"period": "month", "limit_usd": "0.000000001"})).json()
    request, principal = front.behind.seen.last("PutBudget")
    gone = await admin.delete("/v1/admin/budgets/user/ada?period=day")

    assert (shown["limit_usd"], shown["spent_usd"], shown["left_usd"]) == ("1.50", "0.000000001", "1.499999999")
    assert (request.subject, request.period, request.limit_nanousd, principal.tenant) == ("ada/b", "month", 1, "acme")
    assert put["limit_usd"] == "0.000000001"
    assert gone.status_code == 204
    for limit in ("-1", "1e3", "NaN", "1.0000000001", "", 1.5, "1,5", "9999999999"):
        response = await admin.put("/v1/admin/budgets/user/ada", json={"period": "day", "limit_usd": limit})
        assert problem_of(response, 400, "REQUEST_INVALID")["field"] == "limit_usd"
    problem_of(await admin.get("/v1/admin/budgets/planet/x"), 400, "REQUEST_INVALID")


async def test_plans_prices_keys_and_users_are_kept(front: Front, admin: httpx.AsyncClient) -> None:
    """Each noun by its own route; a key's secret is shown once."""
    plan: dict[str, Any] = {"requests_per_minute": 5, "tokens_per_minute": 10, "concurrent_answers": 2, "tiers": ["fast"]}
    plan |= {"monthly_budget_usd": "9.99", "tenant_limits": {"requests_per_minute": 7, "tokens_per_minute": 8, "concurrent_answers": 9}}
    plan |= {"key_limits": {"tokens_per_minute": 6}, "answer_deadline_ms": 4000}
    price = {"provider": "anthropic", "model": "m", "input_usd_per_mtok": "2", "output_usd_per_mtok": "10.5"}

    put = (await admin.put("/v1/admin/plans/pro", json=plan)).json()
    posted = (await admin.post("/v1/admin/prices", json=price)).json()
    key = await admin.post("/v1/admin/api-keys", json={"name": "ci", "user": "robot", "expires_at": "2027-01-01"})
    user = (await admin.put("/v1/admin/users/eve", json={"display_name": "Eve"})).json()

    assert (put["name"], put["monthly_budget_usd"], put["tiers"]) == ("pro", "9.99", ["fast"])
    unset = {"requests_per_minute": 0, "concurrent_answers": 0}
    assert (put["tenant_limits"], put["key_limits"]) == (plan["tenant_limits"], {**unset, "tokens_per_minute": 6})
    assert put["answer_deadline_ms"] == 4000
    for change in ({"answer_deadline_ms": 3_000_001}, {"key_limits": {"concurrent_answers": -1}}, {"tenant_limits": {"rpm": 1}}):
        refused = problem_of(await admin.put("/v1/admin/plans/pro", json={**plan, **change}), 400, "REQUEST_INVALID")
        assert refused["field"].startswith(next(iter(change)))
    assert front.behind.seen.last("PutPlan")[0].plan.monthly_budget_nanousd == 9_990_000_000
    assert front.behind.seen.last("PutPrice")[0].price.output_nanousd_per_mtok == 10_500_000_000
    assert posted["input_usd_per_mtok"] == "2.00"
    assert (key.status_code, key.json()["secret"]) == (201, "trk_once")
    assert user["display_name"] == "Eve"
    for path in ("plans", "prices", "api-keys", "users", "subscriptions/ada"):
        assert (await admin.get(f"/v1/admin/{path}")).status_code == 200
    for path in ("api-keys/k-1", "subscriptions/ada", "users/ada"):
        assert (await admin.delete(f"/v1/admin/{path}")).status_code == 204
    forget, asker = front.behind.seen.last("ForgetAnswers")
    assert (asker.tenant, asker.user, asker.roles, forget.collection) == ("acme", "ada", frozenset({"user"}), "")
    assert front.behind.seen.last("EraseUser")[0].user == "ada"
    # An answer that ended between the first two is forgotten by the last two.
    forgetting = ["ForgetAnswers", "ForgetPrompts"]
    assert [name for name, *_ in front.behind.seen.calls if name in (*forgetting, "EraseUser")] == [*forgetting, "EraseUser", *forgetting]
    assert [asked.erased for name, asked, *_ in front.behind.seen.calls if name == "ForgetPrompts"] == [False, True]


async def test_a_price_that_says_nothing_of_cached_tokens_does_not_make_them_free(front: Front, admin: httpx.AsyncClient) -> None:
    """They cost what others of the prompt do, unless it says otherwise; a 0 that is said is one. From when it applies may be said too."""
    price = {"provider": "anthropic", "model": "m", "input_usd_per_mtok": "2", "output_usd_per_mtok": "10"}
    told = {**price, "cache_read_usd_per_mtok": "0.2", "cache_write_1h_usd_per_mtok": "0", "valid_from": "2027-01-01"}

    assert (await admin.put("/v1/admin/prices", json=price)).status_code == 200
    silent = front.behind.seen.last("PutPrice")[0].price
    assert (await admin.put("/v1/admin/prices", json=told)).status_code == 200
    said = front.behind.seen.last("PutPrice")[0].price

    kinds = ("cache_read", "cache_write_5m", "cache_write_1h")
    assert [getattr(silent, f"{kind}_nanousd_per_mtok") for kind in kinds] == [2_000_000_000] * 3
    assert [getattr(said, f"{kind}_nanousd_per_mtok") for kind in kinds] == [200_000_000, 2_000_000_000, 0]
    assert not silent.HasField("valid_from")
    assert said.valid_from.ToJsonString() == "2027-01-01T00:00:00Z"
    refused = await admin.put("/v1/admin/prices", json={**price, "valid_from": "soon"})
    assert problem_of(refused, 400, "REQUEST_INVALID")["field"] == "valid_from"


async def test_keys_are_asked_for_and_told_by_pages(front: Front, admin: httpx.AsyncClient) -> None:
    reply = await admin.get("/v1/admin/api-keys", params={"page_size": 1, "page_token": "here"})
    asked, _ = front.behind.seen.last("ListApiKeys")

    assert (asked.page_size, asked.page_token) == (1, "here")
    assert ([key["key_id"] for key in reply.json()["api_keys"]], reply.json()["next_page_token"]) == (["k-1"], "more")


async def test_a_list_that_is_too_long_is_an_error_and_not_cut(
    front: Front, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a list that looks whole would be believed."""
    monkeypatch.setattr(clients, "ROWS_MAX", 0)

    problem_of(await admin.get("/v1/admin/prices"), 500, "INTERNAL")


async def test_a_user_is_exported_line_by_line_with_a_last_one_that_says_it_is_whole(front: Front, admin: httpx.AsyncClient) -> None:
    """A file that was cut is not taken for everything."""
    reply = await admin.get("/v1/admin/users/ada/export")
    lines = [json.loads(line) for line in reply.text.splitlines()]

    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [list(line) for line in lines] == [["user"], ["operation"], ["complete", "records"]]
    assert (lines[0]["user"]["user"], lines[1]["operation"]["operation_id"], lines[2]["records"]) == ("ada", ANSWER, 2)


async def test_readiness_names_what_is_missing_and_recovers(front: Front, client: httpx.AsyncClient) -> None:
    """503 while anything is away, by name; 200 when it is back."""

    async def says(status: int) -> Any:
        said = await client.get("/readyz")
        return said.json() if said.status_code == status else None

    assert (await until(lambda: says(200)))["services"]["ledger"] == {"ready": True, "dependencies": {"store": True}}
    await front.behind.stop("ledger")
    away = await until(lambda: says(503))
    await front.behind.start("ledger")

    assert (away["dependencies"]["ledger"], away["dependencies"]["retrieval"]) == (False, True)
    assert (await until(lambda: says(200)))["ready"] is True


async def test_the_map_has_components_and_hops_with_live_figures(front: Front, client: httpx.AsyncClient) -> None:
    """As JSON and as a stream of the same."""
    await client.get("/v1/models")
    picture = (await client.get("/v1/infrastructure")).json()
    async with client.stream("GET", "/v1/infrastructure", headers={"accept": "text/event-stream"}) as response:
        first = blocks_of(await anext(response.aiter_text()))[0]
    hop = next(hop for hop in picture["hops"] if hop["to"] == "orchestrator")

    assert {component["name"] for component in picture["components"]} >= {"gateway", "orchestrator", "retrieval", "ledger", "redis"}
    assert (hop["from"], hop["requests"] >= 1, hop["p50_ms"] > 0) == ("gateway", True, True)
    assert first["event"] == "infrastructure"


async def test_metrics_have_closed_labels(front: Front, client: httpx.AsyncClient) -> None:
    """However many paths and methods strangers invent."""
    for number in range(5):
        await client.get(f"/made/up/{number}")
        await client.request(f"M{number}", "/v1/answers")
    text = (await client.get("/metrics")).text

    assert "made" not in text
    assert 'method="M1"' not in text
    assert 'route="unknown"' in text


async def test_the_page_is_served_with_a_strict_policy(front: Front) -> None:
    """No inline script, no foreign origin, no frame; unchanged files are not sent again."""
    async with httpx.AsyncClient(base_url=front.url, trust_env=False) as stranger:
        page = await stranger.get("/")
        again = await stranger.get("/", headers={"if-none-match": page.headers["etag"]})
        head = await stranger.head("/")
        escape = await stranger.get("/assets/..%2f..%2fconfig.py")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert (again.status_code, again.content) == (304, b"")
    assert (head.status_code, head.content) == (200, b"")
    assert escape.status_code == 404


async def test_methods_and_paths_that_are_not_there(front: Front, client: httpx.AsyncClient) -> None:
    """405 says what is; 404 says nothing."""
    wrong = await client.patch("/v1/answers")

    assert problem_of(wrong, 405, "METHOD_NOT_ALLOWED")["allow"] == wrong.headers["allow"] == "POST"
    assert (await client.head("/healthz")).status_code == 200
    assert (await client.head("/v1/operations:watch")).status_code == 405
    for path in ("/v1", "/v1/answers/", "/v1/answers/x/y", "/v1/documents/%00", "/v1/answers/" + "a" * 500, "/%ff"):
        problem_of(await client.get(path), 404, "NOT_FOUND")


async def test_a_trace_that_came_along_is_continued(front: Front, client: httpx.AsyncClient) -> None:
    """The answer carries the caller's trace id, and a request id that is the caller's own if it is a sane one."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    response = await client.get("/healthz", headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01", "x-request-id": "mine-1"})
    odd = await client.get("/healthz", headers={"x-request-id": "a b"})

    assert (response.headers["x-trace-id"], response.headers["x-request-id"]) == (trace_id, "mine-1")
    assert len(odd.headers["x-request-id"]) == 32
