"""Where a shard lies, and how a rebuilt one takes its place: by a link that is moved in one step. Files alone; no engine.

The first shard of a space is a folder of its name. Once it has been rebuilt, the name is a link to the folder that holds it now.
"""

import shutil
import uuid
from pathlib import Path

_APART = "~"
"""Between a space's name and what tells its folders from each other. No space has it in its name."""


def another(folder: Path) -> Path:
    """The name of a folder beside `folder` that a rebuilt shard is made in."""
    return folder.with_name(f"{folder.name}{_APART}{uuid.uuid4().hex[:12]}")


def switch(folder: Path, to: Path) -> Path:
    """Let `folder` be what `to` is from now on, whenever this process dies; return where that lies which it was before."""
    before = folder.resolve()
    link = _next(folder)
    link.unlink(missing_ok=True)
    link.symlink_to(to.name)
    if not folder.is_symlink():
        # A folder cannot be replaced in one step. Between these two the link says which one counts: see `settle`.
        before = another(folder)
        folder.rename(before)
    link.rename(folder)
    return before


def settle(folder: Path) -> None:
    """Finish a switch that a process died in."""
    if not folder.exists() and _next(folder).is_symlink():
        _next(folder).rename(folder)


def clear(folder: Path) -> None:
    """Remove what belongs to no shard any more, or not yet. Only for who has the shard open: nobody else is rebuilding it then."""
    _next(folder).unlink(missing_ok=True)
    current = folder.resolve()
    for other in folder.parent.glob(f"{folder.name}{_APART}*"):
        if other != current:
            shutil.rmtree(other, ignore_errors=True)


def _next(folder: Path) -> Path:
    return folder.with_name(f".next-{folder.name}")
