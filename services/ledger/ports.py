"""What the RPCs need of a store, as protocols: who serves them knows no SQL, and who writes SQL knows no messages. No code."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.chassis.errors import DomainError
from services.chassis.money import Price, Usage
from services.chassis.principal import Principal
from services.ledger.domain import (
    ApiKey,
    Budget,
    Draw,
    Lease,
    Member,
    Operation,
    Plan,
    Recorded,
    Reservation,
    Reserved,
    Session,
    Summary,
    Turn,
    UsageRow,
)
from services.ledger.holds import Hold
from services.ledger.paging import Page
from services.ledger.prices import ListedPrice


class HoldBook(Protocol):
    """Money set aside for provider calls."""

    async def reserve(self, principal: Principal, wanted: Reservation) -> Reserved:
        """Set the worst case of a call aside, or return the hold that this (operation, attempt) already has.

        If a budget cannot pay for all of `output_tokens_max`, what it can pay for is granted, down to `output_tokens_min`.

        Raises PriceUnknown, BudgetExhausted, IdempotencyConflict for the same attempt of another call, and the named error if
        the hold was resolved already.
        """
        ...

    async def settle(self, principal: Principal, hold_id: UUID, usage: Usage, *, estimated: bool) -> Hold:
        """Book what a hold used; the same again changes nothing. Raises NotFound and what holds.settle raises."""
        ...

    async def void(self, principal: Principal, hold_id: UUID) -> int:
        """Give a hold back and return its amount, in nano-USD. Raises NotFound and what holds.void raises."""
        ...

    async def expire_one(self, grace_ms: int) -> str | None:
        """Book one hold that expired more than `grace_ms` ago in full; return its id, or None if there is none left.

        Holds that somebody else is resolving now are passed over.
        """
        ...


class CreditLines(Protocol):
    """Slices of budgets, lent in advance."""

    async def lend(self, lease: Lease) -> int:
        """Lend a slice of what is left and return it, in nano-USD; or prolong it, as it is.

        Raises BudgetExhausted if nothing can be spared, HoldAlreadyExpired if the lease has ended: another one is needed then.
        """
        ...

    async def take_back(self, lease_id: UUID, tenant: str, user: str, draws: Sequence[Draw]) -> int:
        """End a lease. Draws that are not known yet become holds; what was lent is returned, 0 if it had ended before.

        Raises NotFound, and PriceUnknown for a draw at a price that never was.
        """
        ...

    async def recalled(self, held: Sequence[UUID]) -> Sequence[UUID]:
        """Those of these leases, of any tenant, that were recalled and have not ended."""
        ...

    async def expire_one(self, grace_ms: int) -> str | None:
        """Give back one lease that expired more than `grace_ms` ago; return its id, or None if there is none left."""
        ...


class OperationBook(Protocol):
    """What happened."""

    async def record(self, operation: Operation) -> Recorded:
        """Book an operation with its attempts and steps and resolve its holds, all or nothing. The same again changes nothing.

        A call without a hold is booked late, at the price that was valid when the operation was accepted. Raises PriceUnknown if
        there was none, RequestInvalid for a record that contradicts itself, IdempotencyConflict if another user's or another
        record has the id, and what holds.settle raises.
        """
        ...

    async def record_all(self, operations: Sequence[Operation]) -> Sequence[Recorded | DomainError]:
        """As `record`, of many at once: what became of each, in order. Raises only what may pass by itself; then none was recorded."""
        ...

    async def get(self, principal: Principal, operation_id: UUID) -> Operation:
        """One operation that the principal may see. Raises NotFound."""
        ...

    async def page(
        self, principal: Principal, *, size: int, after: tuple[datetime, UUID] | None, session_id: str = "", user: str = ""
    ) -> Page[Operation]:
        """Operations the principal may see, newest first, older than `after`; of one session or user if given."""
        ...


class UsageReports(Protocol):
    """Sums over operations."""

    async def query(self, principal: Principal, group_by: Sequence[str], start: datetime, end: datetime) -> list[UsageRow]:
        """Usage of what the principal may see, accepted in [start, end), one row a group.

        By step, the times are the step's, and tokens, cost and savings are shown where they arise, once for each operation: at
        its first `generate`, or `recall` on a hit. So the rows add up to the same totals as without steps. Raises RequestInvalid
        for too many groups, and where single operations are needed that are not kept any more.
        """
        ...


class UsageSums(Protocol):
    """Sums kept ahead of the questions, and the operations behind them."""

    async def roll(self, limit: int) -> int:
        """Add at most `limit` recorded operations to the sums, each once; return how many. 0 also if another replica is at it."""
        ...

    async def purge(self, before: datetime, limit: int) -> int:
        """Remove at most `limit` operations accepted before `before` that are in the sums; return how many. The books stay."""
        ...


class Months(Protocol):
    """What single operations lie in."""

    async def make(self) -> int:
        """Have the months around now; return how many are new."""
        ...

    async def drop(self, before: datetime) -> str | None:
        """Drop the oldest month that ended by `before` and is in the sums; return its name, or None. The books stay."""
        ...

    async def forget(self, before: datetime, limit: int) -> int:
        """Forget at most `limit` ids of operations of before `before` that are gone; return how many."""
        ...


class Watching(Protocol):
    """One reader of the feed."""

    async def next(self) -> Operation | None:
        """The next operation; None once the feed has ended. Raises Overloaded for a reader that fell too far behind."""
        ...


class OperationFeed(Protocol):
    """Operations as they are recorded, by whichever replica."""

    def watching(self, principal: Principal) -> AbstractContextManager[Watching]:
        """A watcher of what the principal may see, from now on. Raises Overloaded if there are too many."""
        ...

    def end(self) -> None:
        """Let every watcher go."""
        ...


class People(Protocol):
    """Users, plans and subscriptions."""

    async def member(self, tenant: str, user: str) -> Member:
        """A user with the plan in force; made known at first sight."""
        ...

    async def known_member(self, tenant: str, user: str) -> Member:
        """A user that exists. Raises NotFound."""
        ...

    async def page(self, tenant: str, *, size: int, after: str) -> Page[Member]:
        """Users of a tenant in the order of their ids."""
        ...

    async def put(self, tenant: str, user: str, display_name: str) -> Member:
        """Make a user known or rename them."""
        ...

    async def plans(self, tenant: str) -> Sequence[Plan]:
        """The plans of a tenant: its own, of which there are few, and the common ones it has not replaced."""
        ...

    async def put_plan(self, tenant: str, plan: Plan) -> None:
        """Add a plan to a tenant or change it; one with a common plan's name replaces that for this tenant alone.

        Raises RequestInvalid for one too many.
        """
        ...

    async def subscribe(self, tenant: str, user: str, plan: str, *, at_period_end: bool) -> Member:
        """Put a user on a plan, at once or with the next period; the former subscription ends. Raises NotFound for an unknown plan."""
        ...

    async def unsubscribe(self, tenant: str, user: str, *, at_period_end: bool) -> None:
        """End a subscription, at once or with its period; without one nothing changes. Raises NotFound for an unknown user."""
        ...


class Privacy(Protocol):
    """What a person may ask to be done with what is kept of them."""

    async def erase(self, tenant: str, user: str) -> bool:
        """Erase a user, all or nothing; False if there is none. Money stays under a random name.

        Raises Overloaded while the user's answers are under way.
        """
        ...

    async def subscriptions(self, tenant: str, user: str) -> Sequence[tuple[str, datetime, datetime | None]]:
        """Plan, start and end of each subscription the user had, oldest first. The running one has no end."""
        ...

    async def turns(self, tenant: str, user: str, after: tuple[str, int], size: int) -> Sequence[tuple[str, int, Turn]]:
        """At most `size` turns after (session id, position), in that order, each with its own; ("", 0) = from the start."""
        ...

    async def summaries(self, tenant: str, user: str, after: tuple[str, int], size: int) -> Sequence[tuple[str, int, Summary]]:
        """As `turns`, the summaries, by the position they reach."""
        ...


class Budgets(Protocol):
    """Limits of a tenant, its users and its keys."""

    async def of(self, tenant: str, scope: str, subject: str) -> Sequence[Budget]:
        """The budgets of one subject, day before month."""
        ...

    async def put(self, tenant: str, scope: str, subject: str, period: str, limit_nanousd: int) -> Budget:
        """Set a limit. It counts what the period has seen before. Raises NotFound for a key that is not the tenant's."""
        ...

    async def delete(self, tenant: str, scope: str, subject: str, period: str) -> None:
        """Take the limit of a period away, or of both if `period` is empty. Raises NotFound if there was none."""
        ...


