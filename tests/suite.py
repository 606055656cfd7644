"""The whole suite as real processes on free ports: stores, provider simulator and the four services, for end-to-end tests and benchmarks.

It starts, kills and restarts; what is asked of the suite lives with the tests. A killed process stays dead until it is started again.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncpg
import grpc
import httpx
import orjson
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bench.provider import ROOT, Simulator, simulator
from services.local.child import leashed
from services.local.issuer import Issuer
from services.local.processes import niceness_of
from services.local.stores import Postgres, Valkey, free_port

SERVICES = ("ledger", "retrieval", "orchestrator", "gateway")
"""In the order they are started. The first replica of a service has its name, the second one is `gateway-2`, and so on."""
TERMINALS = ("done", "error", "cancelled")
"""Events of which every stream ends with exactly one. Only the first is an event of the answer's log and has a number."""
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 45.0
T = TypeVar("T")


class SuiteFailed(Exception):
    """A process did not start, or ended by itself; the text ends with its last log lines."""


@dataclass(frozen=True)
class Load:
    """What a process and its children have used."""

    cpu_s: float
    rss_bytes: int
    pss_bytes: int
    """Shared pages counted in proportion; the only figure that may be summed over processes."""


@dataclass
class Event:
    """One server-sent event."""

    name: str
    data: Any
    id: str = ""


