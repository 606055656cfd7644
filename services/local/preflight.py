"""What must be true before anything is started: the state directory is ours alone and the fixed ports are free. Nothing is started here."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil


class NotPossible(Exception):
    """Tailrace cannot run like this; the text says why and what to do."""


@contextlib.contextmanager
def sole_owner(state_dir: Path, url: str) -> Iterator[None]:
    """Hold the state directory's lock. Raises NotPossible, naming the process that has it. A killed owner leaves no lock behind."""
    path = state_dir / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise NotPossible(
            f"the state directory {state_dir} cannot be used ({error.strerror}); was it made by another user? "
            "Set TAILRACE_STATE_DIR to a folder of your own"
        ) from None
    with os.fdopen(descriptor, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            try:
                owner = json.loads(lock.read())
            except ValueError:  # it has only just taken the lock
                owner = {}
            raise NotPossible(
                f"Tailrace already runs on {state_dir}: process {owner.get('pid', '?')}, {owner.get('url', '')}\n"
                "Use that one, stop it with Ctrl-C, or set TAILRACE_STATE_DIR and the ports to run a second one."
            ) from None
        lock.truncate()
        lock.write(json.dumps({"pid": os.getpid(), "url": url}))
        lock.flush()
        yield


def require_free_ports(ports: Mapping[str, int], host: str) -> None:
    """Raise NotPossible that names every port which is taken, its variable and, if we may know, its process."""
    doubled = [port for port in ports.values() if list(ports.values()).count(port) > 1]
    if doubled:
        variables = " and ".join(variable for variable, port in ports.items() if port == doubled[0])
        raise NotPossible(f"{variables} are the same port, {doubled[0]}")
    taken = [f"  {variable}={port} is taken{by(port)}" for variable, port in ports.items() if not free(port, host)]
    if taken:
        raise NotPossible("these ports are not free; stop what has them or set the variables to others:\n" + "\n".join(taken))


def free(port: int, host: str) -> bool:
    """Whether one can listen on `port` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def by(port: int) -> str:
    """Who listens on `port`, as words to append; empty if we may not know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""
