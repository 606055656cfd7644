"""The whole suite on one machine: what is started, what needs what, and when it stops. How a process is kept alive is in `supervisor`."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.local import sample
from services.local.banner import banner
from services.local.child import Child, ChildFailed
from services.local.config import LocalSettings, make_state_dir, state_dir
from services.local.issuer import Issuer, write_secret
from services.local.preflight import NotPossible, reserve, reserved_ports, sole_owner
from services.local.processes import ServiceProcess, grpc_health, http_ready
from services.local.stores import Postgres, Valkey, free_port
from services.local.supervisor import Supervisor, sweep

POSTGRES_PORT_PREFERRED = 55432
VALKEY_PORT_PREFERRED = 56379
DRAIN_GRACE_MS = 3000
"""On one machine nobody else takes over running answers, so Ctrl-C need not wait long."""
SAMPLE_WAIT_S = 20.0
"""How long the address waits for the first documents."""


def up(environ: Mapping[str, str]) -> int:
    """Start everything, print how to use it, keep it alive until SIGINT, SIGTERM or SIGHUP; return the exit code.

    Raises NotPossible or SettingsError before anything is started.
    """
    began = time.monotonic()
    # gRPC would prepare itself for forks that go on as we do, and say so when it cannot; ours become other programs at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    make_state_dir(state_dir(environ))
    settings = LocalSettings.of(environ)
    with sole_owner(settings.state_dir.absolute(), settings.url):
        record = settings.state_dir.absolute() / "children.json"
        if swept := sweep(record):
            say(f"ended what an earlier run had left: {', '.join(swept)}")
        with reserved_ports(settings.ports, settings.bind_host, say), contextlib.ExitStack() as claims:
            suite = Suite(settings, environ, record)
            for store in (suite.postgres, suite.valkey):
                if store is not None:
                    reserve(store.port, "127.0.0.1", claims)
            return asyncio.run(suite.run(began))


class Suite:
    """Stores and services of one state directory."""

    def __init__(self, settings: LocalSettings, environ: Mapping[str, str], record: Path) -> None:
        self.settings = settings
        self.state_dir = settings.state_dir.absolute()
        self.issuer = self._development_issuer(environ)
        logs = self.state_dir / "logs"
        self.postgres = None
        if not settings.database_url:
            self.postgres = Postgres(self.state_dir / "postgres", free_port(POSTGRES_PORT_PREFERRED), logs / "postgres.log")
        self.valkey = None
        if not settings.redis_url:
            self.valkey = Valkey(self.state_dir / "valkey", free_port(VALKEY_PORT_PREFERRED), logs / "valkey.log")
        self._base = dict(environ)
        self.supervisor = Supervisor(self._order(logs), record, say)

    def _development_issuer(self, environ: Mapping[str, str]) -> Issuer | None:
        """The issuer of the state directory; none in production or where tokens come from another. Raises NotPossible."""
        own_keys = any(environ.get(name) for name in ("TAILRACE_JWKS_URL", "TAILRACE_JWKS_FILE", "TAILRACE_JWT_HS256_SECRET"))
        if self.settings.environment == "production" and not own_keys:
            raise NotPossible(
                "TAILRACE_ENV=production refuses the development issuer: "
                "set TAILRACE_JWT_ISSUER and TAILRACE_JWKS_URL, TAILRACE_JWKS_FILE or TAILRACE_JWT_HS256_SECRET"
            )
        if self.settings.environment == "production" or own_keys:
            return None
        issuer = Issuer(self.state_dir)
        issuer.write_tokens(self.state_dir)
        return issuer

    def _order(self, logs: Path) -> dict[Child, Sequence[Child]]:
        """Every child with what must be ready before it."""
        near, settings, tls = self.settings.near_host, self.settings, self.settings.mutual_tls()

        def service(name: str, port: int) -> ServiceProcess:
            return ServiceProcess(name, self._environ, logs / f"{name}.log", grpc_health(f"{near}:{port}", tls))

        stores = [store for store in (self.postgres, self.valkey) if store is not None]
        ledger = service("ledger", settings.ledger_port)
        retrieval = service("retrieval", settings.retrieval_port)
        orchestrator = service("orchestrator", settings.orchestrator_port)
        gateway = ServiceProcess("gateway", self._environ, logs / "gateway.log", http_ready(near, settings.http_port))
        order: dict[Child, Sequence[Child]] = {store: () for store in stores}
        # Retrieval is ready only with Valkey but starts without it, so it loads its model meanwhile.
        return {**order, retrieval: (), ledger: stores, orchestrator: (ledger, retrieval), gateway: (orchestrator,)}

    def _environ(self) -> dict[str, str]:
        """What every service is told: the user's environment, completed."""
        near, settings = self.settings.near_host, self.settings
        told = {
            "TAILRACE_ORCHESTRATOR_TARGET": f"{near}:{settings.orchestrator_port}",
            "TAILRACE_RETRIEVAL_TARGET": f"{near}:{settings.retrieval_port}",
            "TAILRACE_LEDGER_TARGET": f"{near}:{settings.ledger_port}",
            "TAILRACE_DRAIN_GRACE_MS": str(DRAIN_GRACE_MS),
        }
        if not self._base.get("TAILRACE_INTERNAL_KEY_FILE"):
            told["TAILRACE_INTERNAL_KEY"] = settings.internal_key.get_secret_value()
        set_by_user = {name: value for name, value in self._base.items() if value}
        addresses = {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url, "TAILRACE_STATE_DIR": str(self.state_dir)}
        return {**told, **set_by_user, **addresses, "PYTHONUNBUFFERED": "1"}

    @property
    def database_url(self) -> str:
        return self.postgres.url if self.postgres else self.settings.database_url

    @property
    def redis_url(self) -> str:
        return self.valkey.url if self.valkey else self.settings.redis_url

    async def run(self, began: float) -> int:
        """Be up from now until a signal. A second signal while stopping kills."""
        stop, hurry = asyncio.Event(), asyncio.Event()

        def signalled() -> None:
            (hurry if stop.is_set() else stop).set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, signalled)
        say(f"starting; state in {self.state_dir}")
        try:
            if await _unless(stop, self._bring_up(began)):
                await stop.wait()
        except ChildFailed as failed:
            say(f"cannot start: {failed}\nlogs: {self.state_dir / 'logs'}")
            return 1
        finally:
            say("stopping; Ctrl-C again to kill")
            if not await _unless(hurry, self.supervisor.stop()):
                self.supervisor.kill()
            say("stopped")
        return 0

    async def _bring_up(self, began: float) -> None:
        await self.supervisor.start()
        write_secret(self.state_dir / "database-url", self.database_url)
        write_secret(self.state_dir / "redis-url", self.redis_url)
        first, others = self._sample_documents()
        async with asyncio.TaskGroup() as group:
            ingesting = group.create_task(self._sample(first))
            await asyncio.wait({ingesting}, timeout=SAMPLE_WAIT_S)
            late = not ingesting.done()
            note = _can_be_asked(first, others, soon=True) if late else ingesting.result() or _can_be_asked(first, others, soon=False)
            print(banner(self.settings, signed_in=self.issuer is not None, seconds=time.monotonic() - began, note=note), flush=True)
            trouble = await ingesting
        if late and trouble:
            say(trouble)
        if first and not trouble:
            trouble = await self._sample(others)
            say(trouble or f"all {len(first) + len(others)} documents of the project can be asked about")
        if first and not trouble:
            self._sample_marker.write_text("\n".join(path.name for path in (*first, *others)) + "\n")

    def _sample_documents(self) -> tuple[list[Path], list[Path]]:
        """What to ingest before the address is printed, and after. Nothing if all is there, or if there is no token to do it with."""
        return ([], []) if self.issuer is None or self._sample_marker.exists() else sample.documents()

    @property
    def _sample_marker(self) -> Path:
        return self.state_dir / "sample-ingested"

    async def _sample(self, paths: Sequence[Path]) -> str:
        """Ingest a part of the documentation; say what went wrong, if something did."""
        if not paths:
            return ""
        token = (self.state_dir / "dev-token").read_text()
        try:
            await sample.ingest(self.settings.url, token, paths)
        except (httpx.HTTPError, ValueError) as error:
            return f"the sample documents could not be ingested ({str(error) or type(error).__name__}); the next start tries again"
        return ""


def _can_be_asked(first: Sequence[Path], others: Sequence[Path], *, soon: bool) -> str:
    if not first:
        return ""
    names, when = " and ".join(path.name for path in first), "about soon" if soon else "about"
    return f"{names} can be asked {when}, in the collection `default`; {len(others)} more documents follow"


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end and return True, or cancel it when `event` comes first and return False."""
    task, waiter = asyncio.create_task(work), asyncio.create_task(event.wait())
    await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
    finished = task.done()
    for unneeded in (task, waiter):
        unneeded.cancel()
    await asyncio.gather(task, waiter, return_exceptions=True)
    if finished:
        task.result()
    return finished


def say(text: str) -> None:
    """One event, with its time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
