"""`make bench-streams ARGS=crowd`: many times more questions than there is room for, at a provider that answers none until it is told to.

So who got in, who was turned away and what became of them depends on no clock: a slow machine only takes longer to say the same. What a
machine delivers under overload is `bench.streams`' affair.
"""

import asyncio
import collections
from collections.abc import Callable, Iterable
from typing import Any, Literal

from bench.ground import Bar, Ground, Outcome
from bench.reader import Reply, fetch, request
from bench.script import Behaviour
from services.gateway.shedding import BATCH_SHARE
from tests.suite import until

ROOM = 10
"""Answers that a gateway carries."""
BATCH_ROOM = int(BATCH_SHARE * ROOM)
ROOM_WITHIN_S = 30.0
"""How long a place may take to become free: nothing is made of it."""
NARROW = {
    "TAILRACE_GATEWAY_STREAMS_MAX": str(ROOM),
    "TAILRACE_GATEWAY_PREPARING_MAX": "10000",
    "TAILRACE_GATEWAY_PREPARING_STANDING_MAX": "10000",
    "TAILRACE_GATEWAY_LOOP_LAG_MAX_S": "60",
}
"""One bound, and none that depends on how fast the machine is."""

Priority = Literal["interactive", "batch"]


class Asked:
    """One question at one gateway, from being sent to its last byte."""

    def __init__(self, ground: Ground, port: int, priority: Priority) -> None:
        self.port = port
        self.priority = priority
        _, body = ground.question()
        self._answer_id: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        message = request("POST", "/v1/answers", ground.token(), {**body, "priority": priority})
        self.reply = asyncio.create_task(fetch(port, message, on_blocks=self._look))

    @property
    def answer_id(self) -> str:
        """Empty if it was not let in."""
        return self._answer_id.result() if self._answer_id.done() else ""

    @property
    def end(self) -> str:
        """The last event of its stream."""
        blocks = self.reply.result().blocks
        return blocks[-1].name if blocks else ""

    async def settled(self) -> bool:
        """Wait until it was let in or turned away; return whether it was let in."""
        await asyncio.wait([self.reply, self._answer_id], return_when=asyncio.FIRST_COMPLETED)
        return bool(self.answer_id)

    def _look(self, reply: Reply) -> None:
        if not self._answer_id.done():
            self._answer_id.set_result(reply.blocks[0].data["answer_id"])


class House:
    """The gateways, and everybody who asked at them."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.asked: list[Asked] = []
        self.left: set[str] = set()
        """Answers that were cancelled."""

    async def lets_in(self, port: int, priority: Priority) -> bool:
        self.asked.append(one := Asked(self._ground, port, priority))
        return await one.settled()

    async def crowd(self, callers: Iterable[tuple[int, Priority]]) -> None:
        """Ask at once; return when each of them was let in or turned away."""
        new = [Asked(self._ground, port, priority) for port, priority in callers]
        self.asked += new
        await asyncio.gather(*(one.settled() for one in new))

    async def fill(self, port: int, *, batch_first: bool = False) -> None:
        """Let interactive callers in until there is no room, with `batch_first` a batch one asks before each.

        Raises TimeoutError if there is none for them.
        """

        async def is_full() -> bool:
            if len(self.inside(port)) < ROOM and batch_first:
                await self.lets_in(port, "batch")
            if len(self.inside(port)) < ROOM:
                await self.lets_in(port, "interactive")
            return len(self.inside(port)) >= ROOM

        await until(is_full, ROOM_WITHIN_S)

    async def leave(self, port: int) -> None:
        """One of those inside gives up."""
        one = next(one for one in self.inside(port) if one.priority == "interactive")
        self.left.add(one.answer_id)
        assert (await fetch(port, self._ground.cancel(one.answer_id))).status == 202
        await one.reply

    def inside(self, port: int) -> list[Asked]:
        return [one for one in self.asked if one.port == port and one.answer_id and one.answer_id not in self.left]

    def batch_inside(self, port: int) -> int:
        return sum(one.priority == "batch" for one in self.inside(port))

    @property
    def refused(self) -> list[Asked]:
        return [one for one in self.asked if one.reply.done() and not one.answer_id]

    def close(self) -> None:
        for one in self.asked:
            one.reply.cancel()


async def crowd(ground: Ground, n: int) -> Outcome:
    """`n` times as many questions at once as there is room for, half of them `batch`; then places become free one by one."""
    await ground.begin()
    await ground.suite.provider.behave(Behaviour(tokens=8, waits=True))
    chance = ground.random("crowd")
    async with ground.gateways_with(lambda _: NARROW):
        house, ports = House(ground), ground.ports
        try:
            batch_with_room = sum([await house.lets_in(port, "batch") for port in ports])
            priorities: tuple[Priority, ...] = ("interactive", "batch")
            callers = [(port, priority) for port in ports for priority in priorities for _ in range(n * ROOM // 2)]
            chance.shuffle(callers)
            await house.crowd(callers)
            crowded = max(len(house.inside(port)) for port in ports)
            batch_inside = max(house.batch_inside(port) for port in ports)
            too_many = batch_before_interactive = 0
            for port in ports:
                await house.fill(port)
                too_many += await house.lets_in(port, "interactive")
                batch = house.batch_inside(port)
                for _ in range(ROOM - BATCH_ROOM):
                    await house.leave(port)
                # A place may become free a moment after its reader saw the end; whoever asks next gets it.
                await house.fill(port, batch_first=True)
                batch_before_interactive += house.batch_inside(port) - batch
            refused = house.refused
            await ground.suite.provider.release()
            inside = [one for port in ports for one in house.inside(port)]
            await asyncio.gather(*(one.reply for one in inside))
        finally:
            house.close()
    ends = collections.Counter(one.end for one in inside)
    calls = (await ground.suite.provider.totals())["requests"]
    unbooked = await ground.unbooked(one.answer_id for one in house.asked if one.answer_id)
    return Outcome(
        "crowd",
        n,
        ground.seed,
        [
            Bar("batch let in while there is room", batch_with_room, len(ports), at_least=True),
            Bar("most inside a gateway, of the crowd", crowded, ROOM),
            Bar("most of them batch", batch_inside, BATCH_ROOM),
            Bar("let into a full gateway", too_many, 0),
            Bar("batch let in where only interactive has room", batch_before_interactive, 0),
            Bar("turned away", len(refused), (n - 1) * ROOM * len(ports), at_least=True),
            Bar("refusals but 503 OVERLOADED with Retry-After", sum(not _is_typed(one.reply.result()) for one in refused), 0),
            Bar("let in and not done", len(inside) - ends["done"], 0),
            Bar("provider calls of those turned away", max(0, calls - len(inside) - len(house.left)), 0),
            Bar("answers not booked", unbooked, 0),
            Bar("holds left open", await ground.holds_left(), 0),
        ],
        {"let in": len(inside) + len(house.left), "provider calls": calls, "ends": dict(ends)},
    )


def _is_typed(reply: Reply) -> bool:
    after = reply.headers.get("retry-after", "")
    return (reply.status, reply.reason) == (503, "OVERLOADED") and after.isdecimal() and int(after) > 0


SCENARIOS: dict[str, tuple[Callable[[Ground, int], Any], int]] = {"crowd": (crowd, 20)}
"""By the name it is asked for, with the full n."""
