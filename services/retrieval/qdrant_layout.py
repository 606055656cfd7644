"""How collections are laid out on a Qdrant server, and how writes and reads agree across its replicas. Settings into requests; no I/O."""

from dataclasses import dataclass
from typing import Any, Literal

from qdrant_client import models

from services.retrieval.ports import Space

OVERSAMPLING = 2.0
"""Candidates that a quantized first look brings for each wanted hit, before the whole vectors decide."""


@dataclass(frozen=True, slots=True)
class Layout:
    """See the settings of the same names."""

    shards: int = 0
    replicas: int = 1
    write_replicas: int = 1
    quantization: Literal["none", "scalar", "binary"] = "none"
    vectors_memory: Literal["cold", "cached", "pinned"] = "cached"
    payload_on_disk: bool = True
    hnsw_m: int = 16
    hnsw_payload_m: int = 16
    write_ordering: Literal["weak", "medium", "strong"] = "medium"
    read_consistency: Literal["one", "majority", "quorum", "all"] = "one"

    def collection(self, space: Space, dimension: int) -> dict[str, Any]:
        """What a new collection is made with."""
        memory = models.Memory(self.vectors_memory)
        dense = models.VectorParams(
            size=dimension,
            distance=models.Distance.COSINE,
            memory=memory,
            hnsw_config=models.HnswConfigDiff(m=self.hnsw_m, payload_m=self.hnsw_payload_m),
            quantization_config=self._quantized(),
        )
        return {
            "vectors_config": {"dense": dense} if space.dense else {},
            "sparse_vectors_config": {"bm25": models.SparseVectorParams(modifier=models.Modifier.IDF)} if space.sparse else {},
            "shard_number": self.shards or None,
            "replication_factor": self.replicas,
            "write_consistency_factor": self.write_replicas,
            "on_disk_payload": self.payload_on_disk,
        }

    def indexes(self, space: Space) -> dict[str, Any]:
        """The payload fields to index. The tenant's index says so: the server keeps a tenant's points together."""
        tenant = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
        keywords = dict.fromkeys(space.keywords, models.PayloadSchemaType.KEYWORD)
        integers = dict.fromkeys(space.integers, models.PayloadSchemaType.INTEGER)
        return {"tenant": tenant, **keywords, **integers, **dict.fromkeys(space.numbers, models.PayloadSchemaType.FLOAT)}

    def write(self) -> dict[str, Any]:
        """What every write is sent with: it has been done, not only received, when it is answered."""
        return {"wait": True, "ordering": models.WriteOrdering(self.write_ordering)}

    def read(self) -> dict[str, Any]:
        """What every read is sent with."""
        return {} if self.read_consistency == "one" else {"consistency": models.ReadConsistencyType(self.read_consistency)}

    def search_params(self) -> models.SearchParams | None:
        """For the dense leg of a search."""
        if self.quantization == "none":
            return None
        return models.SearchParams(quantization=models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING))

    def _quantized(self) -> Any:
        # The small copy is what makes the first look quick; it belongs in memory.
        if self.quantization == "scalar":
            scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, memory=models.Memory.PINNED)
            return models.ScalarQuantization(scalar=scalar)
        if self.quantization == "binary":
            return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(memory=models.Memory.PINNED))
        return None
