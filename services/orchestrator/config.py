"""What the orchestrator is told from outside. Nothing here has a meaning for another service."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr, field_validator

from services.chassis.config import ServiceSettings
from services.orchestrator.tools.addresses import parse_hosts


class OrchestratorSettings(ServiceSettings):
    """Settings of the orchestrator. Every default works on one machine without an account anywhere."""

    prefix: ClassVar[str] = "TAILRACE_ORCHESTRATOR_"

    port: int = Field(50051, ge=0, le=65535, validation_alias="TAILRACE_ORCHESTRATOR_PORT")
    """Port to listen on; 0 = any free one."""
    target: str = Field("127.0.0.1:50051", validation_alias="TAILRACE_ORCHESTRATOR_TARGET")
    """Where others reach this service. Not used here; claimed because all services share one environment."""
    retrieval_target: str = Field("127.0.0.1:50052", validation_alias="TAILRACE_RETRIEVAL_TARGET")
    """Where retrieval is reached."""
    ledger_target: str = Field("127.0.0.1:50053", validation_alias="TAILRACE_LEDGER_TARGET")
    """Where the ledger is reached."""
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL")
    """Redis or Valkey that keeps exact answers, event logs and idempotency keys. Answers without such a key go on without it."""

    anthropic_api_key: SecretStr = Field(SecretStr(""), validation_alias="ANTHROPIC_API_KEY")
    """Key for Claude, or several with commas between: another is used while one is refused or limited. Without a key of any provider every
    tier is served by the extractive model."""
    anthropic_base_url: str = Field("https://api.anthropic.com", validation_alias="ANTHROPIC_BASE_URL")
    """Where Claude is reached. The key is sent nowhere else."""
    openai_api_key: SecretStr = Field(SecretStr(""), validation_alias="OPENAI_API_KEY")
    """Key for GPT, or several with commas between. A server of one's own at OPENAI_BASE_URL may want none."""
    openai_base_url: str = Field("https://api.openai.com/v1", validation_alias="OPENAI_BASE_URL")
    """Where GPT is reached, or a server that speaks like OpenAI. The key is sent nowhere else."""
    openai_api: Literal["auto", "responses", "chat"] = Field("auto", validation_alias="TAILRACE_ORCHESTRATOR_OPENAI_API")
    """Which of OpenAI's interfaces is spoken there: auto = Responses to OpenAI itself, Chat Completions to others."""
    gemini_api_key: SecretStr = Field(SecretStr(""), validation_alias="GEMINI_API_KEY")
    """Key for Gemini, or several with commas between."""
    gemini_base_url: str = Field("https://generativelanguage.googleapis.com", validation_alias="GOOGLE_GEMINI_BASE_URL")
    """Where Gemini is reached. The key is sent nowhere else."""
    model_connect_s: float = Field(5.0, gt=0, le=60, validation_alias="TAILRACE_MODEL_CONNECT_S")
    """Longest wait for a connection to a provider, seconds."""
    model_first_token_s: float = Field(60.0, gt=0, le=600, validation_alias="TAILRACE_MODEL_FIRST_TOKEN_S")
    """Longest wait from the request to the first output, be it text, visible reasoning or a call, seconds."""
    model_stall_s: float = Field(20.0, gt=0, le=600, validation_alias="TAILRACE_MODEL_STALL_S")
    """Longest silence between two pieces of output, seconds. Pings do not count: they are not progress."""
    answer_deadline_s: float = Field(300.0, gt=0, le=3000, validation_alias="TAILRACE_ANSWER_DEADLINE_S")
    """Longest time from acceptance to the last token, seconds. Below an hour, the longest life of a hold."""

    restart_patience_s: float = Field(60.0, ge=0, le=3000, validation_alias="TAILRACE_ORCHESTRATOR_RESTART_PATIENCE_S")
    """How long an accepted answer waits for retrieval or the ledger while they restart, seconds, if its deadline leaves so much: retrieval
    needs ten to load its model on an idle machine, and forty on a crowded one. A store behind them is not waited for."""

    models_file: str = Field("", validation_alias="TAILRACE_MODELS_FILE")
    """File of the models and tiers that can be asked for, read again when it changes; see docs/models.md. Empty = the shipped one."""
    shadow_tenant: str = Field("shadow", pattern=r"^\S{1,128}$", validation_alias="TAILRACE_ORCHESTRATOR_SHADOW_TENANT")
    """Tenant that pays for shadow answers and whose operations hold what they were compared with; no user of it should be a person."""
    default_tier: str = Field("fast", validation_alias="TAILRACE_ORCHESTRATOR_DEFAULT_TIER")
    """Tier of a question that names neither tier nor model."""
    output_tokens_default: int = Field(1024, ge=1, le=64_000, validation_alias="TAILRACE_ORCHESTRATOR_OUTPUT_TOKENS_DEFAULT")
    """Most tokens of an answer to a question that sets no bound."""
    output_tokens_min: int = Field(256, ge=0, le=64_000, validation_alias="TAILRACE_ORCHESTRATOR_OUTPUT_TOKENS_MIN")
    """An answer that a budget cannot pay in full is made shorter, but not below this; then it is refused. 0 = never shorter."""
    prompt_tokens_max: int = Field(65_536, ge=4_096, le=1_000_000, validation_alias="TAILRACE_ORCHESTRATOR_PROMPT_TOKENS_MAX")
    """Bound of a prompt, counted as bytes (see compose.tokens_max), so about a quarter of it in real tokens."""
    passages_max: int = Field(8, ge=1, le=32, validation_alias="TAILRACE_ORCHESTRATOR_PASSAGES_MAX")
    """Passages to ask for. Eight hold the answer nearly always and keep prompts short."""
    history_turns_max: int = Field(6, ge=0, le=50, validation_alias="TAILRACE_ORCHESTRATOR_HISTORY_TURNS_MAX")
    """Turns put before a question that leans on the conversation, whole; up to twice as many while no summary covers the older ones."""
    history_tokens_max: int = Field(24_576, ge=1_024, le=1_000_000, validation_alias="TAILRACE_ORCHESTRATOR_HISTORY_TOKENS_MAX")
    """Bound of these turns, counted as bytes like that of a prompt. The oldest go first."""
    passages_tokens_max: int = Field(32_768, ge=1_024, le=1_000_000, validation_alias="TAILRACE_ORCHESTRATOR_PASSAGES_TOKENS_MAX")
    """Bound of the passages of a prompt, counted as bytes. The best one is there whatever its size, if the prompt has room for it."""
    prompts_dir: Path | None = Field(None, validation_alias="TAILRACE_PROMPTS_DIR")
    """Folder of prompt templates of one's own; what it does not have comes from the project's. Unset = only those."""
    answer_prompts: str = Field("answer.v1", max_length=1_024, validation_alias="TAILRACE_ORCHESTRATOR_ANSWER_PROMPTS")
    """Template of answers, and others for single tiers: `answer.v1, smart=answer.long.v2`."""
    prompts_kept_s: int = Field(0, ge=0, le=604_800, validation_alias="TAILRACE_ORCHESTRATOR_PROMPTS_KEPT_S")
    """How long the exact prompts of answers are kept for administrators, seconds; 0 = they are not. They hold questions and documents."""
    errands_tier: str = Field("fast", max_length=64, validation_alias="TAILRACE_ORCHESTRATOR_ERRANDS_TIER")
    """Tier whose cheapest model rewrites questions, summarises and gives titles. Empty, or no such tier or provider = all by rule."""
    rewrites: Literal["model", "rule"] = Field("model", validation_alias="TAILRACE_ORCHESTRATOR_REWRITES")
    """Who makes a question that leans on the conversation self-contained. The model has 1.5 s, then it is the rule."""
    titles: Literal["model", "rule"] = Field("rule", validation_alias="TAILRACE_ORCHESTRATOR_TITLES")
    """Who gives a new conversation its title. With `model` each costs one more small call, also one of a single question."""
    summaries: Literal["model", "rule", "off"] = Field("model", validation_alias="TAILRACE_ORCHESTRATOR_SUMMARIES")
    """Who summarises the older part of long conversations."""

    answers_max: int = Field(500, ge=1, le=10_000, validation_alias="TAILRACE_ORCHESTRATOR_ANSWERS_MAX")
    """Answers produced at the same time; above it new ones are refused, and those of priority `batch` above four fifths of it."""
    answers_per_user_max: int = Field(100, ge=1, le=10_000, validation_alias="TAILRACE_ORCHESTRATOR_ANSWERS_PER_USER_MAX")
    """Answers produced at the same time for one user."""
    logs_kept_max: int = Field(2_000, ge=1, le=100_000, validation_alias="TAILRACE_ORCHESTRATOR_LOGS_KEPT_MAX")
    """Ended answers whose events are still kept for resuming."""
    mirrors_max: int = Field(200, ge=1, le=10_000, validation_alias="TAILRACE_ORCHESTRATOR_MIRRORS_MAX")
    """Answers of other replicas that are read here at the same time. Each takes a connection to Redis."""
    lease_s: float = Field(10.0, ge=4, le=300, validation_alias="TAILRACE_ORCHESTRATOR_LEASE_S")
    """How long a replica that is silent counts as alive, seconds. Then its answers are ended as interrupted."""
    logs_timeout_s: float = Field(2.0, gt=0, le=30, validation_alias="TAILRACE_ORCHESTRATOR_LOGS_TIMEOUT_S")
    """Longest wait for the shared logs, seconds, besides what a reader waits for news."""
    logs_bytes_max: int = Field(64 * 1024 * 1024, ge=0, le=2**40, validation_alias="TAILRACE_ORCHESTRATOR_LOGS_BYTES_MAX")
    """Room in Redis for the logs of ended answers of this replica; beyond it they are kept for half a minute only."""
    logs_kept_s: float = Field(600.0, ge=0, le=86_400, validation_alias="TAILRACE_ORCHESTRATOR_LOGS_KEPT_S")
    """How long they are kept, here and in Redis, seconds."""
    detach_grace_s: float = Field(60.0, ge=0, le=3_600, validation_alias="TAILRACE_ORCHESTRATOR_DETACH_GRACE_S")
    """How long an answer goes on after its last reader left, seconds."""
    heartbeat_s: float = Field(15.0, gt=0, le=60, validation_alias="TAILRACE_ORCHESTRATOR_HEARTBEAT_S")
    """Silence after which a reader gets a heartbeat, seconds. Proxies cut idle streams after 30 to 60."""

    cache_scope: Literal["tenant", "user"] = Field("tenant", validation_alias="TAILRACE_ORCHESTRATOR_CACHE_SCOPE")
    """Who shares cached answers. Documents belong to the tenant and only questions that stand alone are cached, so a tenant may."""
    cache_ttl_s: int = Field(86_400, ge=1, le=2_592_000, validation_alias="TAILRACE_ORCHESTRATOR_CACHE_TTL_S")
    """Life of an exact answer, seconds."""
    cache_timeout_s: float = Field(0.25, gt=0, le=5, validation_alias="TAILRACE_ORCHESTRATOR_CACHE_TIMEOUT_S")
    """Longest wait for the exact cache, seconds. A slow cache is worse than none."""

    mcp_servers: Path | None = Field(None, validation_alias="TAILRACE_MCP_SERVERS")
    """TOML file of the MCP servers whose tools answers may use; see docs/tools.md. Unset = none."""
    fetch_hosts: str = Field("", validation_alias="TAILRACE_FETCH_HOSTS")
    """Hosts the tool `fetch_url` may fetch from, comma-separated: `example.com`, `*.example.com`. Empty = there is no such tool."""
    tools_confirmed: str = Field("", validation_alias="TAILRACE_TOOLS_CONFIRMED")
    """Tools, comma-separated, each call of which a person must allow; `server__*` = all of a server. Besides those its file marks so."""
    tools_rounds_max: int = Field(8, ge=1, le=16, validation_alias="TAILRACE_TOOLS_ROUNDS_MAX")
    """Rounds of calls in one answer. Then the model is told to answer without."""
    tools_cost_nanousd_max: int = Field(1_000_000_000, ge=0, le=10**15, validation_alias="TAILRACE_TOOLS_COST_NANOUSD_MAX")
    """What an answer's calls of models may have cost before a further round, nano-USD; 0 = no bound but the payer's budgets. Answers
    cost 0.01 to 0.50 USD, so the default stops only one that goes on for nothing."""
    tools_call_s: float = Field(20.0, gt=0, le=300, validation_alias="TAILRACE_TOOLS_CALL_S")
    """Longest time of one call, seconds; never more than half of what is left of the answer's deadline."""
    tools_confirm_s: float = Field(60.0, gt=0, le=600, validation_alias="TAILRACE_TOOLS_CONFIRM_S")
    """How long a call waits for a person's word before it counts as refused, seconds."""
    tools_result_bytes_max: int = Field(16_384, ge=256, le=65_536, validation_alias="TAILRACE_TOOLS_RESULT_BYTES_MAX")
    """Of one result; what is longer is cut."""
    tools_results_bytes_max: int = Field(131_072, ge=256, le=1_048_576, validation_alias="TAILRACE_TOOLS_RESULTS_BYTES_MAX")
    """Of all results of one answer."""
    tools_pending_s: float = Field(900.0, ge=1, le=86_400, validation_alias="TAILRACE_TOOLS_PENDING_S")
    """How long an answer waits for the results of its client's tools, seconds."""
    tools_pending_bytes_max: int = Field(64 * 1024 * 1024, ge=0, le=2**40, validation_alias="TAILRACE_TOOLS_PENDING_BYTES_MAX")
    """Room in Redis for such answers of this replica; beyond it they end in an error."""

    credit_leases_max: int = Field(500, ge=0, le=10_000, validation_alias="TAILRACE_ORCHESTRATOR_CREDIT_LEASES_MAX")
    """Users and keys for whom a slice of budget is held ready, so that they are answered while the ledger is out of reach; 0 = none."""

    spool_records_max: int = Field(100_000, ge=1, le=10_000_000, validation_alias="TAILRACE_ORCHESTRATOR_SPOOL_RECORDS_MAX")
    """Records that may wait for the ledger; above it new answers are refused, and nothing is dropped."""

    @field_validator("fetch_hosts")
    @classmethod
    def _hosts_can_be_read(cls, hosts: str) -> str:
        parse_hosts(hosts)
        return hosts
