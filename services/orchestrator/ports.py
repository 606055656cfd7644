"""What an answer needs from the world, as protocols. Each has one adapter that speaks to something real; none is named here."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from services.chassis.errors import DomainError
from services.chassis.principal import Principal
from services.orchestrator.domain import (
    Attempt,
    BookedAnswer,
    CachedAnswer,
    Candidate,
    Claim,
    Draft,
    Draw,
    Edition,
    Flight,
    HeldAnswer,
    History,
    Hold,
    KeptTurn,
    LentCredit,
    LogPart,
    LogReply,
    OperationRecord,
    Passage,
    Payer,
    Prompt,
    Question,
    RecallVerdict,
    SentPrompt,
    SharedAnswer,
    SharedEvents,
    Summary,
    Suspended,
    Turn,
)


class Recalling(Protocol):
    """A recall in progress. The three parts arrive in this order and each is asked for at most once."""

    async def edition(self) -> Edition:
        """The asker's edition of the collection; here before anything is embedded."""
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
        self, query: str, collection: str, scope: str, *, want_cached: bool, passages_max: int, held: Edition | None
    ) -> AbstractAsyncContextManager[Recalling]:
        """Begin a recall. Leaving the block cancels what was not asked for.

        While the asker's edition is `held`, nothing but the edition is recalled.
        """
        ...

    async def remember(self, answer: CachedAnswer, collection: str, scope: str, edition: Edition) -> str:
        """Offer an answer to the semantic cache; return why it was not kept, or nothing."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[Sequence[float]]:
        """A vector of unit length for each of 1-256 texts of at most 32 KiB, in order, by the embedder that documents are found with."""
        ...


class Ledger(Protocol):
    """Money and conversations. Raises Unavailable(dependency="ledger") while it is away."""

    async def reserve(
        self,
        operation_id: str,
        attempt: int,
        candidate: Candidate,
        input_tokens_max: int,
        output_tokens_max: int,
        output_tokens_min: int,
        ttl_ms: int,
        *,
        patient: bool = True,
    ) -> Hold:
        """Set the worst case aside; if money is short, that of fewer output tokens, down to `output_tokens_min`, unless that is 0.

        Who is not `patient` has another way to pay, and hears at once that the ledger is out of reach.
        Raises BudgetExhausted, PriceUnknown.
        """
        ...

    async def history(self, session_id: str, limit: int, until: str = "", *, patient: bool = False) -> History:
        """The latest turns of a conversation's current branch, or of those that led to the answer `until`, its own the last.

        Who is `patient` waits while the ledger is away for a moment. Raises NotFound if the conversation has no such answer.
        """
        ...

    async def knows(self, principal: Principal, operation_id: str) -> bool:
        """Whether there is an operation of this id that the principal may see."""
        ...

    async def booked(self, principal: Principal, operation_id: str) -> BookedAnswer | None:
        """What is kept of an answer that the principal may see; None if there is none."""
        ...

    async def append_turn(self, session_id: str, turn: Turn, principal: Principal, replaces: str = "", asked_after: str = "") -> KeptTurn:
        """Keep a turn, or in the place of that of the answer `replaces`. The same answer again changes nothing. Raises NotFound."""
        ...

    async def put_summary(self, session_id: str, summary: Summary, made_by: str, principal: Principal) -> None:
        """Keep a summary. Raises NotFound."""
        ...

    async def suggest_title(self, session_id: str, title: str, model: str, principal: Principal) -> None:
        """Give a conversation a title if nobody has. Raises NotFound."""
        ...


class CreditLine(Protocol):
    """Where credit is lent. Raises Unavailable(dependency="ledger") while it is away."""

    async def lend(self, lease_id: str, payer: Payer) -> LentCredit:
        """Lend a slice of the payer's budgets, or prolong it. Raises BudgetExhausted, HoldAlreadyExpired for a lease that has ended."""
        ...

    async def take_back(self, lease_id: str, payer: Payer, draws: Sequence[Draw]) -> None:
        """End a lease. `draws` become holds unless they are booked already. Raises NotFound."""
        ...

    async def recalled(self, held: Sequence[str]) -> Collection[str]:
        """Those of these leases that are wanted back."""
        ...


