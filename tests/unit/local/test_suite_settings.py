"""What the launcher tells the services, and when it refuses."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.local import sample
from services.local.banner import banner
from services.local.config import LocalSettings
from services.local.preflight import NotPossible
from services.local.suite import Suite
from services.local.supervisor import Supervisor

KEYS = {"TAILRACE_JWT_ISSUER": "https://login.example.com/", "TAILRACE_JWKS_URL": "https://login.example.com/jwks.json"}


def suite(folder: Path, **environ: str) -> Suite:
    told = {"TAILRACE_STATE_DIR": str(folder), **environ}
    return Suite(LocalSettings.of(told), told, folder / "children.json")


def test_production_refuses_the_development_issuer(tmp_path: Path) -> None:
    """Without keys of another issuer there is no start, and no development key is made."""
    with pytest.raises(NotPossible, match="refuses the development issuer"):
        suite(tmp_path, TAILRACE_ENV="production")

    assert not (tmp_path / "dev-key.pem").exists()


def test_production_with_an_issuer_makes_no_tokens(tmp_path: Path) -> None:
    """Tokens come from the named issuer alone."""
    assert suite(tmp_path, TAILRACE_ENV="production", **KEYS).issuer is None
    assert not (tmp_path / "dev-token").exists()


def test_every_service_finds_the_others_where_the_ports_were_moved(tmp_path: Path) -> None:
    """Targets follow the port variables; what the user set stays."""
    told = suite(tmp_path, TAILRACE_LEDGER_PORT="6053", TAILRACE_RETRIEVAL_TARGET="dns:///r:1", DATABASE_URL="postgresql://db")._environ()

    assert told["TAILRACE_LEDGER_TARGET"] == "127.0.0.1:6053"
    assert told["TAILRACE_RETRIEVAL_TARGET"] == "dns:///r:1"
    assert told["DATABASE_URL"] == "postgresql://db"
    assert told["TAILRACE_STATE_DIR"] == str(tmp_path)


def test_servers_that_run_elsewhere_are_not_started(tmp_path: Path) -> None:
    """DATABASE_URL and REDIS_URL replace our own stores."""
    order = suite(tmp_path, DATABASE_URL="postgresql://db", REDIS_URL="redis://cache").supervisor._needs

    assert [child.name for child in order] == ["retrieval", "ledger", "orchestrator", "gateway"]


class Embedder:
    """Ingests what it is told when it may."""

    def __init__(self) -> None:
        self.may, self.done = asyncio.Event(), list[str]()

    async def ingest(self, url: str, token: str, paths: Sequence[Path]) -> None:
        await self.may.wait()
        self.done += [path.name for path in paths]


async def test_a_machine_that_is_slow_is_given_its_address_and_then_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes longer than the address waits for goes on behind it, to the end."""
    embedder = Embedder()
    monkeypatch.setattr(sample, "ingest", embedder.ingest)
    monkeypatch.setattr("services.local.suite.SAMPLE_WAIT_S", 0.01)
    slow = suite(tmp_path, DATABASE_URL="postgresql://db", REDIS_URL="redis://cache")
    slow.supervisor = Supervisor({}, tmp_path / "children.json", print)
    async with asyncio.TaskGroup() as group:
        up = group.create_task(slow._bring_up(0.0))
        said = ""
        while "Ctrl-C" not in (said := said + capsys.readouterr().out):  # noqa: ASYNC110 - what is waited for is printed
            await asyncio.sleep(0.001)
        assert not embedder.done
        assert "README.md and answers.md can be asked about soon" in said
        embedder.may.set()
        await up
    await slow.supervisor.stop()
    names = [path.name for part in sample.documents() for path in part]

    assert embedder.done == names
    assert f"all {len(names)} documents of the project can be asked about" in capsys.readouterr().out
    assert (tmp_path / "sample-ingested").read_text().split() == names


def test_the_internal_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    """Two starts, one key; nobody else can read it."""
    keys = {LocalSettings.of({"TAILRACE_STATE_DIR": str(tmp_path)}).internal_key.get_secret_value() for _ in range(2)}

    assert len(keys) == 1
    assert (tmp_path / "internal-key").stat().st_mode & 0o777 == 0o600


def test_the_banner_holds_three_calls_that_name_where_things_are(tmp_path: Path) -> None:
    """Address with the token, and calls by HTTP, Python and a third door, each on one line."""
    told = suite(tmp_path, TAILRACE_HTTP_PORT="6080", TAILRACE_GATEWAY_PORT="6050")
    text = banner(told.settings, signed_in=True, seconds=3.21, note="")
    token = (tmp_path / "dev-token").read_text()
    calls = [line for line in text.splitlines() if "client disconnects" in line]

    assert f"http://127.0.0.1:6080/#token={token}" in text
    assert len(calls) == 3
    assert calls[0].startswith("curl -N http://127.0.0.1:6080/v1/answers ")
    assert "TAILRACE_TARGET=127.0.0.1:6050" in calls[1]
    assert "6050" in calls[2]
    assert os.linesep not in token
