"""Usage exports of providers, read and compared: known shapes, hostile ones, and what counts as drift."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest

from services.chassis.errors import RequestInvalid
from services.chassis.money import Price, Usage
from services.ledger.provider_exports import LINE_CHARACTERS_MAX, ExportRow, csv_rows, json_rows
from services.ledger.reconcile import Call, Reconciliation, family
from services.local.reconciling import percent, table

DAY = datetime(2026, 8, 5, tzinfo=UTC)
ANTHROPIC_CSV = (
    "usage_date_utc,model_version,api_key,usage_input_tokens_no_cache,usage_input_tokens_cache_write_5m,"
    "usage_input_tokens_cache_write_1h,usage_input_tokens_cache_read,usage_output_tokens\n"
    '2026-08-05,claude-opus-5,"My, key",46981,15969,7,11,16932\n'
)
ANTHROPIC_USAGE = Usage(46981, 16932, 11, 15976, 7)
ANTHROPIC_JSON: dict[str, Any] = {
    "data": [
        {
            "starting_at": "2026-08-05T00:00:00Z",
            "ending_at": "2026-08-05T01:00:00Z",
            "results": [
                {
                    "model": "claude-opus-5",
                    "uncached_input_tokens": 46981,
                    "cache_creation": {"ephemeral_5m_input_tokens": 15969, "ephemeral_1h_input_tokens": 7},
                    "cache_read_input_tokens": 11,
                    "output_tokens": 16932,
                    "workspace_id": None,
                }
            ],
        }
    ],
    "has_more": False,
    "next_page": None,
}
OPENAI_JSON = {
    "object": "page",
    "data": [
        {
            "object": "bucket",
            "start_time": 1785888000,
            "end_time": 1785974400,
            "results": [{"model": "gpt-x", "input_tokens": 1000, "input_cached_tokens": 800, "output_tokens": 500, "batch": None}],
        }
    ],
}
OPENAI_CSV = (
    "start_time,end_time,model,input_tokens,input_cached_tokens,output_tokens,cost_usd\n1785888000,1785974400,gpt-x,1000,800,500,0.25\n"
)


def from_csv(text: str) -> list[ExportRow]:
    return list(csv_rows(io.StringIO(text, newline="")))


def from_json(value: object) -> list[ExportRow]:
    return list(json_rows(io.StringIO(value if isinstance(value, str) else json.dumps(value))))


def test_each_known_shape_is_read() -> None:
    """Anthropic tells cached tokens apart, OpenAI within the input; periods are the bucket's, or a day."""
    [console], [report] = from_csv(ANTHROPIC_CSV), from_json(ANTHROPIC_JSON)
    [page], [listed] = from_json(OPENAI_JSON), from_csv(OPENAI_CSV)

    assert (console.model, console.usage, console.start, console.end) == ("claude-opus-5", ANTHROPIC_USAGE, DAY, DAY + timedelta(days=1))
    assert (report.usage, report.end, report.provider) == (ANTHROPIC_USAGE, DAY + timedelta(hours=1), "anthropic")
    assert (page.usage, page.start, page.end, page.provider) == (Usage(200, 500, 800), DAY, DAY + timedelta(days=1), "openai")
    assert (listed.usage, listed.cost_nanousd, page.cost_nanousd) == (page.usage, 250_000_000, None)


def test_tokens_that_openai_says_were_written_to_its_cache_are_no_plain_input() -> None:
    """They are within its input as the cached ones are, and cost more; a column that an export does not have is no token."""
    told = {"model": "gpt-x", "input_tokens": 1000, "input_cached_tokens": 700, "input_cache_write_tokens": 250, "output_tokens": 500}
    page = {"data": [{"start_time": 1785888000, "end_time": 1785974400, "results": [told]}]}
    [row], [listed] = (
        from_json(page),
        from_csv(f"start_time,{','.join(told)}\n1785888000,{','.join(str(value) for value in told.values())}\n"),
    )

    assert row.usage == listed.usage == Usage(50, 500, 700, 250)
    told["input_cache_write_tokens"] = 301
    with pytest.raises(RequestInvalid, match="line 1 has more cached tokens than input tokens"):
        from_json(page)


def test_pages_may_follow_one_another_and_lines_are_counted() -> None:
    """Whatever the layout."""
    text = json.dumps(ANTHROPIC_JSON, indent=1) + "\n" + json.dumps(ANTHROPIC_JSON)

    assert [row.line for row in from_json(text)] == [3, 24]


