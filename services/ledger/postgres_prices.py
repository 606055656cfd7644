"""The price book in PostgreSQL: rows are added, never changed. Which of them applies is decided in `prices`."""

import asyncio
import contextlib
import math
from datetime import datetime
from typing import Any

from services.chassis.clock import Clock
from services.chassis.errors import PriceUnknown, RequestInvalid
from services.chassis.money import Price
from services.ledger.postgres_database import Connection, Database
from services.ledger.prices import ListedPrice, PriceBook

MODELS_OF_TENANT_MAX = 1_000
"""Models that a tenant may have prices of its own for: the list of prices is not paged."""
FAMILY_AGE_MAX_S = 5.0
"""How old the book may be that prices a snapshot as its family. The database knows the family's price alone, and cannot find that out."""
_COLUMNS = (
    "price_id, tenant, provider, model, version, valid_from, input_nanousd_per_mtok, output_nanousd_per_mtok,"
    " cache_read_nanousd_per_mtok, cache_write_5m_nanousd_per_mtok, cache_write_1h_nanousd_per_mtok,"
    " long_context_above_tokens, long_input_nanousd_per_mtok, long_output_nanousd_per_mtok, source"
)


class PostgresPrices:
    """Prices, with the book kept in memory: it is asked for every provider call and changes a few times a year.

    A book that has gone stale is found out when money is set aside: the database refuses an amount counted with a price that
    is no longer in force, and the book is read again.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock
        self._book = PriceBook(())
        self._read_at = -math.inf
        self._reading = asyncio.Lock()

    @property
    def book(self) -> PriceBook:
        return self._book

    async def reload(self, stale: PriceBook | None = None) -> PriceBook:
        """Read the book again, unless somebody else already did since the caller saw `stale`."""
        async with self._reading:
            if stale is None or stale is self._book:
                began = self._clock.monotonic()
                self._book = await self._database.run(read_book)
                self._read_at = began
            return self._book

    async def in_force(self, tenant: str, provider: str, model: str, at: datetime, connection: Connection | None = None) -> ListedPrice:
        """The price that applies. Raises PriceUnknown, after a second look in case it was added just now.

        Who holds a connection passes it on, and so never waits for another.
        """
        book = self._book
        with contextlib.suppress(PriceUnknown):
            listed = book.in_force(tenant, provider, model, at)
            if listed.price.model == model or self._clock.monotonic() - self._read_at < FAMILY_AGE_MAX_S:
                return listed
        book = await self._read_on(connection) if connection else await self.reload(book)
        return book.in_force(tenant, provider, model, at)

    async def told(self, tenant: str, provider: str, model: str, version: int, at: datetime, connection: Connection) -> ListedPrice:
        """The version that a caller was told when it counted; the price at `at` if it names none we know. Raises PriceUnknown."""
        found = self._book.numbered(tenant, provider, model, version)
        if found is None and version:
            found = (await self._read_on(connection)).numbered(tenant, provider, model, version)
        return found or await self.in_force(tenant, provider, model, at, connection)

    async def version(self, price_id: int, connection: Connection) -> ListedPrice:
        """A stored version."""
        found = self._book.version(price_id) or (await self._read_on(connection)).version(price_id)
        assert found is not None, "holds refer to prices, and prices are never deleted"
        return found

    async def _read_on(self, connection: Connection) -> PriceBook:
        """The book with what `connection` sees of it, which may be one tenant's part only."""
        seen = await read_book(connection)
        self._book = PriceBook([*self._book.versions(), *seen.versions()])
        return self._book

    async def list_in_force(self, tenant: str) -> list[ListedPrice]:
        return (await self.reload()).all_in_force(tenant, self._clock.now())

    async def put(self, tenant: str, price: Price, valid_from: datetime | None) -> ListedPrice:

        listed = ListedPrice(price, valid_from or self._clock.now(), tenant)

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                # Two admins at once would otherwise take the same version number.
                await connection.execute("LOCK TABLE prices IN SHARE ROW EXCLUSIVE MODE")
                book = await read_book(connection)
                try:
                    known = book.in_force(tenant, price.provider, price.model, listed.valid_from)
                except PriceUnknown:
                    known = None
                if known is None or known.tenant != tenant or known.figures != listed.figures:
                    others = book.models_of(tenant) - {(price.provider, price.model)}
                    if len(others) >= MODELS_OF_TENANT_MAX:
                        bound = f"{MODELS_OF_TENANT_MAX} models"
                        raise RequestInvalid("the tenant has prices of too many models", field="price.model", bound=bound)
                    await append_price(connection, listed)

        await self._database.run(work)
        return (await self.reload()).in_force(tenant, price.provider, price.model, listed.valid_from)


async def read_book(connection: Connection) -> PriceBook:
    return PriceBook(_listed(row) for row in await connection.fetch(f"SELECT {_COLUMNS} FROM prices"))


async def append_price(connection: Connection, listed: ListedPrice) -> None:
    """Add the next version of a price. Versions are counted over all tenants, so that (provider, model, version) is one row."""
    p = listed.price
    await connection.execute(
        "INSERT INTO prices (tenant, provider, model, version, valid_from, input_nanousd_per_mtok, output_nanousd_per_mtok,"
        " cache_read_nanousd_per_mtok, cache_write_5m_nanousd_per_mtok, cache_write_1h_nanousd_per_mtok,"
        " long_context_above_tokens, long_input_nanousd_per_mtok, long_output_nanousd_per_mtok, source)"
        " SELECT $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13"
        " FROM prices WHERE provider = $2 AND model = $3",
        *(listed.tenant, p.provider, p.model, listed.valid_from, p.input, p.output, p.cache_read, p.cache_write_5m, p.cache_write_1h),
        *(p.long_context_above_tokens, p.long_input, p.long_output, p.source),
    )


def _listed(row: Any) -> ListedPrice:
    price = Price(
        provider=row["provider"],
        model=row["model"],
        version=row["version"],
        input=row["input_nanousd_per_mtok"],
        output=row["output_nanousd_per_mtok"],
        cache_read=row["cache_read_nanousd_per_mtok"],
        cache_write_5m=row["cache_write_5m_nanousd_per_mtok"],
        cache_write_1h=row["cache_write_1h_nanousd_per_mtok"],
        long_context_above_tokens=row["long_context_above_tokens"],
        long_input=row["long_input_nanousd_per_mtok"],
        long_output=row["long_output_nanousd_per_mtok"],
        source=row["source"],
    )
    return ListedPrice(price, row["valid_from"], row["tenant"], row["price_id"])
