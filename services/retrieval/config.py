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
    """Language whose endings and stop words the word search takes where the language of a text cannot be told."""
    fusion: Literal["dbsf", "rrf"] = Field("dbsf", validation_alias="TAILRACE_RETRIEVAL_FUSION")
    """How meaning and words are fused: by scores, each normalised by its own spread (measured best), or by ranks."""
    fusion_prefetch: int = Field(100, ge=10, le=1000, validation_alias="TAILRACE_RETRIEVAL_FUSION_PREFETCH")
    """Candidates each of the two rankings brings."""
    fusion_weight_dense: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_DENSE")
    """Weight of meaning. It falls by itself where the embedder does not know the language of a question."""
    fusion_weight_sparse: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_SPARSE")
    """Weight of words. Only the ratio of the two weights counts."""
    cache_similarity_min: float = Field(0.9, ge=0.5, le=1.0, validation_alias="TAILRACE_RETRIEVAL_CACHE_SIMILARITY_MIN")
    """Least cosine similarity of two questions that may share an answer. Chosen by measuring: see bench/cache_quality.py."""
    cache_ttl_s: float = Field(86_400, ge=1, le=31_536_000, validation_alias="TAILRACE_RETRIEVAL_CACHE_TTL_S")
    """How long an answer may be served again, seconds."""
    ingest_jobs_max: int = Field(32, ge=1, le=1000, validation_alias="TAILRACE_RETRIEVAL_INGEST_JOBS_MAX")
    """Ingestions that may run at once; more are refused with a time to come back."""
    ingest_buffer_mib: int = Field(64, ge=21, le=4096, validation_alias="TAILRACE_RETRIEVAL_INGEST_BUFFER_MIB")
    """Memory for received and not yet indexed documents of all ingestions together; above it, streams are made to wait."""

    @property
    def qdrant_folder(self) -> Path:
        """Where Edge keeps its shards."""
        return self.state_dir / "qdrant"

    @property
    def models_folder(self) -> Path:
        """Where converted models are kept."""
        return self.state_dir / "models"
