"""What is refused before anything is started, and in which words."""

import json
import multiprocessing
import os
import socket
import stat
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from services.local.preflight import NotPossible, require_free_ports, sole_owner
from services.local.stores import free_port


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_taken_port_is_named_with_its_variable_and_process(taken: int) -> None:
    """The user learns what to change and what is in the way."""
    with pytest.raises(NotPossible) as refused:
        require_free_ports({"TAILRACE_HTTP_PORT": taken, "TAILRACE_LEDGER_PORT": free_port()}, "127.0.0.1")

    assert f"TAILRACE_HTTP_PORT={taken}" in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value)
    assert "TAILRACE_LEDGER_PORT" not in str(refused.value)


def test_two_variables_with_one_port_are_refused() -> None:
    """A clash of our own is said as such."""
    port = free_port()
    with pytest.raises(NotPossible, match="TAILRACE_HTTP_PORT and TAILRACE_GATEWAY_PORT are the same port"):
        require_free_ports({"TAILRACE_HTTP_PORT": port, "TAILRACE_GATEWAY_PORT": port}, "127.0.0.1")


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
