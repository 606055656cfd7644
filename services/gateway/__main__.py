"""The gateway's process. Nothing else may live here."""

from services.chassis.lifecycle import run
from services.gateway.config import Settings
from services.gateway.wiring import build

if __name__ == "__main__":
    run("gateway", Settings, build)
