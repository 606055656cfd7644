"""Folders and a collection in step: what changed goes in, what was deleted goes, and neither an absence nor a restart loses any of it."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tailrace
from services.chassis import errors
from services.local.watching import AGAIN_S, PAUSE_S_MAX, Ended, Files, Seen, Watch


@dataclass
class Service:
    """A collection that may be away, or break off after some documents."""

    away: tailrace.TailraceError | None = None
    ends_after: int | None = None
    documents: dict[str, str] = field(default_factory=dict)
    sent: list[set[str]] = field(default_factory=list)
    forgotten: list[dict[str, str]] = field(default_factory=list)
    failing: dict[str, str] = field(default_factory=dict)
    """Why a document fails, by its name."""

    async def send(self, files: Files) -> AsyncIterator[Ended]:
        self._ask()
        self.sent.append(set(files))
        for place, (name, path) in enumerate(files.items()):
            if place == self.ends_after:
                raise tailrace.Interrupted("cut")
            if reason := self.failing.get(name):
                yield Ended(name, "", reason)
                continue
            self.documents[name] = path.read_text()
            yield Ended(name, f"id of {name}")

    async def forget(self, documents: Mapping[str, str]) -> None:
        self._ask()
        self.forgotten.append(dict(documents))
        for name in documents:
            self.documents.pop(name, None)

    def _ask(self) -> None:
        if self.away:
            raise self.away


@dataclass
class World:
    """A folder, a service, and what outlives a watch."""

    folder: Path
    notes: Path
    service: Service = field(default_factory=Service)
    said: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    now_s: float = 1000.0

    def watch(self) -> Watch:
        async def pause(seconds: float) -> None:
            self.pauses.append(seconds)

        def look() -> Files:
            return {path.name: path for path in sorted(self.folder.iterdir())}

        return Watch(look, self.service.send, self.service.forget, self.said.append, Seen(self.notes), pause, lambda: self.now_s)

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.folder / name).write_text(text)


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "folder").mkdir()
    return World(tmp_path / "folder", tmp_path / "notes.json")


async def test_changed_files_are_sent_and_deleted_ones_deleted(world: World) -> None:
    """Once each; what others have put there stays."""
    world.service.documents["foreign"] = "theirs"
    watch = world.watch()
    world.write(a="a", b="b")
    await watch.step()
    await watch.step()
    world.write(a="changed")
    (world.folder / "b").unlink()
    await watch.step()

    assert world.service.sent == [{"a", "b"}, {"a"}]
    assert world.service.documents == {"foreign": "theirs", "a": "changed"}
    assert world.service.forgotten == [{"b": "id of b"}]


async def test_what_happens_while_the_service_is_away_is_done_when_it_is_back(world: World) -> None:
    """It is said once, and nothing is forgotten."""
    watch = world.watch()
    world.write(a="a")
    await watch.step()
    world.service.away = tailrace.Unavailable("away")
    (world.folder / "a").unlink()
    world.write(b="b")
    await watch.step()
    await watch.step()
    world.service.away = None
    await watch.step()

    assert (world.service.documents, world.said) == ({"b": "b"}, ["away; trying again"])


@pytest.mark.parametrize("kind", [cls for cls in tailrace.TailraceError.__subclasses__() if cls.retryable])
async def test_every_refusal_that_passes_by_itself_is_outlived_for_as_long_as_it_says(
    world: World, kind: type[tailrace.TailraceError]
) -> None:
    """The wait it names is kept, and none is longer than the bound."""
    watch = world.watch()
    world.write(a="a")
    for waits_ms in ("2500", str(10**9)):
        world.service.away = kind("not now", metadata={"retry_after_ms": waits_ms})
        await watch.step()
    world.service.away = None
    await watch.step()

    assert world.pauses == [2.5, PAUSE_S_MAX]
    assert world.service.documents == {"a": "a"}


LASTING = {"DOCUMENT_REJECTED", "PAYLOAD_TOO_LARGE", "REQUEST_INVALID", "MODEL_UNKNOWN", "NOT_ALLOWED"}
REASONS = {cls.reason for cls in errors.DomainError.__subclasses__() if cls.reason}


@pytest.mark.parametrize("reason", sorted(REASONS - LASTING))
async def test_a_file_that_failed_for_what_passes_is_sent_again_ever_more_seldom(world: World, reason: str) -> None:
    """Alone, until it is taken in; the wait doubles up to its bound, however often it fails."""
    watch = world.watch()
    world.write(good="good", bad="bad")
    world.service.failing = {"bad": reason}
    await watch.step()
    waits = []
    for _ in range(12):
        before, sent = world.now_s, len(world.service.sent)
        while len(world.service.sent) == sent:
            world.now_s += AGAIN_S / 4
            await watch.step()
        waits.append(world.now_s - before)
    world.service.failing = {}
    world.now_s += PAUSE_S_MAX
    await watch.step()
    world.now_s += PAUSE_S_MAX
    await watch.step()

    assert waits == [min(AGAIN_S * 2**number, PAUSE_S_MAX) for number in range(12)]
    assert world.service.sent == [{"good", "bad"}, *[{"bad"}] * 13]
    assert world.service.documents == {"good": "good", "bad": "bad"}


@pytest.mark.parametrize("reason", sorted(LASTING))
async def test_a_file_that_failed_for_what_it_is_stays_until_it_changes(world: World, reason: str) -> None:
    """Sending the same again would fail again."""
    watch = world.watch()
    world.write(bad="bad")
    world.service.failing = {"bad": reason}
    await watch.step()
    world.now_s += 10 * PAUSE_S_MAX
    await watch.step()
    world.service.failing = {}
    world.write(bad="changed")
    await watch.step()

    assert (world.service.sent, world.service.documents) == ([{"bad"}, {"bad"}], {"bad": "changed"})


async def test_a_file_that_waits_is_sent_at_once_when_it_changes_and_forgotten_when_it_goes(world: World) -> None:
    """And what is written next under its name begins afresh."""
    watch = world.watch()
    world.write(a="a", b="b")
    world.service.failing = {"a": "UNAVAILABLE", "b": "UNAVAILABLE"}
    await watch.step()
    world.write(a="changed")
    (world.folder / "b").unlink()
    await watch.step()
    world.now_s += AGAIN_S
    await watch.step()

    assert world.service.sent == [{"a", "b"}, {"a"}, {"a"}]


async def test_a_refusal_that_does_not_pass_ends_the_watch(world: World) -> None:
    """A wrong token is not tried for ever."""
    world.service.away = tailrace.NotAuthenticated("who?")
    world.write(a="a")

    with pytest.raises(tailrace.NotAuthenticated):
        await world.watch().step()


async def test_a_stream_that_breaks_off_is_gone_on_with_and_not_begun_again(world: World) -> None:
    """What came to its end before is not sent twice."""
    watch = world.watch()
    world.write(a="a", b="b", c="c")
    world.service.ends_after = 2
    await watch.step()
    world.service.ends_after = None
    await watch.step()

    assert world.service.sent == [{"a", "b", "c"}, {"c"}]


async def test_what_is_deleted_while_no_watch_runs_is_deleted_by_the_next(world: World) -> None:
    """By the id it was known by; what others have put there stays."""
    world.service.documents["foreign"] = "theirs"
    world.write(a="a", b="b")
    await world.watch().step()
    (world.folder / "b").unlink()
    await world.watch().step()
    await world.watch().step()

    assert world.service.documents == {"foreign": "theirs", "a": "a"}
    assert world.service.forgotten == [{"b": "id of b"}]


async def test_a_file_whose_sending_was_cut_off_is_known_to_the_next_watch(world: World) -> None:
    """It may have become a document: the watch died before it heard of it."""

    class Killed(BaseException):
        pass

    async def killed(files: Files) -> AsyncIterator[Ended]:
        raise Killed
        yield Ended("", "")

    world.write(a="a", b="b")
    watch = world.watch()
    watch.send = killed
    with pytest.raises(Killed):
        await watch.step()
    (world.folder / "b").unlink()
    await world.watch().step()

    assert world.service.forgotten == [{"b": ""}]


async def test_a_folder_that_is_not_there_any_more_deletes_nothing(world: World) -> None:
    """An empty folder at the start is a disk that is not mounted; it is said once, and ends as soon as there is a file."""
    world.write(a="a", b="b")
    await world.watch().step()
    for path in world.folder.iterdir():
        path.unlink()
    watch = world.watch()
    await watch.step()
    await watch.step()
    kept = dict(world.service.documents)
    world.write(a="a")
    await watch.step()

    assert kept == {"a": "a", "b": "b"}
    assert world.said == ["no file is left of 2 documents: they are kept until there is one again"]
    assert world.service.documents == {"a": "a"}


async def test_the_last_file_of_a_folder_is_deleted_while_it_is_watched(world: World) -> None:
    """Then it was seen to go."""
    watch = world.watch()
    world.write(a="a")
    await watch.step()
    (world.folder / "a").unlink()
    await watch.step()

    assert world.service.documents == {}


async def test_a_document_that_failed_once_keeps_the_id_it_had(world: World) -> None:
    """A version that could not be read does not make the one before it unknown."""
    seen = Seen(world.notes)
    seen.add("a", "id of a")
    seen.add("a")
    seen.keep()

    assert Seen(world.notes).without(()) == {"a": "id of a"}


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1, "b": "id"', "\x00"])
def test_notes_that_are_none_of_ours_are_as_good_as_none(world: World, text: str) -> None:
    """They never stop a watch."""
    world.notes.write_text(text)

    assert Seen(world.notes).without(()) == {}


def test_notes_are_for_one_server_collection_and_folder_and_for_their_owner_alone(tmp_path: Path) -> None:
    """What was seen for one collection is never deleted from another."""
    one = Seen.of(tmp_path / "watches", "here", "default", "/docs")
    one.add("a", "id")
    one.keep()
    (file,) = (tmp_path / "watches").iterdir()

    assert Seen.of(tmp_path / "watches", "here", "default", "/docs").without(()) == {"a": "id"}
    for what in (("there", "default", "/docs"), ("here", "notes", "/docs"), ("here", "default", "/other")):
        assert Seen.of(tmp_path / "watches", *what).without(()) == {}
    assert (file.stat().st_mode & 0o777, json.loads(file.read_text())) == (0o600, {"a": "id"})
