"""Which encoding came first to a store. It owns the spaces whose names have no suffix; every other has spaces of its own."""

from services.retrieval.domain import stable_id
from services.retrieval.ports import DOCUMENTS, SYSTEM_TENANT, Point, VectorStore

_ID = stable_id("fingerprint")


async def settle(store: VectorStore, fingerprint: str) -> str:
    """The encoding that came first, which is `fingerprint` if the store is new."""
    payload = {"kind": "fingerprint", "tenant": SYSTEM_TENANT, "fingerprint": fingerprint}
    return str((await store.claim(DOCUMENTS, Point(_ID, payload))).payload["fingerprint"])
