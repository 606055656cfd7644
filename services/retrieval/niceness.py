"""Lower priority for threads whose work can wait. Nothing else about threads."""

import os
import sys
import threading

NICENESS = 10


def give_way() -> None:
    """Lower this thread's priority. On Linux priorities belong to threads; elsewhere the call would slow the whole process."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
