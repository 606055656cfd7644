"""Limits of a subject, pure and without a clock: sliding windows of amounts, leases, and all or nothing over several of both.

What the Redis script must do is written here as plain Python, which also stands in while Redis is away. No plan and no principal here.

A window admits an amount if with it no more than the limit was charged in the `window_us` before. There are no buckets whose edge
could be used twice: charges within a 600th of the window are kept as one entry, which leaves when the latest of them is one window
old. That costs at most a 600th of what is allowed, never admits too much, and bounds what is remembered whatever the limit is.

What was charged for an answer may be kept as a grant, by a name that the same request leads to whenever it is sent. Sent again, it is one
more request and nothing else: it is for the same answer, which has its tokens and its place already.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

WINDOW_US = 60_000_000
ENTRIES_PER_WINDOW = 600
"""Into how many entries a window is kept at most, but for the one under way at either end."""
LEASE_US = 30_000_000
"""How long a lease lives that nobody renews."""
GRANT_US = 24 * 3600 * 1_000_000
"""How long a grant is kept: as long as an idempotency key stands for its answer."""
LEASE_RETRY_US = 1_000_000
"""When to try again for a lease: nobody knows when an answer ends."""


class Kind(StrEnum):
    """What is limited."""

    REQUESTS = "requests"
    READS = "reads"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"


@dataclass(frozen=True, slots=True)
class Charge:
    """One limit that must admit, and how much it is charged. More than the whole limit counts as the limit: it waits, not for ever."""

    key: str
    kind: Kind
    scope: str
    """Whose limit it is: `user`, `tenant` or `key`."""
    limit: int
    """At least 1."""
    amount: int = 1
    """At least 1; always 1 of a lease."""

    @property
    def charged(self) -> int:
        return min(self.amount, self.limit)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one limit said. Times are microseconds from now."""

    allowed: bool
    remaining: int
    """How much more would be admitted now."""
    retry_after_us: int
    """When this limit would admit it; 0 if it does."""
    reset_us: int
    """When the window is empty again, if nothing more is charged; 0 of leases."""
    entry: int
    """Where a window keeps the charge, for `Correction`; 0 if nothing was charged."""
    charged: int = 0
    """What it is charged there, now or when the grant was given; 0 of leases."""


class Before(StrEnum):
    """Whether the same request came before."""

    NEVER = "never"
    OPEN = "open"
    """Its answer was begun, and is not known to have ended."""
    ENDED = "ended"
    """Its answer has ended and would only be told again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all limits said together: charged if every one of them allowed it, else nothing was."""

    allowed: bool
    verdicts: tuple[Verdict, ...]
    now_us: int
    """The time that was decided by."""
    before: Before = Before.NEVER
    lease: str = ""
    """The lease that the answer holds: of a request that came before, the one that was given to it then."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What was really used instead of what was charged: the rest is given back where it was charged, or charged now without asking."""

    key: str
    entry: int
    charged: int
    used: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is to be set right once an answer has ended."""

    corrections: Sequence[Correction] = ()
    """With a grant each is made once, by whoever comes first, since everybody who asked for the answer wants to make it."""
    lease: str = ""
    """Ended in all of `lease_keys`. Only the grant that gave it is changed; empty = none is."""
    lease_keys: Sequence[str] = ()
    grant: str = ""
    lasts: bool = False
    """Whether the same request would be told the same answer again. If not, its grant ends and it is admitted like any other."""


@dataclass(slots=True)
class _Grant:
    lease: str
    """Empty once it has ended, while corrections may still come."""
    before: Before = Before.OPEN
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Windows of tokens: entry and what was charged there, until it is corrected."""


class Window:
    """The charges of one subject."""

    def __init__(self, window_us: int) -> None:
        self._window_us = window_us
        self._grain_us = window_us // ENTRIES_PER_WINDOW
        self._entries: deque[list[int]] = deque()
        """Of each: time of the first charge, time of the latest, amount."""
        self._head = 0
        """Number of the first entry. Numbers begin with the time, so that none ever comes again."""
        self._sum = 0
        self.latest_us = 0

    def __len__(self) -> int:
        return len(self._entries)

    def look(self, now_us: int, limit: int, amount: int) -> Verdict:
        """Whether `amount` would be admitted at `now_us`, which is not before `latest_us`."""
        self._prune(now_us)
        amount = min(amount, limit)
        reset_us = self._entries[-1][1] + self._window_us - now_us if self._entries else 0
        if self._sum + amount <= limit:
            return Verdict(True, limit - self._sum, 0, reset_us, 0)
        left, leaves_us = self._sum, now_us
        for _, last_us, charged in self._entries:
            left -= charged
            leaves_us = last_us + self._window_us
            if left + amount <= limit:
                break
        return Verdict(False, max(0, limit - self._sum), leaves_us - now_us, reset_us, 0)

    def charge(self, now_us: int, amount: int) -> int:
        """Charge `amount` at `now_us`; return the entry's number."""
        self._prune(now_us)
        if not self._entries:
            self._head = now_us
        if self._entries and now_us - self._entries[-1][0] < self._grain_us:
            self._entries[-1][1] = now_us
            self._entries[-1][2] += amount
        else:
            self._entries.append([now_us, now_us, amount])
        self._sum += amount
        self.latest_us = now_us
        return self._head + len(self._entries) - 1

    def give_back(self, entry: int, amount: int) -> None:
        """Take `amount` from what entry number `entry` was charged, if it is still there."""
        index = entry - self._head
        if 0 <= index < len(self._entries):
            taken = min(amount, self._entries[index][2])
            self._entries[index][2] -= taken
            self._sum -= taken

    def _prune(self, now_us: int) -> None:
        while self._entries and self._entries[0][1] <= now_us - self._window_us:
            self._sum -= self._entries.popleft()[2]
            self._head += 1


