"""Becomes another program, which never outlives the process that started it, and runs as another user or behind others if asked.

Run by path with `python -I -S`, so that it starts in milliseconds; it imports nothing of ours. It is a program of its own because
a process with gRPC's threads must not run Python between fork and exec: about every other such child crashed.
"""

import contextlib
import ctypes
import os
import sys
import time

_PR_SET_PDEATHSIG = 1
_AUTOGROUP_TRIES, _AUTOGROUP_PAUSE_S = 5, 0.1
"""Linux takes one such request in a tenth of a second from ordinary users."""


def main() -> None:
    """Arguments: signal to get when the parent dies (0 = none), the parent's process id, user and group (-1 = ours), niceness, command."""
    number, parent, user, group, niceness = (int(argument) for argument in sys.argv[1:6])
    command = sys.argv[6:]
    if niceness:
        _stand_back(niceness)
    if user >= 0:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    if number and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)  # after the change of user, which clears it
        if os.getppid() != parent:  # it died before the request was made
            sys.exit(1)
    try:
        os.execv(command[0], command)  # noqa: S606 - becoming the program is the purpose
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def _stand_back(niceness: int) -> None:
    """Let others have the processor first. Where each session is one group to Linux's scheduler, the group must say so too."""
    niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, 0))  # none but root may come forward again
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    for _ in range(_AUTOGROUP_TRIES):
        with contextlib.suppress(BlockingIOError):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.write(os.open("/proc/self/autogroup", os.O_WRONLY | os.O_CLOEXEC), str(niceness).encode())
            return
        time.sleep(_AUTOGROUP_PAUSE_S)


if __name__ == "__main__":
    main()