CELL = ANTHROPIC_CSV.splitlines()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ANTHROPIC_CSV.replace("46981", "-5"), 2),
        (ANTHROPIC_CSV.replace("46981", "NaN"), 2),
        (ANTHROPIC_CSV.replace("46981", "1e3"), 2),
        (ANTHROPIC_CSV.replace("46981", "=1+1"), 2),
        (ANTHROPIC_CSV.replace("46981", "9" * 16), 2),
        (ANTHROPIC_CSV.replace("claude-opus-5", "=cmd"), 2),
        (ANTHROPIC_CSV.replace("claude-opus-5", ""), 2),
        (ANTHROPIC_CSV.replace("2026-08-05", "yesterday"), 2),
        (ANTHROPIC_CSV + "1,2\n", 3),
        (ANTHROPIC_CSV + 'x"y"z,"\n', 3),
        (ANTHROPIC_CSV + "a" * (LINE_CHARACTERS_MAX + 1), 3),
        (OPENAI_CSV.replace("0.25", "-0.25"), 2),
        (OPENAI_CSV.replace(",800,", ",8000,"), 2),
        ("a,b\n1,2\n", 1),
        ("", 1),
    ],
    ids=range(15),
)
def test_a_bad_line_of_csv_is_named(text: str, line: int) -> None:
    """Negative, not a number, a formula, too long, cut: none is taken for 0."""
    with pytest.raises(RequestInvalid, match=rf"^line {line} "):
        from_csv(text)


def changed(**fields: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(ANTHROPIC_JSON))
    value["data"][0]["results"][0].update(fields)
    return value


@pytest.mark.parametrize(
    "value",
    [
        changed(output_tokens=-1),
        changed(output_tokens=1.5),
        changed(output_tokens=True),
        changed(output_tokens=float("nan")),
        changed(output_tokens=10**400),
        changed(model=None),
        changed(cache_creation=[1]),
        {"data": [7]},
        {"data": [{"starting_at": "2026-08-05T00:00:00Z"}]},
        {"data": [{"results": [7]}]},
        {"data": [{"results": [{"model": "m"}]}]},
        '{"data": [{"results": [',
        '{"data": ' + "[" * 100_000,
        '{"rows": []}',
        "",
    ],
    ids=range(15),
)
def test_bad_json_is_refused_with_its_line(value: object) -> None:
    """Typed, whatever it is."""
    with pytest.raises(RequestInvalid, match=r"^line 1 "):
        from_json(value)


class Endless(io.TextIOBase):
    """A file of `times` buckets that is never whole in memory."""

    def __init__(self, times: int) -> None:
        bucket = json.dumps(ANTHROPIC_JSON["data"][0])  # type: ignore[index]
        self._parts: Iterator[str] = iter(['{"data": [', *[bucket + ","] * (times - 1), bucket + "]}"])
        self._held = ""

    def read(self, size: int | None = -1) -> str:
        assert size is not None and size > 0
        while len(self._held) < size and (part := next(self._parts, "")):
            self._held += part
        piece, self._held = self._held[:size], self._held[size:]
        return piece


