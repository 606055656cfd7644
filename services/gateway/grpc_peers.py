"""So many gRPC connections of one address as there may be, and no more. It knows no call and no caller.

gRPC bounds the connections of all together and shows none of them, so that one address could take every place. They are sockets of this
process all the same: now and then those of our port are counted, and the newest of an address that has too many are shut down.
"""

import asyncio
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

SWEEP_S = 1.0
_DESCRIPTORS = Path("/dev/fd")
"""The open files of this process, on every system that we run on."""


class GrpcPeers:
    """Bounds the connections to a port of this process, by address."""

    def __init__(self, per_address_max: int) -> None:
        self._per_address_max = per_address_max
        self._known: set[tuple[str, int]] = set()
        """Peers that were there at the latest sweep: who came first stays."""

    async def watch(self, port: int) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if cut := await asyncio.to_thread(self.sweep, port):
                log.warning("connections_of_one_address", cut=cut, bound=self._per_address_max)

    def sweep(self, port: int) -> int:
        """Shut down what is too many; return how much that was."""
        if len(_descriptors()) <= self._per_address_max:
            self._known.clear()
            return 0
        open_now: Counter[str] = Counter()
        newcomers, known = [], set()
        for connection in connections(port):
            peer = connection.getpeername()[:2]
            if peer in self._known:
                connection.close()
                known.add(peer)
                open_now[peer[0]] += 1
            else:
                newcomers.append((connection, peer))
        cut = 0
        for connection, peer in newcomers:
            with connection:
                if open_now[peer[0]] >= self._per_address_max:
                    # gRPC reads the end of it and closes its own descriptor; with it the connection is gone.
                    connection.shutdown(socket.SHUT_RDWR)
                    cut += 1
                else:
                    known.add(peer)
                    open_now[peer[0]] += 1
        self._known = known
        return cut


def connections(port: int) -> Iterator[socket.socket]:
    """Open connections to `port`, each as a descriptor of its own, so that none is closed and reused under our hands."""
    seen = set()
    for descriptor in _descriptors():
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            found = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue  # closed meanwhile
        try:
            if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port:
                peer = found.getpeername()  # a listening socket has none
                if peer not in seen:  # a number that was listed may be one of our own by now
                    seen.add(peer)
                    yield found
                    continue
        except OSError:
            pass
        found.close()


def _descriptors() -> list[int]:
    return [int(entry.name) for entry in _DESCRIPTORS.iterdir()]
