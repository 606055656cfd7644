"""`tailrace ingest --watch` itself, beside a whole suite: a folder and its collection in step, from the first file to Ctrl-C."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tailrace
from tests.suite import Suite, until

pytestmark = [pytest.mark.slow]

TAILRACE = Path(sys.executable).with_name("tailrace")
STOP_S = 20.0
INTERRUPTED = 130


def _interruptible() -> None:
    """What a shell starts in the background has Ctrl-C turned off, and so has all that it starts: these tests as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Desk:
    """One person's folder, and what the suite has of that person's tenant."""

    folder: Path
    state: Path
    target: str
    token: str

    @contextlib.asynccontextmanager
    async def watching(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """The command, until the block is left; then Ctrl-C, which it must obey in order."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("TAILRACE_")}
        environ = {**kept, "TAILRACE_TARGET": self.target, "TAILRACE_TOKEN": self.token, "TAILRACE_STATE_DIR": str(self.state)}
        command = [str(TAILRACE), "ingest", "--watch", "--json", str(self.folder), *arguments]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, stdout=pipe, stderr=pipe, start_new_session=True, preexec_fn=_interruptible
        )
        try:
            yield process
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(STOP_S):
                _, said = await process.communicate()
            assert (process.returncode, b"Traceback" in said) == (INTERRUPTED, False), said.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def client(self) -> tailrace.AsyncClient:
        return tailrace.AsyncClient(self.target, token=self.token)

    async def documents(self, client: tailrace.AsyncClient) -> dict[tuple[str, str], int]:
        """The version of every document, by collection and name."""
        return {(row.collection, row.source_uri): row.version async for row in client.list_documents()}

    async def put(self, collection: str, name: str, text: str) -> None:
        """A document that no watch has seen."""
        async with self.client() as client:
            async for progress in client.ingest(tailrace.Upload(name, text.encode()), collection=collection):
                assert progress.stage != "failed", progress

    async def until_there_are(self, documents: dict[tuple[str, str], int]) -> None:
        async with self.client() as client:

            async def same() -> bool:
                return await self.documents(client) == documents

            try:
                await until(same, 30)
            except TimeoutError:
                assert await self.documents(client) == documents


@pytest.fixture
def desk(suite: Suite, tmp_path: Path) -> Desk:
    folder = tmp_path / "docs"
    folder.mkdir()
    token = suite.token("ada", f"tenant-{secrets.token_hex(4)}")
    return Desk(folder, tmp_path / "state", f"127.0.0.1:{suite.ports['gateway']}", token)


async def test_a_collection_follows_its_folder_also_over_the_time_when_nobody_watched(desk: Desk) -> None:
    """Created, changed, deleted, deleted between two watches; code as well as prose, and nothing that others have put there."""
    await desk.put("", "docs/foreign.md", "Put there by somebody else.")
    theirs = {("default", "docs/foreign.md"): 1}
    (desk.folder / "a.md").write_text("The first of two notes.")
    (desk.folder / "b.md").write_text("The second of two notes.")
    async with desk.watching():
        await desk.until_there_are({**theirs, ("default", "docs/a.md"): 1, ("default", "docs/b.md"): 1})
        (desk.folder / "code.py").write_text("def answer():\n    return 42\n")
        (desk.folder / "a.md").write_text("The first of two notes, changed.")
        (desk.folder / "b.md").unlink()
        await desk.until_there_are({**theirs, ("default", "docs/a.md"): 2, ("default", "docs/code.py"): 1})
    (desk.folder / "a.md").unlink()
    async with desk.watching():
        await desk.until_there_are({**theirs, ("default", "docs/code.py"): 1})


async def test_a_deleted_file_takes_no_document_of_another_collection_with_it(desk: Desk) -> None:
    """Documents of the same name in two other collections stay, whether or not the watch names its own."""
    names = {("", "default"): (), ("own", "own"): ("--collection", "own")}
    await desk.put("others", "docs/a.md", "A document of another collection.")
    there = {("others", "docs/a.md"): 1}
    for (_, collection), arguments in names.items():
        (desk.folder / "a.md").write_text("A note that will be deleted.")
        (desk.folder / "stays.md").write_text("A note that will not be deleted.")
        stays = {(collection, "docs/stays.md"): 1}
        async with desk.watching(*arguments):
            await desk.until_there_are({**there, **stays, (collection, "docs/a.md"): 1})
            (desk.folder / "a.md").unlink()
            await desk.until_there_are({**there, **stays})
        there |= stays
