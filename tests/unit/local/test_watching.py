"""Folders and a collection in step: what changed goes in, what was deleted goes, and an absence loses neither."""

from dataclasses import dataclass, field
from pathlib import Path

import tailrace
from services.local.watching import Files, Watch


@dataclass
class Service:
    """A collection that may be away."""

    away: bool = False
    documents: dict[str, str] = field(default_factory=dict)
    sent: list[set[str]] = field(default_factory=list)

    async def send(self, files: Files) -> set[str]:
        self._ask()
        self.sent.append(set(files))
        self.documents.update({name: path.read_text() for name, path in files.items()})
        return set(files)

    async def forget(self, names: set[str]) -> None:
        self._ask()
        for name in names:
            del self.documents[name]

    def _ask(self) -> None:
        if self.away:
            raise tailrace.Unavailable("away")


def watching(folder: Path, service: Service, said: list[str]) -> Watch:
    return Watch(lambda: {path.name: path for path in sorted(folder.iterdir())}, service.send, service.forget, said.append)


async def test_changed_files_are_sent_and_deleted_ones_deleted(tmp_path: Path) -> None:
    """Once each; what others have put there stays."""
    service = Service(documents={"foreign.md": "theirs"})
    watch = watching(tmp_path, service, [])
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "b.md").write_text("b")
    await watch.step()
    await watch.step()
    (tmp_path / "a.md").write_text("changed")
    (tmp_path / "b.md").unlink()
    await watch.step()

    assert service.sent == [{"a.md", "b.md"}, {"a.md"}]
    assert service.documents == {"foreign.md": "theirs", "a.md": "changed"}


async def test_what_happens_while_the_service_is_away_is_done_when_it_is_back(tmp_path: Path) -> None:
    """It is said, and nothing is forgotten."""
    service, said = Service(), []
    watch = watching(tmp_path, service, said)
    (tmp_path / "a.md").write_text("a")
    await watch.step()
    service.away = True
    (tmp_path / "a.md").unlink()
    (tmp_path / "b.md").write_text("b")
    await watch.step()
    service.away = False
    await watch.step()

    assert (service.documents, len(said)) == ({"b.md": "b"}, 1)
