"""Which embedder filled a store. Vectors of two embedders cannot be compared, so a store refuses any other than its first."""

from services.retrieval.domain import stable_id
from services.retrieval.ports import DOCUMENTS, SYSTEM_TENANT, Point, VectorStore

_ID = stable_id("fingerprint")


class OtherEmbedder(OSError):
    """The store was filled by another embedder."""


async def settle(store: VectorStore, fingerprint: str) -> None:
    """Write `fingerprint` into an empty store, or compare it. Raises OtherEmbedder."""
    record = (await store.get(DOCUMENTS, SYSTEM_TENANT, [_ID])).get(_ID)
    if record is None:
        payload = {"kind": "fingerprint", "tenant": SYSTEM_TENANT, "fingerprint": fingerprint}
        await store.upsert(DOCUMENTS, [Point(_ID, payload)])
    elif record.payload["fingerprint"] != fingerprint:
        raise OtherEmbedder(
            f"the documents were embedded by {record.payload['fingerprint']!r}, but the settings say {fingerprint!r}: "
            "set them back, or use another TAILRACE_STATE_DIR or Qdrant server and ingest again"
        )
