"""Traces, gauges and logs: set-up, the span of a step, and the one table of attribute names. Prompts and answers enter none of them.

Spans cross services by the W3C `traceparent` metadata key; a server span's parent is the step that made the call.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.chassis.errors import DomainError, Internal
from services.chassis.library_logs import Wordless
from services.chassis.tracebacks import without_words

TRACEPARENT = "traceparent"

# The gen_ai names are still in development upstream; a rename is a change of these lines alone.
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_CACHE_CREATION_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
GEN_AI_REASONING_TOKENS = "gen_ai.usage.reasoning.output_tokens"
GEN_AI_TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - a name
GEN_AI_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
GEN_AI_CONVERSATION = "gen_ai.conversation.id"
GEN_AI_TOOL_NAME = "gen_ai.tool.name"
SERVER_ADDRESS = "server.address"
RPC_SYSTEM = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS = "rpc.response.status_code"
HTTP_METHOD = "http.request.method"
HTTP_ROUTE = "http.route"
HTTP_STATUS = "http.response.status_code"
ERROR_TYPE = "error.type"
TENANT = "tailrace.tenant"
ANSWER_ID = "tailrace.answer.id"
CACHE_VERDICT = "tailrace.cache.verdict"
CACHE_SIMILARITY = "tailrace.cache.similarity"
COST_NANOUSD = "tailrace.cost.nanousd"

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("tailrace")
_meter = metrics.get_meter("tailrace")

METRICS_INTERVAL_MS = 10_000
CUT_SHORT = "cut_short"
"""Why a step failed that would have gone on: what it was part of was stopped, or had no more time."""


class Gauge(Protocol):
    """A figure that is set again and again."""

    def set(self, amount: float) -> None: ...


class Histogram(Protocol):
    """How a figure is spread."""

    def record(self, amount: float, attributes: Mapping[str, str] | None = None) -> None: ...


def start(service: str, otlp_endpoint: str, log_level: str, otlp_metrics_endpoint: str = "") -> Callable[[], None]:
    """Set up tracing, gauges and logging for this process; return what flushes and closes them, to be called last.

    Without an endpoint nothing is recorded: spans are ids alone, so that the calls of one request still agree on its trace id. Gauges have
    an endpoint of their own, because where traces go often takes nothing else.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_trace_id,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            without_words,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.getLogger().handlers = [Wordless()]
    resource = Resource.create({"service.name": f"tailrace-{service}", "service.namespace": "tailrace"})
    provider = TracerProvider(sampler=ALWAYS_ON if otlp_endpoint else ALWAYS_OFF, resource=resource)
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=not otlp_endpoint.startswith("https://"), timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=8192, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    stop_metrics = _export_metrics(resource, otlp_metrics_endpoint) if otlp_metrics_endpoint else None

    def stop() -> None:
        if stop_metrics is not None:
            stop_metrics()
        provider.shutdown()

    return stop


def _export_metrics(resource: Resource, endpoint: str) -> Callable[[], None]:
    """Send gauges to `endpoint` every METRICS_INTERVAL_MS, from a thread of the exporter's own; return what ends it."""
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    exporter = OTLPMetricExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=5)
    reader = PeriodicExportingMetricReader(exporter, METRICS_INTERVAL_MS)
    provider = MeterProvider([reader], resource=resource)
    metrics.set_meter_provider(provider)
    return provider.shutdown


def gauge(name: str, unit: str, description: str) -> Gauge:
    """Make a gauge of this process. `unit` as UCUM writes it. Set where nothing is exported, it costs nothing."""
    return _meter.create_gauge(name, unit, description)


def histogram(name: str, unit: str, description: str, bounds: Sequence[float]) -> Histogram:
    """Make a histogram of this process. `unit` as UCUM writes it; `bounds` between its buckets, rising. Costs nothing where nothing is
    exported."""
    return _meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)


