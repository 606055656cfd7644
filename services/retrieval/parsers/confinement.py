"""What a parser's process is kept from: memory, time, files, other programs, the network. Locks on one door after the other.

Limits hold wherever they exist; the wall around files, the filter of system calls and the tie to the parent's life are Linux'. Nothing here
knows a format.
"""

import ctypes
import errno
import os
import platform
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import services
from services.retrieval.niceness import give_way_whole
from services.retrieval.parsers import landlock

FILES_MAX = 64

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _REFUSE, _UNKNOWN, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _HAS_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x00010000
_OTHER_ABI = 0x40000000
"""From here on, numbers of x86-64 name the same calls by another convention."""

# fmt: off
_REFUSED_CALLS = {
    # socket connect accept sendto sendmsg bind listen socketpair accept4 sendmmsg, fork vfork execve execveat, kill ptrace
    # process_vm_readv process_vm_writev pidfd_send_signal, io_uring_setup (it can open sockets unseen), unshare
    "x86_64": (0xC000003E, (41, 42, 43, 44, 46, 49, 50, 53, 288, 307, 57, 58, 59, 322, 62, 101, 310, 311, 424, 425, 272)),
    "aarch64": (0xC00000B7, (198, 203, 202, 206, 211, 200, 201, 199, 242, 269, 221, 281, 129, 117, 270, 271, 424, 425, 97)),
}
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
# fmt: on
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
"""Where the dynamic loader finds what a module written in C needs, when the first file of its format comes."""
_REFUSED_EVENTS = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.", "urllib.", "http.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def confine(parent: int, memory_mib: int) -> None:
    """Give up, for good, all that reading a file does not need. Call it before the first byte of the file is there."""
    die_with(parent)
    give_way_whole()
    _limit(resource.RLIMIT_AS, memory_mib * 1024 * 1024)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, FILES_MAX)
    readable = _readable_folders()
    if sys.platform == "linux":
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # what both the wall and the filter ask for
        landlock.allow_reading_only((*readable, *_behind_links(set(readable).intersection(sys.path)), *_LIBRARIES))
    sys.addaudithook(_watch(readable))
    _refuse_calls()


def allow_seconds(seconds: int) -> None:
    """Processor time from now on. The end is a signal that ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


class MemoryGauge:
    """How much memory this process has used at most. Made before `confine`, which lets nothing be opened."""

    def __init__(self) -> None:
        # Linux' `ru_maxrss` begins with what the parent had when it forked, so the process's own record is read.
        self._status = os.open("/proc/self/status", os.O_RDONLY) if sys.platform == "linux" else -1

    def peak_mib(self) -> int:
        """The largest resident memory so far."""
        if self._status < 0:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 * 1024)
        found = re.search(rb"VmHWM:\s+(\d+) kB", os.pread(self._status, 16_384, 0))
        return int(found[1]) // 1024 if found else 0


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (OSError, ValueError):
        # Some systems know the limit and cannot set it; the others still hold.
        if sys.platform == "linux":
            raise


def die_with(parent: int) -> None:
    """Be killed when the service dies, however it dies."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_DUMPABLE, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died before it could be watched


def _readable_folders() -> tuple[str, ...]:
    """Where Python's own and installed modules lie: they are imported when the first file of their format comes.

    Of where our own code lies only the code: beside it may be what this process must not see.
    """
    ours = Path(services.__file__).parent
    paths = {path for path in sys.path if path and Path(path).resolve() != ours.parent.resolve()}
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(ours), *paths}
    return tuple(sorted({os.path.realpath(folder) for folder in folders} | folders))


def _behind_links(folders: Iterable[str]) -> Iterator[str]:
    """Where modules really lie that are links to where an installer keeps them: the kernel looks at files, not at their names."""
    for folder in folders:
        for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if entry.is_symlink():
                yield str(entry.resolve())
            elif (entry / "__init__.py").is_symlink():
                yield str((entry / "__init__.py").resolve().parent)


def _watch(readable: tuple[str, ...]) -> Any:
    within = tuple(f"{folder.rstrip(os.sep)}{os.sep}" for folder in readable)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            writes = (isinstance(flags, int) and flags & _WRITING) or (isinstance(mode, str) and set(mode) & set("wax+"))
            inside = isinstance(path, str | bytes | os.PathLike) and os.path.normpath(os.fsdecode(path)).startswith(within)
            if writes or (not inside and not isinstance(path, int)):
                raise PermissionError(errno.EPERM, "a parser opens no files")
        elif event.startswith(_REFUSED_EVENTS):
            raise PermissionError(errno.EPERM, "a parser reaches nothing outside")

    return refuse


def _refuse_calls() -> None:
    """Have the kernel refuse network and programs, also to libraries that are not Python. Where it cannot, the hook remains."""
    refused = _REFUSED_CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if refused is None:
        return
    architecture, numbers = refused
    program = [
        _instruction(_LOAD, 0, 0, 4),
        _instruction(_EQUAL, 1, 0, architecture),
        _instruction(_RETURN, 0, 0, _KILL),
        _instruction(_LOAD, 0, 0, 0),
        _instruction(_AT_LEAST, 0, 1, _OTHER_ABI),
        _instruction(_RETURN, 0, 0, _REFUSE),
        # Threads are made by the same call as processes. The younger form hides which it is; without it, the older one is used.
        _instruction(_EQUAL, 0, 1, _CLONE3),
        _instruction(_RETURN, 0, 0, _UNKNOWN),
        _instruction(_EQUAL, 0, 4, _CLONE[platform.machine()]),
        _instruction(_LOAD, 0, 0, 16),
        _instruction(_HAS_BIT, 0, 1, _CLONE_THREAD),
        _instruction(_RETURN, 0, 0, _ALLOW),
        _instruction(_RETURN, 0, 0, _REFUSE),
        *(
            _instruction(_EQUAL, len(numbers) - place - 1, 0 if place < len(numbers) - 1 else 1, number)
            for place, number in enumerate(numbers)
        ),
        _instruction(_RETURN, 0, 0, _REFUSE),
        _instruction(_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a count, then, aligned, where the instructions are.
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _prctl(option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, *padded)
    return result
