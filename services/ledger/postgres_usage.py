"""Aggregates over operations: tokens, cost, savings and percentiles, grouped. Single operations are in `postgres_operations`.

What is asked is put together, in one statement and so of one moment, from sums by day and hour, single operations at the edges that
are no whole day or hour, and the operations that the sums do not have yet. `postgres_sums` keeps the sums.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.chassis.errors import RequestInvalid
from services.chassis.principal import Principal
from services.ledger.domain import UsageRow
from services.ledger.histograms import percentile, unpacked
from services.ledger.postgres_database import Database
from services.ledger.postgres_holds import usage_of
from services.ledger.spans import Span, needs_rows, spans

ROWS_MAX = 10_000
"""More groups than this tell nobody anything, and are refused."""

GROUPINGS = {
    "day": "to_char(c.starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "hour": "to_char(c.starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:00\"Z\"')",
    "tenant": "c.tenant",
    "user": "c.user_id",
    "key": "c.api_key_id",
    "session": "c.session_id",
    "model": "c.model",
    "tier": "c.tier",
    "step": "c.step",
    "cache": "c.cache_verdict",
    "purpose": "c.purpose",
}
"""What usage may be grouped by, and what is behind each name."""

COUNTS = ("operations", "failed", "cancelled", "estimated", "cache_hits", "coalesced")
AMOUNTS = (
    *("attempts", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
    *("cost_nanousd", "cache_saved_nanousd", "prompt_cache_saved_nanousd", "tiering_saved_nanousd"),
)
MEASURES = COUNTS + AMOUNTS
"""What is summed; columns of `usage_facts` and of each table of sums."""

_FACT = (
    f"f.tenant, f.created_at AS starts_at, f.user_id, f.api_key_id, f.session_id, f.model, f.tier, f.cache_verdict, {', '.join(MEASURES)},"
    " ARRAY[f.duration_pair] AS durations, array_remove(ARRAY[f.first_token_pair], NULL) AS first_tokens"
)
# By step, an operation is counted once for each name, and what it used where it arose: at its first `generate`, or `recall` on a hit.
_STEP = (
    "f.tenant, f.created_at AS starts_at, f.user_id, f.api_key_id, f.session_id, f.model, f.tier, f.cache_verdict, s.name AS step, "
    + ", ".join(f"CASE WHEN s.first_of_name THEN f.{name} ELSE 0 END AS {name}" for name in COUNTS)
    + ", "
    + ", ".join(f"CASE WHEN s.main THEN f.{name} ELSE 0 END AS {name}" for name in AMOUNTS)
    + ", ARRAY[(time_bucket(s.duration_ms) << 40) | 1] AS durations,"
    " array_remove(ARRAY[CASE WHEN s.first_of_name THEN f.first_token_pair END], NULL) AS first_tokens"
)
_STEPS = (
    " JOIN LATERAL (SELECT steps.name, steps.duration_ms, row_number() OVER (PARTITION BY steps.name ORDER BY steps.ordinal) = 1"
    " AS first_of_name, row_number() OVER (ORDER BY CASE steps.name WHEN 'generate' THEN 0 WHEN 'recall' THEN 1 ELSE 2 END, steps.ordinal)"
    " = 1 AS main FROM steps WHERE steps.tenant = f.tenant AND steps.operation_id = f.operation_id"
    " AND steps.created_at = f.created_at AND steps.status <> 'skipped') s ON true"
)
# One look-up for each waiting operation, whatever the statistics of a table that is empty most of the time say.
_WAITING = (
    "(SELECT operation_id, created_at FROM usage_unrolled WHERE tenant = $1 OFFSET 0) w JOIN LATERAL"
    " (SELECT * FROM usage_facts WHERE tenant = $1 AND operation_id = w.operation_id AND created_at = w.created_at OFFSET 0) f ON true"
)


class PostgresUsage:
    """Answers usage queries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def query(self, principal: Principal, group_by: Sequence[str], start: datetime, end: datetime) -> list[UsageRow]:
        user = "" if "admin" in principal.roles else principal.user
        cut = cut_for(group_by, start, end, by_user=bool(user))
        query, arguments = _query(principal.tenant, user, group_by, cut)
        rows = await self._database.of(principal.tenant).fetch(query, *arguments)
        if len(rows) > ROWS_MAX:
            raise RequestInvalid(f"that is more than {ROWS_MAX} groups", field="group_by", bound=f"at most {ROWS_MAX} groups")
        await self._refuse_purged(principal.tenant, cut)
        return [_usage_row(row, group_by) for row in rows]

    async def _refuse_purged(self, tenant: str, cut: list[Span]) -> None:
        """Raise RequestInvalid if single operations were needed that may be gone. Asked after the query: what is gone stays gone."""
        purged_before = await self._database.of(tenant).value("SELECT purged_before()")
        if purged_before and any(span.grain == "row" and span.start < purged_before for span in cut):
            bound = f"whole days in UTC before {purged_before:%Y-%m-%d}, not by session, step or purpose, nor by hour of a user or key"
            raise RequestInvalid("single operations of that time are not kept any more", field="from", bound=bound)


