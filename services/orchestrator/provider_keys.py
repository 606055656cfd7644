"""Which of a provider's keys a call is made with: one as long as it is accepted, another while it is not. Pure; it knows no key itself."""

import time
from collections.abc import Callable, Sequence

from services.chassis.errors import DomainError, ModelMisconfigured, ModelOverloaded

REFUSED_S = 300.0
"""A key that was not accepted is left alone this long. Somebody may pay the bill, but not within seconds."""
LIMITED_S = 10.0
"""A key that is limited is left alone this long if the provider does not say how long; limits count by the minute."""
LIMITED_S_MAX = 300.0


class ProviderKeys:
    """The keys of one provider, and which of them are to be left alone for a while.

    A key is used until it is refused: a provider keeps its prompt cache by account, so that taking turns would be dearer. When all
    are to be left alone, the one whose time ends first is used: the provider has the last word, and one key alone is always used.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        if count < 1:
            raise ValueError("a provider needs a key")
        self._clock = clock
        self._free_at = [0.0] * count
        self._current = 0

    def take(self) -> int:
        """Return the number of the key to use, from 0."""
        now = self._clock()
        if self._free_at[self._current] > now:
            free_at = self._free_at
            self._current = min(range(len(free_at)), key=lambda number: (max(free_at[number], now), number))
        return self._current

    def note(self, number: int, failure: DomainError) -> None:
        """Key `number` was answered with `failure`. Says in its metadata, as `other_key`, if a call at once would use another.

        A model that is not there, another address or an overload is the same for every key.
        """
        status = failure.metadata.get("status", "")
        if isinstance(failure, ModelMisconfigured) and status != "404" and not status.startswith("3"):
            left_alone_s = REFUSED_S
        elif isinstance(failure, ModelOverloaded) and status == "429":
            asked_ms = failure.retry_after_ms
            left_alone_s = LIMITED_S if asked_ms is None else min(LIMITED_S_MAX, asked_ms / 1000)
        else:
            return
        now = self._clock()
        self._free_at[number] = max(self._free_at[number], now + left_alone_s)
        if any(free_at <= now for free_at in self._free_at):
            failure.metadata["other_key"] = str(True)


def split_keys(value: str) -> Sequence[str]:
    """The keys in a variable that holds one, or several with commas between."""
    return tuple(key for part in value.split(",") if (key := part.strip()))
