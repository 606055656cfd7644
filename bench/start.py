"""How long `make run` takes until it prints its address, in an empty state directory and again in a used one."""

import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.provider import ROOT
from services.local.config import PORT_VARIABLES
from services.local.stores import free_port

READY_TIMEOUT_S = 120.0
READY = b"Tailrace is ready"
"""The line with the address, which comes when the first question has an answer."""


class NotReady(Exception):
    """The launcher ended or took too long; the text is what it said."""


async def cold_starts() -> dict[str, float]:
    """Seconds to ready: `first_s` with nothing there yet, `again_s` with what the first left behind."""
    with tempfile.TemporaryDirectory(prefix="tailrace-start-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # PostgreSQL does not run as root, and must reach its cluster
        return {name: round(await _start_once(Path(folder) / "state"), 2) for name in ("first_s", "again_s")}


async def _start_once(state: Path) -> float:
    ports = {variable: str(free_port()) for variable in PORT_VARIABLES}
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "TAILRACE_STATE_DIR": str(state), **ports}
    began = time.perf_counter()
    launcher = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from services.local.command import main; main()",
        "up",
        cwd=ROOT,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    said: list[bytes] = []
    try:
        assert launcher.stdout is not None
        async with asyncio.timeout(READY_TIMEOUT_S):
            async for line in launcher.stdout:
                said.append(line)
                if READY in line:
                    return time.perf_counter() - began
        raise NotReady(b"".join(said).decode(errors="replace"))
    finally:
        if launcher.returncode is None:
            launcher.send_signal(signal.SIGINT)
        await launcher.communicate()
