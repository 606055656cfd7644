"""What the launcher is told, and where things lie in the state directory. What a service is told is in its own `config`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from services.chassis.config import ServiceSettings
from services.local.stores import secret_file

MODEL_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "GEMINI_API_KEY")
"""Each of these makes a provider's models available; without any, answers are extractive."""


class LocalSettings(ServiceSettings):
    """Settings of `tailrace up`. The services get the same environment."""

    prefix: ClassVar[str] = "TAILRACE_LOCAL_"

    http_port: int = Field(8080, ge=1, le=65535, validation_alias="TAILRACE_HTTP_PORT")
    """Where the page and the HTTP routes are."""
    gateway_port: int = Field(50050, ge=1, le=65535, validation_alias="TAILRACE_GATEWAY_PORT")
    """Where the gateway takes gRPC calls."""
    orchestrator_port: int = Field(50051, ge=1, le=65535, validation_alias="TAILRACE_ORCHESTRATOR_PORT")
    """Where the orchestrator listens."""
    retrieval_port: int = Field(50052, ge=1, le=65535, validation_alias="TAILRACE_RETRIEVAL_PORT")
    """Where retrieval listens."""
    ledger_port: int = Field(50053, ge=1, le=65535, validation_alias="TAILRACE_LEDGER_PORT")
    """Where the ledger listens."""
    database_url: str = Field("", validation_alias="DATABASE_URL")
    """A PostgreSQL that runs elsewhere. Empty = start one of our own."""
    redis_url: str = Field("", validation_alias="REDIS_URL")
    """A Valkey or Redis that runs elsewhere. Empty = start one of our own."""

    @classmethod
    def of(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings; an internal key that nobody set is made and kept in the state directory. Raises SettingsError, OSError."""
        environ = os.environ if environ is None else environ
        if not environ.get("TAILRACE_INTERNAL_KEY") and not environ.get("TAILRACE_INTERNAL_KEY_FILE"):
            path = state_dir(environ) / "internal-key"
            secret_file(path)
            environ = {**environ, "TAILRACE_INTERNAL_KEY_FILE": str(path)}
        return cls.load(environ)

    @property
    def ports(self) -> dict[str, int]:
        """Every fixed port by the variable that moves it."""
        ports = (self.http_port, self.gateway_port, self.orchestrator_port, self.retrieval_port, self.ledger_port)
        return dict(zip(PORT_VARIABLES, ports, strict=True))

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        return f"http://{self.near_host}:{self.http_port}"

    @property
    def near_host(self) -> str:
        """Address of this machine's services as seen from itself."""
        return "127.0.0.1" if self.bind_host in {"0.0.0.0", "::"} else self.bind_host  # noqa: S104 - compared, not bound


PORT_VARIABLES = (
    "TAILRACE_HTTP_PORT",
    "TAILRACE_GATEWAY_PORT",
    "TAILRACE_ORCHESTRATOR_PORT",
    "TAILRACE_RETRIEVAL_PORT",
    "TAILRACE_LEDGER_PORT",
)


def state_dir(environ: Mapping[str, str]) -> Path:
    """The state directory that `environ` names, absolute, so that every process means the same."""
    return Path(environ.get("TAILRACE_STATE_DIR") or ".tailrace").absolute()


def make_state_dir(path: Path) -> None:
    """Make the state directory, closed to others; root's can be passed through, because its PostgreSQL runs as another user."""
    path.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
