"""Aggregates over operations: tokens, cost, savings and percentiles, grouped. Single operations are in `postgres_operations`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.chassis.money import Usage
from services.chassis.principal import Principal
from services.ledger.domain import UsageRow
from services.ledger.postgres_database import Database
from services.ledger.postgres_holds import usage_of

ROWS_MAX = 10_000
"""More groups than this tell nobody anything; the newest or largest are kept."""

GROUPINGS = {
    "day": "to_char(o.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "hour": "to_char(o.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:00\"Z\"')",
    "user": "o.user_id",
    "session": "o.session_id",
    "model": "o.model",
    "tier": "o.tier",
    "step": "s.name",
    "cache": "o.cache_verdict",
}
"""What usage may be grouped by, and the column behind each name."""


class PostgresUsage:
    """Answers usage queries."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def query(self, principal: Principal, group_by: Sequence[str], start: datetime, end: datetime) -> list[UsageRow]:
        by_step = "step" in group_by
        conditions, arguments = ["o.tenant = $1", "o.created_at >= $2", "o.created_at < $3"], [principal.tenant, start, end]
        if "admin" not in principal.roles:
            conditions.append("o.user_id = $4")
            arguments.append(principal.user)
        source = "operations o"
        own, duration = "true", "o.duration_ms"
        if by_step:
            source += (
                " JOIN LATERAL (SELECT steps.name, steps.duration_ms, row_number() OVER (ORDER BY"
                " CASE steps.name WHEN 'generate' THEN 0 WHEN 'recall' THEN 1 ELSE 2 END, steps.ordinal) AS place FROM steps"
                " WHERE steps.tenant = o.tenant AND steps.operation_id = o.operation_id AND steps.status <> 'skipped') s ON true"
            )
            own, duration = "s.place = 1", "s.duration_ms"
        columns = [f"{GROUPINGS[name]} AS g{place}" for place, name in enumerate(group_by)]
        places = ", ".join(str(place) for place in range(1, len(group_by) + 1))
        sums = ", ".join(
            f"coalesce(sum(o.{column}) FILTER (WHERE {own}), 0)::bigint AS {column}"
            for column in (
                *("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
                *("cost_nanousd", "cache_saved_nanousd"),
            )
        )
        percentiles = ", ".join(
            f"coalesce(percentile_cont({share}) WITHIN GROUP (ORDER BY {column}) FILTER (WHERE {condition}), 0) AS {name}"
            for name, share, column, condition in (
                ("p50", 0.5, duration, "true"),
                ("p90", 0.9, duration, "true"),
                ("p99", 0.99, duration, "true"),
                ("first_p50", 0.5, "o.first_token_ms", "o.first_token_ms > 0"),
                ("first_p99", 0.99, "o.first_token_ms", "o.first_token_ms > 0"),
            )
        )
        query = (
            f"SELECT {', '.join([*columns, ''])} count(DISTINCT o.operation_id) AS operations,"
            " count(DISTINCT o.operation_id) FILTER (WHERE o.status = 'failed') AS failed,"
            " count(DISTINCT o.operation_id) FILTER (WHERE o.cache_verdict IN ('exact', 'semantic', 'coalesced')) AS hits,"
            f" {sums}, {percentiles} FROM {source} WHERE {' AND '.join(conditions)}"
            + (f" GROUP BY {places} ORDER BY {places}" if group_by else "")
            + f" LIMIT {ROWS_MAX}"
        )
        rows = await self._database.of(principal.tenant).fetch(query, *arguments)
        return [_usage_row(row, group_by) for row in rows]


def _usage_row(row: Any, group_by: Sequence[str]) -> UsageRow:
    usage: Usage = usage_of(row)
    return UsageRow(
        group={name: row[f"g{place}"] for place, name in enumerate(group_by)},
        operations=row["operations"],
        failed=row["failed"],
        cache_hits=row["hits"],
        usage=usage,
        cost_nanousd=row["cost_nanousd"],
        saved_nanousd=row["cache_saved_nanousd"],
        duration_ms_p50=row["p50"],
        duration_ms_p90=row["p90"],
        duration_ms_p99=row["p99"],
        first_token_ms_p50=row["first_p50"],
        first_token_ms_p99=row["first_p99"],
    )
