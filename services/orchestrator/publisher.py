"""Carries the logs of this replica's answers to where all replicas can read them. It makes no event and serves no reader.

Nothing waits for it: what cannot be written now stays in the log and goes with the next flush. There is at most one flush in
FOLLOWED_INTERVAL_S, for all answers together, and none for an answer before its first text has left. A log that has begun and is read
nowhere else may wait longer, so that a round trip carries more of it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from services.chassis.errors import DomainError
from services.orchestrator.domain import LogPart
from services.orchestrator.log import Entry, EventLog
from services.orchestrator.ports import SharedLogs

log = structlog.get_logger(__name__)

FOLLOWED_INTERVAL_S = 0.05
UNFOLLOWED_INTERVAL_S = 0.2
REGISTER_DELAY_S = 0.02
"""An answer that ends sooner, from the cache, is made known with its events: one round trip instead of two."""
PART_EVENTS_MAX = 500
PART_BYTES_MAX = 256 * 1024
EVENT_OVERHEAD_BYTES = 40
"""What an event takes in the store besides its payload, about."""
PAUSE_S = 0.5
"""How long a store that failed is left alone."""
Owner = tuple[str, str]


@dataclass(slots=True)
class _Published:
    """An answer on its way, and how much of it has arrived."""

    events: EventLog
    owner: Owner
    stop: Callable[[bool], None]
    """Called with True if another replica has ended the answer, with False if its owner asked for the end."""
    written: int = 0
    written_at: float = 0.0
    """When it was written last, or when its first text came; 0 before that."""
    followed: bool = False
    """Whether it is read at another replica, as far as is known."""
    bytes: int = 0
    keyed: bool = False
    """Whether an idempotency key stands for it."""


class Publisher:
    """Open while answers run; `run_forever` does the work."""

    def __init__(
        self,
        logs: SharedLogs,
        replica: str,
        render: Callable[[str, Entry], bytes],
        *,
        kept_s: float,
        bytes_max: int,
        intervals_s: tuple[float, float] = (FOLLOWED_INTERVAL_S, UNFOLLOWED_INTERVAL_S),
    ) -> None:
        """`bytes_max` bounds what the logs that ended in the last `kept_s` may take in the store; beyond it they are kept briefly.

        `intervals_s` lie between two writes of a log that is read elsewhere, and of one that is not.
        """
        self._logs, self._replica, self._render, self._intervals_s = logs, replica, render, intervals_s
        self._kept_s, self._bytes_max = kept_s, bytes_max
        self._kept: deque[tuple[float, int]] = deque()
        self._kept_bytes = 0
        self._published: dict[str, _Published] = {}
        self._unregistered: set[str] = set()
        self._changed: set[str] = set()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None
        self._flushed_at = 0.0
        self._reachable = True
        self.failures = 0
        """Round trips that failed."""

    def publish(self, events: EventLog, owner: Owner, stop: Callable[[bool], None], *, registered: bool, keyed: bool = False) -> None:
        """Begin to carry `events`. `registered`: the answer is known to all replicas already. `keyed`: by an idempotency key, too."""
        self._published[events.answer_id] = _Published(events, owner, stop, keyed=keyed)
        self._idle.clear()
        events.on_change = self._note
        if not registered:
            self._unregistered.add(events.answer_id)
            self._loop.call_later(REGISTER_DELAY_S, self._news.set)

    async def run_forever(self) -> None:
        """Register at once, write what has changed a while after it changed, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._register()
                if self._alarm is None and (due := self._due()):
                    await self._flush(due)
                self._set_alarm()
            except DomainError as error:
                self.failures += 1
                if self._reachable:
                    log.warning("logs_not_shared", reason=error.reason, answers=len(self._published))
                self._reachable = False
                await asyncio.sleep(PAUSE_S)
                self._news.set()
                continue
            except Exception as error:  # a bug: the answers of this replica must go on being shared all the same
                log.exception("publisher_failed", error=type(error).__name__)
                await asyncio.sleep(PAUSE_S)
                self._news.set()
                continue
            if not self._reachable:
                self._reachable = True
                log.info("logs_shared_again", answers=len(self._published))

    async def flushed(self, timeout_s: float) -> int:
        """Wait until every log has ended and was written, at most `timeout_s`; return how many were not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return len(self._published)

    def _note(self, events: EventLog) -> None:
        """An event was appended: write it with what else comes in the next moment. Called for every token."""
        if events.answer_id not in self._changed:
            self._changed.add(events.answer_id)
            published = self._published[events.answer_id]
            published.written_at = published.written_at or self._loop.time()  # its first text is only just leaving
            self._set_alarm()

    def _set_alarm(self) -> None:
        """Ring when the next log is due, unless it will ring anyway."""
        if self._alarm is None and self._changed:
            wait_s = min(self._due_at(answer_id) for answer_id in self._changed) - self._loop.time()
            self._alarm = self._loop.call_later(max(wait_s, self._flushed_at + self._intervals_s[0] - self._loop.time(), 0.0), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._news.set()

    def _due_at(self, answer_id: str) -> float:
        published = self._published.get(answer_id)
        if published is None or published.events.failure is not None:  # whoever stopped it elsewhere waits to hear that it has stopped
            return 0.0
        soon = published.followed or published.events.ended or not published.written
        return published.written_at + self._intervals_s[0 if soon else 1]

    def _due(self) -> list[str]:
        """Logs with news whose time has come; the others go along if that is soon, which saves a round trip."""
        now = self._loop.time()
        if not any(self._due_at(answer_id) <= now for answer_id in self._changed):
            return []
        return [answer_id for answer_id in self._changed if self._due_at(answer_id) <= now + self._intervals_s[1] / 2]

    async def _register(self) -> None:
        while self._unregistered:
            taken = list(self._unregistered)[:PART_EVENTS_MAX]
            # What has ended already is made known with its end.
            fresh = [self._published[one] for one in taken if one in self._published and not self._published[one].events.ended]
            parts = [LogPart(published.events.answer_id, published.owner, 1, ()) for published in fresh]
            if parts:
                await self._logs.append(self._replica, parts)
            self._unregistered.difference_update(taken)

    async def _flush(self, due: list[str]) -> None:
        parts = [self._part(self._published[one]) for one in due if one in self._published]
        self._changed.difference_update(due)
        self._unregistered.difference_update(due)
        self._flushed_at = self._loop.time()
        try:
            replies = await self._logs.append(self._replica, parts) if parts else ()
        except BaseException:
            self._changed.update(part.answer_id for part in parts)
            raise
        for part, reply in zip(parts, replies, strict=True):
            published = self._published[part.answer_id]
            published.written_at, published.followed = self._flushed_at, reply.followed
            if reply.word == "unknown":
                published.written = published.bytes = 0
            elif reply.word == "taken":
                published.written = part.first - 1 + len(part.payloads)
                published.bytes += _stored(part.payloads)
                if part.ended and not part.brief:
                    self._kept.append((self._loop.time() + self._kept_s, published.bytes))
                    self._kept_bytes += published.bytes
            if reply.word == "fenced" or (part.ended and reply.word == "taken"):
                del self._published[part.answer_id]
                published.events.on_change = None
            if reply.word == "fenced":
                published.stop(True)
            elif reply.cancel_asked:
                published.stop(False)
            elif (part.answer_id in self._published and published.written < len(published.events)) or reply.word == "unknown":
                self._note(published.events)
        if not self._published:
            self._idle.set()

    def _part(self, published: _Published) -> LogPart:
        """What was not written yet, as much as goes in one piece. The end goes with the last piece only."""
        events, size, payloads = published.events, 0, list[bytes]()
        waiting = events.read(published.written)
        for entry in waiting[:PART_EVENTS_MAX]:
            payload = self._render(events.answer_id, entry)
            size += len(payload)
            if payloads and size > PART_BYTES_MAX:
                break
            payloads.append(payload)
        ended = events.ended and len(payloads) == len(waiting)
        return LogPart(
            events.answer_id,
            published.owner,
            published.written + 1,
            tuple(payloads),
            ended,
            events.failure if ended else None,
            brief=ended and self._is_full(published.bytes + _stored(payloads)),
            keyed=published.keyed,
            left_at=events.left_at,
        )

    def _is_full(self, more: int) -> bool:
        """Whether the logs that are kept for their whole time leave no room for one of `more` bytes."""
        now = self._loop.time()
        while self._kept and self._kept[0][0] <= now:
            self._kept_bytes -= self._kept.popleft()[1]
        return self._kept_bytes + more > self._bytes_max


def _stored(payloads: Sequence[bytes]) -> int:
    return sum(map(len, payloads)) + EVENT_OVERHEAD_BYTES * len(payloads)
