"""The project's own documentation as a first collection, so that the first question has an answer. It goes in through the gateway."""

from collections.abc import Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0
FIRST = ("README.md", "answers.md")
"""What the first questions are about. They can be asked while the others are still being embedded."""


def documents() -> tuple[list[Path], list[Path]]:
    """README.md and docs/*.md, those of `FIRST` and the others; nothing where Tailrace is installed without its sources."""
    paths = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
    return [path for path in paths if path.name in FIRST], [path for path in paths if path.name not in FIRST]


async def ingest(url: str, token: str, paths: Sequence[Path]) -> None:
    """Upload `paths` and wait until they can be found. Raises httpx.HTTPError, or ValueError if a document was refused."""
    files = [("files", (path.name, path.read_bytes(), "text/markdown")) for path in paths]
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, headers={"authorization": f"Bearer {token}"}) as client:
        async with client.stream("POST", "/v1/documents", files=files) as response:
            response.raise_for_status()
            refused = [line async for line in response.aiter_lines() if line.startswith("data:") and '"failed"' in line]
    if refused:
        raise ValueError(f"{len(refused)} of {len(paths)} sample documents were refused")
