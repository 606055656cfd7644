"""What the gateway is told. No default of another module is repeated here."""

import ipaddress
import re
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from services.chassis.config import ServiceSettings
from services.chassis.tls import check_pair

DEVELOPMENT_ISSUER = "tailrace-dev"


class Settings(ServiceSettings):
    """Settings of the edge."""

    prefix: ClassVar[str] = "TAILRACE_GATEWAY_"

    http_port: int = Field(8080, ge=0, le=65535, validation_alias="TAILRACE_HTTP_PORT")
    """Where browsers and HTTP clients connect; 0 = any free port."""
    grpc_port: int = Field(50050, ge=0, le=65535, validation_alias="TAILRACE_GATEWAY_PORT")
    """Where internal services with a token connect over gRPC."""
    operations_port: int = Field(0, ge=0, le=65535, validation_alias="TAILRACE_GATEWAY_OPERATIONS_PORT")
    """Where /metrics and the details of /readyz are served. 0 = on the HTTP port in development, nowhere in production."""
    http_tls_cert_file: Path | None = Field(None, validation_alias="TAILRACE_HTTP_TLS_CERT_FILE")
    """Certificate in PEM of the HTTP port. Unset = plaintext, for a proxy in front that ends TLS."""
    http_tls_key_file: Path | None = Field(None, validation_alias="TAILRACE_HTTP_TLS_KEY_FILE")
    """Its key in PEM, not encrypted."""
    http_connections_per_peer_max: int = Field(1000, ge=0, le=100_000, validation_alias="TAILRACE_HTTP_CONNECTIONS_PER_PEER_MAX")
    """Open HTTP connections of one address. 0 = no bound, for a proxy in front, which is one address for everybody."""
    grpc_connections_per_peer_max: int = Field(1000, ge=0, le=5_000, validation_alias="TAILRACE_GATEWAY_CONNECTIONS_PER_PEER_MAX")
    """Open gRPC connections of one address; the newest beyond it are cut within seconds. 0 = no bound, for a proxy in front."""
    own_target: str = Field("127.0.0.1:50050", validation_alias="TAILRACE_GATEWAY_TARGET")
    """Address under which others reach the gRPC port. Told to every service alike; not used by the gateway itself."""
    orchestrator_target: str = Field("127.0.0.1:50051", validation_alias="TAILRACE_ORCHESTRATOR_TARGET")
    """Where the orchestrator is: `host:port` or `dns:///name:port`."""
    retrieval_target: str = Field("127.0.0.1:50052", validation_alias="TAILRACE_RETRIEVAL_TARGET")
    """Where retrieval is."""
    ledger_target: str = Field("127.0.0.1:50053", validation_alias="TAILRACE_LEDGER_TARGET")
    """Where the ledger is."""
    redis_url: str = Field("redis://127.0.0.1:6379/0", validation_alias="REDIS_URL")
    """Where the request windows are kept, shared by all replicas."""

    jwt_issuer: str = Field(DEVELOPMENT_ISSUER, min_length=1, validation_alias="TAILRACE_JWT_ISSUER")
    """The one `iss` that is accepted."""
    jwt_audience: str = Field("tailrace", min_length=1, validation_alias="TAILRACE_JWT_AUDIENCE")
    """The one `aud` that is accepted."""
    jwks_url: str = Field("", pattern=r"^(https?://.+)?$", validation_alias="TAILRACE_JWKS_URL")
    """Where the issuer publishes its public keys. In production https, unless it is this machine itself."""
    jwks_path: Path | None = Field(None, validation_alias="TAILRACE_JWKS_FILE")
    """A file with the issuer's public keys. Unset in development = `dev-jwks.json` in the state directory."""
    jwks_refresh_s: float = Field(300.0, ge=1, le=86_400, validation_alias="TAILRACE_JWKS_REFRESH_S")
    """Published keys are read anew after this, so that a withdrawn key ends."""
    jwks_pause_s: float = Field(10.0, ge=1, le=300, validation_alias="TAILRACE_JWKS_PAUSE_S")
    """Between two readings of TAILRACE_JWKS_URL at least, whoever asks. So long an issuer waits before it signs with a new key."""
    jwt_hs256_secret: SecretStr = Field(SecretStr(""), validation_alias="TAILRACE_JWT_HS256_SECRET")
    """Shared secret of at least 32 bytes. HS256 is accepted only if it is set. Or TAILRACE_JWT_HS256_SECRET_FILE."""
    jwt_leeway_s: int = Field(30, ge=0, le=60, validation_alias="TAILRACE_JWT_LEEWAY_S")
    """How far the issuer's clock may be from ours."""

    jwt_lifetime_max_s: int = Field(2_678_400, ge=60, le=31_622_400, validation_alias="TAILRACE_JWT_LIFETIME_MAX_S")
    """Longest time from a token's issue, or from now if it does not say, to its end. Revocations of users are kept as long."""
    cors_origins: str = Field("", max_length=4096, validation_alias="TAILRACE_CORS_ORIGINS")
    """Origins whose scripts may call with a token, comma-separated: `https://app.example.com`. Exact; none by default."""

    requests_per_minute_default: int = Field(60, ge=1, le=1_000_000, validation_alias="TAILRACE_REQUESTS_PER_MINUTE_DEFAULT")
    """Limit of a user whose plan the ledger cannot tell right now."""
    replicas: int = Field(1, ge=1, le=1000, validation_alias="TAILRACE_GATEWAY_REPLICAS")
    """How many gateways there are. While Redis is away each admits its share of every limit, at least 1."""
    prompt_tokens_reserved: int = Field(4096, ge=0, le=1_000_000, validation_alias="TAILRACE_GATEWAY_PROMPT_TOKENS_RESERVED")
    """Tokens that an answer is charged at first besides its question and output, until what it used is known."""
    output_tokens_reserved: int = Field(1024, ge=1, le=64_000, validation_alias="TAILRACE_GATEWAY_OUTPUT_TOKENS_RESERVED")
    """Output tokens that an answer is charged at first if the request sets no bound. As TAILRACE_ORCHESTRATOR_OUTPUT_TOKENS_DEFAULT."""
    streams_max: int = Field(1200, ge=1, le=100_000, validation_alias="TAILRACE_GATEWAY_STREAMS_MAX")
    """Answers and resumed streams carried at the same time; above it new answers are turned away, those of priority `batch` at 80 %."""
    preparing_max: int = Field(64, ge=1, le=100_000, validation_alias="TAILRACE_GATEWAY_PREPARING_MAX")
    """Answers in a burst whose model was not asked yet; above it new ones are turned away, those of priority `batch` at 80 %."""
    preparing_standing_max: int = Field(12, ge=1, le=100_000, validation_alias="TAILRACE_GATEWAY_PREPARING_STANDING_MAX")
    """The same bound for a queue that stands: one that was not worked off to half of this within the last second."""
    loop_lag_max_s: float = Field(0.25, gt=0, le=60, validation_alias="TAILRACE_GATEWAY_LOOP_LAG_MAX_S")
    """Lasting delay of the event loop, seconds, above which new answers are turned away, those of priority `batch` at 80 %."""
    heartbeat_s: float = Field(15.0, gt=0, le=300, validation_alias="TAILRACE_HEARTBEAT_S")
    """Longest silence of a stream before a comment is sent, so that proxies keep it."""
    write_stall_s: float = Field(30.0, gt=0, le=600, validation_alias="TAILRACE_WRITE_STALL_S")
    """How long a reader may take nothing before it is let go. Its answer goes on and can be resumed."""
    body_stall_s: float = Field(30.0, gt=0, le=600, validation_alias="TAILRACE_BODY_STALL_S")
    """How long a request may send nothing while its body is awaited."""
    answer_deadline_s: float = Field(300.0, gt=0, le=3600, validation_alias="TAILRACE_ANSWER_DEADLINE_S")
    """Longest answer. The gateway waits a little longer, so that the orchestrator is the one to say so."""
    detach_grace_s: float = Field(60.0, ge=0, le=3_600, validation_alias="TAILRACE_ORCHESTRATOR_DETACH_GRACE_S")
    """How long the orchestrator lets an answer go on that nobody reads. So long one counts that was left before it said its id."""

    @model_validator(mode="after")
    def _issuer_fits_the_environment(self) -> Self:
        if self.environment == "production":
            if self.jwt_issuer == DEVELOPMENT_ISSUER:
                raise ValueError(f"TAILRACE_JWT_ISSUER={DEVELOPMENT_ISSUER} is for development; name your own issuer")
            if not (self.jwks_url or self.jwks_path or self.jwt_hs256_secret.get_secret_value()):
                raise ValueError("one of TAILRACE_JWKS_URL, TAILRACE_JWKS_FILE and TAILRACE_JWT_HS256_SECRET is needed")
            if self.jwks_url and not _is_private_way(self.jwks_url):
                raise ValueError("TAILRACE_JWKS_URL has https in production: whoever changes keys on their way can sign as anybody")
        if self.http_certificate is not None:
            check_pair(*self.http_certificate)
        if self.jwks_url and self.jwks_path:
            raise ValueError("TAILRACE_JWKS_URL and TAILRACE_JWKS_FILE exclude each other")
        secret = self.jwt_hs256_secret.get_secret_value()
        if secret and len(secret.encode()) < 32:
            raise ValueError("TAILRACE_JWT_HS256_SECRET needs at least 32 bytes")
        _ = self.allowed_origins
        return self

    @property
    def http_certificate(self) -> tuple[Path, Path] | None:
        """Certificate and key of the HTTP port. Raises ValueError if only one is set."""
        if (self.http_tls_cert_file is None) != (self.http_tls_key_file is None):
            missing = "TAILRACE_HTTP_TLS_CERT_FILE" if self.http_tls_cert_file is None else "TAILRACE_HTTP_TLS_KEY_FILE"
            raise ValueError(f"TLS needs a certificate and its key; missing: {missing}")
        if self.http_tls_cert_file is None or self.http_tls_key_file is None:
            return None
        return self.http_tls_cert_file, self.http_tls_key_file

    @property
    def is_https(self) -> bool:
        """Whether browsers reach the edge over https alone: it ends TLS itself, or a proxy does, as production must."""
        return self.environment == "production" or self.http_certificate is not None

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The origins of `cors_origins`. Raises ValueError for one that no browser would send."""
        origins = frozenset(origin.strip() for origin in self.cors_origins.split(",") if origin.strip())
        for origin in origins:
            if not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", origin, re.ASCII):
                raise ValueError(f"TAILRACE_CORS_ORIGINS: {origin!r} is not an origin like https://app.example.com")
        return origins

    @property
    def jwks_file(self) -> Path | None:
        """The key file in force, if keys come from a file."""
        if self.jwks_path or self.jwks_url:
            return self.jwks_path
        if self.environment == "production" or self.jwt_hs256_secret.get_secret_value():
            return None
        return self.state_dir / "dev-jwks.json"


def _is_private_way(url: str) -> bool:
    """Whether nobody on the way to `url` can change what comes from there."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
