"""What an answer needs from the world, as protocols. Each has one adapter that speaks to something real; none is named here."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from services.chassis.principal import Principal
from services.orchestrator.domain import (
    CachedAnswer,
    Candidate,
    Draft,
    HeldAnswer,
    Hold,
    OperationRecord,
    Passage,
    Prompt,
    Question,
    RecallVerdict,
    Turn,
)


class Recalling(Protocol):
    """A recall in progress. The three parts arrive in this order and each is asked for at most once."""

    async def epoch(self) -> int:
        """The collection's epoch; here before anything is embedded."""
        ...

    async def verdict(self) -> RecallVerdict:
        """What the semantic cache says."""
        ...

    async def passages(self) -> tuple[Passage, ...]:
        """Passages, best first."""
        ...


class Memory(Protocol):
    """Documents and past answers. Raises Unavailable(dependency="retrieval") while it is away."""

    def recall(
        self, query: str, collection: str, scope: str, *, want_cached: bool, passages_max: int, held_epoch: int | None
    ) -> AbstractAsyncContextManager[Recalling]:
        """Begin a recall. Leaving the block cancels what was not asked for.

        While the collection has `held_epoch`, nothing but the epoch is recalled.
        """
        ...

    async def remember(self, answer: CachedAnswer, collection: str, scope: str, epoch: int) -> str:
        """Offer an answer to the semantic cache; return why it was not kept, or nothing."""
        ...


class Ledger(Protocol):
    """Money and conversations. Raises Unavailable(dependency="ledger") while it is away."""

    async def reserve(
        self, operation_id: str, attempt: int, candidate: Candidate, input_tokens_max: int, output_tokens_max: int, ttl_ms: int
    ) -> Hold:
        """Set the worst case aside. Raises BudgetExhausted, PriceUnknown."""
        ...

    async def turns(self, session_id: str, limit: int) -> tuple[Turn, ...]:
        """The latest turns of a conversation, oldest first."""
        ...

    async def append_turn(self, session_id: str, turn: Turn, principal: Principal) -> None:
        """Keep a turn. The same answer again changes nothing."""
        ...


class ExactCache(Protocol):
    """Answers by the question's exact words. Never raises: a store that is away is a miss."""

    async def get(self, question: Question, scope: str) -> HeldAnswer | None:
        """The answer kept last, whatever has become of its collection since."""
        ...

    async def put(self, question: Question, scope: str, held: HeldAnswer) -> bool:
        """Keep an answer in the place of an older one; return whether it was kept."""
        ...


class Books(Protocol):
    """Where the final record of an operation is kept until the ledger has booked it."""

    async def record(self, record: OperationRecord) -> asyncio.Future[None]:
        """Return once the record is durable. The future is done once the ledger has acknowledged it."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether new work may begin: false while too many records wait for the ledger."""
        ...


class Model(Protocol):
    """A provider's models.

    Raises ModelOverloaded, ModelRefused, ModelFailed, ModelStalled, ModelMisconfigured. Cancellation: the connection to the
    provider is closed before CancelledError leaves.
    """

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        """Make one call, never retried here, and fill in `draft` as it streams."""
        ...
