"""What is known of ingestions, and the port to where it is kept: the values, and what every store of them must hold to.

No store's client and no step of an ingestion is here.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from services.retrieval.domain import Progress, Upload


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose an ingestion is: the user's, whatever it came with."""

    tenant: str
    user: str
    api_key_id: str = ""
    """API key it came with, whose budgets pay for it as well; empty = a token, or not asked for."""


@dataclass(frozen=True, slots=True)
class JobState:
    """An ingestion as a whole."""

    job_id: str
    owner: Owner
    created_us: int
    """Microseconds of the store's clock; no two jobs share it, so that it is a place in a list, too."""
    closed: bool
    """No more documents come."""
    ended: bool
    documents: int
    bytes: int
    chunks_total: int
    chunks_done: int
    stages: Mapping[str, int]
    """How many documents are at each stage; stages without any are left out."""

    @property
    def status(self) -> str:
        return "ended" if self.ended else "running" if self.closed else "receiving"


@dataclass(frozen=True, slots=True)
class Claim:
    """One document that this replica alone works on, until it ends, is cancelled, or the replica's lease runs out."""

    job_id: str
    index: int
    token: int
    """Fences off whoever held it before: what comes with an older token is not recorded."""
    owner: Owner
    upload: Upload
    """Without its content."""
    latest: Progress
    received: int
    """Place in the order in which the store received documents, of all jobs together."""

    @property
    def key(self) -> str:
        return f"{self.job_id} {self.index} {self.token}"


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker has to say of its document."""

    claim: Claim
    progress: Progress
    committing: bool = False
    """From here on the document is written: it can no longer be cancelled."""


class Taken(StrEnum):
    """Whether there is room for a document."""

    TAKEN = "taken"
    """It is reserved, until the document is added or the job closed."""
    WAIT = "wait"
    """The job has its share of the store; what it has handed in must be worked off first."""
    FULL = "full"
    """The store is full."""
    CLOSED = "closed"
    """The job takes nothing more: it was cancelled, or the replica was taken for dead."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a question for room was answered."""

    taken: Taken
    told: int
    """Changes with whatever any job tells: while it stands still, nothing makes room."""


class JobStore(Protocol):
    """Jobs, their documents' contents and progress, shared by all replicas. Raises Unavailable(dependency="redis") when it is away."""

    async def begin(self, job_id: str, owner: Owner) -> bool:
        """Keep a new job that this replica receives; False if too many run."""
        ...

    async def reserve(self, job_id: str, index: int, size: int) -> Room:
        """Ask for room for a document of `size` bytes, one at a time for each job; what is reserved counts as held by all replicas."""
        ...

    async def add(self, job_id: str, upload: Upload, received: Progress, pieces: Sequence[bytes], *, staged: bool) -> bool:
        """Keep a document that room is reserved for and queue it; False if the job takes nothing more.

        Staged, it is kept but neither told nor queued until `close`. Durable on return.
        """
        ...

    async def refuse(self, job_id: str, events: Sequence[Progress]) -> None:
        """Tell of a document that was not taken, the last event being its end."""
        ...

    async def close(self, job_id: str, *, commit: bool) -> None:
        """No more documents come; the staged one is queued, or dropped without `commit`."""
        ...

    async def claim(self) -> Claim | None:
        """A document to work on: tenants take turns, then their jobs. What a dead replica had claimed is queued again first."""
        ...

    async def content(self, claim: Claim) -> bytes | None:
        """None if it is no longer kept."""
        ...

    async def record(self, told: Sequence[Told]) -> list[bool]:
        """Tell the progress of claimed documents; False where the claim is no longer ours. A final stage ends the claim."""
        ...

    async def cancel(self, job_id: str, index: int | None) -> int:
        """End what has not ended and is not being written; return how many documents."""
        ...

    async def retry(self, job_id: str, index: int | None) -> int | None:
        """Queue again what failed or was cancelled and is still kept; return how many documents, None if too many jobs run."""
        ...

    async def job(self, job_id: str) -> JobState | None: ...

    async def latest(self, job_id: str) -> list[Progress]:
        """Where each document stands, in the order they came."""
        ...

    async def page(self, tenant: str, user: str, limit: int, before_us: int | None) -> list[JobState]:
        """Newest first. Empty `user` = all of the tenant."""
        ...

    def events(self, job_id: str) -> AsyncIterator[Progress]:
        """All that was told, then live until the job has ended."""
        ...

    async def beat(self) -> set[str]:
        """Say that this replica lives; return the keys of the claims it holds."""
        ...

    async def leave(self) -> None:
        """Hand back all claims: this replica is about to end."""
        ...

    async def sweep(self) -> None:
        """Forget jobs that ended long ago, and the oldest when there are too many."""
        ...

    async def check(self) -> None: ...

    def turn(self, document_id: str) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        """Be the only one, of all replicas, who changes this document. What it yields raises Unavailable once that is so no more."""
        ...
