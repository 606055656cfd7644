"""Ingestion against the real suite, in short: kill -9 loses and doubles nothing, and no answer rests on what was replaced."""

from collections.abc import AsyncIterator

import pytest

from bench import ingestion_faults
from tests.integration.ledger.ledger_kit import audit
from tests.suite import Suite, running

pytestmark = pytest.mark.slow
SEED = 7


@pytest.fixture(scope="module")
async def suite() -> AsyncIterator[Suite]:
    """A suite of its own, because retrieval is killed. The books are whole after all."""
    async with running(TAILRACE_RETRIEVAL_INGEST_LEASE_S=ingestion_faults.LEASE_S) as suite:
        yield suite
        assert await audit(suite.postgres.url) == {}


async def test_no_answer_rests_on_a_replaced_or_deleted_version(suite: Suite) -> None:
    """Fresh or cached, also while an answer from the old version is still being written."""
    figures = await ingestion_faults.versions(suite, 6, SEED)

    assert (6, 0) == (figures["n"], figures["answers_from_the_old_version"])


async def test_a_killed_service_ends_its_jobs_with_exactly_the_chunks_of_a_clean_ingestion(suite: Suite) -> None:
    """Wherever it was."""
    figures = await ingestion_faults.kill(suite, 2, SEED)

    assert (2, 0, 0) == (figures["jobs_that_ended"], figures["collections_that_differ"], figures["not_accepted"])
