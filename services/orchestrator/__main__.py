"""The orchestrator's process."""

from services.chassis.lifecycle import run
from services.orchestrator.config import OrchestratorSettings
from services.orchestrator.wiring import build

if __name__ == "__main__":
    run("orchestrator", OrchestratorSettings, build)
