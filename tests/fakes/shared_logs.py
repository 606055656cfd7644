"""The shared logs in memory: what the Redis ones do, for tests of what stands on them. The contract suite runs on both."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from services.chassis.errors import DomainError, Unavailable
from services.orchestrator.domain import Claim, LogPart, LogReply, SharedAnswer, SharedEvents


@dataclass
class Kept:
    """One answer."""

    owner: tuple[str, str]
    replica: str
    events: list[bytes] = field(default_factory=list)
    ended: bool = False
    failure: DomainError | None = None
    cancel: bool = False
    brief: bool = False
    keyed: bool = False
    left_at: int | None = None
    gone: bool = False
    """Whether its events have run out."""


@dataclass
class MemoryLogs:
    """SharedLogs of one process."""

    away: bool = False
    answers: dict[str, Kept] = field(default_factory=dict)
    claims: dict[tuple[tuple[str, str], str], Claim] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    followed: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    appends: int = 0
    """Round trips with parts."""
    _wishes: dict[str, asyncio.Queue[str]] = field(default_factory=dict)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def lose_events(self, answer_id: str) -> None:
        """As when the time of an ended log is over."""
        self.answers[answer_id].gone = True
        if not self.answers[answer_id].keyed:
            del self.answers[answer_id]

    async def register(self, answer_id: str, owner: tuple[str, str], replica: str) -> None:
        await self.append(replica, [LogPart(answer_id, owner, 1, ())])

    async def claim(self, owner: tuple[str, str], key: str, claim: Claim) -> Claim | None:
        self._ask()
        held = self.claims.setdefault((owner, key), claim)
        return None if held is claim else held

    async def claimed(self, owner: tuple[str, str], key: str) -> Claim | None:
        self._ask()
        return self.claims.get((owner, key))

    async def claim_again(self, owner: tuple[str, str], key: str, old: Claim, new: Claim) -> bool:
        self._ask()
        if self.claims.get((owner, key)) != old:
            return False
        self.claims[owner, key] = new
        return True

    async def append(self, replica: str, parts: Sequence[LogPart]) -> Sequence[LogReply]:
        self._ask()
        self.appends += 1
        replies = [self._append(replica, part) for part in parts]
        async with self._news:
            self._news.notify_all()
        return replies

    def _append(self, replica: str, part: LogPart) -> LogReply:
        kept = self.answers.get(part.answer_id)
        if part.answer_id in self.forgotten or (kept is not None and (kept.replica != replica or kept.ended)):
            return LogReply("fenced")
        if (len(kept.events) if kept else 0) + 1 < part.first:
            return LogReply("unknown")
        if kept is None:
            kept = self.answers[part.answer_id] = Kept(part.owner, replica)
        kept.events += part.payloads[len(kept.events) + 1 - part.first :]
        kept.ended, kept.failure, kept.brief, kept.keyed = part.ended, part.failure, part.brief, part.keyed
        kept.left_at = part.left_at if part.left_at is not None else kept.left_at
        return LogReply("taken", kept.cancel)

    async def look_up(self, answer_id: str) -> SharedAnswer | None:
        self._ask()
        kept = self.answers.get(answer_id)
        return SharedAnswer(kept.owner, kept.replica, kept.ended, kept.failure, kept.gone, kept.left_at) if kept else None

    async def read(self, answer_id: str, after: int, wait_s: float) -> SharedEvents:
        try:
            async with asyncio.timeout(wait_s):
                async with self._news:
                    while True:
                        self._ask()
                        kept = self.answers.get(answer_id)
                        if kept is not None and not kept.gone and (len(kept.events) > after or kept.ended):
                            events = tuple(enumerate(kept.events[after:], after + 1))
                            return SharedEvents(events, kept.ended, kept.failure, kept.left_at)
                        await self._news.wait()
        except TimeoutError:
            return SharedEvents((), False, left_at=kept.left_at if (kept := self.answers.get(answer_id)) else None)

    async def interrupt(self, answer_id: str, replica: str, failure: DomainError) -> bool:
        self._ask()
        kept = self.answers.get(answer_id)
        if kept is None or kept.ended or kept.replica != replica:
            return False
        kept.ended, kept.failure = True, failure
        async with self._news:
            self._news.notify_all()
        return True

    async def forget(self, owner: tuple[str, str]) -> int:
        self._ask()
        theirs = {answer_id for answer_id, kept in self.answers.items() if kept.owner == owner}
        self.claims = {key: claim for key, claim in self.claims.items() if claim.answer_id not in theirs}
        for answer_id in theirs:
            del self.answers[answer_id]
        self.forgotten |= theirs
        return len(theirs)

    async def ask_to_cancel(self, answer_id: str, replica: str) -> bool:
        self._ask()
        self.answers[answer_id].cancel = True
        if replica in self._wishes:
            self._wishes[replica].put_nowait(answer_id)
        return replica in self.alive

    async def asked_to_cancel(self, answer_ids: Sequence[str]) -> Sequence[str]:
        self._ask()
        return [answer_id for answer_id in answer_ids if (kept := self.answers.get(answer_id)) is not None and kept.cancel]

    async def renew(self, replica: str) -> None:
        self._ask()
        self.alive.add(replica)

    async def is_alive(self, replica: str) -> bool:
        self._ask()
        return replica in self.alive

    async def follow(self, answer_id: str) -> None:
        self._ask()
        self.followed.add(answer_id)

    async def is_followed(self, answer_id: str) -> bool:
        self._ask()
        return answer_id in self.followed

    async def cancels(self, replica: str) -> AsyncIterator[str]:
        wishes = self._wishes[replica] = asyncio.Queue()
        while True:
            yield await wishes.get()

    def _ask(self) -> None:
        if self.away:
            raise Unavailable("the shared logs cannot be reached", dependency="redis")