def test_a_long_export_is_read_in_bounded_memory() -> None:
    """7 MB of buckets take a fraction of that."""
    tracemalloc.start()
    try:
        read = sum(1 for _ in json_rows(Endless(20_000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert read == 20_000
    assert peak < 2_000_000


PRICE = Price(
    "anthropic", "m", input=1_000_000, output=1_000_000, long_context_above_tokens=10, long_input=9_000_000, long_output=9_000_000
)


def row(tokens: int, *, hours: int = 0, model: str = "m", request_id: str = "") -> ExportRow:
    start = DAY + timedelta(hours=hours)
    return ExportRow(2, "anthropic", model, start, start + timedelta(hours=1), Usage(tokens), request_id=request_id)


def test_equal_sides_do_not_drift_and_snapshots_are_their_family() -> None:
    """A sum over many calls pays no long-context price."""
    made = Reconciliation()
    made.told(row(1_000_000, model="m-20260801"), PRICE)
    made.booked(DAY, "m", Usage(1_000_000), 1_000_000)
    report = made.report()

    assert (report.worst, report.unknown_requests) == (0, 0)
    assert [drift.model for drift in report.drifts] == ["m"]
    for name in ("claude-haiku-4-5-20251001", "claude-haiku-4-5-latest", "claude-haiku-4-5"):
        assert family(name) == "claude-haiku-4-5"
    assert "drift: tokens 0.000 %, cost 0.000 %" in table(report)


def test_opposite_drifts_do_not_cancel_and_what_only_one_side_has_is_drift() -> None:
    """3 of 100 too many on one model, 3 too few on another, and 4 that the provider does not know."""
    made = Reconciliation()
    for model, told, booked in (("a", 50, 53), ("b", 50, 47)):
        made.told(row(told, model=model), PRICE)
        made.booked(DAY, model, Usage(booked), booked)
    made.booked(DAY, "c", Usage(output_tokens=4), 4)

    assert made.report().tokens_drift == made.report().cost_drift == Fraction(10, 100)


def test_what_one_hour_has_too_much_another_does_not_make_good() -> None:
    """Each hour of the export stands beside that hour of the books."""
    made = Reconciliation()
    for hours, told, booked in ((0, 50, 53), (1, 50, 47)):
        made.told(row(told, hours=hours), PRICE)
        made.booked(DAY + timedelta(hours=hours), "m", Usage(booked), booked)
    report = made.report()

    assert report.tokens_drift == Fraction(6, 100)
    assert [drift.start.hour for drift in report.drifts] == [0, 1]
    assert "2026-08-05 01:00" in table(report)


def test_a_model_without_a_price_costs_what_the_export_says_or_is_named() -> None:
    """The rest is compared all the same: one unknown name must not hide what drifts elsewhere."""
    made = Reconciliation()
    made.told(replace(row(10, model="told"), cost_nanousd=7), None)
    made.told(row(10, model="untold-20260801"), None)
    made.booked(DAY, "told", Usage(10), 7)
    made.booked(DAY, "untold", Usage(10), 7)
    report = made.report()

    assert report.unpriced == ["untold"]
    assert [(drift.model, drift.provider.cost_nanousd) for drift in report.drifts] == [("told", 7), ("untold", 0)]
    assert (report.tokens_drift, report.cost_drift) == (0, 1)


def test_a_bucket_without_results_says_that_nothing_was_used() -> None:
    """So the books are asked for that time too, and what only they have is drift."""
    silent = {"data": [{**ANTHROPIC_JSON["data"][0], "results": []}, {"start_time": 1785974400, "end_time": 1786060800, "results": []}]}
    made = Reconciliation()
    for told in (rows := from_json(silent)):
        made.told(told, None)
    made.booked(DAY, "m", Usage(10), 7)

    assert [(told.provider, told.model, told.usage) for told in rows] == [("anthropic", "", Usage()), ("openai", "", Usage())]
    assert made.periods() == [(DAY, DAY + timedelta(hours=1)), (DAY + timedelta(days=1), DAY + timedelta(days=2))]
    assert [drift.model for drift in made.report().drifts] == ["m"]
    assert (made.report().worst, made.report().unpriced) == (1, [])


def test_requests_are_matched_by_id_before_anything_else() -> None:
    """One that the books do not have is told apart."""
    made = Reconciliation()
    for request_id in ("req_1", "req_2"):
        told = row(5, request_id=request_id)
        made.told(told, PRICE)
        made.matched(told, {"req_1": Call(Usage(5), 5, [DAY])})

    assert made.periods() == []
    assert (made.report().unknown_requests, made.report().tokens_drift) == (1, Fraction(1, 2))
    assert made.requests_in(DAY, DAY + timedelta(hours=1)) == ["req_1"]
    assert made.requests_in(DAY - timedelta(hours=1), DAY) == []


def test_no_more_requests_are_remembered_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was named before is no new one."""
    monkeypatch.setattr("services.ledger.reconcile.REQUESTS_MAX", 1)
    made = Reconciliation()
    for _ in range(2):
        made.matched(row(5, request_id="req_1"), {})

    assert made.report().unknown_requests == 1
    with pytest.raises(RequestInvalid, match="one request too many"):
        made.matched(row(5, request_id="req_2"), {})


def test_periods_that_overlap_are_refused() -> None:
    """A day and an hour of it would count the books twice."""
    made = Reconciliation()
    made.told(row(1), PRICE)
    made.told(ExportRow(3, "anthropic", "m", DAY, DAY + timedelta(days=1), Usage(1)), PRICE)

    with pytest.raises(RequestInvalid, match="overlap"):
        made.periods()


@pytest.mark.parametrize(
    ("text", "share"), [("1%", Fraction(1, 100)), ("0.5%", Fraction(1, 200)), ("1", None), ("-1%", None), ("NaN%", None)]
)
def test_a_bound_is_a_percentage(text: str, share: Fraction | None) -> None:
    """Nothing else."""
    assert percent(text) == share
