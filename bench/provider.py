"""Starts the provider simulator as a process of its own and speaks to its controls. What it can be told lives in `bench.script`."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench.script import Behaviour, Record, Rule

ROOT = Path(__file__).resolve().parents[1]


class Simulator:
    """A running simulator."""

    def __init__(self, port: int, pid: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.pid = pid
        self._http = httpx.AsyncClient(base_url=self.url, timeout=10, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def behave(self, behaviour: Behaviour, *, contains: str = "") -> None:
        """Answer requests that contain this text, or all that no rule names, with `behaviour` from now on."""
        if contains:
            response = await self._http.post("/control/rules", content=msgspec.json.encode(Rule(contains=contains, behaviour=behaviour)))
        else:
            response = await self._http.put("/control/default", content=msgspec.json.encode(behaviour))
        response.raise_for_status()

    async def reset(self) -> None:
        """Forget rules, default and records."""
        (await self._http.delete("/control")).raise_for_status()

    async def release(self) -> None:
        """Let answers begin that wait for it, and those to come, until the next reset."""
        (await self._http.post("/control/release")).raise_for_status()

    async def totals(self) -> dict[str, int]:
        """Requests, tokens, and requests by state."""
        return dict((await self._http.get("/control/report")).raise_for_status().json()["totals"])

    async def records(self) -> list[Record]:
        """What happened to every request since the last reset, oldest first."""
        return msgspec.convert((await self._http.get("/control/report")).raise_for_status().json()["requests"], list[Record])

    async def prompts(self) -> list[dict[str, Any]]:
        """Bodies of the latest requests, oldest first."""
        return list((await self._http.get("/control/prompts")).raise_for_status().json())


@contextlib.asynccontextmanager
async def simulator() -> AsyncIterator[Simulator]:
    """Run a simulator until the block is left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.simulator", cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        running = Simulator(int(await process.stdout.readline()), process.pid)
        try:
            yield running
        finally:
            await running.aclose()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
