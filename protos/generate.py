"""Generates sdk/tailrace from the contract with protoc and mypy-protobuf; rewrites nothing.

`python protos/generate.py` regenerates in place; `--check` compares with what is committed and exits 1 if it is stale.
"""

import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
SDK = PROTOS.parent / "sdk"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Run protoc over every contract file into `out`, whose layout mirrors `protos/`."""
    from grpc_tools import protoc

    well_known = str(resources.files("grpc_tools") / "_proto")
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    # protoc finds its plugins on PATH; the ones that belong to this interpreter come first.
    plugins = [f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    arguments = [
        "protoc",
        f"-I{PROTOS}",
        f"-I{well_known}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *plugins,
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    for package in {path.parent for path in out.rglob("*_pb2.py")}:
        (package / "__init__.py").touch()
        (package.parent / "__init__.py").touch()


def files(root: Path) -> set[Path]:
    return {path.relative_to(root) for pattern in GENERATED for path in (root / "tailrace").rglob(pattern)}


def stale(fresh: Path) -> list[str]:
    """Name every generated file that differs from the commit, is missing there, or has no source any more."""
    differing = [path for path in files(fresh) & files(SDK) if not filecmp.cmp(fresh / path, SDK / path, shallow=False)]
    return sorted(str(path) for path in [*differing, *(files(fresh) ^ files(SDK))])


def main() -> None:
    if "--check" not in sys.argv:
        for path in files(SDK):
            (SDK / path).unlink()
        generate(SDK)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wrong = stale(Path(folder))
    if wrong:
        raise SystemExit("stale generated code, run `make proto`:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main()
