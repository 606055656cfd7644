"""Where a space's shard lies, and how another one takes its place: the space's name is a link, which is moved in one step. Files alone.

The engine is never told the link: an open shard writes by the path it was opened with, and once the link leads elsewhere, that would be
into the other shard.
"""

import shutil
import uuid
from pathlib import Path

_APART = "~"
"""Between a space's name and what tells its folders from each other. No space has it in its name."""


def another(link: Path) -> Path:
    """The name of a folder beside the link that a shard can be made in."""
    return link.with_name(f"{link.name}{_APART}{uuid.uuid4().hex[:12]}")


def switch(link: Path, to: Path) -> None:
    """Let the shard in `to` be the space's from now on, whenever this process dies."""
    coming = _coming(link)
    coming.unlink(missing_ok=True)
    coming.symlink_to(to.name)
    coming.rename(link)


def put_behind(link: Path) -> None:
    """Move a shard that bears the name itself, as older releases made them, behind a link. Nobody may have it open."""
    folder, coming = another(link), _coming(link)
    coming.unlink(missing_ok=True)
    coming.symlink_to(folder.name)
    # Between these two the coming link says what is meant: see `settle`.
    link.rename(folder)
    coming.rename(link)


def settle(link: Path) -> None:
    """Finish what a process died in."""
    if not link.exists() and _coming(link).is_symlink():
        _coming(link).rename(link)


def clear(link: Path) -> None:
    """Remove what is no shard any more, or not yet. Only for who has the shard open: nobody else makes one then."""
    _coming(link).unlink(missing_ok=True)
    current = link.resolve()
    for other in link.parent.glob(f"{link.name}{_APART}*"):
        if other.resolve() != current:
            shutil.rmtree(other, ignore_errors=True)


def _coming(link: Path) -> Path:
    return link.with_name(f".next-{link.name}")
