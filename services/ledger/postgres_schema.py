"""Brings a database to the schema this code was written for: numbered files, each applied once, none ever changed.

The only data it writes are the plans and prices that come with the project.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib import resources

import structlog

from services.ledger.plans import listed_plans
from services.ledger.postgres_database import Connection, Database
from services.ledger.postgres_months import MAKE_MONTHS
from services.ledger.postgres_people import PUT_PLAN, plan_row
from services.ledger.postgres_prices import append_price, read_book
from services.ledger.prices import ALL_TENANTS, ListedPrice, listed_prices

log = structlog.get_logger(__name__)

LOCK_KEY = 0x7461696C72616365  # "tailrace": replicas that start together take turns
MIGRATION_TIMEOUT_S = 6 * 3600.0
"""A migration may move every row there is."""


class MigrationChanged(OSError):
    """A file that was applied before reads differently now, or is gone."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    number: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def migrations() -> list[Migration]:
    """The files of schema/, in the order of their numbers, each of which is there once."""
    found = []
    for file in resources.files(__package__).joinpath("schema").iterdir():
        if match := re.fullmatch(r"(\d{4})_[a-z_]+\.sql", file.name):
            found.append(Migration(int(match[1]), file.name, file.read_text()))
    found.sort(key=lambda migration: migration.number)
    assert len({migration.number for migration in found}) == len(found)
    return found


async def prepare(database: Database) -> None:
    """Apply what is missing and load the project's plans and prices, in one transaction. Raises MigrationChanged.

    A database that is further on than this code is left as it is: during an upgrade the old replicas go on.
    """

    async def work(connection: Connection) -> list[str]:
        async with connection.transaction():
            # Another replica may be moving years of rows.
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY, timeout=MIGRATION_TIMEOUT_S)
            applied = await apply(connection, migrations())
            await connection.execute("SELECT secure_tenants()")
            await connection.execute(MAKE_MONTHS, None)
            await load_plans(connection)
            await load_prices(connection, listed_prices())
            return applied

    for name in await database.run(work):
        log.info("migration_applied", migration=name)


async def apply(connection: Connection, wanted: list[Migration]) -> list[str]:
    """Apply the migrations that the database has not seen; return their names."""
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations ("
        "number integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    known = {row["number"]: row for row in await connection.fetch("SELECT number, name, checksum FROM schema_migrations")}
    applied = []
    for migration in wanted:
        if (row := known.get(migration.number)) is not None:
            if row["checksum"] != migration.checksum:
                raise MigrationChanged(f"{migration.name} was applied as {row['name']} with another text; write a new migration instead")
            continue
        await connection.execute(migration.text, timeout=MIGRATION_TIMEOUT_S)
        await connection.execute(
            "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)",
            migration.number,
            migration.name,
            migration.checksum,
        )
        applied.append(migration.name)
    return applied


async def load_plans(connection: Connection) -> None:
    """Make the common plans what plans.toml says."""
    await connection.executemany(PUT_PLAN, [plan_row("", plan) for plan in listed_plans()])


async def load_prices(connection: Connection, wanted: list[ListedPrice]) -> None:
    """Append a version for every price that the book does not have with these figures from that day on."""
    book = await read_book(connection)
    newest: dict[tuple[str, str, object], ListedPrice] = {}
    for known in book.versions():
        if known.tenant == ALL_TENANTS:
            key = (known.price.provider, known.price.model, known.valid_from)
            if key not in newest or newest[key].price.version < known.price.version:
                newest[key] = known
    for listed in wanted:
        same_day = newest.get((listed.price.provider, listed.price.model, listed.valid_from))
        if same_day is None or same_day.figures != listed.figures:
            await append_price(connection, listed)
