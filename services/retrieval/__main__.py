from services.chassis.lifecycle import run
from services.retrieval.config import Settings
from services.retrieval.wiring import build

run("retrieval", Settings, build)
