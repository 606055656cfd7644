"""How much of what lasts, such as a resumed stream or a socket, one user may hold open at this process. It knows no plan and no route."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from services.chassis.errors import RateLimited
from services.chassis.principal import Principal

RETRY_AFTER_MS = 1000
"""Nobody knows when the user lets one go."""


class Places:
    """Places of one kind. Without a bound for each, one user could take all that the process has."""

    def __init__(self, kind: str, each_max: int) -> None:
        """`kind` is told in refusals; `each_max` is what a user may hold if nobody says otherwise."""
        self._kind = kind
        self._each_max = each_max
        self._held: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def held(self, principal: Principal, each_max: int | None = None) -> Iterator[None]:
        """Hold a place inside the block. Raises RateLimited if `principal` holds as many as it may."""
        user = (principal.tenant, principal.user)
        limit = self._each_max if each_max is None else each_max
        if self._held[user] >= limit:
            raise RateLimited(
                f"at most {limit} {self._kind} at the same time for this user",
                limit_kind=self._kind,
                limit_scope="user",
                limit=limit,
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._held[user] += 1
        try:
            yield
        finally:
            self._held[user] -= 1
            if not self._held[user]:
                del self._held[user]
