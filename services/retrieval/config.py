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
    qdrant_shards: int = Field(0, ge=0, le=1024, validation_alias="TAILRACE_RETRIEVAL_QDRANT_SHARDS")
    """Shards of a new collection of the Qdrant server; 0 = one for each of its nodes. What exists keeps the
    settings it was made with; this holds for the next five, too."""
    qdrant_replicas: int = Field(1, ge=1, le=16, validation_alias="TAILRACE_RETRIEVAL_QDRANT_REPLICAS")
    """Nodes that hold each shard."""
    qdrant_write_replicas: int = Field(1, ge=1, le=16, validation_alias="TAILRACE_RETRIEVAL_QDRANT_WRITE_REPLICAS")
    """How many of them must have a write before it counts. With reads of a majority, more than half is what makes reads see it."""
    qdrant_quantization: Literal["none", "scalar", "binary"] = Field("none", validation_alias="TAILRACE_RETRIEVAL_QDRANT_QUANTIZATION")
    """How vectors are kept for the first look: as they are, as int8 (a quarter of the memory) or as bits (a thirty-second; for 1,000
    dimensions and more). Hits are scored again with the whole vectors."""
    qdrant_vectors_memory: Literal["cold", "cached", "pinned"] = Field(
        "cached", validation_alias="TAILRACE_RETRIEVAL_QDRANT_VECTORS_MEMORY"
    )
    """Where whole vectors are: on disk, on disk with a warm page cache, or held in memory."""
    qdrant_payload_on_disk: bool = Field(True, validation_alias="TAILRACE_RETRIEVAL_QDRANT_PAYLOAD_ON_DISK")
    """Texts and fields stay on disk; the indexed fields are in memory all the same."""
    qdrant_hnsw_m: int = Field(16, ge=0, le=128, validation_alias="TAILRACE_RETRIEVAL_QDRANT_HNSW_M")
    """Links of a vector in the graph over all tenants. 0 = no such graph, which many small tenants never need."""
    qdrant_hnsw_payload_m: int = Field(16, ge=0, le=128, validation_alias="TAILRACE_RETRIEVAL_QDRANT_HNSW_PAYLOAD_M")
    """Links of a vector in the graph of its own tenant and collection."""
    qdrant_write_ordering: Literal["weak", "medium", "strong"] = Field(
        "medium", validation_alias="TAILRACE_RETRIEVAL_QDRANT_WRITE_ORDERING"
    )
    """Who orders writes: each node for itself, an elected one, or one that does not change. Weaker than medium, replicas may differ in
    what was written last."""
    qdrant_read_consistency: Literal["one", "majority", "quorum", "all"] = Field(
        "one", validation_alias="TAILRACE_RETRIEVAL_QDRANT_READ_CONSISTENCY"
    )
    """Replicas a read asks and how many must agree. With replicas, `majority` keeps the promise that nothing rests on what was deleted."""
    embedder: str = Field("", max_length=200, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER")
    """What makes vectors: `minilm-int8`, `minilm` (fp32), `openai:MODEL` (and every server that speaks its format), `voyage:MODEL`,
    `gemini:MODEL` or `fastembed:MODEL`. Empty = MiniLM in the precision of TAILRACE_RETRIEVAL_EMBED_QUANT. A change embeds what is stored
    again, in the background."""
    embed_quant: Literal["int8", "fp32"] = Field("int8", validation_alias="TAILRACE_RETRIEVAL_EMBED_QUANT")
    """Precision of MiniLM where TAILRACE_RETRIEVAL_EMBEDDER is empty. int8 is near fp32 and takes less time."""
    embedder_url: str = Field("", validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_URL")
    """Base address of a remote embedder, such as http://tei:8080/v1. Empty = the vendor's, or the vendor's own variable for it."""
    embedder_key: SecretStr = Field(SecretStr(""), validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_KEY")
    """Its key, or several with commas between, used in turn. Empty = the vendor's own variable. Or TAILRACE_RETRIEVAL_EMBEDDER_KEY_FILE."""
    embedder_dimensions: int = Field(0, ge=0, le=8192, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_DIMENSIONS")
    """Numbers in a vector. 0 = the model's own, for models that are known here."""
    embedder_cut: bool = Field(False, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_CUT")
    """Whether a remote model is asked to cut its vectors to that many; else the number only says how many come."""
    embedder_batch: int = Field(64, ge=1, le=1024, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_BATCH")
    """Texts in one request to a remote embedder."""
    embedder_timeout_s: float = Field(30, gt=0, le=300, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_TIMEOUT_S")
    """Longest wait for one request to a remote embedder, its retry included."""
    embedder_encoding: Literal["float", "base64"] = Field("float", validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_ENCODING")
    """How an OpenAI-compatible embedder is to send vectors; base64 is a third of the bytes where the server knows it."""
    embedder_question_prefix: str = Field("", max_length=500, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_QUESTION_PREFIX")
    """What an OpenAI-compatible embedder wants in front of a question, such as `query: `."""
    embedder_document_prefix: str = Field("", max_length=500, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_DOCUMENT_PREFIX")
    """What it wants in front of a document, such as `passage: `."""
    embedder_folder: Path | None = Field(None, validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_FOLDER")
    """Folder with the ONNX model and tokenizer of a fastembed embedder. Unset = fastembed's own list and cache."""
    embedder_billed: Literal["auto", "yes", "no"] = Field("auto", validation_alias="TAILRACE_RETRIEVAL_EMBEDDER_BILLED")
    """Whether calls of a remote embedder are set aside and booked in the ledger, by its price book; `auto` = where a vendor's own address
    is asked."""
    ledger_target: str = Field("127.0.0.1:50053", validation_alias="TAILRACE_LEDGER_TARGET")
    """Ledger service: `host:port`, or `dns:///name:port` for several replicas. Only asked for embedders that are billed."""
    openai_base_url: str = Field("", validation_alias="OPENAI_BASE_URL")
    """Address of OpenAI's interface, for `openai:`."""
    openai_api_key: SecretStr = Field(SecretStr(""), validation_alias="OPENAI_API_KEY")
    """Its key. Or OPENAI_API_KEY_FILE."""
    voyage_api_key: SecretStr = Field(SecretStr(""), validation_alias="VOYAGE_API_KEY")
    """Voyage's key, for `voyage:`. Or VOYAGE_API_KEY_FILE."""
    gemini_base_url: str = Field("", validation_alias="GOOGLE_GEMINI_BASE_URL")
    """Address of Gemini's interface, for `gemini:`."""
    gemini_api_key: SecretStr = Field(SecretStr(""), validation_alias="GEMINI_API_KEY")
    """Its key. Or GEMINI_API_KEY_FILE."""
    language: str = Field("english", pattern="^[a-z]{2,20}$", validation_alias="TAILRACE_RETRIEVAL_LANGUAGE")
    """Language whose endings and stop words the word search takes where the language of a text cannot be told."""
    fusion: Literal["linear", "dbsf", "rrf"] = Field("linear", validation_alias="TAILRACE_RETRIEVAL_FUSION")
    """How meaning and words are fused: by scores as they are (measured best), each normalised by its own spread, or by ranks."""
    fusion_prefetch: int = Field(100, ge=10, le=1000, validation_alias="TAILRACE_RETRIEVAL_FUSION_PREFETCH")
    """Candidates each of the two rankings brings."""
    fusion_weight_dense: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_DENSE")
    """Weight of meaning. It falls by itself where the embedder does not know the language of a question."""
    fusion_weight_sparse: float = Field(1.0, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_FUSION_WEIGHT_SPARSE")
    """Weight of words. Only the ratio of the two weights counts."""
    late_candidates: int = Field(20, ge=0, le=100, validation_alias="TAILRACE_RETRIEVAL_LATE_CANDIDATES")
    """How many of the best are judged again by the vectors of their single words (late interaction), where the embedder tells them, as
    MiniLM does, and no cross-encoder is set; with the fusion `linear` alone. More than 20 find nothing more. 0 = none, and nothing is
    stored for it: from or to 0, what is stored is embedded again, in the background."""
    reranker_url: str = Field("", validation_alias="TAILRACE_RETRIEVAL_RERANKER_URL")
    """Whole address of a cross-encoder that judges the best candidates again, such as http://tei:8080/rerank. Empty = none."""
    reranker_format: Literal["cohere", "tei"] = Field("cohere", validation_alias="TAILRACE_RETRIEVAL_RERANKER_FORMAT")
    """How it is asked: as Cohere, Jina, Voyage, vLLM and LiteLLM are, or as text-embeddings-inference is."""
    reranker_model: str = Field("", max_length=200, validation_alias="TAILRACE_RETRIEVAL_RERANKER_MODEL")
    """Model it is asked for, where its format names one."""
    reranker_key: SecretStr = Field(SecretStr(""), validation_alias="TAILRACE_RETRIEVAL_RERANKER_KEY")
    """Its key, or several with commas between, used in turn. Or TAILRACE_RETRIEVAL_RERANKER_KEY_FILE."""
    reranker_candidates: int = Field(32, ge=2, le=200, validation_alias="TAILRACE_RETRIEVAL_RERANKER_CANDIDATES")
    """Candidates it is shown. More find more and take longer."""
    reranker_timeout_s: float = Field(1.0, gt=0, le=30, validation_alias="TAILRACE_RETRIEVAL_RERANKER_TIMEOUT_S")
    """Longest wait for it; the first token waits too. After that the order stays as it was, and it is left alone for a while."""
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
    ingest_workers: int = Field(4, ge=1, le=64, validation_alias="TAILRACE_RETRIEVAL_INGEST_WORKERS")
    """Documents this replica works on at once. Four keep the embedder's two threads busy while others are parsed and written."""
    ingest_store_mib: int = Field(96, ge=42, le=65_536, validation_alias="TAILRACE_RETRIEVAL_INGEST_STORE_MIB")
    """Room in Redis for contents that wait for their turn or for a retry, all jobs together; one job has at most half of it."""
    ingest_lease_s: float = Field(10.0, ge=0.5, le=600, validation_alias="TAILRACE_RETRIEVAL_INGEST_LEASE_S")
    """How long a replica may be silent before others take over its documents, seconds."""
    ingest_kept_s: float = Field(86_400.0, ge=60, le=2_592_000, validation_alias="TAILRACE_RETRIEVAL_INGEST_KEPT_S")
    """How long an ended job can be read, and what failed in it retried, seconds."""
    ingest_watchers_max: int = Field(128, ge=1, le=10_000, validation_alias="TAILRACE_RETRIEVAL_INGEST_WATCHERS_MAX")
    """Streams of progress at once, those of uploads included. Each takes a connection to Redis."""
    ingest_timeout_s: float = Field(5.0, ge=0.1, le=60, validation_alias="TAILRACE_RETRIEVAL_INGEST_TIMEOUT_S")
    """Longest wait for one answer of Redis, seconds."""
    parse_workers: int = Field(2, ge=1, le=64, validation_alias="TAILRACE_RETRIEVAL_PARSE_WORKERS")
    """Processes that read files side by side. They start when files come and end half a minute after the last one."""
    parse_timeout_s: float = Field(25, gt=0, le=600, validation_alias="TAILRACE_RETRIEVAL_PARSE_TIMEOUT_S")
    """Longest time for reading one file; it is refused after that and its process ended."""
    ocr: str = Field("", max_length=200, pattern=r"^$|^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", validation_alias="TAILRACE_RETRIEVAL_OCR")
    """What reads the pages of PDFs that are pictures, as `package.module:name`: called without arguments, it gives an `Ocr` of
    services/retrieval/ports.py. Empty = none: such pages are named as unread, and files of nothing else are refused with the cause
    `no_text`. It runs in the service itself."""
    ocr_timeout_s: float = Field(300, gt=0, le=3600, validation_alias="TAILRACE_RETRIEVAL_OCR_TIMEOUT_S")
    """Longest time for reading the pictures of one file; then it is taken in without them, or refused where there is nothing else."""
    parse_memory_mib: int = Field(448, ge=128, le=16_384, validation_alias="TAILRACE_RETRIEVAL_PARSE_MEMORY_MIB")
    """Most memory of one reading process, address space included: what is resident stays below it."""

    @property
    def embedder_name(self) -> str:
        """The embedder that is set, by the name that opens it."""
        return self.embedder or {"int8": "minilm-int8", "fp32": "minilm"}[self.embed_quant]

    @property
    def qdrant_folder(self) -> Path:
        """Where Edge keeps its shards."""
        return self.state_dir / "qdrant"

    @property
    def models_folder(self) -> Path:
        """Where converted models are kept."""
        return self.state_dir / "models"