class Prices(Protocol):
    """What models cost."""

    async def list_in_force(self, tenant: str) -> Sequence[ListedPrice]:
        """What `tenant` pays now, one price a model. It has few models of its own."""
        ...

    async def put(self, tenant: str, price: Price, valid_from: datetime | None) -> ListedPrice:
        """Add a version for `tenant`, from `valid_from` or now on. The same figures as are in force add nothing.

        Raises RequestInvalid for one model too many.
        """
        ...


class Keys(Protocol):
    """API keys."""

    async def create(
        self, tenant: str, user: str, name: str, roles: Sequence[str], scopes: Sequence[str], expires_at: datetime | None
    ) -> tuple[ApiKey, str]:
        """Make a key and return it with its secret. Raises Overloaded if the tenant has too many."""
        ...

    async def page(self, tenant: str, *, size: int, after: tuple[datetime, str] | None) -> Page[ApiKey]:
        """Keys of a tenant, oldest first, ended ones too, made after `after`."""
        ...

    async def revoke(self, tenant: str, key_id: str) -> None:
        """End a key; one that ended before stays ended. Raises NotFound."""
        ...

    async def resolve(self, secret: str) -> Principal:
        """Whose key this is. Raises NotAuthenticated; why a key is refused is told only to who has its secret."""
        ...


