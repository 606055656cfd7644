"""A program that locks itself in as a parser does and then tries to get out: `python -m tests.fakes.confined PARENT_PID FOLDER`.

FOLDER holds a file `secret`. Says what became of each attempt: `refused`, `done`, or the name of another error, which is no proof of
anything.
"""

import ctypes
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import services
from services.retrieval.parsers import landlock
from services.retrieval.parsers.confinement import confine

LIBC = ctypes.CDLL(None, use_errno=True)


def native(function: str, *arguments: Any) -> None:
    """A call that Python knows nothing of, as a library would make it. Raises OSError."""
    if (found := getattr(LIBC, function)(*arguments)) == -1:
        raise OSError(ctypes.get_errno(), function)
    if function == "fork" and found == 0:
        os._exit(0)


def thread() -> None:
    begun = threading.Thread(target=int)
    begun.start()
    begun.join()


TO_PYTHON: dict[str, Callable[[Path], object]] = {
    "open a socket": lambda _: socket.socket(),
    "resolve a name": lambda _: socket.getaddrinfo("localhost", 80),
    "read a file": lambda _: Path("/etc/passwd").read_text(),
    "read a file by descriptor": lambda _: os.open("/etc/passwd", os.O_RDONLY),
    "read its own environment": lambda _: Path("/proc/self/environ").read_bytes(),
    "read a file beside the modules by a detour": lambda _: Path(sys.prefix, "..", "..", "..", "..", "etc", "passwd").read_text(),
    "read a file beside our code": lambda _: Path(services.__file__).parents[1].joinpath("pyproject.toml").read_text(),
    "read a file of a folder with a longer name": lambda _: Path(f"{sys.prefix}-secrets").read_text(),
    "write a file": lambda folder: (folder / "a").write_text("a"),
    "write a module": lambda _: os.open(os.__file__, os.O_WRONLY),
    "run a program": lambda _: subprocess.run(["true"], check=False),
    "run a program by a shell": lambda _: os.system("true"),
    "become a program": lambda _: os.execv("/bin/true", ["true"]),
    "spawn a program": lambda _: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": lambda _: os.fork() or os._exit(0),
}
PAST_PYTHON: dict[str, Callable[[Path], object]] = {
    "natively open a socket": lambda _: native("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
    "natively fork": lambda _: native("fork"),
    "natively run a program": lambda _: native("execv", b"/bin/true", (ctypes.c_char_p * 2)(b"true", None)),
    "natively kill": lambda _: native("kill", os.getppid(), 0),
}
PAST_PYTHON_TO_FILES: dict[str, Callable[[Path], object]] = {
    "natively read a file": lambda folder: native("open", bytes(folder / "secret"), os.O_RDONLY),
    "natively read a file of the system": lambda _: native("open", b"/etc/passwd", os.O_RDONLY),
    "natively read a file beside our code": lambda _: native(
        "open", bytes(Path(services.__file__).parents[1] / "pyproject.toml"), os.O_RDONLY
    ),
    "natively read its own environment": lambda _: native("open", b"/proc/self/environ", os.O_RDONLY),
    "natively list a folder": lambda folder: native("open", bytes(folder), os.O_RDONLY | os.O_DIRECTORY),
    "natively write a file": lambda folder: native("open", bytes(folder / "secret"), os.O_WRONLY),
    "natively empty a file": lambda folder: native("truncate", bytes(folder / "secret"), 0),
    "natively make a file": lambda folder: native("open", bytes(folder / "a"), os.O_WRONLY | os.O_CREAT, 0o600),
    "natively write a module": lambda _: native("open", os.__file__.encode(), os.O_WRONLY),
    "natively make a folder": lambda folder: native("mkdir", bytes(folder / "b"), 0o700),
    "natively link to a file": lambda folder: native("symlink", b"/etc/passwd", bytes(folder / "c")),
    "natively delete a file": lambda folder: native("unlink", bytes(folder / "secret")),
}
"""What the kernel refuses where it has Landlock."""
ALLOWED: dict[str, Callable[[Path], object]] = {
    "import a module": lambda _: importlib.import_module("xmlrpc.client"),
    "import a library": lambda _: importlib.import_module("pypdfium2"),
    "start a thread": lambda _: thread(),
}


def refused_here() -> dict[str, Callable[[Path], object]]:
    """What this system can refuse."""
    return TO_PYTHON | (PAST_PYTHON if sys.platform == "linux" else {}) | (PAST_PYTHON_TO_FILES if landlock.version() else {})


def outcome(attempt: Callable[[Path], object], folder: Path) -> str:
    try:
        attempt(folder)
    except OSError as error:
        return "refused" if isinstance(error, PermissionError) else type(error).__name__
    return "done"


def main() -> None:
    confine(int(sys.argv[1]), 1024)
    attempts = {**refused_here(), **ALLOWED}
    print(json.dumps({name: outcome(attempt, Path(sys.argv[2])) for name, attempt in attempts.items()}))


if __name__ == "__main__":
    main()