class Leases:
    """What a subject has under way, by its end: all leases have one lifetime, so the one held last ends last."""

    def __init__(self) -> None:
        self._ends_us: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ends_us)

    def look(self, now_us: int, limit: int) -> Verdict:
        """Whether one more would be admitted."""
        while self._ends_us and next(iter(self._ends_us.values())) <= now_us:
            self._ends_us.popitem(last=False)
        free = max(0, limit - len(self._ends_us))
        return Verdict(free > 0, free, 0 if free else LEASE_RETRY_US, 0, 0)

    def hold(self, lease: str, ends_us: int) -> None:
        """Hold `lease` until then. One that had ended is held again: what is under way counts."""
        self._ends_us[lease] = ends_us
        self._ends_us.move_to_end(lease)

    def release(self, lease: str) -> None:
        self._ends_us.pop(lease, None)


class LocalLimiter:
    """The limits of this process alone, of the latest subjects."""

    def __init__(self, window_us: int = WINDOW_US, lease_us: int = LEASE_US, *, subjects_max: int = 30_000) -> None:
        self._window_us = window_us
        self._lease_us = lease_us
        self._subjects_max = subjects_max
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._leases: dict[str, Leases] = {}
        self._grants: OrderedDict[str, _Grant] = OrderedDict()

    def admit(self, now_us: int, charges: Sequence[Charge], lease: str = "", grant: str = "") -> Outcome:
        """Charge all of `charges`, or none. A clock that goes back counts as standing still.

        With the name of a grant that is kept, only requests are charged.
        """
        windows = {charge.key: self._window(charge.key) for charge in charges if charge.kind is not Kind.CONCURRENCY}
        now_us = max([now_us, *(window.latest_us for window in windows.values())])
        given = self._grants.get(grant)
        if given is None or not given.lease:
            given = None
        before, lease = (given.before, given.lease) if given else (Before.NEVER, lease)
        verdicts = []
        for charge in charges:
            if charge.kind is Kind.CONCURRENCY:
                verdict = self._leases.get(charge.key, Leases()).look(now_us, charge.limit)
            else:
                verdict = windows[charge.key].look(now_us, charge.limit, charge.amount)
            verdicts.append(replace(verdict, allowed=True, retry_after_us=0) if given and _is_granted(charge) else verdict)
        if not all(verdict.allowed for verdict in verdicts):
            return Outcome(False, tuple(verdicts), now_us, before, lease)
        charged = []
        for charge, verdict in zip(charges, verdicts, strict=True):
            left = verdict.remaining - charge.charged
            if given and _is_granted(charge):
                entry, amount = given.reserved.get(charge.key, (0, 0))
                charged.append(replace(verdict, entry=entry, charged=amount))
                if charge.kind is Kind.CONCURRENCY and before is Before.OPEN:
                    self.hold(now_us, [(charge.key, lease)])
            elif charge.kind is Kind.CONCURRENCY:
                self.hold(now_us, [(charge.key, lease)])
                charged.append(Verdict(True, left, 0, 0, 0))
            else:
                entry = windows[charge.key].charge(now_us, charge.charged)
                charged.append(Verdict(True, left, 0, self._window_us, entry, charge.charged))
        if grant and not given:
            reserved = {c.key: (v.entry, v.charged) for c, v in zip(charges, charged, strict=True) if c.kind is Kind.TOKENS}
            self.keep(grant, lease, reserved)
        return Outcome(True, tuple(charged), now_us, before, lease)

    def keep(self, grant: str, lease: str, reserved: dict[str, tuple[int, int]] | None = None) -> None:
        """Keep a grant by its name: the lease of its answer, and entry and charge of each window of tokens."""
        self._grants[grant] = _Grant(lease, reserved=reserved or {})
        self._grants.move_to_end(grant)
        if len(self._grants) > self._subjects_max:
            self._grants.popitem(last=False)

    def settle(self, now_us: int, settlement: Settlement) -> None:
        """See Settlement."""
        given = self._grants.get(settlement.grant)
        for correction in settlement.corrections:
            delta = correction.used - correction.charged
            if settlement.grant:
                if given is not None and given.reserved.get(correction.key) == (correction.entry, correction.charged):
                    del given.reserved[correction.key]
                elif settlement.lasts and not (given is not None and given.lease and given.before is Before.ENDED):
                    delta = correction.used  # given back when the first sending failed, and yet there is an answer
                else:
                    continue
            window = self._window(correction.key)
            if delta < 0:
                window.give_back(correction.entry, -delta)
            elif delta:
                window.charge(max(now_us, window.latest_us), delta)
        self.release([(key, settlement.lease) for key in settlement.lease_keys])
        if given is not None and settlement.lease and given.lease == settlement.lease:
            if settlement.lasts:
                given.before = Before.ENDED
            else:
                given.lease = ""

    def hold(self, now_us: int, leases: Sequence[tuple[str, str]]) -> None:
        """Hold leases (key and name), known or not, for another lifetime."""
        for key, lease in leases:
            self._leases.setdefault(key, Leases()).hold(lease, now_us + self._lease_us)

    def release(self, leases: Sequence[tuple[str, str]]) -> None:
        """End leases; one that is unknown has ended."""
        for key, lease in leases:
            held = self._leases.get(key)
            if held is not None:
                held.release(lease)
                if not held:
                    del self._leases[key]

    def _window(self, key: str) -> Window:
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window(self._window_us)
            if len(self._windows) > self._subjects_max:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        return window


def _is_granted(charge: Charge) -> bool:
    """Whether a grant has it already."""
    return charge.kind in (Kind.TOKENS, Kind.CONCURRENCY)