class Credit(Protocol):
    """What an answer can be paid with while the ledger is out of reach."""

    def noted(self, principal: Principal) -> None:
        """The ledger has set money aside for `principal` just now."""
        ...

    def covers(self, principal: Principal) -> bool:
        """Whether anything is lent to `principal`."""
        ...

    def draw(
        self, principal: Principal, operation_id: str, attempt: int, candidate: Candidate, input_tokens_max: int, output_tokens_max: int
    ) -> Hold | None:
        """Set the worst case aside from what is lent; None if that cannot pay it or the model's price is not known."""
        ...

    def ended(self, operation_id: str, attempt: Attempt) -> None:
        """A call is over."""
        ...

    def recorded(self, operation_id: str, attempts: Iterable[Attempt], booked: asyncio.Future[None]) -> None:
        """The record of calls is on its way to the ledger, which has it once `booked` is done."""
        ...

    async def surrender(self, principal: Principal, since: float) -> bool:
        """Give back what is lent to `principal`; return whether the ledger has got any back since the monotonic time `since`."""
        ...


class ExactCache(Protocol):
    """Answers by the question's exact words. A store that is away is a miss, and raises nowhere but in `forget`."""

    async def get(self, question: Question, scope: str) -> HeldAnswer | None:
        """The answer kept last, whatever has become of its collection since."""
        ...

    async def put(self, question: Question, scope: str, held: HeldAnswer) -> bool:
        """Keep an answer in the place of an older one; return whether it was kept."""
        ...

    async def forget(self, tenant: str, user: str) -> int:
        """Forget the answers that were given to a user; return how many. Raises Unavailable(dependency="redis")."""
        ...


class Books(Protocol):
    """Where the final record of an operation is kept until the ledger has booked it, and until then what to book if we die."""

    def intend(self, record: OperationRecord) -> None:
        """As `mark`, before a hold is asked for: once it returns, this process may end at any moment."""
        ...

    def mark(self, record: OperationRecord) -> None:
        """Keep `record` as what shall be booked if this process ends before `record` is called. Waits for nothing; the latest counts."""
        ...

    async def keep(self, record: OperationRecord) -> None:
        """As `mark`, and return once it is durable. Raises Unavailable if the disk fails: then nothing may begin."""
        ...

    async def record(self, record: OperationRecord) -> asyncio.Future[None]:
        """Return once the record is durable. The future is done once the ledger has acknowledged it."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether new work may begin: false while too many records wait for the ledger."""
        ...


class LateTurns(Protocol):
    """Where turns wait that the ledger has not kept yet, so that they outlive this process. Raises Unavailable if the disk fails."""

    async def keep(self, asked: Question, turn: Turn, asked_after: str) -> None:
        """Return once the turn is durable. From then on it is tried again until the ledger has it, or refuses it."""
        ...

    async def forget(self, answer_id: str) -> None:
        """The ledger has it, or never will."""
        ...


class ShadowSample(Protocol):
    """Where a sample of answers is made a second time, to be compared."""

    def offer(self, run: Any, prompt: Prompt) -> None:
        """Draw the answer of `run`, a run.Run, or do not. Waits for nothing and never raises."""
        ...


class PromptShelf(Protocol):
    """Where the prompts of answers are kept for a while, for administrators to see. Raises Unavailable(dependency="redis")."""

    async def keep(self, principal: Principal, answer_id: str, prompts: Sequence[SentPrompt]) -> bool:
        """Keep what was sent for an answer of `principal`; return whether it was, for too much is not."""
        ...

    async def get(self, tenant: str, answer_id: str) -> tuple[SentPrompt, ...]:
        """What is kept of an answer; nothing if that is nothing, or another tenant's."""
        ...

    def of_user(self, tenant: str, user: str) -> AsyncGenerator[tuple[str, tuple[SentPrompt, ...]], None]:
        """What is kept of a user's answers, oldest first, each with its answer's id; empty where a former version kept it."""
        ...

    async def forget(self, tenant: str, user: str) -> int:
        """Forget what is kept of a user's answers; return of how many that was."""
        ...


