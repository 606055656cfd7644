"""Folders kept in step with a collection: what changed is ingested again, what was deleted is deleted there. How it is shown is not here.

Only documents that a watch has seen as files are ever deleted: what others put into the collection stays.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import tailrace

SETTLE_MS = 300
"""A file that is being written changes again within this time."""
LOOK_AGAIN_MS = 5_000
"""How soon what could not be done, because the service was away, is tried again."""
PAUSE_S_MAX = 600.0
"""The longest that a refusal or a failure is waited out before it is asked again."""
AGAIN_S = 10.0
"""How soon a file that failed for what may pass is sent again; each time that it fails twice as late."""
LASTING = frozenset((*tailrace.RequestInvalid.reasons, *tailrace.NotAllowed.reasons))
"""Failures that the same file would meet again. Others pass, with time, with money, or when somebody has seen to it."""
FILES_MAX = 100_000
"""Files of one watch. What is kept of them fits into some megabytes."""

Files = dict[str, Path]
Signature = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ended:
    """A document that came to its end, good or bad."""

    name: str
    document_id: str
    failed_for: str = ""
    """Reason of its failure; empty = it is there."""


@dataclass(slots=True)
class _Again:
    """A file that is to be sent again as it is."""

    due_s: float
    wait_s: float


class Seen:
    """The documents that were files here, by name, with their ids; empty = sent, and the id not heard of yet.

    Kept in a file, so that what is deleted while no watch runs is known to the next one. Ids name their collection and tenant: what is
    deleted by its id is never another collection's.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError; a file that is none of ours is as good as none."""
        self._path = path
        self._ids: dict[str, str] = {}
        try:
            kept = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return
        if isinstance(kept, dict):
            self._ids = {name: document_id for name, document_id in kept.items() if isinstance(document_id, str)}

    @classmethod
    def of(cls, folder: Path, *what: str) -> "Seen":
        """The file in `folder` for this server, collection and these folders. Raises OSError."""
        folder.mkdir(mode=0o700, exist_ok=True)
        return cls(folder / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.json")

    def without(self, names: Iterable[str]) -> dict[str, str]:
        """All but these."""
        present = set(names)
        return {name: document_id for name, document_id in self._ids.items() if name not in present}

    def add(self, name: str, document_id: str = "") -> None:
        """Remember a file; an id that is known already stays if none is given."""
        self._ids[name] = document_id or self._ids.get(name, "")

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._ids.pop(name, None)

    def keep(self) -> None:
        """Write all of it, or nothing. Raises OSError."""
        draft = self._path.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(self._ids, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


@dataclass
class Watch:
    """What is in the folders, against what the collection was told of them."""

    look: Callable[[], Files]
    """The documents that are there now, by the name they are known by."""
    send: Callable[[Files], AsyncIterator[Ended]]
    """Ingest; yield each that came to an end. The others are sent again."""
    forget: Callable[[Mapping[str, str]], Awaitable[None]]
    """Delete the documents of these names and ids."""
    say: Callable[[str], None]
    seen: Seen
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    now_s: Callable[[], float] = time.monotonic
    told: dict[str, Signature] = field(default_factory=dict)
    """As what each file was last sent by this watch. A new one sends all of them: the service knows best what it has."""
    again: dict[str, _Again] = field(default_factory=dict)
    """Files that failed for what may pass."""
    trouble: str = ""
    """What was said last of what could not be done; said again only after it had passed."""

    async def follow(self, changes: AsyncIterator[object]) -> None:
        """Bring the collection into step, now and after every change, until `changes` end."""
        await self.step()
        async for _ in changes:
            await self.step()

    async def step(self) -> None:
        """Send what is new or changed and delete what is gone. What the service cannot do now stays to be done.

        Raises TailraceError for what will not pass by itself.
        """
        files = self.look()
        present = {name: signature for name, path in files.items() if (signature := _signature(path)) is not None}
        changed = {name: files[name] for name, signature in present.items() if self.told.get(name) != signature or self._is_due(name)}
        try:
            if changed:
                await self._tell(changed, present)
            if gone := self.seen.without(present):
                if not present and not self.told:
                    # Rather a disk that is not mounted than a folder that somebody emptied.
                    self._say(f"no file is left of {len(gone)} documents: they are kept until there is one again")
                    return
                await self.forget(gone)
                self.seen.remove(gone)
                self.seen.keep()
                for name in gone:
                    self.told.pop(name, None)
                    self.again.pop(name, None)
            self.trouble = ""
        except tailrace.TailraceError as error:
            if not error.retryable:
                raise
            self._say(f"{error}; trying again")
            await self.pause(min(error.retry_after_s or 0, PAUSE_S_MAX))
        except OSError as error:
            self._say(f"{error}; looking again")

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.say(trouble)
        self.trouble = trouble

    async def _tell(self, changed: Files, present: Mapping[str, Signature]) -> None:
        """Send, and note what is sent before it is: whatever ends this process, no document is left that the next watch does not know."""
        for name in changed:
            self.seen.add(name)
        self.seen.keep()
        try:
            async with aclosing(self.send(changed)) as ended:  # type: ignore[type-var]
                async for one in ended:
                    self._plan(one, unchanged=self.told.get(one.name) == present[one.name])
                    self.told[one.name] = present[one.name]
                    self.seen.add(one.name, one.document_id)
        finally:
            self.seen.keep()

    def _plan(self, one: Ended, *, unchanged: bool) -> None:
        """Whether and when it is sent again if nothing changes."""
        before = self.again.pop(one.name, None)
        if one.failed_for and one.failed_for not in LASTING:
            wait_s = min(2 * before.wait_s, PAUSE_S_MAX) if before and unchanged else AGAIN_S
            self.again[one.name] = _Again(self.now_s() + wait_s, wait_s)

    def _is_due(self, name: str) -> bool:
        return name in self.again and self.again[name].due_s <= self.now_s()


async def changes_in(folders: Iterable[Path]) -> AsyncIterator[object]:
    """One item for each burst of changes below `folders`, and one now and then without any."""
    from watchfiles import awatch

    async for change in awatch(*folders, debounce=SETTLE_MS, rust_timeout=LOOK_AGAIN_MS, yield_on_timeout=True, raise_interrupt=False):
        yield change


async def deleted(client: tailrace.AsyncClient, documents: Mapping[str, str], collection: str) -> int:
    """Delete these documents of the collection; return how many there were."""
    ids = {document_id for document_id in documents.values() if document_id}
    if unheard_of := {name for name, document_id in documents.items() if not document_id}:
        async for document in client.list_documents(collection=collection):
            if document.source_uri in unheard_of and document.collection == collection:
                ids.add(document.document_id)
    count = 0
    for document_id in sorted(ids):
        try:
            await client.delete_document(document_id)
        except tailrace.NotFound:
            continue  # somebody else was quicker
        count += 1
    return count


def _signature(path: Path) -> Signature | None:
    """What changes when a file does; None if it is gone already."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
