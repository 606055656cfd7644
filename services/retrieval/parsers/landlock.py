"""Landlock, the kernel's own wall around files: whatever runs in a process that has drawn it opens nothing but what was named before.

It asks nobody's leave and cannot be undone. Names and sizes of other files can still be learnt, their contents not.

Source: https://docs.kernel.org/userspace-api/landlock.html
"""

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""The same on x86-64 and aarch64."""
_ASK_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_RIGHTS = (13, 14, 15, 15, 16)
"""How many kinds of access a version can refuse, from the first; later ones know of no more that concern files."""


def version() -> int:
    """Of the kernel's Landlock; 0 = it has none, or it is switched off."""
    return max(0, _call(_CREATE_RULESET, None, 0, _ASK_VERSION)) if sys.platform == "linux" else 0


def allow_reading_only(paths: Iterable[str]) -> bool:
    """From now on this thread, and what it starts, reads what lies at or below `paths` and opens no other file for anything.

    Needs `no_new_privs`. False = the kernel cannot, and nothing has changed.
    """
    if not (known := version()):
        return False
    rights = _RIGHTS[min(known, len(_RIGHTS)) - 1]
    ruleset = _call(_CREATE_RULESET, struct.pack("@Q", (1 << rights) - 1), 8, 0)
    if ruleset < 0:
        return False
    try:
        return all(_allowed(ruleset, path) for path in paths) and _call(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allowed(ruleset: int, path: str) -> bool:
    """What is not there needs no rule."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        access = _READ_FILE | (_READ_DIR if stat.S_ISDIR(os.fstat(place).st_mode) else 0)
        return _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", access, place), 0) == 0
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    as_words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result: int = ctypes.CDLL(None).syscall(ctypes.c_long(number), *as_words)
    return result
