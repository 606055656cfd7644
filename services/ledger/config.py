"""What the ledger is told by its environment. Nothing here opens anything."""

from decimal import Decimal
from typing import ClassVar

from pydantic import Field, SecretStr

from services.chassis.config import ServiceSettings


class Settings(ServiceSettings):
    """The ledger's settings."""

    prefix: ClassVar[str] = "TAILRACE_LEDGER_"

    port: int = Field(50053, ge=0, le=65535, validation_alias="TAILRACE_LEDGER_PORT")
    """Where to listen; 0 = any free port."""
    target: str = Field("127.0.0.1:50053", validation_alias="TAILRACE_LEDGER_TARGET")
    """Where the other services find the ledger. Claimed here because all services share one environment; not used."""
    database_url: SecretStr = Field(validation_alias="DATABASE_URL")
    """PostgreSQL 15 or newer, `postgresql://user:password@host:port/database`. Needs no extension and no superuser."""
    connections_max: int = Field(10, ge=2, le=200, validation_alias="TAILRACE_LEDGER_CONNECTIONS_MAX")
    """Most connections to PostgreSQL from this process, besides one that listens for recorded operations."""
    start_wait_s: float = Field(60.0, ge=0, le=600, validation_alias="TAILRACE_LEDGER_START_WAIT_S")
    """How long a start waits for PostgreSQL before it gives up."""
    sweep_interval_ms: int = Field(5_000, ge=100, le=600_000, validation_alias="TAILRACE_LEDGER_SWEEP_INTERVAL_MS")
    """How often expired holds are looked for."""
    sweep_grace_ms: int = Field(60_000, ge=0, le=3_600_000, validation_alias="TAILRACE_LEDGER_SWEEP_GRACE_MS")
    """How long after its expiry a hold waits for the true figures, which may still be in a spool. The money stays set aside meanwhile.

    A lease waits as long after the longest answer that may have been begun on it, and not less than this after the database was away:
    whoever drew on it must come first."""
    answer_deadline_s: float = Field(300.0, gt=0, le=3600, validation_alias="TAILRACE_ANSWER_DEADLINE_S")
    """Longest answer, as the orchestrators are told: so long a call may run that was drawn on a lease just before it expired."""
    lease_life_ms: int = Field(120_000, ge=5_000, le=3_600_000, validation_alias="TAILRACE_LEDGER_LEASE_LIFE_MS")
    """How long an orchestrator may draw on a lent slice of a budget after it last heard from the ledger."""
    lease_percent: int = Field(1, ge=1, le=10, validation_alias="TAILRACE_LEDGER_LEASE_PERCENT")
    """The slice, as a share of the least that any budget of the user has left."""
    lease_least_usd: Decimal = Field(Decimal("0.25"), ge=0, le=1000, decimal_places=9, validation_alias="TAILRACE_LEDGER_LEASE_LEAST_USD")
    """Least slice, in USD: a few calls of a small budget. Never more than a tenth of what is left."""
    lease_most_usd: Decimal = Field(Decimal(10), gt=0, le=100_000, decimal_places=9, validation_alias="TAILRACE_LEDGER_LEASE_MOST_USD")
    """Largest slice, in USD, and that of a user without any budget."""
    roll_interval_ms: int = Field(1_000, ge=100, le=600_000, validation_alias="TAILRACE_LEDGER_ROLL_INTERVAL_MS")
    """How often recorded operations are added to the sums of usage. What is not added yet is read singly, so answers are never behind."""
    retention_days: int = Field(0, ge=0, le=36_500, validation_alias="TAILRACE_LEDGER_RETENTION_DAYS")
    """How many days operations, attempts and steps are kept at least; 0 = for ever. They go by whole months in UTC.

    Books and sums of usage stay."""
    baseline_model: str = Field(
        "anthropic/claude-opus-5-5", pattern=r"^(|[^/]{1,64}/[^/]{1,128})$", validation_alias="TAILRACE_LEDGER_BASELINE_MODEL"
    )
    """`provider/model` that the cost of tiers is compared with, to say what they saved. Empty = not counted."""

    @property
    def lease_grace_ms(self) -> int:
        """How long after its expiry a lease waits for whoever drew on it."""
        return int(self.answer_deadline_s * 1000) + self.sweep_grace_ms
