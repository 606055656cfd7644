"""compose.yaml, .env.example and the Dockerfile say nothing that the services do not understand, and all that they need."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.chassis.config import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
PORTS = {"gateway": 50050, "orchestrator": 50051, "retrieval": 50052, "ledger": 50053}
STORES = {"postgres", "valkey", "qdrant", "jaeger"}
SECRETS = {"TAILRACE_INTERNAL_KEY", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"}
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


NOT_PASSED = {
    # How a process ends is the image's affair; a service's own address is for the others.
    "DRAIN_NOTICE_MS DRAIN_GRACE_MS GATEWAY_TARGET ORCHESTRATOR_TARGET RETRIEVAL_TARGET LEDGER_TARGET": "fixed by compose.yaml",
    "JWT_HS256_SECRET JWT_LEEWAY_S RETRIEVAL_QDRANT_GRPC_PORT": "for other issuers and servers than those of compose.yaml",
    "REQUESTS_PER_MINUTE_DEFAULT HEARTBEAT_S WRITE_STALL_S BODY_STALL_S ANSWER_DEADLINE_S": "rarely changed; compose.override.yaml",
    "JWKS_REFRESH_S JWKS_PAUSE_S": "rarely changed; compose.override.yaml",
    "MODEL_CONNECT_S MODEL_FIRST_TOKEN_S MODEL_STALL_S PROMPTS_DIR": "rarely changed; compose.override.yaml",
    "TOOLS_RESULT_BYTES_MAX TOOLS_RESULTS_BYTES_MAX TOOLS_PENDING_S TOOLS_PENDING_BYTES_MAX": "bounds; compose.override.yaml",
    "ORCHESTRATOR_RESTART_PATIENCE_S ORCHESTRATOR_LEASE_S ORCHESTRATOR_LOGS_TIMEOUT_S ORCHESTRATOR_LOGS_BYTES_MAX": "inner workings",
    "ORCHESTRATOR_LOGS_KEPT_S ORCHESTRATOR_LOGS_KEPT_MAX ORCHESTRATOR_MIRRORS_MAX ORCHESTRATOR_SPOOL_RECORDS_MAX": "inner workings",
    "ORCHESTRATOR_DETACH_GRACE_S ORCHESTRATOR_HEARTBEAT_S ORCHESTRATOR_CACHE_TIMEOUT_S": "inner workings",
    "ORCHESTRATOR_SHADOW_TENANT ORCHESTRATOR_DEFAULT_TIER ORCHESTRATOR_ANSWER_PROMPTS ORCHESTRATOR_CACHE_SCOPE": "compose.override.yaml",
    "ORCHESTRATOR_CACHE_TTL_S ORCHESTRATOR_OUTPUT_TOKENS_DEFAULT ORCHESTRATOR_OUTPUT_TOKENS_MIN": "compose.override.yaml",
    "ORCHESTRATOR_PROMPT_TOKENS_MAX ORCHESTRATOR_PASSAGES_MAX ORCHESTRATOR_PASSAGES_TOKENS_MAX": "compose.override.yaml",
    "ORCHESTRATOR_HISTORY_TURNS_MAX ORCHESTRATOR_HISTORY_TOKENS_MAX": "compose.override.yaml",
    "ORCHESTRATOR_ANSWERS_MAX ORCHESTRATOR_ANSWERS_PER_USER_MAX": "compose.override.yaml",
    "RETRIEVAL_QDRANT_TIMEOUT_S RETRIEVAL_EMBED_QUANT RETRIEVAL_EMBEDDER_CUT RETRIEVAL_EMBEDDER_BATCH": "compose.override.yaml",
    "RETRIEVAL_EMBEDDER_TIMEOUT_S RETRIEVAL_EMBEDDER_ENCODING RETRIEVAL_EMBEDDER_FOLDER": "compose.override.yaml",
    "RETRIEVAL_LANGUAGE RETRIEVAL_FUSION RETRIEVAL_FUSION_PREFETCH": "chosen by measuring",
    "RETRIEVAL_FUSION_WEIGHT_DENSE RETRIEVAL_FUSION_WEIGHT_SPARSE RETRIEVAL_LATE_CANDIDATES": "chosen by measuring",
    "RETRIEVAL_RERANKER_CANDIDATES RETRIEVAL_RERANKER_TIMEOUT_S": "compose.override.yaml",
    "RETRIEVAL_CACHE_SIMILARITY_MIN RETRIEVAL_CACHE_TTL_S": "chosen by measuring",
    "RETRIEVAL_INGEST_JOBS_MAX RETRIEVAL_INGEST_BUFFER_MIB RETRIEVAL_INGEST_LEASE_S RETRIEVAL_INGEST_KEPT_S": "compose.override.yaml",
    "RETRIEVAL_INGEST_WATCHERS_MAX RETRIEVAL_INGEST_TIMEOUT_S": "compose.override.yaml",
    "RETRIEVAL_PARSE_WORKERS RETRIEVAL_PARSE_TIMEOUT_S RETRIEVAL_PARSE_MEMORY_MIB": "bound by mem_limit",
    "LEDGER_CONNECTIONS_MAX LEDGER_START_WAIT_S LEDGER_SWEEP_INTERVAL_MS LEDGER_SWEEP_GRACE_MS LEDGER_ROLL_INTERVAL_MS": "inner workings",
}
"""Settings that compose.yaml leaves at their defaults, without `TAILRACE_`, and why. Whoever adds a setting passes it or names it here."""


class Missing(Exception):
    """A variable that compose insists on is not set."""


def env_file(text: str) -> dict[str, str]:
    """The variables of an .env file."""
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated(node: Any, variables: dict[str, str]) -> Any:
    """A loaded file as compose reads it: variables are replaced in strings, after the YAML is parsed."""
    if isinstance(node, dict):
        return {key: interpolated(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        name, operator, operand = match[1], match[2], match[3]
        if name is None:
            return "$"
        found = variables.get(name)
        if found is None or (not found and operator and operator.startswith(":")):
            if operator in {"?", ":?"}:
                raise Missing(name)
            return operand or ""
        return found

    return VARIABLE.sub(value, node)


def compose(variables: dict[str, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = interpolated(yaml.safe_load((ROOT / "compose.yaml").read_text()), variables)
    return loaded


EXAMPLE = env_file((ROOT / ".env.example").read_text())
FILLED = {**EXAMPLE, **{name: "0123456789abcdef" * 3 for name in SECRETS}}


def settings_class(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"services.{service}.config")
    classes = (item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__)
    return next(item for item in classes if issubclass(item, ServiceSettings))


def environment(service: str) -> dict[str, str]:
    return {name: str(value) for name, value in compose(FILLED)["services"][service]["environment"].items()}


@pytest.mark.parametrize("service", PORTS)
def test_every_variable_that_compose_sets_is_claimed_by_the_service(service: str) -> None:
    """A variable nobody reads is a mistake in waiting."""
    claimed = set(settings_class(service).variables())

    assert set(environment(service)) - claimed == set()


def test_every_setting_reaches_its_service_or_is_said_not_to() -> None:
    """In .env it would be silently without effect."""
    left_out = {f"TAILRACE_{name}" for names in NOT_PASSED for name in names.split()} | {"QDRANT_API_KEY"}
    claimed = {service: set(settings_class(service).variables()) for service in PORTS}
    missing = {service: names - set(environment(service)) for service, names in claimed.items()}

    assert {service: names - left_out for service, names in missing.items()} == {service: set() for service in PORTS}
    assert left_out - set().union(*missing.values()) == set(), "named without need"


@pytest.mark.parametrize("service", PORTS)
def test_the_settings_of_compose_are_accepted_and_services_find_each_other(service: str) -> None:
    """With its secrets filled in, .env.example starts every service on its default port, where the others look for it."""
    settings = settings_class(service).load(environment(service))
    described = dict(line.split("=", 1) for line in settings.described().splitlines())
    targets = {name: value for name, value in described.items() if name.endswith("_TARGET") and value.startswith("dns:")}

    assert described[f"TAILRACE_{service.upper()}_PORT"] == str(PORTS[service])
    assert described["TAILRACE_BIND_HOST"] == "0.0.0.0"
    for name, value in targets.items():
        other = name.removeprefix("TAILRACE_").removesuffix("_TARGET").lower()
        assert value == f"dns:///{other}:{PORTS[other]}"


def test_an_issuer_of_ones_own_is_named_by_its_keys_url_or_file_alone() -> None:
    """As .env.example says. Without either the gateway reads the key that the service `identity` has made."""
    own = {**FILLED, "TAILRACE_ENV": "production", "TAILRACE_JWT_ISSUER": "https://login.example.com/"}

    def gateway(**variables: str) -> Any:
        stack = compose({**own, **variables})["services"]["gateway"]
        return settings_class("gateway").load({name: str(value) for name, value in stack["environment"].items()})

    by_url, by_file = gateway(TAILRACE_JWKS_URL="https://login.example.com/keys"), gateway(TAILRACE_JWKS_FILE="/keys/jwks.json")
    development: Any = settings_class("gateway").load(environment("gateway"))
    services = compose(FILLED)["services"]
    made_in = services["identity"]["environment"]["TAILRACE_STATE_DIR"]

    assert (by_url.jwks_url, by_url.jwks_file) == ("https://login.example.com/keys", None)
    assert (by_file.jwks_url, by_file.jwks_file) == ("", Path("/keys/jwks.json"))
    assert f"identity:{made_in}" in services["identity"]["volumes"]
    assert f"identity:{development.jwks_file.parent}:ro" in services["gateway"]["volumes"]


def test_compose_refuses_to_start_without_each_secret() -> None:
    """.env.example holds no secret, and none has a default."""
    for secret in SECRETS:
        with pytest.raises(Missing, match=secret):
            compose({**FILLED, secret: ""})

    assert {name for name in SECRETS if EXAMPLE[name]} == set()


def test_every_variable_of_the_example_is_used() -> None:
    """.env.example names, commented out or not, exactly what compose.yaml reads."""
    named = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    read = {match[1] for match in VARIABLE.finditer((ROOT / "compose.yaml").read_text()) if match[1]}

    assert named == read


def test_the_stores_are_there_pinned_and_checked() -> None:
    """Every image has an exact version, every store but Jaeger a health check, and PostgreSQL 18 its volume where it looks."""
    services = compose(FILLED)["services"]
    unpinned = [name for name, service in services.items() if not re.search(r":v?\d+\.\d+[\w.-]*$", service["image"])]
    unchecked = [name for name in STORES - {"jaeger"} if "test" not in services[name].get("healthcheck", {})]

    assert set(services) >= STORES
    assert unpinned == []
    assert unchecked == []
    assert services["postgres"]["volumes"] == ["postgres-data:/var/lib/postgresql"]


def test_only_loopback_ports_are_published() -> None:
    """Nothing of compose.yaml is reachable from another machine."""
    published = [port for service in compose(FILLED)["services"].values() for port in service.get("ports", [])]

    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_every_volume_and_dependency_exists_and_is_waited_for_properly() -> None:
    """A dependency is waited for until it is healthy, or done where it runs once."""
    stack = compose(FILLED)
    services = stack["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in stack["volumes"]
        for name, how in service.get("depends_on", {}).items():
            once = services[name]["restart"] == "no"
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")
            assert once or "test" in services[name]["healthcheck"]


def test_the_services_run_unprivileged() -> None:
    """No root, no capabilities, no writable file system but their volumes."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    services = compose(FILLED)["services"]
    for name in PORTS:
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["command"][-1] == f"services.{name}"

    assert re.search(r"^USER tailrace$", dockerfile, re.MULTILINE)


def test_the_image_is_built_from_pinned_bases_and_exposes_the_default_ports() -> None:
    """The Dockerfile's bases have exact versions; its ports are the settings' defaults; it copies only what exists."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    exposed = set(map(int, re.findall(r"^EXPOSE (.*)$", dockerfile, re.MULTILINE)[0].split()))
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]]

    assert [base for base in bases if not re.fullmatch(r"python:3\.\d+\.\d+-[a-z-]+", base)] == []
    assert exposed == {8080, *PORTS.values()}
    assert [name for name in copied if not (ROOT / name).exists()] == []
