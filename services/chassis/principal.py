"""Who a request is made for, as a value that travels with its tasks. How it crosses a wire is decided in `passport`."""

from collections.abc import Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from services.chassis.errors import NotAllowed, NotAuthenticated

ROLES = frozenset({"user", "service", "admin"})
SCOPES = frozenset({"answers", "search", "documents:read", "documents:write", "records", "admin"})
"""What an API key can be narrowed to; the words are part of the contract (tailrace.common.v1.Principal)."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A verified caller. Tenant and user never come from anywhere else."""

    tenant: str
    user: str
    roles: frozenset[str] = frozenset({"user"})
    api_key_id: str = ""
    scopes: frozenset[str] = frozenset()
    """What an API key was narrowed to; empty = everything its roles may do."""
    groups: frozenset[str] = frozenset()
    """Groups of the user inside the tenant; documents can be limited to them."""
    plan: str = ""
    """Name of the user's plan; empty = not known here."""
    tiers: frozenset[str] = frozenset()
    """Tiers the plan may use; empty = all, or not known here."""
    cache_scope: str = ""
    """Whom the plan shares cached answers with: `tenant`, `user` or `off`; empty = it does not say."""

    tools: frozenset[str] | None = None
    """Tools of the suite that the plan may use; None = not known here. See `has_tool`."""

    def require_tools(self, names: Iterable[str]) -> None:
        """Raise NotAllowed for the first of `names` that the plan has not, as far as that is known."""
        for name in names:
            if self.tools is not None and not has_tool(self.tools, name):
                raise NotAllowed("the plan does not have this tool", needs=name[:64])

    def require(self, role: str) -> None:
        """Raise NotAllowed unless the principal has `role`."""
        if role not in self.roles:
            raise NotAllowed(f"the role {role} is needed", needs=role)

    def require_scope(self, scope: str) -> None:
        """Raise NotAllowed if the principal was narrowed to other scopes than `scope`."""
        if self.scopes and scope not in self.scopes:
            raise NotAllowed(f"the API key was not made for {scope}", needs=scope)


def has_tool(tools: Collection[str], name: str) -> bool:
    """Whether a plan with `tools` has this one: by its name, by `server__*` for all of a server, or by `*` for all there are."""
    return not {name, f"{name.partition('__')[0]}__*", "*"}.isdisjoint(tools)


_current: ContextVar[Principal | None] = ContextVar("current_principal", default=None)


def current_principal() -> Principal:
    """The caller of the request this task works for. Raises NotAuthenticated if there is none."""
    principal = _current.get()
    if principal is None:
        raise NotAuthenticated("no principal came with the call", cause="missing")
    return principal


def set_current(principal: Principal | None) -> None:
    """Bind the caller to this task and the tasks it starts."""
    _current.set(principal)