def cut_for(group_by: Sequence[str], start: datetime, end: datetime, *, by_user: bool) -> list[Span]:
    """Where each part of [start, end) is read from. `by_user` = of one user only."""
    if needs_rows(group_by):
        return spans(start, end, days=False, hours=False)
    own = by_user or bool({"user", "key"} & set(group_by))
    return spans(start, end, days="hour" not in group_by, hours=not own)


def _query(tenant: str, user: str, group_by: Sequence[str], cut: list[Span]) -> tuple[str, list[object]]:
    """The statement and its arguments. A row: g0, g1, … (one constant without grouping), MEASURES, durations, first_tokens."""
    arguments: list[object] = [tenant]
    of_user = ""
    if user:
        arguments.append(user)
        of_user = " AND user_id = $2"
    own = bool(user) or bool({"user", "key"} & set(group_by))
    fact, joined = (_STEP, _STEPS) if "step" in group_by else (_FACT, "")
    if "purpose" in group_by:
        fact = f"{fact}, f.purpose"
    groups = [GROUPINGS[name] for name in group_by] or ["''"]
    grouped = ", ".join(f"{expression} AS g{place}" for place, expression in enumerate(groups))
    measured = ", ".join((*(f"c.{name}" for name in MEASURES), "c.durations", "c.first_tokens"))

    def between(column: str, start: datetime, end: datetime) -> str:
        arguments.extend((start, end))
        return f"{column} >= ${len(arguments) - 1} AND {column} < ${len(arguments)}"

    def cells(source: str) -> str:
        return f"SELECT {grouped}, {measured} FROM {source} c"

    parts = []
    for span in cut:
        if span.grain == "row":
            within = between("f.created_at", span.start, span.end)
            parts.append(cells(f"(SELECT {fact} FROM usage_facts f{joined} WHERE f.tenant = $1{of_user} AND {within})"))
        else:
            table = "usage_user_days" if own else f"usage_{span.grain}s"
            within = between("starts_at", span.start, span.end)
            parts.append(cells(f"(SELECT * FROM {table} WHERE tenant = $1{of_user} AND {within})"))
    summed = [span for span in cut if span.grain != "row"]
    if summed:
        within = between("f.created_at", summed[0].start, summed[-1].end)
        parts.append(cells(f"(SELECT {fact} FROM {_WAITING} WHERE {within}{of_user})"))
    if not parts:
        parts.append(cells(f"(SELECT {fact} FROM usage_facts f{joined} WHERE false)"))
    names = ", ".join(f"g{place}" for place in range(len(groups)))
    sums = ", ".join(f"sum({name})::bigint AS {name}" for name in MEASURES)

    def histogram(column: str) -> str:
        return (
            f"{column} AS (SELECT {names}, array_agg((bucket << 40) | seen) AS {column} FROM (SELECT {names}, pair >> 40 AS bucket,"
            f" sum(pair & 1099511627775)::bigint AS seen FROM cells, unnest({column}) pair GROUP BY {names}, bucket) b GROUP BY {names})"
        )

    query = (
        f"WITH cells AS MATERIALIZED ({' UNION ALL '.join(parts)}),"
        f" sums AS (SELECT {names}, {sums} FROM cells GROUP BY {names} ORDER BY {names} LIMIT {ROWS_MAX + 1}),"
        f" {histogram('durations')}, {histogram('first_tokens')}"
        f" SELECT * FROM sums LEFT JOIN durations USING ({names}) LEFT JOIN first_tokens USING ({names}) ORDER BY {names}"
    )
    return query, arguments


def _usage_row(row: Any, group_by: Sequence[str]) -> UsageRow:
    durations, first_tokens = unpacked(row["durations"] or ()), unpacked(row["first_tokens"] or ())
    return UsageRow(
        group={name: row[f"g{place}"] for place, name in enumerate(group_by)},
        operations=row["operations"],
        failed=row["failed"],
        cancelled=row["cancelled"],
        estimated=row["estimated"],
        cache_hits=row["cache_hits"],
        coalesced=row["coalesced"],
        attempts=row["attempts"],
        usage=usage_of(row),
        cost_nanousd=row["cost_nanousd"],
        cache_saved_nanousd=row["cache_saved_nanousd"],
        prompt_cache_saved_nanousd=row["prompt_cache_saved_nanousd"],
        tiering_saved_nanousd=row["tiering_saved_nanousd"],
        duration_ms_p50=percentile(durations, 50),
        duration_ms_p90=percentile(durations, 90),
        duration_ms_p99=percentile(durations, 99),
        first_token_ms_p50=percentile(first_tokens, 50),
        first_token_ms_p90=percentile(first_tokens, 90),
        first_token_ms_p99=percentile(first_tokens, 99),
    )
