"""How every service lives and dies: settings, build, readiness, signal, drain, exit code. What is built is the service's own affair.

NOT_SERVING → build → dependencies answer → SERVING → signal → NOT_SERVING → running calls end → drain → everything built is
closed in reverse → spans are flushed last.
"""

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
import uvloop

from services.chassis import telemetry
from services.chassis.config import ServiceSettings, SettingsError
from services.chassis.ending import ended
from services.chassis.server import Server

log = structlog.get_logger(__name__)

GC_YOUNG_MAX = 5_000
"""New objects between two young collections. At the default of 700 a stream of tokens is a stream of collections."""
PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 0.9
SILENT_MAX = 3
"""Probes in a row that a ready dependency leaves unanswered until it counts as away: on a crowded machine one answer is late at times."""
SettingsT = TypeVar("SettingsT", bound=ServiceSettings)
Probe = Callable[[], Awaitable[None]]


@dataclass
class Service:
    """What a service's `build` hands to `run`."""

    server: Server
    port: int
    """Where the gRPC server shall listen; 0 = any free port."""
    probes: dict[str, Probe] = field(default_factory=dict)
    """Dependency by name: raises if it is away; TimeoutError, or what came of one, if it says nothing. Polled every second."""
    drain: Callable[[float], Awaitable[int]] | None = None
    """Ends work that outlives its request, within so many seconds; returns how much was abandoned."""
    ready: Callable[[dict[str, bool]], None] | None = None
    """Told the state of every dependency after each poll."""
    stopping: Callable[[], None] | None = None
    """Ends calls that would go on for ever, such as watches; without it each of them would use up the whole drain grace."""


Build = Callable[[SettingsT], contextlib.AbstractAsyncContextManager[Service]]


class Readiness:
    """What is believed of every dependency. An answer and a refusal count at once; silence does when it lasts."""

    def __init__(self, probes: dict[str, Probe]) -> None:
        self._probes = probes
        self._silent = dict.fromkeys(probes, SILENT_MAX)
        """Probes in a row without an answer; who has refused, or was never heard of, has used them all up."""

    async def ask(self) -> dict[str, bool]:
        """Ask every dependency at once, each within its own timeout; return which of them are ready."""
        await asyncio.gather(*(self._ask(name, probe) for name, probe in self._probes.items()))
        return {name: silent < SILENT_MAX for name, silent in self._silent.items()}

    async def _ask(self, name: str, probe: Probe) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await probe()
        except Exception as error:
            self._silent[name] = min(SILENT_MAX, self._silent[name] + 1) if _is_silence(error) else SILENT_MAX
        else:
            self._silent[name] = 0


def _is_silence(error: BaseException | None) -> bool:
    """Whether a wait that took too long is what it came of."""
    while error is not None and not isinstance(error, TimeoutError):
        error = error.__cause__
    return error is not None


@contextlib.asynccontextmanager
async def started(service: Service, host: str) -> AsyncIterator[int]:
    """Run the server and its readiness poll; yield the port. On leaving, the poll has ended but the server has not."""

    async def poll() -> None:
        readiness, last = Readiness(service.probes), dict[str, bool]()
        while True:
            states = await readiness.ask()
            await service.server.ready(states)
            if service.ready:
                service.ready(states)
            if states != last:
                log.info("readiness", ready=all(states.values()), **{f"dependency_{name}": state for name, state in states.items()})
                last = states
            await asyncio.sleep(PROBE_INTERVAL_S)

    port = await service.server.start(host, service.port)
    task = asyncio.create_task(poll(), name="readiness")
    try:
        yield port
    finally:
        await ended(task)


def settle() -> None:
    """Keep what is here now out of later garbage collections: a full one takes a millisecond then and not fifty, amid streams."""
    gc.collect()
    gc.freeze()
    # Python puts a full collection off until a quarter of what survived the last one has come on top. What is frozen would count for that,
    # and tens of megabytes of cycles would gather before the first; this one survives nobody.
    gc.collect()
    gc.set_threshold(GC_YOUNG_MAX)


async def serve(build: Build[SettingsT], settings: SettingsT, stop: asyncio.Event) -> int:
    """Build, serve until `stop` is set, drain; return how much work had to be abandoned."""
    abandoned = 0
    async with build(settings) as service:
        settle()
        async with started(service, settings.bind_host) as port:
            log.info("serving", port=port)
            await stop.wait()
            log.info("draining")
        if service.stopping:
            service.stopping()
        grace_s = settings.drain_grace_ms / 1000
        ends_at = time.monotonic() + grace_s
        await service.server.stop(settings.drain_notice_ms / 1000, grace_s)
        if service.drain:
            abandoned = await service.drain(max(1.0, ends_at - time.monotonic()))
    log.info("stopped", abandoned=abandoned)
    return abandoned


def run(name: str, settings_class: type[SettingsT], build: Build[SettingsT]) -> None:
    """Be the process of service `name`. `--check-config` prints the masked settings and exits.

    Exit code 0 after an orderly stop; 1 for wrong settings, a failed start, or work that had to be abandoned.
    """
    try:
        settings = settings_class.load()
    except SettingsError as error:
        sys.exit(f"{name}: the settings are wrong\n{error}\n")
    if "--check-config" in sys.argv:
        sys.stdout.write(settings.described() + "\n")
        return
    flush = telemetry.start(name, settings.otlp_endpoint, settings.log_level, settings.otlp_metrics_endpoint)

    async def main() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        return await serve(build, settings, stop)

    try:
        abandoned = uvloop.run(main())
    except OSError as error:
        log.error("cannot_start", detail=str(error))
        sys.exit(1)
    finally:
        flush()
    sys.exit(1 if abandoned else 0)
