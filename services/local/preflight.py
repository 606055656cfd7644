"""What must be true before anything is started: the state directory is ours alone and the fixed ports are free. Nothing is started here."""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from services.chassis import listening

PATIENCE_S = 65.0
"""How long connections alone may hold a port. What a closed one leaves behind goes after a minute."""


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


@contextlib.contextmanager
def reserved_ports(ports: Mapping[str, int], host: str, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keep `ports` for servers on this machine: no outgoing connection is given one, not even while its server is started anew.

    Raises NotPossible that names every port which a server has, its variable and, if we may know, its process. One that only a connection
    holds is waited for.
    """
    doubled = [port for port in ports.values() if list(ports.values()).count(port) > 1]
    if doubled:
        variables = " and ".join(variable for variable, port in ports.items() if port == doubled[0])
        raise NotPossible(f"{variables} are the same port, {doubled[0]}")
    ends_at, told = time.monotonic() + patience_s, False
    while taken := {variable: port for variable, port in ports.items() if not free(port, host)}:
        lines = "\n".join(f"  {variable}={port} is taken{by(port)}" for variable, port in taken.items())
        if time.monotonic() >= ends_at or any(listening.listeners(port) for port in taken.values()):
            raise NotPossible(f"these ports are not free; stop what has them or set the variables to others:\n{lines}")
        if not told:
            say(f"waiting up to {patience_s:.0f} s for these ports, which no server has:\n{lines}")
            told = True
        time.sleep(listening.PAUSE_S)
    with contextlib.ExitStack() as claims:
        for port in ports.values():
            reserve(port, host, claims)
        yield


def reserve(port: int, host: str, claims: contextlib.ExitStack) -> None:
    """Keep `port` from outgoing connections until `claims` end. Does nothing on a system whose servers could not have it then either."""
    # Linux lets a server listen on what another socket is bound to, as long as both say so and that one does not listen.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # taken this very moment: its server will wait, or say so
            claims.enter_context(listening.bound(host, port))


def free(port: int, host: str) -> bool:
    """Whether one can listen on `port` now."""
    try:
        listening.bound(host, port).close()
    except OSError:
        return False
    return True


def by(port: int) -> str:
    """Who has `port`, as words to append; empty if we may not know."""
    with contextlib.suppress(psutil.Error, OSError):
        connections = [one for one in psutil.net_connections("tcp") if one.laddr.port == port]
        for one in sorted(connections, key=lambda one: one.status != psutil.CONN_LISTEN):
            if one.status == psutil.CONN_TIME_WAIT:
                return " by a connection that was closed; the system keeps it for a minute"
            if one.pid:
                having = "" if one.status == psutil.CONN_LISTEN else "a connection of "
                return f" by {having}{psutil.Process(one.pid).name()} (process {one.pid})"
    return ""
