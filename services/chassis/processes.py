"""Waiting for processes that were not started by the event loop's own means.

What they run, and how they are confined, is not known here.
"""

import asyncio
import contextlib
import subprocess
import threading


def end_of(process: "subprocess.Popen[bytes]") -> asyncio.Future[int]:
    """The exit code to come. A thread waits for it, which every system has.

    Cancelling the future ends nothing: shield it, and end the process.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(returncode: int) -> None:
        if not ended.done():
            ended.set_result(returncode)

    def wait() -> None:
        returncode = process.wait()
        with contextlib.suppress(RuntimeError):  # nobody is there any more to be told
            loop.call_soon_threadsafe(tell, returncode)

    threading.Thread(target=wait, name="process end", daemon=True).start()
    return ended
