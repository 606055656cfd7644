"""The client side of a call between services: identity, trace, deadline, retry of idempotent unary calls, and errors as ours.

No method is known here by name."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from services.chassis import telemetry
from services.chassis.deadline import HOP_SHAVE_S, budget_s, current_deadline
from services.chassis.errors import DeadlineTooShort, DomainError, Overloaded, Unavailable
from services.chassis.passport import Passport
from services.chassis.pings import with_pings
from services.chassis.principal import Principal, current_principal
from services.chassis.server import MESSAGE_BYTES_MAX
from services.chassis.status import from_rpc_error
from services.chassis.tls import MutualTls

ATTEMPTS_MAX = 3
BACKOFF_BASE_S = 0.05
PAUSE_MAX_S = 0.5

PING_AFTER_S, PING_ANSWER_S = 4.0, 4.0
STANDS_STILL_S = PING_AFTER_S + PING_ANSWER_S
"""After so long a replica that stands still is found out: its calls end as unavailable, and new ones go to the others."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.lb_policy_name", "round_robin"),
    # A restarted peer is found again within a second, not after minutes of back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels share nothing: a connection that failed for one does not put the others into back-off.
    ("grpc.use_local_subchannel_pool", 1),
    # We retry ourselves, where we know what is idempotent; two layers of retries make storms.
    ("grpc.enable_retries", 0),
]
CHANNEL_OPTIONS = with_pings(_OPTIONS, every_s=PING_AFTER_S, answer_within_s=PING_ANSWER_S)


def open_channel(target: str, tls: MutualTls | None = None) -> grpc.aio.Channel:
    """A long-lived channel to `host:port` or `dns:///name:port`; with `tls` it shows its certificate and checks the other side's."""
    if tls is not None:
        return grpc.aio.secure_channel(target, tls.channel_credentials(), options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)


@contextlib.contextmanager
def errors_of(target: str) -> Iterator[None]:
    """Let statuses of `target` out as DomainErrors of the class they were raised as. Cancellation passes."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _ours(error, target) from None


def _ours(error: grpc.aio.AioRpcError, target: str) -> BaseException:
    """What a failed call is here: our own cancellation coming back, or an error of `target`."""
    if error.code() is grpc.StatusCode.CANCELLED and (task := asyncio.current_task()) and task.cancelling():
        return asyncio.CancelledError()
    return from_rpc_error(error, target)


def _time_is_over() -> bool:
    """Whether the request itself has too little time left for another call."""
    deadline = current_deadline.get()
    return deadline is not None and deadline.remaining_s < 2 * HOP_SHAVE_S


class Patience:
    """How long calls that change nothing are made again while a service is away for a moment, as when it restarts."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + min(seconds, budget_s(seconds))
        self._tries = 0

    async def wait(self, error: DomainError, service: str) -> None:
        """Pause before the next try. Raises `error` if it is not that `service` cannot be reached, or if the time is over."""
        lost = isinstance(error, Unavailable) and error.metadata.get("dependency") == service
        cut = not error.reason and error.code == "CANCELLED"  # what a server that ends does to its calls
        pause_s = random.uniform(0.5, 1) * min(PAUSE_MAX_S, BACKOFF_BASE_S * 2**self._tries)  # noqa: S311 - jitter, not a secret
        if not (lost or cut) or time.monotonic() + pause_s > self._ends_at:
            raise error
        self._tries += 1
        await asyncio.sleep(pause_s)

    async def let_pass(self, error: Overloaded) -> None:
        """Pause as a service asks that has too much to do, before the next try. Raises `error` if the time is over."""
        pause_s = random.uniform(0.5, 1) * (error.retry_after_ms or 0) / 1000 + BACKOFF_BASE_S  # noqa: S311 - jitter, not a secret
        if time.monotonic() + pause_s > self._ends_at:
            raise error
        await asyncio.sleep(pause_s)


class Caller:
    """Makes calls to one service on behalf of the current principal, or of a given one."""

    def __init__(self, target: str, passport: Passport) -> None:
        self.target = target
        self._passport = passport

    def metadata(self, principal: Principal | None = None) -> tuple[tuple[str, Any], ...]:
        """Signed identity and trace of the running step."""
        return (*self._passport.sign(principal or current_principal()), *telemetry.outgoing())

    async def unary(
        self, method: Any, request: Any, *, timeout_s: float = 5.0, principal: Principal | None = None, idempotent: bool = True
    ) -> Any:
        """Call a unary method within `timeout_s` or what the request has left, whichever is less.

        An idempotent call is tried up to three times while the target cannot be reached, and twice if it says nothing within `timeout_s`.
        Then it is Unavailable as well: DeadlineTooShort is for a request whose own time is over.
        """
        for attempts_left in reversed(range(ATTEMPTS_MAX)):
            try:
                with errors_of(self.target):
                    return await method(request, metadata=self.metadata(principal), timeout=budget_s(timeout_s))
            except DeadlineTooShort as error:
                if error.metadata.get("step") != self.target or _time_is_over():
                    raise
                if not idempotent or attempts_left < ATTEMPTS_MAX - 1:
                    raise Unavailable(f"{self.target} does not answer", dependency=self.target) from None
            except Unavailable:
                if not idempotent or not attempts_left:
                    raise
                pause_s = BACKOFF_BASE_S * 4 ** (ATTEMPTS_MAX - 1 - attempts_left)
                await asyncio.sleep(random.uniform(0, pause_s))  # noqa: S311 - jitter, not a secret
        raise AssertionError("unreachable")

    @contextlib.asynccontextmanager
    async def stream(self, method: Any, request: Any, *, timeout_s: float, principal: Principal | None = None) -> AsyncIterator[Any]:
        """Open a server stream and yield an iterator over its messages.

        A stream both ways takes an async iterator as `request`, or None: then the block sends by `write`. Leaving the block by any
        door cancels what is left of the call.
        """
        call = method(request, metadata=self.metadata(principal), timeout=budget_s(timeout_s))
        try:
            yield _Messages(call, self.target)
        finally:
            call.cancel()


class _Messages:
    """The messages of a call, with its errors as ours."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._target = target

    async def write(self, message: Any) -> None:
        """Send `message` on a stream both ways that was opened without an iterator."""
        with errors_of(self._target):
            await self._call.write(message)

    def __aiter__(self) -> "_Messages":
        return self

    async def __anext__(self) -> Any:
        try:  # not `errors_of`: this is on the way of every token
            return await self._messages.__anext__()
        except grpc.aio.AioRpcError as error:
            raise _ours(error, self._target) from None
