"""The books' side of a reconciliation, read from PostgreSQL over all tenants. It writes nothing; what is compared is in `reconcile`."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

from services.chassis.errors import PriceUnknown, RequestInvalid
from services.chassis.money import Usage
from services.ledger.postgres_database import Database
from services.ledger.postgres_holds import usage_of
from services.ledger.postgres_prices import read_book
from services.ledger.prices import ALL_TENANTS
from services.ledger.provider_exports import ExportRow
from services.ledger.reconcile import Call, Reconciliation, Report

BATCH = 1_000
_SUMS = ", ".join(
    f"sum(a.{name})::bigint AS {name}"
    for name in (
        *("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"),
        "cost_nanousd",
    )
)


async def reconcile(database: Database, rows: Iterator[ExportRow]) -> Report:
    """Compare an export with the books.

    Raises RequestInvalid for a bad line, for one of a time whose operations were let go, and for a file without any: that would pass for
    agreement.
    """
    book = await database.run(read_book)
    purged_before: datetime | None = await database.value("SELECT purged_before()")
    made = Reconciliation()
    provider = ""
    while batch := list(islice(rows, BATCH)):
        for row in batch:
            provider = row.provider
            if purged_before and row.start < purged_before:
                why = f"is of before {purged_before.astimezone(UTC):%Y-%m-%d}: operations of that time are not kept any more"
                raise RequestInvalid(f"line {row.line} {why}", field=f"line {row.line}")
            price = None
            with contextlib.suppress(PriceUnknown):
                price = book.in_force(ALL_TENANTS, row.provider, row.model, row.start).price
            made.told(row, price)
        named = [row for row in batch if row.request_id]
        booked = await _by_request(database, provider, named)
        for row in named:
            made.matched(row, booked)
    if not provider:
        raise RequestInvalid("there is nothing to compare in the file", field="file")
    for start, end in made.periods():
        for model, usage, cost in await _by_model(database, provider, start, end, made.requests_in(start, end)):
            made.booked(start, model, usage, cost)
    return made.report()


async def _by_request(database: Database, provider: str, rows: Iterable[ExportRow]) -> dict[str, Call]:
    ids = [row.request_id for row in rows]
    if not ids:
        return {}
    found = await database.fetch(
        f"SELECT a.provider_request_id, array_agg(DISTINCT a.created_at) AS accepted, {_SUMS} FROM attempts a"
        " WHERE a.provider_request_id = ANY($1) AND a.provider_request_id <> '' AND a.provider = $2 GROUP BY a.provider_request_id",
        *(ids, provider),
    )
    return {row["provider_request_id"]: Call(usage_of(row), row["cost_nanousd"], row["accepted"]) for row in found}


async def _by_model(
    database: Database, provider: str, start: datetime, end: datetime, without: Sequence[str]
) -> list[tuple[str, Usage, int]]:
    found = await database.fetch(
        f"SELECT a.model, {_SUMS} FROM operations o JOIN attempts a USING (tenant, operation_id, created_at)"
        " WHERE o.created_at >= $1 AND o.created_at < $2 AND a.provider = $3 AND NOT a.not_sent"
        " AND a.provider_request_id <> ALL ($4) GROUP BY a.model",
        *(start, end, provider, without),
    )
    return [(row["model"], usage_of(row), row["cost_nanousd"]) for row in found]