class SharedLogs(Protocol):
    """The logs of all replicas' answers, who makes them, and which keys began them. Raises Unavailable(dependency="redis")."""

    async def register(self, answer_id: str, owner: tuple[str, str], replica: str) -> None:
        """Make it known that `replica` produces this answer, before it has events."""
        ...

    async def claim(self, owner: tuple[str, str], key: str, claim: Claim) -> Claim | None:
        """Let `key` stand for `claim`, unless it stands for something already, which is returned then."""
        ...

    async def claimed(self, owner: tuple[str, str], key: str) -> Claim | None:
        """What `key` stands for, if for anything."""
        ...

    async def claim_again(self, owner: tuple[str, str], key: str, old: Claim, new: Claim) -> bool:
        """Let `key` stand for `new` if it still stands for `old`; return whether it did."""
        ...

    async def append(self, replica: str, parts: Sequence[LogPart]) -> Sequence[LogReply]:
        """Append parts of different logs in one round trip. What is there already is not appended again."""
        ...

    async def look_up(self, answer_id: str) -> SharedAnswer | None:
        """What is known of an answer; None if nothing (any more)."""
        ...

    async def read(self, answer_id: str, after: int, wait_s: float) -> SharedEvents:
        """Events after a number: at once if there are any, else when there are, but not later than after `wait_s`."""
        ...

    async def interrupt(self, answer_id: str, replica: str, failure: DomainError) -> bool:
        """End the log of an answer whose replica is gone; return whether it was still open."""
        ...

    async def forget(self, owner: tuple[str, str]) -> int:
        """Forget the logs of an owner's answers, and the keys that stand for them. Return how many.

        Whoever still appends to one is fenced off.
        """
        ...

    async def ask_to_cancel(self, answer_id: str, replica: str) -> bool:
        """Tell the replica that produces an answer to stop it, and leave the wish with the log; return whether that replica is alive."""
        ...

    async def asked_to_cancel(self, answer_ids: Sequence[str]) -> Sequence[str]:
        """Those of the answers that somebody has asked to stop."""
        ...

    async def renew(self, replica: str) -> None:
        """Say that `replica` is alive; that holds for a while."""
        ...

    async def is_alive(self, replica: str) -> bool:
        """Whether `replica` said so lately."""
        ...

    async def follow(self, answer_id: str) -> None:
        """Say that somebody reads the answer at another replica than its own; that holds for a while."""
        ...

    async def is_followed(self, answer_id: str) -> bool:
        """Whether somebody said so lately."""
        ...

    def cancels(self, replica: str) -> AsyncIterator[str]:
        """Ids of the answers that shall be stopped, as others ask. Ends in Unavailable; what was asked meanwhile is with the logs."""
        ...


class SharedFlights(Protocol):
    """Which answers are being made to which questions, at all replicas. Raises Unavailable(dependency="redis")."""

    async def claim(self, key: str, flight: Flight, instead_of: Flight | None = None) -> Flight | None:
        """Let `key` stand for `flight` while that has time, unless it stands for another than `instead_of`, which is returned then."""
        ...

    async def release(self, key: str, flight: Flight, linger_s: float) -> None:
        """Let `key` stand for nothing, if it still stands for `flight`; before that, for so long, for that flight as one that is over."""
        ...

    async def follow(self, answer_id: str) -> None:
        """Say that answers of another replica are told what this one is told; that holds for a while."""
        ...

    async def is_followed(self, answer_id: str) -> bool:
        """Whether somebody said so lately."""
        ...


class DocumentSearch(Protocol):
    """The documents, for a search in the middle of an answer. Raises Unavailable(dependency="retrieval") while they are away."""

    async def search(self, query: str, collection: str, limit: int) -> tuple[Passage, ...]:
        """The best passages that the current principal may read, best first."""
        ...


class PendingCalls(Protocol):
    """Answers that wait for what their clients' tools return. Raises Unavailable(dependency="redis") while the store is away."""

    async def keep(self, suspended: Suspended) -> None:
        """Keep it for a while, for every replica. Raises Overloaded if too much is kept already."""
        ...

    async def find(self, owner: tuple[str, str], answer_id: str) -> Suspended | None:
        """The owner's own; None for a foreign or unknown one, and one that has waited too long."""
        ...


class SharedWords(Protocol):
    """What people say to calls that wait for their word, at whatever replica. Raises Unavailable(dependency="redis")."""

    async def ask(self, answer_id: str, call_id: str, life_s: float) -> None:
        """Make it known for `life_s` that a call waits."""
        ...

    async def say(self, answer_id: str, call_id: str, allowed: bool) -> bool:
        """Say the word; return whether the call was waiting. The first word counts."""
        ...

    async def hear(self, answer_id: str, call_id: str) -> bool | None:
        """The word, if it was said."""
        ...

    async def end(self, answer_id: str, call_id: str) -> bool | None:
        """Wait no more; the word that was said before that, if any."""
        ...


class Model(Protocol):
    """A provider's models.

    Raises ModelOverloaded, ModelRefused, ModelFailed, ModelStalled, ModelMisconfigured. Cancellation: the connection to the
    provider is closed before CancelledError leaves.
    """

    async def generate(self, prompt: Prompt, candidate: Candidate, output_tokens_max: int, draft: Draft) -> None:
        """Make one call, never retried here, and fill in `draft` as it streams."""
        ...
