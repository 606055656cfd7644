"""`python -m services.ledger`: the ledger's process."""

from services.chassis.lifecycle import run
from services.ledger.config import Settings
from services.ledger.wiring import build

run("ledger", Settings, build)
