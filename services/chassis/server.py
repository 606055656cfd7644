"""The grpc.aio server all services run: interceptors in a fixed order, limits, health and reflection. It knows no service's methods.

Order of the interceptors, outermost first: errors (whatever happens below becomes one status of ours), telemetry (so that
refused calls have a span too), identity (nothing below runs without a principal), deadline.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import SpanKind

from services.chassis import listening, telemetry
from services.chassis.calls import Calls
from services.chassis.deadline import Deadline, current_deadline
from services.chassis.errors import DomainError, NotAuthenticated, Overloaded, RequestInvalid
from services.chassis.passport import Passport
from services.chassis.pings import LEAST_BETWEEN_PINGS_S, with_pings
from services.chassis.principal import Principal, set_current
from services.chassis.status import abort, unexpected
from services.chassis.tls import MutualTls

log = structlog.get_logger(__name__)

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
"""Room for a question with all that may come with it: pictures of 10 MiB, tools of 4 MiB, results of 1 MiB."""
STREAMS_PER_CONNECTION_MAX = 2000
CONNECTIONS_MAX = 5_000
"""Open at the same time, whoever they come from; ours are a few for each process."""
CONNECTION_IDLE_MAX_S = 300
"""How long one without a call may stay. Clients open another with their next call."""
METADATA_BYTES_MAX = 16 * 1024
"""Of one call, names and values: a token has at most 8 KiB, and a signed principal far less."""
CONNECTION_AGE_MAX_S = 30 * 60
CONNECTION_GRACE_S = 3660
"""Longer than the longest answer that may be set."""
HANDSHAKE_TIMEOUT_MS = 10_000
"""From the connection to the client's first HTTP/2 settings, TLS included; gRPC would wait for two minutes."""
WATCHES_MAX = 200
"""Of health at the same time: nobody is asked who they are for it, and a watch never ends by itself."""
CALLS_SHARE = 0.9
"""Of a stop's grace, how much belongs to calls that go on; the rest is for telling them that they do not."""
Identify = Callable[[grpc.aio.ServicerContext], Awaitable[Principal]]
_OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS_MAX),
    ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MAX_S * 1000),
    ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
    # The hard bound is what gRPC calls absolute; between the two it refuses at random, so they are one.
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    # Old connections move on to new replicas and new certificates; what runs on them may end first.
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MAX_S * 1000),
    ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_S * 1000),
    ("grpc.enable_channelz", 0),
    # Two servers on one port would share calls in a way nobody asked for; a taken port must be an error.
    ("grpc.so_reuseport", 0),
    # Clients ping to find out who stands still and to keep idle streams alive through proxies; the default would call that an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", int(LEAST_BETWEEN_PINGS_S * 1000)),
]
# A peer that vanished without a word does not keep its streams.
SERVER_OPTIONS = with_pings(_OPTIONS, every_s=60, answer_within_s=20)


