"""The import rules of pyproject.toml hold, and the client needs grpcio and protobuf alone."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READS = re.compile(r"os\.getenv|os\.environ(?!\.setdefault)")
"""Telling a library something through the environment is not reading it."""


def test_import_contracts_are_kept() -> None:
    """A violation prints its chain of imports."""
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr


def test_the_client_needs_grpcio_and_protobuf_alone() -> None:
    """Importing `tailrace` loads no third package, so that it can be taken along without the services."""
    # grpcio-tools' generated code does not belong to the client, but grpc imports it if it is there.
    code = "\n".join(
        [
            "import sys, grpc, google.protobuf",
            "before = {name.partition('.')[0] for name in sys.modules}",
            "import tailrace",
            "after = {name.partition('.')[0] for name in sys.modules}",
            "print(*sorted(after - before - set(sys.stdlib_module_names)))",
        ]
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert run.stdout.split() == ["tailrace"]


def test_no_service_reads_the_environment_by_itself() -> None:
    """Settings come in through `config`; only the launcher, which passes the environment on, and the chassis read it."""
    readers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "services").rglob("*.py")
        if path.parent.name not in {"chassis", "local"} and READS.search(path.read_text())
    ]

    assert readers == []


def test_no_package_hides_another() -> None:
    """A module named like a dependency or a module of the standard library would shadow it."""
    taken = {*sys.stdlib_module_names, "grpc", "redis", "anthropic", "jwt", "rich", "typer", "httpx", "numpy", "starlette"}
    modules = (path for path in (ROOT / "services").rglob("*.py") if path.stem in taken)

    assert [str(path.relative_to(ROOT)) for path in modules] == []
