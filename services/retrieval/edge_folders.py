"""Where a space's shard lies, and how another one takes its place: the space's name is a link, which is moved in one step. Files alone.

The engine is never told the link: an open shard writes by the path it was opened with, and once the link leads elsewhere, that would be
into the other shard.
"""

import os
import shutil
import uuid
from pathlib import Path

_APART = "~"
"""Between a space's name and what tells its folders from each other. No space has it in its name."""
_UNFINISHED = "unfinished"
"""A file in a folder that no link has led to yet."""


def another(link: Path) -> Path:
    """A new folder beside the link that a shard can be made in."""
    folder = _name_of_another(link)
    folder.mkdir(parents=True)
    (folder / _UNFINISHED).touch()
    return folder


def switch(link: Path, to: Path) -> None:
    """Let the shard in `to` be the space's from now on, whenever this process dies or the power fails."""
    coming = _coming(link)
    coming.unlink(missing_ok=True)
    coming.symlink_to(to.name)
    (to / _UNFINISHED).unlink(missing_ok=True)
    coming.rename(link)
    _sync(link.parent)


def sync(folder: Path) -> None:
    """Have all that lies in `folder` written to the disk, before anything leads to it."""
    for within, _, names in os.walk(folder):
        for name in names:
            _sync(Path(within, name))
        _sync(Path(within))


def put_behind(link: Path) -> None:
    """Move a shard that bears the name itself, as older releases made them, behind a link. Nobody may have it open."""
    folder, coming = _name_of_another(link), _coming(link)
    coming.unlink(missing_ok=True)
    coming.symlink_to(folder.name)
    # Between these two the coming link says what is meant: see `settle`.
    link.rename(folder)
    coming.rename(link)
    _sync(link.parent)


def settle(link: Path) -> None:
    """Finish what a process died in, and find the shard of a link that is lost: not every backup keeps links.

    Raises OSError where it could be one of several.
    """
    if link.exists():
        return
    if _coming(link).exists():
        _coming(link).rename(link)
        return
    whole = [folder for folder in _folders(link) if not (folder / _UNFINISHED).exists()]
    if len(whole) > 1:
        names = ", ".join(sorted(folder.name for folder in whole))
        raise OSError(f"{link} is missing; link it to the one of these that is the latest: {names}")
    for folder in whole:
        switch(link, folder)


def clear(link: Path) -> None:
    """Remove what is no shard any more, or not yet. Only for who has the shard open: nobody else makes one then."""
    _coming(link).unlink(missing_ok=True)
    current = link.resolve()
    for other in _folders(link):
        if other.resolve() != current:
            shutil.rmtree(other, ignore_errors=True)


def _folders(link: Path) -> list[Path]:
    return [*link.parent.glob(f"{link.name}{_APART}*")]


def _name_of_another(link: Path) -> Path:
    return link.with_name(f"{link.name}{_APART}{uuid.uuid4().hex[:12]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _coming(link: Path) -> Path:
    return link.with_name(f".next-{link.name}")
