"""An embedder that costs money: every call is set aside before it is made, and booked by whatever door it ended. Where the money is kept,
and whose embedder it is, others know.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import numpy as np

from services.chassis.afterwork import AfterWork
from services.chassis.clock import Clock
from services.chassis.deadline import current_deadline
from services.chassis.errors import AnswerCancelled, DomainError, Overloaded
from services.chassis.principal import Principal, current_principal
from services.retrieval.ports import Embedded, Embedder, EmbeddingBooks, PaidCall, Spent, Unanswered, Vectors

TOKENS_MAX_BESIDE = 16
"""What a provider may put around a text."""


class PaidEmbedder:
    """The Embedder port around another one, whose calls are paid by the current principal: it is asked for nothing that cannot be paid.

    Raises BudgetExhausted, PriceUnknown, and Unpayable if the ledger cannot be asked, before anything is sent.
    """

    def __init__(
        self,
        embedder: Embedder,
        books: EmbeddingBooks,
        provider: str,
        model: str,
        clock: Clock,
        new_id: Callable[[], str],
        afterwork: AfterWork,
        *,
        batch_max: int,
        prefix_bytes: int = 0,
    ) -> None:
        self.embedder_id = embedder.embedder_id
        self.dimension = embedder.dimension
        self._embedder = embedder
        self._books = books
        self._provider, self._model = provider, model
        self._clock = clock
        self._new_id = new_id
        self._afterwork = afterwork
        self._batch_max = batch_max
        self._beside = TOKENS_MAX_BESIDE + prefix_bytes

    async def embed_question(self, text: str) -> Vectors:
        async with self._paid([text]):
            # Questions of several users share a request, so that what its provider counted is nobody's own.
            return await self._embedder.embed_question(text)

    async def embed_texts(self, texts: Sequence[str]) -> Embedded:
        # A request at a time: of several, one that fails would leave open what the others cost.
        parts = [await self._request(texts[begin : begin + self._batch_max]) for begin in range(0, len(texts), self._batch_max)]
        vectors = np.concatenate([part.vectors for part in parts])
        return Embedded(vectors, sum(part.tokens for part in parts), any(part.counted for part in parts))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._embedder.count_tokens(texts)

    async def _request(self, texts: Sequence[str]) -> Embedded:
        async with self._paid(texts) as came:
            embedded = await self._embedder.embed_texts(texts)
            came.append(embedded)
        return embedded

    @contextlib.asynccontextmanager
    async def _paid(self, texts: Sequence[str]) -> AsyncIterator[list[Embedded]]:
        """For one request to the provider; what came of it goes into the list, if its provider counted it for these texts alone."""
        payer, began = current_principal(), self._clock.monotonic()
        # No vocabulary has a token of less than a byte.
        most = sum(len(text.encode()) + self._beside for text in texts)
        call = PaidCall(self._new_id(), self._provider, self._model, most, self._clock.now())
        hold_id = await self._books.reserve(payer, call)
        came = list[Embedded]()
        outcome = Spent(0, error_reason=AnswerCancelled.reason)  # until more is known: whoever asked may leave
        read_all_the_same = True
        try:
            yield came
            outcome = Spent(0)
        except DomainError as error:
            # Too many waited, and it never left; or it was refused, which is not billed. Only of silence nobody knows.
            outcome = Spent(0, error_reason=error.reason, not_sent=isinstance(error, Overloaded))
            read_all_the_same = isinstance(error, Unanswered)
            raise
        finally:
            outcome = replace(outcome, duration_ms=(self._clock.monotonic() - began) * 1000)
            if came:
                outcome = replace(outcome, tokens=came[0].tokens, estimated=came[0].counted)
            counted = texts if read_all_the_same and not came else ()
            # With too much waiting to be booked the hold is left to expire, which books it in full.
            with contextlib.suppress(Overloaded):
                self._afterwork.spawn(self._book(payer, call, hold_id, outcome, counted), "book an embedding")

    async def _book(self, payer: Principal, call: PaidCall, hold_id: str, spent: Spent, counted: Sequence[str]) -> None:
        current_deadline.set(None)  # what was asked for is over; this has bounds of its own
        if counted:
            tokens = sum(await asyncio.to_thread(self._embedder.count_tokens, counted))
            spent = replace(spent, tokens=min(tokens, call.tokens_max), estimated=True)
        await self._books.record(payer, call, hold_id, spent)
