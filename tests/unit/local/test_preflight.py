"""What is refused before anything is started, and in which words."""

import errno
import json
import multiprocessing
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from services.chassis.listening import listeners
from services.local.preflight import NotPossible, reserved_ports, sole_owner
from services.local.stores import free_port

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_taken_port_is_named_with_its_variable_and_process(taken: int) -> None:
    """The user learns what to change and what is in the way."""
    with (
        pytest.raises(NotPossible) as refused,
        reserved_ports({"TAILRACE_HTTP_PORT": taken, "TAILRACE_LEDGER_PORT": free_port()}, HOST, print),
    ):
        pytest.fail("a port that is taken")

    assert f"TAILRACE_HTTP_PORT={taken}" in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value)
    assert "TAILRACE_LEDGER_PORT" not in str(refused.value)


def test_two_variables_with_one_port_are_refused() -> None:
    """A clash of our own is said as such."""
    port = free_port()
    doubled = {"TAILRACE_HTTP_PORT": port, "TAILRACE_GATEWAY_PORT": port}
    with (
        pytest.raises(NotPossible, match="TAILRACE_HTTP_PORT and TAILRACE_GATEWAY_PORT are the same port"),
        reserved_ports(doubled, HOST, print),
    ):
        pytest.fail("two servers on one port")


@pytest.fixture
def passing() -> Iterator[socket.socket]:
    """A connection to somewhere else; closed, it leaves nothing on its port, which no other connection of this machine shares."""
    with (
        socket.create_server((HOST, 0)) as elsewhere,
        socket.create_connection(elsewhere.getsockname(), source_address=(HOST, free_port())) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted, _ = elsewhere.accept()
        with accepted:
            yield connection


def test_a_port_that_only_a_connection_holds_is_waited_for(passing: socket.socket) -> None:
    """It is said which, whose and for how long; when the connection has gone, all goes on."""
    port, said = passing.getsockname()[1], []

    def say(text: str) -> None:
        said.append(text)
        passing.close()

    with reserved_ports({"TAILRACE_LEDGER_PORT": port}, HOST, say, patience_s=3600):
        pass

    assert len(said) == 1
    assert "3600 s" in said[0]
    assert f"TAILRACE_LEDGER_PORT={port} is taken by a connection of " in said[0]
    assert f"(process {os.getpid()})" in said[0]


def test_a_connection_that_does_not_leave_is_named(passing: socket.socket) -> None:
    """As a server is, only later."""
    port = passing.getsockname()[1]
    with pytest.raises(NotPossible) as refused, reserved_ports({"TAILRACE_LEDGER_PORT": port}, HOST, print, patience_s=0.2):
        pytest.fail("a port that is taken")

    assert f"TAILRACE_LEDGER_PORT={port} is taken by a connection of " in str(refused.value)


IP_LOCAL_PORT_RANGE = 51


def connect_from(port: int, target: tuple[str, int]) -> None:
    """Connect to `target` and let the system choose our port, among one. Raises OSError if there is none to choose."""
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("HH", port, port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connect(target)
        assert client.getsockname()[1] == port


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no port can be kept for a server")
def test_a_reserved_port_goes_to_servers_and_to_no_connection(taken: int) -> None:
    """Also before its server starts, and between two of its lives."""
    with socket.create_server((HOST, 0)) as closing:
        port = int(closing.getsockname()[1])  # one that the system gives to connections
    try:
        connect_from(port, (HOST, taken))
    except OSError as error:
        pytest.skip(f"this kernel cannot be told which port to choose: {error}")

    with reserved_ports({"TAILRACE_LEDGER_PORT": port}, HOST, print):
        for _ in range(2):
            with pytest.raises(OSError) as refused:
                connect_from(port, (HOST, taken))
            with socket.create_server((HOST, port)):
                served = listeners(port)
            assert (refused.value.errno, served) == (errno.EADDRNOTAVAIL, [os.getpid()])
    connect_from(port, (HOST, taken))


def hold(folder: Path, held: Event, release: Event) -> None:
    with sole_owner(folder, "http://127.0.0.1:8080"):
        held.set()
        release.wait(30)


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    """Process and address of the running suite are named; when it has gone, the directory is free again."""
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    owner = context.Process(target=hold, args=(tmp_path, held, release))
    owner.start()
    assert held.wait(30)
    with pytest.raises(NotPossible) as refused, sole_owner(tmp_path, "http://127.0.0.1:9090"):
        pytest.fail("two owners at once")
    release.set()
    owner.join(30)
    with sole_owner(tmp_path, "http://127.0.0.1:9090"):
        noted = json.loads((tmp_path / "lock").read_text())

    assert f"process {owner.pid}, http://127.0.0.1:8080" in str(refused.value)
    assert noted == {"pid": os.getpid(), "url": "http://127.0.0.1:9090"}


def test_the_lock_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Nobody else can take it to keep us out."""
    with sole_owner(tmp_path, ""):
        mode = stat.S_IMODE((tmp_path / "lock").stat().st_mode)

    assert mode == 0o600


def test_a_free_port_is_none_that_an_outgoing_connection_could_take(taken: int) -> None:
    """Between the choice and the server that is started on it, the system may give it to anybody who connects; and no port comes twice."""
    given = [free_port() for _ in range(200)]

    assert max(given) < 32_768
    assert len(set(given)) == len(given)
    assert free_port(taken) != taken
    assert free_port(given[-1]) == given[-1]
