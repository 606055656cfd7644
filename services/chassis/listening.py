"""A port to listen on that is taken: by another server, which stays, or by a connection that somebody opened from it, which passes.

Systems give outgoing connections ports of their own choice, from a range that many servers' ports lie in.
"""

import asyncio
import errno
import socket

import structlog

log = structlog.get_logger(__name__)

PATIENCE_S = 5.0
"""How long a port may be held by connections alone until it counts as taken."""
PAUSE_S = 0.1


async def claimed(host: str, port: int, patience_s: float = PATIENCE_S) -> socket.socket:
    """A socket that is bound to `host:port`, 0 = any free port, and does not listen yet.

    Raises OSError: at once if a server listens there, after `patience_s` if nothing but connections hold the port.
    """
    clock = asyncio.get_running_loop()
    ends_at, told = clock.time() + patience_s, False
    while True:
        try:
            return bound(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or listeners(port):
                raise
            if clock.time() >= ends_at:
                raise OSError(error.errno, f"held for {patience_s:g} s by connections, no server listens there") from error
        if not told:
            log.warning("port_held_by_a_connection", port=port, tried_for_s=patience_s)
            told = True
        await asyncio.sleep(PAUSE_S)


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to `host:port` as a server's is. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its full name: asyncio takes the delay off a connection only where the protocol is given, and a response is two writes.
    claim = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # A port in TIME_WAIT after a restart is free; one that somebody listens on is not.
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claim.bind((host.strip("[]"), port))
    except OSError:
        claim.close()
        raise
    return claim


def listeners(port: int) -> list[int]:
    """Ids of the processes that listen on `port`, at whatever address; 0 for one that we may not know, or where a system tells nothing."""
    import psutil  # megabytes, for what hardly a process ever asks

    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return [0]
    return [one.pid or 0 for one in connections if one.status == psutil.CONN_LISTEN and one.laddr.port == port]
