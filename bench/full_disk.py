"""`make bench-money ARGS=full`: the disks of all spools are full for a while under load, and then there is room again.

Each orchestrator's spool lies on a file system of its own, of a few megabytes, which must be mounted: where that is not allowed, the
scenario says so and has failed.
"""

import asyncio
import contextlib
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from bench.ground import TENANTS, Bar, Ground, Outcome, untyped
from bench.money import LAWS, USERS_AT_ONCE, Scenario, broken_laws, compare
from bench.reader import Read, read_answer
from bench.script import Behaviour
from services.orchestrator.spool import FREE_BYTES_MIN

DISK_BYTES = 3 * FREE_BYTES_MIN
PIECE_BYTES = 4096
BEFORE_S, AFTER_S = 2.0, 3.0
PAUSE_S = 0.2


class NotMounted(Exception):
    """A file system of its own size cannot be mounted here; the text says why."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES at `folder`, gone with the block. Raises NotMounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotMounted(getattr(error, "stderr", "").strip() or str(error)) from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free; return the file that took them."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * PIECE_BYTES) == PIECE_BYTES:
            pass
    return ballast


async def full(ground: Ground, n: int) -> Outcome:
    """No spool has any room for `n` seconds while users ask and ask: new questions are refused, and nothing that began is lost."""
    try:
        async with _small_disks(ground) as disks:
            return await _full(ground, n, disks)
    except NotMounted as error:
        return Outcome("spool disks full", n, ground.seed, [Bar("small disks mounted", 0, 1, at_least=True)], {"mount": error})


async def _full(ground: Ground, n: int, disks: dict[str, Path]) -> Outcome:
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(ttft_ms=20, tokens=40, tokens_per_s=100))
    reads: list[tuple[str, Read]] = []
    """When it was asked, and the answer."""
    moment, ending = "before", asyncio.Event()

    async def user(number: int) -> None:
        tenant = TENANTS[number % len(TENANTS)]
        while not ending.is_set():
            asked = moment
            mark, body = ground.question(tenant)
            reads.append((asked, await read_answer(ground.turned(number), ground.token(tenant), body, key=mark)))
            if reads[-1][1].refusal is not None:
                await asyncio.sleep(PAUSE_S)  # the load stays a load and no flood

    async with asyncio.TaskGroup() as group:
        for number in range(USERS_AT_ONCE):
            group.create_task(user(number))
        try:
            await asyncio.sleep(BEFORE_S)
            ballasts = [await asyncio.to_thread(fill, disk) for disk in disks.values()]
            moment = "full"
            for number in range(USERS_AT_ONCE):  # the others may all wait for answers that cannot end
                group.create_task(user(number))
            await asyncio.sleep(n)
            moment = "after"
            for ballast in ballasts:
                ballast.unlink()
            await asyncio.sleep(AFTER_S)
        finally:
            ending.set()
    unbooked = await ground.unbooked(read.answer_id for _, read in reads if read.answer_id)
    left = await ground.holds_left()
    books = await compare(ground)
    refusals = [read.refusal for asked, read in reads if asked == "full" and read.refusal is not None]
    as_promised = [
        refusal
        for refusal in refusals
        if (refusal.status, refusal.reason) == (503, "OVERLOADED") and int(refusal.headers["retry-after"]) > 0
    ]
    return Outcome(
        "spool disks full",
        n,
        ground.seed,
        [
            Bar("questions refused with 503 and Retry-After", len(as_promised), n, at_least=True),
            Bar("other refusals", len(refusals) - len(as_promised), 0),
            Bar("answers begun and not done", sum(read.end != "done" for _, read in reads if read.answer_id), 0),
            Bar("readers without a typed end", untyped(read for _, read in reads), 0),
            Bar(
                "answers done after there was room", sum(asked == "after" and read.end == "done" for asked, read in reads), n, at_least=True
            ),
            Bar("answers lost", unbooked, 0),
            Bar("records dropped or put aside", _said(ground, disks, "record_rejected"), 0),
            Bar("holds left open", left, 0),
            Bar(LAWS, await broken_laws(ground), 0),
            *books.bars(),
        ],
        {
            "asked": Counter(asked for asked, _ in reads),
            "ends": Counter(read.end or read.reason for _, read in reads),
            "spools that were full": sum(_said(ground, [name], "spool_full") > 0 for name in disks),
            **books.notes,
        },
    )


@contextlib.asynccontextmanager
async def _small_disks(ground: Ground) -> AsyncIterator[dict[str, Path]]:
    """Every orchestrator started anew with its spool on a small disk, and put back where it was afterwards."""
    await ground.begin()
    suite = ground.suite
    disks = {
        name: Path(suite.own[name].get("TAILRACE_STATE_DIR", suite.folder)) / "orchestrator"
        for name in suite.own
        if name.startswith("orchestrator")
    }

    async def stop() -> None:
        for name in disks:
            await suite.stop(name)

    async def start() -> None:
        for name in disks.keys() - suite.processes.keys():
            await suite.start(name)

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(start)
        for disk in disks.values():
            stack.enter_context(small_disk(disk))
        await stop()
        await start()
        stack.push_async_callback(stop)
        await suite.until_all_ready()
        yield disks


def _said(ground: Ground, names: Iterable[str], event: str) -> int:
    """How often these replicas have logged an event."""
    return sum(ground.suite.log_of(name).read_text().count(event) for name in names)


SCENARIOS: dict[str, tuple[Scenario, int]] = {"full": (full, 20)}
"""What can be asked for, with the full number of seconds."""
