"""Becomes another program, which never outlives the process that started it, and runs as another user if asked.

Run by path with `python -I -S`, so that it starts in milliseconds; it imports nothing of ours. It is a program of its own because
a process with gRPC's threads must not run Python between fork and exec: about every other such child crashed.
"""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arguments: signal to get when the parent dies (0 = none), the parent's process id, user and group (-1 = ours), then the command."""
    number, parent, user, group = (int(argument) for argument in sys.argv[1:5])
    command = sys.argv[5:]
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


if __name__ == "__main__":
    main()
