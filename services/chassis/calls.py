"""The calls that a server runs, each of which ends by a word of ours before a stop would cut it. What a call does is not known here."""

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from services.chassis.errors import DomainError, Unavailable


@dataclass(slots=True, eq=False)
class _Call:
    task: asyncio.Task[Any]
    stopped_as: DomainError
    interrupted: bool = False


_current: ContextVar[_Call] = ContextVar("call")


def stopped_as(error: DomainError) -> None:
    """Let the running call end in `error` if it outlives the grace of a stop, and not as one that may simply be made again."""
    _current.get().stopped_as = error


class Calls:
    """What runs on one server."""

    def __init__(self) -> None:
        self._running: set[_Call] = set()

    @contextlib.contextmanager
    def running(self, method: str) -> Iterator[None]:
        """Let the block, which is all that is left of a call, end in an error of ours when it is interrupted.

        `method` is `tailrace.<service>.v1.<Service>/<Method>`: callers learn which service is to be asked again. A caller's leaving passes.
        """
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task, Unavailable("the server is stopping; ask again", dependency=method.split(".")[1]))
        _current.set(call)
        self._running.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if not call.interrupted or task.uncancel():
                raise  # the caller left
            raise call.stopped_as from None
        finally:
            self._running.discard(call)

    def interrupt_all(self) -> None:
        """End every call that still runs. One whose caller has left is only cleaning up, and may."""
        for call in self._running:
            if not call.task.cancelling():
                call.interrupted = call.task.cancel()
