"""Lower priority for work that can wait. Nothing else about threads or processes."""

import os
import sys
import threading

NICENESS = 10
"""Beyond that of whoever begins the work: the process it belongs to may itself stand back from others."""
_NICENESS_MAX = 19


def give_way() -> None:
    """Lower this thread's priority. On Linux priorities belong to threads; elsewhere the call would slow the whole process."""
    if sys.platform == "linux":
        _lower(threading.get_native_id())


def give_way_whole() -> None:
    """Lower this process's priority, where there is such a thing. Threads that run already keep theirs on Linux."""
    if hasattr(os, "setpriority"):
        _lower(0)


def _lower(who: int) -> None:
    os.setpriority(os.PRIO_PROCESS, who, min(_NICENESS_MAX, os.getpriority(os.PRIO_PROCESS, who) + NICENESS))
