"""Moves collections to the encoding that is set, in the background: beside the old one, then one write that switches, then the old goes.

At every moment a collection answers with one encoding in which all of its documents are whole. What is done is seen in the store, so a
process that dies goes on where it was; work that several do at once is the same work.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import structlog

from services.chassis.clock import Clock
from services.chassis.ending import ended
from services.chassis.errors import DomainError
from services.chassis.principal import Principal, set_current
from services.retrieval.domain import stable_id
from services.retrieval.encoding_spaces import Encodings, Standing
from services.retrieval.ports import DOCUMENTS, SYSTEM_TENANT, Filter, Point, VectorStore
from services.retrieval.registry import Registry

log = structlog.get_logger(__name__)

INTERVAL_S = 30.0
SETTLED_INTERVAL_S = 600.0
"""Once all are there. A replica with older settings may still begin a collection with its own embedder."""
ANNOUNCED_S = 60.0
"""Where other replicas write, too: from the announcement of the next encoding to the first look at what lacks it. Longer than a writer goes
between its last look at the standing and its write."""
TURN_S = 60.0
"""One replica at a time moves collections; it has its turn for so long."""
LINGER_S = 60.0
"""From a switch to the removal of what it switched from: longer than a question takes that began before."""

PAYER = "re-embedding"
"""User of each tenant in whose name its documents are embedded again, where that costs money."""


class Reencoding:
    """Run it with `running`, or one pass with `once`."""

    def __init__(
        self,
        store: VectorStore,
        registry: Registry,
        encodings: Encodings,
        clock: Clock,
        owner: str,
        *,
        exclusive: bool,
        linger_s: float | None = None,
        announced_s: float | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._encodings = encodings
        self._clock = clock
        self._owner = owner
        self._exclusive = exclusive
        self._linger_s = LINGER_S if linger_s is None else linger_s
        self._announced_s = 0.0 if exclusive else ANNOUNCED_S if announced_s is None else announced_s
        self._since: dict[tuple[str, str, str], float] = {}
        self._turn = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look again and again until left."""
        task = asyncio.create_task(self._keep_going(), name="reencoding")
        try:
            yield
        finally:
            await ended(task)

    async def once(self) -> int:
        """Move what is to be moved; return how many collections are not there yet.

        Cancellation: leaves it to the next pass.
        """
        if not await self._encodings.is_target():
            return 0
        # The usual case: there never was another, so there is nothing to look through.
        if all(encoding.id == self._encodings.current_id for encoding in await self._encodings.all()):
            return 0
        left = 0
        for tenant in await self._store.tenants(DOCUMENTS):
            if tenant == SYSTEM_TENANT:
                continue
            for collection in await self._registry.collections(tenant):
                standing = await self._encodings.standing(tenant, collection)
                if standing != Standing(self._encodings.current_id):
                    left += not await self._move(tenant, collection, standing)
        return left

    async def _move(self, tenant: str, collection: str, standing: Standing) -> bool:
        """Take the collection as far as it goes now; whether it is there and alone."""
        if not await self._my_turn():
            return False
        set_current(Principal(tenant, PAYER))
        target = self._encodings.current_id
        if standing.leaving and not (
            self._past(("leaving", tenant, collection), self._linger_s) and await self._removed(tenant, collection, standing)
        ):
            return False
        if standing.leaving:
            standing = replace(standing, leaving="")
        if standing.encoding == target:
            # The settings are back at what they were: what was begun for another encoding goes.
            given_up = Standing(target, leaving=standing.next)
            return not standing.next or (await self._encodings.advance(tenant, collection, standing, given_up) and False)
        if standing.next != target:
            announced = Standing(standing.encoding, next=target, leaving=standing.next)
            if not await self._encodings.advance(tenant, collection, standing, announced):
                return False
            await self._encodings.note_progress(tenant, collection, 0)
            log.info("collection_is_being_reencoded", embedder=target.partition(" ")[0])
            self._since.pop(("announced", tenant, collection), None)
            standing = announced
        # Whoever did not announce it does not know when that was, and waits from here.
        if not self._past(("announced", tenant, collection), self._announced_s) or standing.leaving:
            return False
        return await self._carry_over(tenant, collection, standing)

    async def _carry_over(self, tenant: str, collection: str, standing: Standing) -> bool:
        source, target = await self._encodings.encoding(standing.encoding), await self._encodings.encoding(standing.next)
        done = 0
        async for document in self._registry.every(tenant, collection):
            if not await self._my_turn() or not await self._encodings.is_target():
                return False
            await self._registry.reencode(document, source, target)
            done += 1
            await self._encodings.note_progress(tenant, collection, done)
        switched = Standing(standing.next, leaving=standing.encoding)
        if not await self._encodings.advance(tenant, collection, standing, switched):
            return False
        # What was answered from the old vectors might be answered otherwise now.
        await self._registry.outdate(tenant, collection)
        log.info("collection_was_reencoded", embedder=target.embedder_id, documents=done)
        for what in ("announced", "leaving"):
            self._since.pop((what, tenant, collection), None)
        # Questions that began before the switch still search where it came from: that goes in a later pass.
        return self._past(("leaving", tenant, collection), self._linger_s) and await self._removed(tenant, collection, switched)

    async def _removed(self, tenant: str, collection: str, standing: Standing) -> bool:
        """Remove what is leaving."""
        # A process may have died between the switch and this.
        await self._registry.outdate(tenant, collection)
        await self._clear(tenant, collection, standing.leaving)
        self._since.pop(("leaving", tenant, collection), None)
        return await self._encodings.advance(tenant, collection, standing, replace(standing, leaving=""))

    def _past(self, what: tuple[str, str, str], seconds: float) -> bool:
        """Whether that long has passed since this was first asked."""
        now = self._clock.monotonic()
        return now - self._since.setdefault(what, now) >= seconds

    async def _clear(self, tenant: str, collection: str, encoding_id: str) -> None:
        encoding = await self._encodings.encoding(encoding_id)
        for space in (encoding.chunks, encoding.answers):
            await self._store.delete(space, Filter(tenant, equal={"collection": collection}))

    async def _my_turn(self) -> bool:
        """Whether it is this replica that moves collections now. A turn is a point with a name that only one can claim."""
        if self._exclusive:
            return True
        turn = stable_id("turn", self._encodings.current_id, str(int(self._clock.now().timestamp() // TURN_S)))
        if turn != self._turn:
            payload = {"kind": "turn", "tenant": SYSTEM_TENANT, "owner": self._owner}
            if (await self._store.claim(DOCUMENTS, Point(turn, payload))).payload["owner"] != self._owner:
                return False
            if self._turn:
                await self._store.remove(DOCUMENTS, SYSTEM_TENANT, [self._turn])
            self._turn = turn
        return True

    async def _keep_going(self) -> None:
        while True:
            left = 1
            try:
                left = await self.once()
            except DomainError as error:
                log.warning("reencoding_waits", reason=error.reason, dependency=error.metadata.get("dependency", ""))
            except Exception as error:
                log.exception("reencoding_failed", error=type(error).__name__)
            await asyncio.sleep(INTERVAL_S if left else SETTLED_INTERVAL_S)
