"""The event log of one answer in memory: append, read from a number on, end. Who produces and who may read is decided elsewhere.

Readers never slow the producer: each goes through the log at its own pace. What was appended never changes, so that a reader who
comes back sees the very same events under the very same numbers.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.chassis.errors import AnswerCancelled, DomainError, ModelFailed, Overloaded
from services.orchestrator.domain import Citation, Done, Event, PassagesFound, Reasoned, Recorded, TextDelta, ToolCall, ToolResult

EVENTS_MAX = 70_000
"""More than one delta per token of the longest answer that can be asked for, and every citation of a normal one."""
BYTES_MAX = 4 * 1024 * 1024
CITATION_BYTES = 100
READERS_MAX = 16
GIVES_WAY_TURNS = 3
"""Turns of the event loop for which word of a step gives way to the call that the step makes, which is on its way after so many. Words give
way to nothing."""
RESERVED_EVENTS = 64
"""Room that words may not take, so that an answer which fills the log can still say how it ended."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An event with its number."""

    sequence: int
    event: Event


class EventLog:
    """Append-only, bounded, in memory. Used from one event loop."""

    def __init__(self, answer_id: str, *, events_max: int = EVENTS_MAX, bytes_max: int = BYTES_MAX, readers_max: int = READERS_MAX) -> None:
        self.answer_id = answer_id
        self.ended = False
        self.failure: DomainError | None = None
        """Set if the answer ended in an error instead of `done`."""
        self.stopping: DomainError | None = None
        """How it shall end if whoever makes it is stopped. None = the owner stopped it."""
        self.shown = False
        """Whether text, a thought, or a call of a tool has been appended."""
        self.bytes = 0
        self.on_change: Callable[[EventLog], None] | None = None
        """Told of every event from when something is `shown` on, and of the end. Must be quick."""
        self.on_deserted: Callable[[], None] | None = None
        """Told when the last reader has left before the end. Must be quick."""
        self.left_at: int | None = None
        """After how many events its owner stopped the answer, if it goes on for others. Set by `leave_at`."""
        self._entries: list[Entry] = []
        self._events_max, self._bytes_max, self._readers_max = events_max, bytes_max, readers_max
        self._readers: set[Reader] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def readers(self) -> int:
        return len(self._readers)

    def append(self, event: Event) -> None:
        """Give `event` the next number. Text and thoughts beyond the bounds raises ModelFailed: nothing is dropped silently."""
        assert not self.ended, "an ended log takes nothing more"
        match event:
            case TextDelta(text) | Reasoned(text):
                self.shown = True
                size = len(text) if text.isascii() else len(text.encode())
            case PassagesFound(passages):
                size = sum(len(passage.text.encode()) for passage in passages)
            case Citation():
                size = CITATION_BYTES
            case ToolCall(arguments=part) | ToolResult(text=part):
                self.shown = True
                size = len(part.encode()) or 1
            case _:
                size = 0
        if size and (len(self._entries) >= self._events_max - RESERVED_EVENTS or self.bytes + size > self._bytes_max):
            raise ModelFailed("the answer is longer than can be kept", cause="too_long", bound_bytes=self._bytes_max)
        self.bytes += size
        self._entries.append(Entry(len(self._entries) + 1, event))
        self._wake()
        if self.shown and self.on_change is not None:
            self.on_change(self)

    def end(self, failure: DomainError | None = None) -> None:
        """Close the log: after `done`, or with what stood in its way."""
        assert not self.ended, "a log ends once"
        assert failure is not None or isinstance(self._entries[-1].event, Done | Recorded), "a log that ends well ends with done"
        self.ended, self.failure = True, failure and failure.bare()
        self._wake()
        if self.on_change is not None:
            self.on_change(self)

    def read(self, after: int) -> Sequence[Entry]:
        """What lies after number `after`, which may be nothing."""
        return self._entries[after:] if after < len(self._entries) else ()

    def reader(self, after: int, *, is_follower: bool = False) -> "Reader":
        """Begin to read after number `after`. Raises Overloaded if too many do already; answers that follow are bounded as answers are."""
        if not is_follower and sum(not reader.is_follower for reader in self._readers) >= self._readers_max:
            raise Overloaded("too many readers follow this answer", retry_after_ms=1000)
        reader = Reader(self, after, is_follower=is_follower)
        self._readers.add(reader)
        self._dismiss(reader)
        return reader

    def leave(self, reader: "Reader") -> None:
        self._readers.discard(reader)
        reader.close()
        if not self._readers and not self.ended and self.on_deserted is not None:
            self.on_deserted()

    def leave_at(self, last: int) -> None:
        """End the log for its owner, who stopped it after event number `last`: for all readers, followers excepted. It goes on."""
        self.left_at = last
        for reader in self._readers:
            self._dismiss(reader)
        if self.on_change is not None:
            self.on_change(self)

    def _dismiss(self, reader: "Reader") -> None:
        if self.left_at is not None and not reader.is_follower:
            reader.dismiss(self.left_at, AnswerCancelled("the answer was stopped", answer_id=self.answer_id))

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()


class Reader:
    """One reader's place in a log."""

    def __init__(self, log: EventLog, after: int, *, is_follower: bool = False) -> None:
        self.position = after
        self.is_follower = is_follower
        """Whether what is read is told again in another answer."""
        self._dismissal: tuple[int, DomainError] | None = None
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._silence_s = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        """One timer for many waits: setting one per event would cost more than the event."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self._dismissal is not None or self._log.ended

    @property
    def failure(self) -> DomainError | None:
        return self._dismissal[1] if self._dismissal is not None else self._log.failure

    def dismiss(self, last: int, failure: DomainError) -> None:
        """Read no further than number `last`, where the log ends in `failure` for this reader."""
        self._dismissal = last, failure.bare()
        self.wake()

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def next(self, silence_s: float) -> Sequence[Entry]:
        """What came since the last call: at once if there is something, else as soon as there is.

        Returns nothing when `silence_s` have passed, or when the log has ended and everything was read.
        """
        entries = self._news()
        if not entries and not self.ended:
            self._waiting = self._loop.create_future()
            self._waiting_since, self._silence_s = self._loop.time(), silence_s
            if self._alarm is None:
                self._alarm = self._loop.call_later(silence_s, self._ring)
            try:
                await self._waiting
            finally:
                self._waiting = None
            for _ in range(0 if self._log.shown else GIVES_WAY_TURNS):
                await asyncio.sleep(0)
            entries = self._news()
        self.position += len(entries)
        return entries

    def _news(self) -> Sequence[Entry]:
        entries = self._log.read(self.position)
        return entries if self._dismissal is None else entries[: max(0, self._dismissal[0] - self.position)]

    def _ring(self) -> None:
        """Wake a reader that has waited long enough; look again later otherwise, and not at all once nobody waits."""
        self._alarm = None
        if self._waiting is None:
            return
        left_s = self._waiting_since + self._silence_s - self._loop.time()
        if left_s <= 0.001:
            self.wake()
        else:
            self._alarm = self._loop.call_later(left_s, self._ring)
