"""Ending tasks that would go on for ever. Nothing here begins one.

A single cancellation is not enough: whatever a task waits in may take it for something of its own (a time limit that ends in the same
moment, `asyncio.wait_for` up to Python 3.11), and then whoever waits for the task's end waits for ever.
"""

import asyncio
from typing import Any

CANCEL_AGAIN_S = 5.0
"""How long a cancelled task may clean up before it is told again."""


async def ended(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel `tasks` until all are over. What they end with is nobody's concern. Cancellation: they have been told once."""
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
