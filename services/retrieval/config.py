"""Settings of the retrieval service. Nothing here reads the environment."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from services.chassis.config import ServiceSettings


class Settings(ServiceSettings):
    """See the variable names for what `.env` and compose.yaml set."""

    prefix: ClassVar[str] = "TAILRACE_RETRIEVAL_"

    port: int = Field(50052, ge=0, le=65535, validation_alias="TAILRACE_RETRIEVAL_PORT")
    """gRPC port; 0 = any free one."""
    target: str = Field("", validation_alias="TAILRACE_RETRIEVAL_TARGET")
    """Where the other services find this one. Not used here; claimed because all services share one environment."""
    qdrant_url: str = Field("", validation_alias="QDRANT_URL")
    """A Qdrant server, such as http://qdrant:6333. Empty = Qdrant Edge in the state directory."""
    qdrant_api_key: SecretStr = Field(SecretStr(""), validation_alias="QDRANT_API_KEY")
    """Key of the Qdrant server, if it wants one. Or QDRANT_API_KEY_FILE."""
    qdrant_grpc_port: int = Field(6334, ge=1, le=65535, validation_alias="TAILRACE_RETRIEVAL_QDRANT_GRPC_PORT")
    """gRPC port of the Qdrant server; the URL's is its HTTP port."""
    qdrant_timeout_s: int = Field(5, ge=1, le=60, validation_alias="TAILRACE_RETRIEVAL_QDRANT_TIMEOUT_S")
    """Longest wait for one call to the Qdrant server."""
    embed_quant: Literal["fp32", "int8"] = Field("fp32", validation_alias="TAILRACE_RETRIEVAL_EMBED_QUANT")
    """Precision of the embedder. int8 is 2-3 times faster and finds slightly worse; the two never share a store."""
    language: str = Field("english", pattern="^[a-z]{2,20}$", validation_alias="TAILRACE_RETRIEVAL_LANGUAGE")
    """Language whose endings and stop words the word search knows."""
    fusion: Literal["dbsf", "rrf"] = Field("dbsf", validation_alias="TAILRACE_RETRIEVAL_FUSION")
    """How meaning and words are fused. DBSF measured best: see bench/retrieval_quality.py."""
    fusion_prefetch: int = Field(100, ge=10, le=1000, validation_alias="TAILRACE_RETRIEVAL_FUSION_PREFETCH")
    """Candidates each of the two rankings brings."""
    fusion_weight_dense: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_DENSE")
    """Weight of meaning, for rrf."""
    fusion_weight_sparse: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_SPARSE")
    """Weight of words, for rrf."""
    cache_similarity_min: float = Field(0.9, ge=0.5, le=1.0, validation_alias="TAILRACE_RETRIEVAL_CACHE_SIMILARITY_MIN")
    """Least cosine similarity of two questions that may share an answer. Chosen by measuring: see bench/cache_quality.py."""
    cache_ttl_s: float = Field(86_400, ge=1, le=31_536_000, validation_alias="TAILRACE_RETRIEVAL_CACHE_TTL_S")
    """How long an answer may be served again, seconds."""
    ingest_jobs_max: int = Field(32, ge=1, le=1000, validation_alias="TAILRACE_RETRIEVAL_INGEST_JOBS_MAX")
    """Ingestions that may run at once, on all replicas together; more are refused with a time to come back."""
    ingest_buffer_mib: int = Field(64, ge=21, le=4096, validation_alias="TAILRACE_RETRIEVAL_INGEST_BUFFER_MIB")
    """Memory of this replica for documents that are being received; above it, streams are made to wait."""
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL")
    """Redis or Valkey that keeps ingestion jobs and the contents of documents until they are indexed."""
    ingest_workers: int = Field(2, ge=1, le=64, validation_alias="TAILRACE_RETRIEVAL_INGEST_WORKERS")
    """Documents this replica works on at once. Two keep the embedder busy while one of them is parsed or written."""
    ingest_store_mib: int = Field(96, ge=42, le=65_536, validation_alias="TAILRACE_RETRIEVAL_INGEST_STORE_MIB")
    """Room in Redis for contents that wait for their turn or for a retry, all jobs together; one job has at most half of it."""
    ingest_lease_s: float = Field(10.0, ge=0.5, le=600, validation_alias="TAILRACE_RETRIEVAL_INGEST_LEASE_S")
    """How long a replica may be silent before others take over its documents, seconds."""
    ingest_kept_s: float = Field(86_400.0, ge=60, le=2_592_000, validation_alias="TAILRACE_RETRIEVAL_INGEST_KEPT_S")
    """How long an ended job can be read, and what failed in it retried, seconds."""
    ingest_watchers_max: int = Field(128, ge=1, le=10_000, validation_alias="TAILRACE_RETRIEVAL_INGEST_WATCHERS_MAX")
    """Streams of progress at once, those of uploads included. Each takes a connection to Redis."""
    ingest_timeout_s: float = Field(2.0, ge=0.1, le=60, validation_alias="TAILRACE_RETRIEVAL_INGEST_TIMEOUT_S")
    """Longest wait for one answer of Redis, seconds."""

    @property
    def qdrant_folder(self) -> Path:
        """Where Edge keeps its shards."""
        return self.state_dir / "qdrant"

    @property
    def models_folder(self) -> Path:
        """Where converted models are kept."""
        return self.state_dir / "models"
