"""One provider call for all who ask the same at the same time: whose answer is made, and how the others are told what that one is told.

What may be shared at all is decided in `answer`, and a key has everything in it that an answer depends on. No model is called here.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import structlog

from services.chassis.ending import ended
from services.chassis.errors import Unavailable
from services.orchestrator.domain import Edition, Event, Flight, Question, Recorded, SharedAnswer
from services.orchestrator.log import EventLog, Reader
from services.orchestrator.mirrors import Mirrors
from services.orchestrator.ports import SharedFlights
from services.orchestrator.standalone import normalise

log = structlog.get_logger(__name__)

LINGER_S = 1.0
"""How long it is known that an answer was remembered: who looked into the cache just before, and comes here just after, looks again."""
LEAST_SHARE = 0.5
"""Of the time that an answer has, how much whoever it follows must have left."""
TELL_AGAIN_S = 3.0
"""How often an answer of another replica is told that it is followed."""
PAUSE_S = 1.0
"""How long a store that failed is left alone. Until then every replica has its own flights."""
CLAIMS_MAX = 3


@dataclass(slots=True, eq=False)
class Led:
    """An answer of this process, which others to the same question may follow."""

    key: str
    flight: Flight
    events: EventLog
    followers: int = 0
    """Of this process."""
    is_claimed: bool = False
    """Whether the other replicas know of it, or may."""


Ahead = Led | Flight
"""Whom an answer follows: one of this process or of another."""


def flight_key(question: Question, scope: str, edition: Edition) -> str:
    """Everything an answer depends on, its words normalised: the very same question, in the very same place, to the same documents."""
    digest = hashlib.sha256()
    tenant, epoch = question.principal.tenant, str(edition.epoch)
    for part in (tenant, scope, question.collection, normalise(question.text), epoch, edition.audience):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))  # lengths, so that no two lists of parts look alike
        digest.update(encoded)
    return digest.hexdigest()


class SingleFlight:
    """The flights of this process, and the way to those of the others. Used from one event loop."""

    def __init__(self, shared: SharedFlights, mirrors: Mirrors, replica: str, heard: Callable[[bytes], Event | None]) -> None:
        """`heard` reads an event as another replica made it; None for one that is of no interest here."""
        self._shared, self._mirrors, self._replica, self._heard = shared, mirrors, replica, heard
        self._by_key: dict[str, Led] = {}
        self._by_answer: dict[str, Led] = {}
        self._skip_until = 0.0

    def flight(self, answer_id: str, ends_at: float) -> Flight:
        """An answer of this process that has time until `ends_at`, seconds since 1970."""
        return Flight(answer_id, self._replica, ends_at)

    def local(self, key: str, own: Flight, lost: Ahead | None) -> Led | None:
        """Who is ahead in this process, of those that have not failed, if not `lost`."""
        led = self._by_key.get(key)
        if led is None or led is lost or led.flight.answer_id == own.answer_id or led.events.failure is not None:
            return None
        return led

    def lead(self, key: str, own: Flight, events: EventLog) -> Led:
        """Let those who come to this process from now on be told what `events` tell."""
        led = self._by_answer.get(own.answer_id) or Led(key, own, events)
        self._by_key[key] = self._by_answer[own.answer_id] = led
        return led

    async def claim(self, led: Led, instead_of: Ahead | None = None) -> Flight | None:
        """Let the other replicas know of `led`, unless somebody is ahead there, who is returned then.

        `instead_of` is who failed to be of use. A store that is away knows of nobody.
        """
        stale = None if instead_of is None else _flight_of(instead_of)
        if time.monotonic() < self._skip_until:
            return None
        led.is_claimed = True
        try:
            for _ in range(CLAIMS_MAX):
                other = await self._shared.claim(led.key, led.flight, stale)
                if other is None:
                    return None
                if other.replica != self._replica or other.ends_at == 0:
                    led.is_claimed = False
                    return other
                stale = other  # an answer of ours that is over, or goes alone
        except Unavailable as error:
            self._skip_until = time.monotonic() + PAUSE_S
            log.warning("flights_not_shared", reason=error.reason)
        return None

    def waits_for(self, own: Flight, ahead: Ahead, now: float) -> bool:
        """Whether `ahead` has the time to be of use to `own`."""
        if self.has_landed(ahead):
            return True
        return _flight_of(ahead).ends_at - now >= LEAST_SHARE * (own.ends_at - now)

    @contextlib.asynccontextmanager
    async def following(self, ahead: Ahead) -> AsyncIterator[Reader]:
        """Read what `ahead` tells, from its beginning. Raises Overloaded, Unavailable for one of another replica."""
        if isinstance(ahead, Led):
            reader = ahead.events.reader(0, is_follower=True)
            ahead.followers += 1
            try:
                yield reader
            finally:
                ahead.followers -= 1
                ahead.events.leave(reader)
            return
        with contextlib.suppress(Unavailable):  # it is told again soon, and the log is what is wanted
            await self._shared.follow(ahead.answer_id)
        telling = asyncio.create_task(self._tell_forever(ahead.answer_id), name=f"follow {ahead.answer_id}")
        try:
            async with self._mirrors.reading(ahead.answer_id, SharedAnswer(("", ""), ahead.replica, False), 0, is_follower=True) as (
                _,
                reader,
            ):
                yield reader
        finally:
            await ended(telling)

    def heard(self, event: Event) -> Event | None:
        """An event as this process would have made it; None if it is of no interest to who follows."""
        return self._heard(event.payload) if isinstance(event, Recorded) else event

    async def is_followed(self, answer_id: str) -> bool:
        """Whether other answers are told what this one is told."""
        led = self._by_answer.get(answer_id)
        if led is None or led.followers:
            return led is not None
        if not led.is_claimed:
            return False
        try:
            return await self._shared.is_followed(answer_id)
        except Unavailable:
            return False

    def has_landed(self, ahead: Ahead) -> bool:
        """Whether there is nothing to follow any more, but the caches have it."""
        return _flight_of(ahead).ends_at == 0

    async def land(self, led: Led, *, remembered: bool) -> None:
        """The answer is over; from now on nobody follows it. Whether it is `remembered` is known a moment longer."""
        flight = led.flight
        if remembered:
            led.flight = replace(flight, ends_at=0.0)
            asyncio.get_running_loop().call_later(LINGER_S, self._forget, led)
        else:
            self._forget(led)
        if led.is_claimed:
            with contextlib.suppress(Unavailable):  # it expires
                await self._shared.release(led.key, flight, LINGER_S if remembered else 0.0)

    def _forget(self, led: Led) -> None:
        if self._by_key.get(led.key) is led:
            del self._by_key[led.key]
        self._by_answer.pop(led.flight.answer_id, None)

    async def _tell_forever(self, answer_id: str) -> None:
        while True:
            await asyncio.sleep(TELL_AGAIN_S)
            with contextlib.suppress(Unavailable):
                await self._shared.follow(answer_id)


def _flight_of(ahead: Ahead) -> Flight:
    return ahead.flight if isinstance(ahead, Led) else ahead
