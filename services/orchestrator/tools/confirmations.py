"""Calls that wait for a person's word, and the word's way to them, at whatever replica it is said. Who may say it is decided elsewhere."""

import asyncio
import contextlib

from services.chassis.errors import Unavailable
from services.orchestrator.ports import SharedWords

HEAR_S = 0.25
"""How often a word is looked for that may have been said at another replica. One said here arrives at once."""
SHARED_MARGIN_S = 5.0


class Confirmations:
    """The waiting calls of this process."""

    def __init__(self, words: SharedWords, hear_s: float = HEAR_S) -> None:
        self._words, self._hear_s = words, hear_s
        self._waiting: dict[tuple[str, str], asyncio.Future[bool]] = {}

    async def wait(self, answer_id: str, call_id: str, wait_s: float) -> bool | None:
        """The word on a call; None if nobody said one in time. While the store is away, only what is said here is heard."""
        here = self._waiting[answer_id, call_id] = asyncio.get_running_loop().create_future()
        word: bool | None = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    word = await self._hear(here, answer_id, call_id, wait_s)
        finally:
            del self._waiting[answer_id, call_id]
            with contextlib.suppress(Unavailable):
                last = await self._words.end(answer_id, call_id)
                word = last if word is None else word  # said in the very last moment: whoever was told so must be right
        return here.result() if word is None and here.done() and not here.cancelled() else word

    async def _hear(self, here: "asyncio.Future[bool]", answer_id: str, call_id: str, wait_s: float) -> bool:
        shared = False
        while True:
            with contextlib.suppress(Unavailable):
                if not shared:
                    await self._words.ask(answer_id, call_id, wait_s + SHARED_MARGIN_S)
                    shared = True
                if (word := await self._words.hear(answer_id, call_id)) is not None:
                    return word
            if (await asyncio.wait({here}, timeout=self._hear_s))[0]:
                return here.result()

    async def say(self, answer_id: str, call_id: str, allowed: bool) -> bool:
        """Say the word; return whether the call was waiting, here or elsewhere. Raises Unavailable if nobody can say."""
        here = self._waiting.get((answer_id, call_id))
        if here is None:
            return await self._words.say(answer_id, call_id, allowed)
        if here.done():
            return False
        here.set_result(allowed)
        return True
