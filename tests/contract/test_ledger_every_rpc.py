"""Every RPC of the ledger's contract is there, traced, and types its refusals, whoever calls it with whatever is missing."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.chassis.channel import errors_of
from services.chassis.errors import DomainError, NotAuthenticated, RemoteError
from services.chassis.principal import Principal
from services.chassis.telemetry import span
from services.local.stores import Postgres
from tailrace.ledger.v1 import ledger_service_pb2 as pb
from tests.integration.ledger.ledger_kit import Ledger, audit, fresh_database, running

METHODS = list(pb.DESCRIPTOR.services_by_name["LedgerService"].methods)
ACCEPTS_NOTHING = {"GetEntitlements", "ListPlans", "ListPrices", "GetSubscription", "ListOperations", "ListSessions", "QueryUsage"}
"""RPCs whose empty request is a good one for a plain user; `ListUsers` and `ListApiKeys` are for admins."""


@pytest.fixture(scope="module")
async def bare_ledger(postgres: Postgres) -> AsyncIterator[Ledger]:
    """A running ledger that nobody has used."""
    async with running(await fresh_database(postgres)) as ledger:
        yield ledger
        assert await audit(ledger.url) == {}


async def outcome(ledger: Ledger, method: Any, metadata: Any) -> str:
    """`ok`, or the reason that an empty request is refused with. A stream is left after its first message."""
    call, request = getattr(ledger.stub, method.name), getattr(pb, method.input_type.name)()

    async def one() -> AsyncIterator[Any]:
        yield request

    try:
        with errors_of("ledger"):
            made = call(one() if method.client_streaming else request, metadata=metadata, timeout=10)
            if method.server_streaming:
                await made.read()
                made.cancel()
            else:
                await made
    except DomainError as error:
        assert not isinstance(error, RemoteError), f"{method.name}: {error}"
        return error.reason
    return "ok"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_an_empty_request_is_answered_or_refused_by_type(bare_ledger: Ledger, method: Any) -> None:
    """No RPC is unimplemented, and none fails on its own account."""
    caller = Principal(f"tenant-{secrets.token_hex(4)}", "ann", frozenset({"user", "admin", "service"}))
    told = await outcome(bare_ledger, method, bare_ledger.caller.metadata(caller))

    assert told in {"ok", "REQUEST_INVALID", "NOT_FOUND"}
    if method.name in ACCEPTS_NOTHING:
        assert told == "ok"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_no_call_is_served_without_a_principal(bare_ledger: Ledger, method: Any) -> None:
    """Who does not say who asks, signed, is told nothing."""
    assert await outcome(bare_ledger, method, ()) == NotAuthenticated.reason
    forged = (("x-tailrace-principal-bin", b"\n\x04acme"), ("x-tailrace-signature-bin", b"x" * 32))
    assert await outcome(bare_ledger, method, forged) == NotAuthenticated.reason


async def test_a_reserve_is_traced_down_to_its_database_step(bare_ledger: Ledger) -> None:
    """Caller, server and database step are one connected line of spans, and none carries a text."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider, exporter = trace.get_tracer_provider(), InMemorySpanExporter()
    assert isinstance(provider, TracerProvider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with span("orchestrator.hold") as root:
        await bare_ledger.reserve(Principal("traced", "ann"))
    mine = {s.name: s for s in exporter.get_finished_spans() if s.context.trace_id == root.get_span_context().trace_id}

    assert set(mine) == {"orchestrator.hold", "tailrace.ledger.v1.LedgerService/Reserve", "ledger.reserve"}
    server, step = mine["tailrace.ledger.v1.LedgerService/Reserve"], mine["ledger.reserve"]
    assert (server.parent.span_id, step.parent.span_id) == (root.get_span_context().span_id, server.context.span_id)