def _add_trace_id(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if trace_id := current_trace_id():
        event["trace_id"] = trace_id
    return event


def current_trace_id() -> str:
    """The running trace's id, 32 hex digits; empty outside a span."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata pairs that make the current span the parent of the call they are sent with."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return tuple(carrier.items())


def incoming(metadata: Iterable[tuple[str, str | bytes]] | Mapping[str, str]) -> Context:
    """The trace context that came with a call or request."""
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
    return _propagator.extract({key.lower(): value for key, value in pairs if isinstance(value, str)})


def trace_id_in(headers: Iterable[tuple[str, str]]) -> str:
    """The id of the trace that a request belongs to by its headers, 32 hex digits; empty if it names none."""
    if not any(name == "traceparent" for name, _ in headers):
        return ""
    context = trace.get_current_span(incoming(headers)).get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else ""


@contextlib.contextmanager
def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: Context | None = None,
    left: Callable[[BaseException], bool] = lambda _: False,
    **attributes: Any,
) -> Iterator[Span]:
    """Run the block inside a span. An exception marks it failed by its class's name, never by its text.

    One of which `left` says that it means no more than that the caller went marks it cancelled, which is no failure.
    """
    with _tracer.start_as_current_span(
        name, context=parent, kind=kind, attributes=attributes or None, record_exception=False, set_status_on_exception=False
    ) as running:
        try:
            yield running
        except BaseException as error:
            if left(error):
                running.set_attribute(RPC_STATUS, "CANCELLED")
            else:
                running.set_attribute(ERROR_TYPE, getattr(error, "reason", "") or type(error).__name__)
                running.set_status(Status(StatusCode.ERROR))
            raise


@dataclass(slots=True)
class StepRecord:
    """What a step left behind. Times are milliseconds after the trail began."""

    name: str
    started_ms: float
    duration_ms: float = 0.0
    status: str = "running"
    facts: dict[str, str] | None = None

    def note(self, **facts: object) -> None:
        """Add small facts for people; never texts of prompts or answers."""
        self.facts = {**(self.facts or {}), **{key: str(value) for key, value in facts.items()}}

    def skip(self, reason: str) -> None:
        """Say that there was nothing to do."""
        self.status = "skipped"
        self.note(reason=reason)

    def fail(self, error: BaseException) -> None:
        """Say that it ended in `error`, by its name alone."""
        self.status = "failed"
        if isinstance(error, asyncio.CancelledError):
            self.note(reason=CUT_SHORT)
        else:
            self.note(reason=error.reason or error.code if isinstance(error, DomainError) else Internal.reason)

    def cut_short(self, elapsed_ms: float) -> "StepRecord":
        """This running step as it stands if nothing is ever heard of it after `elapsed_ms`."""
        facts = {**(self.facts or {}), "reason": CUT_SHORT}
        return StepRecord(self.name, self.started_ms, round(elapsed_ms - self.started_ms, 3), "failed", facts)


class Trail:
    """The timed steps of one request, each also a span. `changed` hears of every end, and of every begin that lasts.

    A step that ends before anything else could run is told once, as ended: nobody can watch it run.
    """

    def __init__(self, prefix: str, changed: Callable[[StepRecord], None] | None = None) -> None:
        self._prefix = prefix
        self._changed = changed or (lambda _: None)
        self._began = time.perf_counter()
        self._begun: list[StepRecord] = []
        """The steps whose beginnings are still to be told: more than one where steps run side by side."""
        self.steps: list[StepRecord] = []

    @property
    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self._began) * 1000

    def tell(self) -> None:
        """Tell now of the steps that have begun: before anything they bring forth is told."""
        while self._begun:
            self._changed(self._begun.pop(0))

    @contextlib.contextmanager
    def step(self, name: str, **attributes: Any) -> Iterator[StepRecord]:
        """Time the block as step `name`, inside a span `<prefix>.<name>`."""
        record = StepRecord(name, round(self.elapsed_ms, 3))
        self.steps.append(record)
        self._begun.append(record)
        beginning = asyncio.get_running_loop().call_soon(self.tell)
        with span(f"{self._prefix}.{name}", **attributes) as running:
            try:
                yield record
            except BaseException as error:
                record.fail(error)
                raise
            finally:
                beginning.cancel()
                self._begun = [other for other in self._begun if other is not record]
                record.duration_ms = round(self.elapsed_ms - record.started_ms, 3)
                if record.status == "running":
                    record.status = "done"
                for key, value in (record.facts or {}).items():
                    running.set_attribute(f"tailrace.step.{key}", value)
                self._changed(record)
