"""`tailrace up` itself: the real command, its stores and services, from a cold start to Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from services.local.config import PORT_VARIABLES
from services.local.stores import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[3]
TAILRACE = Path(sys.executable).with_name("tailrace")
READY_S = 90.0
RESTART_S = 60.0


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for another process."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)


@dataclass
class Running:
    """A launcher and what it said."""

    process: subprocess.Popen[bytes]
    environ: dict[str, str]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def state(self) -> Path:
        return Path(self.environ["TAILRACE_STATE_DIR"])

    def children(self) -> dict[str, psutil.Process]:
        noted = json.loads((self.state / "children.json").read_text())
        return {name: psutil.Process(pid) for name, (pid, _) in noted.items()}

    def ask(self) -> httpx.Response:
        url = f"http://127.0.0.1:{self.environ['TAILRACE_HTTP_PORT']}/v1/answers"
        headers = {"authorization": f"Bearer {(self.state / 'dev-token').read_text()}"}
        body = {"question": "How is a hold settled?", "stream": False, "cache": "off"}
        return httpx.post(url, headers=headers, json=body, timeout=30)

    def works(self) -> bool:
        try:
            return self.ask().status_code == 200
        except httpx.HTTPError:
            return False


def start(environ: dict[str, str], output: Path) -> Running:
    with output.open("wb") as sink:
        process = subprocess.Popen([str(TAILRACE), "up"], cwd=ROOT, env=environ, stdout=sink, stderr=subprocess.STDOUT)
    running = Running(process, environ, output)
    until(lambda: "Ctrl-C stops" in running.said or process.poll() is not None, READY_S, "readiness")
    assert process.poll() is None, running.said
    return running


@pytest.fixture(scope="module")
def launcher() -> Iterator[Running]:
    """A suite from a cold start in a directory of its own, on ports of its own."""
    with tempfile.TemporaryDirectory(prefix="tailrace-launcher-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ports = {variable: str(free_port()) for variable in PORT_VARIABLES}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TAILRACE_", "ANTHROPIC_", "OTEL_"))}
        running = start({**kept, **ports, "TAILRACE_STATE_DIR": str(folder / "state")}, folder / "up.log")
        try:
            yield running
        finally:
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGINT)
                running.process.wait(30)


def test_the_three_calls_work_as_printed(launcher: Running) -> None:
    """Each, pasted into a shell, answers the sample question from the project's own documents."""
    calls = [line for line in launcher.said.splitlines() if "client disconnects" in line]
    shell = shutil.which("bash") or "/bin/sh"
    clean = {key: value for key, value in launcher.environ.items() if not key.startswith("TAILRACE_")}
    outputs = [subprocess.run([shell, "-c", call], cwd=ROOT, env=clean, capture_output=True, text=True, check=False) for call in calls]

    assert [run.returncode for run in outputs] == [0, 0, 0], outputs
    assert len([run for run in outputs if "disconnect is not a cancel" in run.stdout]) == 3


def test_the_first_documents_can_be_asked_at_once_and_the_others_follow(launcher: Running) -> None:
    """The address does not wait for all of the sample; once the launcher says so, all of it is there."""
    until(lambda: "documents of the project can be asked about" in launcher.said, READY_S, "the whole sample")
    headers = {"authorization": f"Bearer {(launcher.state / 'dev-token').read_text()}"}
    url = f"http://127.0.0.1:{launcher.environ['TAILRACE_HTTP_PORT']}/v1/documents"
    listed = httpx.get(url, headers=headers, params={"page_size": 100}, timeout=10).json()
    there = {document["source_uri"] for document in listed["documents"]}

    assert there == {"README.md", *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert "README.md and answers.md can be asked about" in launcher.said
    assert there == set((launcher.state / "sample-ingested").read_text().split())


def test_a_second_launcher_on_the_same_directory_is_told_about_the_first(launcher: Running) -> None:
    """Exit code not zero, the process and the address, and nothing is disturbed."""
    second = subprocess.run([str(TAILRACE), "up"], cwd=ROOT, env=launcher.environ, capture_output=True, text=True, check=False)

    assert second.returncode != 0
    assert f"process {launcher.process.pid}, http://127.0.0.1:{launcher.environ['TAILRACE_HTTP_PORT']}" in second.stderr
    assert launcher.works()


def test_busy_ports_are_named_before_anything_is_started(launcher: Running, tmp_path: Path) -> None:
    """Another directory, the same ports: every variable is named, nothing was made."""
    environ = {**launcher.environ, "TAILRACE_STATE_DIR": str(tmp_path / "other")}
    second = subprocess.run([str(TAILRACE), "up"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)

    assert second.returncode != 0
    assert [variable for variable in PORT_VARIABLES if f"{variable}={environ[variable]} is taken" not in second.stderr] == []
    assert not (tmp_path / "other" / "postgres").exists()


@pytest.mark.parametrize("name", ["gateway", "orchestrator", "retrieval", "ledger", "postgres", "valkey"])
def test_what_is_killed_is_started_again_and_the_next_request_works(launcher: Running, name: str) -> None:
    """kill -9 of any process: the launcher says so, and the suite answers again by itself."""
    victim = launcher.children()[name]
    victim.kill()
    until(lambda: f"{name} was ended by SIGKILL; starting it again" in launcher.said, RESTART_S, "the notice")
    until(lambda: f"{name} is ready again" in launcher.said, RESTART_S, "the restart")
    until(launcher.works, RESTART_S, "the next answer")

    assert launcher.children()[name].pid != victim.pid


def test_secrets_are_for_their_owner_alone(launcher: Running) -> None:
    """No key, token or password in the state directory can be read by others."""
    names = ("dev-key.pem", "dev-token", "admin-token", "internal-key", "database-url", "redis-url", "postgres/password", "valkey/password")
    modes = {name: (launcher.state / name).stat().st_mode & 0o777 for name in names}

    assert modes == dict.fromkeys(names, 0o600)


def test_a_killed_launcher_leaves_no_process_and_the_next_one_finds_everything(launcher: Running) -> None:
    """kill -9 of the launcher, start, Ctrl-C: documents are still there, and at the end no process is."""
    before = list(launcher.children().values())
    launcher.process.kill()
    launcher.process.wait()
    _, alive = psutil.wait_procs(before, timeout=30)
    assert alive == []
    launcher.process = start(launcher.environ, launcher.output).process
    again = list(launcher.children().values())
    answer = launcher.ask().json()
    launcher.process.send_signal(signal.SIGINT)
    code = launcher.process.wait(40)
    _, left = psutil.wait_procs(again, timeout=1)

    assert re.search(r"\[1\]", answer["text"])
    assert "sample" not in launcher.said, "the documents are ingested once"
    assert (code, left) == (0, [])
    assert launcher.said.rstrip().endswith("stopped")
