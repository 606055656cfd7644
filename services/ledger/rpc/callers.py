"""Who calls, and what a streaming call is answered through."""

from typing import Any, Protocol

from services.chassis.principal import Principal, current_principal


class Writer(Protocol):
    """The part of a call's context that a streaming RPC needs."""

    async def write(self, message: Any) -> None:
        """Send one message; waits while the reader is slow."""
        ...


def admin() -> Principal:
    """The caller, who must be an admin, and not by a key that was narrowed to something else. Raises NotAllowed."""
    principal = current_principal()
    principal.require("admin")
    principal.require_scope("admin")
    return principal


def service() -> Principal:
    """The caller, who must be a service. Raises NotAllowed."""
    principal = current_principal()
    principal.require("service")
    return principal
