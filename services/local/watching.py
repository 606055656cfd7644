"""Folders kept in step with a collection: what changed is ingested again, what was deleted is deleted there. How it is shown is not here.

Only documents that this watch has seen as files are ever deleted: what others put into the collection stays.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import tailrace

SETTLE_MS = 300
"""A file that is being written changes again within this time."""
LOOK_AGAIN_MS = 5_000
"""How soon what could not be done, because the service was away, is tried again."""

Files = dict[str, Path]
Signature = tuple[int, int]


@dataclass
class Watch:
    """What is in the folders, against what the collection was told of them."""

    look: Callable[[], Files]
    """The documents that are there now, by the name they are known by."""
    send: Callable[[Files], Awaitable[set[str]]]
    """Ingest; return the names of those that came to an end, good or bad. The others are sent again."""
    forget: Callable[[set[str]], Awaitable[None]]
    """Delete the documents of these names."""
    say: Callable[[str], None]
    told: dict[str, Signature] = field(default_factory=dict)

    async def follow(self, changes: AsyncIterator[object]) -> None:
        """Bring the collection into step, now and after every change, until `changes` end."""
        await self.step()
        async for _ in changes:
            await self.step()

    async def step(self) -> None:
        """Send what is new or changed and delete what is gone. While the service is away, what is left to do stays to be done."""
        files = self.look()
        present = {name: signature for name, path in files.items() if (signature := _signature(path)) is not None}
        changed = {name: files[name] for name, signature in present.items() if self.told.get(name) != signature}
        gone = self.told.keys() - present.keys()
        try:
            if changed:
                for name in await self.send(changed):
                    self.told[name] = present[name]
            if gone:
                await self.forget(gone)
                for name in gone:
                    del self.told[name]
        except (tailrace.Unavailable, tailrace.Interrupted) as error:
            self.say(f"{error}; trying again")
        except OSError as error:
            self.say(f"{error}; looking again")


async def changes_in(folders: Iterable[Path]) -> AsyncIterator[object]:
    """One item for each burst of changes below `folders`, and one now and then without any."""
    from watchfiles import awatch

    async for change in awatch(*folders, debounce=SETTLE_MS, rust_timeout=LOOK_AGAIN_MS, yield_on_timeout=True, raise_interrupt=False):
        yield change


async def deleted(client: tailrace.AsyncClient, names: set[str], collection: str) -> int:
    """Delete the collection's documents of these names; return how many there were."""
    ids = [document.document_id async for document in client.list_documents(collection=collection) if document.source_uri in names]
    for document_id in ids:
        try:
            await client.delete_document(document_id)
        except tailrace.NotFound:
            continue  # somebody else was quicker
    return len(ids)


def _signature(path: Path) -> Signature | None:
    """What changes when a file does; None if it is gone already."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