@dataclass
class Streamed:
    """One answer as a browser sees it."""

    events: list[Event] = field(default_factory=list)

    def data(self, name: str) -> list[Any]:
        """What the events of this name carried, in order."""
        return [event.data for event in self.events if event.name == name]

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    @property
    def text(self) -> str:
        return "".join(delta["text"] for delta in self.data("delta"))

    @property
    def answer_id(self) -> str:
        return str(self.data("accepted")[0]["answer_id"])

    @property
    def done(self) -> Any:
        """The receipt. Fails if the stream did not end with exactly one, or holds anything its contract forbids."""
        self.check("done")
        return self.events[-1].data

    @property
    def error(self) -> Any:
        """The problem the stream ended with. Fails if it did not end with exactly one."""
        self.check("error")
        return self.events[-1].data

    @property
    def cancelled(self) -> Any:
        """The problem a stopped stream ended with. Fails if it did not end with exactly one."""
        self.check("cancelled")
        return self.events[-1].data

    def check(self, end: str) -> None:
        """The terminal law and the numbering: one end, at the end; ids 1, 2, 3, …"""
        assert [name for name in self.names if name in TERMINALS] == [end], self.events[-3:]
        assert self.names[-1] == end
        numbers = [int(event.id) for event in self.events if event.id or event.name not in ("error", "cancelled")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps every span, with the name of the service it came from."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.extend((names.get("service.name", ""), span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[tuple[str, Any]]:
        """Spans of one trace that have arrived so far, by the service that sent them."""
        return [(service, span) for service, span in self.spans if span.trace_id.hex() == trace_id]

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._server.stop(0)


@dataclass
class Suite:
    """A running suite."""

    folder: Path
    provider: Simulator
    postgres: Postgres
    valkey: Valkey
    environment: dict[str, str]
    ports: dict[str, int]
    """Where a replica listens, by its name; the HTTP port of the first gateway is `http`, of the second one `http-2`."""
    own: dict[str, dict[str, str]]
    """What one replica is told beside or over `environment`."""
    issuer: Issuer
    collector: Collector | None = None
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def gateways(self) -> list[str]:
        """Every gateway that is meant to exist, running or not."""
        return [name for name in self.own if _service_of(name) == "gateway"]

    def port_of(self, gateway: str) -> int:
        """The HTTP port of a gateway."""
        return self.ports[gateway.replace("gateway", "http")]

    def url_of(self, gateway: str) -> str:
        return f"http://127.0.0.1:{self.port_of(gateway)}"

    def log_of(self, service: str) -> Path:
        return self.folder / "logs" / f"{service}.log"

    def token(self, user: str = "ada", tenant: str = "acme", roles: Iterable[str] = ("user",), *, lifetime_s: int = 3600) -> str:
        """A token of the development issuer. A negative lifetime has ended already."""
        return self.issuer.mint(user, tenant, roles, lifetime_s)

    def client(self, user: str = "ada", tenant: str = "acme", roles: Iterable[str] = ("user",)) -> httpx.AsyncClient:
        """An HTTP client with that user's token. Close it."""
        headers = {"authorization": f"Bearer {self.token(user, tenant, roles)}"}
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=100)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60, limits=limits, trust_env=False)

    async def start(self, service: str, **environment: str) -> None:
        """Start one replica by its name. Does not wait until it is ready."""
        log, kind = self.log_of(service), _service_of(service)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as sink:
            self.processes[service] = await asyncio.create_subprocess_exec(
                *leashed([sys.executable, "-m", f"services.{kind}"], number=signal.SIGKILL, niceness=niceness_of(kind)),
                cwd=ROOT,
                env={**self.environment, **self.own[service], **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    async def kill(self, service: str) -> None:
        """kill -9."""
        process = self.processes.pop(service)
        process.kill()
        await process.wait()

    async def stop(self, service: str) -> int:
        """SIGTERM, and SIGKILL if that does not help; return the exit code."""
        process = self.processes.pop(service)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()

    async def readiness(self, gateway: str = "gateway") -> httpx.Response | None:
        """What /readyz says; None if nobody answers."""
        async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
            with contextlib.suppress(httpx.TransportError):
                return await http.get(f"{self.url_of(gateway)}/readyz")
        return None

    async def until_all_ready(self) -> None:
        """Wait until every replica that was started serves. Raises SuiteFailed if one ends or time is up."""
        for name in list(self.processes):
            await (self.until_ready(name) if _service_of(name) == "gateway" else self.until_serving(name))

    async def until_serving(self, replica: str) -> None:
        """Wait until this replica's own gRPC health says SERVING: with replicas, a gateway's readiness is about any of them."""

        async def serves() -> bool:
            if self.processes[replica].returncode is not None:
                raise SuiteFailed(f"{replica} ended with code {self.processes[replica].returncode}:\n{self._tail(replica)}")
            with contextlib.suppress(grpc.aio.AioRpcError):
                said = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
                return bool(said.status == health_pb2.HealthCheckResponse.SERVING)
            return False

        options = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.ports[replica]}", options=options) as channel:
            await until(serves, READY_TIMEOUT_S)

    async def until_ready(self, gateway: str = "gateway", *, ready: bool = True) -> httpx.Response:
        """Wait until /readyz says 200, or until it says anything else. Raises SuiteFailed if a process ends or time is up."""
        said: httpx.Response | None = None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while True:
                    for name, process in self.processes.items():
                        if process.returncode is not None:
                            raise SuiteFailed(f"{name} ended with code {process.returncode}:\n{self._tail(name)}")
                    said = await self.readiness(gateway)
                    if said is not None and (said.status_code == 200) is ready:
                        return said
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logs = "\n".join(f"{name}:\n{self._tail(name)}" for name in self.processes)
            raise SuiteFailed(f"/readyz said {said.text if said is not None else 'nothing'}\n{logs}") from None

    def _tail(self, service: str) -> str:
        return "\n".join(self.log_of(service).read_text(errors="replace").splitlines()[-15:])

    async def rows(self, sql: str, *arguments: Any) -> list[Any]:
        """What the database says, on a connection of its own."""
        connection = await asyncpg.connect(self.postgres.url)
        try:
            return list(await connection.fetch(sql, *arguments))
        finally:
            await connection.close()

    def loads(self) -> dict[str, Load]:
        """What every process has used so far, stores with their children."""
        pids = {name: process.pid for name, process in self.processes.items() if process.returncode is None}
        for store in (self.postgres, self.valkey):
            if store.process is not None and store.process.returncode is None:
                pids[store.name] = store.process.pid
        pids["provider"] = self.provider.pid
        return {name: load_of(pid) for name, pid in pids.items()}


def load_of(pid: int) -> Load:
    """What a process and its children have used so far. Zeros once it is gone."""
    cpu, rss, pss = 0.0, 0, 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times, memory = process.cpu_times(), process.memory_full_info()
                cpu += times.user + times.system
                rss += memory.rss
                pss += getattr(memory, "pss", memory.rss)
    return Load(cpu, rss, pss)


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream, strictly: a block without data, other than a comment, is an error."""
    name, data, number = "message", [], ""
    block: list[str] = []
    async for line in response.aiter_lines():
        if line:
            block.append(line)
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                data.append(value)
            elif key == "id":
                number = value
            continue
        assert data or all(part.startswith(":") for part in block), f"a block without data: {block}"
        if data:
            yield Event(name, orjson.loads("\n".join(data)), number)
        name, data, number, block = "message", [], "", []


async def ask(client: httpx.AsyncClient, question: str, **body: Any) -> Streamed:
    """Ask and read the whole stream. Fails if it does not begin."""
    async with client.stream("POST", "/v1/answers", json={"question": question, **body}) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        return Streamed([event async for event in events(response)])


async def ingest(client: httpx.AsyncClient, documents: dict[str, str], collection: str = "default") -> dict[str, str]:
    """Index documents by title; return their ids by title. Fails if any is refused."""
    body = b"\n".join(orjson.dumps({"title": title, "text": text, "collection": collection}) for title, text in documents.items())
    ids: dict[str, str] = {}
    headers = {"content-type": "application/x-ndjson"}
    async with client.stream("POST", "/v1/documents:bulk", content=body, headers=headers, timeout=300) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for event in events(response):
            if event.data.get("stage") in ("indexed", "unchanged"):
                ids[event.data["name"]] = event.data["document_id"]
            assert event.data.get("stage") != "failed", event.data
    assert ids.keys() == documents.keys()
    return ids


async def until(probe: Callable[[], Awaitable[T | None]], timeout_s: float = 10.0) -> T:
    """What `probe` finds, as soon as it finds something true. For facts that arrive a moment later by design."""
    async with asyncio.timeout(timeout_s):
        while True:
            if found := await probe():
                return found
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    *,
    traces: bool = False,
    folder: Path | None = None,
    provider: Simulator | None = None,
    ledgers: int = 1,
    orchestrators: int = 1,
    gateways: int = 1,
    **extra: str,
) -> AsyncIterator[Suite]:
    """Run the whole suite, ready to answer, until the block is left. `extra` are variables for all services.

    Every replica has ports and a state directory of its own; gateways share out their calls over all orchestrators.

    `folder` keeps its state; without one it is a temporary folder. Without a `provider` it has one of its own. With `traces` spans go to
    `suite.collector`.
    """
    async with contextlib.AsyncExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailrace-suite-", ignore_cleanup_errors=True)))
            folder.chmod(0o755)  # PostgreSQL does not run as root, and must reach its cluster
        provider = provider or await stack.enter_async_context(simulator())
        collector = await stack.enter_async_context(Collector()) if traces else None
        postgres, valkey = Postgres(folder / "postgres"), Valkey(folder / "valkey")
        for store in (postgres, valkey):
            stack.push_async_callback(store.stop)
        await asyncio.gather(postgres.start(), valkey.start())
        counts = {"ledger": ledgers, "orchestrator": orchestrators, "gateway": gateways}
        replicas = {service: _replicas(service, counts.get(service, 1)) for service in SERVICES}
        ports = {name: free_port() for names in (*replicas.values(), _replicas("http", gateways)) for name in names}
        own = {name: _own(folder, name, ports) for names in replicas.values() for name in names}
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "TAILRACE_STATE_DIR": str(folder),
            "TAILRACE_INTERNAL_KEY": "a key that only this suite knows",
            "DATABASE_URL": postgres.url,
            "REDIS_URL": valkey.url,
            "ANTHROPIC_API_KEY": "a key for the simulator",
            "ANTHROPIC_BASE_URL": provider.url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}" if collector else "",
            **{f"TAILRACE_{service.upper()}_TARGET": _target([ports[name] for name in names]) for service, names in replicas.items()},
            **extra,
        }
        suite = Suite(folder, provider, postgres, valkey, environment, ports, own, Issuer(folder), collector)
        stack.push_async_callback(_stop_all, suite)
        for name in own:
            await suite.start(name)
        await suite.until_ready()
        if len(own) > len(SERVICES):
            await suite.until_all_ready()
        yield suite


def _replicas(service: str, count: int) -> list[str]:
    return [service, *(f"{service}-{number}" for number in range(2, count + 1))]


def _service_of(replica: str) -> str:
    return replica.partition("-")[0]


def _own(folder: Path, name: str, ports: dict[str, int]) -> dict[str, str]:
    """What sets this replica apart. A first one lives in the suite's own folder, a further one below it."""
    service = _service_of(name)
    own = {f"TAILRACE_{service.upper()}_PORT": str(ports[name])}
    if service == "gateway":
        own["TAILRACE_HTTP_PORT"] = str(ports[name.replace("gateway", "http")])
    if name != service:
        (folder / name).mkdir(exist_ok=True)
        own["TAILRACE_STATE_DIR"] = str(folder / name)
        if service == "gateway":
            own["TAILRACE_JWKS_FILE"] = str(folder / "dev-jwks.json")
    return own


def _target(ports: list[int]) -> str:
    """One address, or several as gRPC's list of them."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return addresses[0] if len(addresses) == 1 else f"ipv4:{','.join(addresses)}"


async def _stop_all(suite: Suite) -> None:
    for name in reversed(suite.own):
        if name in suite.processes:
            await suite.stop(name)