class Conversations(Protocol):
    """Sessions and their turns. A session's id is its user's own choice, so the user is always part of the key."""

    async def append(
        self, principal: Principal, session_id: str, turn: Turn, replaces: UUID | None = None, asked_after: UUID | None = None
    ) -> tuple[int, int]:
        """Keep a turn, at the end of the current branch or in the place of another; the same answer again changes nothing.

        Return its position over all branches, from 1, and how many turns up to it no summary covers, counted up to 100. Raises
        IdempotencyConflict if the answer is kept in another of the user's conversations, NotFound if there is nothing to replace,
        `asked_after` is not there any more, or the conversation or its user was deleted at `turn.created_at` or later.
        """
        ...

    async def turns(self, principal: Principal, session_id: str, limit: int) -> Sequence[Turn]:
        """The latest `limit` turns of the current branch of the principal's own conversation, oldest first; none if it is new."""
        ...

    async def turns_until(self, principal: Principal, session_id: str, answer_id: UUID, limit: int) -> Sequence[Turn]:
        """The latest `limit` turns that led to an answer, oldest first, its own the last. Raises NotFound."""
        ...

    async def summary(self, principal: Principal, session_id: str, until: UUID) -> Summary | None:
        """The summary that reaches furthest along the way to an answer."""
        ...

    async def summarise(self, principal: Principal, session_id: str, summary: Summary) -> None:
        """Keep a summary; of a conversation the 16 that reach furthest stay. Raises NotFound."""
        ...

    async def turn(self, tenant: str, user: str, answer_id: UUID) -> Turn | None:
        """The turn of one answer."""
        ...

    async def session(
        self, principal: Principal, session_id: str, turns_max: int, *, all_branches: bool = False
    ) -> tuple[Session, Sequence[Turn]]:
        """A conversation with its latest turns: one's own, or for an admin any of the tenant's. Raises NotFound."""
        ...

    async def own_session(self, principal: Principal, session_id: str) -> Session:
        """One's own conversation. Raises NotFound."""
        ...

    async def update(self, principal: Principal, session_id: str, *, title: str | None, suggested: bool, head: UUID | None) -> Session:
        """Change what is given. A title that is only suggested counts if nobody but the rule has given one. Raises NotFound."""
        ...

    async def delete(self, principal: Principal, session_id: str) -> None:
        """Forget one's own conversation, for good: turns and records of it that were on their way come too late. Raises NotFound."""
        ...

    async def forget_deletions(self) -> int:
        """Forget that something was deleted, once nothing of it can be on its way any more; return of how many conversations and users."""
        ...

    async def kept_turns(self, principal: Principal, session_id: str, after: int, size: int) -> Sequence[tuple[int, Turn]]:
        """At most `size` turns of all branches after a position, each with its own."""
        ...

    async def kept_summaries(self, principal: Principal, session_id: str) -> Sequence[Summary]:
        """The summaries of a conversation, in the order they reach."""
        ...

    async def page(self, principal: Principal, *, size: int, after: tuple[datetime, str] | None) -> Page[Session]:
        """The principal's own conversations, latest turn first."""
        ...