class _Wrapping(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler, whatever its shape, in one coroutine that errors, spans, identity and deadline run in."""

    def __init__(self, identify: Identify, calls: Calls) -> None:
        self._identify = identify
        self._calls = calls

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_PREFIXES):
            return handler
        method = details.method.lstrip("/")
        # Left to gRPC, bytes that are no message would become UNKNOWN with the name of a Python class in it.
        read: Callable[[Any], Any] = _read_as_is if handler.request_streaming else functools.partial(_read, handler.request_deserializer)
        deserializer = handler.request_deserializer if handler.request_streaming else None
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream

            async def streaming(request: Any, context: grpc.aio.ServicerContext) -> None:
                with _errors_become_statuses() as failure:
                    with _server_span(method, context), self._calls.running(method):
                        await self._bind(context)
                        await _run_stream(inner, read(request), context)
                if failure:
                    await abort(context, failure[0])

            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            return make(streaming, deserializer, handler.response_serializer)
        inner_unary = handler.stream_unary or handler.unary_unary

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with _errors_become_statuses() as failure:
                with _server_span(method, context), self._calls.running(method):
                    await self._bind(context)
                    return await inner_unary(read(request), context)
            await abort(context, failure[0])
            return None

        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        return make(unary, deserializer, handler.response_serializer)

    async def _bind(self, context: grpc.aio.ServicerContext) -> None:
        set_current(await self._identify(context))
        remaining = context.time_remaining()
        current_deadline.set(Deadline.after(remaining) if remaining is not None else None)


def _read(deserializer: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return deserializer(request)
    except DecodeError:
        raise RequestInvalid("the message cannot be read", field="message", bound="the method's request as protobuf") from None


def _read_as_is(request: Any) -> Any:
    return request


async def _run_stream(inner: Any, request: Any, context: grpc.aio.ServicerContext) -> None:
    answer = inner(request, context)
    if hasattr(answer, "__aiter__"):
        async for message in answer:
            await context.write(message)
    else:
        await answer


@contextlib.contextmanager
def _errors_become_statuses() -> Iterator[list[DomainError]]:
    """Collect the error of the block instead of letting it out; cancellation and a client that left pass through untouched."""
    failure: list[DomainError] = []
    try:
        yield failure
    except DomainError as error:
        failure.append(error.bare())
    except asyncio.CancelledError as error:
        if _caller_left(error):
            raise
        # Nobody cancelled the call: something inside was cancelled and let it out. Unreported, the call would stay open for ever.
        log.exception("rpc_failed_unexpectedly", error="CancelledError")
        failure.append(unexpected(telemetry.current_trace_id()))
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception as error:
        if _caller_left(error):  # while we were writing; not ours to report
            raise asyncio.CancelledError from error
        trace_id = telemetry.current_trace_id()
        log.exception("rpc_failed_unexpectedly", error=type(error).__name__)
        failure.append(unexpected(trace_id))


def _caller_left(error: BaseException) -> bool:
    """Whether the call ended because its caller has what it wanted, or is gone. A handler is told so in either of two ways."""
    if isinstance(error, asyncio.CancelledError):
        return bool((task := asyncio.current_task()) and task.cancelling())
    return type(error).__name__ == "ExecuteBatchError"


@contextlib.contextmanager
def _server_span(method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
    attributes = {telemetry.RPC_SYSTEM: "grpc", telemetry.RPC_METHOD: method}
    parent = telemetry.incoming(context.invocation_metadata() or ())
    with telemetry.span(method, kind=SpanKind.SERVER, parent=parent, left=_caller_left, **attributes):
        yield


def passport_identity(passport: Passport) -> Identify:
    """Identify inner calls by their signed principal."""

    async def identify(context: grpc.aio.ServicerContext) -> Principal:
        return passport.check(context.invocation_metadata() or ())

    return identify


async def nobody(context: grpc.aio.ServicerContext) -> Principal:
    """Identify nobody: for servers whose every method is refused."""
    raise NotAuthenticated("this server takes no calls", cause="closed")


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """The standard servicer, with the standard's `List`, which the package does not serve yet, and an end to `Watch`."""

    def __init__(self) -> None:
        super().__init__()
        self._watching: set[asyncio.Task[Any]] = set()
        self._released = False

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        if len(self._watching) >= WATCHES_MAX:
            await abort(context, Overloaded(f"at most {WATCHES_MAX} watches of health; Check is always answered", bound=WATCHES_MAX))
        task = asyncio.current_task()
        assert task is not None
        self._watching.add(task)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._released:
                raise  # the client left; if it was us, returning is what sends a status
        finally:
            self._watching.discard(task)

    def release(self) -> None:
        """End every watch: they never end by themselves and would use up the whole grace of a stop."""
        self._released = True
        for task in self._watching:
            task.cancel()

    async def List(self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext) -> health_pb2.HealthListResponse:
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


class Server:
    """A grpc.aio server with our interceptors, health and, if wanted, reflection."""

    def __init__(
        self,
        identify: Identify,
        *,
        reflect: bool,
        tls: MutualTls | None = None,
        verify_clients: bool = True,
        tells_dependencies: bool = True,
    ) -> None:
        """With `tls` nothing but TLS is spoken; `verify_clients` is off only where callers from outside bring a token instead.

        `tells_dependencies` is off where strangers ask: they hear whether it is ready, and not why.
        """
        self._credentials = tls.server_credentials(verify_clients=verify_clients) if tls else None
        self._calls = Calls()
        self._server = grpc.aio.server(interceptors=[_Wrapping(identify, self._calls)], options=SERVER_OPTIONS)
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._reflect = reflect
        self._tells_dependencies = tells_dependencies
        self._names: list[str] = []
        self.port = 0
        """The port listened on, once started."""
        self.draining = asyncio.Event()
        """Set when a stop begins: streams that would never end by themselves end then."""

    def add(self, register: Callable[[Any, Any], None], servicer: object, service_name: str) -> None:
        """Offer `servicer` by the generated `add_…_to_server` function."""
        register(servicer, self._server)
        self._names.append(service_name)

    async def start(self, host: str, port: int) -> int:
        """Listen on `host:port` (0 = any free one) and return the port. Raises OSError if it is taken, as `listening.claimed` does."""
        try:
            (await listening.claimed(host, port)).close()  # gRPC says neither why it cannot, nor may it be asked again without a noise
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        if self._reflect:
            reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self.report({"": False, **dict.fromkeys(self._names, False)})
        try:
            address = f"{host}:{port}"
            if self._credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}: the port is taken or not allowed") from error
        await self._server.start()
        return self.port

    async def report(self, serving: dict[str, bool]) -> None:
        """Push health: one entry for each name; `Watch`ers hear of every change."""
        for name, good in serving.items():
            status = health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING
            await self._health.set(name, status)

    async def ready(self, dependencies: dict[str, bool]) -> None:
        """Report each dependency under `dependency.<name>`, if that is told, and ourselves ready if all of them are."""
        good = all(dependencies.values())
        states = {f"dependency.{name}": state for name, state in dependencies.items() if self._tells_dependencies}
        await self.report({**states, "": good, **dict.fromkeys(self._names, good)})

    async def stop(self, notice_s: float, grace_s: float) -> None:
        """Turn not ready, wait for balancers to notice, let running calls end within `grace_s`; what is left is told so and ended."""
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(notice_s)
        self._health.release()
        late = asyncio.get_running_loop().call_later(CALLS_SHARE * grace_s, self._calls.interrupt_all)
        await self._server.stop(grace_s)
        late.cancel()
