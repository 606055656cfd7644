"""Everything the ledger owns, from the database up to the server. Acquired downwards, released in reverse."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.chassis.clock import Clock, SystemClock
from services.chassis.ending import ended
from services.chassis.lifecycle import Service
from services.chassis.passport import Passport
from services.chassis.server import Server, passport_identity
from services.ledger import postgres_schema
from services.ledger.config import Settings
from services.ledger.postgres_budgets import PostgresBudgets
from services.ledger.postgres_conversations import PostgresConversations
from services.ledger.postgres_database import opened
from services.ledger.postgres_feed import PostgresFeed
from services.ledger.postgres_holds import PostgresHolds
from services.ledger.postgres_keys import PostgresKeys
from services.ledger.postgres_leases import PostgresLeases, Terms
from services.ledger.postgres_months import PostgresMonths
from services.ledger.postgres_operations import PostgresOperations
from services.ledger.postgres_people import PostgresPeople
from services.ledger.postgres_prices import PostgresPrices
from services.ledger.postgres_privacy import PostgresPrivacy
from services.ledger.postgres_sums import PostgresSums
from services.ledger.postgres_usage import PostgresUsage
from services.ledger.prices import nanousd
from services.ledger.roller import roll_forever
from services.ledger.rpc import SERVICE_NAME, LedgerServicer, register
from services.ledger.sweeper import sweep_forever


@contextlib.asynccontextmanager
async def build(settings: Settings, set_clock: Clock | None = None) -> AsyncIterator[Service]:
    """The ledger, ready to listen. Raises OSError if the database does not answer in time or is not ours to use.

    `set_clock` says for everything what time it is; with none, money and months go by the database's clock, which all replicas share.
    """
    clock = set_clock or SystemClock()
    url = settings.database_url.get_secret_value()
    async with opened(url, connections_max=settings.connections_max, wait_s=settings.start_wait_s) as database:
        await postgres_schema.prepare(database)

        prices = PostgresPrices(database, clock)
        await prices.reload()
        holds = PostgresHolds(database, prices, set_clock)
        terms = Terms(
            settings.lease_percent,
            nanousd(str(settings.lease_least_usd)),
            nanousd(str(settings.lease_most_usd)),
            settings.lease_life_ms,
        )
        credit = PostgresLeases(database, prices, terms, set_clock)
        provider, _, model = settings.baseline_model.partition("/")
        baseline = (provider, model) if model else None
        operations = PostgresOperations(database, holds, prices, clock, baseline=baseline, retention_days=settings.retention_days)
        feed = PostgresFeed(url, database)
        conversations = PostgresConversations(database)
        servicer = LedgerServicer(
            holds=holds,
            credit=credit,
            lease_life_ms=terms.life_ms,
            operations=operations,
            usage=PostgresUsage(database),
            feed=feed,
            people=PostgresPeople(database),
            privacy=PostgresPrivacy(database),
            budgets=PostgresBudgets(database, clock),
            keys=PostgresKeys(database, clock),
            conversations=conversations,
            prices=prices,
            clock=clock,
        )

        key = settings.internal_key.get_secret_value().encode()
        server = Server(passport_identity(Passport(key)), reflect=settings.environment == "development", tls=settings.mutual_tls())
        server.add(register, servicer, SERVICE_NAME)

        graces = {"grace_ms": settings.sweep_grace_ms, "lease_grace_ms": settings.lease_grace_ms}
        sweeping = sweep_forever(holds, credit, conversations, interval_ms=settings.sweep_interval_ms, **graces)
        rolling = roll_forever(
            PostgresSums(database),
            PostgresMonths(database, set_clock),
            clock,
            interval_ms=settings.roll_interval_ms,
            retention_days=settings.retention_days,
        )
        background = [
            asyncio.create_task(sweeping, name="sweeper"),
            asyncio.create_task(feed.run(), name="feed"),
            asyncio.create_task(rolling, name="roller"),
        ]
        try:
            yield Service(server, settings.port, probes={"postgres": database.probe}, stopping=servicer.end_streams)
        finally:
            await ended(*background)
