"""Environment to frozen settings: every mistake is reported at once and secrets are masked in every repr.

Nothing here reads the environment at import. A field's alias is the variable's full name, so that what compose.yaml sets
can be compared with what a service reads.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import AliasChoices, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from services.chassis.tls import MutualTls

SettingsT = TypeVar("SettingsT", bound="ServiceSettings")


class SettingsError(Exception):
    """One or more settings are wrong; the text lists all of them."""


def variable(field: FieldInfo, name: str) -> str:
    """The environment variable a field is read from."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = str(alias.choices[0])
    return str(alias or name).upper()


def environment() -> Mapping[str, str]:
    """The process's environment, for files that name a variable instead of holding a secret. Settings come through `load`."""
    return os.environ


class ServiceSettings(BaseSettings):
    """What every service is told. Subclasses add their own fields and set `prefix`."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True, populate_by_name=True, env_file=None)

    prefix: ClassVar[str] = ""
    """Variables that begin with this and that no field claims are mistakes."""

    environment: Literal["development", "production"] = Field("development", validation_alias="TAILRACE_ENV")
    """In production no development issuer, no reflection and no default secret is accepted."""
    state_dir: Path = Field(Path(".tailrace"), validation_alias="TAILRACE_STATE_DIR")
    """Folder for what this process keeps on disk."""
    bind_host: str = Field("127.0.0.1", validation_alias="TAILRACE_BIND_HOST")
    """Address to listen on. Loopback by default: inner ports are not for the outside."""
    internal_key: SecretStr = Field(SecretStr(""), validate_default=True, validation_alias="TAILRACE_INTERNAL_KEY")
    """Key that signs principals between services, at least 16 characters, the same in all of them. Or TAILRACE_INTERNAL_KEY_FILE."""
    tls_cert_file: Path | None = Field(None, validation_alias="TAILRACE_TLS_CERT_FILE")
    """This service's certificate in PEM, valid for the names others reach it under. Set with the next two, every call between services is
    mutual TLS; the internal key is needed all the same."""
    tls_key_file: Path | None = Field(None, validation_alias="TAILRACE_TLS_KEY_FILE")
    """The certificate's key in PEM, not encrypted."""
    tls_ca_file: Path | None = Field(None, validation_alias="TAILRACE_TLS_CA_FILE")
    """The authority, in PEM, whose certificates are believed, of clients and of servers."""
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", validation_alias="TAILRACE_LOG_LEVEL")
    """Least severe level that is written."""
    otlp_endpoint: str = Field("", validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """Where spans go over OTLP/gRPC, such as http://jaeger:4317. Empty = nowhere."""
    otlp_metrics_endpoint: str = Field("", validation_alias="OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    """Where gauges go over OTLP/gRPC, such as http://collector:4317. Empty = nowhere: Jaeger, for one, takes spans alone."""
    drain_notice_ms: int = Field(0, ge=0, le=60_000, validation_alias="TAILRACE_DRAIN_NOTICE_MS")
    """Wait between turning not ready and refusing calls, so that balancers notice. 0 on one machine."""
    drain_grace_ms: int = Field(10_000, ge=0, le=600_000, validation_alias="TAILRACE_DRAIN_GRACE_MS")
    """How long running calls may go on after a stop signal."""

    _environ: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` hands over counts, so that tests and compose see the same rules."""
        return (init_settings,)

    @field_validator("internal_key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if len(key.get_secret_value()) < 16:
            raise ValueError("needs at least 16 characters")
        return key

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        self.mutual_tls()
        return self

    def mutual_tls(self) -> MutualTls | None:
        """What the services prove themselves to each other with; None = plaintext. Raises ValueError."""
        files = {"CERT": self.tls_cert_file, "KEY": self.tls_key_file, "CA": self.tls_ca_file}
        missing = [f"TAILRACE_TLS_{name}_FILE" for name, path in files.items() if path is None]
        if len(missing) == len(files):
            return None
        if self.tls_cert_file is None or self.tls_key_file is None or self.tls_ca_file is None:
            raise ValueError(f"mutual TLS needs its certificate, key and authority together; missing: {', '.join(missing)}")
        return MutualTls.read(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)

    @classmethod
    def variables(cls) -> dict[str, str]:
        """Field name by environment variable."""
        return {variable(field, name): name for name, field in cls.model_fields.items()}

    @classmethod
    def load(cls: type[SettingsT], environ: Mapping[str, str] | None = None) -> SettingsT:
        """Read the settings from `environ`. Raises SettingsError that names every mistake at once.

        A secret `X` may come as `X_FILE`, the path of a file that holds it. An empty variable counts as unset.
        """
        environ = os.environ if environ is None else environ
        known, values, mistakes = cls.variables(), {}, []
        for name, field_name in known.items():
            if environ.get(name):
                values[field_name] = environ[name]
            elif path := environ.get(f"{name}_FILE"):
                try:
                    values[field_name] = Path(path).read_text().strip()
                except OSError as error:
                    mistakes.append(f"{name}_FILE: {error.strerror}: {path}")
        claimed = {*known, *(f"{name}_FILE" for name in known)}
        if cls.prefix:
            mistakes += [f"{name}: no such setting" for name in sorted(environ) if name.startswith(cls.prefix) and name not in claimed]
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            by_field = {field_name: name for name, field_name in known.items()}
            for mistake in error.errors(include_input=False, include_url=False):
                place = str(mistake["loc"][0]) if mistake["loc"] else ""
                mistakes.append(f"{by_field.get(place, place)}: {mistake['msg']}".removeprefix(": "))
        if mistakes:
            raise SettingsError("\n".join(mistakes))
        settings._environ = environ
        return settings

    def secret_named(self, name: str) -> SecretStr:
        """The secret in a variable whose name a configuration file chooses, or in the file that NAME_FILE names; empty if there is none.

        Raises SettingsError.
        """
        if value := self._environ.get(name):
            return SecretStr(value)
        if path := self._environ.get(f"{name}_FILE"):
            try:
                return SecretStr(Path(path).read_text().strip())
            except OSError as error:
                raise SettingsError(f"{name}_FILE: {error.strerror}: {path}") from error
        return SecretStr("")

    def described(self) -> str:
        """Every variable with its value, one a line, secrets masked."""
        names = {field_name: name for name, field_name in self.variables().items()}
        return "\n".join(f"{names[field]}={getattr(self, field)}" for field in type(self).model_fields)
